//! The store's guarantees, one per test.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures_util::future::{BoxFuture, join_all};
use hypnos::job::State;
use hypnos::store::{ClaimFilter, Completion, Error, Filter, NewKey, Renewal, Rescued, Scope};
use tokio::task::JoinSet;

use super::*;

on_each! {
    a_job_comes_back_as_it_was_accepted,
    fifty_equal_requests_at_once_are_one_job,
    a_key_belongs_to_one_request_for_a_day,
    a_key_is_free_again_when_its_job_is_deleted,
    the_last_place_in_the_queue_is_given_once,
    a_sample_needs_a_training_that_succeeded,
    trainings_come_before_samples_and_larger_priorities_first,
    ten_thousand_jobs_of_one_tenant_do_not_hold_up_another,
    tenants_take_turns,
    device_time_counts_and_not_the_number_of_jobs,
    both_kinds_count_as_one,
    a_running_job_counts_with_its_expected_time,
    weights_of_one_to_three_give_one_to_three,
    an_idle_tenant_comes_next_and_gets_no_credit_for_its_idle_time,
    a_lost_worker_s_device_time_counts,
    a_claim_skips_the_samples_of_given_tenants,
    a_weight_is_a_small_number_of_an_existing_tenant,
    an_old_database_gives_every_tenant_the_same_weight,
    positions_predict_the_order_of_claims,
    a_position_is_the_number_of_jobs_claimed_before,
    a_worker_gets_the_kinds_that_it_asks_for,
    sixty_four_claimers_get_each_job_once,
    a_renewal_extends_the_lease_and_reports_a_cancel,
    the_version_changes_when_a_client_can_see_a_change,
    a_lost_lease_writes_nothing,
    a_repeated_end_changes_nothing,
    a_lost_worker_costs_an_attempt_and_the_last_one_the_job,
    a_deadline_ends_an_attempt_however_alive_its_worker_looks,
    a_lease_that_is_held_is_not_rescued,
    a_release_costs_no_attempt_and_keeps_the_checkpoint,
    a_retry_waits_until_its_time,
    a_fault_without_attempts_left_fails,
    a_machine_that_fails_costs_no_attempt_the_first_time,
    a_job_under_which_three_machines_fail_is_at_fault_itself,
    a_job_that_waits_is_canceled_at_once,
    a_cancel_that_was_acknowledged_never_succeeds,
    a_canceled_job_whose_worker_is_lost_is_canceled,
    cancel_claim_and_finish_at_once_end_once,
    a_running_job_that_is_deleted_vanishes_and_is_erased_after_its_end,
    a_training_is_erased_after_the_samples_drawn_with_it,
    a_deleted_training_takes_no_more_samples,
    obsolete_checkpoints_are_listed_until_they_are_forgotten,
    the_first_class_image_stays,
    lists_are_filtered_and_paginated,
    another_tenants_rows_are_invisible,
    keys_are_valid_until_they_expire_or_are_revoked,
    keys_of_the_first_schema_stay_valid_and_admin_keys_can_be_created,
    gauges_count_what_waits_and_what_runs,
    a_submission_notifies_subscribers,
    two_migrations_at_once_are_one,
    a_schema_of_another_version_is_refused,
    a_step_of_the_wall_clock_ends_no_lease_where_there_is_a_boot_clock,
    what_a_row_names_is_read_under_its_lock,
}

async fn a_job_comes_back_as_it_was_accepted(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let new = NewJob { priority: 3, ..training(tenant) };
    let job = db.accept(new.clone()).await;
    assert_eq!(
        (job.id, job.tenant, job.parent, job.spec().ok(), &job.photos),
        (new.id, tenant, None, Some(new.spec.clone()), &new.photos)
    );
    assert_eq!((job.state, job.attempt, job.max_attempts, job.run_lease), (State::Queued, 0, 3, 0));
    assert_eq!((job.started_ms, job.finished_ms, job.cancel_requested), (None, None, false));
    assert_eq!(db.train(tenant, job.id).await, Some(job.clone()));
    assert_eq!(db.store.find(tenant, job.id, Kind::Sample).await.unwrap(), None, "of the other kind");

    let claimed = db.claim().await.unwrap();
    db.store.commit_checkpoint(claimed.lease(), &checkpoint(100)).await.unwrap();
    db.store.renew(claimed.lease(), LONG, Some(&progress(100))).await.unwrap();
    db.store.add_artifact(claimed.lease(), &object("preview-0.png")).await.unwrap();
    let facts = json!({"bundle": "abc", "losses": [0.5, 0.25]});
    let state = db.store.finish(claimed.lease(), &facts, &[object("weights")]).await.unwrap();
    let done = db.train(tenant, job.id).await.unwrap();
    assert_eq!((state, done.state, done.result), (State::Succeeded, State::Succeeded, Some(facts)));
    assert_eq!(done.progress, Some(progress(100)));
    assert!(job.created_ms <= done.started_ms.unwrap() && done.started_ms <= done.finished_ms);
    let shown = db.store.artifacts(tenant, job.id).await.unwrap();
    assert_eq!(shown, [object("preview-0.png"), object("weights")]);
    assert_eq!(db.store.artifact(tenant, job.id, "weights").await.unwrap(), Some(object("weights")));
    assert_eq!(db.store.artifact(tenant, job.id, "other").await.unwrap(), None);
}

// case 46
async fn fifty_equal_requests_at_once_are_one_job(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let mut racers = JoinSet::new();
    for _ in 0..50 {
        let store = db.store.clone();
        let new = NewJob { idempotency: Some(named("order-1", "abc")), queue_max: 1, ..training(tenant) };
        racers.spawn(async move { store.submit(new).await.unwrap() });
    }
    let answers = racers.join_all().await;
    let ids: HashSet<JobId> = answers
        .iter()
        .map(|answer| match answer {
            Submitted::New(job) | Submitted::Replayed(job) => job.id,
            other => panic!("{other:?}"),
        })
        .collect();
    let new = answers.iter().filter(|answer| matches!(answer, Submitted::New(_))).count();
    assert_eq!((new, ids.len()), (1, 1));
    assert_eq!(db.store.list(tenant, &Filter::default(), None, 100).await.unwrap().len(), 1);
}

// case 47
async fn a_key_belongs_to_one_request_for_a_day(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let other_tenant = db.tenant("other").await;
    let request = |hash: &str| NewJob { idempotency: Some(named("order-1", hash)), ..training(tenant) };
    assert_eq!(db.store.replay(tenant, &named("order-1", "abc")).await.unwrap(), None);
    let job = db.accept(request("abc")).await;
    db.claim().await.unwrap();

    let now = db.train(tenant, job.id).await.unwrap();
    assert_eq!(db.store.submit(request("abc")).await.unwrap(), Submitted::Replayed(now.clone()));
    let replay = db.store.replay(tenant, &named("order-1", "abc")).await.unwrap();
    assert_eq!(replay, Some(Submitted::Replayed(now)));
    assert_eq!(db.store.submit(request("abd")).await.unwrap(), Submitted::OtherRequest);
    let replay = db.store.replay(tenant, &named("order-1", "abd")).await.unwrap();
    assert_eq!(replay, Some(Submitted::OtherRequest));
    db.accept(NewJob { tenant: other_tenant, ..request("abc") }).await;

    db.sql("update idempotency set created_ms = created_ms - 24 * 3600 * 1000").await;
    assert_eq!(db.store.replay(tenant, &named("order-1", "abc")).await.unwrap(), None);
    assert_ne!(db.accept(request("abd")).await.id, job.id);
}

async fn a_key_is_free_again_when_its_job_is_deleted(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let request = || NewJob { idempotency: Some(named("order-1", "abc")), ..training(tenant) };
    let job = db.accept(request()).await;
    assert!(db.store.delete(tenant, job.id).await.unwrap());
    assert_eq!(db.store.replay(tenant, &named("order-1", "abc")).await.unwrap(), None);
    let next = db.accept(request()).await;
    db.store.remove_erased(&[job.id]).await.unwrap();
    let now = db.store.submit(request()).await.unwrap();
    assert_eq!(now, Submitted::Replayed(next), "the first job's end does not take the second's key");
}

