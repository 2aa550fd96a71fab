//! What becomes of deleted jobs, whatever the object store does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Method;
use hypnos::blobs::{Blobs, BlobsConfig, Key, Name, Place, Scope};
use hypnos::janitor::{self, Eraser};
use hypnos::job::{Checkpoint, Job, Kind};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::chaos::{Chaos, What, keys};
use super::floor::{Floor, TENANT, eventually};
use super::s3::{Answer, Faulty};

const DAY: Duration = Duration::from_hours(24);

/// A floor whose objects are in a bucket that removes nothing of what `locked` chooses.
async fn floor_over(server: &Faulty, locked: impl Fn(&str) -> bool + Send + Sync + 'static) -> Floor {
    let place = Place::Bucket(server.bucket());
    let blobs = Blobs::open(&BlobsConfig { place, links: None }).await.unwrap();
    server.has(move |request| {
        let is_bulk = request.method == Method::POST && request.uri.query() == Some("delete");
        let is_locked = request.method == Method::DELETE && locked(request.uri.path());
        (is_bulk || is_locked).then(|| Answer::refusal(403, "AccessDenied", ""))
    });
    let mut floor = Floor::new().await;
    floor.blobs = blobs;
    floor
}

async fn deleted(floor: &Floor, job: &Job) {
    assert!(floor.store.delete(TENANT, job.id).await.unwrap());
}

async fn n_objects(floor: &Floor, job: &Job) -> usize {
    floor.blobs.list(&Scope::job(TENANT, job.id)).await.unwrap().len()
}

// attack 12
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_erased_holds_up_no_other_and_is_counted() {
    let figures = PrometheusBuilder::new().install_recorder().unwrap();
    let server = Faulty::start().await;
    // The oldest deleted job is the one with the locked object.
    let floor =
        floor_over(&server, |path| path.ends_with("/photos/1.png") && path.contains("test/pre")).await;
    let locked = floor.train("locked", 5).await;
    deleted(&floor, &locked).await;
    let mut eraser = Eraser::new(floor.store.clone(), floor.blobs.clone());
    let why = eraser.round().await.unwrap().expect("something stays behind");
    assert!(why.contains("403 AccessDenied") && why.contains(&locked.id.to_string()), "{why}");
    assert_eq!(n_objects(&floor, &locked).await, 1, "all but the locked one are gone");

    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(floor.train("other", 5).await);
    }
    // Of these nothing is locked.
    let id = locked.id.to_string();
    server.has(move |request| {
        let is_locked = request.uri.path().contains(&id);
        (request.method == Method::DELETE && is_locked).then(|| Answer::refusal(403, "AccessDenied", ""))
    });
    for other in &others {
        deleted(&floor, other).await;
    }
    server.asked();
    assert!(eraser.round().await.unwrap().is_some());
    for other in &others {
        assert_eq!(n_objects(&floor, other).await, 0);
    }
    assert_eq!(floor.store.erasable(None, 9).await.unwrap(), [(TENANT, locked.id)]);
    assert_eq!(floor.store.n_deleting().await.unwrap(), 1);
    let asked = server.asked();
    let again =
        asked.iter().filter(|asked| asked.contains(&locked.id.to_string()) && !asked.contains("list-type"));
    assert_eq!(again.count(), 0, "it waits for its next try: {asked:?}");
    let shown = figures.render();
    assert!(
        shown.contains("hypnos_erased_total 3") && shown.contains("hypnos_erase_failures_total 1"),
        "{shown}"
    );

    // Once it can be removed, it goes.
    server.calm();
    assert_eq!(Eraser::new(floor.store.clone(), floor.blobs.clone()).round().await.unwrap(), None);
    assert_eq!(floor.store.n_deleting().await.unwrap(), 0);
    assert!(keys(&*server.store()).await.is_empty());
}

// attack 12
#[tokio::test(flavor = "multi_thread")]
async fn more_jobs_that_cannot_be_erased_than_one_look_shows_hold_up_none() {
    let server = Faulty::start().await;
    let floor = floor_over(&server, |_| true).await;
    for _ in 0..120 {
        deleted(&floor, &floor.train("locked", 5).await).await;
    }
    let last = floor.train("last", 5).await;
    let id = last.id.to_string();
    server.has(move |request| {
        let may = request.method != Method::DELETE && request.method != Method::POST;
        (!may && !request.uri.path().contains(&id)).then(|| Answer::refusal(403, "AccessDenied", ""))
    });
    deleted(&floor, &last).await;
    let mut eraser = Eraser::new(floor.store.clone(), floor.blobs.clone());
    let why = eraser.round().await.unwrap().expect("most stay behind");
    assert!(why.starts_with("120 jobs or tenants cannot be erased"), "{why}");
    assert_eq!(n_objects(&floor, &last).await, 0);
    assert_eq!(floor.store.n_deleting().await.unwrap(), 120);
}

