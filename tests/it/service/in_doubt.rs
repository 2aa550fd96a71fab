//! Commits whose answer is lost or late, at the HTTP server and at a worker: nothing that a row may name is erased.

use std::sync::Arc;
use std::time::Duration;

use hypnos::blobs::{Blobs, Scope};
use hypnos::job::{Job, Kind, REPORT, State, WEIGHTS};
use hypnos::maintenance;
use reqwest::Response;
use reqwest::multipart::Form;
use sqlx::{Connection, PgConnection};

use super::chaos::{Chaos, StoreFault};
use super::disk::Disk;
use super::postgres::{Postgres, socket_of};
use super::scripted::{Script, expected_weights};
use super::test_app::{AppConfig, TestApp, form, problem};
use super::test_workers::{TENANT, TestWorkers, eventually, is};
use super::wire::{Loss, Wire};

const QUICK: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_millis(20);

async fn post(app: &TestApp, form: Form) -> Response {
    let request = app.ask(reqwest::Method::POST, "/v1/jobs").header("idempotency-key", "order-1");
    request.multipart(form).send().await.unwrap()
}

/// The server does not know whether a job was accepted, and says so; when the commit has landed, the same request finds
/// the job, with its photos.
async fn an_upload_is_found_again(app: &TestApp, lift: impl AsyncFnOnce()) {
    let answer = post(app, form(3, "mug")).await;
    let retry_after = answer.headers()["retry-after"].to_str().unwrap().parse::<u32>();
    let (status, slug, body) = problem(answer).await;
    assert_eq!((status, slug.as_str()), (503, "outcome-unknown"));
    assert!(retry_after.unwrap() > 0);
    assert!(
        body["detail"].as_str().unwrap().contains("the same Idempotency-Key will get its outcome"),
        "{body}"
    );
    let photos = app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap();
    assert_eq!(photos.len(), 3, "they stay");
    lift().await;
    let found = eventually("the same request finds its job", async || {
        let answer = post(app, form(3, "mug")).await;
        (answer.status() == 202).then_some(answer)
    });
    let found = found.await;
    assert_eq!(found.headers()["idempotent-replayed"], "true");
    let found: serde_json::Value = found.json().await.unwrap();
    let row = app.row(found["id"].as_str().unwrap(), Kind::Train).await.unwrap();
    assert_eq!(row.photos.len(), 3);
    for photo in &row.photos {
        app.workers.blobs.get(photo).await.unwrap();
    }
    // Whatever else was tried meanwhile left no object.
    let objects = eventually("no other photos are left", async || {
        let left = app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap();
        (left.len() == 3).then_some(())
    });
    objects.await;
}

// case A1
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_whose_commit_waits_for_a_standby_keeps_its_photos() {
    let server = Postgres::own();
    let app = TestApp::on(TestWorkers::on_server(&server).await, AppConfig::default()).await;
    server.lose_standby().await;
    an_upload_is_found_again(&app, async || server.find_standby().await).await;
    app.stop().await;
}

// case A1
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_whose_commit_a_slow_disk_holds_up_keeps_its_photos() {
    let name = "service::in_doubt::an_upload_whose_commit_a_slow_disk_holds_up_keeps_its_photos";
    let Some(disk) = Disk::under(name) else { return };
    let app = TestApp::start().await;
    disk.hold();
    an_upload_is_found_again(&app, async || disk.mend()).await;
    app.stop().await;
}

