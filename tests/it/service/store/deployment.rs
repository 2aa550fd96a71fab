//! Pairing of databases with object stores, and what a sweep finds.

use std::collections::HashSet;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use hypnos::blobs::{Blobs, BlobsConfig, Key, Name, Place, Scope};
use hypnos::deployment::{self, Error as DeploymentError};
use hypnos::job::Format;
use hypnos::store::{Commit, Delivery, FaultInjector, Guard, Statement};
use hypnos::sweep::{self, Doubt};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::*;

on_each! {
    a_fresh_pair_is_marked_at_once,
    two_starts_at_once_mark_one_deployment,
    a_process_that_starts_while_another_pairs_and_accepts_a_job_starts_too,
    rows_whose_objects_are_in_the_store_are_evidence,
    rows_whose_objects_are_not_in_the_store_are_none,
    an_empty_database_beside_a_full_store_is_refused_and_nothing_is_removed,
    two_deployments_do_not_go_together,
    a_store_that_lost_its_marker_gets_it_again_where_rows_are_found,
    an_invalid_marker_is_refused,
    what_is_replaced_must_be_named,
    a_restored_backup_is_recognised_and_its_sweep_needs_a_confirmation,
    a_backup_from_before_markers_is_recognised_too,
    a_wrong_database_is_suspected_where_most_objects_would_go,
    orphans_are_exactly_the_objects_that_no_row_names,
    an_object_that_a_row_names_meanwhile_is_kept,
    an_older_deployment_keeps_working,
}

/// A directory of objects, and what is in it behind our back.
struct Objects {
    blobs: Blobs,
    dir: tempfile::TempDir,
}

impl Objects {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::Directory(dir.path().into());
        let blobs = Blobs::open(&BlobsConfig { place, links: None }).await.unwrap();
        Self { blobs, dir }
    }

    fn marker(&self) -> PathBuf {
        self.dir.path().join("deployment.json")
    }

    async fn n(&self) -> usize {
        self.blobs.list(&Scope::all()).await.unwrap().len()
    }
}

/// A training with its photos in the store.
async fn with_photos(db: &TestDatabase, objects: &Objects, tenant: TenantId) -> Job {
    let mut new = training(tenant);
    new.photos.clear();
    for n in 0..3 {
        let key = Key::photo(tenant, new.id, n);
        new.photos.push(objects.blobs.put(&key, format!("photo {n}")).await.unwrap());
    }
    db.accept(new).await
}

fn soon() -> Timestamp {
    Timestamp::now() + Duration::from_hours(1)
}

fn is_apart(outcome: Result<hypnos::store::Deployment, DeploymentError>) -> String {
    match outcome {
        Err(DeploymentError::Mismatch(line)) => {
            assert!(!line.contains('\n'), "{line}");
            line
        }
        other => panic!("{other:?}"),
    }
}

async fn a_fresh_pair_is_marked_at_once(db: TestDatabase) {
    let objects = Objects::new().await;
    let line = is_apart(deployment::check(&db.store, &objects.blobs).await);
    assert!(line.contains("neither the database nor the object store"), "{line}");
    let paired = deployment::pair(&db.store, &objects.blobs).await.unwrap();
    assert_eq!(db.store.deployment().await.unwrap(), Some(paired));
    let marker = std::fs::read_to_string(objects.marker()).unwrap();
    assert!(marker.contains(&paired.id.to_string()), "{marker}");
    assert_eq!(deployment::pair(&db.store, &objects.blobs).await.unwrap(), paired, "and stays");
    assert_eq!(deployment::check(&db.store, &objects.blobs).await.unwrap(), paired);
    assert_eq!(objects.n().await, 0, "the marker is no object of a job");
}

async fn two_starts_at_once_mark_one_deployment(db: TestDatabase) {
    let objects = Arc::new(Objects::new().await);
    let mut starts = JoinSet::new();
    for _ in 0..8 {
        let (store, objects) = (db.another().await, objects.clone());
        starts.spawn(async move { deployment::pair(&store, &objects.blobs).await.unwrap().id });
    }
    let ids: HashSet<Uuid> = starts.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 1);
    deployment::check(&db.store, &objects.blobs).await.unwrap();
}

/// Holds the `n`th read until it is told to go on.
#[derive(Debug)]
struct Holds {
    n: AtomicUsize,
    has_come: Notify,
    goes_on: Notify,
}

