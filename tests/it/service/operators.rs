//! `hypnos admin`: the program itself, on both databases, as operators run it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hypnos::blobs::{Blobs, BlobsConfig, Key, Name, Place, Scope};
use hypnos::http::ProblemKind;
use hypnos::job::{
    Checkpoint, Fault, FaultCode, Job, JobId, Kind, Object, Spec, State, TenantId, TrainOptions, TrainSpec,
};
use hypnos::store::{NewJob, NewKey, Origin, Renewal, Scope as KeyScope, Store, Submitted, TenantState};
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use super::postgres::Postgres;
use super::test_app::{AppConfig, TestApp, form, refusal};
use super::test_workers::eventually;

const DAY: Duration = Duration::from_hours(24);
/// A client's text, which must not be shown unless requested.
const SECRET: &str = "a photo of {product} with our new logo";

/// A service's database and objects, and the program beside them.
struct Site {
    dir: tempfile::TempDir,
    url: String,
    store: Store,
    blobs: Blobs,
}

/// What the program did.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        self.out
    }

    /// The one line of its refusal.
    fn refused(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        let line = self.err.lines().last().unwrap_or_default().to_owned();
        line.strip_prefix("error: ").unwrap_or_else(|| panic!("{}", self.err)).to_owned()
    }

    fn json(self) -> Vec<Value> {
        self.ok().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Site {
    async fn sqlite() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", dir.path().join("hypnos.db").display());
        Self::on(dir, url).await
    }

    async fn postgres() -> Self {
        Self::on(tempfile::tempdir().unwrap(), Postgres::database().await).await
    }

    async fn on(dir: tempfile::TempDir, url: String) -> Self {
        let store = Store::connect(&url, 8).await.unwrap();
        store.migrate().await.unwrap();
        let place = Place::Directory(dir.path().join("objects"));
        let blobs = Blobs::open(&BlobsConfig { place, links: None }).await.unwrap();
        Self { dir, url, store, blobs }
    }

    /// Runs `hypnos admin ARGS` without a terminal.
    async fn admin(&self, args: &[&str]) -> Ran {
        let settings =
            [("HYPNOS_DATABASE", self.url.clone()), ("HYPNOS_DATA", self.dir.path().display().to_string())];
        run(args, &settings).await
    }

    async fn train(&self, tenant: TenantId) -> Job {
        let id = JobId::new();
        let mut photos = Vec::new();
        for n in 0..3 {
            photos.push(
                self.blobs.put(&Key::photo(tenant, id, n), format!("photo {n} of {id}")).await.unwrap(),
            );
        }
        let mut options = TrainOptions::default();
        options.evaluation.prompts = Some(vec![SECRET.into()]);
        let new = NewJob {
            id,
            tenant,
            parent: None,
            spec: Spec::Train(Box::new(TrainSpec::new("mug", options, 7).unwrap())),
            photos,
            priority: 0,
            max_attempts: 3,
            idempotency: None,
            queue_max: 100,
            origin: Origin::default(),
        };
        match self.store.submit(new).await.unwrap() {
            Submitted::New(job) => job,
            other => panic!("{other:?}"),
        }
    }

    async fn claim(&self) -> Job {
        self.store.claim(Uuid::now_v7(), Kind::ALL, DAY, DAY).await.unwrap().expect("a job waits").job
    }

    /// A training that ended by a fault of the machine.
    async fn failed(&self, tenant: TenantId) -> Job {
        let job = self.train(tenant).await;
        let claimed = self.claim().await;
        assert_eq!(claimed.id, job.id);
        let fault = Fault::new(FaultCode::Machine, "out of memory");
        self.store.fail(claimed.lease(), &fault, None).await.unwrap();
        job
    }

    /// A training that succeeded, with weights and a class image in the store.
    async fn trained(&self, tenant: TenantId) -> Job {
        let job = self.train(tenant).await;
        let lease = self.claim().await.lease();
        let weights =
            self.blobs.put(&Key::artifact(tenant, lease, Name::Weights), vec![7; 100_000]).await.unwrap();
        self.store.finish(lease, &json!({}), &[weights]).await.unwrap();
        let seed = job.created_ms as u64;
        let image = self.blobs.put(&Key::class_image(tenant, "00ff", seed, lease), "a mug").await.unwrap();
        self.store.add_class_image(tenant, "00ff", seed, &image, None).await.unwrap();
        job
    }

    async fn state(&self, id: JobId) -> State {
        self.store.any_job(id).await.unwrap().expect("a job").job.state
    }

    async fn objects(&self, tenant: TenantId) -> Vec<String> {
        self.blobs
            .list(&Scope::tenant(tenant))
            .await
            .unwrap()
            .iter()
            .map(|entry| entry.key.to_string())
            .collect()
    }
}

