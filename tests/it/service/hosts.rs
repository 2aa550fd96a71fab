//! Machines that fail under jobs: the job is released without counting an attempt, and the machine stops claiming.

use std::time::Duration;

use hypnos::health::{Condition, Health};
use hypnos::job::{FaultCode, Job, State, WEIGHTS};

use super::scripted::{Script, expected_weights};
use super::test_workers::{TestWorkers, eventually, is};

const QUICK: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_millis(10);

fn conditions(health: &Health) -> Vec<Condition> {
    health.devices().into_iter().map(|device| device.condition).collect()
}

fn is_backing_off(health: &Health) -> bool {
    let conditions = conditions(health);
    !conditions.is_empty()
        && conditions.iter().all(|condition| matches!(condition, Condition::BackingOff { .. }))
}

/// Waits until all devices of a worker take jobs.
async fn works(health: &Health) {
    let all = || conditions(health).iter().all(|condition| *condition == Condition::Working);
    eventually("it works", async || (!health.devices().is_empty() && all()).then_some(())).await;
}

/// Waits until no device of a worker takes jobs.
async fn backs_off(health: &Health) {
    eventually("it backs off", async || is_backing_off(health).then_some(())).await;
}

async fn is_back_in_the_queue(workers: &TestWorkers, job: &Job) -> Job {
    workers.until(job, |job| job.state == State::Queued && job.attempt == 0 && job.run_lease > 0).await
}

