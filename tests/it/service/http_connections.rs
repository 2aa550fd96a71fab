//! HTTP connections: malformed requests, slow clients, many clients, shutdown of the server.

use std::time::{Duration, Instant};

use hypnos::http::Timeouts;
use reqwest::Method;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::chaos::{Chaos, StoreFault};
use super::postgres::Postgres;
use super::test_app::{AppConfig, TestApp, form, problem, refusal};
use super::test_workers::{TestWorkers, eventually};

// case 34
#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_id_is_not_found() {
    let app = TestApp::start().await;
    let job = app.new_job().await;
    let id = job["id"].as_str().unwrap();
    let braces = format!("%7B{id}%7D");
    let cases = [
        "018f4e8e-0000-7000-8000-000000000000",
        "c232ab00-9414-11ec-b3c8-9f6bdeced846",
        &id.to_uppercase(),
        &braces,
        &id.replace('-', ""),
        &"%2f".repeat(36),
        &"/".repeat(36),
        "..",
        "%00",
        "%ff",
        "0",
        &"x".repeat(5000),
    ];
    for case in cases {
        for path in
            [format!("/v1/jobs/{case}"), format!("/v1/jobs/{case}/report"), format!("/v1/samples/{case}")]
        {
            let request = format!(
                "GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\r\n",
                app.key
            );
            let answer = app.raw(request.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
        }
    }
    app.stop().await;
}

// case 35
#[tokio::test(flavor = "multi_thread")]
async fn a_request_keeps_its_own_id_if_that_is_a_valid_one() {
    let app = TestApp::start().await;
    let ask = |id: String| app.client.get(format!("{}/healthz", app.url)).header("x-request-id", id).send();
    let long = "x".repeat(64);
    for kept in ["a", "A-1_b.2", &long] {
        assert_eq!(ask(kept.into()).await.unwrap().headers()["x-request-id"], kept);
    }
    for replaced in ["", "a b", "a;b", "\u{e9}", "<b>", &"x".repeat(65), &"x".repeat(10_000)] {
        let answer = ask(replaced.into()).await.unwrap();
        let own = answer.headers()["x-request-id"].to_str().unwrap();
        assert!(own.len() == 36 && own != replaced, "{replaced}");
    }
    let answer = app
        .raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\n b\r\nConnection: close\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 400") || !answer.contains("x-request-id: a\r\n"), "{answer}");
    app.stop().await;
}

// case 38
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_json_whatever_the_accept_header_says() {
    let app = TestApp::start().await;
    for accept in ["text/xml", "image/avif", "*/*;q=0", "nonsense"] {
        let answer = app.ask(Method::GET, "/v1/jobs").header("accept", accept).send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["content-type"]),
            (200, &"application/json".parse().unwrap())
        );
    }
    app.stop().await;
}

