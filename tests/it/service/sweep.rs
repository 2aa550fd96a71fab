//! `hypnos sweep` as an operator runs it, on the wrong settings and on the right ones.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use hypnos::blobs::{Blobs, BlobsConfig, Key, Name, Place, Scope};
use hypnos::deployment;
use hypnos::job::{JobId, Lease, Spec, TenantId, TrainOptions, TrainSpec};
use hypnos::store::{NewJob, Origin, Store, Submitted};

use super::s3::files;

const TENANT: TenantId = TenantId::LOCAL;

/// A deployment in a data directory.
struct Installation {
    dir: tempfile::TempDir,
    store: Store,
    blobs: Blobs,
}

impl Installation {
    /// With so many trainings, whose photos are older than a day.
    async fn with(n: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let store =
            Store::connect(&format!("sqlite:{}/data/hypnos.db", dir.path().display()), 4).await.unwrap();
        store.migrate().await.unwrap();
        let place = Place::Directory(dir.path().join("data/objects"));
        let blobs = Blobs::open(&BlobsConfig { place, links: None }).await.unwrap();
        deployment::pair(&store, &blobs).await.unwrap();
        let installation = Self { dir, store, blobs };
        for _ in 0..n {
            installation.train().await;
        }
        installation.age();
        installation
    }

    async fn train(&self) -> JobId {
        let id = JobId::new();
        let mut photos = Vec::new();
        for n in 0..3 {
            photos.push(self.blobs.put(&Key::photo(TENANT, id, n), "photo").await.unwrap());
        }
        let spec = TrainSpec::new("mug", TrainOptions::default(), 7).unwrap();
        let new = NewJob {
            id,
            tenant: TENANT,
            parent: None,
            spec: Spec::Train(Box::new(spec)),
            photos,
            priority: 0,
            max_attempts: 3,
            idempotency: None,
            origin: Origin::default(),
            queue_max: 1000,
        };
        let Submitted::New(_) = self.store.submit(new).await.unwrap() else { panic!("not accepted") };
        id
    }

    /// All that lies there now is two days old.
    fn age(&self) {
        fn age(dir: &Path) {
            let then = SystemTime::now() - Duration::from_hours(48);
            for entry in std::fs::read_dir(dir).unwrap().flatten() {
                if entry.path().is_dir() {
                    age(&entry.path());
                } else {
                    std::fs::File::options()
                        .write(true)
                        .open(entry.path())
                        .unwrap()
                        .set_modified(then)
                        .unwrap();
                }
            }
        }
        age(&self.objects());
    }

    fn objects(&self) -> PathBuf {
        self.dir.path().join("data/objects")
    }

    async fn n(&self) -> usize {
        self.blobs.list(&Scope::all()).await.unwrap().len()
    }

    /// Runs `hypnos sweep ARGS` on this data directory, or with other settings.
    async fn sweep(&self, args: &[&str], settings: &[(&str, String)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HYPNOS_"))
        {
            command.env_remove(name);
        }
        command.arg("sweep").args(args).current_dir(self.dir.path());
        command.env("HYPNOS_DATA", self.dir.path().join("data")).env("HYPNOS_LOG", "error");
        command.envs(settings.iter().map(|(name, value)| (name, value)));
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }
}

fn said(ran: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr))
}

/// Refused in one line, with exit code 2.
fn is_refused(ran: &Output, wanted: &str) {
    let error = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(2), "{}", said(ran));
    assert!(error.starts_with("error: ") && error.lines().count() == 1, "{error}");
    assert!(error.contains(wanted), "wanted {wanted:?}: {error}");
}