// case 48
async fn the_last_place_in_the_queue_is_given_once(db: TestDatabase) {
    let submit = async |tenant| {
        let new = NewJob { queue_max: 2, ..training(tenant) };
        db.store.submit(new).await.unwrap()
    };
    // Several rounds, for only the later ones find all connections open.
    for round in 0..5 {
        let tenant = db.tenant(&format!("shop {round}")).await;
        db.accept(training(tenant)).await;
        let answers = join_all((0..50).map(|_| submit(tenant))).await;
        let full = answers.iter().filter(|answer| **answer == Submitted::QueueFull).count();
        assert_eq!(full, 49);
    }
    let [full, other] = [db.tenant("shop 0").await, db.tenant("other").await];
    assert!(matches!(submit(other).await, Submitted::New(_)), "each tenant has a queue of its own");
    while db.claim().await.is_some() {}
    assert!(matches!(submit(full).await, Submitted::New(_)), "what runs waits no more");
}

async fn a_sample_needs_a_training_that_succeeded(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let submit = async |parent| db.store.submit(sample(tenant, parent)).await.unwrap();
    assert_eq!(submit(JobId::new()).await, Submitted::NoParent(None));
    let job = db.accept(training(tenant)).await;
    assert_eq!(submit(job.id).await, Submitted::NoParent(Some(State::Queued)));
    let claimed = db.claim().await.unwrap();
    assert_eq!(submit(job.id).await, Submitted::NoParent(Some(State::Running)));
    db.store.finish(claimed.lease(), &json!({}), &[]).await.unwrap();
    let drawn = db.accept(sample(tenant, job.id)).await;
    assert_eq!(drawn.parent, Some(job.id));
    assert_eq!(submit(drawn.id).await, Submitted::NoParent(None), "a sample is no training");
    let stranger = db.tenant("other").await;
    let answer = db.store.submit(sample(stranger, job.id)).await.unwrap();
    assert_eq!(answer, Submitted::NoParent(None), "another tenant's training is not there");
}

async fn trainings_come_before_samples_and_larger_priorities_first(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let parent = db.trained(tenant).await.id;
    let plain = db.accept(training(tenant)).await.id;
    let later = db.accept(training(tenant)).await.id;
    let urgent = db.accept(NewJob { priority: 5, ..training(tenant) }).await.id;
    let patient = db.accept(NewJob { priority: -5, ..training(tenant) }).await.id;
    let drawn = db.accept(sample(tenant, parent)).await.id;
    let mut order = Vec::new();
    while let Some(job) = db.claim().await {
        assert_eq!((job.state, job.attempt, job.run_lease), (State::Running, 1, 1));
        order.push(job.id);
    }
    assert_eq!(order, [urgent, plain, later, patient, drawn]);
}

// case 44
async fn ten_thousand_jobs_of_one_tenant_do_not_hold_up_another(db: TestDatabase) {
    let [big, small] = [db.tenant("big").await, db.tenant("small").await];
    let template = db.accept(NewJob { priority: 100, ..training(big) }).await;
    db
        .sql(&format!(
            "insert into job (id, tenant, kind, class_name, spec, photos, priority, max_attempts, not_before_ms, created_ms)
            with recursive n (i) as (select 1 union all select i + 1 from n where i < 9999)
            select 'f' || substr(job.id, 2, 30) || substr(cast(100000 + i as text), 2), tenant, kind, class_name, spec,
                photos, priority, max_attempts, not_before_ms, created_ms
            from job cross join n where job.id = '{}'",
            template.id
        ))
        .await;
    let first = db.claim().await.unwrap();
    assert_eq!(first.tenant, big, "the only one who waits");
    let one = db.accept(training(small)).await;
    assert_eq!(db.store.queue_place(&one).await.unwrap().map(|place| place.position), Some(0));
    assert_eq!(db.claim().await.unwrap().id, one.id, "who has nothing running is next");
}

async fn tenants_take_turns(db: TestDatabase) {
    let [a, b] = [db.tenant("a").await, db.tenant("b").await];
    for tenant in [a, a, a, b, b] {
        db.accept(training(tenant)).await;
    }
    assert_eq!(turns(&db, 9, |_| NONE).await, [a, b, a, b, a], "even if no device time was measured");
}

/// One worker, one job at a time: the tenants of the next `n` jobs, which take `time`.
async fn turns(db: &TestDatabase, n: usize, time: impl Fn(TenantId) -> Duration) -> Vec<TenantId> {
    let mut order = Vec::new();
    while order.len() < n
        && let Some(job) = db.claim().await
    {
        let done = Completion::Succeed { result: &json!({}), artifacts: &[] };
        db.store.end(job.lease(), done, time(job.tenant)).await.unwrap();
        order.push(job.tenant);
    }
    order
}

fn count(order: &[TenantId], tenant: TenantId) -> usize {
    order.iter().filter(|one| **one == tenant).count()
}

async fn device_time_counts_and_not_the_number_of_jobs(db: TestDatabase) {
    let [slow, quick] = [db.tenant("slow").await, db.tenant("quick").await];
    for _ in 0..40 {
        db.accept(training(slow)).await;
        db.accept(training(quick)).await;
    }
    let minute = Duration::from_mins(1);
    let order = turns(&db, 40, |tenant| if tenant == slow { 3 * minute } else { minute }).await;
    assert_eq!((count(&order, slow), count(&order, quick)), (10, 30), "{order:?}");
}

async fn both_kinds_count_as_one(db: TestDatabase) {
    let [drawer, trainer] = [db.tenant("drawer").await, db.tenant("trainer").await];
    let parent = db.trained(drawer).await.id;
    db.trained(trainer).await;
    for _ in 0..10 {
        db.accept(sample(drawer, parent)).await;
    }
    turns(&db, 10, |_| Duration::from_secs(10)).await;
    let first = db.accept(training(drawer)).await;
    let second = db.accept(training(trainer)).await;
    assert_eq!(db.store.queue_place(&first).await.unwrap().map(|place| place.position), Some(1));
    assert_eq!(db.store.queue_place(&second).await.unwrap().map(|place| place.position), Some(0));
    assert_eq!(db.claim().await.unwrap().id, second.id, "its tenant has drawn nothing");
}

async fn a_running_job_counts_with_its_expected_time(db: TestDatabase) {
    let [a, b] = [db.tenant("a").await, db.tenant("b").await];
    for tenant in [a, b] {
        db.accept(training(tenant)).await;
    }
    turns(&db, 2, |_| LONG).await;
    for tenant in [a, a, a, b, b, b] {
        db.accept(training(tenant)).await;
    }
    let mut order = Vec::new();
    while let Some(job) = db.claim().await {
        order.push(job.tenant); // and goes on running
    }
    assert_eq!(order, [a, b, a, b, a, b], "many devices that are free at once do not all go to one");
}

// case A4
async fn weights_of_one_to_three_give_one_to_three(db: TestDatabase) {
    let [light, heavy] = [db.tenant("light").await, db.tenant("heavy").await];
    assert!(db.store.set_tenant_weight(heavy, 3).await.unwrap());
    for _ in 0..60 {
        db.accept(training(light)).await;
        db.accept(training(heavy)).await;
    }
    let order = turns(&db, 40, |_| LONG).await;
    assert_eq!((count(&order, light), count(&order, heavy)), (10, 30), "{order:?}");
    for part in order.chunks(4) {
        assert_eq!((count(part, light), count(part, heavy)), (1, 3), "{order:?}");
    }
    db.store.set_tenant_weight(light, 3).await.unwrap();
    let order = turns(&db, 20, |_| LONG).await;
    assert!((9..=11).contains(&count(&order, light)), "from the next claim on: {order:?}");
}

