//! Limits shared by tenants: no tenant can block another.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use hypnos::store::Scope;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::test_app::{AppConfig, TestApp, form, refusal};
use super::test_workers::eventually;

/// Much less than the time that a body may take to come.
const SOON: Duration = Duration::from_secs(15);

impl TestApp {
    /// A key of another tenant.
    async fn neighbour(&self) -> String {
        let tenant = self.workers.store.ensure_tenant("second").await.unwrap();
        self.new_key(tenant, Scope::Write, None).await
    }

    /// A request whose body is announced and does not come.
    async fn stuck(&self, path: &str, content_type: &str) -> TcpStream {
        let mut stream = self.connect().await;
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 10000\r\n\
             Content-Type: {content_type}\r\n\r\n--b",
            self.key
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    }

    async fn post_job_as(&self, key: &str) -> Response {
        let request = self.ask_as(key, Method::POST, "/v1/jobs").multipart(form(3, "mug"));
        request.send().await.unwrap()
    }
}

// case A8
#[tokio::test(flavor = "multi_thread")]
async fn idle_uploads_of_one_tenant_hold_up_neither_another_nor_its_own() {
    let mut config = AppConfig::default();
    config.settings.uploads_max = 4;
    let app = TestApp::build(config).await;
    let neighbour = app.neighbour().await;
    let mut idle = Vec::new();
    for _ in 0..16 {
        idle.push(app.stuck("/v1/jobs", "multipart/form-data; boundary=b").await);
    }
    tokio::time::sleep(Duration::from_millis(300)).await; // all are under way
    let began = Instant::now();
    let answers = futures_util::future::join_all((0..8).map(|_| app.post_job_as(&neighbour))).await;
    for answer in answers {
        assert_eq!(answer.status(), 202, "{}", answer.text().await.unwrap());
    }
    assert_eq!(app.post_job(form(3, "mug")).await.status(), 202);
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    // The uploads that made room got an answer.
    let mut answers = String::new();
    for stream in &mut idle {
        let mut answer = [0; 4096];
        let read = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut answer)).await;
        if let Ok(Ok(n)) = read {
            answers.push_str(&String::from_utf8_lossy(&answer[..n]));
        }
    }
    assert!(answers.contains("HTTP/1.1 429") && answers.contains("retry-after: "), "{answers}");
    app.stop().await;
}

// case A8
#[tokio::test(flavor = "multi_thread")]
async fn slow_bodies_of_one_tenant_hold_up_no_request_of_another() {
    let mut config = AppConfig::default();
    config.settings.requests_max = 4;
    let app = TestApp::build(config).await;
    let trained = app.finished().await;
    let neighbour = app.neighbour().await;
    let mut idle = Vec::new();
    for _ in 0..16 {
        idle.push(app.stuck(&format!("/v1/jobs/{trained}/sample"), "application/json").await);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let began = Instant::now();
    let list = app.ask_as(&neighbour, Method::GET, "/v1/jobs").send().await.unwrap();
    assert_eq!(list.status(), 200);
    assert_eq!(app.get("/v1/jobs").await.status(), 200, "its own either");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let sample = json!({ "prompts": ["{product}"] });
    let path = format!("/v1/jobs/{trained}/sample");
    let body = app.ask_as(&neighbour, Method::POST, &path).json(&sample).send().await.unwrap();
    assert_eq!(refusal(body).await, (404, "not-found".into()), "its body was read");
    let own = app.ask(Method::POST, &path).json(&sample).send().await.unwrap();
    assert_eq!(own.status(), 202);
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    app.stop().await;
}

// case A8
#[tokio::test(flavor = "multi_thread")]
async fn waits_of_one_tenant_are_cut_short_before_another_s_are_and_none_is_refused() {
    let mut config = AppConfig::default();
    config.settings.waits_max = 4;
    config.settings.requests_max = 4;
    let app = TestApp::build(config).await;
    let neighbour = app.neighbour().await;
    let own = format!("/v1/jobs/{}", app.new_job().await["id"].as_str().unwrap());
    let theirs: Value = app.post_job_as(&neighbour).await.json().await.unwrap();
    let theirs = format!("/v1/jobs/{}", theirs["id"].as_str().unwrap());
    let wait = |key: &str, path: &str| {
        let request = app.ask_as(key, Method::GET, path).header("prefer", "wait=600");
        tokio::spawn(async move {
            let began = Instant::now();
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.json::<Value>().await.unwrap(), began.elapsed())
        })
    };
    let many: Vec<_> = (0..12).map(|_| wait(&app.key, &own)).collect();
    let short = eventually("those beyond the places are answered", async || {
        (many.iter().filter(|wait| wait.is_finished()).count() == 8).then_some(())
    });
    short.await;
    let patient = [wait(&neighbour, &theirs), wait(&neighbour, &theirs)];
    let made_room = eventually("two more make room", async || {
        (many.iter().filter(|wait| wait.is_finished()).count() == 10).then_some(())
    });
    made_room.await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(patient.iter().all(|wait| !wait.is_finished()), "they wait for what they asked for");
    for (key, path) in [(&neighbour, &theirs), (&app.key, &own)] {
        let canceled = app.ask_as(key, Method::POST, &format!("{path}/cancel")).send().await.unwrap();
        assert_eq!(canceled.status(), 202);
    }
    for wait in patient {
        let (status, job, _) = wait.await.unwrap();
        assert_eq!((status, &job["state"]), (200, &json!("canceled")));
    }
    let (mut ended, mut early) = (0, 0);
    for wait in many {
        let (status, job, _) = wait.await.unwrap();
        assert_eq!(status, 200);
        *if job["state"] == "canceled" { &mut ended } else { &mut early } += 1;
    }
    assert_eq!((ended, early), (2, 10));
    app.stop().await;
}

