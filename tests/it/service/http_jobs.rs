//! Trainings over HTTP: what is accepted, what is rejected, and that a rejected request leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hypnos::blobs::{Blobs, Scope};
use hypnos::http::{DetectedProduct, ProductDetector};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::chaos::{Chaos, StoreFault};
use super::test_app::{AppConfig, TestApp, file, form, photo, problem, refusal};
use super::test_workers::TestWorkers;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_accepted_read_listed_canceled_and_deleted() {
    let app = TestApp::start().await;
    let response = app.post_job(form(3, "mug")).await;
    assert_eq!(response.status(), 202);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    assert!(response.headers().contains_key("retry-after"));
    let job: Value = response.json().await.unwrap();
    let id = job["id"].as_str().unwrap();
    assert_eq!(location, format!("{}/v1/jobs/{id}", app.url));
    assert_eq!((&job["state"], &job["class_name"]), (&json!("queued"), &json!("mug")));
    assert_eq!(job["options"]["steps"], 800);
    assert_eq!(job["photos"][0], json!({ "width": 64, "height": 64, "warnings": [] }));

    let path = format!("/v1/jobs/{id}");
    let seen: Value = app.get(&path).await.json().await.unwrap();
    assert_eq!((&seen["id"], &seen["queue_position"]), (&job["id"], &json!(0)));
    let listed: Value = app.get("/v1/jobs").await.json().await.unwrap();
    assert_eq!((&listed["data"][0]["id"], &listed["next_cursor"]), (&job["id"], &Value::Null));

    let canceled = app.ask(Method::POST, &format!("{path}/cancel")).send().await.unwrap();
    assert_eq!(canceled.status(), 202);
    let canceled: Value = canceled.json().await.unwrap();
    assert_eq!(canceled["state"], "canceled");
    let again = app.ask(Method::POST, &format!("{path}/cancel")).send().await.unwrap();
    assert_eq!(again.json::<Value>().await.unwrap(), canceled, "it is the same the second time");

    let deleted = app.ask(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(deleted.status(), 204);
    assert_eq!(refusal(app.get(&path).await).await, (404, "not-found".into()));
    let again = app.ask(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(refusal(again).await.0, 404);
    app.stop().await;
}

// case 21
#[tokio::test(flavor = "multi_thread")]
async fn three_to_five_photos_are_required() {
    let app = TestApp::start().await;
    for n in [0, 1, 2, 6, 100] {
        let (status, slug, body) = problem(app.post_job(form(n, "mug")).await).await;
        assert_eq!(
            (status, slug.as_str(), &body["pointer"]),
            (422, "field", &json!("/images")),
            "{n} photos"
        );
    }
    app.is_clean().await;
    for n in [3, 4, 5] {
        assert_eq!(app.post_job(form(n, "mug")).await.status(), 202);
    }
    app.stop().await;
}

// case 22
#[tokio::test(flavor = "multi_thread")]
async fn a_class_name_has_1_to_64_characters() {
    let app = TestApp::start().await;
    let photos = || (0..3).fold(Form::new(), |form, n| form.part("images", file(photo(n))));
    let (status, slug, body) = problem(app.post_job(photos()).await).await;
    assert_eq!((status, slug.as_str(), &body["pointer"]), (422, "field", &json!("/class_name")));
    for wrong in ["", "   ", &"x".repeat(65), &"x".repeat(256), &"x".repeat(10_000)] {
        let (status, _, body) =
            problem(app.post_job(photos().text("class_name", wrong.to_owned())).await).await;
        assert_eq!((status, &body["pointer"]), (422, &json!("/class_name")), "{} characters", wrong.len());
    }
    let binary = photos().part("class_name", Part::bytes(vec![0xff, 0xfe]));
    assert_eq!(refusal(app.post_job(binary).await).await.0, 422);
    app.is_clean().await;
    assert_eq!(app.post_job(photos().text("class_name", "é".repeat(64))).await.status(), 202);
    app.stop().await;
}

// cases 23, 24
#[tokio::test(flavor = "multi_thread")]
async fn a_class_name_is_text_and_nothing_else() {
    let app = TestApp::start().await;
    let unseen = [
        "a\0b",
        "a\u{202e}b",
        "a\u{200b}b",
        "mug\r\nINFO forged",
        "\u{1b}[31mred",
        "a\u{7f}",
        "\u{feff}a\u{2066}b",
    ];
    for wrong in unseen {
        let (status, _, body) = problem(app.post_job(form(3, wrong)).await).await;
        assert_eq!((status, &body["pointer"]), (422, &json!("/class_name")), "{wrong:?}");
        assert!(!body["detail"].as_str().unwrap().contains(wrong), "what cannot be seen is not sent back");
    }
    app.is_clean().await;
    let plain = [
        ("../../etc/passwd", "../../etc/passwd"),
        ("a/b", "a/b"),
        ("%2e%2e", "%2e%2e"),
        ("CON", "CON"),
        ("🫖", "🫖"),
        ("cafe\u{301}", "caf\u{e9}"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("{{7*7}}", "{{7*7}}"),
        ("'; drop table job; --", "'; drop table job; --"),
    ];
    for (sent, kept) in plain {
        let response = app.post_job(form(3, sent)).await;
        assert_eq!(response.status(), 202, "{sent}");
        assert_eq!(response.json::<Value>().await.unwrap()["class_name"], kept);
    }
    for entry in app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap() {
        assert!(entry.key.owner().is_some(), "{} is a key of ours", entry.key);
    }
    let listed: Value = app.get("/v1/jobs?class_name=caf%C3%A9").await.json().await.unwrap();
    assert_eq!(listed["data"].as_array().unwrap().len(), 1);
    app.stop().await;
}

// case 25
#[tokio::test(flavor = "multi_thread")]
async fn parts_may_come_in_any_order_but_none_twice_and_none_unknown() {
    let app = TestApp::start().await;
    let twice = [
        form(3, "mug").text("class_name", "cup"),
        form(3, "mug").text("options", "{}").text("options", "{}"),
        form(3, "mug").text("steps", "10"),
        form(3, "mug").text("", "10"),
        form(3, "mug").text("Images", "10"),
    ];
    for wrong in twice {
        assert_eq!(refusal(app.post_job(wrong).await).await, (422, "field".into()));
    }
    app.is_clean().await;
    let bare = |n| Part::bytes(photo(n));
    let reversed = Form::new()
        .text("options", r#"{"steps": 5}"#)
        .part("images", bare(0))
        .part("images", bare(1).file_name("x".repeat(4000)))
        .text("class_name", "mug")
        .part("images", bare(2).file_name("../../../a\"b.exe").mime_str("text/html").unwrap());
    let response = app.post_job(reversed).await;
    assert_eq!(response.status(), 202);
    assert_eq!(response.json::<Value>().await.unwrap()["options"]["steps"], 5);
    app.stop().await;
}

/// A request with this body, byte for byte.
fn raw_post(app: &TestApp, content_type: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Type: {content_type}\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        app.key,
        body.len()
    );
    [head.as_bytes(), body].concat()
}

// case 25, A15
#[tokio::test(flavor = "multi_thread")]
async fn a_file_s_name_may_be_in_any_code_page() {
    let app = TestApp::start().await;
    let names: [&[u8]; 5] = [
        b"Gr\xf6\xdfe.jpg",
        b"\x83\x5c\x95\x5c",
        b"\xa4\xe9\xa5\xbb.png",
        b"\xff\xfe\x00x",
        "日本.png".as_bytes(),
    ];
    for file_name in names {
        for name_first in [true, false] {
            let file = [b"; filename=\"", file_name, b"\""].concat();
            let (before, after) = if name_first { (&b""[..], &file[..]) } else { (&file[..], &b""[..]) };
            let mut body =
                b"--b\r\nContent-Disposition: form-data; name=\"class_name\"\r\n\r\nmug\r\n".to_vec();
            for n in 0..3 {
                let head = [b"--b\r\nContent-Disposition: form-data", before, b"; name=\"images\"", after];
                body.extend(
                    [&head.concat()[..], b"\r\nContent-Type: image/png\r\n\r\n", &photo(n), b"\r\n"].concat(),
                );
            }
            body.extend_from_slice(b"--b--\r\n");
            let answer = app.raw(&raw_post(&app, "multipart/form-data; boundary=b", &body)).await;
            assert!(answer.starts_with("HTTP/1.1 202"), "{}: {answer}", file_name.escape_ascii());
        }
    }
    app.stop().await;
}

// case 26
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_form_is_refused_within_bounds() {
    let app = TestApp::start().await;
    let part = "--b\r\nContent-Disposition: form-data; name=\"class_name\"\r\n\r\nmug\r\n";
    let multipart = "multipart/form-data; boundary=b";
    let long = format!("multipart/form-data; boundary={}", "b".repeat(71));
    let empty_parts = "--b\r\n\r\n\r\n".repeat(10_000) + "--b--";
    let long_head = format!("--b\r\nX: {}\r\n\r\n\r\n--b--", "x".repeat(64 * 1024));
    let inside = "--b\r\nContent-Disposition: form-data; name=\"class_name\"\r\n\r\nmug\r\n--banana\r\n--b--";
    let cases = [
        ("multipart/form-data", part, "400"),
        (&long, part, "400"),
        (multipart, "", "400"),
        (multipart, "no boundary at all", "400"),
        (multipart, part, "400"),
        (multipart, inside, "400"),
        (multipart, &empty_parts, "400"),
        (multipart, &long_head, "400"),
        ("application/json", "{}", "415"),
        ("text/plain", "mug", "415"),
    ];
    for (content_type, body, status) in cases {
        let answer = app.raw(&raw_post(&app, content_type, body.as_bytes())).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{content_type}: {answer}");
        assert!(answer.contains("application/problem+json"));
    }
    app.is_clean().await;
    app.stop().await;
}

// case 27
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_too_long_is_refused_by_its_length_or_cut() {
    let mut config = AppConfig::default();
    config.settings.photo_bytes_max = 20_000;
    let app = TestApp::build(config).await;
    let head = |more: &str| {
        format!(
            "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\
             Content-Type: multipart/form-data; boundary=b\r\nConnection: close\r\n{more}\r\n\r\n",
            app.key
        )
    };
    let announced = app.raw(head("Content-Length: 10737418240").as_bytes()).await;
    assert!(announced.starts_with("HTTP/1.1 413"), "{announced}");

    let mut stream = app.connect().await;
    stream.write_all(head("Transfer-Encoding: chunked").as_bytes()).await.unwrap();
    let part = "--b\r\nContent-Disposition: form-data; name=\"images\"\r\n\r\n";
    stream.write_all(format!("{:x}\r\n{part}\r\n", part.len()).as_bytes()).await.unwrap();
    let chunk = [b"10000\r\n", &vec![b'x'; 65_536][..], b"\r\n"].concat();
    let mut sent = 0_u64;
    while sent < 10 << 30 && stream.write_all(&chunk).await.is_ok() {
        sent += 65_536;
    }
    assert!(sent < 1 << 30, "cut after {sent} bytes");
    drop(stream);

    let photo_too_long = form(2, "mug").part("images", file(vec![0; 20_001]));
    let (status, slug, body) = problem(app.post_job(photo_too_long).await).await;
    assert_eq!((status, slug.as_str(), &body["pointer"]), (413, "body-too-large", &json!("/images/2")));

    // Shorter than its length: the client ends its side.
    let mut stream = app.connect().await;
    stream.write_all(&raw_post(&app, "multipart/form-data; boundary=b", &[b'x'; 100])[..250]).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    // Longer than its length: the rest is no request.
    let mut longer = raw_post(&app, "multipart/form-data; boundary=b", b"--b--");
    longer.extend_from_slice(b"GARBAGE\r\n\r\n");
    let answer = app.raw(&longer).await;
    assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    app.is_clean().await;
    app.is_alive().await;
    app.stop().await;
}

// case 28
#[tokio::test(flavor = "multi_thread")]
async fn an_option_out_of_range_is_named() {
    let app = TestApp::start().await;
    let cases = [
        (r#"{"steps": -1}"#, "/options/steps"),
        (r#"{"steps": 0}"#, "/options/steps"),
        (r#"{"steps": 1000000000}"#, "/options/steps"),
        (r#"{"steps": 1.5}"#, "/options/steps"),
        (r#"{"steps": "10"}"#, "/options/steps"),
        (r#"{"steps": null}"#, "/options/steps"),
        (r#"{"steps": 1e309}"#, "/options/steps"),
        (r#"{"learning_rate": 0}"#, "/options/learning_rate"),
        (r#"{"seed": 18446744073709551616}"#, "/options/seed"),
        (r#"{"seed": 9007199254740992}"#, "/options/seed"),
        (r#"{"loss_weights": {"prior": -1}}"#, "/options/loss_weights/prior"),
        (r#"{"loss_weights": {"other": 1}}"#, "/options/loss_weights/other"),
        (r#"{"evaluation": {"images": 65}}"#, "/options/evaluation/images"),
        (r#"{"evaluation": {"prompts": []}}"#, "/options/evaluation/prompts"),
        (r#"{"evaluation": {"prompts": ["{product}", " "]}}"#, "/options/evaluation/prompts/1"),
        (r#"{"steps": 10, "evaluation": {"trials": [5, 11]}}"#, "/options/evaluation/trials/1"),
        (r#"{"evaluation": {"trial_images": 1}}"#, "/options/evaluation/trial_images"),
        (r#"{"method": "magic"}"#, "/options/method"),
        (r#"{"stepz": 10}"#, "/options/stepz"),
        ("[]", "/options"),
    ];
    for (options, pointer) in cases {
        let response = app.post_job(form(3, "mug").text("options", options)).await;
        let (status, slug, body) = problem(response).await;
        assert_eq!((status, slug.as_str(), &body["pointer"]), (422, "field", &json!(pointer)), "{options}");
    }
    for no_json in ["", "{", r#"{"steps": NaN}"#, r#"{"steps": 1,}"#, r#"{"steps": 1} x"#] {
        let response = app.post_job(form(3, "mug").text("options", no_json)).await;
        assert_eq!(refusal(response).await, (400, "bad-body".into()), "{no_json}");
    }
    app.is_clean().await;
    app.stop().await;
}

// case 30
#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_body_is_not_decompressed() {
    let app = TestApp::start().await;
    let request = app.ask(Method::POST, "/v1/jobs").header("content-encoding", "gzip").body(vec![0; 100]);
    assert_eq!(refusal(request.send().await.unwrap()).await, (415, "media-type".into()));
    app.stop().await;
}

// case 42
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_upload_leaves_nothing() {
    let app = TestApp::start().await;
    let photo = photo(0);
    let mut body = Vec::new();
    for _ in 0..3 {
        body.extend_from_slice(b"--b\r\nContent-Disposition: form-data; name=\"images\"\r\n\r\n");
        body.extend_from_slice(&photo);
        body.extend_from_slice(b"\r\n");
    }
    let whole = raw_post(&app, "multipart/form-data; boundary=b", &body);
    for cut in [300, whole.len() / 2, whole.len() - 1] {
        let mut stream = app.connect().await;
        stream.write_all(&whole[..cut]).await.unwrap();
        drop(stream);
    }
    app.is_clean().await;
    app.stop().await;
}

// case 46
#[tokio::test(flavor = "multi_thread")]
async fn fifty_equal_requests_at_once_make_one_job_with_one_set_of_photos() {
    let mut config = AppConfig::default();
    config.settings.uploads_max = 100;
    let app = TestApp::build(config).await;
    let send = |_| {
        app.ask(Method::POST, "/v1/jobs").header("idempotency-key", "one").multipart(form(3, "mug")).send()
    };
    let answers = futures_util::future::join_all((0..50).map(send)).await;
    let mut ids = Vec::new();
    let mut replayed = 0;
    for answer in answers {
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 202);
        replayed += usize::from(answer.headers().contains_key("idempotent-replayed"));
        ids.push(answer.json::<Value>().await.unwrap()["id"].clone());
    }
    ids.dedup();
    assert_eq!((ids.len(), replayed), (1, 49));
    let objects = app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap();
    assert_eq!(objects.len(), 3, "{objects:?}");
    app.stop().await;
}

// case 47
#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_names_one_request() {
    let app = TestApp::start().await;
    let send = |key: &str, class_name: &str| {
        let request = app.ask(Method::POST, "/v1/jobs").header("idempotency-key", key.to_owned());
        request.multipart(form(3, class_name)).send()
    };
    let first: Value = send("one", "mug").await.unwrap().json().await.unwrap();
    let again = send("one", "mug").await.unwrap();
    assert_eq!(
        (again.status().as_u16(), &again.headers()["idempotent-replayed"]),
        (202, &"true".parse().unwrap())
    );
    assert_eq!(again.json::<Value>().await.unwrap()["id"], first["id"]);
    let other = send("one", "cup").await.unwrap();
    assert_eq!(refusal(other).await, (422, "idempotency-key-reused".into()));
    for wrong in ["", "with space", &"k".repeat(1024)] {
        assert_eq!(
            refusal(send(wrong, "mug").await.unwrap()).await,
            (400, "bad-parameter".into()),
            "{wrong}"
        );
    }
    assert_eq!(send(&"k".repeat(255), "mug").await.unwrap().status(), 202);
    let objects = app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap();
    assert_eq!(objects.len(), 6);
    app.stop().await;
}

// cases 45, 48
#[tokio::test(flavor = "multi_thread")]
async fn the_last_place_in_the_queue_is_given_once() {
    let mut config = AppConfig::default();
    config.settings.queue_max = 1;
    config.settings.uploads_max = 100;
    let app = TestApp::build(config).await;
    let answers = futures_util::future::join_all((0..50).map(|_| app.post_job(form(3, "mug")))).await;
    let accepted = answers.iter().filter(|answer| answer.status() == 202).count();
    assert_eq!(accepted, 1);
    for answer in answers.into_iter().filter(|answer| answer.status() != 202) {
        assert!(answer.headers().contains_key("retry-after"));
        assert_eq!(refusal(answer).await, (429, "queue-full".into()));
    }
    let objects = app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap();
    assert_eq!(objects.len(), 3, "{objects:?}");
    app.stop().await;
}

// cases 61, 68
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_or_fills_up_during_an_upload_leaves_no_row() {
    let workers = TestWorkers::new().await;
    let chaos = Chaos::over(Arc::new(workers.objects_store()));
    let blobs = Some(Blobs::over(Arc::new(chaos.clone())));
    let app = TestApp::on(workers, AppConfig { blobs, ..AppConfig::default() }).await;
    for nth in 0..3 {
        for (what, status, slug) in [
            (StoreFault::FailsBefore, 503, "unavailable"),
            (StoreFault::FailsAfter, 503, "unavailable"),
            (StoreFault::Full, 507, "storage-full"),
            (StoreFault::Panics, 500, "internal"),
        ] {
            chaos.inject(nth, what);
            let answer = app.post_job(form(3, "mug")).await;
            assert_eq!(answer.headers().contains_key("retry-after"), status == 503);
            assert_eq!(refusal(answer).await, (status, slug.into()), "{nth} {what:?}");
        }
    }
    let page: Value = app.get("/v1/jobs").await.json().await.unwrap();
    assert_eq!(page["data"], json!([]));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_or_canceled_training_is_retried_without_sending_its_photos_again() {
    let app = TestApp::start().await;
    let options = r#"{"steps": 7, "seed": 11}"#;
    let job: Value = app.post_job(form(3, "mug").text("options", options)).await.json().await.unwrap();
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    let retry = async |path: &str, key: Option<&str>| {
        let request = app.ask(Method::POST, &format!("{path}/retry"));
        let request = key.into_iter().fold(request, |request, key| request.header("idempotency-key", key));
        request.send().await.unwrap()
    };
    let (status, slug, body) = problem(retry(&path, None).await).await;
    assert_eq!((status, slug.as_str()), (409, "wrong-state"));
    assert!(body["detail"].as_str().unwrap().contains("is queued; wanted failed or canceled"), "{body}");
    app.ask(Method::POST, &format!("{path}/cancel")).send().await.unwrap();

    let answer = retry(&path, Some("again")).await;
    assert_eq!(answer.status(), 202);
    let location = answer.headers()["location"].to_str().unwrap().to_owned();
    let again: Value = answer.json().await.unwrap();
    assert_eq!(location, format!("{}/v1/jobs/{}", app.url, again["id"].as_str().unwrap()));
    assert_ne!(again["id"], job["id"]);
    assert_eq!((&again["retry_of"], &again["state"]), (&job["id"], &json!("queued")));
    for same in ["class_name", "options", "seed", "photos"] {
        assert_eq!(again[same], job[same], "{same}");
    }
    let seen: Value = app.get(&path).await.json().await.unwrap();
    assert_eq!(
        (&seen["state"], &seen["retry_of"]),
        (&json!("canceled"), &Value::Null),
        "what has ended never changes"
    );

    // The same request is one job, and its name belongs to it.
    let replayed = retry(&path, Some("again")).await;
    assert_eq!(replayed.headers()["idempotent-replayed"], "true");
    assert_eq!(replayed.json::<Value>().await.unwrap()["id"], again["id"]);
    let request = app.ask(Method::POST, "/v1/jobs").header("idempotency-key", "again");
    let other = request.multipart(form(3, "mug")).send().await.unwrap();
    assert_eq!(refusal(other).await, (422, "idempotency-key-reused".into()));

    // Each is deleted without the other.
    assert_eq!(app.ask(Method::DELETE, &path).send().await.unwrap().status(), 204);
    let id = job["id"].as_str().unwrap().parse().unwrap();
    hypnos::maintenance::erase(&app.workers.store, &app.workers.blobs, app.tenant, id).await.unwrap();
    assert_eq!(refusal(retry(&path, None).await).await, (404, "not-found".into()));
    let kept = app.row(again["id"].as_str().unwrap(), hypnos::job::Kind::Train).await.unwrap();
    for photo in &kept.photos {
        app.workers.blobs.get(photo).await.unwrap();
    }
    let objects = app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap();
    assert_eq!(objects.len(), 3, "{objects:?}");
    app.stop().await;
}

// cases 48, 61, for copies
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_retry_leaves_nothing() {
    let workers = TestWorkers::new().await;
    let chaos = Chaos::over(Arc::new(workers.objects_store()));
    let blobs = Some(Blobs::over(Arc::new(chaos.clone())));
    let mut config = AppConfig { blobs, ..AppConfig::default() };
    config.settings.queue_max = 1;
    let app = TestApp::on(workers, config).await;
    let job = app.new_job().await;
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    app.ask(Method::POST, &format!("{path}/cancel")).send().await.unwrap();
    let retry = async || app.ask(Method::POST, &format!("{path}/retry")).send().await.unwrap();
    for nth in 0..6 {
        chaos.inject(nth, StoreFault::FailsBefore);
        assert_eq!(refusal(retry().await).await, (503, "unavailable".into()), "{nth}");
    }
    chaos.inject(1, StoreFault::Full);
    assert_eq!(refusal(retry().await).await, (507, "storage-full".into()));
    app.new_job().await;
    assert_eq!(refusal(retry().await).await, (429, "queue-full".into()));
    let objects = app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap();
    assert_eq!(objects.len(), 6, "the photos of the two that are there: {objects:?}");
    for photo in &app.row(job["id"].as_str().unwrap(), hypnos::job::Kind::Train).await.unwrap().photos {
        app.workers.blobs.delete(&hypnos::blobs::Key::parse(&photo.key).unwrap()).await.unwrap();
    }
    assert_eq!(refusal(retry().await).await, (500, "artifact-missing".into()));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_are_inspected_without_being_stored() {
    let app = TestApp::start().await;
    let form = Form::new()
        .part("images", file(photo(1)))
        .part("images", file(b"GIF89a not welcome".to_vec()))
        .part("images", file(photo(1)))
        .part("images", file(Vec::new()));
    let answer = app.ask(Method::POST, "/v1/photos/inspect").multipart(form).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let seen: Value = answer.json().await.unwrap();
    let accepted: Vec<_> =
        seen["photos"].as_array().unwrap().iter().map(|photo| &photo["accepted"]).collect();
    assert_eq!(accepted, [true, false, true, false]);
    assert_eq!(seen["photos"][1]["problem"]["type"], "/problems/image-type-unsupported");
    assert_eq!(seen["photos"][3]["problem"]["type"], "/problems/image-empty");
    assert_eq!(seen["duplicates"], json!([[0, 2]]));
    let none = app.ask(Method::POST, "/v1/photos/inspect").multipart(Form::new().text("x", "y")).send().await;
    assert_eq!(refusal(none.unwrap()).await.0, 422);
    app.is_clean().await;
    app.stop().await;
}

/// Finds a product that fills half of every photo, the first time; then it breaks.
#[derive(Default)]
struct HalfOfIt(AtomicBool);

impl ProductDetector for HalfOfIt {
    fn detect(&self, png: &[u8]) -> Result<DetectedProduct, Box<dyn std::error::Error + Send + Sync>> {
        assert!(png.starts_with(b"\x89PNG"));
        if self.0.swap(true, Ordering::Relaxed) {
            return Err("a secret of the model".into());
        }
        let warnings = vec!["touches the left edge".to_owned()];
        let preview = "data:image/png;base64,AAAA".to_owned();
        Ok(DetectedProduct { refusal: None, warnings, area: 0.5, confidence: 0.9, preview })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inspection_shows_where_the_product_was_found() {
    let app =
        TestApp::build(AppConfig { detector: Some(Arc::new(HalfOfIt::default())), ..AppConfig::default() })
            .await;
    let inspect = async |files: &[Vec<u8>]| {
        let form = files.iter().fold(Form::new(), |form, bytes| form.part("images", file(bytes.clone())));
        app.ask(Method::POST, "/v1/photos/inspect").multipart(form).send().await.unwrap()
    };
    let seen: Value = inspect(&[photo(1), b"no photo".to_vec()]).await.json().await.unwrap();
    let found = json!({"refusal": null, "warnings": ["touches the left edge"], "area": 0.5, "confidence": 0.9,
        "preview": "data:image/png;base64,AAAA"});
    assert_eq!((&seen["photos"][0]["product"], &seen["photos"][1]["product"]), (&found, &Value::Null));
    let answer = inspect(&[photo(1)]).await;
    assert_eq!(answer.status(), 500);
    assert!(!answer.text().await.unwrap().contains("secret"));
    app.stop().await;
}

// cases 1, 8 as a client sees them
#[tokio::test(flavor = "multi_thread")]
async fn a_photo_that_cannot_be_used_is_named_by_its_index() {
    let app = TestApp::start().await;
    let cases = [
        (Vec::new(), 422, "image-empty"),
        (b"%PDF-1.4".to_vec(), 415, "image-type-unsupported"),
        (photo(1)[..600].to_vec(), 422, "image-damaged"),
    ];
    for (bytes, status, slug) in cases {
        let form = form(2, "mug").part("images", file(bytes));
        let (is_status, is_slug, body) = problem(app.post_job(form).await).await;
        assert_eq!((is_status, is_slug.as_str(), &body["pointer"]), (status, slug, &json!("/images/2")));
    }
    app.is_clean().await;
    let response = app.post_job(form(3, "mug").part("images", file(photo(0)))).await;
    let job: Value = response.json().await.unwrap();
    assert_eq!(job["photos"][3]["warnings"], json!(["duplicate"]));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_paginated_and_filtered() {
    let app = TestApp::start().await;
    let mut ids = Vec::new();
    for class_name in ["mug", "cup", "mug", "cup", "mug"] {
        let job: Value = app.post_job(form(3, class_name)).await.json().await.unwrap();
        ids.insert(0, job["id"].clone());
    }
    let (mut seen, mut path) = (Vec::new(), "/v1/jobs?limit=2".to_owned());
    loop {
        let response = app.get(&path).await;
        let link = response.headers().get("link").map(|link| link.to_str().unwrap().to_owned());
        let page: Value = response.json().await.unwrap();
        seen.extend(page["data"].as_array().unwrap().iter().map(|job| job["id"].clone()));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/v1/jobs?limit=2&cursor={cursor}");
        assert_eq!(link.unwrap(), format!("<{}{path}>; rel=\"next\"", app.url));
    }
    assert_eq!(seen, ids);
    let mugs: Value = app.get("/v1/jobs?class_name=mug&state=queued").await.json().await.unwrap();
    assert_eq!(mugs["data"].as_array().unwrap().len(), 3);
    let none: Value = app.get("/v1/jobs?created_after=2100-01-01T00:00:00Z").await.json().await.unwrap();
    assert_eq!(none["data"], json!([]));
    for wrong in [
        "limit=0",
        "limit=201",
        "limit=x",
        "cursor=x",
        "state=x",
        "created_after=x",
        "class_name=",
        "y=1",
        "limit=1&limit=2",
        "job_id=x",
        "limit=%ff",
    ] {
        let refused = refusal(app.get(&format!("/v1/jobs?{wrong}")).await).await;
        assert_eq!(refused, (400, "bad-parameter".into()), "{wrong}");
    }
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_resource_is_answered_with_304() {
    let app = TestApp::start().await;
    let job = app.new_job().await;
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    let first = app.get(&path).await;
    let etag = first.headers()["etag"].to_str().unwrap().to_owned();
    assert!(etag.starts_with("W/\"") && first.headers().contains_key("retry-after"));
    let ask = |etag: &str| app.ask(Method::GET, &path).header("if-none-match", etag.to_owned());
    let same = ask(&etag).send().await.unwrap();
    assert_eq!((same.status().as_u16(), same.headers()["etag"].to_str().unwrap()), (304, etag.as_str()));
    assert!(same.bytes().await.unwrap().is_empty());

    // A look that waits for a change hears of it.
    let waiting = ask(&etag).header("prefer", "wait=60").send();
    let cancel = async {
        app.ask(Method::POST, &format!("{path}/cancel")).send().await.unwrap();
    };
    let (changed, ()) = tokio::join!(waiting, cancel);
    let changed = changed.unwrap();
    assert_eq!(changed.status(), 200);
    assert!(!changed.headers().contains_key("retry-after"), "it has ended");
    assert_eq!(changed.json::<Value>().await.unwrap()["state"], "canceled");
    assert_eq!(ask(&etag).send().await.unwrap().status(), 200);
    app.stop().await;
}