async fn an_idle_tenant_comes_next_and_gets_no_credit_for_its_idle_time(db: TestDatabase) {
    let [busy, idle] = [db.tenant("busy").await, db.tenant("idle").await];
    for _ in 0..60 {
        db.accept(training(busy)).await;
    }
    assert_eq!(count(&turns(&db, 30, |_| LONG).await, busy), 30, "nobody else is there");
    for _ in 0..20 {
        db.accept(training(idle)).await;
    }
    let order = turns(&db, 10, |_| LONG).await;
    assert_eq!(order[0], idle);
    assert!((5..=6).contains(&count(&order, idle)), "it does not get thirty in a row: {order:?}");
    // Nor does the one pay for having been alone, when the other has been alone since.
    turns(&db, 100, |_| LONG).await;
    for _ in 0..20 {
        db.accept(training(idle)).await;
    }
    turns(&db, 10, |_| LONG).await;
    for _ in 0..20 {
        db.accept(training(busy)).await;
    }
    let order = turns(&db, 10, |_| LONG).await;
    assert!((4..=6).contains(&count(&order, busy)), "{order:?}");
}

async fn a_lost_worker_s_device_time_counts(db: TestDatabase) {
    let [lossy, other] = [db.tenant("lossy").await, db.tenant("other").await];
    for tenant in [lossy, other] {
        db.accept(training(tenant)).await;
    }
    let lost = db.claim_briefly().await.unwrap();
    assert_eq!(lost.tenant, lossy);
    db.sql(&format!("update job set claimed_ms = claimed_ms - 60000 where id = '{}'", lost.id)).await;
    db.store.rescue().await.unwrap();
    assert_eq!(db.claim().await.unwrap().tenant, other);
    let used = db.device_time().await[&lossy.to_string()];
    assert!(used.turn >= 60_000_000, "{used:?}");
    assert_eq!(used.train_ms, None, "nothing is learned from a part");
}

async fn a_claim_skips_the_samples_of_given_tenants(db: TestDatabase) {
    let [a, b] = [db.tenant("a").await, db.tenant("b").await];
    for tenant in [a, a, b] {
        let parent = db.trained(tenant).await.id;
        db.accept(sample(tenant, parent)).await;
    }
    let claim = async |no_samples_of: &[TenantId]| {
        let wanted = ClaimFilter { kinds: BOTH, no_samples_of, model: None };
        db.store.claim(Uuid::now_v7(), wanted, LONG, LONG).await.unwrap().map(|claim| claim.job.tenant)
    };
    assert_eq!(claim(&[a]).await, Some(b));
    assert_eq!(claim(&[a, b]).await, None);
    assert_eq!(claim(&[b]).await, Some(a));
    let training = db.accept(training(a)).await;
    let wanted = ClaimFilter { no_samples_of: &[a], ..ClaimFilter::from(BOTH) };
    let claimed = db.store.claim(Uuid::now_v7(), wanted, LONG, LONG).await.unwrap().unwrap();
    assert_eq!((claimed.id, claimed.weight), (training.id, 1), "trainings are another thing");
}

async fn a_weight_is_a_small_number_of_an_existing_tenant(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    assert_eq!(db.store.tenant_weight(tenant).await.unwrap(), Some(1));
    for weight in [0, 1001, u32::MAX] {
        let refused = db.store.set_tenant_weight(tenant, weight).await;
        assert!(matches!(refused, Err(Error::InvalidSettings(line)) if line.contains("wanted 1 to 1000")));
    }
    assert!(db.store.set_tenant_weight(tenant, 1000).await.unwrap());
    assert_eq!(db.store.tenant_weight(tenant).await.unwrap(), Some(1000));
    assert!(!db.store.set_tenant_weight(TenantId::new(), 2).await.unwrap());
    assert_eq!(db.store.tenant_weight(TenantId::new()).await.unwrap(), None);
}

async fn an_old_database_gives_every_tenant_the_same_weight(db: TestDatabase) {
    db.back_to_the_first_schema().await;
    let [tenant, sample, training] = [TenantId::new().0, JobId::new().0, JobId::new().0];
    db
        .sql(&format!(
            "insert into tenant (id, name, created_ms) values ('{tenant}', 'old', 1);
            insert into job (id, tenant, kind, class_name, spec, photos, priority, max_attempts, not_before_ms,
                created_ms, state, worker, lease_until_ms, deadline_ms, attempt, claimed_ms, run_lease)
            values ('{training}', '{tenant}', 'train', 'mug', '{{}}', '[]', 0, 3, 1, 1, 'running', 'w', 5, 5, 1, 3, 1);
            insert into job (id, tenant, kind, parent, spec, photos, priority, max_attempts, not_before_ms, created_ms)
            values ('{sample}', '{tenant}', 'sample', '{training}', '{{}}', '[]', 0, 3, 1, 1)"
        ))
        .await;
    assert!(matches!(db.store.check_schema().await, Err(Error::Schema(_))));
    db.store.migrate().await.unwrap();
    for known in db.store.tenants().await.unwrap() {
        assert_eq!(db.store.tenant_weight(known.id).await.unwrap(), Some(1));
    }
    // What the build before claimed goes on: its worker's end, or its rescue, is charged as any other's.
    assert_eq!(db.store.rescue().await.unwrap(), Rescued { requeued: 1, ..Rescued::default() });
    let first = db.claim().await.unwrap();
    assert_eq!((first.id.0, first.tenant.0, first.run_lease), (training, tenant, 2));
    assert_eq!(db.claim().await.unwrap().id.0, sample);
    let failed = db.store.machine_failed(first.lease(), &fault(), "a machine", LONG).await.unwrap();
    assert_eq!(failed, State::Queued);
}

async fn positions_predict_the_order_of_claims(db: TestDatabase) {
    let mut waiting = Vec::new();
    for (name, weight, time) in [("a", 1, LONG), ("b", 3, LONG), ("c", 2, LONG / 10), ("d", 1, LONG * 2)] {
        let tenant = db.tenant(name).await;
        db.store.set_tenant_weight(tenant, weight).await.unwrap();
        db.accept(training(tenant)).await;
        let [order] = turns(&db, 1, |_| time).await[..] else { panic!("one") };
        assert_eq!(order, tenant);
    }
    for round in 0..4 {
        for name in ["d", "a", "b", "c"] {
            let tenant = db.tenant(name).await;
            waiting.push(db.accept(NewJob { priority: round % 2, ..training(tenant) }).await);
        }
    }
    let mut foretold = Vec::new();
    for job in &waiting {
        foretold.push((db.store.queue_place(job).await.unwrap().unwrap().position, job.id));
    }
    foretold.sort_unstable();
    assert!(foretold.iter().map(|(position, _)| *position).eq(0..16), "{foretold:?}");
    let mut order = Vec::new();
    while let Some(job) = db.claim().await {
        order.push(job.id);
    }
    assert_eq!(order, foretold.into_iter().map(|(_, id)| id).collect::<Vec<_>>());
}

async fn a_position_is_the_number_of_jobs_claimed_before(db: TestDatabase) {
    let [a, b] = [db.tenant("a").await, db.tenant("b").await];
    let mut waiting = Vec::new();
    for tenant in [a, a, a, b, b] {
        waiting.push(db.accept(training(tenant)).await);
    }
    for job in &waiting {
        let position = db.store.queue_place(job).await.unwrap().unwrap().position;
        let turn = [(a, 0), (b, 1), (a, 2), (b, 3), (a, 4)][position as usize].0;
        assert_eq!(turn, job.tenant);
    }
    let positions: HashSet<_> = {
        let mut all = HashSet::new();
        for job in &waiting {
            all.insert(db.store.queue_place(job).await.unwrap().map(|place| place.position));
        }
        all
    };
    assert_eq!(positions.len(), waiting.len());
    let claimed = db.claim().await.unwrap();
    assert_eq!(
        db.store.queue_place(&claimed).await.unwrap().map(|place| place.position),
        None,
        "it waits no more"
    );
}