async fn run(args: &[&str], settings: &[(&str, String)]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HYPNOS_")) {
        command.env_remove(name);
    }
    command
        .arg("admin")
        .args(args)
        .envs(settings.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null());
    let ended = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: ended.status.code(), out: text(ended.stdout), err: text(ended.stderr) }
}

/// Runs each test against either database.
macro_rules! on_both {
    ($($test:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$test(super::Site::sqlite().await).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$test(super::Site::postgres().await).await;
                }
            )+
        }
    };
}

on_both! {
    jobs_are_listed_and_shown_without_what_a_client_wrote,
    jobs_are_retried_requeued_and_canceled_and_refused_in_a_line_each,
    claims_are_paused_and_resumed,
    tenants_are_listed_disabled_and_enabled,
    an_export_has_all_of_a_tenant_and_resumes_where_it_was_interrupted,
    an_export_lists_missing_objects,
    a_deleted_tenant_leaves_nothing,
}

async fn jobs_are_listed_and_shown_without_what_a_client_wrote(site: Site) {
    let [shop, other] =
        [site.store.ensure_tenant("shop").await.unwrap(), site.store.ensure_tenant("other").await.unwrap()];
    let failed = site.failed(shop).await.id;
    let waits = site.train(other).await.id;

    let listed = site.admin(&["jobs", "list", "--json"]).await.json();
    let seen: Vec<_> =
        listed.iter().map(|job| (job["id"].as_str().unwrap(), job["tenant"].as_str().unwrap())).collect();
    assert_eq!(seen, [(&*waits.to_string(), "other"), (&*failed.to_string(), "shop")]);
    assert_eq!((&listed[1]["error"]["code"], &listed[1]["attempt"]), (&json!("machine"), &json!(1)));
    for (args, wanted) in [
        (&["--tenant", "shop"][..], failed),
        (&["--state", "failed,canceled"], failed),
        (&["--state", "queued", "--kind", "train", "--class", "mug"], waits),
        (&["--limit", "1"], waits),
    ] {
        let listed = site.admin(&[&["jobs", "list", "--json"], args].concat()).await.json();
        assert_eq!(listed.len(), 1, "{args:?}");
        assert_eq!(listed[0]["id"], wanted.to_string(), "{args:?}");
    }
    assert_eq!(site.admin(&["jobs", "list", "--json", "--older-than", "1h"]).await.json(), [json!(null); 0]);
    let table = site.admin(&["jobs", "list"]).await.ok();
    assert_eq!(table.lines().count(), 3);
    assert!(
        table.starts_with("ID ") && table.contains(&waits.to_string()) && table.contains("1/3"),
        "{table}"
    );

    let id = failed.to_string();
    let shown = site.admin(&["jobs", "show", &id, "--json"]).await.json().remove(0);
    assert_eq!(
        (&shown["state"], &shown["photos"], &shown["class_name"]),
        (&json!("failed"), &json!(3), &json!("mug"))
    );
    let text = site.admin(&["jobs", "show", &id]).await.ok();
    assert!(text.contains("out of memory") && !text.contains("logo"), "{text}");
    let spec = site.admin(&["jobs", "show", &id, "--spec", "--json"]).await.json().remove(0);
    assert_eq!(spec["spec"]["options"]["evaluation"]["prompts"][0], SECRET);
    for listed in [site.admin(&["jobs", "list", "--json"]).await.ok(), shown.to_string()] {
        assert!(!listed.contains("logo"), "{listed}");
    }

    let line = site.admin(&["jobs", "list", "--tenant", "shpo"]).await.refused(2);
    assert_eq!(line, "there is no tenant \"shpo\"; `hypnos admin tenants list` lists all");
    let unknown = JobId::new();
    let line = site.admin(&["jobs", "show", &unknown.to_string()]).await.refused(2);
    assert_eq!(line, format!("{unknown}: there is no such job"));
    for (args, wanted) in
        [(["jobs", "show", "7"], "not an id"), (["jobs", "list", "--older-than=7"], "such as 2h")]
    {
        let ran = site.admin(&args).await;
        assert!(ran.code == Some(2) && ran.err.contains(wanted), "{}", ran.err);
    }
}

