//! Samples over HTTP: from a finished training to the bytes of an image.

use std::time::Duration;

use hypnos::job::Kind;
use reqwest::Method;
use serde_json::{Value, json};

use super::scripted::Script;
use super::test_app::{TestApp, problem, refusal};

#[tokio::test(flavor = "multi_thread")]
async fn a_training_is_sampled_and_its_images_and_files_are_fetched_without_a_key() {
    let app = TestApp::start().await;
    let trained = app.trained().await;
    let worker = app.workers.start(&Script::new(Duration::ZERO));
    let wanted =
        json!({ "prompts": ["a photo of {product}", "{product} on a beach"], "n": 2, "seed": 5, "steps": 2 });
    let request = app.ask(Method::POST, &format!("/v1/jobs/{trained}/sample")).header("prefer", "wait=60");
    let answer = request.json(&wanted).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let location = answer.headers()["location"].to_str().unwrap().to_owned();
    let sample: Value = answer.json().await.unwrap();
    assert_eq!((&sample["state"], &sample["job_id"]), (&json!("succeeded"), &json!(trained.to_string())));
    assert_eq!(sample["spec"]["steps"], 2);
    assert_eq!(sample["spec"]["guidance"], Value::Null, "what was not asked for is left to the model");
    let images = sample["images"].as_array().unwrap();
    let seeds: Vec<_> = images.iter().map(|image| image["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds, [5, 6, 7, 8]);
    assert_eq!(images[3]["prompt"], "{product} on a beach");
    worker.stop().await;

    let again: Value =
        app.client.get(&location).bearer_auth(&app.key).send().await.unwrap().json().await.unwrap();
    assert_eq!(again["images"].as_array().unwrap().len(), 4);
    let url = images[0]["url"].as_str().unwrap();
    let picture = app.client.get(url).send().await.unwrap();
    assert_eq!(picture.status(), 200);
    assert_eq!(picture.headers()["content-type"], images[0]["content_type"].as_str().unwrap());
    assert_eq!(picture.headers()["content-security-policy"], "default-src 'none'; sandbox");
    assert_eq!(picture.headers()["x-content-type-options"], "nosniff");
    assert_eq!(picture.bytes().await.unwrap().len() as u64, images[0]["size"].as_u64().unwrap());
    let id = sample["id"].as_str().unwrap();
    let request = app.ask(Method::GET, &format!("/v1/samples/{id}/images/3")).header("accept", "image/*");
    let sent_on = request.send().await.unwrap();
    assert_eq!(
        (sent_on.status().as_u16(), &sent_on.headers()["cache-control"]),
        (307, &"no-store".parse().unwrap())
    );
    let there = sent_on.headers()["location"].to_str().unwrap().to_owned();
    assert_eq!(app.client.get(there).send().await.unwrap().status(), 200);
    assert_eq!(refusal(app.get(&format!("/v1/samples/{id}/images/4")).await).await.0, 404);

    let files: Value = app.get(&format!("/v1/jobs/{trained}/artifacts")).await.json().await.unwrap();
    let names: Vec<_> =
        files["data"].as_array().unwrap().iter().map(|file| file["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["image-0.png", "preview-1.png", "report.html", "report.json", "weights.safetensors"]);
    let page = app.client.get(files["data"][2]["url"].as_str().unwrap()).send().await.unwrap();
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    let may = page.headers()["content-security-policy"].to_str().unwrap();
    assert_eq!(may, "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox");
    assert!(page.text().await.unwrap().starts_with("<!DOCTYPE html>"));
    let weights = app.get(&format!("/v1/jobs/{trained}/artifacts/weights.safetensors")).await;
    assert_eq!(weights.status(), 307);
    let report: Value = app.get(&format!("/v1/jobs/{trained}/report")).await.json().await.unwrap();
    assert!(report["seconds"]["training"].is_number(), "{report}");
    assert_eq!(refusal(app.get(&format!("/v1/jobs/{trained}/artifacts/other")).await).await.0, 404);

    let of_training: Value = app.get(&format!("/v1/samples?job_id={trained}")).await.json().await.unwrap();
    assert_eq!(of_training["data"][0]["id"], sample["id"]);
    assert_eq!(app.ask(Method::DELETE, &format!("/v1/samples/{id}")).send().await.unwrap().status(), 204);
    assert_eq!(refusal(app.get(&format!("/v1/samples/{id}")).await).await.0, 404);
    app.stop().await;
}

// case 37
#[tokio::test(flavor = "multi_thread")]
async fn a_signed_url_opens_one_file_for_a_while() {
    let app = TestApp::start().await;
    let trained = app.trained().await;
    let files: Value = app.get(&format!("/v1/jobs/{trained}/artifacts")).await.json().await.unwrap();
    let (report, weights) = (&files["data"][3], &files["data"][4]);
    let url = report["url"].as_str().unwrap();
    let fetch = |url: String| app.client.get(url).send();
    let whole = fetch(url.into()).await.unwrap().bytes().await.unwrap();

    let other_file = weights["url"].as_str().unwrap().split('?').next().unwrap();
    let signature = url.split('?').nth(1).unwrap();
    let mut flipped = url.to_owned();
    let last = flipped.pop().unwrap();
    flipped.push(if last == '0' { '1' } else { '0' });
    for forged in [
        format!("{other_file}?{signature}"),
        url.split('?').next().unwrap().to_owned(),
        url.replace("expires=", "expires=9"),
        url.replace("report.json", "..%2freport.json"),
        format!("{}/v1/files/etc/passwd?{signature}", app.url),
        flipped,
    ] {
        assert_eq!(
            refusal(fetch(forged.clone()).await.unwrap()).await,
            (403, "url-forged".into()),
            "{forged}"
        );
    }
    let object = app.workers.store.artifact(app.tenant, trained, "report.json").await.unwrap().unwrap();
    let past = jiff::Timestamp::from_second(1_000_000_000).unwrap();
    let expired = app.blobs.sign(&object, Duration::from_mins(1), past).await.unwrap();
    assert_eq!(refusal(fetch(expired).await.unwrap()).await, (403, "url-expired".into()));

    let many = format!("bytes={}", "0-0,".repeat(1000));
    for range in ["bytes=9-1", "bytes=0-0", many.trim_end_matches(',')] {
        let answer = app.client.get(url).header("range", range).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.bytes().await.unwrap(), whole);
    }
    assert_eq!(app.client.post(url).send().await.unwrap().status(), 405);
    // An object that went behind our back, and one that was damaged, are no empty answers.
    let path = app.workers.objects().join(&object.key);
    let mut damaged = whole.to_vec();
    damaged[0] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    let report_path = format!("/v1/jobs/{trained}/report");
    assert_eq!(refusal(app.get(&report_path).await).await, (502, "artifact-damaged".into()));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(refusal(app.get(&report_path).await).await, (500, "artifact-missing".into()));
    assert_eq!(refusal(fetch(url.into()).await.unwrap()).await, (500, "artifact-missing".into()));
    app.stop().await;
}

// case A12: nobody tidies here, so that the objects are still there
#[tokio::test(flavor = "multi_thread")]
async fn a_signed_url_ends_with_its_job() {
    let app = TestApp::start().await;
    let trained = app.trained().await;
    let files: Value = app.get(&format!("/v1/jobs/{trained}/artifacts")).await.json().await.unwrap();
    let urls: Vec<&str> =
        files["data"].as_array().unwrap().iter().map(|file| file["url"].as_str().unwrap()).collect();
    assert!(urls.len() > 3);
    for url in &urls {
        assert_eq!(app.client.get(*url).send().await.unwrap().status(), 200, "{url}");
    }
    let deleted = app.ask(Method::DELETE, &format!("/v1/jobs/{trained}")).send().await.unwrap();
    assert_eq!(deleted.status(), 204);
    let scope = hypnos::blobs::Scope::job(app.tenant, trained);
    assert!(!app.blobs.list(&scope).await.unwrap().is_empty());
    for url in urls {
        assert_eq!(refusal(app.client.get(url).send().await.unwrap()).await, (404, "not-found".into()));
    }
    // One whose object a later attempt has replaced ends too.
    let again = app.trained().await;
    let object = app.workers.store.artifact(app.tenant, again, "report.json").await.unwrap().unwrap();
    let key = object.key.replace("/a/1/", "/a/7/");
    let replaced = hypnos::job::Object { key, ..object };
    let url = app.blobs.sign(&replaced, Duration::from_mins(1), jiff::Timestamp::now()).await.unwrap();
    assert_eq!(refusal(app.client.get(url).send().await.unwrap()).await.0, 404);
    app.stop().await;
}

// cases 51, 83
#[tokio::test(flavor = "multi_thread")]
async fn only_a_training_that_succeeded_is_sampled() {
    let app = TestApp::start().await;
    let sample = |id: String| {
        let request = app.ask(Method::POST, &format!("/v1/jobs/{id}/sample"));
        request.json(&json!({ "prompts": ["{product}"] })).send()
    };
    let done = app.finished().await.to_string();
    let accepted: Value = sample(done.clone()).await.unwrap().json().await.unwrap();
    assert_eq!(accepted["state"], "queued");

    let waiting = app.new_job().await["id"].as_str().unwrap().to_owned();
    let (status, slug, body) = problem(sample(waiting.clone()).await.unwrap()).await;
    assert_eq!((status, slug.as_str()), (409, "wrong-state"));
    assert!(body["detail"].as_str().unwrap().contains("queued"));
    app.ask(Method::POST, &format!("/v1/jobs/{waiting}/cancel")).send().await.unwrap();
    assert_eq!(refusal(sample(waiting).await.unwrap()).await, (409, "wrong-state".into()));
    let of_sample = accepted["id"].as_str().unwrap().to_owned();
    assert_eq!(refusal(sample(of_sample.clone()).await.unwrap()).await.0, 404, "a sample is no training");

    assert_eq!(app.ask(Method::DELETE, &format!("/v1/jobs/{done}")).send().await.unwrap().status(), 204);
    assert_eq!(refusal(sample(done).await.unwrap()).await.0, 404);
    assert_eq!(app.row(&of_sample, Kind::Sample).await, None, "its samples went with it");
    app.stop().await;
}

// cases 28, 29, 83
#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_sample_is_refused_with_the_field() {
    let app = TestApp::start().await;
    let path = format!("/v1/jobs/{}/sample", app.finished().await);
    let send = |body: Vec<u8>| {
        app.ask(Method::POST, &path).header("content-type", "application/json").body(body).send()
    };
    let fields = [
        ("{}".to_owned(), ""),
        (r#"{"prompts": []}"#.into(), "/prompts"),
        (r#"{"prompts": ["a", 1]}"#.into(), "/prompts/1"),
        (r#"{"prompts": [" "]}"#.into(), "/prompts/0"),
        (format!(r#"{{"prompts": ["{}"]}}"#, "x".repeat(1001)), "/prompts/0"),
        (r#"{"prompts": ["a"], "n": 0}"#.into(), "/n"),
        (r#"{"prompts": ["a"], "n": 1000}"#.into(), "/n"),
        (r#"{"prompts": ["a"], "width": 7}"#.into(), "/width"),
        (r#"{"prompts": ["a"], "height": 1000000}"#.into(), "/height"),
        (r#"{"prompts": ["a"], "width": 100}"#.into(), "/width"),
        (r#"{"prompts": ["a"], "guidance": 31}"#.into(), "/guidance"),
        (r#"{"prompts": ["a"], "seed": 18446744073709551616}"#.into(), "/seed"),
        (r#"{"prompts": ["a"], "scheduler": "x"}"#.into(), "/scheduler"),
        (r#"{"prompts": ["a"], "unknown": 1}"#.into(), "/unknown"),
        (r#"[["a"]]"#.into(), ""),
        (r#""a""#.into(), ""),
    ];
    for (body, pointer) in fields {
        let (status, slug, answer) = problem(send(body.clone().into_bytes()).await.unwrap()).await;
        assert_eq!((status, slug.as_str(), &answer["pointer"]), (422, "field", &json!(pointer)), "{body}");
    }
    let good = r#"{"prompts": ["a"]}"#;
    let utf16: Vec<u8> = good.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let no_json = [
        Vec::new(),
        b"{".to_vec(),
        br#"{"prompts": ["a"],}"#.to_vec(),
        br#"{"prompts": ["a"], "prompts": ["b"]}"#.to_vec(),
        [b"\xef\xbb\xbf", good.as_bytes()].concat(),
        utf16,
        "[".repeat(10_000).into_bytes(),
        br#"{"prompts": ["a"], "n": NaN}"#.to_vec(),
        b"{\"prompts\": [\"\xff\"]}".to_vec(),
    ];
    for body in no_json {
        let refused = refusal(send(body.clone()).await.unwrap()).await;
        let deep = body.starts_with(b"[[");
        let wanted = if deep { (422, "field") } else { (400, "bad-body") };
        assert_eq!(
            refused,
            (wanted.0, wanted.1.into()),
            "{}",
            String::from_utf8_lossy(&body[..body.len().min(60)])
        );
    }
    let deep = format!(r#"{{"prompts": {}"#, "[".repeat(10_000));
    assert!([400, 422].contains(&send(deep.into_bytes()).await.unwrap().status().as_u16()));
    let large = format!(r#"{{"{}": 1}}"#, "k".repeat(1 << 20));
    assert_eq!(refusal(send(large.into_bytes()).await.unwrap()).await, (413, "body-too-large".into()));
    let text = app.ask(Method::POST, &path).body(good).send().await.unwrap();
    assert_eq!(refusal(text).await, (415, "media-type".into()));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_sent_twice_under_one_key_is_one_sample() {
    let app = TestApp::start().await;
    let path = format!("/v1/jobs/{}/sample", app.finished().await);
    let send = |prompt: &'static str| {
        let request = app.ask(Method::POST, &path).header("idempotency-key", "one");
        request.json(&json!({ "prompts": [prompt] })).send()
    };
    let first = send("a").await.unwrap();
    assert_eq!(first.status(), 202);
    let first: Value = first.json().await.unwrap();
    let again = send("a").await.unwrap();
    assert_eq!(again.headers()["idempotent-replayed"], "true");
    assert_eq!(again.json::<Value>().await.unwrap()["id"], first["id"]);
    assert_eq!(refusal(send("b").await.unwrap()).await, (422, "idempotency-key-reused".into()));
    // Whoever is not willing to wait longer is answered with what there is.
    let request = app.ask(Method::POST, &path).header("prefer", "respond-async, wait=1");
    let answer = request.json(&json!({ "prompts": ["c"] })).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    let id = answer.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
    let early = app.ask(Method::POST, &format!("/v1/samples/{id}/retry")).send().await.unwrap();
    assert_eq!(refusal(early).await, (409, "wrong-state".into()));
    let canceled = app.ask(Method::POST, &format!("/v1/samples/{id}/cancel")).send().await.unwrap();
    assert_eq!(canceled.status(), 202);
    let canceled: Value = canceled.json().await.unwrap();
    assert_eq!(canceled["state"], "canceled");
    // One that ended without pictures is drawn again as a new one.
    let again = app.ask(Method::POST, &format!("/v1/samples/{id}/retry")).send().await.unwrap();
    assert_eq!(again.status(), 202);
    let again: Value = again.json().await.unwrap();
    assert_eq!((&again["retry_of"], &again["state"]), (&canceled["id"], &json!("queued")));
    assert_eq!((&again["spec"], &again["job_id"]), (&canceled["spec"], &canceled["job_id"]));
    app.stop().await;
}