impl FaultInjector for Holds {
    fn before(&self, statement: Statement) -> BoxFuture<'_, (Delivery, Guard)> {
        Box::pin(async move {
            if statement == Statement::Read && self.n.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.has_come.notify_one();
                self.goes_on.notified().await;
            }
            (Delivery::Answered, Box::new(()) as Guard)
        })
    }

    fn begun(&self) -> Guard {
        Box::new(())
    }

    fn later(&self, _: Commit) -> BoxFuture<'_, Infallible> {
        unreachable!("no commit of it is late")
    }
}

async fn a_process_that_starts_while_another_pairs_and_accepts_a_job_starts_too(db: TestDatabase) {
    let objects = Objects::new().await;
    let tenant = db.tenant("a").await;
    // It asks for the marker, for photos of the oldest and of the newest trainings, and for class images.
    let holds = Arc::new(Holds { n: 4.into(), has_come: Notify::new(), goes_on: Notify::new() });
    let slow = db.store.with_faults(holds.clone());
    let other = async {
        holds.has_come.notified().await;
        let first = deployment::pair(&db.store, &objects.blobs).await.unwrap();
        with_photos(&db, &objects, tenant).await;
        holds.goes_on.notify_one();
        first
    };
    let (second, first) = tokio::join!(deployment::pair(&slow, &objects.blobs), other);
    assert_eq!(second.unwrap().id, first.id);
}

async fn rows_whose_objects_are_in_the_store_are_evidence(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    let mut jobs = Vec::new();
    for _ in 0..5 {
        jobs.push(with_photos(&db, &objects, tenant).await);
    }
    // Two of five are gone, as things go in years; a deleted job's may be.
    objects.blobs.delete_all(&Scope::job(tenant, jobs[0].id)).await.unwrap();
    objects.blobs.delete_all(&Scope::job(tenant, jobs[1].id)).await.unwrap();
    let gone = with_photos(&db, &objects, tenant).await;
    assert!(db.store.delete(tenant, gone.id).await.unwrap());
    objects.blobs.delete_all(&Scope::job(tenant, gone.id)).await.unwrap();
    deployment::pair(&db.store, &objects.blobs).await.unwrap();
    deployment::check(&db.store, &objects.blobs).await.unwrap();
}

async fn rows_whose_objects_are_not_in_the_store_are_none(db: TestDatabase) {
    let (objects, elsewhere, tenant) = (Objects::new().await, Objects::new().await, db.tenant("shop").await);
    for _ in 0..3 {
        with_photos(&db, &elsewhere, tenant).await;
    }
    let line = is_apart(deployment::pair(&db.store, &objects.blobs).await);
    assert!(line.contains("of 3 objects that the database names, 0 are in the object store"), "{line}");
    // One of three is not enough.
    with_photos(&db, &objects, tenant).await;
    is_apart(deployment::pair(&db.store, &objects.blobs).await);
    assert!(!objects.marker().exists() && db.store.deployment().await.unwrap().is_none());
    deployment::pair(&db.store, &elsewhere.blobs).await.unwrap();
}

// case A2
async fn an_empty_database_beside_a_full_store_is_refused_and_nothing_is_removed(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    for _ in 0..3 {
        with_photos(&db, &objects, tenant).await;
    }
    // Before there were markers, and after.
    for paired in [false, true] {
        if paired {
            deployment::pair(&db.store, &objects.blobs).await.unwrap();
        }
        let empty = TestDatabase::sqlite().await;
        let line = is_apart(deployment::pair(&empty.store, &objects.blobs).await);
        assert!(line.contains("the database names none"), "{line}");
        let swept = sweep::find(&empty.store, &objects.blobs, soon()).await;
        assert!(matches!(swept, Err(sweep::Error::Deployment(DeploymentError::Mismatch(_)))), "{swept:?}");
        assert_eq!(empty.store.deployment().await.unwrap(), None);
    }
    assert_eq!(objects.n().await, 9);
}

async fn two_deployments_do_not_go_together(db: TestDatabase) {
    let (objects, theirs) = (Objects::new().await, Objects::new().await);
    let other = TestDatabase::sqlite().await;
    let ours = deployment::pair(&db.store, &objects.blobs).await.unwrap();
    let other = deployment::pair(&other.store, &theirs.blobs).await.unwrap();
    for outcome in
        [deployment::pair(&db.store, &theirs.blobs).await, deployment::check(&db.store, &theirs.blobs).await]
    {
        let line = is_apart(outcome);
        assert!(line.contains(&ours.id.to_string()) && line.contains(&other.id.to_string()), "{line}");
    }
    let swept = sweep::find(&db.store, &theirs.blobs, soon()).await;
    assert!(matches!(swept, Err(sweep::Error::Deployment(DeploymentError::Mismatch(_)))), "{swept:?}");
    is_apart(deployment::mark(&db.store, &theirs.blobs, true).await.map(|()| ours));
    assert!(std::fs::read_to_string(theirs.marker()).unwrap().contains(&other.id.to_string()));
}

