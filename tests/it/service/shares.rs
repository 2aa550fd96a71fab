//! How the time of a device is shared, with engines that compute nothing and keep a clock of their own: between
//! trainings and samples, and between tenants.

use std::time::Duration;

use hypnos::job::{Job, JobId, Kind, State, TenantId};

use super::scripted::{Did, Script};
use super::test_workers::{TENANT, TestWorkers, eventually, is};

const QUICK: Duration = Duration::from_millis(1);

/// A training of that tenant that has succeeded.
async fn trained(workers: &TestWorkers, tenant: TenantId) -> JobId {
    let worker = workers.start(&Script::new(Duration::ZERO));
    let job = workers.train_of(tenant, "mug", 2).await;
    assert_eq!(workers.ended(&job).await.state, State::Succeeded);
    worker.stop().await;
    job.id
}

async fn running(workers: &TestWorkers, kind: Kind) -> u64 {
    let gauges = workers.store.gauges().await.unwrap();
    gauges.kinds.iter().find(|gauge| gauge.kind == kind).unwrap().running
}

/// Where the first of these stands in what was done.
fn first(did: &[(Duration, Did)], wanted: impl Fn(&Did) -> bool) -> usize {
    did.iter().position(|(_, did)| wanted(did)).expect("it was done")
}

// case A4
#[tokio::test(flavor = "multi_thread")]
async fn a_training_beside_a_thousand_samples_of_another_tenant_starts_after_the_current_one() {
    let workers = TestWorkers::new().await;
    let parent = trained(&workers, TENANT).await;
    for _ in 0..1000 {
        workers.sample_of(TENANT, parent, "of a", 1, 1).await;
    }
    let script = Script::new(Duration::from_millis(500));
    let worker = workers.start(&script);
    eventually("samples are drawn", async || (script.draws("of a") >= 2).then_some(())).await;
    let other = workers.store.ensure_tenant("b").await.unwrap();
    let before = script.draws("of a");
    let training = workers.train_of(other, "teapot", 1000).await;
    assert_eq!(workers.store.queue_place(&training).await.unwrap().map_or(0, |place| place.position), 0);
    eventually("it trains", async || (!script.steps("teapot").is_empty()).then_some(())).await;
    let history = script.history();
    let start = first(&history, |did| matches!(did, Did::ClassImage(_)));
    let meanwhile =
        history[..start].iter().filter(|(_, did)| matches!(did, Did::Draw { .. })).count() - before;
    // The one at hand, and what a slow machine draws while it fetches three photos.
    assert!(meanwhile <= 8, "{meanwhile} samples were drawn first");
    workers.store.cancel(other, training.id).await.unwrap();
    workers.until(&training, is(State::Canceled)).await;
    worker.stop().await;
}

/// The part of the device's time that a training kept beside a flood of samples, at any moment since its first step and
/// over one batch less; and how many batches were drawn beside it.
async fn kept_beside_a_flood(share: f64) -> (f64, usize) {
    let mut workers = TestWorkers::new().await;
    workers.settings.sample_share = share;
    let parent = trained(&workers, TENANT).await;
    for _ in 0..300 {
        workers.sample_of(TENANT, parent, "of a", 1, 7).await;
    }
    let script = Script::new(Duration::from_millis(4));
    let other = workers.store.ensure_tenant("b").await.unwrap();
    let training = workers.train_of(other, "teapot", 150).await;
    let worker = workers.start(&script);
    assert_eq!(workers.ended(&training).await.state, State::Succeeded);
    worker.stop().await;
    let (step, batch) = (script.device_step, 7 * script.device_step);
    let history = script.history();
    let (mut kept, mut drawn, mut trained): (f64, _, _) = (1.0, 0, 0);
    let mut began = None;
    for (at, did) in history {
        match did {
            Did::Step(..) => {
                trained += 1;
                let began = *began.get_or_insert(at.saturating_sub(step));
                let elapsed = at.saturating_sub(began).saturating_sub(batch).max(step);
                kept = kept.min((step * trained).as_secs_f64() / elapsed.as_secs_f64());
            }
            Did::Draw { during_training: true, .. } if began.is_some() => drawn += 1,
            _ => {}
        }
    }
    assert_eq!(trained, 150);
    (kept, drawn)
}