/// Whether a stream of events ends within a moment.
async fn ends(
    stream: &mut (impl futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Unpin),
) -> bool {
    let rest = async { while stream.next().await.is_some_and(|chunk| chunk.is_ok()) {} };
    tokio::time::timeout(Duration::from_secs(1), rest).await.is_ok()
}

// case A8, 43
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_with_many_streams_gives_some_up_for_one_with_few() {
    let mut config = AppConfig::default();
    config.settings.streams_max = 4;
    let app = TestApp::build(config).await;
    let neighbour = app.neighbour().await;
    let own = format!("/v1/jobs/{}/events", app.new_job().await["id"].as_str().unwrap());
    let theirs: Value = app.post_job_as(&neighbour).await.json().await.unwrap();
    let theirs = format!("/v1/jobs/{}/events", theirs["id"].as_str().unwrap());
    let open = async |key: &str, path: &str| app.ask_as(key, Method::GET, path).send().await.unwrap();
    let mut many = Vec::new();
    for _ in 0..4 {
        let stream = open(&app.key, &own).await;
        assert_eq!(stream.status(), 200);
        many.push(Box::pin(stream.bytes_stream()));
    }
    let refused = open(&app.key, &own).await;
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refusal(refused).await, (429, "too-many-requests".into()), "its share is all there is");
    let mut few = Vec::new();
    for _ in 0..2 {
        let stream = open(&neighbour, &theirs).await;
        assert_eq!(stream.status(), 200);
        few.push(Box::pin(stream.bytes_stream()));
    }
    let refused = open(&neighbour, &theirs).await;
    assert_eq!(refusal(refused).await, (429, "too-many-requests".into()), "they share alike");
    let mut ended = 0;
    for stream in &mut many {
        ended += usize::from(ends(stream).await);
    }
    assert_eq!(ended, 2);
    for stream in &mut few {
        assert!(!ends(stream).await);
    }
    app.stop().await;
}

// case A8
#[tokio::test(flavor = "multi_thread")]
async fn downloads_that_nobody_reads_hold_up_no_stream_of_another() {
    let mut config = AppConfig::default();
    config.settings.streams_max = 2;
    let app = TestApp::build(config).await;
    let neighbour = app.neighbour().await;
    let trained = app.trained().await;
    let files: Value = app.get(&format!("/v1/jobs/{trained}/artifacts")).await.json().await.unwrap();
    let url = files["data"][3]["url"].as_str().unwrap().to_owned();
    // A file larger than what lies between the two ends.
    let object = app.workers.store.artifact(app.tenant, trained, "report.json").await.unwrap().unwrap();
    let large = hypnos::job::Object { size: 64 << 20, ..object.clone() };
    let path = app.workers.objects().join(&object.key);
    std::fs::File::options().write(true).open(path).unwrap().set_len(large.size).unwrap();
    let now = jiff::Timestamp::now();
    let large = app.blobs.sign(&large, Duration::from_mins(5), now).await.unwrap();
    let mut unread = Vec::new();
    for _ in 0..2 {
        let mut stream = app.connect().await;
        let path = large.strip_prefix(&app.url).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        stream.readable().await.unwrap();
        unread.push(stream);
    }
    let refused = app.client.get(&url).send().await.unwrap();
    assert_eq!(refusal(refused).await, (429, "too-many-requests".into()));
    let theirs: Value = app.post_job_as(&neighbour).await.json().await.unwrap();
    let events = format!("/v1/jobs/{}/events", theirs["id"].as_str().unwrap());
    let stream = app.ask_as(&neighbour, Method::GET, &events).send().await.unwrap();
    assert_eq!(stream.status(), 200);
    // The one that was cut off has come to an end before all of it was there.
    let mut cut = 0;
    for mut stream in unread {
        let mut bytes = 0_u64;
        let mut buffer = vec![0; 1 << 16];
        let reading = async {
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                bytes += n as u64;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(5), reading).await;
        cut += usize::from(bytes < 32 << 20);
    }
    assert_eq!(cut, 1);
    app.stop().await;
}

// case A8, 63
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_nobody_uses_makes_room_for_a_new_one() {
    let app = TestApp::build(AppConfig { connections_max: 4, ..AppConfig::default() }).await;
    let mut kept = Vec::new();
    for _ in 0..4 {
        let mut stream = app.connect().await;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        kept.push(stream);
    }
    let began = Instant::now();
    app.is_alive().await;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "long before it is idle for too long: {:?}",
        began.elapsed()
    );
    app.stop().await;
}
