//! Reverse proxies in front of the server: a real nginx with its default settings.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use hypnos::http::Auth;
use reqwest::Method;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use super::nginx::Nginx;
use super::test_app::{AppConfig, TestApp, problem, refusal};

// case A3
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_keys_refuses_requests_from_a_proxy_and_says_how_to_use_keys() {
    let mut config = AppConfig::default();
    config.settings.auth = Auth::None;
    let app = TestApp::build(config).await;
    let ask = |name: &'static str, value: &'static str| {
        app.client.get(format!("{}/v1/jobs", app.url)).header(name, value).send()
    };
    for (name, value) in [
        ("forwarded", "for=192.0.2.60;proto=http;by=203.0.113.43"),
        ("x-forwarded-for", "192.0.2.60"),
        ("x-forwarded-host", "hypnos.example"),
        ("x-forwarded-proto", "https"),
        ("x-real-ip", "192.0.2.60"),
        ("via", "1.1 proxy"),
        ("x-forwarded-for", ""),
    ] {
        let (status, slug, body) = problem(ask(name, value).await.unwrap()).await;
        assert_eq!((status, slug.as_str()), (403, "proxied"), "{name}");
        let detail = body["detail"].as_str().unwrap();
        assert!(
            detail.contains(name) && detail.contains("--auth keys") && detail.contains("--public-url"),
            "{detail}"
        );
    }
    let old = app.raw(b"GET /v1/jobs HTTP/1.0\r\nHost: localhost\r\n\r\n").await;
    assert!(old.contains("/problems/proxied") && old.contains("HTTP/1.0"), "{old}");
    assert_eq!(ask("accept", "*/*").await.unwrap().status(), 200);

    // nginx as it comes, and as most set it up.
    let set_up = "proxy_http_version 1.1; proxy_set_header Host localhost; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;";
    for nginx in [Nginx::before(app.address).await, Nginx::with(app.address, set_up).await] {
        let answer = app.client.get(format!("{}/v1/jobs", nginx.url)).send().await.unwrap();
        assert_eq!(refusal(answer).await, (403, "proxied".into()));
        let ready = app.client.get(format!("{}/readyz", nginx.url)).send().await.unwrap();
        assert_eq!(ready.status(), 200, "what anybody may know");
    }
    app.stop().await;
}

// case A14
#[tokio::test(flavor = "multi_thread")]
async fn events_come_through_nginx_as_they_happen() {
    let app = TestApp::start().await;
    let nginx = Nginx::before(app.address).await;
    let path = format!("/v1/jobs/{}", app.new_job().await["id"].as_str().unwrap());
    let began = Instant::now();
    let answer = app.client.get(format!("{}{path}/events", nginx.url)).bearer_auth(&app.key).send();
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), 200);
    let mut events = Box::pin(answer.bytes_stream());
    let mut read = String::new();
    let mut until = async |wanted: &str| {
        while !read.contains(wanted) {
            let chunk = tokio::time::timeout(Duration::from_secs(10), events.next()).await;
            let chunk = chunk.unwrap_or_else(|_| panic!("no {wanted} in {read:?}")).unwrap().unwrap();
            read.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    };
    until("\"queued\"").await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let canceled = app.ask(Method::POST, &format!("{path}/cancel")).send().await.unwrap();
    assert_eq!(canceled.status(), 202);
    until("\"canceled\"").await;
    until("event: end").await;
    app.stop().await;
}

// case A14: nginx gives a server's answer up after 60 s
#[tokio::test(flavor = "multi_thread")]
async fn the_longest_wait_ends_before_nginx_times_out() {
    let app = TestApp::start().await;
    let nginx = Nginx::before(app.address).await;
    let path = format!("/v1/jobs/{}", app.new_job().await["id"].as_str().unwrap());
    let ask = app.client.get(format!("{}{path}", nginx.url)).bearer_auth(&app.key);
    let ask = ask.timeout(Duration::from_secs(90)).header("prefer", "wait=3600");
    let began = Instant::now();
    let answer = ask.send().await.unwrap();
    assert_eq!(answer.status(), 200, "after {:?}", began.elapsed());
    assert_eq!(answer.json::<serde_json::Value>().await.unwrap()["state"], json!("queued"));
    let waited = began.elapsed().as_secs_f64();
    assert!((49.0..55.0).contains(&waited), "{waited} s");
    app.stop().await;
}

// case A14
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_sends_its_first_byte_at_once_even_if_nothing_is_new() {
    let app = TestApp::start().await;
    let path = format!("/v1/jobs/{}", app.new_job().await["id"].as_str().unwrap());
    let has = app.get(&path).await.headers()["etag"].to_str().unwrap().to_owned();
    let has = has.trim_start_matches("W/").trim_matches('"').to_owned();
    let ask = app.ask(Method::GET, &format!("{path}/events")).header("last-event-id", has);
    let answer = ask.send().await.unwrap();
    assert_eq!(answer.headers()["x-accel-buffering"], "no");
    assert!(answer.headers()["cache-control"].to_str().unwrap().contains("no-transform"));
    let mut events = Box::pin(answer.bytes_stream());
    let first = tokio::time::timeout(Duration::from_secs(2), events.next()).await.expect("at once");
    let first = String::from_utf8(first.unwrap().unwrap().to_vec()).unwrap();
    assert!(first.starts_with(':') && first.contains("retry:") && !first.contains("data:"), "{first}");
    app.stop().await;
}

// case A8: an answer that is decided before the body is read is heard, whether or not the client sends on
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_expects_100_continue_is_refused_before_it_sends() {
    let app = TestApp::start().await;
    let head = |key: &str| {
        format!(
            "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 3000000000\r\n\
             Expect: 100-continue\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
        )
    };
    let mut stream = app.connect().await;
    stream.write_all(head(&app.key).as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let reading = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer);
    tokio::time::timeout(Duration::from_secs(5), reading).await.expect("the server closes").unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 413") && !answer.contains("100 Continue"), "{answer}");
    app.stop().await;
}
