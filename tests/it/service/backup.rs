//! Backup and restore as docs/backup.md describes them, with its commands, on real databases and object stores.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hypnos::blobs::{Blobs, BlobsConfig, Bucket, Key, Name, Place, Scope};
use hypnos::job::{Job, JobId, Kind, Object, Spec, TenantId, TrainOptions, TrainSpec};
use hypnos::store::{NewJob, Origin, Store, Submitted};
use serde_json::json;
use sqlx::{Connection, SqliteConnection};
use uuid::Uuid;

use super::postgres::{Postgres, find_programs};
use super::s3::{ACCESS_KEY, BUCKET, Garage, SECRET_KEY, files};

/// The shell block of the page that follows this comment.
fn block(name: &str) -> String {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/backup.md")).unwrap();
    let (_, after) =
        page.split_once(&format!("<!-- {name} -->\n```sh\n")).unwrap_or_else(|| panic!("no {name}"));
    after.split("```").next().unwrap().to_owned()
}

/// Where the commands are run, and with which settings.
struct Installation {
    dir: tempfile::TempDir,
    settings: BTreeMap<&'static str, String>,
}

impl Installation {
    fn new() -> Self {
        let settings = BTreeMap::from([("HYPNOS_LOG", "error".to_owned())]);
        Self { dir: tempfile::tempdir().unwrap(), settings }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["HYPNOS_", "AWS_", "RCLONE_"].iter().any(|ours| text.starts_with(ours)) {
                command.env_remove(name);
            }
        }
        let ours = Path::new(env!("CARGO_BIN_EXE_hypnos")).parent().unwrap().to_owned();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = [ours, find_programs()].into_iter().chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(places).unwrap());
        command.envs(&self.settings).current_dir(self.dir.path());
        command
    }

    /// Runs a block, of which every line must succeed; its output.
    async fn run(&self, name: &str) -> String {
        let mut bash = self.command("bash");
        bash.args(["-euo", "pipefail", "-c", &block(name)]);
        let ran = output(bash).await;
        assert!(ran.status.success(), "{name}: {}", said(&ran));
        said(&ran)
    }

    async fn hypnos(&self, args: &[&str]) -> Output {
        let mut command = self.command(env!("CARGO_BIN_EXE_hypnos"));
        command.args(args);
        output(command).await
    }
}

async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn said(ran: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr))
}

/// A training that has succeeded, with all its objects, made by the store's operations.
async fn trained(store: &Store, blobs: &Blobs) -> Job {
    let (tenant, id) = (TenantId::LOCAL, JobId::new());
    let mut photos = Vec::new();
    for n in 0..3 {
        photos.push(blobs.put(&Key::photo(tenant, id, n), format!("photo {n} of {id}")).await.unwrap());
    }
    let spec = TrainSpec::new("mug", TrainOptions::default(), 7).unwrap();
    let new = NewJob {
        id,
        tenant,
        parent: None,
        spec: Spec::Train(Box::new(spec)),
        photos,
        priority: 0,
        max_attempts: 3,
        idempotency: None,
        origin: Origin::default(),
        queue_max: 1000,
    };
    let Submitted::New(_) = store.submit(new).await.unwrap() else { panic!("not accepted") };
    let day = std::time::Duration::from_hours(24);
    let job = store.claim(Uuid::now_v7(), &[Kind::Train], day, day).await.unwrap().unwrap();
    assert_eq!(job.id, id);
    let mut artifacts = Vec::new();
    for name in [Name::Weights, Name::Report] {
        let key = Key::artifact(tenant, job.lease(), name);
        artifacts.push(blobs.put(&key, format!("{name} of {id}")).await.unwrap());
    }
    store.finish(job.lease(), &json!({}), &artifacts).await.unwrap();
    store.find(tenant, id, Kind::Train).await.unwrap().unwrap()
}