// case A2
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_without_its_database_removes_and_creates_nothing() {
    let installation = Installation::with(5).await;
    let objects = ("HYPNOS_OBJECTS", installation.objects().display().to_string());
    let elsewhere = installation.dir.path().join("elsewhere");
    // HYPNOS_DATA or HYPNOS_DATABASE forgotten, or another's.
    let nowhere = [("HYPNOS_DATA", elsewhere.display().to_string()), objects.clone()];
    is_refused(&installation.sweep(&["--remove"], &nowhere).await, "there is no database at");
    assert!(!elsewhere.exists());
    let file = format!("sqlite:{}", installation.dir.path().join("typo.db").display());
    is_refused(
        &installation.sweep(&["--remove"], &[("HYPNOS_DATABASE", file)]).await,
        "there is no database at",
    );
    assert!(!installation.dir.path().join("typo.db").exists());
    let empty = Installation::with(0).await;
    let database = format!("sqlite:{}", empty.dir.path().join("data/hypnos.db").display());
    let args = ["--remove", "--despite", "most-objects,newer-than-rows"];
    let ran = installation.sweep(&args, &[("HYPNOS_DATABASE", database)]).await;
    is_refused(&ran, "do not belong together");
    // An empty one that was never marked, as before there were markers.
    let unmarked = installation.dir.path().join("unmarked.db");
    let store = Store::connect(&format!("sqlite:{}", unmarked.display()), 2).await.unwrap();
    store.migrate().await.unwrap();
    let database = [("HYPNOS_DATABASE", format!("sqlite:{}", unmarked.display()))];
    is_refused(&installation.sweep(&["--remove"], &database).await, "the database does not record");
    // Objects elsewhere.
    let missing = [("HYPNOS_OBJECTS", elsewhere.display().to_string())];
    is_refused(&installation.sweep(&["--remove"], &missing).await, "HYPNOS_OBJECTS: there is no directory");
    assert!(!elsewhere.exists());
    assert_eq!(installation.n().await, 15);
    // A schema that is not this program's is not brought up to it.
    let old = Store::connect(&format!("sqlite:{}", installation.dir.path().join("old.db").display()), 2)
        .await
        .unwrap();
    drop(old);
    let database =
        [("HYPNOS_DATABASE", format!("sqlite:{}", installation.dir.path().join("old.db").display()))];
    is_refused(&installation.sweep(&["--remove"], &database).await, "hypnos migrate");
}