async fn a_store_that_lost_its_marker_gets_it_again_where_rows_are_found(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    let paired = deployment::pair(&db.store, &objects.blobs).await.unwrap();
    let job = with_photos(&db, &objects, tenant).await;
    std::fs::remove_file(objects.marker()).unwrap();
    let line = is_apart(deployment::check(&db.store, &objects.blobs).await);
    assert!(line.contains("the object store does not record"), "{line}");
    let again = deployment::pair(&db.store, &objects.blobs).await.unwrap();
    assert_eq!(again.id, paired.id);
    deployment::check(&db.store, &objects.blobs).await.unwrap();
    // Another bucket, a wrong prefix: nothing of the rows is there.
    std::fs::remove_file(objects.marker()).unwrap();
    objects.blobs.delete_all(&Scope::job(tenant, job.id)).await.unwrap();
    is_apart(deployment::pair(&db.store, &objects.blobs).await);
}

async fn an_invalid_marker_is_refused(db: TestDatabase) {
    let objects = Objects::new().await;
    for text in ["", "{}", "{\"deployment\": 5, \"seen_ms\": 1}", "\u{0}\u{1}"] {
        std::fs::write(objects.marker(), text).unwrap();
        let line = is_apart(deployment::pair(&db.store, &objects.blobs).await);
        assert!(line.contains("deployment.json"), "{line}");
    }
}

async fn what_is_replaced_must_be_named(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    let elsewhere = Objects::new().await;
    with_photos(&db, &elsewhere, tenant).await; // so that nothing shows that the two belong together
    is_apart(deployment::pair(&db.store, &objects.blobs).await);
    let line = is_apart(deployment::replace(&db.store, &objects.blobs, "x").await);
    assert!(line.contains("marker is none, not x"), "{line}");
    let first = deployment::replace(&db.store, &objects.blobs, "none").await.unwrap();
    assert_eq!(deployment::check(&db.store, &objects.blobs).await.unwrap().id, first.id);
    let line = is_apart(deployment::replace(&db.store, &objects.blobs, "none").await);
    assert!(line.contains(&first.id.to_string()), "{line}");
    // A copy of both becomes a deployment of its own.
    let copy = deployment::replace(&db.store, &objects.blobs, &first.id.to_string()).await.unwrap();
    assert_ne!(copy.id, first.id);
    // A database that is marked keeps its own.
    let other = TestDatabase::sqlite().await;
    let theirs = Objects::new().await;
    let other = deployment::pair(&other.store, &theirs.blobs).await.unwrap();
    let kept = deployment::replace(&db.store, &theirs.blobs, &other.id.to_string()).await.unwrap();
    assert_eq!(kept.id, copy.id);
}

/// What a dump of now would bring back: rows that are younger go, and the mark is that of the dump.
struct Dump {
    seen_ms: i64,
    newest: JobId,
}

impl Dump {
    async fn of(db: &TestDatabase) -> Self {
        let seen_ms = db.store.deployment().await.unwrap().map_or(0, |own| own.seen_ms);
        Self { seen_ms, newest: db.store.newest_job().await.unwrap().unwrap() }
    }

    async fn restore(&self, db: &TestDatabase) {
        db.sql(&format!("update deployment set seen_ms = {}", self.seen_ms)).await;
        db.sql(&format!("delete from job where id > '{}'", self.newest)).await;
    }
}

