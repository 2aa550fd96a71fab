//! A plain directory of Stable Diffusion and a bundle with a manifest, each behind a worker of the real program.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hypnos::ml::bundle::{Bundle, Capability};
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use super::e2e::{Process, free_address, photo};
use super::s3::http;
use super::test_workers::eventually;
use crate::bundles::copy;

/// The bundle of the tests as it would be downloaded: without `hypnos.json` and without what only this program has.
fn plain(dir: &Path) -> PathBuf {
    let place = dir.join("downloaded");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle"), &place);
    std::fs::remove_file(place.join("hypnos.json")).unwrap();
    for part in ["segmenter", "perceptual"] {
        std::fs::remove_dir_all(place.join(part)).unwrap();
    }
    // Another model: bundles that draw the same count as one.
    let index = place.join("model_index.json");
    let mut text: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    text["made_by"] = json!("somebody else");
    std::fs::write(&index, text.to_string()).unwrap();
    place
}

/// Answer to a job with these options: the status, and the body.
async fn submitted(url: &str, model: &str, options: &Value) -> (u16, Value) {
    let mut form = Form::new().text("class_name", "mug").text("model", model.to_owned());
    form = form.text("options", options.to_string());
    for n in 1..=3 {
        form = form.part("images", Part::bytes(std::fs::read(photo(n)).unwrap()).file_name("mug.jpg"));
    }
    let answer = http().post(format!("{url}/v1/jobs")).multipart(form).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_model_gets_tokens_of_its_own_and_says_once_at_the_start_what_it_cannot_do() {
    let dir = tempfile::tempdir().unwrap();
    let bundle = plain(dir.path());
    let address = free_address();
    let url = format!("http://{address}");
    let mut settings = BTreeMap::from([
        ("HYPNOS_DATA", dir.path().join("data").display().to_string()),
        ("HYPNOS_LISTEN", address.to_string()),
        ("HYPNOS_BUNDLE", bundle.display().to_string()),
        ("HYPNOS_LOG", "info".to_owned()),
    ]);
    let mut serve = Process::start(dir.path(), "serve", &["serve", "--workers", "2"], &settings);
    settings.insert("HYPNOS_BUNDLE", "tests/bundle".to_owned());
    let mut work = Process::start(dir.path(), "work", &["work"], &settings);
    let models = eventually("both models are registered", async || {
        let list: Value = http().get(format!("{url}/v1/models")).send().await.ok()?.json().await.ok()?;
        let held = list["data"].as_array()?.clone();
        (held.len() == 2 && held.iter().all(|model| model["workers"] != json!([]))).then_some(held)
    })
    .await;

    // 1. The tokens of the list and of a job are words of the model.
    for (name, tokens) in [("downloaded", ["sks", "ohwx"]), ("miniature", ["sks", "zwx"])] {
        let model = models.iter().find(|model| model["name"] == name).unwrap();
        let hypnos = &model["methods"][0]["options"];
        assert_eq!(json!([hypnos["instance_token"], hypnos["background_token"]]), json!(tokens), "{name}");
        let options = json!({ "method": "dreambooth", "steps": 1, "class_images": 0 });
        let (status, job) = submitted(&url, name, &options).await;
        assert_eq!((status, &job["options"]["instance_token"]), (202, &json!("sks")), "{job}");
        let (status, problem) =
            submitted(&url, name, &json!({ "method": "dreambooth", "instance_token": "thunderstorm" })).await;
        assert_eq!((status, &problem["pointer"]), (422, &json!("/options/instance_token")), "{problem}");
    }
    let (status, job) = submitted(&url, "miniature", &json!({ "instance_token": "zwx" })).await;
    let tokens = (&job["options"]["instance_token"], &job["options"]["background_token"]);
    assert_eq!((status, tokens), (202, (&json!("zwx"), &json!("sks"))), "{job}");
    let (status, problem) = submitted(&url, "downloaded", &json!({})).await;
    assert_eq!((status, &problem["pointer"]), (422, &json!("/options/views/enabled")), "{problem}");

    // 2. What the plain directory lacks is one line each, however many workers hold it.
    let missing = Bundle::open(&bundle).unwrap().missing();
    assert_eq!(missing, Capability::ALL);
    let log = serve.log();
    for capability in missing {
        let line = format!("{}: {}", bundle.join(capability.part()).display(), capability.missing());
        assert_eq!(log.matches(&line).count(), 1, "{line} in {log}");
    }
    assert!(!work.log().contains("segmenter: is missing"), "{}", work.log());
    assert!(work.log().contains("metrics/dino: is missing"), "{}", work.log());
    for process in [&mut serve, &mut work] {
        process.signal("-TERM");
        assert!(process.ended().await, "{}", process.log());
    }
}