async fn a_worker_gets_the_kinds_that_it_asks_for(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let parent = db.trained(tenant).await.id;
    db.accept(training(tenant)).await;
    let claim = async |kinds: &[Kind]| db.store.claim(Uuid::now_v7(), kinds, LONG, LONG).await.unwrap();
    assert_eq!(claim(&[Kind::Sample]).await, None);
    assert_eq!(claim(&[]).await, None);
    let drawn = db.accept(sample(tenant, parent)).await;
    assert_eq!(claim(&[Kind::Train]).await.unwrap().kind, Kind::Train);
    assert_eq!(claim(&[Kind::Sample]).await.unwrap().id, drawn.id);
}

// case 50; each store has connections of its own, as a process has
async fn sixty_four_claimers_get_each_job_once(db: TestDatabase) {
    let db = Arc::new(db);
    let tenants = [db.tenant("a").await, db.tenant("b").await, db.tenant("c").await];
    let stores = [db.another().await, db.another().await, db.another().await, db.another().await];
    let mut submitters = JoinSet::new();
    for store in stores.clone() {
        submitters.spawn(async move {
            for i in 0..250 {
                store.submit(training(tenants[i % 3])).await.unwrap();
            }
        });
    }
    let mut claimers = JoinSet::new();
    submitters.join_all().await;
    for i in 0..64 {
        let store = stores[i % 4].clone();
        claimers.spawn(async move {
            let mut mine = Vec::new();
            while let Some(job) = store.claim(Uuid::now_v7(), BOTH, LONG, LONG).await.unwrap() {
                if mine.len() % 3 == 0 && job.attempt == 1 && job.run_lease == 1 {
                    store.release(job.lease()).await.unwrap();
                } else {
                    store.finish(job.lease(), &json!({}), &[]).await.unwrap();
                }
                mine.push(job.lease());
            }
            mine
        });
    }
    let claims: Vec<Lease> = claimers.join_all().await.concat();
    let distinct: HashSet<Lease> = claims.iter().copied().collect();
    assert_eq!(distinct.len(), claims.len(), "no lease was given twice");
    let jobs: HashSet<JobId> = claims.iter().map(|lease| lease.job).collect();
    assert_eq!(jobs.len(), 1000);
    let mut states = HashMap::<State, usize>::new();
    for tenant in tenants {
        for job in db.store.list(tenant, &Filter::default(), None, 1000).await.unwrap() {
            *states.entry(job.state).or_default() += 1;
        }
    }
    assert_eq!(states, HashMap::from([(State::Succeeded, 1000)]));
}

async fn a_renewal_extends_the_lease_and_reports_a_cancel(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    db.accept(training(tenant)).await;
    let job = db.claim_briefly().await.unwrap();
    let renew = async || db.store.renew(job.lease(), LONG, None).await.unwrap();
    assert_eq!(renew().await, Renewal::Held { cancel_requested: false });
    assert_eq!(db.store.rescue().await.unwrap(), Rescued::default());
    db.store.cancel(tenant, job.id).await.unwrap();
    assert_eq!(renew().await, Renewal::Held { cancel_requested: true });
    db.store.cancelled(job.lease()).await.unwrap();
    assert_eq!(renew().await, Renewal::Lost);
}

async fn the_version_changes_when_a_client_can_see_a_change(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    let mut last = db.store.version(tenant, id).await.unwrap().unwrap();
    let mut changed = async || {
        let before = last;
        last = db.store.version(tenant, id).await.unwrap().unwrap();
        assert!(last >= before);
        last > before
    };
    let lease = db.claim().await.unwrap().lease();
    assert!(changed().await, "claimed");
    db.store.renew(lease, LONG, None).await.unwrap();
    assert!(!changed().await, "held");
    db.store.renew(lease, LONG, Some(&progress(1))).await.unwrap();
    assert!(changed().await, "a step further");
    db.store.renew(lease, LONG, Some(&progress(1))).await.unwrap();
    assert!(!changed().await, "the same step");
    db.store.commit_checkpoint(lease, &checkpoint(1)).await.unwrap();
    assert!(!changed().await, "no client sees checkpoints");
    db.store.add_artifact(lease, &object("preview-0.png")).await.unwrap();
    assert!(changed().await, "a picture to look at");
    db.store.cancel(tenant, id).await.unwrap();
    assert!(changed().await, "to be canceled");
    db.store.cancel(tenant, id).await.unwrap();
    assert!(!changed().await, "to be canceled, still");
    db.store.cancelled(lease).await.unwrap();
    assert!(changed().await, "canceled");
}

async fn a_lost_lease_writes_nothing(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    let lost = db.claim_briefly().await.unwrap().lease();
    db.store.commit_checkpoint(lost, &checkpoint(1)).await.unwrap();
    assert_eq!(db.store.rescue().await.unwrap(), Rescued { requeued: 1, ..Rescued::default() });
    let unborn = Lease { job: JobId::new(), run_lease: 1 };
    writes_nothing(&db, tenant, id, &[lost, unborn], None, "waiting again").await;

    let held = db.claim().await.unwrap().lease();
    let future = Lease { job: id, run_lease: held.run_lease + 1 };
    writes_nothing(&db, tenant, id, &[lost, future, unborn], None, "another's").await;

    db.store.finish(held, &json!({}), &[object("weights")]).await.unwrap();
    writes_nothing(&db, tenant, id, &[lost, held, future], Some(held), "ended").await;
}

async fn writes_nothing(
    db: &TestDatabase,
    tenant: TenantId,
    id: JobId,
    leases: &[Lease],
    ended: Option<Lease>,
    when: &str,
) {
    let (before, shown) = (db.train(tenant, id).await, db.store.artifacts(tenant, id).await.unwrap());
    let lost =
        |answer: Result<(), Error>| assert!(matches!(answer, Err(Error::LeaseLost)), "{when}: {answer:?}");
    let store = &db.store;
    for &lease in leases {
        assert_eq!(store.renew(lease, LONG, Some(&progress(9))).await.unwrap(), Renewal::Lost, "{when}");
        lost(store.commit_checkpoint(lease, &checkpoint(9)).await.map(drop));
        lost(store.add_artifact(lease, &object("late")).await);
        if ended == Some(lease) {
            continue; // whoever ended it hears again what became of it
        }
        lost(store.finish(lease, &json!({"late": true}), &[object("late")]).await.map(drop));
        lost(store.fail(lease, &fault(), None).await.map(drop));
        lost(store.fail(lease, &fault(), Some(NONE)).await.map(drop));
        lost(store.machine_failed(lease, &fault(), "a machine", NONE).await.map(drop));
        lost(store.cancelled(lease).await);
        lost(store.release(lease).await.map(drop));
    }
    assert_eq!(db.train(tenant, id).await, before, "{when}");
    assert_eq!(db.store.artifacts(tenant, id).await.unwrap(), shown, "{when}");
}

// case A1: a worker whose answer was lost says it again
async fn a_repeated_end_changes_nothing(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let store = &db.store;
    let mut ends: Vec<(Lease, State)> = Vec::new();
    for kind in 0..5 {
        db.accept(training(tenant)).await;
        let lease = db.claim().await.unwrap().lease();
        let end = async || match kind {
            0 => store.finish(lease, &json!({"n": 1}), &[object("weights")]).await.unwrap(),
            1 => store.fail(lease, &fault(), None).await.unwrap(),
            2 => store.fail(lease, &fault(), Some(LONG)).await.unwrap(),
            3 => store.release(lease).await.unwrap(),
            _ => {
                store.cancel(tenant, lease.job).await.unwrap();
                store.cancelled(lease).await.map(|()| State::Canceled).unwrap()
            }
        };
        let state = end().await;
        let before = (db.train(tenant, lease.job).await, store.artifacts(tenant, lease.job).await.unwrap());
        for _ in 0..2 {
            assert_eq!(end().await, state);
        }
        let after = (db.train(tenant, lease.job).await, store.artifacts(tenant, lease.job).await.unwrap());
        assert_eq!(after, before, "{state}");
        if kind == 3 {
            // Put back and claimed by another: the first still hears that it was put back, and takes nothing away.
            let other = db.claim().await.unwrap().lease();
            assert_eq!(other.job, lease.job);
            assert_eq!(store.release(lease).await.unwrap(), State::Queued);
            assert_eq!(store.finish(other, &json!({}), &[]).await.unwrap(), State::Succeeded);
            assert!(matches!(store.release(lease).await, Err(Error::LeaseLost)), "that was long ago");
        }
        ends.push((lease, state));
    }
    let states: Vec<State> = ends.iter().map(|(_, state)| *state).collect();
    assert_eq!(states, [State::Succeeded, State::Failed, State::Queued, State::Queued, State::Canceled]);
    // What was taken away from its worker was not ended by it.
    db.accept(training(tenant)).await;
    let taken = db.claim_briefly().await.unwrap().lease();
    store.rescue().await.unwrap();
    assert!(matches!(store.release(taken).await, Err(Error::LeaseLost)));
    assert!(matches!(store.finish(taken, &json!({}), &[]).await, Err(Error::LeaseLost)));
}