async fn a_restored_backup_is_recognised_and_its_sweep_needs_a_confirmation(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    for _ in 0..4 {
        with_photos(&db, &objects, tenant).await;
    }
    deployment::pair(&db.store, &objects.blobs).await.unwrap();
    let dump = Dump::of(&db).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let lost = with_photos(&db, &objects, tenant).await;
    deployment::mark(&db.store, &objects.blobs, true).await.unwrap();
    dump.restore(&db).await;
    assert!(db.train(tenant, lost.id).await.is_none());

    // Known before any program has started on it, and after.
    let checked = deployment::check(&db.store, &objects.blobs).await.unwrap();
    assert_eq!(checked.restored.unwrap().0, dump.seen_ms);
    let paired = deployment::pair(&db.store, &objects.blobs).await.unwrap();
    let noted = db.store.deployment().await.unwrap().unwrap();
    assert_eq!((noted.id, noted.restored.unwrap().0), (paired.id, dump.seen_ms));
    // And still when the service has gone on for long: its rows are newer than the orphans.
    tokio::time::sleep(Duration::from_millis(20)).await;
    for _ in 0..4 {
        with_photos(&db, &objects, tenant).await;
    }
    deployment::mark(&db.store, &objects.blobs, true).await.unwrap();
    deployment::pair(&db.store, &objects.blobs).await.unwrap();
    let found = sweep::find(&db.store, &objects.blobs, soon()).await.unwrap();
    assert_eq!(found.orphans.len(), 3);
    assert!(found.orphans.iter().all(|orphan| orphan.key.owner().unwrap().1 == lost.id));
    assert_eq!(found.doubts, [Doubt::NewerThanRows(3)]);
    // Settled once what was lost is removed, and not by a sweep that left the youngest alone.
    sweep::clear_restored(&db.store, Timestamp::now() - Duration::from_hours(1)).await.unwrap();
    assert!(db.store.deployment().await.unwrap().unwrap().restored.is_some());
    let removed = sweep::remove(&db.store, &objects.blobs, &found.orphans).await.unwrap();
    assert_eq!((removed.n_removed, removed.n_kept), (3, 0));
    sweep::clear_restored(&db.store, soon()).await.unwrap();
    assert_eq!(db.store.deployment().await.unwrap().unwrap().restored, None);
    let found = sweep::find(&db.store, &objects.blobs, soon()).await.unwrap();
    assert_eq!((found.orphans.len(), found.doubts.len(), found.n_objects), (0, 0, 24));
}

async fn a_backup_from_before_markers_is_recognised_too(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    for _ in 0..3 {
        with_photos(&db, &objects, tenant).await;
    }
    let dump = Dump::of(&db).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let paired = deployment::pair(&db.store, &objects.blobs).await.unwrap();
    with_photos(&db, &objects, tenant).await;
    db.sql("delete from deployment").await;
    dump.restore(&db).await;
    let again = deployment::pair(&db.store, &objects.blobs).await.unwrap();
    assert_eq!(again.id, paired.id, "the object store knows");
    assert!(again.restored.is_some());
    with_photos(&db, &objects, tenant).await;
    let found = sweep::find(&db.store, &objects.blobs, soon()).await.unwrap();
    assert_eq!(found.doubts, [Doubt::NewerThanRows(3)]);
}

async fn a_wrong_database_is_suspected_where_most_objects_would_go(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    deployment::pair(&db.store, &objects.blobs).await.unwrap();
    let mut jobs = Vec::new();
    for _ in 0..5 {
        jobs.push(with_photos(&db, &objects, tenant).await);
    }
    for (n, doubts) in [(1, vec![]), (2, vec![]), (3, vec![Doubt::MostObjects])] {
        db.sql(&format!("delete from job where id = '{}'", jobs[n].id)).await;
        let found = sweep::find(&db.store, &objects.blobs, soon()).await.unwrap();
        assert_eq!((found.orphans.len(), found.n_objects), (3 * n, 15));
        assert_eq!(found.doubts, doubts, "{n} of 5");
    }
    // Of a job that is younger than every row.
    db.sql(&format!("delete from job where id = '{}'", jobs[4].id)).await;
    let found = sweep::find(&db.store, &objects.blobs, soon()).await.unwrap();
    assert_eq!(found.doubts, [Doubt::MostObjects, Doubt::NewerThanRows(12)]);
}