/// Everything that a job's rows name is there, whole.
async fn is_whole(store: &Store, blobs: &Blobs, job: &Job) {
    let row = store.find(job.tenant, job.id, Kind::Train).await.unwrap();
    let row = row.unwrap_or_else(|| panic!("job {} is gone", job.id));
    assert_eq!(row, *job);
    let artifacts: Vec<Object> = store.artifacts(job.tenant, job.id).await.unwrap();
    assert_eq!(artifacts.len(), 2);
    for object in row.photos.iter().chain(&artifacts) {
        blobs.get(object).await.unwrap_or_else(|error| panic!("{}: {error}", object.key));
    }
}

/// What the page says of the time after a restore, once what was lost is older than a day: the sweep names it, and
/// removes nothing of it unless it is named.
async fn sweeping_needs_a_confirmation(installation: &Installation, url: &str, blobs: &Blobs, lost: &Job) {
    let n_left = async || blobs.list(&Scope::job(lost.tenant, lost.id)).await.unwrap().len();
    let young = installation.hypnos(&["sweep", "--remove"]).await;
    assert!(young.status.success() && said(&young).contains("0 objects of"), "{}", said(&young));
    assert_eq!(n_left().await, 5);
    let aged = std::time::SystemTime::now() - std::time::Duration::from_hours(48);
    for entry in blobs.list(&Scope::job(lost.tenant, lost.id)).await.unwrap() {
        let file = installation.path("hypnos-data/objects").join(entry.key.as_str());
        std::fs::File::options().write(true).open(file).unwrap().set_modified(aged).unwrap();
    }
    let mut connection = SqliteConnection::connect(url).await.unwrap();
    let days = 3 * 24 * 3600 * 1000;
    let ago = format!(
        "update deployment set restored_from_ms = restored_from_ms - {days}, restored_until_ms = restored_until_ms - {days} / 2"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(ago)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();

    let refused = installation.hypnos(&["sweep", "--remove"]).await;
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("--despite newer-than-rows"), "{}", said(&refused));
    let other = installation.hypnos(&["sweep", "--remove", "--despite", "most-objects"]).await;
    assert_eq!(other.status.code(), Some(2), "another word is not enough: {}", said(&other));
    assert_eq!(n_left().await, 5);
    let output = installation.run("sweep").await;
    assert!(output.contains("0 removed") && output.contains("5 removed"), "{output}");
    assert_eq!(n_left().await, 0);
    let after = installation.hypnos(&["sweep", "--remove"]).await;
    assert!(after.status.success() && said(&after).contains("0 objects of"), "{}", said(&after));
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_and_a_directory_come_back_as_they_were_backed_up() {
    let installation = Installation::new();
    let url = format!("sqlite:{}", installation.path("hypnos-data/hypnos.db").display());
    let open = async || {
        let place = Place::Directory(installation.path("hypnos-data/objects"));
        let blobs = Blobs::open(&BlobsConfig { place, links: None }).await.unwrap();
        (Store::connect(&url, 4).await.unwrap(), blobs)
    };
    assert!(installation.hypnos(&["migrate"]).await.status.success());
    std::fs::write(installation.path("hypnos-data/url-secret"), "a secret of sixteen characters").unwrap();
    let (store, blobs) = open().await;
    let kept = [trained(&store, &blobs).await, trained(&store, &blobs).await];
    let marker = std::fs::read(installation.path("hypnos-data/objects/deployment.json")).unwrap();
    installation.run("backup").await;
    assert!(
        !files(&installation.path("backup")).iter().any(|name| name.contains("wal") || name.contains("tmp"))
    );
    assert_ne!(
        std::fs::read(installation.path("hypnos-data/objects/deployment.json")).unwrap(),
        marker,
        "it moved on"
    );
    let lost = trained(&store, &blobs).await;
    let deleted = kept[1].clone();
    assert!(store.delete(deleted.tenant, deleted.id).await.unwrap());
    hypnos::maintenance::Eraser::new(store.clone(), blobs.clone()).round().await.unwrap();
    store.close().await;

    // An older database beside newer objects.
    installation.run("restore").await;
    let (store, blobs) = open().await;
    is_whole(&store, &blobs, &kept[0]).await;
    is_whole(&store, &blobs, &deleted).await; // from the copy of the objects
    assert!(store.find(lost.tenant, lost.id, Kind::Train).await.unwrap().is_none());
    assert!(store.deployment().await.unwrap().unwrap().restored.is_some());
    sweeping_needs_a_confirmation(&installation, &url, &blobs, &lost).await;
    assert_eq!(store.deployment().await.unwrap().unwrap().restored, None, "settled");
    is_whole(&store, &blobs, &kept[0]).await;

    // Nothing but the backup.
    store.close().await;
    std::fs::remove_dir_all(installation.path("hypnos-data")).unwrap();
    installation.run("restore").await;
    let (store, blobs) = open().await;
    is_whole(&store, &blobs, &kept[0]).await;
    is_whole(&store, &blobs, &deleted).await;

    // A second copy to the same place is refused, and leaves the first.
    let again = installation.hypnos(&["backup", "--to", "backup/url-secret"]).await;
    assert_eq!(again.status.code(), Some(2), "{}", said(&again));
    assert!(said(&again).contains("already exists"), "{}", said(&again));
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_and_a_bucket_come_back_as_they_were_backed_up() {
    let (garage, database) = (Garage::start().await, Postgres::database().await);
    let mut installation = Installation::new();
    installation.settings.extend([
        ("HYPNOS_DATABASE", database.clone()),
        ("HYPNOS_OBJECTS", format!("s3://{BUCKET}")),
        ("HYPNOS_S3_ENDPOINT", garage.endpoint.clone()),
        ("HYPNOS_S3_ACCESS_KEY", ACCESS_KEY.to_owned()),
        ("HYPNOS_S3_SECRET_KEY", SECRET_KEY.to_owned()),
        ("BUCKET", BUCKET.to_owned()),
        ("RCLONE_CONFIG", "/dev/null".to_owned()),
        ("RCLONE_CONFIG_STORE_TYPE", "s3".to_owned()),
        ("RCLONE_CONFIG_STORE_PROVIDER", "Other".to_owned()),
        ("RCLONE_CONFIG_STORE_REGION", "us-east-1".to_owned()),
        ("RCLONE_CONFIG_STORE_ENDPOINT", garage.endpoint.clone()),
        ("RCLONE_CONFIG_STORE_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
    ]);
    assert!(installation.hypnos(&["migrate"]).await.status.success());
    let bucket = Bucket { prefix: String::new(), ..garage.bucket() };
    let blobs = Blobs::open(&BlobsConfig { place: Place::Bucket(bucket), links: None }).await.unwrap();
    let store = Store::connect(&database, 4).await.unwrap();
    let kept = trained(&store, &blobs).await;
    installation.run("backup-postgres").await;
    hypnos::deployment::mark(&store, &blobs, true).await.unwrap(); // as every ten minutes
    let lost = trained(&store, &blobs).await;
    store.close().await;

    installation.run("restore-postgres").await;
    let store = Store::connect(&database, 4).await.unwrap();
    is_whole(&store, &blobs, &kept).await;
    assert!(store.find(lost.tenant, lost.id, Kind::Train).await.unwrap().is_none());
    assert!(store.deployment().await.unwrap().unwrap().restored.is_some());
    let swept = installation.run("sweep").await;
    assert!(swept.contains("0 objects of"), "all of it is young: {swept}");
    assert_eq!(blobs.list(&Scope::job(lost.tenant, lost.id)).await.unwrap().len(), 5);

    // An empty bucket is filled again from the copy.
    blobs.delete_all(&Scope::all()).await.unwrap();
    installation.run("restore-postgres").await;
    is_whole(&store, &blobs, &kept).await;
    let refused = installation.hypnos(&["backup", "--to", "x.db"]).await;
    assert_eq!(refused.status.code(), Some(2));
    assert!(said(&refused).contains("pg_dump"), "{}", said(&refused));
}
