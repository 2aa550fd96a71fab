//! The OpenAPI document: the committed one is current, and every operation in it follows the rules.

use hypnos::http::{ProblemKind, openapi};
use hypnos::job::JobId;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

use super::test_app::{TestApp, form, problem};

fn document() -> Value {
    serde_json::from_str(&openapi()).unwrap()
}

/// Every operation: its path, its method, what is said of it.
fn operations(document: &Value) -> Vec<(String, Method, Value)> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            operations.push((path.clone(), method.to_uppercase().parse().unwrap(), operation.clone()));
        }
    }
    assert!(operations.len() > 15);
    operations
}

fn is_keyed(operation: &Value) -> bool {
    operation.get("security").is_none()
}

#[test]
fn the_committed_document_is_the_generated_one() {
    let committed = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/openapi/hypnos.json"));
    let same = committed == openapi();
    assert!(same, "the API has changed; look at how, then: hypnos openapi > openapi/hypnos.json");
}

#[test]
fn every_operation_documents_its_purpose_and_its_errors() {
    let document = document();
    assert_eq!(document["openapi"], "3.1.0");
    let mut ids = Vec::new();
    for (path, method, operation) in operations(&document) {
        let about = format!("{method} {path}");
        ids.push(operation["operationId"].as_str().unwrap().to_owned());
        assert!(!operation["summary"].as_str().unwrap().is_empty(), "{about}");
        for slug in operation["x-problems"].as_array().unwrap() {
            let kind = ProblemKind::ALL.iter().find(|kind| slug == kind.slug()).unwrap();
            let response = &operation["responses"][kind.status().as_str()];
            assert!(response["description"].as_str().unwrap().contains(kind.slug()), "{about}: {slug}");
        }
        for parameter in path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
            let mut declared = operation["parameters"].as_array().unwrap().iter();
            assert!(declared.any(|one| one["name"] == parameter && one["in"] == "path"), "{about}");
        }
    }
    for operation in operations(&document) {
        for response in operation.2["responses"].as_object().unwrap().values() {
            for link in response["links"].as_object().into_iter().flatten() {
                assert!(ids.iter().any(|id| link.1["operationId"] == id.as_str()), "{link:?}");
            }
        }
    }
    let n = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), n, "each operation has an id of its own");
}

#[test]
fn every_reason_to_refuse_a_photo_is_a_documented_problem() {
    let decoder = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/crates/hypnos-photo/src/lib.rs"));
    let limits = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/photo.rs"));
    let source = [decoder, limits].concat();
    let words = source.split("Refusal::new(\"").skip(1).map(|rest| rest.split('"').next().unwrap());
    let words: Vec<_> = words.collect();
    assert!(words.len() >= 8, "{words:?}");
    for word in words {
        assert!(ProblemKind::ALL.iter().any(|kind| kind.slug() == word), "{word}");
    }
}

/// A request of that operation, on these ids, with a body that would do.
fn request(
    app: &TestApp,
    key: Option<&str>,
    path: &str,
    method: &Method,
    job: &str,
    sample: &str,
) -> RequestBuilder {
    let id = if path.starts_with("/v1/samples") { sample } else { job };
    let path = path.replace("{id}", id).replace("{name}", "weights.safetensors").replace("{n}", "0");
    let request = app.client.request(method.clone(), format!("{}{path}", app.url));
    let request = key.into_iter().fold(request, RequestBuilder::bearer_auth);
    match path.as_str() {
        "/v1/jobs" | "/v1/photos/inspect" if method == Method::POST => request.multipart(form(3, "mug")),
        path if path.ends_with("/sample") => request.json(&json!({ "prompts": ["{product}"] })),
        _ => request,
    }
}

// case 31
#[tokio::test(flavor = "multi_thread")]
async fn every_operation_documented_to_need_a_key_needs_one() {
    let app = TestApp::start().await;
    let id = app.new_job().await["id"].as_str().unwrap().to_owned();
    for (path, method, operation) in operations(&document()) {
        let answer = request(&app, None, &path, &method, &id, &id).send().await.unwrap();
        assert_eq!(answer.status() == 401, is_keyed(&operation), "{method} {path}");
    }
    assert!(app.row(&id, hypnos::job::Kind::Train).await.is_some());
    app.stop().await;
}

// case 33
#[tokio::test(flavor = "multi_thread")]
async fn every_operation_hides_what_belongs_to_another_tenant() {
    let app = TestApp::start().await;
    let job = app.trained().await.to_string();
    let sampled = app.ask(Method::POST, &format!("/v1/jobs/{job}/sample"));
    let sampled = sampled.json(&json!({ "prompts": ["{product}"] })).send().await.unwrap();
    let sample = sampled.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
    let stranger = app.workers.store.ensure_tenant("second").await.unwrap();
    let stranger = app.new_key(stranger, hypnos::store::Scope::Write, None).await;
    let nobody = JobId::new().to_string();

    let answered = async |response: Response| {
        let (status, slug, mut body) = problem(response).await;
        body["request_id"] = Value::Null;
        (status, slug, body)
    };
    let mut walked = 0;
    for (path, method, _) in operations(&document()).iter().filter(|(path, ..)| path.contains("{id}")) {
        let theirs = request(&app, Some(&stranger), path, method, &job, &sample).send().await.unwrap();
        let nothing = request(&app, Some(&stranger), path, method, &nobody, &nobody).send().await.unwrap();
        let (theirs, nothing) = (answered(theirs).await, answered(nothing).await);
        assert_eq!((theirs.0, theirs.1.as_str()), (404, "not-found"), "{method} {path}");
        assert_eq!(theirs, nothing, "{method} {path}: the answer reveals that it exists");
        walked += 1;
    }
    assert!(walked >= 12);
    for list in ["/v1/jobs", "/v1/samples", &format!("/v1/samples?job_id={job}")] {
        let page: Value =
            app.ask_as(&stranger, Method::GET, list).send().await.unwrap().json().await.unwrap();
        assert_eq!(page["data"], json!([]), "{list}");
    }
    // All is as it was.
    assert!(app.row(&job, hypnos::job::Kind::Train).await.is_some());
    let kept = app.row(&sample, hypnos::job::Kind::Sample).await.unwrap();
    assert!(!kept.cancel_requested);
    app.stop().await;
}