// case 58
async fn a_lost_worker_costs_an_attempt_and_the_last_one_the_job(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    for attempt in 1..=3 {
        let job = db.claim_briefly().await.unwrap();
        assert_eq!((job.attempt, job.run_lease), (attempt, attempt));
        let expected =
            Rescued { requeued: u64::from(attempt < 3), failed: u64::from(attempt == 3), canceled: 0 };
        assert_eq!(db.store.rescue().await.unwrap(), expected);
    }
    assert_eq!(db.claim().await, None);
    let job = db.train(tenant, id).await.unwrap();
    assert_eq!((job.state, job.error.unwrap().code), (State::Failed, FaultCode::WorkerLost));
    assert!(job.finished_ms.is_some());
    assert_eq!(db.store.rescue().await.unwrap(), Rescued::default());
}

async fn a_deadline_ends_an_attempt_however_alive_its_worker_looks(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(NewJob { max_attempts: 2, ..training(tenant) }).await.id;
    for rescued in
        [Rescued { requeued: 1, ..Rescued::default() }, Rescued { failed: 1, ..Rescued::default() }]
    {
        let job = db.store.claim(Uuid::now_v7(), BOTH, LONG, NONE).await.unwrap().unwrap();
        let renewal = db.store.renew(job.lease(), LONG, None).await.unwrap();
        assert_eq!(renewal, Renewal::Held { cancel_requested: false });
        assert_eq!(db.store.rescue().await.unwrap(), rescued);
        assert_eq!(db.store.renew(job.lease(), LONG, None).await.unwrap(), Renewal::Lost);
    }
    assert_eq!(db.train(tenant, id).await.unwrap().error.unwrap().code, FaultCode::Deadline);
}

async fn a_lease_that_is_held_is_not_rescued(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    db.accept(training(tenant)).await;
    db.accept(training(tenant)).await;
    let held = db.claim().await.unwrap();
    let lost = db.claim_briefly().await.unwrap();
    // Many rescuers at once take each lost job once.
    let mut rescuers = JoinSet::new();
    for _ in 0..20 {
        let store = db.store.clone();
        rescuers.spawn(async move { store.rescue().await.unwrap().requeued });
    }
    assert_eq!(rescuers.join_all().await.iter().sum::<u64>(), 1);
    assert_eq!(db.train(tenant, lost.id).await.unwrap().state, State::Queued);
    assert_eq!(db.train(tenant, held.id).await.unwrap().state, State::Running);
}

async fn a_release_costs_no_attempt_and_keeps_the_checkpoint(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(NewJob { max_attempts: 1, ..training(tenant) }).await.id;
    for round in 1..=5 {
        let job = db.claim().await.unwrap();
        assert_eq!((job.attempt, job.run_lease), (1, round));
        let before = db.store.commit_checkpoint(job.lease(), &checkpoint(round as u64)).await.unwrap();
        assert_eq!(before, (round > 1).then(|| checkpoint(round as u64 - 1)));
        assert_eq!(job.checkpoint, before);
        assert_eq!(db.store.release(job.lease()).await.unwrap(), State::Queued);
    }
    let job = db.train(tenant, id).await.unwrap();
    assert_eq!((job.attempt, job.checkpoint), (0, Some(checkpoint(5))));
}

async fn a_retry_waits_until_its_time(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    let job = db.claim().await.unwrap();
    assert_eq!(db.store.fail(job.lease(), &fault(), Some(LONG)).await.unwrap(), State::Queued);
    assert_eq!(db.claim().await, None);
    let waiting = db.train(tenant, id).await.unwrap();
    assert_eq!((waiting.state, waiting.error.clone(), waiting.attempt), (State::Queued, None, 1));
    assert_eq!(db.store.queue_place(&waiting).await.unwrap().map(|place| place.position), Some(0));
    db.sql("update job set not_before_ms = not_before_ms - 600 * 1000").await;
    assert_eq!(db.claim().await.unwrap().attempt, 2);
}

async fn a_fault_without_attempts_left_fails(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(NewJob { max_attempts: 2, ..training(tenant) }).await.id;
    let job = db.claim().await.unwrap();
    assert_eq!(db.store.fail(job.lease(), &fault(), Some(NONE)).await.unwrap(), State::Queued);
    let job = db.claim().await.unwrap();
    assert_eq!(db.store.fail(job.lease(), &fault(), Some(NONE)).await.unwrap(), State::Failed);
    let job = db.train(tenant, id).await.unwrap();
    assert_eq!((job.state, job.error, job.result), (State::Failed, Some(fault()), None));
    let second = db.accept(training(tenant)).await.id;
    let job = db.claim().await.unwrap();
    assert_eq!(db.store.fail(job.lease(), &fault(), None).await.unwrap(), State::Failed, "not worth a retry");
    assert_eq!(db.train(tenant, second).await.unwrap().attempt, 1);
}

// case A5
async fn a_machine_that_fails_costs_no_attempt_the_first_time(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(NewJob { max_attempts: 2, ..training(tenant) }).await.id;
    let job = db.claim().await.unwrap();
    let failed = async |lease, host| db.store.machine_failed(lease, &fault(), host, NONE).await.unwrap();
    assert_eq!(failed(job.lease(), "a").await, State::Queued);
    let row = db.train(tenant, id).await.unwrap();
    assert_eq!((row.attempt, row.error), (0, None));
    let job = db.claim().await.unwrap();
    assert_eq!(failed(job.lease(), "b").await, State::Queued);
    assert_eq!(db.train(tenant, id).await.unwrap().attempt, 0, "nor on another machine");
    let job = db.claim().await.unwrap();
    assert_eq!(failed(job.lease(), "a").await, State::Queued);
    assert_eq!(db.train(tenant, id).await.unwrap().attempt, 1, "but once more on the same one");
    let job = db.claim().await.unwrap();
    assert_eq!(failed(job.lease(), "b").await, State::Failed);
    let row = db.train(tenant, id).await.unwrap();
    assert_eq!((row.attempt, row.error), (2, Some(fault())));
    assert_eq!(failed(job.lease(), "c").await, State::Failed, "said again, it changes nothing");
    assert_eq!(db.train(tenant, id).await.unwrap().error, Some(fault()));
}

// case A5
async fn a_job_under_which_three_machines_fail_is_at_fault_itself(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(NewJob { max_attempts: 100, ..training(tenant) }).await.id;
    for (host, state) in [("a", State::Queued), ("b", State::Queued), ("c", State::Failed)] {
        let job = db.claim().await.unwrap();
        assert_eq!(db.store.machine_failed(job.lease(), &fault(), host, LONG).await.unwrap(), state);
    }
    let error = db.train(tenant, id).await.unwrap().error.unwrap();
    assert_eq!((error.code, error.retryable), (FaultCode::Machine, false));
    assert_eq!(error.message, "3 machines failed under it, the last one with: out of memory");
}

async fn a_job_that_waits_is_canceled_at_once(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    let job = db.store.cancel(tenant, id).await.unwrap().unwrap();
    assert_eq!((job.state, job.cancel_requested, job.finished_ms.is_some()), (State::Canceled, true, true));
    assert_eq!(db.claim().await, None);
    assert_eq!(db.store.cancel(tenant, id).await.unwrap(), Some(job), "once more changes nothing");
    assert_eq!(db.store.cancel(tenant, JobId::new()).await.unwrap(), None);
    let done = db.trained(tenant).await;
    assert_eq!(db.store.cancel(tenant, done.id).await.unwrap(), Some(done), "what has ended stays");
}