// case 39
#[tokio::test(flavor = "multi_thread")]
async fn an_unsupported_method_is_refused_with_the_supported_ones() {
    let app = TestApp::start().await;
    for (method, path, allow) in [
        ("PUT", "/v1/jobs", "GET,HEAD,POST"),
        ("PATCH", "/v1/jobs/x", "GET,HEAD,DELETE"),
        ("TRACE", "/v1/jobs", "GET,HEAD,POST"),
        ("OPTIONS", "/v1/jobs", "GET,HEAD,POST"),
        ("DELETE", "/healthz", "GET,HEAD"),
        ("POST", "/docs", "GET,HEAD"),
    ] {
        let answer = app.ask(method.parse().unwrap(), path).send().await.unwrap();
        let mut known: Vec<_> =
            answer.headers()["allow"].to_str().unwrap().split(',').map(str::to_owned).collect();
        let mut wanted: Vec<_> = allow.split(',').map(str::to_owned).collect();
        known.sort();
        wanted.sort();
        assert_eq!(known, wanted, "{method} {path}");
        assert_eq!(refusal(answer).await, (405, "method-not-allowed".into()), "{method} {path}");
    }
    let nowhere = app.get("/v2/jobs").await;
    assert_eq!(refusal(nowhere).await, (404, "not-found".into()));
    let head = app.ask(Method::HEAD, "/v1/jobs").send().await.unwrap();
    assert_eq!(head.status(), 200);
    assert!(head.bytes().await.unwrap().is_empty());
    let head = app.client.head(format!("{}/v1/jobs", app.url)).send().await.unwrap();
    assert_eq!(head.status(), 401);
    let connect = app
        .raw(b"CONNECT evil.example:80 HTTP/1.1\r\nHost: evil.example:80\r\nConnection: close\r\n\r\n")
        .await;
    assert!(connect.starts_with("HTTP/1.1 4"), "{connect}");
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_forbids_sniffing_and_the_pages_run_no_foreign_code() {
    let app = TestApp::start().await;
    for path in ["/v1/jobs", "/", "/app.js", "/docs", "/openapi.json", "/healthz", "/nowhere"] {
        let answer = app.get(path).await;
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff", "{path}");
        assert!(
            answer.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'")
        );
    }
    let page = app.get("/docs").await.text().await.unwrap();
    assert!(!page.contains("<script") && !page.contains("src="), "nothing is fetched and nothing runs");
    for word in ["create_sample", "idempotency-key-reused", "TrainOptions", "At most"] {
        assert!(page.contains(word) || page.contains(&word.to_lowercase()), "{word}");
    }
    for (path, kind) in [("/", "text/html"), ("/app.js", "text/javascript"), ("/app.css", "text/css")] {
        let answer = app.get(path).await;
        assert_eq!(answer.status(), 200, "{path}");
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with(kind), "{path}");
    }
    let policy = app.get("/").await.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.contains("script-src 'self'") && !policy.contains("unsafe"), "{policy}");
    let why = app.get("/problems/queue-full").await;
    assert_eq!(why.headers()["location"], "/docs#problem-queue-full");
    app.stop().await;
}

// case 40
#[tokio::test(flavor = "multi_thread")]
async fn conflicting_body_lengths_do_not_smuggle_a_request() {
    let app = TestApp::start().await;
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
    let post = "POST /v1/jobs HTTP/1.1\r\nHost: x\r\n";
    for request in [
        format!("{post}Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"),
        format!("{post}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello{smuggled}"),
        format!("{post}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{smuggled}"),
        format!("{post}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{smuggled}"),
        format!("{post}Content-Length: +5\r\n\r\nhello{smuggled}"),
        "GET /\r\n\r\n".into(),
        "GET / HTTP/9.9\r\n\r\n".into(),
        format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "X: y\r\n".repeat(500)),
        format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(200_000)),
        "\0\0\0\0\r\n\r\n".into(),
    ] {
        let mut stream = app.connect().await;
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        // The server may keep the connection for a further request, which does not come.
        let _ = tokio::time::timeout(Duration::from_millis(500), stream.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            !answer.contains("/smuggled") && answer.matches("HTTP/1.1 404").count() == 0,
            "{request}: {answer}"
        );
    }
    app.is_alive().await;
    app.stop().await;
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

// case 40
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_reset_as_fast_as_they_are_opened_end_the_connection_and_nothing_else() {
    let app = TestApp::start().await;
    let mut stream = app.connect().await;
    let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    hello.extend(frame(4, 0, 0, &[]));
    stream.write_all(&hello).await.unwrap();
    // :method GET, :scheme http, :path /, :authority x, from the static table and one literal.
    let headers = [0x82, 0x86, 0x84, 0x41, 0x01, b'x'];
    let mut cut = false;
    for n in 0..20_000_u32 {
        let mut burst = frame(1, 5, 2 * n + 1, &headers);
        burst.extend(frame(3, 0, 2 * n + 1, &8_u32.to_be_bytes()));
        if stream.write_all(&burst).await.is_err() {
            cut = true;
            break;
        }
    }
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await.is_ok();
    assert!(cut || ended, "the connection is ended");
    app.is_alive().await;

    // A thousand streams at once, ten times as many as there may be: some are answered.
    let mut stream = app.connect().await;
    for n in 0..1000_u32 {
        hello.extend(frame(1, 5, 2 * n + 1, &headers));
    }
    stream.write_all(&hello).await.unwrap();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        stream.read_exact(&mut vec![0; length]).await.unwrap();
        if head[3] == 1 {
            break; // the head of an answer
        }
    }
    drop(stream);
    app.is_alive().await;
    app.stop().await;
}