async fn jobs_are_retried_requeued_and_canceled_and_refused_in_a_line_each(site: Site) {
    let shop = site.store.ensure_tenant("shop").await.unwrap();
    let failed = [site.failed(shop).await, site.failed(shop).await];
    let id = failed[0].id.to_string();
    let retried = site.admin(&["jobs", "retry", &id, "--json"]).await.json();
    let again: JobId = retried[0]["retried_as"].as_str().unwrap().parse().unwrap();
    let again = site.store.any_job(again).await.unwrap().unwrap().job;
    assert_eq!((again.state, again.retry_of, again.photos.len()), (State::Queued, Some(failed[0].id), 3));
    for (copy, photo) in again.photos.iter().zip(&failed[0].photos) {
        assert_eq!(copy.sha256, photo.sha256);
        assert_ne!(copy.key, photo.key);
        site.blobs.get(copy).await.unwrap();
    }

    // By a condition: only with a yes, and only what was not retried before.
    let line = site.admin(&["jobs", "retry", "--tenant", "shop"]).await.refused(2);
    assert_eq!(line, "this would retry 1 job; add --yes to confirm");
    let retried = site.admin(&["jobs", "retry", "--tenant", "shop", "--yes", "--json"]).await.json();
    assert_eq!((retried.len(), &retried[0]["id"]), (1, &json!(failed[1].id)));
    let none = site.admin(&["jobs", "retry", "--state", "failed", "--yes"]).await.ok();
    assert_eq!(none, "no job meets the conditions\n");
    for args in [&["jobs", "retry"][..], &["jobs", "cancel"], &["jobs", "requeue"]] {
        assert!(site.admin(args).await.refused(2).contains("wanted ids, or conditions"), "{args:?}");
    }
    let line = site.admin(&["jobs", "cancel", &id, "--kind", "train"]).await.refused(2);
    assert_eq!(line, "wanted ids or conditions, got both");

    // One that cannot be does not keep the others.
    let running = site.claim().await;
    let (unknown, queued) = (JobId::new().to_string(), failed[1].id.to_string());
    let ran = site.admin(&["jobs", "requeue", &unknown, &queued, &running.id.to_string()]).await;
    assert_eq!(ran.code, Some(2));
    let lines: Vec<&str> = ran.err.lines().collect();
    assert_eq!(
        lines,
        [
            format!("error: {unknown}: there is no such job"),
            format!("error: {queued}: it is failed; wanted running"),
        ]
    );
    assert_eq!(ran.out, format!("{} queued\n", running.id));
    assert_eq!(site.state(running.id).await, State::Queued);
    assert!(site.store.finish(running.lease(), &json!({}), &[]).await.is_err(), "it is another's now");

    let running = site.claim().await.id;
    assert!(site.admin(&["jobs", "cancel", "--tenant", "shop"]).await.refused(2).contains("cancel 2 jobs"));
    assert_eq!(site.admin(&["jobs", "cancel", "--tenant", "shop", "--yes"]).await.ok().lines().count(), 2);
    let line = site.admin(&["jobs", "cancel", &id]).await.refused(2);
    assert_eq!(line, format!("{id}: it is failed; wanted queued or running"));
    assert_eq!(site.state(running).await, State::Running);
    assert!(site.store.any_job(running).await.unwrap().unwrap().job.cancel_requested);
    let line = site.admin(&["jobs", "retry", &running.to_string()]).await.refused(2);
    assert_eq!(line, format!("{running}: it is running; wanted failed or canceled"));

    // A photo that is gone.
    site.blobs.delete_all(&Scope::job(shop, failed[0].id)).await.unwrap();
    let line = site.admin(&["jobs", "retry", &id]).await.refused(2);
    assert_eq!(line, format!("{id}: its photos: the object is not in the store"));
}

