//! Authentication: keys, scopes, tenants, and a server without keys.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hypnos::http::Auth;
use hypnos::http::keys::make_key;
use hypnos::store::Scope;
use reqwest::Method;
use serde_json::Value;

use super::test_app::{AppConfig, TestApp, form, problem, refusal};
use super::test_workers::eventually;

// case 31
#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_one_good_key_is_refused_whatever_is_wrong_with_it() {
    let app = TestApp::start().await;
    let typo = {
        let mut key = app.key.clone();
        let last = if key.ends_with('x') { "y" } else { "x" };
        key.replace_range(key.len() - 1.., last);
        key
    };
    let stranger = make_key().unwrap().text;
    let other_secret = {
        // A good checksum over the known id and another secret cannot be made without knowing how; here it is known.
        let (id, secret) = (&app.key[4..16], &stranger[17..39]);
        let body = format!("hyp_{id}_{secret}");
        let mut rest = crc32fast::hash(body.as_bytes()) as usize;
        let letters = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        let mut sum = [0; 6];
        for letter in sum.iter_mut().rev() {
            *letter = letters[rest % 62];
            rest /= 62;
        }
        body + std::str::from_utf8(&sum).unwrap()
    };
    let good = format!("Bearer {}", app.key);
    let cases = [
        vec![],
        vec![String::new()],
        vec!["Bearer".into()],
        vec!["Bearer ".into()],
        vec![app.key.clone()],
        vec![format!("Basic {}", app.key)],
        vec![format!("Bearer {typo}")],
        vec![format!("Bearer {stranger}")],
        vec![format!("Bearer {other_secret}")],
        vec![format!("Bearer {}", "x".repeat(10_000))],
        vec![good.clone(), good.clone()],
    ];
    let mut bodies = Vec::new();
    for case in cases {
        let request = app.client.get(format!("{}/v1/jobs", app.url));
        let request = case.iter().fold(request, |request, value| request.header("authorization", value));
        let answer = request.send().await.unwrap();
        assert_eq!(answer.headers()["www-authenticate"], "Bearer realm=\"hypnos\"");
        let (status, slug, mut body) = problem(answer).await;
        assert_eq!((status, slug.as_str()), (401, "unauthorized"), "{case:?}");
        body["request_id"] = Value::Null;
        bodies.push(body);
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "all are told the same");
    let in_query = app.get(&format!("/v1/jobs?api_key={}", app.key)).await;
    assert_eq!(refusal(in_query).await, (400, "key-in-query".into()));
    // case A15: what only begins like a key is a name like any other
    assert_eq!(app.get("/v1/jobs?class_name=hyp_x").await.status(), 200);
    assert_eq!(app.get("/v1/jobs").await.status(), 200);
    app.stop().await;
}

// cases 32, 52
#[tokio::test(flavor = "multi_thread")]
async fn a_key_grants_its_scope_until_it_expires_or_is_revoked() {
    let mut config = AppConfig::default();
    config.settings.key_time = Duration::from_millis(50);
    let app = TestApp::build(config).await;
    let expired = app.new_key(app.tenant, Scope::Write, Some(1)).await;
    assert_eq!(app.ask_as(&expired, Method::GET, "/v1/jobs").send().await.unwrap().status(), 401);

    let reader = app.new_key(app.tenant, Scope::Read, None).await;
    assert_eq!(app.ask_as(&reader, Method::GET, "/v1/jobs").send().await.unwrap().status(), 200);
    let write = app.ask_as(&reader, Method::POST, "/v1/jobs").multipart(form(3, "mug")).send().await.unwrap();
    assert_eq!(refusal(write).await, (403, "scope".into()));
    app.is_clean().await;

    assert!(app.workers.store.revoke_key(&reader[4..16]).await.unwrap());
    eventually("the key is refused", async || {
        let answer = app.ask_as(&reader, Method::GET, "/v1/jobs").send().await.unwrap();
        (answer.status() == 401).then_some(())
    })
    .await;
    app.stop().await;
}

// An expired key used to be accepted for half a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_expires_to_the_second_even_if_it_was_just_used() {
    let app = TestApp::start().await;
    let path = format!("/v1/jobs/{}", app.new_job().await["id"].as_str().unwrap());
    let ends = jiff::Timestamp::now().as_millisecond() + 2500;
    let brief = app.new_key(app.tenant, Scope::Read, Some(ends)).await;
    let ask = async |path: &str| app.ask_as(&brief, Method::GET, path).send().await.unwrap();
    assert_eq!(ask(&path).await.status(), 200);
    let stream = ask(&format!("{path}/events")).await;
    let wait = app.ask_as(&brief, Method::GET, &path).header("prefer", "wait=50").send();
    let (stream, wait) = tokio::join!(stream.text(), wait);
    let over = jiff::Timestamp::now().as_millisecond();
    assert!((ends - 500..ends + 1500).contains(&over), "{} ms after its end", over - ends);
    assert!(stream.unwrap().ends_with("\n\n"));
    assert_eq!(wait.unwrap().status(), 200);
    assert_eq!(ask(&path).await.status(), 401);
    app.stop().await;
}