// case A5
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_its_scratch_directory_stops_claiming_and_costs_no_attempt() {
    let workers = TestWorkers::new().await;
    let worker = workers.start(&Script::new(QUICK));
    works(&worker.health).await;
    let scratch = workers.settings.scratch.clone();
    std::fs::remove_dir_all(&scratch).unwrap();
    std::fs::write(&scratch, "not a directory any more").unwrap();
    let mut jobs = Vec::new();
    for _ in 0..5 {
        jobs.push(workers.train("mug", 5).await);
    }
    backs_off(&worker.health).await;
    assert!(!worker.health.is_ready());
    let line = worker.health.devices()[0].to_string();
    assert!(line.starts_with("scripted:0: backing off since ") && line.contains("files in use"), "{line}");
    assert!(!line.contains(&scratch.display().to_string()), "no path: {line}");
    // It keeps backing off, however often it is probed.
    let Condition::BackingOff { since, next_probe, .. } = conditions(&worker.health)[0].clone() else {
        panic!("rests")
    };
    let later = async || match conditions(&worker.health)[0].clone() {
        Condition::BackingOff { since: s, next_probe: n, .. } => (s == since && n > next_probe).then_some(()),
        other => panic!("{other:?}"),
    };
    eventually("it was probed again", later).await;
    let mut n_claims = 0;
    for job in &jobs {
        let row = workers.find(job).await.unwrap();
        assert_eq!((row.state, row.attempt, row.error), (State::Queued, 0, None));
        n_claims += row.run_lease;
    }
    assert_eq!(n_claims, 1, "one job found out, and no other was touched");

    std::fs::remove_file(&scratch).unwrap();
    for job in &jobs {
        let row = workers.ended(job).await;
        assert_eq!((row.state, row.attempt), (State::Succeeded, 1));
    }
    assert_eq!(conditions(&worker.health), [Condition::Working]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_scratch_directory_is_created_again() {
    let workers = TestWorkers::new().await;
    let worker = workers.start(&Script::new(QUICK));
    let first = workers.train("mug", 5).await;
    assert_eq!(workers.ended(&first).await.state, State::Succeeded);
    std::fs::remove_dir_all(&workers.settings.scratch).unwrap();
    let training = workers.train("mug", 5).await;
    let row = workers.ended(&training).await;
    assert_eq!((row.state, row.attempt), (State::Succeeded, 1));
    let sample = workers.sample(first.id, 1).await;
    assert_eq!(workers.ended(&sample).await.state, State::Succeeded);
    worker.stop().await;
}

// case A5
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_is_opened_again_and_then_ends_the_process() {
    let workers = TestWorkers::new().await;
    let worker = workers.start(&Script::new(QUICK));
    let health = worker.health.clone();
    let job = workers.train("loses", 50).await;
    let waiting = workers.train("mug", 5).await;
    let fault = worker.ended().await.unwrap_err();
    assert_eq!(fault.code, FaultCode::Machine);
    assert_eq!(fault.message, "no device can be used any more: an illegal memory access was encountered");
    assert!(matches!(&conditions(&health)[..], [Condition::Dead { .. }]));
    assert!(!health.is_ready());
    let job = workers.find(&job).await.unwrap();
    assert_eq!((job.state, job.attempt, job.error), (State::Queued, 0, None), "it cost nothing");
    assert_eq!(workers.find(&waiting).await.unwrap().run_lease, 0, "and nothing else was touched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovered_device_works_again() {
    let mut workers = TestWorkers::new().await;
    workers.settings.backoff = Duration::from_millis(300); // three of which end it
    let script = Script::new(SLOW);
    let worker = workers.start(&script);
    let job = workers.train("mug", 60).await;
    workers.until(&job, |job| job.checkpoint.is_some()).await;
    script.lose_device(true);
    backs_off(&worker.health).await;
    is_back_in_the_queue(&workers, &job).await;
    script.lose_device(false);
    let job = workers.ended(&job).await;
    assert_eq!((job.state, job.attempt), (State::Succeeded, 1));
    assert_eq!(workers.artifact(&job, WEIGHTS).await, expected_weights(7, 60), "from its checkpoint");
    assert_eq!(conditions(&worker.health), [Condition::Working]);
    worker.stop().await;
}

// case A5
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_does_not_stop_the_other_devices() {
    let workers = TestWorkers::new().await;
    let (bad, good) = (Script::new(SLOW), Script::new(SLOW));
    let worker = workers.start_devices(&[&bad, &good], workers.blobs.clone());
    let jobs = [workers.train("mug", 60).await, workers.train("mug", 60).await];
    eventually("both train", async || {
        (!bad.steps("mug").is_empty() && !good.steps("mug").is_empty()).then_some(())
    })
    .await;
    bad.lose_device(true);
    for job in &jobs {
        let row = workers.ended(job).await;
        assert_eq!((row.state, row.attempt), (State::Succeeded, 1));
        assert_eq!(workers.artifact(&row, WEIGHTS).await, expected_weights(7, 60));
    }
    eventually("it is given up", async || {
        matches!(conditions(&worker.health)[0], Condition::Dead { .. }).then_some(())
    })
    .await;
    assert_eq!(conditions(&worker.health)[1], Condition::Working);
    assert!(worker.health.is_ready());
    let job = workers.train("mug", 5).await;
    assert_eq!(workers.ended(&job).await.state, State::Succeeded);
    worker.stop().await;
}

// case A5
#[tokio::test(flavor = "multi_thread")]
async fn a_job_under_which_three_machines_fail_fails_and_is_not_claimed_again() {
    let mut workers = TestWorkers::new().await;
    let job = workers.train("machine", 50).await;
    for (i, host) in ["first", "second", "third"].into_iter().enumerate() {
        workers.settings.host = host.into();
        workers.settings.backoff = Duration::from_hours(1);
        let worker = workers.start(&Script::new(QUICK));
        let row =
            workers.until(&job, |job| job.run_lease == i as i64 + 1 && job.state != State::Running).await;
        if i < 2 {
            assert_eq!((row.state, row.attempt, row.error), (State::Queued, 0, None));
        }
        backs_off(&worker.health).await;
        worker.stop().await;
    }
    let error = workers.find(&job).await.unwrap().error.unwrap();
    assert_eq!((error.code, error.retryable), (FaultCode::Machine, false));
    assert!(error.message.starts_with("3 machines failed under it"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_machine_pauses_longer_after_each_fault() {
    let workers = TestWorkers::new().await;
    let worker = workers.start(&Script::new(QUICK));
    let mut rests = Vec::new();
    for _ in 0..3 {
        let job = workers.train("machine", 50).await; // each costs nothing
        let rest = eventually("it backs off", async || match conditions(&worker.health)[0].clone() {
            Condition::BackingOff { since, next_probe, .. } => next_probe.duration_since(since).ok(),
            _ => None,
        });
        rests.push(rest.await);
        workers.store.cancel(super::test_workers::TENANT, job.id).await.unwrap();
        works(&worker.health).await;
    }
    assert_eq!(rests, [1, 2, 4].map(|n| n * workers.settings.backoff));
    let job = workers.train("mug", 5).await;
    assert_eq!(workers.ended(&job).await.state, State::Succeeded);
    workers.train("machine", 50).await;
    let rest = eventually("it backs off", async || match conditions(&worker.health)[0].clone() {
        Condition::BackingOff { since, next_probe, .. } => next_probe.duration_since(since).ok(),
        _ => None,
    });
    assert_eq!(rest.await, workers.settings.backoff, "it has been well in between");
    worker.stop().await;
}

// case A5
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_on_a_device_that_is_lost_is_the_machine_s_fault() {
    let workers = TestWorkers::new().await;
    let worker = workers.start(&Script::new(QUICK));
    let job = workers.train("breaks", 50).await;
    let fault = worker.ended().await.unwrap_err();
    assert!(fault.message.contains("no device can be used any more"), "{}", fault.message);
    let row = workers.find(&job).await.unwrap();
    assert_eq!((row.state, row.attempt, row.error), (State::Queued, 0, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_that_panics_fails_alone_and_the_training_beside_it_goes_on() {
    let workers = TestWorkers::new().await;
    let script = Script::new(SLOW);
    let worker = workers.start(&script);
    let parent = workers.train("mug", 2).await;
    workers.ended(&parent).await;
    let training = workers.train("teapot", 100).await;
    workers.until(&training, |job| job.checkpoint.is_some()).await;
    let sample = workers.sample_of(super::test_workers::TENANT, parent.id, "panics", 1, 1).await;
    let sample = workers.ended(&sample).await;
    assert_eq!(sample.error.unwrap().code, FaultCode::Internal);
    let training = workers.ended(&training).await;
    assert_eq!((training.state, training.attempt), (State::Succeeded, 1));
    assert_eq!(workers.artifact(&training, WEIGHTS).await, expected_weights(7, 100));
    worker.stop().await;
}

// case A11
#[tokio::test(flavor = "multi_thread")]
async fn weights_in_use_stay_cached_however_many_others_are_fetched() {
    let mut workers = TestWorkers::new().await;
    workers.settings.weights_bytes_max = 1;
    let script = Script::new(QUICK);
    let worker = workers.start(&script);
    let mut parents = Vec::new();
    for steps in 2..5 {
        let job = workers.train("mug", steps).await; // each with weights of its own
        workers.ended(&job).await;
        parents.push(job.id);
    }
    worker.stop().await;
    let scripts = [Script::new(QUICK), Script::new(QUICK), Script::new(QUICK)];
    scripts.iter().for_each(Script::hold_draws);
    let worker = workers.start_devices(&scripts.iter().collect::<Vec<_>>(), workers.blobs.clone());
    let mut samples = Vec::new();
    for i in 0..20 {
        samples.push(workers.sample(parents[i % 3], 1).await);
    }
    // Each device has fetched what it is about to read.
    eventually("all draw", async || scripts.iter().all(Script::is_drawing).then_some(())).await;
    scripts.iter().for_each(Script::let_draw);
    for sample in &samples {
        let sample = workers.ended(sample).await;
        assert_eq!((sample.state, sample.attempt), (State::Succeeded, 1), "{:?}", sample.error);
    }
    worker.stop().await;
}

// case A11
#[tokio::test(flavor = "multi_thread")]
async fn weights_whose_cached_copy_is_gone_are_fetched_again() {
    let workers = TestWorkers::new().await;
    let script = Script::new(QUICK);
    let worker = workers.start(&script);
    let parent = workers.train("mug", 2).await;
    workers.ended(&parent).await;
    script.hold_draws();
    let sample = workers.sample(parent.id, 1).await;
    eventually("it draws", async || script.is_drawing().then_some(())).await;
    std::fs::remove_dir_all(workers.settings.scratch.join("weights")).unwrap();
    script.let_draw();
    let sample = workers.ended(&sample).await;
    assert_eq!((sample.state, sample.attempt), (State::Succeeded, 1), "{:?}", sample.error);
    // What the store itself has lost is another thing.
    let gone =
        workers.store.artifact(super::test_workers::TENANT, parent.id, WEIGHTS).await.unwrap().unwrap();
    workers.blobs.delete(&hypnos::blobs::Key::parse(&gone.key).unwrap()).await.unwrap();
    std::fs::remove_dir_all(workers.settings.scratch.join("weights")).unwrap();
    let sample = workers.sample(parent.id, 1).await;
    let sample = workers.until(&sample, is(State::Failed)).await;
    assert_eq!(sample.error.unwrap().code, FaultCode::ArtifactMissing);
    worker.stop().await;
}