fn impatient() -> AppConfig {
    let secs = Duration::from_secs;
    let timeouts = Timeouts { head: secs(1), stall: secs(1), idle: secs(2), drain: secs(5) };
    let mut config = AppConfig { timeouts, ..AppConfig::default() };
    config.settings.upload_time = secs(1);
    config
}

/// Reads until the server ends the connection.
async fn closed(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(20), reading).await.expect("the server closes");
    String::from_utf8_lossy(&answer).into_owned()
}

// case 41
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_disconnected_and_others_served_meanwhile() {
    let app = TestApp::build(impatient()).await;
    let mut slow = Vec::new();
    for begin in ["", "P", "PRI * HT", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "] {
        for _ in 0..40 {
            let mut stream = app.connect().await;
            stream.write_all(begin.as_bytes()).await.unwrap();
            slow.push(stream);
        }
    }
    app.is_alive().await;
    for stream in &mut slow {
        closed(stream).await;
    }
    // A body that never comes.
    let head = format!(
        "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 1000\r\n\
         Content-Type: multipart/form-data; boundary=b\r\n\r\n--b",
        app.key
    );
    let mut stream = app.connect().await;
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = closed(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    // A connection that is kept and not used.
    let mut stream = app.connect().await;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(closed(&mut stream).await.starts_with("HTTP/1.1 200"));
    app.is_clean().await;
    app.stop().await;
}

// case 41
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_disconnected() {
    let app = TestApp::build(impatient()).await;
    let request = "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(400);
    let mut stream = app.connect().await;
    // It asks for forty megabytes and takes none: first its window is full, then the server's patience at an end.
    let asked = async {
        let mut n = 0;
        while stream.write_all(request.as_bytes()).await.is_ok() {
            n += 1;
            assert!(n < 10_000, "never cut off");
        }
    };
    tokio::time::timeout(Duration::from_secs(30), asked).await.expect("the server closes");
    app.is_alive().await;
    app.stop().await;
}

// case 63
#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_wait_for_a_slot() {
    let app = TestApp::build(AppConfig { connections_max: 4, ..impatient() }).await;
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(app.connect().await);
    }
    app.is_alive().await; // as soon as those that say nothing are cut off
    app.stop().await;
}

