//! End-to-end tests: the program itself with its miniature bundle, in real processes that are killed.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hypnos::job::Format;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use super::postgres::{Bouncer, Postgres, socket_of};
use super::s3::{ACCESS_KEY, Garage, SECRET_KEY, http};
use super::test_workers::eventually;
use crate::provenance::{drawn_json, png_texts};

/// A process of ours, killed with this value.
pub(super) struct Process {
    pub(super) child: Child,
    log: PathBuf,
}

impl Process {
    /// Runs `hypnos ARGS` in the repository, with these settings and no others.
    pub(super) fn start(dir: &Path, name: &str, args: &[&str], settings: &BTreeMap<&str, String>) -> Self {
        let log = dir.join(format!("{name}.log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HYPNOS_"))
        {
            command.env_remove(name);
        }
        let child = command
            .args(args)
            .envs(settings)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child, log }
    }

    pub(super) fn signal(&self, signal: &str) {
        let done = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    pub(super) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until it has ended by itself; whether well.
    pub(super) async fn ended(&mut self) -> bool {
        let ended = eventually("the process ends", async || self.child.try_wait().unwrap());
        ended.await.success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // SIGKILL wakes a stopped one as well
        let _ = self.child.wait();
    }
}

pub(super) fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub(super) fn photo(n: usize) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("examples/photos/mug-{n}.jpg"))
}

pub(super) async fn is_ready(url: &str) {
    let client = http();
    eventually("the service is ready", async || {
        client.get(format!("{url}/readyz")).send().await.ok().filter(|answer| answer.status().is_success())
    })
    .await;
}

