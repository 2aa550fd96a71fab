//! `hypnos doctor`: what it finds in a service that works, in a new one, and in each kind of broken one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hypnos::blobs::{Blobs, BlobsConfig, Place};
use hypnos::deployment;
use hypnos::store::Store;
use serde_json::Value;
use sqlx::{Connection, SqliteConnection};

use super::postgres::Postgres;
use crate::bundles::copy;
use crate::cli_train::bundle;

/// A directory for the settings of one service, and the program beside it.
struct Site {
    dir: tempfile::TempDir,
    settings: BTreeMap<&'static str, String>,
}

/// What the program said.
struct Said {
    code: Option<i32>,
    /// Level, check, what was found and what to do.
    findings: Vec<[String; 4]>,
    text: String,
}

impl Said {
    /// The only error, in a report that ends with exit code 1: which check, what was found, what to do.
    fn error(&self) -> [&str; 3] {
        let errors: Vec<_> = self.findings.iter().filter(|[level, ..]| level == "error").collect();
        assert_eq!((self.code, errors.len()), (Some(1), 1), "{}", self.text);
        let [_, check, found, advice] = errors[0];
        [check, found, advice]
    }

    /// What was found by `check`, at this level.
    fn found(&self, level: &str, check: &str) -> &str {
        let one = self.findings.iter().find(|[l, c, ..]| l == level && c == check);
        one.map_or_else(|| panic!("no {level} of {check}: {}", self.text), |[_, _, found, _]| found)
    }
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = BTreeMap::from([
            ("HYPNOS_DATA", dir.path().join("data").display().to_string()),
            ("HYPNOS_BUNDLE", bundle().display().to_string()),
            ("HYPNOS_WEIGHTS_GB", "0.5".into()),
            ("XDG_CACHE_HOME", dir.path().join("cache").display().to_string()),
        ]);
        Self { dir, settings }
    }

    /// One whose database is migrated and paired with its objects, as `hypnos serve` leaves them.
    async fn started(url: Option<String>) -> Self {
        let mut site = Self::new();
        if let Some(url) = &url {
            site.settings.insert("HYPNOS_DATABASE", url.clone());
        }
        fs::create_dir_all(site.data()).unwrap();
        let url = url.unwrap_or_else(|| site.sqlite());
        let store = Store::connect(&url, 2).await.unwrap();
        store.migrate().await.unwrap();
        let place = Place::Directory(site.data().join("objects"));
        let blobs = Blobs::open(&BlobsConfig { place, links: None }).await.unwrap();
        deployment::pair(&store, &blobs).await.unwrap();
        store.close().await;
        site
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.settings.insert(name, value.into());
        self
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn sqlite(&self) -> String {
        format!("sqlite:{}", self.data().join("hypnos.db").display())
    }

    /// Runs `hypnos doctor` for people and for programs, which say the same.
    async fn doctor(&self) -> Said {
        let (code, text) = self.run(&[]).await;
        let (json_code, json) = self.run(&["--json"]).await;
        let json: Value = serde_json::from_str(&json).unwrap_or_else(|_| panic!("{text}{json}"));
        let word = |of: &Value, name: &str| of[name].as_str().unwrap_or_default().to_owned();
        let checks = json["checks"].as_array().expect("checks");
        let findings: Vec<_> = checks
            .iter()
            .map(|one| ["level", "check", "found", "advice"].map(|name| word(one, name)))
            .collect();
        assert_eq!((code, json["ok"] == true), (json_code, code == Some(0)), "{text}");
        for [level, check, ..] in &findings {
            assert!(
                text.lines().any(|line| line.starts_with(level) && line.contains(check)),
                "{check}: {text}"
            );
        }
        let one_line = findings.iter().flatten().all(|words| !words.contains('\n'));
        let advised = findings.iter().all(|[level, .., advice]| (level == "ok") == advice.is_empty());
        assert!(one_line && advised, "{json:#}");
        Said { code, findings, text }
    }

    async fn run(&self, more: &[&str]) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HYPNOS_"))
        {
            command.env_remove(name);
        }
        command.arg("doctor").args(more).envs(&self.settings).stdin(Stdio::null());
        let ended = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert!(ended.stderr.is_empty(), "{}", String::from_utf8_lossy(&ended.stderr));
        (ended.status.code(), String::from_utf8(ended.stdout).unwrap())
    }
}

