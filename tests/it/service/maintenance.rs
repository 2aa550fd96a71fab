//! Erasure of deleted jobs when the object store fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Method;
use hypnos::blobs::{Blobs, BlobsConfig, Key, Name, Place, Scope};
use hypnos::job::{Checkpoint, Job, Kind};
use hypnos::maintenance::{self, Eraser};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::chaos::{Chaos, StoreFault, keys};
use super::s3::{Answer, Faulty};
use super::test_workers::{TENANT, TestWorkers, eventually};

const DAY: Duration = Duration::from_hours(24);

/// A [`TestWorkers`] whose objects are in a bucket that removes nothing of what `locked` chooses.
async fn workers_over(server: &Faulty, locked: impl Fn(&str) -> bool + Send + Sync + 'static) -> TestWorkers {
    let place = Place::Bucket(server.bucket());
    let blobs = Blobs::open(&BlobsConfig { place, links: None }).await.unwrap();
    server.has(move |request| {
        let is_bulk = request.method == Method::POST && request.uri.query() == Some("delete");
        let is_locked = request.method == Method::DELETE && locked(request.uri.path());
        (is_bulk || is_locked).then(|| Answer::refusal(403, "AccessDenied", ""))
    });
    let mut workers = TestWorkers::new().await;
    workers.blobs = blobs;
    workers
}

async fn deleted(workers: &TestWorkers, job: &Job) {
    assert!(workers.store.delete(TENANT, job.id).await.unwrap());
}

async fn n_objects(workers: &TestWorkers, job: &Job) -> usize {
    workers.blobs.list(&Scope::job(TENANT, job.id)).await.unwrap().len()
}

// case A12
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_erased_holds_up_no_other_and_is_counted() {
    let metrics = PrometheusBuilder::new().install_recorder().unwrap();
    let server = Faulty::start().await;
    // The oldest deleted job is the one with the locked object.
    let workers =
        workers_over(&server, |path| path.ends_with("/photos/1.png") && path.contains("test/pre")).await;
    let locked = workers.train("locked", 5).await;
    deleted(&workers, &locked).await;
    let mut eraser = Eraser::new(workers.store.clone(), workers.blobs.clone());
    let why = eraser.round().await.unwrap().expect("something stays behind");
    assert!(why.contains("403 AccessDenied") && why.contains(&locked.id.to_string()), "{why}");
    assert_eq!(n_objects(&workers, &locked).await, 1, "all but the locked one are gone");

    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(workers.train("other", 5).await);
    }
    // Of these nothing is locked.
    let id = locked.id.to_string();
    server.has(move |request| {
        let is_locked = request.uri.path().contains(&id);
        (request.method == Method::DELETE && is_locked).then(|| Answer::refusal(403, "AccessDenied", ""))
    });
    for other in &others {
        deleted(&workers, other).await;
    }
    server.asked();
    assert!(eraser.round().await.unwrap().is_some());
    for other in &others {
        assert_eq!(n_objects(&workers, other).await, 0);
    }
    assert_eq!(workers.store.erasable(None, 9).await.unwrap(), [(TENANT, locked.id)]);
    assert_eq!(workers.store.n_deleting().await.unwrap(), 1);
    let asked = server.asked();
    let again =
        asked.iter().filter(|asked| asked.contains(&locked.id.to_string()) && !asked.contains("list-type"));
    assert_eq!(again.count(), 0, "it waits for its next try: {asked:?}");
    let shown = metrics.render();
    assert!(
        shown.contains("hypnos_erased_total 3") && shown.contains("hypnos_erase_failures_total 1"),
        "{shown}"
    );

    // Once it can be removed, it goes.
    server.calm();
    assert_eq!(Eraser::new(workers.store.clone(), workers.blobs.clone()).round().await.unwrap(), None);
    assert_eq!(workers.store.n_deleting().await.unwrap(), 0);
    assert!(keys(&*server.store()).await.is_empty());
}

// case A12
#[tokio::test(flavor = "multi_thread")]
async fn more_jobs_that_cannot_be_erased_than_one_query_returns_hold_up_no_other() {
    let server = Faulty::start().await;
    let workers = workers_over(&server, |_| true).await;
    for _ in 0..120 {
        deleted(&workers, &workers.train("locked", 5).await).await;
    }
    let last = workers.train("last", 5).await;
    let id = last.id.to_string();
    server.has(move |request| {
        let may = request.method != Method::DELETE && request.method != Method::POST;
        (!may && !request.uri.path().contains(&id)).then(|| Answer::refusal(403, "AccessDenied", ""))
    });
    deleted(&workers, &last).await;
    let mut eraser = Eraser::new(workers.store.clone(), workers.blobs.clone());
    let why = eraser.round().await.unwrap().expect("most stay behind");
    assert!(why.starts_with("120 jobs or tenants cannot be erased"), "{why}");
    assert_eq!(n_objects(&workers, &last).await, 0);
    assert_eq!(workers.store.n_deleting().await.unwrap(), 120);
}