/// The two commands of the README's quick start, as they stand there, against the program that was built for the tests
/// and on a port that is free.
#[tokio::test(flavor = "multi_thread")]
async fn the_readme_s_five_lines_turn_four_photos_into_images() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let section = readme.split("## Run the service").nth(1).expect("a section `Run the service`");
    let blocks: Vec<&str> =
        section.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap()).collect();
    let (start, lines) = (blocks[0].trim(), blocks[1]);
    assert_eq!(start, "cargo run --release -- serve --workers 1");
    assert_eq!(
        lines.lines().filter(|line| !line.trim().is_empty() && !line.starts_with(' ')).count(),
        5,
        "{lines}"
    );

    let dir = tempfile::tempdir().unwrap();
    let address = free_address();
    let args: Vec<&str> = start.strip_prefix("cargo run --release -- ").unwrap().split(' ').collect();
    let settings = BTreeMap::from([
        ("HYPNOS_DATA", dir.path().join("data").display().to_string()),
        ("HYPNOS_LISTEN", address.to_string()),
    ]);
    let mut serve = Process::start(dir.path(), "serve", &args, &settings);
    is_ready(&format!("http://{address}")).await;

    std::os::unix::fs::symlink(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("examples"),
        dir.path().join("examples"),
    )
    .unwrap();
    let script = lines.replace("127.0.0.1:8080", &address.to_string());
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", &script]).current_dir(dir.path());
    let ran = tokio::task::spawn_blocking(move || bash.output().unwrap()).await.unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{said}\n{}", serve.log());
    assert!(said.contains("\"state\":\"succeeded\""), "{said}");
    let pictures: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.path()).collect();
    let pictures: Vec<_> =
        pictures.iter().filter(|path| path.extension().is_some_and(|end| end == "png")).collect();
    assert!(!pictures.is_empty(), "{said}");
    for picture in pictures {
        let decoded = image::open(picture).unwrap();
        assert_eq!((decoded.width(), decoded.height()), (128, 128));
        let texts = png_texts(&std::fs::read(picture).unwrap());
        let own = "Sampler: Euler a, Schedule type: Automatic, CFG scale: 4,";
        assert!(texts["parameters"].contains(own), "what suits the model: {texts:?}");
    }
    serve.signal("-TERM");
    assert!(serve.ended().await, "{}", serve.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_survives_a_killed_worker_and_a_frozen_one() {
    one_killed_and_one_frozen(Postgres::database().await).await;
}

// case A7
#[tokio::test(flavor = "multi_thread")]
async fn a_training_survives_a_killed_worker_and_a_frozen_one_behind_a_pooler() {
    let direct = Postgres::database().await;
    let bouncer = Bouncer::start(socket_of(&direct), "");
    one_killed_and_one_frozen(bouncer.through(&direct)).await;
}

/// One `serve` and two `work` on Postgres and S3. The first worker is killed, the second frozen past its lease and
/// revived; a third ends the job.
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
async fn one_killed_and_one_frozen(database: String) {
    let dir = tempfile::tempdir().unwrap();
    let garage = Garage::start().await;
    let (bucket, address) = (garage.bucket(), free_address());
    let url = format!("http://{address}");
    let mut settings = BTreeMap::from([
        ("HYPNOS_DATABASE", database.clone()),
        ("HYPNOS_DATA", dir.path().join("serve").display().to_string()),
        ("HYPNOS_OBJECTS", format!("s3://{}/scenario", bucket.name)),
        ("HYPNOS_S3_ENDPOINT", garage.endpoint.clone()),
        ("HYPNOS_S3_ACCESS_KEY", ACCESS_KEY.to_owned()),
        ("HYPNOS_S3_SECRET_KEY", SECRET_KEY.to_owned()),
        ("HYPNOS_BUNDLE", Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle").display().to_string()),
        ("HYPNOS_LEASE_SECS", "3".into()),
        ("HYPNOS_BEAT_SECS", "0.2".into()),
        ("HYPNOS_CHECKPOINT_SECS", "2".into()),
    ]);
    let mut migrate = Process::start(dir.path(), "migrate", &["migrate"], &settings);
    assert!(migrate.ended().await, "{}", migrate.log());
    let made = Command::new(env!("CARGO_BIN_EXE_hypnos"))
        .args(["keys", "create", "--tenant", "shop"])
        .envs(&settings)
        .output()
        .unwrap();
    let key = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    assert!(key.starts_with("hyp_"), "{}", String::from_utf8_lossy(&made.stderr));

    settings.extend([("HYPNOS_LISTEN", address.to_string()), ("HYPNOS_AUTH", "keys".into())]);
    let serve = Process::start(dir.path(), "serve", &["serve"], &settings);
    settings.remove("HYPNOS_LISTEN");
    settings.remove("HYPNOS_AUTH");
    is_ready(&url).await;
    let store = hypnos::store::Store::connect(&database, 2).await.unwrap();
    let shared = store.sessions() == Some(hypnos::store::Sessions::Shared);
    let n_lines = serve.log().matches("database behind a pooler").count();
    assert_eq!(n_lines, usize::from(shared), "in one line: {}", serve.log());
    let client = http();
    let worker = |name: &str| {
        let mut settings = settings.clone();
        settings.insert("HYPNOS_DATA", dir.path().join(name).display().to_string());
        Process::start(dir.path(), name, &["work"], &settings)
    };
    let status = async |job: &str| -> Value {
        client.get(job).bearer_auth(&key).send().await.unwrap().json().await.unwrap()
    };

    let mut form = Form::new().text("class_name", "mug").text(
        "options",
        json!({ "steps": 40, "learning_rate": 1e-4, "class_images": 4, "seed": 5,
                "views": { "n": 12 }, "discriminator": { "steps": 20, "batch": 4 },
                "evaluation": { "images": 1, "steps": 5 } })
        .to_string(),
    );
    for n in 1..=4 {
        form = form.part("images", Part::bytes(std::fs::read(photo(n)).unwrap()).file_name("photo.jpg"));
    }
    let answer =
        client.post(format!("{url}/v1/jobs")).bearer_auth(&key).multipart(form).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    let job = answer.headers()["location"].to_str().unwrap().to_owned();
    let id = job.rsplit('/').next().unwrap().parse().unwrap();
    let tenant = store.ensure_tenant("shop").await.unwrap();
    let row = async || store.find(tenant, id, hypnos::job::Kind::Train).await.unwrap().unwrap();
    let steps = |row: &hypnos::job::Job| row.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);

    // The first: killed after its first checkpoint.
    let mut first = worker("first");
    let committed =
        eventually("a checkpoint is committed", async || Some(steps(&row().await)).filter(|&step| step > 0));
    let committed = committed.await;
    first.child.kill().unwrap();
    first.child.wait().unwrap();

    // The second: goes on from there, and is frozen after a checkpoint of its own.
    let second = worker("second");
    let on = eventually("the second goes on", async || {
        let row = row().await;
        Some((steps(&row), row.attempt)).filter(|&(step, attempt)| attempt == 2 && step > committed)
    });
    let (on, _) = on.await;
    second.signal("-STOP");
    let zombie = row().await.run_lease;

    // The third ends the job; then the second wakes, and must do nothing.
    let mut third = worker("third");
    let done = eventually("the job ends", async || {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        Some(status(&job).await).filter(|job| job["state"] != "running" && job["state"] != "queued")
    });
    let done = done.await;
    assert_eq!(done["state"], "succeeded", "{}", third.log());
    assert_eq!(done["attempt"], 3);
    assert!(on < 40);
    let ended = row().await;
    assert!(ended.run_lease > zombie);
    let artifacts = store.artifacts(tenant, id).await.unwrap();
    second.signal("-CONT");
    eventually("the second sees that it lost", async || second.log().contains("lost").then_some(())).await;
    eventually("the second's objects are gone", async || {
        let blobs = story_blobs(&garage).await;
        let theirs = hypnos::blobs::Scope::attempt(tenant, hypnos::job::Lease { job: id, run_lease: zombie });
        let left = blobs.list(&theirs).await.unwrap();
        // Pictures that the row names may be from its attempt: they were shown while it held the lease.
        let named = |key: &str| artifacts.iter().any(|object| object.key == key);
        left.iter().all(|entry| named(entry.key.as_str())).then_some(())
    })
    .await;
    let after = row().await;
    assert_eq!(
        (after.version, after.run_lease),
        (ended.version, ended.run_lease),
        "the zombie wrote nothing"
    );
    assert_eq!(store.artifacts(tenant, id).await.unwrap(), artifacts);

    // Every artifact is whole, by the links that clients are given.
    let listed: Value =
        client.get(format!("{job}/artifacts")).bearer_auth(&key).send().await.unwrap().json().await.unwrap();
    let listed = listed["data"].as_array().unwrap();
    assert_eq!(listed.len(), artifacts.len());
    for artifact in listed {
        let bytes =
            client.get(artifact["url"].as_str().unwrap()).send().await.unwrap().bytes().await.unwrap();
        assert_eq!(hex(&bytes), artifact["sha256"].as_str().unwrap(), "{artifact}");
    }

    // And it draws.
    let sample = client
        .post(format!("{job}/sample"))
        .bearer_auth(&key)
        .header("prefer", "wait=60")
        .json(&json!({ "prompts": ["{product} on a beach"], "n": 2, "steps": 5, "format": "webp" }))
        .send()
        .await
        .unwrap();
    assert_eq!(sample.status(), 200, "{}", third.log());
    let sample: Value = sample.json().await.unwrap();
    for shown in sample["images"].as_array().unwrap() {
        let bytes = client.get(shown["url"].as_str().unwrap()).send().await.unwrap().bytes().await.unwrap();
        assert_eq!(image::load_from_memory(&bytes).unwrap().width(), 64);
        let said = drawn_json(&bytes, Format::Webp);
        assert!(job.ends_with(said["job"].as_str().unwrap()), "the training's: {said}");
        let weights = listed.iter().find(|artifact| artifact["name"] == "weights.safetensors").unwrap();
        assert_eq!(said["weights_sha256"], weights["sha256"]);
    }
    third.signal("-TERM");
    assert!(third.ended().await, "{}", third.log());
    drop(serve);
}

/// `timeout` signals its child and then its whole group, at once.
// case A10
#[tokio::test(flavor = "multi_thread")]
async fn two_simultaneous_signals_count_as_one_and_a_later_one_ends_the_process_at_once() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let dir = tempfile::tempdir().unwrap();
    for is_patient in [true, false] {
        let address = free_address();
        let settings = BTreeMap::from([
            ("HYPNOS_DATA", dir.path().join("data").display().to_string()),
            ("HYPNOS_LISTEN", address.to_string()),
        ]);
        let mut serve = Process::start(dir.path(), "serve", &["serve"], &settings);
        is_ready(&format!("http://{address}")).await;
        // A request under way holds its end up.
        let mut request = tokio::net::TcpStream::connect(address).await.unwrap();
        let head = format!("POST /v1/jobs/{}/sample HTTP/1.1\r\nHost: {address}\r\n", uuid::Uuid::now_v7());
        let head = format!("{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n");
        request.write_all(head.as_bytes()).await.unwrap();
        request.write_all(b"{").await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(300)).await; // for the server to take it up
        serve.signal("-TERM");
        eventually("it logs the signal", async || serve.log().contains("shutting down").then_some(())).await;
        serve.signal("-TERM"); // one that the kernel does not make one with the first
        tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
        assert!(serve.child.try_wait().unwrap().is_none(), "the request goes on: {}", serve.log());
        if is_patient {
            request.write_all(b"}").await.unwrap();
            let mut answer = Vec::new();
            request.read_to_end(&mut answer).await.unwrap();
            assert!(answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
            assert!(serve.ended().await, "{}", serve.log());
        } else {
            serve.signal("-TERM");
            assert!(!serve.ended().await);
            assert!(serve.log().contains("second termination signal"), "{}", serve.log());
        }
    }
}