// case A2
#[tokio::test(flavor = "multi_thread")]
async fn a_suspicious_sweep_is_refused_until_its_risks_are_named() {
    let installation = Installation::with(4).await;
    let lease = |n| Lease { job: JobId::new(), run_lease: n };
    // Orphans of jobs that are younger than every row, and more than half of all.
    for n in 0..20 {
        installation.blobs.put(&Key::artifact(TENANT, lease(n), Name::Weights), "lost").await.unwrap();
    }
    installation.age();
    let listed = installation.sweep(&[], &[]).await;
    assert!(listed.status.success(), "{}", said(&listed));
    let text = said(&listed);
    assert!(text.contains("20 objects of 32 that no row names, 80 bytes; 0 removed"), "{text}");
    assert!(text.contains("--despite most-objects") && text.contains("--despite newer-than-rows"), "{text}");
    is_refused(&installation.sweep(&["--remove"], &[]).await, "--despite most-objects");
    is_refused(
        &installation.sweep(&["--remove", "--despite", "newer-than-rows"], &[]).await,
        "--despite most-objects",
    );
    is_refused(
        &installation.sweep(&["--remove", "--despite", "most-objects"], &[]).await,
        "--despite newer-than-rows",
    );
    let unknown = installation.sweep(&["--remove", "--despite", "yes"], &[]).await;
    assert_eq!(unknown.status.code(), Some(2), "{}", said(&unknown));
    let alone = installation.sweep(&["--despite", "most-objects"], &[]).await;
    assert_eq!(alone.status.code(), Some(2), "{}", said(&alone));
    assert_eq!(installation.n().await, 32);
    let done = installation.sweep(&["--remove", "--despite", "most-objects,newer-than-rows"], &[]).await;
    assert!(done.status.success() && said(&done).contains("20 removed"), "{}", said(&done));
    assert_eq!(installation.n().await, 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_killed_processes_left_is_removed_and_all_else_stays() {
    let installation = Installation::with(4).await;
    let job = installation.train().await;
    let lost = Key::artifact(TENANT, Lease { job, run_lease: 1 }, Name::Weights);
    installation.blobs.put(&lost, "lost").await.unwrap();
    // An upload that was not finished, and what a killed process wrote to see whether the store works.
    let unfinished = installation.objects().join(format!("t/{TENANT}/j/{job}/a/1/report.json#1"));
    std::fs::write(&unfinished, "half").unwrap();
    std::fs::create_dir(installation.objects().join("probe")).unwrap();
    std::fs::write(installation.objects().join("probe/01940000-0000-7000-8000-000000000000"), "hypnos")
        .unwrap();
    installation.age();
    let young = Key::artifact(TENANT, Lease { job, run_lease: 2 }, Name::Weights);
    installation.blobs.put(&young, "being uploaded").await.unwrap();
    let listed = installation.sweep(&[], &[]).await;
    assert!(said(&listed).contains(&format!("{lost}\t4 bytes\n")), "{}", said(&listed));
    assert_eq!(installation.n().await, 17, "a look removes nothing");
    let done = installation.sweep(&["--remove"], &[]).await;
    assert!(done.status.success() && said(&done).contains("1 removed"), "{}", said(&done));
    let left = installation.blobs.list(&Scope::all()).await.unwrap();
    assert_eq!(left.len(), 16);
    assert!(left.iter().any(|entry| entry.key == young));
    let files = files(&installation.objects());
    assert!(!files.iter().any(|name| name.contains('#') || name.starts_with("0194")), "{files:?}");
}

// case A13
#[tokio::test(flavor = "multi_thread")]
async fn files_of_others_are_reported_and_left_alone() {
    use std::os::unix::ffi::OsStrExt;
    let installation = Installation::with(4).await;
    let job = installation.train().await;
    let lost = Key::artifact(TENANT, Lease { job, run_lease: 1 }, Name::Weights);
    installation.blobs.put(&lost, "lost").await.unwrap();
    let place = installation.objects().join(format!("t/{TENANT}/j/{job}/photos"));
    let latin = place.join(std::ffi::OsStr::from_bytes(b"caf\xe9.png"));
    let others =
        [latin, place.join("line\nbreak"), place.join(".DS_Store"), installation.objects().join("t/deep")];
    for file in &others[..3] {
        std::fs::write(file, "theirs").unwrap();
    }
    std::fs::create_dir_all(others[3].join("a/b/c/d/e/f/g/h")).unwrap();
    std::os::unix::fs::symlink(installation.objects(), place.join("loop")).unwrap();
    std::os::unix::fs::symlink("nowhere", place.join("dangling")).unwrap();
    let done = installation.sweep(&["--remove", "--older-hours", "1"], &[]).await;
    assert!(done.status.success(), "{}", said(&done));
    installation.age_one(&lost);
    let done = installation.sweep(&["--remove"], &[]).await;
    let text = said(&done);
    assert!(done.status.success() && text.contains("1 removed"), "{text}");
    for name in ["caf", ".DS_Store", "line\\nbreak", "dangling"] {
        assert!(
            text.lines().any(|line| line.contains(name) && line.ends_with("left alone")),
            "{name}: {text}"
        );
    }
    assert!(others.iter().all(|file| file.exists()));
    assert_eq!(installation.n().await, 15);
    // Deleting the job is not stopped by them either.
    assert!(installation.store.delete(TENANT, job).await.unwrap());
    let left = hypnos::maintenance::Eraser::new(installation.store.clone(), installation.blobs.clone())
        .round()
        .await
        .unwrap();
    assert_eq!(left, None);
    assert_eq!(installation.n().await, 12);
    assert!(others.iter().all(|file| file.exists()));
}

impl Installation {
    fn age_one(&self, key: &Key) {
        let file = std::fs::File::options().write(true).open(self.objects().join(key.as_str())).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_hours(48)).unwrap();
    }
}