/// A worker whose last write is not answered until long after its lease: the job has its result, and its result's
/// objects.
async fn a_result_keeps_its_objects(
    mut workers: TestWorkers,
    hold_up: impl AsyncFnOnce(),
    lift: impl AsyncFnOnce(),
) {
    workers.settings.lease = Duration::from_secs(20);
    // Otherwise the lease keeper's commit would be held up, and the row with it.
    workers.settings.heartbeat = Duration::from_hours(1);
    workers.settings.checkpoint_every = Duration::from_mins(10);
    let job = workers.train("mug", 20).await;
    let chaos = Chaos::over(Arc::new(workers.objects_store()));
    let script = Script::new(SLOW);
    let worker = workers.start_with_blobs(&script, Blobs::over(Arc::new(chaos.clone())));
    // After its preview nothing can be stored until commits are held up: so the one that is held up is the last of the
    // job.
    let preview = async || workers.store.artifacts(TENANT, job.id).await.unwrap().pop();
    eventually("the preview is shown", preview).await;
    chaos.inject_all(Some(StoreFault::FailsBefore));
    eventually("all steps are taken", async || (script.steps("mug").len() == 20).then_some(())).await;
    hold_up().await;
    chaos.inject_all(None);
    // Longer than the lease, and than the commit is waited for: whoever takes it for lost has cleaned up by now.
    tokio::time::sleep(Duration::from_secs(26)).await;
    lift().await;
    let job =
        eventually("the job has ended", async || workers.find(&job).await.filter(is(State::Succeeded))).await;
    worker.stop().await;
    assert_eq!(job.attempt, 1);
    whole(&workers, &job, 20).await;
}

/// Every object that the row names is there, and the result is right.
async fn whole(workers: &TestWorkers, job: &Job, steps: u64) {
    assert_eq!(workers.artifact(job, WEIGHTS).await, expected_weights(7, steps));
    assert!(workers.artifact(job, REPORT).await.starts_with(b"{"));
    for object in workers.store.artifacts(TENANT, job.id).await.unwrap() {
        workers.blobs.get(&object).await.unwrap();
    }
}

// case A1
#[tokio::test(flavor = "multi_thread")]
async fn a_result_whose_commit_waits_for_a_standby_keeps_its_objects() {
    let server = Postgres::own();
    let workers = TestWorkers::on_server(&server).await;
    let (lose, find) = (async || server.lose_standby().await, async || server.find_standby().await);
    a_result_keeps_its_objects(workers, lose, find).await;
}

// case A1
#[tokio::test(flavor = "multi_thread")]
async fn a_result_whose_commit_a_slow_disk_holds_up_keeps_its_objects() {
    let name = "service::in_doubt::a_result_whose_commit_a_slow_disk_holds_up_keeps_its_objects";
    let Some(disk) = Disk::under(name) else { return };
    let workers = TestWorkers::new().await;
    a_result_keeps_its_objects(workers, async || disk.hold(), async || disk.mend()).await;
}