// attack 12
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_deletes_is_erased_at_once_and_not_with_the_next_round() {
    let floor = Floor::new().await;
    let jobs = [floor.train("mug", 5).await, floor.train("mug", 5).await];
    let stop = CancellationToken::new();
    let an_hour = Duration::from_hours(1);
    let tidying = tokio::spawn(janitor::run(floor.store.clone(), floor.blobs.clone(), an_hour, stop.clone()));
    for job in &jobs {
        tokio::time::sleep(Duration::from_millis(300)).await; // its first round is over
        deleted(&floor, job).await;
        eventually("its objects are gone", async || (n_objects(&floor, job).await == 0).then_some(())).await;
        eventually("its row is gone", async || (floor.store.n_deleting().await.unwrap() == 0).then_some(()))
            .await;
    }
    // One that runs goes when its worker has heard of it.
    let running = floor.train("mug", 5).await;
    let claimed = floor.store.claim(Uuid::now_v7(), &[Kind::Train], DAY, DAY).await.unwrap().unwrap();
    deleted(&floor, &running).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(n_objects(&floor, &running).await, 3, "its worker still reads them");
    floor.store.cancelled(claimed.lease()).await.unwrap();
    eventually("its objects are gone", async || (n_objects(&floor, &running).await == 0).then_some(())).await;
    stop.cancel();
    tidying.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_tried_again_and_a_panic_ends_nothing() {
    let floor = Floor::new().await;
    let chaos = Chaos::over(Arc::new(floor.objects_store()));
    let blobs = Blobs::over(Arc::new(chaos.clone()));
    let job = floor.train("mug", 5).await;
    let stop = CancellationToken::new();
    let tidying = tokio::spawn(janitor::run(
        floor.store.clone(),
        blobs.clone(),
        Duration::from_millis(20),
        stop.clone(),
    ));
    chaos.strike_all(Some(What::Panics));
    deleted(&floor, &job).await;
    eventually("it was tried", async || (chaos.n_operations() > 3).then_some(())).await;
    assert_eq!(n_objects(&floor, &job).await, 3);
    chaos.strike_all(None);
    eventually("its objects are gone", async || (n_objects(&floor, &job).await == 0).then_some(())).await;
    // Away altogether: no page is gone through to its end, and afterwards all goes.
    let mut jobs = Vec::new();
    for _ in 0..30 {
        jobs.push(floor.train("mug", 5).await);
    }
    stop.cancel();
    tidying.await.unwrap();
    for job in &jobs {
        deleted(&floor, job).await;
    }
    chaos.strike_all(Some(What::FailsBefore));
    let mut eraser = Eraser::new(floor.store.clone(), blobs.clone());
    eraser.round().await.unwrap_err();
    chaos.strike_all(None);
    assert_eq!(Eraser::new(floor.store.clone(), blobs).round().await.unwrap(), None);
    assert_eq!(floor.store.n_deleting().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spent_checkpoint_that_cannot_be_removed_holds_up_no_other() {
    let server = Faulty::start().await;
    let floor = floor_over(&server, |path| path.ends_with("checkpoint-1.safetensors")).await;
    let mut jobs = Vec::new();
    for step in [1, 2, 3] {
        let job = floor.train("mug", 5).await;
        let lease =
            floor.store.claim(Uuid::now_v7(), &[Kind::Train], DAY, DAY).await.unwrap().unwrap().lease();
        let key = Key::artifact(TENANT, lease, Name::Checkpoint(step));
        let object = floor.blobs.put(&key, "state").await.unwrap();
        floor.store.commit_checkpoint(lease, &Checkpoint { step, object }).await.unwrap();
        floor.store.cancel(TENANT, job.id).await.unwrap();
        floor.store.cancelled(lease).await.unwrap();
        jobs.push(job);
    }
    assert!(janitor::remove_spent_checkpoints(&floor.store, &floor.blobs).await.is_err(), "one stays");
    let left = floor.store.spent_checkpoints(None, 9).await.unwrap();
    assert_eq!(left.iter().map(|(job, _)| *job).collect::<Vec<_>>(), [jobs[0].id]);
    let why = Eraser::new(floor.store.clone(), floor.blobs.clone()).round().await.unwrap().unwrap();
    assert!(why.contains(&jobs[0].id.to_string()), "{why}");
}

/// Not a measurement: that deletions go many at a time. `hypnos bench-serve` measures.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_deletions_take_no_hundred_rounds() {
    let floor = Floor::new().await;
    let mut jobs = Vec::new();
    for _ in 0..150 {
        jobs.push(floor.train("mug", 5).await);
    }
    for job in &jobs {
        deleted(&floor, job).await;
    }
    let began = Instant::now();
    assert_eq!(Eraser::new(floor.store.clone(), floor.blobs.clone()).round().await.unwrap(), None);
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(floor.store.n_deleting().await.unwrap(), 0);
    assert!(keys(&floor.objects_store()).await.is_empty());
}
