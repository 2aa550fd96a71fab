//! Trainings over HTTP: what is accepted, what is refused, and that nothing stays of what is refused.

use reqwest::Method;
use serde_json::{Value, json};

use super::house::{House, form, problem, refusal};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_accepted_seen_listed_canceled_and_deleted() {
    let house = House::start().await;
    let response = house.post_job(form(3, "mug")).await;
    assert_eq!(response.status(), 202);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    assert!(response.headers().contains_key("retry-after"));
    let job: Value = response.json().await.unwrap();
    let id = job["id"].as_str().unwrap();
    assert_eq!(location, format!("{}/v1/jobs/{id}", house.url));
    assert_eq!((&job["state"], &job["class_name"]), (&json!("queued"), &json!("mug")));
    assert_eq!(job["options"]["steps"], 800);
    assert_eq!(job["photos"][0], json!({ "width": 64, "height": 64, "warnings": [] }));

    let path = format!("/v1/jobs/{id}");
    let seen: Value = house.get(&path).await.json().await.unwrap();
    assert_eq!((&seen["id"], &seen["queue_position"]), (&job["id"], &json!(0)));
    let listed: Value = house.get("/v1/jobs").await.json().await.unwrap();
    assert_eq!((&listed["data"][0]["id"], &listed["next_cursor"]), (&job["id"], &Value::Null));

    let canceled = house.ask(Method::POST, &format!("{path}/cancel")).send().await.unwrap();
    assert_eq!(canceled.status(), 202);
    let canceled: Value = canceled.json().await.unwrap();
    assert_eq!(canceled["state"], "canceled");
    let again = house.ask(Method::POST, &format!("{path}/cancel")).send().await.unwrap();
    assert_eq!(again.json::<Value>().await.unwrap(), canceled, "it is the same the second time");

    let deleted = house.ask(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(deleted.status(), 204);
    assert_eq!(refusal(house.get(&path).await).await, (404, "not-found".into()));
    let again = house.ask(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(refusal(again).await.0, 404);
    house.stop().await;
}

// case 21
#[tokio::test(flavor = "multi_thread")]
async fn three_to_five_photos_are_wanted() {
    let house = House::start().await;
    for n in [0, 1, 2, 6, 100] {
        let (status, slug, body) = problem(house.post_job(form(n, "mug")).await).await;
        assert_eq!((status, slug.as_str(), &body["pointer"]), (422, "field", &json!("/images")), "{n} photos");
    }
    house.is_clean().await;
    for n in [3, 4, 5] {
        assert_eq!(house.post_job(form(n, "mug")).await.status(), 202);
    }
    house.stop().await;
}