type End = fn(Store, Lease) -> BoxFuture<'static, State>;

async fn a_cancel_that_was_acknowledged_never_succeeds(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let ends: [End; 5] = [
        |store, lease| {
            Box::pin(async move { store.finish(lease, &json!({}), &[object("weights")]).await.unwrap() })
        },
        |store, lease| Box::pin(async move { store.fail(lease, &fault(), Some(NONE)).await.unwrap() }),
        |store, lease| Box::pin(async move { store.fail(lease, &fault(), None).await.unwrap() }),
        |store, lease| Box::pin(async move { store.release(lease).await.unwrap() }),
        |store, lease| {
            Box::pin(async move { store.machine_failed(lease, &fault(), "a", NONE).await.unwrap() })
        },
    ];
    for end in ends {
        let id = db.accept(training(tenant)).await.id;
        let lease = db.claim().await.unwrap().lease();
        let canceled = db.store.cancel(tenant, id).await.unwrap().unwrap();
        assert_eq!((canceled.state, canceled.cancel_requested), (State::Running, true));
        assert_eq!(end(db.store.clone(), lease).await, State::Canceled);
        let job = db.train(tenant, id).await.unwrap();
        assert_eq!((job.state, job.result, job.error), (State::Canceled, None, None));
        assert_eq!(db.store.artifacts(tenant, id).await.unwrap(), []);
    }
}

async fn a_canceled_job_whose_worker_is_lost_is_canceled(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    db.claim_briefly().await.unwrap();
    db.store.cancel(tenant, id).await.unwrap();
    assert_eq!(db.store.rescue().await.unwrap(), Rescued { canceled: 1, ..Rescued::default() });
    assert_eq!(db.train(tenant, id).await.unwrap().state, State::Canceled);
}

// case 49
async fn cancel_claim_and_finish_at_once_end_once(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let mut seen = HashMap::<(bool, State), usize>::new();
    for _ in 0..1000 {
        let id = db.accept(training(tenant)).await.id;
        let (client, worker) = (db.store.clone(), db.store.clone());
        let canceling = tokio::spawn(async move { client.cancel(tenant, id).await.unwrap().unwrap() });
        let working = tokio::spawn(async move {
            let job = worker.claim(Uuid::now_v7(), BOTH, LONG, LONG).await.unwrap()?;
            Some(worker.finish(job.lease(), &json!({}), &[]).await.unwrap())
        });
        let (canceled, finished) = (canceling.await.unwrap(), working.await.unwrap());
        let job = db.train(tenant, id).await.unwrap();
        assert!(job.state.is_terminal());
        // A cancel that was acknowledged to the client is a cancel.
        let acknowledged = canceled.cancel_requested;
        assert_eq!(job.state, if acknowledged { State::Canceled } else { State::Succeeded });
        if let Some(finished) = finished {
            assert_eq!(finished, job.state);
        }
        assert_eq!(db.store.cancel(tenant, id).await.unwrap(), Some(job.clone()), "it never changes");
        *seen.entry((finished.is_some(), job.state)).or_default() += 1;
    }
    assert_eq!(seen.values().sum::<usize>(), 1000, "{seen:?}");
}

async fn a_running_job_that_is_deleted_vanishes_and_is_erased_after_its_end(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    let lease = db.claim().await.unwrap().lease();
    db.store.add_artifact(lease, &object("preview-0.png")).await.unwrap();
    assert!(db.store.delete(tenant, id).await.unwrap());
    assert_eq!(db.train(tenant, id).await, None);
    assert_eq!(db.store.version(tenant, id).await.unwrap(), None);
    assert_eq!(db.store.artifacts(tenant, id).await.unwrap(), []);
    assert_eq!(db.store.cancel(tenant, id).await.unwrap(), None);
    assert!(!db.store.delete(tenant, id).await.unwrap(), "there is nothing any more");
    assert_eq!(db.store.list(tenant, &Filter::default(), None, 9).await.unwrap(), []);

    assert_eq!(db.store.erasable(None, 9).await.unwrap(), [], "its worker still writes objects");
    db.store.remove_erased(&[id]).await.unwrap();
    let renewal = db.store.renew(lease, LONG, None).await.unwrap();
    assert_eq!(renewal, Renewal::Held { cancel_requested: true }, "its row is still there");
    assert_eq!(db.store.finish(lease, &json!({}), &[]).await.unwrap(), State::Canceled);
    assert_eq!(db.store.erasable(None, 9).await.unwrap(), [(tenant, id)]);
    assert_eq!(db.store.erasable(None, 9).await.unwrap(), [(tenant, id)], "until it is erased");
    db.store.remove_erased(&[id]).await.unwrap();
    db.store.remove_erased(&[id]).await.unwrap();
    assert_eq!(db.store.erasable(None, 9).await.unwrap(), []);
}

// case 51
async fn a_training_is_erased_after_the_samples_drawn_with_it(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let parent = db.trained(tenant).await.id;
    let running = db.accept(sample(tenant, parent)).await.id;
    let lease = db.claim().await.unwrap().lease();
    let waiting = db.accept(sample(tenant, parent)).await.id;
    assert!(db.store.delete(tenant, parent).await.unwrap());
    for id in [running, waiting] {
        assert_eq!(db.store.find(tenant, id, Kind::Sample).await.unwrap(), None);
    }
    assert_eq!(db.claim().await, None, "the waiting one is canceled");
    assert_eq!(db.store.erasable(None, 9).await.unwrap(), [(tenant, waiting)]);
    db.store.remove_erased(&[waiting]).await.unwrap();
    db.store.remove_erased(&[parent]).await.unwrap();
    assert_eq!(db.store.erasable(None, 9).await.unwrap(), [], "one still reads the weights");
    db.store.cancelled(lease).await.unwrap();
    assert_eq!(db.store.erasable(None, 9).await.unwrap(), [(tenant, running)]);
    db.store.remove_erased(&[running]).await.unwrap();
    assert_eq!(db.store.erasable(None, 9).await.unwrap(), [(tenant, parent)]);
    db.store.remove_erased(&[parent]).await.unwrap();
    assert_eq!(db.store.erasable(None, 9).await.unwrap(), []);
}

async fn a_deleted_training_takes_no_more_samples(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    for _ in 0..20 {
        let parent = db.trained(tenant).await.id;
        let mut racers = JoinSet::new();
        for _ in 0..8 {
            let (store, new) = (db.store.clone(), sample(tenant, parent));
            racers.spawn(async move { store.submit(new).await.unwrap() });
        }
        assert!(db.store.delete(tenant, parent).await.unwrap());
        for answer in racers.join_all().await {
            assert!(matches!(answer, Submitted::New(_) | Submitted::NoParent(None)), "{answer:?}");
        }
        let left = Filter { parent: Some(parent), ..Filter::default() };
        assert_eq!(db.store.list(tenant, &left, None, 9).await.unwrap(), [], "the deletion took them all");
        assert_eq!(db.claim().await, None);
    }
}

async fn obsolete_checkpoints_are_listed_until_they_are_forgotten(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    let lease = db.claim().await.unwrap().lease();
    db.store.commit_checkpoint(lease, &checkpoint(5)).await.unwrap();
    assert_eq!(db.store.obsolete_checkpoints(None, 9).await.unwrap(), []);
    db.store.forget_checkpoint(id).await.unwrap();
    db.store.release(lease).await.unwrap();
    assert_eq!(db.store.obsolete_checkpoints(None, 9).await.unwrap(), [], "a further attempt needs it");
    db.store.cancel(tenant, id).await.unwrap();
    assert_eq!(db.store.obsolete_checkpoints(None, 9).await.unwrap(), [(id, checkpoint(5))]);
    db.store.forget_checkpoint(id).await.unwrap();
    assert_eq!(db.store.obsolete_checkpoints(None, 9).await.unwrap(), []);
}