/// Looks at the row again and again: the checkpoint that it names is in the store, whole.
async fn watch_checkpoints(workers: &TestWorkers, job: &Job) -> ! {
    let running = async || workers.find(job).await.filter(is(State::Running));
    let named = async || running().await.and_then(|row| row.checkpoint); // an ended job's is cleared away
    loop {
        if let Some(checkpoint) = named().await
            && workers.blobs.get(&checkpoint.object).await.is_err()
        {
            // It may have been followed by another meanwhile, and only then be gone.
            assert_ne!(named().await, Some(checkpoint), "the row names a checkpoint that is gone");
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Loses every one of a training's commits in turn, one a training. Each ends once, on its first attempt, whole.
async fn every_commit_may_be_lost(loss: Loss) {
    let url = Postgres::database().await;
    let mut workers = TestWorkers::on(tempfile::tempdir().unwrap(), &url).await;
    workers.settings.checkpoint_every = Duration::from_millis(8);
    let wire = Wire::before(socket_of(&url)).await;
    let mut nth = 0;
    loop {
        let job = workers.train("mug", 12).await;
        let before = wire.n_commits();
        wire.inject(nth, loss);
        let worker =
            workers.start_on_database(&Script::new(Duration::from_millis(2)), &wire.through(&url)).await;
        let done = tokio::select! {
            done = workers.ended(&job) => done,
            _ = watch_checkpoints(&workers, &job) => unreachable!(),
        };
        assert_eq!(done.state, State::Succeeded, "commit {nth}: {:?}", done.error);
        assert_eq!(done.attempt, 1, "commit {nth}");
        whole(&workers, &done, 12).await;
        worker.stop().await;
        // Its own may have been the commit that was lost.
        maintenance::remove_obsolete_checkpoints(&workers.store, &workers.blobs).await.unwrap();
        workers.nothing_is_left_over(&done).await;
        if wire.n_commits() - before <= nth {
            break; // a training has no more
        }
        nth += 1;
    }
    assert!(nth > 5, "a claim, checkpoints, a preview, a result: only {nth} commits");
}

// case A1
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_loses_the_answer_of_any_commit_loses_nothing_else() {
    Box::pin(every_commit_may_be_lost(Loss::Answer)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_repeats_a_commit_that_was_never_sent() {
    Box::pin(every_commit_may_be_lost(Loss::Before)).await;
}

// case A6
#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_primary_costs_no_result_and_is_reported_as_unavailable() {
    let server = Postgres::own();
    let mut workers = TestWorkers::on_server(&server).await;
    workers.settings.lease = Duration::from_mins(1);
    let app = TestApp::on(workers, AppConfig::default()).await;
    let job = app.workers.train("mug", 20).await;
    let script = Script::new(QUICK);
    let chaos = Chaos::over(Arc::new(app.workers.objects_store()));
    let worker = app.workers.start_with_blobs(&script, Blobs::over(Arc::new(chaos.clone())));
    app.workers.until(&job, |_| script.steps("mug").len() > 3).await;
    chaos.inject_all(Some(StoreFault::FailsBefore));
    eventually("all steps are taken", async || (script.steps("mug").len() == 20).then_some(())).await;
    server.set("default_transaction_read_only", Some("on")).await;
    chaos.inject_all(None);
    let answer = post(&app, form(3, "mug")).await;
    assert!(answer.headers().contains_key("retry-after"));
    let (status, slug, _) = problem(answer).await;
    assert_eq!((status, slug.as_str()), (503, "unavailable"));
    assert!(app.workers.blobs.list(&Scope::tenant(app.tenant)).await.unwrap().is_empty(), "surely refused");
    tokio::time::sleep(Duration::from_secs(4)).await; // the worker tries meanwhile
    server.set("default_transaction_read_only", None).await;
    let found = eventually("the job has its result", async || {
        app.workers.find(&job).await.filter(is(State::Succeeded))
    });
    let done = found.await;
    assert_eq!(done.attempt, 1);
    whole(&app.workers, &done, 20).await;
    worker.stop().await;
    app.stop().await;
}

/// A row that is locked by somebody else costs its own lease only.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_row_is_locked_does_not_cost_the_others_their_leases() {
    let server = Postgres::own();
    let mut workers = TestWorkers::on_server(&server).await;
    workers.settings.lease = Duration::from_secs(12);
    let trained = workers.train("mug", 2).await;
    let worker = workers.start(&Script::new(QUICK));
    let trained = workers.ended(&trained).await;
    worker.stop().await;
    let slow = Script::new(Duration::from_millis(200));
    let worker = workers.start(&slow);
    let (long, sample) = (workers.train("teapot", 400).await, workers.sample(trained.id, 200).await);
    for job in [&long, &sample] {
        workers.until(job, is(State::Running)).await;
    }
    let mut other = PgConnection::connect(&workers.settings.database).await.unwrap();
    let lock = format!("begin; select 1 from job where id = '{}' for update", sample.id);
    sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut other).await.unwrap();
    tokio::time::sleep(Duration::from_secs(16)).await;
    assert_eq!(workers.store.rescue().await.unwrap().requeued, 0, "one is locked, the other held");
    assert_eq!(workers.find(&long).await.unwrap().state, State::Running);
    let steps = slow.steps("teapot").len();
    eventually("it goes on", async || (slow.steps("teapot").len() > steps + 5).then_some(())).await;
    drop(other);
    worker.kill().await;
}