// case A4
#[tokio::test(flavor = "multi_thread")]
async fn a_training_keeps_half_of_its_steps_beside_a_flood_of_samples() {
    let (kept, drawn) = kept_beside_a_flood(0.5).await;
    assert!(kept >= 0.5, "{kept} of its undisturbed steps a second");
    assert!(drawn >= 5, "but samples have their share as well: {drawn}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_share_of_samples_is_a_setting() {
    let (kept, drawn) = kept_beside_a_flood(0.2).await;
    assert!(kept >= 0.8 && drawn >= 2, "{kept}, {drawn}");
    let (kept, _) = kept_beside_a_flood(1.0).await;
    assert!(kept < 0.4, "all that waits between two steps: {kept}");
}

/// So that no product's model has to lie beside what a training takes.
#[tokio::test(flavor = "multi_thread")]
async fn with_a_share_of_nothing_no_sample_is_drawn_beside_a_training() {
    let mut workers = TestWorkers::new().await;
    workers.settings.sample_share = 0.0;
    let parent = trained(&workers, TENANT).await;
    for _ in 0..60 {
        workers.sample_of(TENANT, parent, "of a", 4, 1).await;
    }
    let script = Script::new(Duration::from_millis(20)).batch(2);
    let worker = workers.start(&script);
    eventually("samples are drawn", async || (script.draws("of a") >= 2).then_some(())).await;
    let training = workers.train("teapot", 50).await;
    assert_eq!(workers.ended(&training).await.state, State::Succeeded);
    let before = script.draws("of a");
    assert!(before < 120, "the training did not wait for all of them");
    eventually("the others are drawn", async || (script.draws("of a") == 120).then_some(())).await;
    worker.stop().await;
    let beside = |(_, did): &&(Duration, Did)| matches!(did, Did::Draw { during_training: true, .. });
    assert_eq!(script.history().iter().filter(beside).count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_share_of_nothing_trainings_in_a_row_let_samples_pass_between_them() {
    let mut workers = TestWorkers::new().await;
    workers.settings.sample_share = 0.0;
    let parent = trained(&workers, TENANT).await;
    let first = workers.train("first", 5).await;
    let second = workers.train("second", 5).await;
    let sample = workers.sample_of(TENANT, parent, "of a", 1, 1).await;
    let script = Script::new(QUICK);
    let worker = workers.start(&script);
    for job in [&first, &second, &sample] {
        assert_eq!(workers.ended(job).await.state, State::Succeeded);
    }
    worker.stop().await;
    let history = script.history();
    let at = |class: &str| self::first(&history, |did| matches!(did, Did::Step(name, ..) if name == class));
    let drawn =
        self::first(&history, |did| matches!(did, Did::Draw { prompt, .. } if prompt.contains("of a")));
    assert!(at("first") < drawn && drawn < at("second"), "{history:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_is_not_claimed_long_before_it_may_be_drawn() {
    let mut workers = TestWorkers::new().await;
    workers.settings.sample_share = 0.001;
    let parent = trained(&workers, TENANT).await;
    let script = Script::new(QUICK).device_step(Duration::from_secs(1));
    let worker = workers.start(&script);
    let training = workers.train("teapot", 10_000).await;
    eventually("it trains", async || (script.steps("teapot").len() > 3).then_some(())).await;
    let sample = workers.sample_of(TENANT, parent, "of a", 1, 30).await;
    assert_eq!(workers.ended(&sample).await.state, State::Succeeded);
    // It owes the training 30,000 steps.
    let next = workers.sample_of(TENANT, parent, "of a", 1, 30).await;
    let steps = script.steps("teapot").len();
    eventually("steps are taken", async || (script.steps("teapot").len() > steps + 100).then_some(())).await;
    assert_eq!(workers.find(&next).await.unwrap().state, State::Queued, "another device may have it");
    assert_eq!((running(&workers, Kind::Sample).await, script.draws("of a")), (0, 1));
    workers.store.cancel(TENANT, training.id).await.unwrap();
    assert_eq!(workers.ended(&next).await.state, State::Succeeded, "without a training it owes nothing");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_of_many_images_lets_the_training_continue_between_its_batches() {
    let workers = TestWorkers::new().await;
    let parent = trained(&workers, TENANT).await;
    let script = Script::new(Duration::from_millis(2)).batch(3);
    let worker = workers.start(&script);
    let training = workers.train("teapot", 10_000).await;
    eventually("it trains", async || (script.steps("teapot").len() > 3).then_some(())).await;
    let sample = workers.sample_of(TENANT, parent, "of a", 8, 5).await;
    let sample = workers.ended(&sample).await;
    assert_eq!(sample.state, State::Succeeded);
    let names: Vec<String> = (0..8).map(|n| format!("image-{n}.webp")).collect();
    assert_eq!(workers.stored(&sample).await, names);
    let images = workers.store.artifacts(TENANT, sample.id).await.unwrap();
    let seeds: Vec<_> = images.iter().map(|image| image.meta["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds, (11..19).collect::<Vec<_>>(), "each once and in order");
    let history = script.history();
    let is_draw = |(_, did): &(Duration, Did)| matches!(did, Did::Draw { .. });
    let draws: Vec<usize> = (0..history.len()).filter(|&i| is_draw(&history[i])).collect();
    assert_eq!(draws.len(), 3, "batches of 3, 3 and 2");
    for two in draws.windows(2) {
        assert!(two[1] - two[0] > 5, "as many steps as the batch had");
    }
    workers.store.cancel(TENANT, training.id).await.unwrap();
    workers.until(&training, is(State::Canceled)).await;
    worker.stop().await;
}

// case A4
#[tokio::test(flavor = "multi_thread")]
async fn tenants_whose_weights_are_one_to_three_draw_one_to_three() {
    let workers = TestWorkers::new().await;
    let heavy = workers.store.ensure_tenant("heavy").await.unwrap();
    workers.store.set_tenant_weight(heavy, 3).await.unwrap();
    let parents = [trained(&workers, TENANT).await, trained(&workers, heavy).await];
    for _ in 0..90 {
        workers.sample_of(TENANT, parents[0], "light", 1, 20).await;
        workers.sample_of(heavy, parents[1], "heavy", 1, 20).await;
    }
    let script = Script::new(QUICK).device_step(Duration::from_secs(1));
    let worker = workers.start(&script);
    eventually("many are drawn", async || (script.draws("") >= 80).then_some(())).await;
    worker.stop().await;
    let history = script.history();
    let light = history[..80]
        .iter()
        .filter(|(_, did)| matches!(did, Did::Draw { prompt, .. } if prompt.starts_with("light")))
        .count();
    assert!((17..=23).contains(&light), "{light} of 80");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_sample_does_not_wait_for_the_large_ones_of_another_tenant() {
    let workers = TestWorkers::new().await;
    let other = workers.store.ensure_tenant("b").await.unwrap();
    let parents = [trained(&workers, TENANT).await, trained(&workers, other).await];
    let script = Script::new(Duration::from_millis(50)).batch(1);
    let worker = workers.start(&script);
    let mut large: Vec<Job> = Vec::new();
    for _ in 0..5 {
        large.push(workers.sample_of(TENANT, parents[0], "large", 8, 10).await);
    }
    eventually("the first is drawn", async || (script.draws("large") >= 2).then_some(())).await;
    assert_eq!(
        running(&workers, Kind::Sample).await,
        1,
        "no second one before the first is in its last batch"
    );
    let before = script.draws("large");
    let small = workers.sample_of(other, parents[1], "small", 1, 1).await;
    assert_eq!(workers.ended(&small).await.state, State::Succeeded);
    let history = script.history();
    let drawn = first(&history, |did| matches!(did, Did::Draw { prompt, .. } if prompt.starts_with("small")));
    // The batch at hand, and what a slow machine draws while it fetches the weights; the large ones have 40.
    assert!(drawn - before <= 5, "{} batches of the large ones were drawn first", drawn - before);
    for job in &large {
        workers.store.cancel(TENANT, job.id).await.unwrap();
    }
    worker.stop().await;
}

// case A10
#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_job_task_keeps_the_device_s_count_of_jobs_right() {
    use std::sync::Arc;

    use hypnos::blobs::Blobs;

    use super::chaos::{Chaos, StoreFault};

    let mut workers = TestWorkers::new().await;
    workers.settings.checkpoint_every = Duration::from_mins(10);
    let parent = trained(&workers, TENANT).await;
    let chaos = Chaos::over(Arc::new(workers.objects_store()));
    let script = Script::new(Duration::from_millis(5));
    let worker = workers.start_with_blobs(&script, Blobs::over(Arc::new(chaos.clone())));
    let training = workers.train("teapot", 10_000).await;
    eventually("it trains", async || (script.steps("teapot").len() > 3).then_some(())).await;
    let second = workers.train("kettle", 5).await;
    script.hold_draws();
    let sample = workers.sample_of(TENANT, parent, "of a", 1, 1).await;
    workers.until(&sample, is(State::Running)).await;
    // Its pictures cannot be stored: the library panics, and with it the sample's task.
    eventually("its weights are fetched", async || {
        (chaos.n_answered() == chaos.n_operations()).then_some(())
    })
    .await;
    chaos.inject_all(Some(StoreFault::Panics));
    script.let_draw();
    eventually("its task panics", async || {
        let drawn = script.draws("of a") == 1;
        (drawn && chaos.n_answered() < chaos.n_operations()).then_some(())
    })
    .await;
    chaos.inject_all(None);
    let steps = script.steps("teapot").len();
    eventually("steps are taken", async || (script.steps("teapot").len() > steps + 60).then_some(())).await;
    assert_eq!(workers.find(&training).await.unwrap().state, State::Running);
    assert_eq!(workers.find(&second).await.unwrap().state, State::Queued, "one training at a time");
    worker.stop().await;
    assert_eq!(workers.find(&training).await.unwrap().state, State::Queued, "the drain has waited for it");
    assert!(workers.find(&training).await.unwrap().checkpoint.is_some());
}