async fn story_blobs(garage: &Garage) -> hypnos::blobs::Blobs {
    let bucket = hypnos::blobs::Bucket { prefix: "scenario".into(), ..garage.bucket() };
    let place = hypnos::blobs::Place::Bucket(bucket);
    hypnos::blobs::Blobs::open(&hypnos::blobs::BlobsConfig { place, links: None }).await.unwrap()
}

fn hex(bytes: &[u8]) -> String {
    use sha2::Digest;
    format!("{:x}", sha2::Sha256::digest(bytes))
}

// case A3
#[tokio::test(flavor = "multi_thread")]
async fn a_public_url_that_others_reach_requires_keys() {
    let dir = tempfile::tempdir().unwrap();
    let address = free_address();
    let url = format!("http://{address}");
    let settings = BTreeMap::from([
        ("HYPNOS_DATA", dir.path().join("data").display().to_string()),
        ("HYPNOS_LISTEN", address.to_string()),
        ("HYPNOS_PUBLIC_URL", "https://hypnos.example".to_owned()),
    ]);
    let serve = Process::start(dir.path(), "serve", &["serve"], &settings);
    is_ready(&url).await;
    let client = http();
    for host in ["hypnos.example", "localhost"] {
        let ask = client.get(format!("{url}/v1/jobs")).header("host", host);
        let answer = ask.header("x-forwarded-for", "192.0.2.60").send().await.unwrap();
        assert_eq!(answer.status(), 401, "{host}");
    }
    assert!(serve.log().contains("hypnos keys create"), "nobody can call yet: {}", serve.log());
}