async fn the_first_class_image_stays(db: TestDatabase) {
    let [tenant, other] = [db.tenant("a").await, db.tenant("b").await];
    let [first, second] = [object("first"), object("second")];
    let top = u64::MAX;
    let add = async |settings: &str, seed: u64, object: &Object, instead_of: Option<&Object>| {
        db.store.add_class_image(tenant, settings, seed, object, instead_of).await.unwrap()
    };
    assert_eq!(add("s", top, &first, None).await, first.key);
    assert_eq!(add("s", top, &second, None).await, first.key);
    assert_eq!(add("s", 1, &second, None).await, second.key);
    assert_eq!(add("t", 1, &second, None).await, second.key);
    let mut found = db.store.class_images(tenant, "s").await.unwrap();
    found.sort_by_key(|(seed, _)| *seed);
    assert_eq!(found, [(1, second.clone()), (top, first.clone())]);
    // Unless it is the one that the store no longer has whole.
    assert_eq!(add("s", top, &second, Some(&second)).await, first.key);
    let damaged = Object { sha256: "11".repeat(32), ..first.clone() };
    assert_eq!(add("s", top, &second, Some(&damaged)).await, first.key, "it was replaced meanwhile");
    assert_eq!(add("s", top, &second, Some(&first)).await, second.key);
    assert_eq!(add("s", top, &second, Some(&first)).await, second.key, "again, its answer was lost");
    assert_eq!(db.store.class_images(other, "s").await.unwrap(), []);
}

async fn lists_are_filtered_and_paginated(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let parent = db.trained(tenant).await;
    let mut trainings = vec![parent.id];
    let mut samples = Vec::new();
    for i in 0..5 {
        let mut new = training(tenant);
        if i == 3 {
            new.spec = Spec::Train(Box::new(TrainSpec::new("chair", TrainOptions::default(), 7).unwrap()));
        }
        trainings.push(db.accept(new).await.id);
        samples.push(db.accept(sample(tenant, parent.id)).await.id);
    }
    trainings.reverse();
    samples.reverse();
    let ids = async |filter: Filter, before: Option<JobId>, limit: u32| -> Vec<JobId> {
        let jobs = db.store.list(tenant, &filter, before, limit).await.unwrap();
        jobs.iter().map(|job| job.id).collect()
    };
    let of = |kind| Filter { kind: Some(kind), ..Filter::default() };
    assert_eq!(ids(of(Kind::Train), None, 100).await, trainings);
    assert_eq!(ids(of(Kind::Sample), None, 100).await, samples);
    assert_eq!(ids(Filter::default(), None, 100).await.len(), 11);
    let mut pages = Vec::new();
    while let page @ [_, ..] = &ids(of(Kind::Train), pages.last().copied(), 2).await[..] {
        assert!(page.len() <= 2);
        pages.extend_from_slice(page);
    }
    assert_eq!(pages, trainings);
    let done = Filter { state: Some(State::Succeeded), ..Filter::default() };
    assert_eq!(ids(done, None, 9).await, [parent.id]);
    let chairs = Filter { class_name: Some("chair".into()), ..Filter::default() };
    assert_eq!(ids(chairs, None, 9).await, [trainings[1]]);
    let drawn = Filter { parent: Some(parent.id), state: Some(State::Queued), ..of(Kind::Sample) };
    assert_eq!(ids(drawn, Some(samples[1]), 9).await, samples[2..]);
    let drawn = Filter { parent: Some(parent.id), ..of(Kind::Train) };
    assert_eq!(ids(drawn, None, 9).await, [], "trainings are drawn with none");
    let later = |ms| Filter { created_after_ms: Some(ms), ..Filter::default() };
    assert_eq!(ids(later(parent.created_ms - 1), None, 99).await.len(), 11);
    db.sql(&format!("update job set created_ms = created_ms + 9999999 where id = '{}'", samples[0])).await;
    assert_eq!(ids(later(parent.created_ms + 9_000_000), None, 99).await, [samples[0]]);
}

// case 33: as far as the store goes
async fn another_tenants_rows_are_invisible(db: TestDatabase) {
    let [owner, stranger] = [db.tenant("owner").await, db.tenant("stranger").await];
    let done = db.trained(owner).await;
    let drawn = db.accept(sample(owner, done.id)).await;
    let new = NewJob { idempotency: Some(named("order-1", "abc")), ..training(owner) };
    let waiting = db.accept(new.clone()).await;
    db.store.add_class_image(owner, "s", 1, &object("class"), None).await.unwrap();
    let store = &db.store;
    for job in [&done, &drawn, &waiting] {
        for kind in Kind::ALL {
            assert_eq!(store.find(stranger, job.id, *kind).await.unwrap(), None);
        }
        assert_eq!(store.version(stranger, job.id).await.unwrap(), None);
        assert_eq!(store.artifacts(stranger, job.id).await.unwrap(), []);
        assert_eq!(store.artifact(stranger, job.id, "weights").await.unwrap(), None);
        assert_eq!(store.cancel(stranger, job.id).await.unwrap(), None);
        assert!(!store.delete(stranger, job.id).await.unwrap());
        let forged = Job { tenant: stranger, ..job.clone() };
        assert_eq!(store.queue_place(&forged).await.unwrap().map(|place| place.position), None);
        assert_eq!(
            store.find(owner, job.id, job.kind).await.unwrap().as_ref(),
            Some(job),
            "it was left alone"
        );
    }
    let filter = Filter { parent: Some(done.id), ..Filter::default() };
    for filter in [Filter::default(), filter] {
        assert_eq!(store.list(stranger, &filter, None, 99).await.unwrap(), []);
    }
    assert_eq!(store.replay(stranger, &new.idempotency.unwrap()).await.unwrap(), None);
    assert_eq!(store.class_images(stranger, "s").await.unwrap(), []);
}

// case 32, 52: as far as the store goes
async fn keys_are_valid_until_they_expire_or_are_revoked(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    assert_eq!(db.tenant("shop").await, tenant, "the same name is the same tenant");
    let key = |id: &str, expires_ms| NewKey {
        id: id.into(),
        tenant,
        name: "backend".into(),
        hash: "ab".repeat(32),
        scope: Scope::Write,
        expires_ms,
    };
    db.store.create_key(&key("k1", None)).await.unwrap();
    db.store.create_key(&key("k2", Some(1))).await.unwrap();
    db.store.create_key(&key("k3", Some(i64::MAX))).await.unwrap();
    let twice = db.store.create_key(&key("k1", None)).await;
    assert!(matches!(twice, Err(Error::Corrupt(_))), "{twice:?}");
    let live = async |id: &str| db.store.find_key(id).await.unwrap().map(|key| key.live);
    assert_eq!([live("k1").await, live("k2").await, live("k3").await], [Some(true), Some(false), Some(true)]);
    assert_eq!(live("k4").await, None);
    let found = db.store.find_key("k1").await.unwrap().unwrap();
    assert_eq!((found.tenant, found.scope, found.hash), (tenant, Scope::Write, "ab".repeat(32)));
    assert!(db.store.revoke_key("k1").await.unwrap());
    assert!(!db.store.revoke_key("k1").await.unwrap(), "it is already");
    assert_eq!(live("k1").await, Some(false));
    let all: Vec<String> = db.store.list_keys().await.unwrap().into_iter().map(|key| key.id).collect();
    assert_eq!(all, ["k1", "k2", "k3"]);
    let names: Vec<String> =
        db.store.tenants().await.unwrap().into_iter().map(|tenant| tenant.name).collect();
    assert_eq!(names, ["local", "shop"]);
    assert_eq!(db.store.tenants().await.unwrap()[0].id, TenantId::LOCAL);
}

