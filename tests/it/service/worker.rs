//! Guarantees of workers, with engines that compute nothing: one result for each job, no step lost beyond the last
//! checkpoint, and nothing left behind by a worker that dies.

use std::sync::Arc;
use std::time::Duration;

use hypnos::blobs::{Blobs, Scope};
use hypnos::job::{FaultCode, REPORT, State, WEIGHTS};
use hypnos::maintenance;
use sqlx::{Connection, SqliteConnection};
use tokio_util::sync::CancellationToken;

use super::chaos::{Chaos, StoreFault};
use super::postgres::{Bouncer, Postgres, socket_of};
use super::scripted::{Did, Script, expected_weights};
use super::test_workers::{TestWorkers, eventually, is};

const QUICK: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_millis(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_job_with_an_invalid_row_fails_and_the_next_one_runs() {
    let workers = TestWorkers::new().await;
    let (broken, sound) = (workers.train("mug", 5).await, workers.train("mug", 5).await);
    let mut database = SqliteConnection::connect(&workers.settings.database).await.unwrap();
    let spoil = sqlx::query("update job set spec = '{}' where id = $1").bind(broken.id.to_string());
    assert_eq!(spoil.execute(&mut database).await.unwrap().rows_affected(), 1);
    let worker = workers.start(&Script::new(QUICK));
    let broken = workers.ended(&broken).await;
    let error = broken.error.as_ref().unwrap();
    assert_eq!((broken.state, error.code, error.retryable), (State::Failed, FaultCode::Internal, false));
    assert_eq!(workers.ended(&sound).await.state, State::Succeeded);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_ends_with_weights_a_report_and_images_in_the_store() {
    let workers = TestWorkers::new().await;
    let script = Script::new(QUICK);
    let worker = workers.start(&script);
    let job = workers.train("mug", 60).await;
    let job = workers.ended(&job).await;
    assert_eq!((job.state, job.attempt), (State::Succeeded, 1));
    assert_eq!(job.result.as_ref().unwrap()["bundle_sha256"], "5c21b7ed");
    assert_eq!(workers.artifact(&job, WEIGHTS).await, expected_weights(7, 60));
    assert!(workers.artifact(&job, REPORT).await.starts_with(b"{"));
    worker.stop().await; // after the job's end its last checkpoint goes
    workers.nothing_is_left_over(&job).await;
    let stored = ["image-0.png", "preview-30.png", "report.html", REPORT, WEIGHTS];
    assert_eq!(workers.stored(&job).await, stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn class_images_are_drawn_once_for_all_trainings_with_the_same_settings() {
    let workers = TestWorkers::new().await;
    let script = Script::new(QUICK);
    let worker = workers.start(&script);
    for class_name in ["mug", "mug", "teapot"] {
        let job = workers.train(class_name, 2).await;
        assert_eq!(workers.ended(&job).await.state, State::Succeeded);
    }
    let drawn = script.did.lock().unwrap().iter().filter(|did| matches!(did, Did::ClassImage(_))).count();
    assert_eq!(drawn, 4, "two for mugs, two for teapots");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_of_a_killed_worker_resumes_from_the_last_checkpoint_in_another() {
    let workers = TestWorkers::new().await;
    let (first, second) = (Script::new(SLOW), Script::new(QUICK));
    let worker = workers.start(&first);
    let job = workers.train("mug", 200).await;
    let job = workers.until(&job, |job| job.checkpoint.is_some()).await;
    worker.kill().await;
    let committed = workers.find(&job).await.unwrap().checkpoint.unwrap().step;

    let worker = workers.start(&second);
    let job = workers.ended(&job).await;
    assert_eq!((job.state, job.attempt), (State::Succeeded, 2));
    assert_eq!(workers.artifact(&job, WEIGHTS).await, expected_weights(7, 200));
    assert_eq!(
        second.steps("mug"),
        (committed..200).collect::<Vec<_>>(),
        "no step before the checkpoint again"
    );
    // Its last attempt's objects are all there is; those of the dead one go with the sweep, not with the job's end.
    for object in workers.store.artifacts(super::test_workers::TENANT, job.id).await.unwrap() {
        workers.blobs.get(&object).await.unwrap();
    }
    worker.stop().await;
}

// case 57
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_releases_its_training_without_losing_a_step_or_an_attempt() {
    let workers = TestWorkers::new().await;
    let script = Script::new(SLOW);
    let worker = workers.start(&script);
    let job = workers.train("mug", 60).await;
    workers.until(&job, |_| script.steps("mug").len() > 5).await;
    worker.stop().await;
    let given_back = workers.find(&job).await.unwrap();
    assert_eq!((given_back.state, given_back.attempt), (State::Queued, 0));
    assert_eq!(given_back.checkpoint.unwrap().step, script.steps("mug").len() as u64);

    let worker = workers.start(&script);
    let job = workers.ended(&job).await;
    assert_eq!((job.state, job.attempt), (State::Succeeded, 1));
    assert_eq!(script.steps("mug"), (0..60).collect::<Vec<_>>(), "each step once");
    workers.nothing_is_left_over(&job).await;
    worker.stop().await;
}

// case A10
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_releases_its_samples_at_the_next_step() {
    let workers = TestWorkers::new().await;
    let quick = workers.start(&Script::new(QUICK));
    let parent = workers.train("mug", 2).await;
    workers.ended(&parent).await;
    quick.stop().await;

    // Alone: eight batches, half a minute.
    let script = Script::new(SLOW).batch(1);
    let worker = workers.start(&script);
    let sample = workers.sample_of(super::test_workers::TENANT, parent.id, "of a", 8, 200).await;
    workers.until(&sample, |row| row.progress.as_ref().is_some_and(|progress| progress.step > 3)).await;
    worker.stop().await;
    let given_back = workers.find(&sample).await.unwrap();
    assert_eq!((given_back.state, given_back.attempt), (State::Queued, 0));
    assert!(script.draws("of a") < 8, "it was not drawn to its end");

    // Beside a training, and while another one waits for its turn.
    let worker = workers.start(&script);
    let training = workers.train("teapot", 10_000).await;
    eventually("it trains", async || (!script.steps("teapot").is_empty()).then_some(())).await;
    let other = workers.store.ensure_tenant("b").await.unwrap();
    let second = workers.train_of(other, "mug", 1).await;
    workers.until(&sample, |row| row.progress.as_ref().is_some_and(|progress| progress.step > 3)).await;
    worker.stop().await;
    for job in [&sample, &training, &second] {
        let row = workers.find(job).await.unwrap();
        assert_eq!((row.state, row.attempt), (State::Queued, 0));
    }
    workers.store.cancel(super::test_workers::TENANT, training.id).await.unwrap();
    workers.store.cancel(other, second.id).await.unwrap();

    let worker = workers.start(&Script::new(Duration::ZERO));
    let sample = workers.ended(&sample).await;
    assert_eq!((sample.state, sample.attempt), (State::Succeeded, 1));
    worker.stop().await;
}

// case A10
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_does_not_wait_for_downloads() {
    let workers = TestWorkers::new().await;
    let quick = workers.start(&Script::new(QUICK));
    let parent = workers.train("mug", 2).await;
    workers.ended(&parent).await;
    quick.stop().await;
    std::fs::remove_dir_all(workers.settings.scratch.join("weights")).unwrap();
    let chaos = Chaos::over(Arc::new(workers.objects_store()));
    chaos.inject_all(Some(StoreFault::HangsBefore));
    let worker = workers.start_with_blobs(&Script::new(QUICK), Blobs::over(Arc::new(chaos.clone())));
    let jobs = [workers.train("teapot", 5).await, workers.sample(parent.id, 1).await];
    eventually("both are fetched for", async || (chaos.n_operations() >= 2).then_some(())).await;
    worker.drain();
    for job in &jobs {
        workers.until(job, |row| row.state == State::Queued && row.attempt == 0).await;
    }
    worker.kill().await; // it still lists what it may have stored
}

// case A10
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_ends_in_time_even_if_nothing_can_be_stored() {
    let mut workers = TestWorkers::new().await;
    workers.settings.drain = Duration::from_millis(400);
    workers.settings.checkpoint_every = Duration::from_mins(10);
    let chaos = Chaos::over(Arc::new(workers.objects_store()));
    let script = Script::new(SLOW);
    let worker = workers.start_with_blobs(&script, Blobs::over(Arc::new(chaos.clone())));
    let job = workers.train("mug", 10_000).await;
    eventually("it trains", async || (script.steps("mug").len() > 3).then_some(())).await;
    chaos.inject_all(Some(StoreFault::FailsBefore));
    let said = worker.told_to_stop().await.unwrap_err();
    assert_eq!(said.message, "the work in progress could not be stored within 0.4 s");
    // Its lease runs out, and another takes it.
    let row = workers.until(&job, |row| row.state == State::Queued).await;
    assert_eq!(row.attempt, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_is_drawn_between_two_steps_of_a_training() {
    let workers = TestWorkers::new().await;
    let script = Script::new(Duration::from_millis(150));
    let quick = Script::new(QUICK);
    let worker = workers.start(&quick);
    let trained = workers.train("mug", 2).await;
    let trained = workers.ended(&trained).await;
    worker.stop().await;

    let worker = workers.start(&script);
    let long = workers.train("teapot", 1000).await;
    workers.until(&long, |_| !script.steps("teapot").is_empty()).await;
    let before = script.steps("teapot").len();
    let sample = workers.sample(trained.id, 1).await;
    let sample = workers.ended(&sample).await;
    let steps_meanwhile = script.steps("teapot").len() - before;
    assert_eq!(sample.state, State::Succeeded);
    assert_eq!(
        script
            .did
            .lock()
            .unwrap()
            .iter()
            .filter(|did| matches!(did, Did::Draw { during_training: true, .. }))
            .count(),
        1
    );
    // The step at hand, the one during which the drawing began to be stored, and one for the test's own eyes.
    assert!(steps_meanwhile <= 3, "{steps_meanwhile} steps");
    assert_eq!(workers.stored(&sample).await, ["image-0.webp", "image-1.webp"]);
    let images = workers.store.artifacts(super::test_workers::TENANT, sample.id).await.unwrap();
    assert_eq!((&images[0].meta["seed"], &images[1].meta["seed"]), (&11.into(), &12.into()));
    workers.store.cancel(super::test_workers::TENANT, long.id).await.unwrap();
    assert_eq!(workers.ended(&long).await.state, State::Canceled);
    worker.stop().await;
}

// case 65
#[tokio::test(flavor = "multi_thread")]
async fn a_training_that_diverges_fails_at_once_and_leaves_nothing() {
    let workers = TestWorkers::new().await;
    let script = Script::new(QUICK);
    let worker = workers.start(&script);
    let job = workers.train("diverges", 50).await;
    let job = workers.ended(&job).await;
    let error = job.error.clone().unwrap();
    assert_eq!(
        (job.state, error.code, error.retryable, job.attempt),
        (State::Failed, FaultCode::Diverged, false, 1)
    );
    let nothing =
        eventually("nothing is stored", async || workers.stored(&job).await.is_empty().then_some(()));
    nothing.await;
    worker.stop().await;
}

// case 59
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_the_engine_fails_its_job_and_no_other() {
    let workers = TestWorkers::new().await;
    let script = Script::new(QUICK);
    let worker = workers.start(&script);
    let (bad, good) = (workers.train("panics", 50).await, workers.train("mug", 5).await);
    assert_eq!(workers.ended(&bad).await.error.unwrap().code, FaultCode::Internal);
    assert_eq!(workers.ended(&good).await.state, State::Succeeded);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_under_which_its_only_machine_keeps_failing_fails_in_the_end() {
    let workers = TestWorkers::new().await;
    let script = Script::new(QUICK);
    let worker = workers.start(&script);
    let job = workers.train("machine", 50).await;
    let mut last = (0, State::Queued);
    while last.1 != State::Failed {
        // The first time is free; then every one counts, after a pause that nobody here wants to wait for.
        let row = workers.until(&job, |job| job.run_lease > last.0 && job.state != State::Running).await;
        assert_eq!(row.attempt, row.run_lease - 1, "{:?}", row.state);
        last = (row.run_lease, row.state);
        let mut database = SqliteConnection::connect(&workers.settings.database).await.unwrap();
        sqlx::query("update job set not_before_ms = 0").execute(&mut database).await.unwrap();
    }
    let row = workers.find(&job).await.unwrap();
    assert_eq!((row.run_lease, row.attempt, row.error.unwrap().message.as_str()), (4, 3, "out of memory"));
    worker.stop().await;
}

// case 58
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_always_kills_its_worker_fails_as_worker_lost() {
    let mut workers = TestWorkers::new().await;
    workers.settings.lease = Duration::from_millis(300);
    workers.settings.heartbeat = Duration::from_millis(50);
    workers.settings.checkpoint_every = Duration::from_mins(10);
    let job = workers.train("mug", 1000).await;
    for attempt in 1..=3 {
        let worker = workers.start(&Script::new(SLOW));
        workers.until(&job, |job| job.state == State::Running && job.attempt == attempt).await;
        worker.kill().await;
    }
    let job = workers.ended(&job).await;
    assert_eq!((job.state, job.error.clone().unwrap().code), (State::Failed, FaultCode::WorkerLost));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canceled_training_stops_at_its_next_step_and_its_objects_are_removed() {
    let workers = TestWorkers::new().await;
    let script = Script::new(SLOW);
    let worker = workers.start(&script);
    let job = workers.train("mug", 10_000).await;
    workers.until(&job, |job| job.checkpoint.is_some()).await;
    let asked = workers.store.cancel(super::test_workers::TENANT, job.id).await.unwrap().unwrap();
    assert!(asked.cancel_requested);
    let job = workers.until(&job, is(State::Canceled)).await;
    eventually("nothing is stored", async || workers.stored(&job).await.is_empty().then_some(())).await;
    let steps = script.steps("mug").len();
    assert_eq!(script.steps("mug").len(), steps, "no step after the end");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_renew_its_lease_stops_before_another_may_begin() {
    let mut workers = TestWorkers::new().await;
    workers.settings.heartbeat = Duration::from_hours(1); // no heartbeat
    workers.settings.lease = Duration::from_millis(400);
    let script = Script::new(SLOW);
    let worker = workers.start(&script);
    let job = workers.train("mug", 10_000).await;
    workers.until(&job, is(State::Running)).await;
    // Nobody else is there: the job goes back and forth between the queue and this worker until its attempts are used
    // up.
    let job = workers.ended(&job).await;
    assert_eq!(job.error.unwrap().code, FaultCode::WorkerLost);
    worker.stop().await;
}

/// Kills a worker during its `nth` use of the store, for every n that a training has, and sees to it that another ends
/// the job with the right result, whole, and that no object is left which no row names, but for the dead attempt's.
async fn killed_at_every_use_of_the_store(fault: StoreFault, new_workers: impl AsyncFn() -> TestWorkers) {
    let mut n = 0;
    loop {
        let mut workers = new_workers().await;
        workers.settings.lease = Duration::from_millis(400);
        workers.settings.heartbeat = Duration::from_millis(50);
        workers.settings.checkpoint_every = Duration::from_millis(8);
        let job = workers.train("mug", 12).await;
        let chaos = Chaos::over(Arc::new(workers.objects_store()));
        chaos.inject(n, fault);
        let worker = workers
            .start_with_blobs(&Script::new(Duration::from_millis(2)), Blobs::over(Arc::new(chaos.clone())));
        let hung = eventually("the store hangs or the job ends", async || {
            let done = workers.find(&job).await.unwrap().state.is_terminal();
            let hung = chaos.n_operations() > n && chaos.n_answered() < chaos.n_operations();
            (done || hung).then_some(!done)
        });
        if !hung.await {
            worker.stop().await;
            break; // a training has no more than n uses
        }
        // What hangs holds only whoever waits for it; the training may go on to its end, but not beyond.
        worker.kill().await;

        let worker = workers.start(&Script::new(QUICK));
        let job = workers.ended(&job).await;
        assert_eq!(job.state, State::Succeeded, "killed at use {n}: {:?}", job.error);
        assert_eq!(workers.artifact(&job, WEIGHTS).await, expected_weights(7, 12), "killed at use {n}");
        for object in workers.store.artifacts(super::test_workers::TENANT, job.id).await.unwrap() {
            workers.blobs.get(&object).await.unwrap();
        }
        worker.stop().await;
        n += 1;
    }
    assert!(n > 10, "photos, class images, checkpoints, results: only {n} uses of the store");
}

// case 55
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_before_any_use_of_the_store_loses_nothing() {
    killed_at_every_use_of_the_store(StoreFault::HangsBefore, TestWorkers::new).await;
}

// case 55
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_after_any_use_of_the_store_loses_nothing() {
    killed_at_every_use_of_the_store(StoreFault::HangsAfter, TestWorkers::new).await;
}

// case 55, A7
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_behind_a_pooler_loses_nothing() {
    let direct = Postgres::database().await;
    let bouncer = Bouncer::start(socket_of(&direct), "");
    let workers = async || {
        let database = bouncer.through(&Postgres::database().await);
        TestWorkers::on(tempfile::tempdir().unwrap(), &database).await
    };
    killed_at_every_use_of_the_store(StoreFault::HangsAfter, workers).await;
}

// case 68
#[tokio::test(flavor = "multi_thread")]
async fn a_training_survives_an_outage_of_the_object_store() {
    let workers = TestWorkers::new().await;
    let job = workers.train("mug", 60).await;
    let chaos = Chaos::over(Arc::new(workers.objects_store()));
    let script = Script::new(SLOW);
    let worker = workers.start_with_blobs(&script, Blobs::over(Arc::new(chaos.clone())));
    workers.until(&job, |_| script.steps("mug").len() > 3).await;
    chaos.inject_all(Some(StoreFault::FailsBefore));
    eventually("all steps are taken", async || (script.steps("mug").len() == 60).then_some(())).await;
    chaos.inject_all(None);
    let job = workers.ended(&job).await;
    assert_eq!((job.state, job.attempt), (State::Succeeded, 1));
    assert_eq!(workers.artifact(&job, WEIGHTS).await, expected_weights(7, 60));
    workers.nothing_is_left_over(&job).await;
    worker.stop().await;
}

// case 51
#[tokio::test(flavor = "multi_thread")]
async fn a_training_deleted_while_it_runs_is_gone_at_once_and_its_objects_soon() {
    let workers = TestWorkers::new().await;
    let script = Script::new(SLOW);
    let worker = workers.start(&script);
    let job = workers.train("mug", 10_000).await;
    workers.until(&job, |job| job.checkpoint.is_some()).await;
    assert!(workers.store.delete(super::test_workers::TENANT, job.id).await.unwrap());
    assert!(workers.find(&job).await.is_none());
    let stop = CancellationToken::new();
    let pause = Duration::from_millis(20);
    tokio::spawn(maintenance::run(workers.store.clone(), workers.blobs.clone(), pause, stop.clone()));
    let scope = Scope::job(super::test_workers::TENANT, job.id);
    let gone = eventually("no object is left", async || {
        workers.blobs.list(&scope).await.unwrap().is_empty().then_some(())
    });
    gone.await;
    let steps = script.steps("mug").len();
    worker.stop().await;
    assert!(script.steps("mug").len() <= steps + 1);
    stop.cancel();
}

/// Every class image that a row names is there as the row says, and no other is.
async fn class_images_are_as_their_rows_say(workers: &TestWorkers, n: usize) {
    let settings = workers.blobs.list(&Scope::class_images(super::test_workers::TENANT)).await.unwrap();
    let settings = settings
        .first()
        .and_then(|entry| entry.key.class_image_of().map(|(_, settings)| settings.to_owned()));
    let rows = workers.store.class_images(super::test_workers::TENANT, &settings.unwrap()).await.unwrap();
    assert_eq!(rows.len(), n);
    for (seed, object) in &rows {
        workers.blobs.get(object).await.unwrap_or_else(|error| panic!("class image {seed}: {error}"));
    }
    let mut named: Vec<String> = rows.into_iter().map(|(_, object)| object.key).collect();
    named.sort();
    let there = workers.blobs.list(&Scope::class_images(super::test_workers::TENANT)).await.unwrap();
    assert_eq!(there.into_iter().map(|entry| entry.key.to_string()).collect::<Vec<_>>(), named);
}

// two kinds of device draw one class image at once, each in bytes of its own
#[tokio::test(flavor = "multi_thread")]
async fn class_images_that_two_devices_draw_at_once_stay_readable() {
    let workers = TestWorkers::new().await;
    let step = Duration::from_millis(150);
    let jobs = [workers.train("mug", 4).await, workers.train("mug", 4).await];
    let scripts = ["cpu", "gpu"].map(|device| Script::new(step).on(device));
    let running = [workers.start(&scripts[0]), workers.start(&scripts[1])];
    for job in &jobs {
        assert_eq!(workers.ended(job).await.state, State::Succeeded);
    }
    let drawn =
        |script: &Script| script.did.lock().unwrap().iter().any(|did| matches!(did, Did::ClassImage(_)));
    assert!(scripts.iter().all(drawn), "both drew them, for neither was done when the other began");
    for worker in running {
        worker.stop().await;
    }
    class_images_are_as_their_rows_say(&workers, 2).await;
    // A third has them without drawing.
    let third = Script::new(QUICK);
    let worker = workers.start(&third);
    workers.ended(&workers.train("mug", 4).await).await;
    worker.stop().await;
    assert!(!drawn(&third));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_image_that_is_damaged_or_gone_is_drawn_again_and_replaced() {
    let workers = TestWorkers::new().await;
    let worker = workers.start(&Script::new(QUICK));
    workers.ended(&workers.train("mug", 4).await).await;
    worker.stop().await;
    let there = workers.blobs.list(&Scope::class_images(super::test_workers::TENANT)).await.unwrap();
    assert_eq!(there.len(), 2);
    std::fs::write(workers.objects().join(there[0].key.as_str()), "damaged").unwrap();
    workers.blobs.delete(&there[1].key).await.unwrap();

    let script = Script::new(QUICK).on("another");
    let worker = workers.start(&script);
    workers.ended(&workers.train("mug", 4).await).await;
    workers.ended(&workers.train("mug", 4).await).await;
    worker.stop().await;
    let drawn = script.did.lock().unwrap().iter().filter(|did| matches!(did, Did::ClassImage(_))).count();
    assert_eq!(drawn, 2, "once each, and never again");
    // The damaged one is nobody's any more, and the sweep's.
    workers.blobs.delete(&there[0].key).await.unwrap();
    class_images_are_as_their_rows_say(&workers, 2).await;
}

// case A12
#[tokio::test(flavor = "multi_thread")]
async fn the_weights_of_a_deleted_product_leave_the_disk() {
    let workers = TestWorkers::new().await;
    let worker = workers.start(&Script::new(QUICK));
    let kept = workers.train("mug", 4).await;
    let gone = workers.train("chair", 5).await;
    for job in [&kept, &gone] {
        assert_eq!(workers.ended(job).await.state, State::Succeeded);
        assert_eq!(workers.ended(&workers.sample(job.id, 2).await).await.state, State::Succeeded);
    }
    let cached = || {
        let files = std::fs::read_dir(workers.settings.scratch.join("weights")).unwrap().flatten();
        let mut names: Vec<String> =
            files.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(cached().len(), 2);
    let weights =
        workers.store.artifact(super::test_workers::TENANT, kept.id, WEIGHTS).await.unwrap().unwrap();
    assert!(workers.store.delete(super::test_workers::TENANT, gone.id).await.unwrap());
    let one = [format!("{}.safetensors", weights.sha256)];
    eventually("its weights are gone from the disk", async || (cached() == one).then_some(())).await;
    worker.stop().await;
}

// case A12: what a dead worker held of a product goes without anybody starting another
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_worker_s_scratch_directory_is_removed_by_other_workers() {
    let workers = TestWorkers::new().await;
    let runs =
        || std::fs::read_dir(workers.settings.scratch.join("runs")).map_or(0, |runs| runs.flatten().count());
    let living = workers.start(&Script::new(QUICK));
    let dead = workers.start(&Script::new(SLOW));
    eventually("both have scratch of their own", async || (runs() == 2).then_some(())).await;
    dead.kill().await;
    assert_eq!(runs(), 2);
    eventually("one is left", async || (runs() == 1).then_some(())).await;
    let job = workers.train("mug", 4).await;
    assert_eq!(workers.ended(&job).await.state, State::Succeeded, "it still has its own");
    living.stop().await;
}
