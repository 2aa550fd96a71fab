//! Models over HTTP: the list, the model of a job, options that depend on it, and warnings.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hypnos::engine::memory::{MemoryCheck, MemorySettings, Products, training_plan};
use hypnos::engine::{CandleEngine, Engine, EngineSettings};
use hypnos::job::{Fault, FaultCode, Kind, ModelPart, State, TrainOptions};
use hypnos::ml::bundle::Bundle;
use hypnos::ml::device::DeviceKind;
use hypnos::ml::precision::Precision;
use serde_json::{Value, json};

use super::scripted::Script;
use super::test_app::{AppConfig, TestApp, file, form, photo, problem};
use super::test_workers::{Worker, eventually};
use crate::cli_train::bundle;
use hypnos::http::Settings;
use reqwest::Method;
use reqwest::multipart::Form;

const SHORT: &str = r#"{"steps": 2, "class_images": 0, "evaluation": {"images": 1}}"#;

fn script() -> Script {
    Script::new(Duration::ZERO)
}

impl TestApp {
    /// A worker with this script, once its model is registered.
    async fn worker(&self, script: &Script, name: &str) -> Worker {
        let worker = self.workers.start(script);
        eventually("the model is registered", async || {
            let models = self.models().await;
            let held = |model: &Value| model["name"] == name && model["workers"] != json!([]);
            models.iter().any(held).then_some(())
        })
        .await;
        worker
    }

    async fn models(&self) -> Vec<Value> {
        let list: Value = self.get("/v1/models").await.json().await.unwrap();
        list["data"].as_array().unwrap().clone()
    }

    async fn accepted(&self, form: Form) -> Value {
        let response = self.post_job(form).await;
        assert_eq!(response.status(), 202, "{:?}", response.text().await);
        response.json().await.unwrap()
    }

    async fn job(&self, job: &Value) -> Value {
        self.get(&format!("/v1/jobs/{}", job["id"].as_str().unwrap())).await.json().await.unwrap()
    }

    async fn succeeded(&self, job: &Value) -> Value {
        eventually("the training has succeeded", async || {
            let job = self.job(job).await;
            assert_ne!(job["state"], "failed", "{}", job["error"]);
            (job["state"] == "succeeded").then_some(job)
        })
        .await
    }
}