// case A15
async fn keys_of_the_first_schema_stay_valid_and_admin_keys_can_be_created(db: TestDatabase) {
    let tenant = TenantId::new();
    let rows = format!(
        "insert into tenant (id, name, created_ms) values ('{tenant}', 'shop', 5);
        insert into api_key (id, tenant, name, hash, scope, created_ms, expires_ms, revoked_ms) values
            ('k1', '{tenant}', 'front', 'h1', 'read', 6, null, null),
            ('k2', '{tenant}', 'back', 'h2', 'write', 7, 8, 9),
            ('k3', '{tenant}', '', 'h3', 'write', 10, {}, null);",
        i64::MAX
    );
    let old = db;
    old.back_to_the_first_schema().await;
    old.sql(&rows).await;
    assert!(matches!(old.store.check_schema().await, Err(Error::Schema(line)) if line.contains("older")));
    old.store.migrate().await.unwrap();
    old.store.check_schema().await.unwrap();
    let keys = old.store.list_keys().await.unwrap();
    let seen: Vec<_> = keys
        .iter()
        .map(|key| {
            (
                key.id.as_str(),
                key.name.as_str(),
                key.hash.as_str(),
                key.scope,
                key.created_ms,
                key.expires_ms,
                key.revoked_ms,
            )
        })
        .collect();
    let wanted = [
        ("k1", "front", "h1", Scope::Read, 6, None, None),
        ("k2", "back", "h2", Scope::Write, 7, Some(8), Some(9)),
        ("k3", "", "h3", Scope::Write, 10, Some(i64::MAX), None),
    ];
    assert_eq!(seen, wanted);
    assert!(keys.iter().all(|key| key.tenant == tenant));
    assert_eq!(keys.iter().map(|key| key.live).collect::<Vec<_>>(), [true, false, true]);
    let operator = NewKey {
        id: "k4".into(),
        tenant,
        name: "prometheus".into(),
        hash: "h4".into(),
        scope: Scope::Admin,
        expires_ms: None,
    };
    old.store.create_key(&operator).await.unwrap();
    let found = old.store.find_key("k4").await.unwrap().unwrap();
    assert!(found.scope.covers(Scope::Write) && found.left_ms.is_none());
    let stranger = NewKey { id: "k5".into(), tenant: TenantId::new(), ..operator };
    assert!(old.store.create_key(&stranger).await.is_err(), "a key is a tenant's");
    let scopes = Scope::ALL;
    for (n, scope) in scopes.iter().enumerate() {
        let covered: Vec<_> = scopes.iter().filter(|wanted| scope.covers(**wanted)).collect();
        assert_eq!(covered, scopes[..=n].iter().collect::<Vec<_>>());
    }
}

async fn gauges_count_what_waits_and_what_runs(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let parent = db.trained(tenant).await.id;
    db.accept(training(tenant)).await;
    db.claim().await.unwrap();
    db.accept(training(tenant)).await;
    db.accept(sample(tenant, parent)).await;
    db.accept(sample(tenant, parent)).await;
    db.sql("update job set created_ms = created_ms - 5000 where state = 'queued' and kind = 'sample'").await;
    let gauges = db.store.gauges().await.unwrap().kinds;
    let counts: Vec<_> = gauges.iter().map(|gauge| (gauge.kind, gauge.queued, gauge.running)).collect();
    assert_eq!(counts, [(Kind::Train, 1, 1), (Kind::Sample, 2, 0)]);
    assert!(gauges[1].oldest_queued_ms >= 5000);
}

async fn a_submission_notifies_subscribers(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let mut here = db.store.subscribe();
    db.accept(training(tenant)).await;
    notified(&mut here).await;
    let job = db.claim().await.unwrap();
    db.store.cancel(tenant, job.id).await.unwrap();
    notified(&mut here).await;
    if db.url.starts_with("postgres") {
        // Its listener says so when it listens; what is said after that is heard.
        let other = db.another().await;
        let mut there = other.subscribe();
        notified(&mut there).await;
        db.accept(training(tenant)).await;
        notified(&mut there).await;
    }
}

// case 53
async fn two_migrations_at_once_are_one(db: TestDatabase) {
    db.clear().await;
    let mut racers = JoinSet::new();
    for _ in 0..8 {
        let store = db.another().await;
        racers.spawn(async move { store.migrate().await });
    }
    for done in racers.join_all().await {
        done.unwrap();
    }
    db.store.check_schema().await.unwrap();
    db.store.migrate().await.unwrap();
    let tenant = db.tenant("shop").await;
    db.accept(training(tenant)).await;
}

// case 53
async fn a_schema_of_another_version_is_refused(db: TestDatabase) {
    let refusal = async || match db.store.check_schema().await {
        Err(Error::Schema(line)) => line,
        other => panic!("{other:?}"),
    };
    db.store.check_schema().await.unwrap();
    db.sql(
        "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
            values (9999, 'of tomorrow', true, 'x', 0)",
    )
    .await;
    assert!(refusal().await.contains("newer than this program"), "{}", refusal().await);
    assert!(matches!(db.store.migrate().await, Err(Error::Schema(line)) if line.contains("newer")));
    db.sql("delete from _sqlx_migrations where version = 9999").await;
    db.store.check_schema().await.unwrap();
    db.sql("update _sqlx_migrations set checksum = 'x'").await;
    assert!(refusal().await.contains("another build"), "{}", refusal().await);
    db.sql("delete from _sqlx_migrations").await;
    assert!(refusal().await.contains("older than this program: run `hypnos migrate`"), "{}", refusal().await);
    db.sql("drop table _sqlx_migrations").await;
    assert!(refusal().await.contains("hypnos migrate"), "{}", refusal().await);
}

/// What a step of the wall clock by an hour would make of the rows: their times are an hour ago.
const AN_HOUR_LATER: &str =
    "update job set lease_until_ms = lease_until_ms - 3600000, deadline_ms = deadline_ms - 3600000";

async fn a_step_of_the_wall_clock_ends_no_lease_where_there_is_a_boot_clock(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    db.accept(training(tenant)).await;
    let lease = db.claim().await.unwrap().lease();
    let rescue = async || db.store.rescue().await.unwrap();
    assert_eq!(rescue().await, Rescued::default());
    db.sql(AN_HOUR_LATER).await;
    if db.dir.is_none() {
        // Postgres has one clock, by which all is measured.
        assert_eq!(rescue().await.requeued, 1);
        return;
    }
    assert_eq!(rescue().await, Rescued::default());
    let renewal = db.store.renew(lease, LONG, None).await.unwrap();
    assert_eq!(renewal, Renewal::Held { cancel_requested: false });
    // The time since the start ends it, and so does the next start.
    db.store.renew(lease, NONE, None).await.unwrap();
    assert_eq!(rescue().await.requeued, 1);
    let late = db.store.claim(Uuid::now_v7(), BOTH, LONG, NONE).await.unwrap().unwrap();
    assert_eq!(rescue().await.requeued, 1, "its deadline: {late:?}");
    db.claim().await.unwrap();
    assert_eq!(rescue().await, Rescued::default());
    db.sql("update job set boot = 'another start'").await;
    assert_eq!(rescue().await.failed, 1, "its third attempt");
}

async fn what_a_row_names_is_read_under_its_lock(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let id = db.accept(training(tenant)).await.id;
    assert_eq!(db.store.referenced_keys(id).await.unwrap(), HashSet::new());
    let lease = db.claim().await.unwrap().lease();
    db.store.commit_checkpoint(lease, &checkpoint(7)).await.unwrap();
    db.store.add_artifact(lease, &object("preview-0.png")).await.unwrap();
    let named = [checkpoint(7).object.key, object("preview-0.png").key];
    let version = db.store.version(tenant, id).await.unwrap();
    assert_eq!(db.store.referenced_keys(id).await.unwrap(), named.clone().into());
    assert_eq!(db.store.version(tenant, id).await.unwrap(), version, "nobody sees that it was asked");
    db.store.delete(tenant, id).await.unwrap();
    assert_eq!(db.store.referenced_keys(id).await.unwrap(), named.into(), "as long as the row is there");
    db.store.cancelled(lease).await.unwrap();
    db.store.remove_erased(&[id]).await.unwrap();
    assert_eq!(db.store.referenced_keys(id).await.unwrap(), HashSet::new());
}