async fn claims_are_paused_and_resumed(site: Site) {
    let shop = site.store.ensure_tenant("shop").await.unwrap();
    site.train(shop).await;
    let claim = async || site.store.claim(Uuid::now_v7(), Kind::ALL, DAY, DAY).await.unwrap();
    assert_eq!(site.admin(&["jobs", "paused"]).await.ok(), "");
    let said = site
        .admin(&["jobs", "pause", "--tenant", "shop", "--kind", "train", "--reason", "bad drivers"])
        .await
        .ok();
    assert_eq!(said, "paused: train jobs of shop\n");
    assert!(claim().await.is_none());
    assert!(site.admin(&["jobs", "list"]).await.ok().contains("queued, paused"));
    let paused = site.admin(&["jobs", "paused", "--json"]).await.json();
    assert_eq!(
        (&paused[0]["tenant"], &paused[0]["kind"], &paused[0]["reason"]),
        (&json!("shop"), &json!("train"), &json!("bad drivers"))
    );
    let line = site.admin(&["jobs", "resume"]).await.refused(2);
    assert_eq!(line, "there is no pause of all jobs of every tenant; `hypnos admin jobs paused` lists all");
    assert_eq!(
        site.admin(&["jobs", "resume", "--tenant", "shop", "--kind", "train"]).await.ok(),
        "resumed: train jobs of shop\n"
    );
    assert!(claim().await.is_some());
}

async fn tenants_are_listed_disabled_and_enabled(site: Site) {
    let shop = site.store.ensure_tenant("shop").await.unwrap();
    site.train(shop).await;
    let key = NewKey {
        id: "k".into(),
        tenant: shop,
        name: String::new(),
        hash: "00".into(),
        scope: KeyScope::Read,
        expires_ms: None,
    };
    site.store.create_key(&key).await.unwrap();
    let list = async || {
        site.admin(&["tenants", "list", "--json"])
            .await
            .json()
            .into_iter()
            .find(|one| one["name"] == "shop")
            .unwrap()
    };
    let before = list().await;
    assert_eq!(
        (&before["state"], &before["keys"], &before["queued"], &before["jobs"]),
        (&json!("active"), &json!(1), &json!(1), &json!(1))
    );
    site.admin(&["tenants", "disable", "shop"]).await.ok();
    assert_eq!(list().await["state"], "disabled");
    assert!(site.store.claim(Uuid::now_v7(), Kind::ALL, DAY, DAY).await.unwrap().is_none());
    site.admin(&["tenants", "enable", "shop"]).await.ok();
    assert_eq!(list().await["state"], "active");
    assert_eq!(before["weight"], 1);
    site.admin(&["tenants", "weight", "shop", "3"]).await.ok();
    assert_eq!(list().await["weight"], 3);
    let ran = site.admin(&["tenants", "weight", "shop", "0"]).await;
    assert!(ran.code == Some(2) && ran.err.contains("1..=1000"), "{}", ran.err);
    assert!(
        site.admin(&["tenants", "list"]).await.ok().lines().any(|line| line.starts_with("shop   active  3"))
    );
    let line = site.admin(&["tenants", "disable", "local"]).await.refused(2);
    assert!(line.contains("a service without keys"), "{line}");
    assert!(
        site.admin(&["tenants", "disable", "shpo"])
            .await
            .refused(2)
            .starts_with("there is no tenant \"shpo\"")
    );
    site.store.delete_tenant(shop).await.unwrap();
    let line = site.admin(&["tenants", "enable", "shop"]).await.refused(2);
    assert_eq!(line, "\"shop\" is being deleted, and cannot be enabled");
}