fn codes(job: &Value) -> Vec<&str> {
    job["warnings"].as_array().unwrap().iter().map(|warning| warning["code"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_models_of_workers_are_listed_with_the_options_that_suit_them() {
    let app = TestApp::start().await;
    assert_eq!(app.models().await, Vec::<Value>::new());
    let small = script().suited("hypnos", json!({ "steps": 300, "views": { "n": 32 } }));
    let small = small.parts(&[ModelPart::Segmenter, ModelPart::Metrics]);
    let worker = app.worker(&small, "scripted").await;
    let models = app.models().await;
    let model = &models[0];
    assert_eq!((models.len(), &model["default"], &model["resolution"]), (1, &json!(true), &json!(64)));
    let worker_view = json!({ "device": "scripted:0", "memory_bytes": null, "lacks": ["perceptual"] });
    assert_eq!(model["workers"], json!([worker_view]));
    assert_eq!(model["parts"], json!(["segmenter", "metrics"]));
    let hypnos = &model["methods"][0];
    assert_eq!(
        (&hypnos["method"], &hypnos["usable"], &hypnos["lacks"]),
        (&json!("hypnos"), &json!(false), &json!(["perceptual"]))
    );
    assert_eq!((&hypnos["options"]["steps"], &hypnos["options"]["views"]["n"]), (&json!(300), &json!(32)));
    let dreambooth = &model["methods"][1];
    assert_eq!((&dreambooth["usable"], &dreambooth["options"]["steps"]), (&json!(true), &json!(800)));
    worker.stop().await;
    let models = app.models().await;
    assert_eq!((models.len(), &models[0]["workers"]), (1, &json!([])), "it stays known");
    assert_eq!(app.client.get(format!("{}/v1/models", app.url)).send().await.unwrap().status(), 401);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn options_that_are_left_out_are_the_model_s_when_the_job_is_accepted() {
    let app = TestApp::start().await;
    let suited = script().suited("hypnos", json!({ "steps": 3, "class_images": 0, "views": { "n": 32 } }));
    let worker = app.worker(&suited, "scripted").await;
    let job = app.accepted(form(3, "mug").text("options", r#"{"views": {"margin": 0.5}}"#)).await;
    let options = &job["options"];
    assert_eq!(
        (&options["steps"], &options["views"]["n"], &options["views"]["margin"]),
        (&json!(3), &json!(32), &json!(0.5))
    );
    assert_eq!(job["model"], json!({ "name": "scripted", "sha256": "5c21b7ed" }));
    assert_eq!(codes(&job), Vec::<&str>::new());
    let done = app.succeeded(&job).await;
    assert_eq!((&done["options"], &done["model"]), (options, &job["model"]));
    let (status, slug, body) =
        problem(app.post_job(form(3, "mug").text("options", r#"{"s_p": 4}"#)).await).await;
    assert_eq!((status, slug.as_str(), &body["pointer"]), (422, "field", &json!("/options/s_p")), "{body}");
    worker.stop().await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_before_any_worker_waits_and_takes_the_options_of_the_model_that_claims_it() {
    let app = TestApp::start().await;
    let job = app.accepted(form(3, "mug").text("options", r#"{"evaluation": {"images": 1}}"#)).await;
    assert_eq!(
        (&job["state"], &job["waiting_for"], &job["model"]),
        (&json!("queued"), &json!("worker"), &Value::Null)
    );
    assert_eq!(codes(&job), ["options-open", "no-worker"]);
    let etag = app.get(&format!("/v1/jobs/{}", job["id"].as_str().unwrap())).await.headers()["etag"].clone();
    assert!(etag.to_str().unwrap().contains("no-worker"), "a worker's start is a change: {etag:?}");
    let suited = script().suited("hypnos", json!({ "steps": 3, "class_images": 0 }));
    let worker = app.worker(&suited, "scripted").await;
    let done = app.succeeded(&job).await;
    assert_eq!((&done["options"]["steps"], &done["options"]["s_p"]), (&json!(3), &json!(1)));
    assert_eq!((&done["seed"], &done["model"]["name"]), (&job["seed"], &json!("scripted")));
    assert_eq!((codes(&done), &done["waiting_for"]), (Vec::new(), &Value::Null));
    let row = app.row(job["id"].as_str().unwrap(), Kind::Train).await.unwrap();
    assert_eq!((row.state, row.attempt), (State::Succeeded, 1));
    worker.stop().await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_with_two_models_serve_two_jobs_each_with_the_right_one() {
    let app = TestApp::start().await;
    let (small, large) = (script().holding("small"), script().holding("large"));
    let workers = [app.worker(&small, "small").await, app.worker(&large, "large").await];
    let (status, slug, body) = problem(app.post_job(form(3, "mug").text("options", SHORT)).await).await;
    assert_eq!((status, slug.as_str(), &body["pointer"]), (422, "field", &json!("/model")));
    assert!(body["detail"].as_str().unwrap().ends_with("wanted one of large, small"), "{body}");
    let mut jobs = Vec::new();
    for n in 0..4 {
        for model in ["small", "large"] {
            let form = form(3, &format!("{model} {n}")).text("options", SHORT).text("model", model);
            jobs.push((model, app.accepted(form).await));
        }
    }
    for (model, job) in &jobs {
        let done = app.succeeded(job).await;
        assert_eq!(
            (&done["model"]["name"], &done["result"]["bundle_sha256"]),
            (&json!(model), &json!(model))
        );
    }
    for (script, model) in [(&small, "small"), (&large, "large")] {
        let did = format!("{:?}", script.did.lock().unwrap());
        let other = if model == "small" { "large" } else { "small" };
        assert!(did.contains(model) && !did.contains(other), "{did}");
    }
    // Samples go to the model of their training.
    for (_, job) in &jobs[..2] {
        let path = format!("/v1/jobs/{}/sample", job["id"].as_str().unwrap());
        let body = json!({ "prompts": ["a photo of {product}"], "steps": 1 });
        let request = app.ask(Method::POST, &path).header("Prefer", "wait=30").json(&body);
        let sample: Value = request.send().await.unwrap().json().await.unwrap();
        assert_eq!(sample["state"], "succeeded", "{sample}");
    }
    for worker in workers {
        worker.stop().await;
    }
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_model_is_refused_unless_the_operator_expects_it() {
    let settings = Settings { models: vec!["expected".into()], ..AppConfig::default().settings };
    let app = TestApp::build(AppConfig { settings, ..AppConfig::default() }).await;
    let (status, slug, body) = problem(app.post_job(form(3, "mug").text("model", "unheard")).await).await;
    assert_eq!((status, slug.as_str(), &body["pointer"]), (422, "field", &json!("/model")));
    assert!(body["detail"].as_str().unwrap().contains("\"unheard\"; registered: none"), "{body}");
    let job = app.accepted(form(3, "mug").text("model", "expected").text("options", SHORT)).await;
    assert_eq!(job["model"], json!({ "name": "expected", "sha256": null }));
    assert_eq!(codes(&job), ["options-open", "no-worker"]);
    let other = app.worker(&script().holding("other"), "other").await;
    assert_eq!(app.job(&job).await["waiting_for"], "worker", "the other model is not meant");
    let right = app.worker(&script().holding("expected"), "expected").await;
    assert_eq!(app.succeeded(&job).await["model"]["sha256"], "expected");
    for worker in [other, right] {
        worker.stop().await;
    }
    // Known, and no worker holds it: accepted, and says that it waits.
    let job = app.accepted(form(3, "mug").text("model", "expected")).await;
    assert_eq!((codes(&job), &job["waiting_for"]), (vec!["no-worker"], &json!("worker")));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_model_cannot_do_is_said_before_a_job_is_taken() {
    let settings = Settings { default_model: Some("bare".into()), ..AppConfig::default().settings };
    let app = TestApp::build(AppConfig { settings, ..AppConfig::default() }).await;
    let other = app.worker(&script().holding("whole"), "whole").await;
    let bare = app.worker(&script().holding("bare").parts(&[]), "bare").await;
    let (status, slug, body) = problem(app.post_job(form(3, "mug")).await).await;
    assert_eq!((status, slug.as_str(), &body["pointer"]), (422, "field", &json!("/options/views/enabled")));
    assert!(body["detail"].as_str().unwrap().contains("views.enabled=false"), "{body}");
    app.is_clean().await;
    let options = r#"{"method": "dreambooth", "steps": 2, "class_images": 0}"#;
    let job = app.accepted(form(3, "gizmo").text("options", options)).await;
    assert_eq!((codes(&job), &job["model"]["name"]), (vec!["no-metrics", "class-unknown"], &json!("bare")));
    let inspected = |class: &str, model: &str| {
        let form = Form::new().part("images", file(photo(1))).text("class_name", class.to_owned());
        app.ask(Method::POST, "/v1/photos/inspect").multipart(form.text("model", model.to_owned())).send()
    };
    let seen: Value = inspected("gizmo", "whole").await.unwrap().json().await.unwrap();
    assert_eq!(codes(&seen), ["class-unknown"]);
    let seen: Value = inspected("Teapot", "whole").await.unwrap().json().await.unwrap();
    assert_eq!(codes(&seen), Vec::<&str>::new());
    assert_eq!(problem(inspected("mug", "unheard").await.unwrap()).await.1, "field");
    app.succeeded(&job).await;
    for worker in [other, bare] {
        worker.stop().await;
    }
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_the_worker_with_the_parts_that_it_takes_while_that_one_restarts() {
    let app = TestApp::start().await;
    let whole = app.worker(&script(), "scripted").await;
    let plain = app.worker(&script().parts(&[]), "scripted").await;
    whole.stop().await;
    let job = app.accepted(form(3, "mug")).await;
    assert_eq!((codes(&job), &job["waiting_for"]), (vec!["no-worker"], &json!("worker")));
    let whole = app.worker(&script(), "scripted").await;
    app.succeeded(&job).await;
    for worker in [whole, plain] {
        worker.stop().await;
    }
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_model_has_the_idempotency_hash_of_earlier_builds() {
    let app = TestApp::start().await;
    let send = async |form: Form| {
        app.ask(Method::POST, "/v1/jobs").header("Idempotency-Key", "k").multipart(form).send().await.unwrap()
    };
    assert_eq!(send(form(3, "mug")).await.status(), 202);
    let job = app
        .workers
        .store
        .list(app.tenant, &hypnos::store::Filter::default(), None, 1)
        .await
        .unwrap()
        .remove(0);
    let wanted = hypnos::store::Idempotency { key: "k".into(), request_hash: earlier_hash() };
    let replayed = app.workers.store.replay(app.tenant, &wanted).await.unwrap();
    assert_eq!(replayed, Some(hypnos::store::Submitted::Replayed(job)));
    assert_eq!(problem(send(form(3, "mug").text("model", "x")).await).await.1, "idempotency-key-reused");
    app.stop().await;
}

/// The hash that builds before models gave a form of three photos of a mug: of the class name, no options, the photos,
/// each after its length.
fn earlier_hash() -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    let parts = [b"mug".to_vec(), Vec::new(), photo(0), photo(1), photo(2)];
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(&part);
    }
    format!("{:x}", hash.finalize())
}

/// Bytes that the engine of the next test may take.
static OBTAINABLE: AtomicU64 = AtomicU64::new(u64::MAX);

#[allow(clippy::unnecessary_wraps)] // as the setting wants it
fn obtainable() -> Option<u64> {
    Some(OBTAINABLE.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_that_is_counted_not_to_fit_fails_at_once_and_says_what_makes_it_fit() {
    let memory = MemoryCheck {
        obtainable,
        capacity: obtainable,
        gpu: std::sync::Arc::default(),
        sharers: 1,
        products: Products::BesideTrainings,
    };
    let settings = EngineSettings {
        bundle: bundle(),
        device: "cpu".into(),
        precision: None,
        batch: 4,
        finetuned_bytes_max: 0,
        checkpointing: false,
        memory: Some(memory),
    };
    let make = move || match CandleEngine::open(settings.clone()) {
        Ok(engine) => Ok(Box::new(engine) as Box<dyn Engine>),
        Err(error) => Err(Fault::new(FaultCode::Input, error.to_string())),
    };
    let app = TestApp::start().await;
    let worker = app.workers.start_engine("cpu", Box::new(make));
    eventually("the model is registered", async || app.models().await.first().cloned()).await;

    let options =
        r#"{"method": "dreambooth", "steps": 2, "class_images": 0, "evaluation": {"enabled": false}}"#;
    let asked = TrainOptions::given(&serde_json::from_str(options).unwrap()).unwrap();
    let limits = MemorySettings {
        batch: 4,
        checkpointing: false,
        precision: Precision::F32,
        products: Products::BesideTrainings,
        photos: (3, 1),
    };
    let plan = training_plan(&Bundle::open(&bundle()).unwrap(), &asked, &limits, DeviceKind::Cpu).unwrap();
    OBTAINABLE.store(plan.peak(DeviceKind::Cpu).bytes - 1, Ordering::Relaxed);
    let job = app.accepted(form(3, "mug").text("options", options)).await;
    let job = eventually("the training has failed", async || {
        let job = app.job(&job).await;
        assert_ne!(job["state"], "succeeded");
        (job["state"] == "failed").then_some(job)
    })
    .await;
    assert_eq!(job["error"]["code"], "input", "{job}");
    let detail = job["error"]["message"].as_str().unwrap();
    assert!(detail.starts_with("a training (dreambooth, 64 x 64 pixels): wanted "), "{detail}");
    assert!(detail.contains(" of memory, free ") && detail.contains("; it fits with --"), "{detail}");
    worker.stop().await;
}