// case A8, A15
#[tokio::test(flavor = "multi_thread")]
async fn many_simultaneous_uploads_are_accepted_or_get_a_retry_time_that_holds_and_memory_is_freed() {
    let dir = tempfile::tempdir().unwrap();
    let seen = dir.path().join("seen.json");
    let mut load = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/load-uploads"));
    load.arg(env!("CARGO_BIN_EXE_hypnos")).args(["--uploads", "20", "--photos", "4", "--megabytes", "3"]);
    load.args(["--settle", "2"]);
    load.args(["--directory", dir.path().to_str().unwrap(), "--json", seen.to_str().unwrap()]);
    let ran = tokio::task::spawn_blocking(move || load.output().unwrap()).await.unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{said}");
    let seen: Value = serde_json::from_str(&std::fs::read_to_string(&seen).unwrap()).unwrap();
    let seen = &seen[0];
    let counts: Vec<_> = ["accepted", "timed_out", "refused_again"].iter().map(|name| &seen[name]).collect();
    assert_eq!(counts, [&json!(20), &json!(0), &json!(0)], "{said}");
    let megabytes = |name: &str| seen[name].as_f64().unwrap();
    // All together are 240 MB: in memory are those that are being decoded, and afterwards none.
    assert!(megabytes("peak_mb") < megabytes("idle_mb") + 200.0, "{said}");
    assert!(megabytes("after_mb") < megabytes("idle_mb") + 40.0, "{said}");
}

