//! Server-sent events of a training.

use std::time::Duration;

use futures_util::StreamExt;
use hypnos::job::Kind;
use hypnos::store::Scope;
use reqwest::{Method, Response};
use serde_json::Value;

use super::scripted::Script;
use super::test_app::{AppConfig, TestApp, form, refusal};
use super::test_workers::eventually;

/// A client that reads events.
struct Events {
    body: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    read: String,
    greeted: bool,
}

impl Events {
    fn of(response: Response) -> Self {
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: Box::pin(response.bytes_stream()), read: String::new(), greeted: false }
    }

    /// The fields of the next event after the comment that comes first; none when the stream has ended.
    async fn next(&mut self) -> Option<Vec<(String, String)>> {
        if !self.greeted {
            self.greeted = true;
            let first = self.following().await?;
            assert!(field(&first, "retry").is_some() && field(&first, "data").is_none(), "{first:?}");
        }
        self.following().await
    }

    async fn following(&mut self) -> Option<Vec<(String, String)>> {
        loop {
            if let Some(end) = self.read.find("\n\n") {
                let event: String = self.read.drain(..end + 2).collect();
                let fields = event.lines().filter_map(|line| line.split_once(':'));
                let fields =
                    fields.map(|(name, value)| (name.to_owned(), value.trim_start().to_owned())).collect();
                return Some(fields);
            }
            let chunk = self.body.next().await?.ok()?;
            self.read.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }
}

fn field<'a>(event: &'a [(String, String)], name: &str) -> Option<&'a str> {
    event.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_sent_once_and_the_end_of_the_job_ends_the_stream() {
    let app = TestApp::start().await;
    let options = r#"{"steps": 30, "class_images": 0, "evaluation": {"images": 1}}"#;
    let job: Value = app.post_job(form(3, "mug").text("options", options)).await.json().await.unwrap();
    let path = format!("/v1/jobs/{}/events", job["id"].as_str().unwrap());
    let mut events = Events::of(app.get(&path).await);
    let first = events.next().await.unwrap();
    assert_eq!(field(&first, "event"), Some("job"));
    let seen: Value = serde_json::from_str(field(&first, "data").unwrap()).unwrap();
    assert_eq!((&seen["id"], &seen["state"]), (&job["id"], &serde_json::json!("queued")));

    let worker = app.workers.start(&Script::new(Duration::from_millis(50)));
    let (mut versions, mut states) = (vec![field(&first, "id").unwrap().to_owned()], vec![]);
    loop {
        let event = events.next().await.expect("the stream ends after its last event");
        match field(&event, "event") {
            Some("job") => {
                let job: Value = serde_json::from_str(field(&event, "data").unwrap()).unwrap();
                versions.push(field(&event, "id").unwrap().to_owned());
                states.push(job["state"].as_str().unwrap().to_owned());
            }
            Some("end") => break,
            _ => {} // a comment that keeps the connection
        }
    }
    assert!(events.next().await.is_none());
    states.dedup();
    assert_eq!(states, ["running", "succeeded"]);
    let n_events = versions.len();
    versions.dedup();
    assert_eq!(versions.len(), n_events, "no version twice in a row");
    worker.stop().await;

    // A client that reconnects with the last id gets the end, and nothing else.
    let request = app.ask(Method::GET, &path).header("last-event-id", versions.last().unwrap());
    let mut events = Events::of(request.send().await.unwrap());
    assert_eq!(field(&events.next().await.unwrap(), "event"), Some("end"));
    assert!(events.next().await.is_none());
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_queue_position_is_sent_although_the_row_is_unchanged() {
    let app = TestApp::start().await;
    let first = app.new_job().await["id"].as_str().unwrap().to_owned();
    let second = app.new_job().await["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/jobs/{second}");
    let mut events = Events::of(app.get(&format!("{path}/events")).await);
    let place = |event: &[(String, String)]| {
        let job: Value = serde_json::from_str(field(event, "data").unwrap()).unwrap();
        (job["id"].as_str().unwrap().to_owned(), job["queue_position"].as_u64())
    };
    let event = events.next().await.unwrap();
    assert_eq!(place(&event), (second.clone(), Some(1)));
    let seen = app.get(&path).await.headers()["etag"].clone();
    let waiting =
        app.ask(Method::GET, &path).header("if-none-match", seen).header("prefer", "wait=50").send();
    let moves = async {
        let canceled = app.ask(Method::POST, &format!("/v1/jobs/{first}/cancel")).send().await.unwrap();
        assert_eq!(canceled.status(), 202);
        tokio::time::timeout(Duration::from_secs(20), events.next()).await.expect("an event").unwrap()
    };
    let began = std::time::Instant::now();
    let (waited, event) = tokio::join!(waiting, moves);
    assert_eq!(place(&event), (second, Some(0)));
    assert_eq!(waited.unwrap().json::<Value>().await.unwrap()["queue_position"], 0);
    assert!(began.elapsed() < Duration::from_secs(20), "whoever waits for a change hears of it too");
    app.stop().await;
}

// case 43
#[tokio::test(flavor = "multi_thread")]
async fn streams_are_limited_and_a_disconnected_client_frees_its_slot() {
    let mut config = AppConfig::default();
    config.settings.streams_max = 3;
    let app = TestApp::build(config).await;
    let path = format!("/v1/jobs/{}/events", app.new_job().await["id"].as_str().unwrap());
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut events = Events::of(app.get(&path).await);
        events.next().await.unwrap();
        open.push(events);
    }
    let refused = app.get(&path).await;
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refusal(refused).await, (429, "too-many-requests".into()));
    open.pop();
    eventually("a place is free", async || (app.get(&path).await.status() == 200).then_some(())).await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_the_server_with_its_job_and_with_its_key() {
    let mut config = AppConfig::default();
    config.settings.key_time = Duration::from_millis(50);
    let app = TestApp::build(config).await;
    let id = app.new_job().await["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/jobs/{id}/events");

    let reader = app.new_key(app.tenant, Scope::Read, None).await;
    let mut events = Events::of(app.ask_as(&reader, Method::GET, &path).send().await.unwrap());
    events.next().await.unwrap();
    app.workers.store.revoke_key(&reader[4..16]).await.unwrap();
    let last = events.next().await.unwrap();
    assert!(field(&last, "retry").is_some() && events.next().await.is_none());

    let other = app.new_job().await["id"].as_str().unwrap().to_owned();
    let mut events = Events::of(app.get(&format!("/v1/jobs/{other}/events")).await);
    events.next().await.unwrap();
    app.ask(Method::DELETE, &format!("/v1/jobs/{other}")).send().await.unwrap();
    assert_eq!(field(&events.next().await.unwrap(), "event"), Some("end"));
    assert!(app.row(&other, Kind::Train).await.is_none());

    let mut events = Events::of(app.get(&path).await);
    events.next().await.unwrap();
    app.closing.cancel();
    let last = events.next().await.unwrap();
    assert_eq!(field(&last, "retry"), Some("2000"));
    assert!(events.next().await.is_none());
    app.stop().await;
}