/// Every file and directory below `dir`, with sizes.
fn files(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        }
        found.insert(entry.path(), if entry.path().is_dir() { 0 } else { entry.metadata().unwrap().len() });
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_works_has_no_errors_and_is_left_as_it_was() {
    for url in [None, Some(Postgres::database().await)] {
        let site = Site::started(url.clone()).await;
        let before = files(site.dir.path());
        let said = site.doctor().await;
        assert_eq!(said.code, Some(0), "{}", said.text);
        assert_eq!(files(site.dir.path()), before);
        let kind = if url.is_some() { "Postgres " } else { "SQLite " };
        assert!(said.found("ok", "database").starts_with(kind), "{}", said.text);
        assert!(said.found("ok", "object store").ends_with("can be read and written"), "{}", said.text);
        assert!(said.found("ok", "database and objects").starts_with("belong together"), "{}", said.text);
        for check in ["processor", "memory", "clock", "disk of DATA", "disk of scratch files", "device cpu"] {
            assert!(said.findings.iter().any(|[_, found, ..]| found == check), "{check}: {}", said.text);
        }
        let sample = said.found("ok", "sample on cpu");
        assert!(sample.starts_with("a sample (4 at once, ") && sample.ends_with(" GiB at most"), "{sample}");
        for method in ["textual_inversion", "dreambooth", "hypnos"] {
            let fits = said.found("ok", &format!("{method} on cpu"));
            assert!(fits.starts_with(&format!("a training ({method}, ")), "{fits}");
        }
        let others = said.findings.iter().map(|[_, check, ..]| check).filter(|check| *check != "bundle");
        let (others, names): (Vec<_>, BTreeSet<_>) = (others.clone().collect(), others.collect());
        assert_eq!(others.len(), names.len(), "each check has a name of its own: {others:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_of_one_device_have_its_memory_in_equal_parts() {
    let gib = |words: &str| words.split_once(" GiB").and_then(|(n, _)| n.parse::<f64>().ok());
    for (workers, n) in [("4", 4), ("2", 2)] {
        let said = Site::started(None).await.with("HYPNOS_WORKERS", workers).doctor().await;
        let (free, each) = said.found("ok", "device cpu").split_once(" of memory free, ").expect("a part");
        assert!(each.ends_with(&format!(" GiB for each of {n} workers")), "{}", said.text);
        let (free, each) = (gib(free).expect("a number"), gib(each).expect("a number"));
        assert!((free / f64::from(n) - each).abs() < 0.11, "{}", said.text);
    }
    for (name, value) in [("HYPNOS_WORKERS", "0"), ("HYPNOS_WORKERS", "1"), ("HYPNOS_DEVICES", "cpu")] {
        let said = Site::started(None).await.with(name, value).doctor().await;
        assert!(said.found("ok", "device cpu").ends_with(" of memory free"), "{}", said.text);
    }
    let said = Site::started(None).await.with("HYPNOS_DEVICES", "cpu,cpu").doctor().await;
    assert!(said.found("ok", "device cpu").ends_with(" for each of 2 workers"), "{}", said.text);
    if !cfg!(feature = "cuda") {
        let said = Site::started(None).await.with("HYPNOS_DEVICES", "cuda,cuda:0,cuda:00").doctor().await;
        assert_eq!(said.error()[0], "device cuda", "one device, said once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_first_start_it_says_what_will_be_made_and_makes_nothing() {
    let site = Site::new();
    let said = site.doctor().await;
    assert_eq!(said.code, Some(0), "{}", said.text);
    assert!(said.found("warning", "database").contains("there is no SQLite file"), "{}", said.text);
    assert!(said.found("warning", "object store").contains("there is no directory"), "{}", said.text);
    assert_eq!(files(site.dir.path()), BTreeMap::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_miniature_is_all_that_it_writes() {
    let mut site = Site::new();
    site.settings.remove("HYPNOS_BUNDLE");
    let said = site.doctor().await;
    assert_eq!(said.code, Some(0), "{}", said.text);
    let bundles = site.dir.path().join("cache/hypnos/bundles");
    let written = files(site.dir.path()).into_keys().find(|path| {
        let is_on_the_way = bundles.starts_with(path);
        !is_on_the_way && !path.to_string_lossy().contains("/cache/hypnos/bundles/miniature-")
    });
    assert_eq!(written, None);
    assert!(bundles.is_dir());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_another_version_or_out_of_reach_is_an_error_without_its_password() {
    let url = Postgres::database().await;
    let said = Site::new().with("HYPNOS_DATABASE", &url).doctor().await;
    let [check, found, advice] = said.error();
    assert_eq!((check, advice.contains("hypnos migrate")), ("database", true), "{}", said.text);
    assert!(found.starts_with("the database's schema is"), "{}", said.text);

    let site = Site::started(None).await;
    let mut database = SqliteConnection::connect(&site.sqlite()).await.unwrap();
    let applied = "insert into _sqlx_migrations (version, description, success, checksum, execution_time) \
                   values (9000, 'of a later program', true, x'00', 0)";
    sqlx::query(applied).execute(&mut database).await.unwrap();
    database.close().await.unwrap();
    let said = site.doctor().await;
    assert!(
        said.error()[1].contains("newer than this program, which does not know migration 9000"),
        "{}",
        said.text
    );

    let url = "postgres://hypnos:hunter2@127.0.0.1:9/hypnos";
    let said = Site::new().with("HYPNOS_DATABASE", url).doctor().await;
    assert_eq!(said.error()[0], "database");
    assert!(!said.text.contains("hunter2"), "{}", said.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_another_deployment_s_object_store_is_an_error() {
    let site = Site::started(None).await;
    fs::remove_dir_all(site.data().join("objects")).unwrap();
    let said = site.doctor().await;
    let [check, found, advice] = said.error();
    assert_eq!((check, advice.contains("HYPNOS_OBJECTS")), ("object store", true), "{}", said.text);
    assert!(found.starts_with("there is no directory "), "{}", said.text);

    let other = Site::started(None).await;
    let said = site.with("HYPNOS_OBJECTS", other.data().join("objects").display().to_string()).doctor().await;
    assert_eq!(said.error()[0], "database and objects");
    assert!(said.error()[1].contains("do not belong together"), "{}", said.text);

    let bucket = Site::started(None).await.with("HYPNOS_OBJECTS", "s3://hypnos");
    let bucket = bucket.with("HYPNOS_S3_ENDPOINT", "http://127.0.0.1:9").with("HYPNOS_S3_ACCESS_KEY", "key");
    let said = bucket.with("HYPNOS_S3_SECRET_KEY", "hunter2").doctor().await;
    assert_eq!(said.error()[0], "object store");
    assert!(!said.text.contains("hunter2"), "{}", said.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_device_and_a_broken_bundle_are_errors() {
    let said = Site::started(None).await.with("HYPNOS_DEVICES", "cpu,tpu").doctor().await;
    assert_eq!(said.error()[0], "device tpu");
    if !cfg!(feature = "cuda") {
        let said = Site::started(None).await.with("HYPNOS_DEVICES", "cuda:1").doctor().await;
        assert_eq!(said.error()[0], "device cuda:1");
        assert!(said.error()[2].contains("--features cuda"), "{}", said.text);
    }

    let said = Site::started(None).await.with("HYPNOS_PRECISION", "bf16").doctor().await;
    let advice = "set HYPNOS_PRECISION=f32, or leave it unset: each device then computes in what suits it";
    assert_eq!(said.error(), ["device cpu", "precision: wanted f32 on a CPU, got bf16", advice]);
    let said = Site::started(None).await.with("HYPNOS_PRECISION", "f32").doctor().await;
    assert_eq!(said.found("ok", "precision on cpu"), "f32");

    let site = Site::started(None).await;
    let broken = site.dir.path().join("broken");
    copy(&bundle(), &broken);
    let unet = broken.join("unet/diffusion_pytorch_model.safetensors");
    let whole = fs::metadata(&unet).unwrap().len();
    fs::File::options().write(true).open(&unet).unwrap().set_len(whole / 2).unwrap();
    let said = site.with("HYPNOS_BUNDLE", broken.display().to_string()).doctor().await;
    assert_eq!(said.code, Some(1), "{}", said.text);
    let faults: Vec<_> = said.findings.iter().filter(|[level, ..]| level == "error").collect();
    assert!(
        faults.iter().all(|[_, check, found, _]| check == "bundle" && found.contains("unet")),
        "{faults:?}"
    );

    let said = Site::started(None).await.with("HYPNOS_BUNDLE", "/not/there").doctor().await;
    assert_eq!(said.error()[..2], ["bundle", "there is no /not/there"]);
}