/// Arguments, settings, and what the program says of them.
type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);

/// What cannot work is refused before anything is opened: one line, exit code 2.
#[test]
fn invalid_settings_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data").display().to_string();
    let cases: [Case; 15] = [
        (&["serve"], &[("HYPNOS_DATABSE", "x")], "HYPNOS_DATABSE is set, but there is no such setting"),
        (
            &["serve", "--listen", "0.0.0.0:0", "--auth", "none"],
            &[],
            "HYPNOS_AUTH is none, but HYPNOS_LISTEN is",
        ),
        (
            &["serve", "--listen", "127.0.0.1:0", "--auth", "none", "--public-url", "https://hypnos.example"],
            &[],
            "HYPNOS_AUTH is none, but HYPNOS_PUBLIC_URL is https://hypnos.example, which other machines can reach; wanted HYPNOS_AUTH=keys",
        ),
        (&["serve"], &[("HYPNOS_PUBLIC_URL", "https://a@b")], "HYPNOS_PUBLIC_URL: wanted http(s)://"),
        (&["serve"], &[("HYPNOS_DATABASE", "mysql://x")], "wanted sqlite:… or postgres://…, got \"mysql\""),
        (
            &["serve"],
            &[("HYPNOS_DATABASE_DIRECT", "mysql://x")],
            "HYPNOS_DATABASE_DIRECT: wanted postgres://…, got \"mysql\"",
        ),
        (
            &["serve"],
            &[("HYPNOS_DATABASE_DIRECT", "postgres://host/x")],
            "HYPNOS_DATABASE_DIRECT is set, but the database is a SQLite file",
        ),
        (&["serve"], &[("HYPNOS_OBJECTS", "s3://bucket")], "HYPNOS_S3_ACCESS_KEY is not set"),
        (&["serve"], &[("HYPNOS_S3_ENDPOINT", "http://x")], "HYPNOS_OBJECTS is not s3://BUCKET"),
        (&["serve"], &[("HYPNOS_PUBLIC_URL", "ftp://x")], "HYPNOS_PUBLIC_URL: wanted http(s)://"),
        (&["serve"], &[("HYPNOS_URL_SECRET", "short")], "HYPNOS_URL_SECRET: wanted at least 16 characters"),
        (&["work"], &[("HYPNOS_BUNDLE", "/nowhere")], "/nowhere"),
        (&["work", "--beat-secs", "50"], &[], "more than a third of HYPNOS_LEASE_SECS"),
        (&["doctor", "--sample-share", "2"], &[], "HYPNOS_SAMPLE_SHARE: wanted 0 to 1, got 2"),
        (&["doctor"], &[("HYPNOS_LEASE_SECS", "0")], "HYPNOS_LEASE_SECS: wanted seconds above 0, got 0"),
    ];
    for (args, settings, wanted) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
        let ended = command
            .args(args)
            .env("HYPNOS_DATA", &data)
            .env("HYPNOS_LOG", "error")
            .envs(settings.iter().copied())
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(2), "{args:?} {settings:?}: {said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: ") && last.contains(wanted), "{args:?} {settings:?}: {said}");
    }
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = busy.local_addr().unwrap().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
    let ended = command.args(["serve", "--listen", &address]).env("HYPNOS_DATA", &data).output().unwrap();
    assert_eq!(ended.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("cannot listen on"));
}