// case 54, 55: what a sweep may take
async fn orphans_are_exactly_the_objects_that_no_row_names(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    let put = async |key: &Key| objects.blobs.put(key, "x").await.unwrap();
    let other = db.tenant("other").await;
    deployment::pair(&db.store, &objects.blobs).await.unwrap();
    let mut kept: HashSet<String> = HashSet::new();
    let mut orphaned: Vec<Key> = Vec::new();

    // A claim that shows one thing and lost another; a checkpoint; a photo too many.
    let job = with_photos(&db, &objects, tenant).await;
    kept.extend(job.photos.iter().map(|photo| photo.key.clone()));
    let first = db.claim().await.unwrap().lease();
    let preview = put(&Key::artifact(tenant, first, Name::Preview(3, Format::Png))).await;
    db.store.add_artifact(first, &preview).await.unwrap();
    orphaned.push(Key::artifact(tenant, first, Name::Weights));
    let object = put(&Key::artifact(tenant, first, Name::Checkpoint(5))).await;
    db.store.commit_checkpoint(first, &Checkpoint { step: 5, object: object.clone() }).await.unwrap();
    kept.extend([preview.key, object.key]);
    db.store.release(first).await.unwrap();
    orphaned.push(Key::photo(tenant, job.id, 3));
    // One under way: it may name anything yet.
    let running = db.claim().await.unwrap().lease();
    kept.insert(put(&Key::artifact(tenant, running, Name::Weights)).await.key);
    // A claim that never was, another tenant's, a job that never was.
    orphaned.push(Key::artifact(tenant, Lease { run_lease: 7, ..running }, Name::Weights));
    orphaned.push(Key::photo(other, job.id, 0));
    orphaned.push(Key::photo(tenant, "01000000-0000-7000-8000-000000000000".parse().unwrap(), 0));
    // A deleted job is somebody else's business.
    let deleted = with_photos(&db, &objects, tenant).await;
    assert!(db.store.delete(tenant, deleted.id).await.unwrap());
    kept.extend(deleted.photos.iter().map(|photo| photo.key.clone()));
    // Class images: one that a row names, one of earlier versions, the loser of a race.
    let class = put(&Key::class_image(tenant, "abc", 1, running)).await;
    db.store.add_class_image(tenant, "abc", 1, &class, None).await.unwrap();
    let older = put(&Key::parse(&format!("t/{tenant}/class/abc/2.png")).unwrap()).await;
    db.store.add_class_image(tenant, "abc", 2, &older, None).await.unwrap();
    kept.extend([class.key, older.key]);
    orphaned.push(Key::class_image(tenant, "abc", 1, first));
    orphaned.push(Key::class_image(other, "abc", 1, first));
    for key in &orphaned {
        put(key).await;
    }
    // What others put there.
    let foreign = [format!("t/{tenant}/j/{}/photos/readme.txt", job.id), format!("t/{tenant}/x y/ü.bin")];
    for key in &foreign {
        let path = objects.dir.path().join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "x").unwrap();
    }

    let found = sweep::find(&db.store, &objects.blobs, soon()).await.unwrap();
    orphaned.sort();
    assert_eq!(found.orphans.iter().map(|orphan| orphan.key.clone()).collect::<Vec<_>>(), orphaned);
    assert_eq!(found.n_objects, kept.len() + orphaned.len());
    let mut wanted: Vec<String> = foreign.to_vec();
    wanted.sort();
    assert_eq!(found.foreign, wanted);
    let young = Timestamp::now() - Duration::from_hours(1);
    assert_eq!(sweep::find(&db.store, &objects.blobs, young).await.unwrap().orphans, []);

    let removed = sweep::remove(&db.store, &objects.blobs, &found.orphans).await.unwrap();
    assert_eq!((removed.n_removed, removed.n_kept, removed.failed), (orphaned.len(), 0, vec![]));
    let left = objects.blobs.list(&Scope::all()).await.unwrap();
    assert_eq!(left.into_iter().map(|entry| entry.key.to_string()).collect::<HashSet<_>>(), kept);
    for key in &foreign {
        assert!(objects.dir.path().join(key).exists(), "{key}");
    }
}

async fn an_object_that_a_row_names_meanwhile_is_kept(db: TestDatabase) {
    let (objects, tenant) = (Objects::new().await, db.tenant("shop").await);
    deployment::pair(&db.store, &objects.blobs).await.unwrap();
    with_photos(&db, &objects, tenant).await;
    let lease = db.claim().await.unwrap().lease();
    let late = objects.blobs.put(&Key::artifact(tenant, lease, Name::Report), "x").await.unwrap();
    let gone = objects.blobs.put(&Key::artifact(tenant, lease, Name::Page), "x").await.unwrap();
    // A list that was made from nothing: every object an orphan.
    let all = objects.blobs.list(&Scope::all()).await.unwrap();
    db.store.finish(lease, &json!({}), &[late]).await.unwrap();
    let removed = sweep::remove(&db.store, &objects.blobs, &all).await.unwrap();
    assert_eq!((removed.n_removed, removed.n_kept), (1, 4));
    let left = objects.blobs.list(&Scope::all()).await.unwrap();
    assert!(left.iter().all(|entry| entry.key.as_str() != gone.key));
}