/// Lines of a file of an export.
fn lines(out: &Path, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Whether the hashes of an export hold, by the program that its reader has.
fn sums_hold(out: &Path) -> bool {
    let checked = Command::new("sha256sum")
        .args(["--check", "--strict", "--quiet", "SHA256SUMS"])
        .current_dir(out)
        .output();
    checked.unwrap().status.success()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

async fn an_export_has_all_of_a_tenant_and_resumes_where_it_was_interrupted(site: Site) {
    let shop = site.store.ensure_tenant("shop").await.unwrap();
    let trained = site.trained(shop).await;
    let failed = site.failed(shop).await;
    let held = site.train(shop).await;
    let lease = site.claim().await.lease();
    assert_eq!(lease.job, held.id);
    let object =
        site.blobs.put(&Key::artifact(shop, lease, Name::Checkpoint(5)), "five steps").await.unwrap();
    site.store.commit_checkpoint(lease, &Checkpoint { step: 5, object }).await.unwrap();
    let stranger = site.store.ensure_tenant("other").await.unwrap();
    site.train(stranger).await;
    site.admin(&["tenants", "disable", "shop"]).await.ok();

    let out = site.dir.path().join("export");
    let place = out.display().to_string();
    let said = site.admin(&["tenants", "export", "shop", "--out", &place]).await.ok();
    assert_eq!(said, format!("3 jobs, 12 objects, each verified: {place}\n"));
    assert!(sums_hold(&out) && !out.join("INCOMPLETE").exists());
    let jobs = lines(&out, "jobs.jsonl");
    let ids: Vec<&str> = jobs.iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [held.id, failed.id, trained.id].map(|id| id.to_string()));
    assert_eq!(jobs[2]["spec"]["options"]["evaluation"]["prompts"][0], SECRET, "it is the tenant's own");
    // Every object that a row names is in the directory by its key, with its bytes.
    let mut named: Vec<Object> = Vec::new();
    for job in &jobs {
        named.extend(serde_json::from_value::<Vec<Object>>(job["photos"].clone()).unwrap());
        named.extend(serde_json::from_value::<Vec<Object>>(job["artifacts"].clone()).unwrap());
        let checkpoint: Option<Checkpoint> = serde_json::from_value(job["checkpoint"].clone()).unwrap();
        named.extend(checkpoint.map(|checkpoint| checkpoint.object));
    }
    named.extend(
        lines(&out, "class_images.jsonl").into_iter().map(|line| serde_json::from_value(line).unwrap()),
    );
    assert_eq!(named.len(), 12);
    for object in &named {
        let file = std::fs::read(out.join("objects").join(&object.key)).unwrap();
        assert_eq!(file, site.blobs.get(object).await.unwrap());
    }
    let about: Value = serde_json::from_slice(&std::fs::read(out.join("tenant.json")).unwrap()).unwrap();
    assert_eq!((&about["name"], &about["jobs"], &about["objects"]), (&json!("shop"), &json!(3), &json!(12)));
    assert!(!files(&out).iter().any(|file| file.to_string_lossy().contains(&stranger.to_string())));
    let line = site.admin(&["tenants", "export", "shop", "--out", &place]).await.refused(2);
    assert!(line.contains("has other contents"), "{line}");

    // Broken off: what was fetched stays, one file is cut short, and the marker still says so.
    let marker = format!("tenant {shop}\n");
    std::fs::write(out.join("INCOMPLETE"), &marker).unwrap();
    std::fs::remove_file(out.join("jobs.jsonl")).unwrap();
    let weights = out
        .join("objects")
        .join(&named.iter().find(|object| object.name == "weights.safetensors").unwrap().key);
    std::fs::write(&weights, "cut short").unwrap();
    let kept = out.join("objects").join(&named[0].key);
    let before = std::fs::metadata(&kept).unwrap().modified().unwrap();
    site.admin(&["tenants", "export", "shop", "--out", &place]).await.ok();
    assert!(sums_hold(&out) && !out.join("INCOMPLETE").exists());
    assert_eq!(lines(&out, "jobs.jsonl"), jobs);
    assert_eq!(
        std::fs::metadata(&kept).unwrap().modified().unwrap(),
        before,
        "what was whole is not fetched again"
    );

    std::fs::write(out.join("INCOMPLETE"), &marker).unwrap();
    let line = site.admin(&["tenants", "export", "other", "--out", &place]).await.refused(2);
    assert!(line.contains("an export of another tenant"), "{line}");
}

async fn an_export_lists_missing_objects(site: Site) {
    let shop = site.store.ensure_tenant("shop").await.unwrap();
    let trained = site.trained(shop).await;
    site.blobs.delete(&Key::photo(shop, trained.id, 1)).await.unwrap();
    let out = site.dir.path().join("export");
    let ran = site.admin(&["tenants", "export", "shop", "--out", &out.display().to_string()]).await;
    assert!(ran.err.contains(&Key::photo(shop, trained.id, 1).to_string()), "{}", ran.err);
    assert!(ran.refused(1).contains("is incomplete"));
    assert!(out.join("INCOMPLETE").exists() && sums_hold(&out), "what is there is right");
}

async fn a_deleted_tenant_leaves_nothing(site: Site) {
    let [shop, other] =
        [site.store.ensure_tenant("shop").await.unwrap(), site.store.ensure_tenant("other").await.unwrap()];
    let trained = site.trained(shop).await;
    for _ in 0..3 {
        site.failed(shop).await;
    }
    site.train(shop).await;
    let kept = site.trained(other).await;
    let others = site.objects(other).await;
    // What a killed process left and no row names goes as well.
    let orphan = Key::artifact(shop, hypnos::job::Lease { job: trained.id, run_lease: 99 }, Name::Weights);
    site.blobs.put(&orphan, "orphan").await.unwrap();

    let line = site.admin(&["tenants", "delete", "shop"]).await.refused(2);
    assert_eq!(line, "this would erase \"shop\" for good; add --yes-delete \"shop\" to confirm");
    let line = site.admin(&["tenants", "delete", "shop", "--yes-delete", "other"]).await.refused(2);
    assert_eq!(line, "nothing was erased: wanted the name \"shop\", got \"other\"");
    assert_eq!(site.store.tenant_named("shop").await.unwrap().unwrap().state, TenantState::Active);

    // One runs: its worker learns of the end at its next heartbeat.
    let running = site.claim().await;
    assert_eq!(running.tenant, shop);
    let store = site.store.clone();
    let worker = tokio::spawn(async move {
        loop {
            match store.renew(running.lease(), DAY, None).await.unwrap() {
                Renewal::Held { cancel_requested: true } => break,
                Renewal::Held { .. } => tokio::time::sleep(Duration::from_millis(20)).await,
                Renewal::Lost => panic!("its lease is lost"),
            }
        }
        store.cancelled(running.lease()).await.unwrap();
    });
    assert_eq!(
        site.admin(&["tenants", "delete", "shop", "--yes-delete", "shop"]).await.ok(),
        "\"shop\" is erased\n"
    );
    worker.await.unwrap();
    assert_eq!(site.objects(shop).await, [""; 0]);
    assert_eq!(site.store.tenant_named("shop").await.unwrap(), None);
    assert_eq!((site.objects(other).await, site.state(kept.id).await), (others, State::Succeeded));
    let jobs = site.admin(&["jobs", "list", "--json"]).await.json();
    assert_eq!(jobs.len(), 1);
    let line = site.admin(&["tenants", "delete", "shop", "--yes-delete", "shop"]).await.refused(2);
    assert!(line.starts_with("there is no tenant \"shop\""), "{line}");
}

/// A tenant that was marked and whose deletion was then killed is finished by the service.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_was_killed_is_finished_by_maintenance() {
    let site = Site::sqlite().await;
    let shop = site.store.ensure_tenant("shop").await.unwrap();
    site.trained(shop).await;
    site.failed(shop).await;
    site.store.delete_tenant(shop).await.unwrap();
    site.store.delete_jobs_of(shop, 1).await.unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    let pause = Duration::from_millis(10);
    tokio::spawn(hypnos::maintenance::run(site.store.clone(), site.blobs.clone(), pause, stop.clone()));
    eventually("the tenant is gone", async || {
        site.store.tenant_named("shop").await.unwrap().is_none().then_some(())
    })
    .await;
    assert_eq!(site.objects(shop).await, [""; 0]);
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_command_creates_no_database() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("slip-of-the-pen");
    for args in
        [&["jobs", "list"][..], &["tenants", "list"], &["tenants", "delete", "shop", "--yes-delete", "shop"]]
    {
        let line = run(args, &[("HYPNOS_DATA", data.display().to_string())]).await.refused(2);
        assert!(line.starts_with("there is no database at ") && line.contains("HYPNOS_DATA"), "{line}");
        assert!(!data.exists(), "{args:?}");
    }
    let gone = "postgres://nobody@127.0.0.1:1/nowhere".to_owned();
    let line = run(&["jobs", "list"], &[("HYPNOS_DATABASE", gone)]).await.refused(1);
    assert_eq!(line, "the database cannot be reached");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keys_of_a_disabled_tenant_are_answered_with_403_within_their_time() {
    let mut config = AppConfig::default();
    config.settings.key_time = Duration::from_millis(50);
    let app = TestApp::build(config).await;
    let job = app.new_job().await["id"].as_str().unwrap().to_owned();
    let mut stream = app.get(&format!("/v1/jobs/{job}/events")).await;
    assert!(stream.chunk().await.unwrap().is_some());
    let stranger = app.workers.store.ensure_tenant("second").await.unwrap();
    let stranger = app.new_key(stranger, KeyScope::Read, None).await;

    assert!(app.workers.store.enable_tenant(app.tenant, false).await.unwrap());
    let said = refusal(app.post_job(form(3, "mug")).await).await;
    assert_eq!(said, (403, ProblemKind::TenantDisabled.slug().to_owned()), "even while the key is believed");
    eventually("every request is refused", async || {
        (app.get("/v1/jobs").await.status() == 403).then_some(())
    })
    .await;
    assert_eq!(refusal(app.get(&format!("/v1/jobs/{job}")).await).await, (403, "tenant-disabled".into()));
    let rest = async { while let Ok(Some(_)) = stream.chunk().await {} };
    tokio::time::timeout(Duration::from_mins(1), rest).await.expect("the stream ends");
    assert_eq!(app.ask_as(&stranger, Method::GET, "/v1/jobs").send().await.unwrap().status(), 200);
    // No object of the refused upload stays.
    let objects = app.blobs.list(&Scope::tenant(app.tenant)).await.unwrap();
    assert!(objects.iter().all(|entry| entry.key.to_string().contains(&job)), "{objects:?}");

    assert!(app.workers.store.enable_tenant(app.tenant, true).await.unwrap());
    eventually("it is served again", async || (app.get("/v1/jobs").await.status() == 200).then_some(()))
        .await;
    app.stop().await;
}