// case A15
#[tokio::test(flavor = "multi_thread")]
async fn metrics_need_a_key_with_the_admin_scope() {
    let app = TestApp::start().await;
    for (scope, status) in [(Scope::Read, 403), (Scope::Write, 403), (Scope::Admin, 200)] {
        let key = app.new_key(app.tenant, scope, None).await;
        let answer = app.ask_as(&key, Method::GET, "/metrics").send().await.unwrap();
        assert_eq!(answer.status(), status, "{scope}");
        if status == 403 {
            let (_, slug, body) = problem(answer).await;
            assert_eq!(slug, "scope");
            assert!(body["detail"].as_str().unwrap().contains("wanted admin"), "{body}");
        }
    }
    let operator = app.new_key(app.tenant, Scope::Admin, None).await;
    let posted =
        app.ask_as(&operator, Method::POST, "/v1/jobs").multipart(form(3, "mug")).send().await.unwrap();
    assert_eq!(posted.status(), 202, "it may do what write may");
    let mut config = AppConfig::default();
    config.settings.auth = Auth::None;
    let open = TestApp::build(config).await;
    let answer = open.client.get(format!("{}/metrics", open.url)).send().await.unwrap();
    assert_eq!(answer.status(), 200, "without keys whoever is on this machine operates it");
    app.stop().await;
    open.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_refused_before_its_body_is_read() {
    let app = TestApp::start().await;
    // The body never comes; the answer does.
    let head = "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n\
                Content-Length: 1000000\r\n\r\n";
    let mut stream = app.connect().await;
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 401");
    drop(stream);
    app.stop().await;
}

// case 33, where the cursor is concerned; http_document walks the operations
#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_of_one_tenant_shows_another_nothing() {
    let app = TestApp::start().await;
    app.new_job().await;
    app.new_job().await;
    let page: Value = app.get("/v1/jobs?limit=1").await.json().await.unwrap();
    let cursor = page["next_cursor"].as_str().unwrap();
    let stranger = app.workers.store.ensure_tenant("second").await.unwrap();
    let stranger = app.new_key(stranger, Scope::Write, None).await;
    let path = format!("/v1/jobs?cursor={cursor}");
    let seen: Value = app.ask_as(&stranger, Method::GET, &path).send().await.unwrap().json().await.unwrap();
    assert_eq!(seen["data"], serde_json::json!([]));
    app.stop().await;
}

// case 36
#[tokio::test(flavor = "multi_thread")]
async fn host_and_forwarded_headers_do_not_change_the_urls_in_answers() {
    let app = TestApp::start().await;
    let request = app.ask(Method::POST, "/v1/jobs").multipart(form(3, "mug")).header("host", "evil.example");
    let request = request.header("x-forwarded-host", "evil.example").header("x-forwarded-proto", "https");
    let answer = request.header("forwarded", "host=evil.example").send().await.unwrap();
    assert_eq!(answer.status(), 202, "with keys any name will do");
    assert!(answer.headers()["location"].to_str().unwrap().starts_with(&format!("{}/v1/jobs/", app.url)));
    assert!(!answer.text().await.unwrap().contains("evil.example"));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_keys_refuses_foreign_hosts_and_origins() {
    let mut config = AppConfig::default();
    config.settings.auth = Auth::None;
    let app = TestApp::build(config).await;
    let ask = |name: &'static str, value: String| {
        app.client.get(format!("{}/v1/jobs", app.url)).header(name, value).send()
    };
    assert_eq!(app.client.get(format!("{}/v1/jobs", app.url)).send().await.unwrap().status(), 200);
    for own in ["localhost", "127.0.0.1:1", "[::1]:8080"] {
        assert_eq!(ask("host", own.into()).await.unwrap().status(), 200, "{own}");
    }
    for other in ["evil.example", "127.0.0.1.evil.example", "10.0.0.1"] {
        assert_eq!(refusal(ask("host", other.into()).await.unwrap()).await, (403, "host".into()), "{other}");
    }
    for other in ["http://evil.example", "null", "http://localhost:1"] {
        assert_eq!(
            refusal(ask("origin", other.into()).await.unwrap()).await,
            (403, "cross-site".into()),
            "{other}"
        );
    }
    assert_eq!(ask("origin", app.url.clone()).await.unwrap().status(), 200);
    for (site, status) in [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)] {
        assert_eq!(ask("sec-fetch-site", site.into()).await.unwrap().status(), status, "{site}");
    }
    app.stop().await;
}

/// A log that a test can read.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

// cases 24, 31
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_sends_is_not_in_the_log() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_env_filter("hypnos=trace").with_ansi(false);
    subscriber.with_writer(move || writer.clone()).init(); // one test, one process
    let app = TestApp::start().await;
    let trained = app.finished().await;
    app.post_job(form(3, "classified")).await;
    app.post_job(form(2, "classified\u{202e}")).await;
    app.get(&format!("/v1/jobs?class_name=classified&api_key={}", app.key)).await;
    app.get("/v1/classified\r\nforged: \u{1b}[31mline".replace(['\r', '\n', ' ', '\u{1b}'], "%0A").as_str())
        .await;
    let prompts = serde_json::json!({ "prompts": ["whispered"], "negative_prompt": "whispered" });
    let request =
        app.ask(Method::POST, &format!("/v1/jobs/{trained}/sample")).header("x-request-id", "known-1");
    assert_eq!(request.json(&prompts).send().await.unwrap().status(), 202);
    app.stop().await;
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(text.contains("request.id=known-1") && text.contains("/v1/jobs/{id}/sample"), "{text}");
    for secret in ["classified", "whispered", "hyp_", "forged"] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}