/// A copy is one moment of a database that is written to meanwhile, and opens as a database.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_sqlite_is_whole_while_others_write() {
    let db = TestDatabase::sqlite().await;
    let tenant = db.tenant("shop").await;
    let writing = tokio::spawn({
        let store = db.store.clone();
        async move {
            loop {
                store.submit(training(tenant)).await.unwrap();
            }
        }
    });
    while db.store.list(tenant, &hypnos::store::Filter::default(), None, 200).await.unwrap().len() < 100 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("copy 'of'.db");
    db.store.copy_to(&file).await.unwrap();
    let again = db.store.copy_to(&file).await;
    assert!(again.is_err(), "it never writes over a file");
    writing.abort();
    let copy = TestDatabase::at(format!("sqlite:{}", file.display())).await;
    assert!(
        copy.store.list(tenant, &hypnos::store::Filter::default(), None, 200).await.unwrap().len() >= 100
    );
    copy.accept(training(tenant)).await;
    let postgres = TestDatabase::postgres().await;
    let refused = postgres.store.copy_to(&dir.path().join("x")).await;
    assert!(matches!(refused, Err(hypnos::store::Error::InvalidSettings(_))), "{refused:?}");
}

/// Rows and objects of the first version are marked, read and swept as if they had been written today.
async fn an_older_deployment_keeps_working(db: TestDatabase) {
    db.back_to_the_first_schema().await;
    let objects = Objects::new().await;
    let (tenant, id) = (TenantId::LOCAL, JobId::new());
    let photo = objects.blobs.put(&Key::photo(tenant, id, 0), "photo").await.unwrap();
    let lease = Lease { job: id, run_lease: 1 };
    let weights = objects.blobs.put(&Key::artifact(tenant, lease, Name::Weights), "weights").await.unwrap();
    let class = Key::parse(&format!("t/{tenant}/class/abc/3.png")).unwrap();
    let class = objects.blobs.put(&class, "class image").await.unwrap();
    let orphan = Key::artifact(tenant, Lease { run_lease: 2, ..lease }, Name::Weights);
    objects.blobs.put(&orphan, "lost").await.unwrap();
    let photos = serde_json::to_string(&[&photo]).unwrap();
    let spec = serde_json::to_string(&training(tenant).spec).unwrap();
    db
        .sql(&format!(
            "insert into job (id, tenant, kind, class_name, spec, photos, priority, state, run_lease, attempt, max_attempts,
                not_before_ms, result, created_ms, started_ms, finished_ms)
             values ('{id}', '{tenant}', 'train', 'mug', '{spec}', '{photos}', 0, 'succeeded', 1, 1, 3, 1, '{{}}', 1, 2, 3);
             insert into artifact (job, name, key, size, sha256, content_type, meta) values
                ('{id}', 'weights.safetensors', '{}', {}, '{}', 'application/octet-stream', 'null');
             insert into class_image (tenant, settings, seed, name, key, size, sha256, content_type, meta) values
                ('{tenant}', 'abc', 3, '3.png', '{}', {}, '{}', 'image/png', 'null');",
            weights.key, weights.size, weights.sha256, class.key, class.size, class.sha256
        ))
        .await;
    assert!(matches!(db.store.check_schema().await, Err(hypnos::store::Error::Schema(_))));
    db.store.migrate().await.unwrap();
    db.store.check_schema().await.unwrap();

    deployment::pair(&db.store, &objects.blobs).await.unwrap();
    let job = db.train(tenant, id).await.unwrap();
    assert_eq!((job.state, job.photos), (hypnos::job::State::Succeeded, vec![photo]));
    assert_eq!(db.store.artifacts(tenant, id).await.unwrap(), std::slice::from_ref(&weights));
    assert_eq!(db.store.class_images(tenant, "abc").await.unwrap(), [(3, class.clone())]);
    let hashes = [weights.sha256.clone(), "00".repeat(32)];
    assert_eq!(db.store.weights_in_use(&hashes).await.unwrap(), HashSet::from([weights.sha256]));
    let found = sweep::find(&db.store, &objects.blobs, soon()).await.unwrap();
    assert_eq!(found.orphans.into_iter().map(|orphan| orphan.key).collect::<Vec<_>>(), [orphan]);
    assert_eq!(found.doubts, []);
}