// case A12
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_deletes_is_erased_at_once_and_not_with_the_next_round() {
    let workers = TestWorkers::new().await;
    let jobs = [workers.train("mug", 5).await, workers.train("mug", 5).await];
    let stop = CancellationToken::new();
    let an_hour = Duration::from_hours(1);
    let maintaining =
        tokio::spawn(maintenance::run(workers.store.clone(), workers.blobs.clone(), an_hour, stop.clone()));
    for job in &jobs {
        tokio::time::sleep(Duration::from_millis(300)).await; // its first round is over
        deleted(&workers, job).await;
        eventually("its objects are gone", async || (n_objects(&workers, job).await == 0).then_some(()))
            .await;
        eventually("its row is gone", async || {
            (workers.store.n_deleting().await.unwrap() == 0).then_some(())
        })
        .await;
    }
    // One that runs goes when its worker has heard of it.
    let running = workers.train("mug", 5).await;
    let claimed = workers.store.claim(Uuid::now_v7(), &[Kind::Train], DAY, DAY).await.unwrap().unwrap();
    deleted(&workers, &running).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(n_objects(&workers, &running).await, 3, "its worker still reads them");
    workers.store.cancelled(claimed.lease()).await.unwrap();
    eventually("its objects are gone", async || (n_objects(&workers, &running).await == 0).then_some(()))
        .await;
    stop.cancel();
    maintaining.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unavailable_store_is_retried_and_a_panic_does_not_end_maintenance() {
    let workers = TestWorkers::new().await;
    let chaos = Chaos::over(Arc::new(workers.objects_store()));
    let blobs = Blobs::over(Arc::new(chaos.clone()));
    let job = workers.train("mug", 5).await;
    let stop = CancellationToken::new();
    let maintaining = tokio::spawn(maintenance::run(
        workers.store.clone(),
        blobs.clone(),
        Duration::from_millis(20),
        stop.clone(),
    ));
    chaos.inject_all(Some(StoreFault::Panics));
    deleted(&workers, &job).await;
    eventually("it was tried", async || (chaos.n_operations() > 3).then_some(())).await;
    assert_eq!(n_objects(&workers, &job).await, 3);
    chaos.inject_all(None);
    eventually("its objects are gone", async || (n_objects(&workers, &job).await == 0).then_some(())).await;
    // Unavailable altogether: no page is gone through to its end, and afterwards all goes.
    let mut jobs = Vec::new();
    for _ in 0..30 {
        jobs.push(workers.train("mug", 5).await);
    }
    stop.cancel();
    maintaining.await.unwrap();
    for job in &jobs {
        deleted(&workers, job).await;
    }
    chaos.inject_all(Some(StoreFault::FailsBefore));
    let mut eraser = Eraser::new(workers.store.clone(), blobs.clone());
    eraser.round().await.unwrap_err();
    chaos.inject_all(None);
    assert_eq!(Eraser::new(workers.store.clone(), blobs).round().await.unwrap(), None);
    assert_eq!(workers.store.n_deleting().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_obsolete_checkpoint_that_cannot_be_removed_holds_up_no_other() {
    let server = Faulty::start().await;
    let workers = workers_over(&server, |path| path.ends_with("checkpoint-1.safetensors")).await;
    let mut jobs = Vec::new();
    for step in [1, 2, 3] {
        let job = workers.train("mug", 5).await;
        let lease =
            workers.store.claim(Uuid::now_v7(), &[Kind::Train], DAY, DAY).await.unwrap().unwrap().lease();
        let key = Key::artifact(TENANT, lease, Name::Checkpoint(step));
        let object = workers.blobs.put(&key, "state").await.unwrap();
        workers.store.commit_checkpoint(lease, &Checkpoint { step, object }).await.unwrap();
        workers.store.cancel(TENANT, job.id).await.unwrap();
        workers.store.cancelled(lease).await.unwrap();
        jobs.push(job);
    }
    assert!(
        maintenance::remove_obsolete_checkpoints(&workers.store, &workers.blobs).await.is_err(),
        "one stays"
    );
    let left = workers.store.obsolete_checkpoints(None, 9).await.unwrap();
    assert_eq!(left.iter().map(|(job, _)| *job).collect::<Vec<_>>(), [jobs[0].id]);
    let why = Eraser::new(workers.store.clone(), workers.blobs.clone()).round().await.unwrap().unwrap();
    assert!(why.contains(&jobs[0].id.to_string()), "{why}");
}

/// Not a measurement: that deletions go many at a time. The benchmark `service` measures.
#[tokio::test(flavor = "multi_thread")]
async fn many_deleted_jobs_are_erased_in_one_round() {
    let workers = TestWorkers::new().await;
    let mut jobs = Vec::new();
    for _ in 0..150 {
        jobs.push(workers.train("mug", 5).await);
    }
    for job in &jobs {
        deleted(&workers, job).await;
    }
    let began = Instant::now();
    assert_eq!(Eraser::new(workers.store.clone(), workers.blobs.clone()).round().await.unwrap(), None);
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(workers.store.n_deleting().await.unwrap(), 0);
    assert!(keys(&workers.objects_store()).await.is_empty());
}