// case 59
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_a_handler_is_a_500_and_the_process_survives() {
    let workers = TestWorkers::new().await;
    let chaos = Chaos::over(std::sync::Arc::new(workers.objects_store()));
    let blobs = Some(hypnos::blobs::Blobs::over(std::sync::Arc::new(chaos.clone())));
    let app = TestApp::on(workers, AppConfig { blobs, ..AppConfig::default() }).await;
    chaos.inject(0, StoreFault::Panics);
    let (status, slug, body) = problem(app.get("/readyz").await).await;
    assert_eq!((status, slug.as_str()), (500, "internal"));
    assert!(!body["detail"].as_str().unwrap().contains("chaos"), "what it said is in the log only");
    assert_eq!(app.get("/readyz").await.status(), 200);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_shuts_down_is_not_ready_finishes_its_requests_and_accepts_no_new_ones() {
    let app = TestApp::start().await;
    assert_eq!(app.get("/readyz").await.status(), 200);
    let job = app.new_job().await;
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    // One request is under way, an upload whose end has not come yet.
    let body = "--b\r\nContent-Disposition: form-data; name=\"class_name\"\r\n\r\nmug\r\n--b--";
    let head = format!(
        "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\
         Content-Type: multipart/form-data; boundary=b\r\n\r\n",
        app.key,
        body.len()
    );
    let mut upload = app.connect().await;
    upload.write_all(head.as_bytes()).await.unwrap();
    upload.write_all(&body.as_bytes()[..10]).await.unwrap();
    let begun = eventually("the upload is under way", async || {
        let metrics = app.metrics().await;
        metrics.contains("hypnos_http_requests_running 2").then_some(())
    });
    begun.await;

    app.closing.cancel();
    let unready = eventually("it is not ready", async || {
        let answer = app.client.get(format!("{}/readyz", app.url)).send().await.ok()?;
        (answer.status() == 503).then_some(answer)
    });
    assert_eq!(refusal(unready.await).await, (503, "unavailable".into()));
    assert_eq!(app.get(&path).await.headers()["connection"], "close");
    upload.write_all(&body.as_bytes()[10..]).await.unwrap();
    let answer = closed(&mut upload).await;
    assert!(answer.starts_with("HTTP/1.1 422"), "{answer}");
    let address = app.address;
    app.stop().await;
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_requests_and_the_queue_but_contain_no_path() {
    let app = TestApp::start().await;
    let job = app.new_job().await;
    let id = job["id"].as_str().unwrap();
    app.get(&format!("/v1/jobs/{id}")).await;
    let closed = app.client.get(format!("{}/metrics", app.url)).send().await.unwrap();
    assert_eq!(closed.status(), 401);
    let metrics = app.metrics().await;
    assert!(metrics.contains("hypnos_jobs_queued{kind=\"train\"} 1"), "{metrics}");
    assert!(metrics.contains("route=\"/v1/jobs/{id}\""), "{metrics}");
    assert!(!metrics.contains(id));
    app.stop().await;
}

// case A9
#[tokio::test(flavor = "multi_thread")]
async fn no_text_of_a_client_is_a_label_of_a_metric() {
    let app = TestApp::start().await;
    let lines = async || {
        let metrics = app.metrics().await;
        metrics.lines().filter(|line| line.starts_with("hypnos_http_requests_total")).count()
    };
    app.ask("INVENTED".parse().unwrap(), "/v1/jobs").send().await.unwrap();
    lines().await; // the line of /metrics itself
    let before = lines().await;
    for n in 0..200 {
        let method: Method = format!("INVENTED{n}").parse().unwrap();
        let path = ["/v1/jobs", "/v1/nowhere"][n % 2];
        let path = format!("{path}?invented{n}");
        let status = app.ask(method, &path).send().await.unwrap().status().as_u16();
        assert!([404, 405].contains(&status), "{status}");
        app.get(&format!("/v1/invented{n}/x")).await;
    }
    let metrics = app.metrics().await;
    assert!(!metrics.contains("INVENTED") && !metrics.contains("invented"), "a client's text");
    assert!(lines().await <= before + 3, "{before} lines, then {}", lines().await);
    app.stop().await;
}

// case A15
#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_leaves_the_server_ready_and_an_unavailable_one_does_not() {
    let workers = TestWorkers::new().await;
    let chaos = Chaos::over(std::sync::Arc::new(workers.objects_store()));
    let blobs = Some(hypnos::blobs::Blobs::over(std::sync::Arc::new(chaos.clone())));
    let app = TestApp::on(workers, AppConfig { blobs, ..AppConfig::default() }).await;
    chaos.inject_all(Some(StoreFault::Full));
    let full = app.get("/readyz").await;
    assert_eq!(full.status(), 200);
    assert!(full.text().await.unwrap().contains("full"));
    assert_eq!(
        refusal(app.post_job(super::test_app::form(3, "mug")).await).await,
        (507, "storage-full".into())
    );
    chaos.inject_all(Some(StoreFault::FailsBefore));
    let away = eventually("an answer of a moment ago is not believed any more", async || {
        Some(app.get("/readyz").await).filter(|answer| answer.status() != 200)
    });
    assert_eq!(refusal(away.await).await, (503, "unavailable".into()));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_workers_have_no_device_left_is_not_ready() {
    let devices = hypnos::health::Health::default();
    let app = TestApp::build(AppConfig { devices: devices.clone(), ..AppConfig::default() }).await;
    assert_eq!(app.get("/readyz").await.text().await.unwrap(), "ok\n");
    let (first, second) = (devices.add("cuda:0"), devices.add("cuda:1"));
    for (say, ready) in [
        (&(|| first.working()) as &dyn Fn(), true),
        (&|| second.dead("a secret of the machine"), true),
        (&|| first.backing_off("a secret of the machine", Duration::from_secs(5)), false),
        (&|| first.working(), true),
    ] {
        say();
        let answer = app.get("/readyz").await;
        if ready {
            assert_eq!(answer.text().await.unwrap(), "ok\n");
        } else {
            let (status, slug, body) = problem(answer).await;
            assert_eq!((status, slug.as_str()), (503, "unavailable"));
            assert!(!body["detail"].as_str().unwrap().contains("secret"), "that is for operators: {body}");
        }
    }
    app.stop().await;
}

// case A15
#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_body_may_have_a_content_encoding() {
    let app = TestApp::start().await;
    let job = app.new_job().await;
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    for (method, path) in [
        (Method::GET, "/v1/jobs"),
        (Method::GET, &path),
        (Method::POST, &format!("{path}/cancel")),
        (Method::GET, "/readyz"),
    ] {
        let answer = app.ask(method.clone(), path).header("content-encoding", "gzip").send().await.unwrap();
        assert!(answer.status().is_success(), "{method} {path}: {}", answer.status());
    }
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_refused_early_still_gets_the_reason() {
    let mut config = AppConfig::default();
    config.settings.photo_bytes_max = 4 << 20;
    let app = TestApp::build(config).await;
    // Each sends megabytes after the part that is refused.
    for _ in 0..20 {
        let big = reqwest::multipart::Part::bytes(vec![0; 3 << 20]);
        let refused = app.post_job(form(1, "mug").text("unknown", "x").part("images", big)).await;
        assert_eq!(refusal(refused).await, (422, "field".into()));
    }
    let began = Instant::now();
    let _: Value = app.get("/v1/jobs").await.json().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(30));
    app.stop().await;
}

// case 73
#[tokio::test(flavor = "multi_thread")]
async fn an_unavailable_database_is_a_503_until_it_is_back() {
    let server = Postgres::own();
    let workers = TestWorkers::on(tempfile::tempdir().unwrap(), &server.fresh().await).await;
    let app = TestApp::on(workers, AppConfig::default()).await;
    let job = app.new_job().await;
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    assert_eq!(app.get(&path).await.status(), 200);
    server.cut_power();
    for path in [path.as_str(), "/v1/jobs", "/readyz"] {
        let answer = app.get(path).await;
        assert!(answer.headers().contains_key("retry-after"), "{path}");
        assert_eq!(refusal(answer).await, (503, "unavailable".into()), "{path}");
    }
    let refused = app.post_job(form(3, "mug")).await;
    assert_eq!(refusal(refused).await, (503, "unavailable".into()));
    app.is_alive().await;
    server.start();
    eventually("it is ready again", async || (app.get("/readyz").await.status() == 200).then_some(())).await;
    let page: Value = app.get("/v1/jobs").await.json().await.unwrap();
    assert_eq!(page["data"].as_array().unwrap().len(), 1, "what was refused is not there");
    assert_eq!(page["data"][0]["id"], job["id"]);
    app.stop().await;
}
