//! The store's operations for operators.

use hypnos::job::State;
use hypnos::store::{AdminFilter, AdminJob, Error, Filter, NewKey, Renewal, Requeued, Scope, TenantState};

use super::*;

on_each! {
    an_operator_sees_every_tenant_s_jobs,
    an_operator_sees_what_a_client_does_not,
    a_requeued_job_is_taken_from_its_worker_at_the_cost_of_no_attempt,
    a_requeued_job_whose_owner_had_canceled_it_is_canceled,
    only_what_runs_is_requeued,
    what_is_paused_is_not_claimed_until_it_is_resumed,
    a_pause_covers_a_tenant_a_kind_or_all,
    nothing_of_a_disabled_tenant_is_accepted_or_claimed,
    a_key_says_whether_its_tenant_is_active,
    a_deleted_tenant_leaves_no_row,
    a_deletion_resumes_wherever_it_was_interrupted,
    the_tenant_of_a_server_without_keys_stays,
    a_database_of_the_first_schema_is_brought_up_to_date,
}

async fn all(db: &TestDatabase, filter: AdminFilter) -> Vec<JobId> {
    db.store.all_jobs(&filter, None, 100).await.unwrap().into_iter().map(|job| job.job.id).collect()
}

async fn see(db: &TestDatabase, id: JobId) -> AdminJob {
    db.store.any_job(id).await.unwrap().expect("a job")
}

async fn an_operator_sees_every_tenant_s_jobs(db: TestDatabase) {
    let [shop, other] = [db.tenant("shop").await, db.tenant("other").await];
    let trained = db.trained(shop).await.id;
    let chair = NewJob {
        spec: Spec::Train(Box::new(TrainSpec::new("chair", TrainOptions::default(), 7).unwrap())),
        ..training(other)
    };
    let chair = db.accept(chair).await.id;
    let drawn = db.accept(sample(shop, trained)).await.id;
    let gone = db.accept(training(other)).await.id;
    assert!(db.store.delete(other, gone).await.unwrap());

    let none = AdminFilter::default;
    assert_eq!(all(&db, none()).await, [gone, drawn, chair, trained], "the newest first");
    assert_eq!(all(&db, AdminFilter { tenant: Some(other), ..none() }).await, [gone, chair]);
    assert_eq!(all(&db, AdminFilter { kind: Some(Kind::Sample), ..none() }).await, [drawn]);
    let states = vec![State::Queued, State::Succeeded];
    assert_eq!(all(&db, AdminFilter { states, ..none() }).await, [drawn, chair, trained]);
    assert_eq!(all(&db, AdminFilter { class_name: Some("chair".into()), ..none() }).await, [chair]);
    assert_eq!(all(&db, AdminFilter { older_than: Some(LONG), ..none() }).await, []);
    db.sql(&format!("update job set created_ms = created_ms - 601000 where id = '{chair}'")).await;
    assert_eq!(all(&db, AdminFilter { older_than: Some(LONG), ..none() }).await, [chair]);

    let page = db.store.all_jobs(&none(), Some(drawn), 1).await.unwrap();
    assert_eq!(page.iter().map(|job| job.job.id).collect::<Vec<_>>(), [chair]);
    assert_eq!(db.store.any_job(JobId::new()).await.unwrap(), None);
}

async fn an_operator_sees_what_a_client_does_not(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let origin = Origin {
        trace: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        ..Origin::default()
    };
    let job = db.accept(NewJob { priority: 4, origin: origin.clone(), ..training(tenant) }).await;
    assert_eq!((job.trace, job.retry_of), (origin.trace, None));
    let queued = see(&db, job.id).await;
    assert_eq!(
        (queued.tenant_name.as_str(), queued.class_name.as_deref(), queued.priority),
        ("shop", Some("mug"), 4)
    );
    assert_eq!((queued.worker.as_deref(), queued.rescues, queued.claimed_ms), (None, 0, None));
    assert!(!queued.deleting && !queued.held_back && queued.retried_as.is_none());

    db.claim_briefly().await.unwrap();
    db.store.rescue().await.unwrap();
    let claimed = db.claim().await.unwrap();
    let running = see(&db, job.id).await;
    assert!(running.worker.is_some() && running.claimed_ms.is_some());
    assert_eq!((running.rescues, running.job.attempt), (1, 2));
    db.store.fail(claimed.lease(), &fault(), None).await.unwrap();

    let again = NewJob { origin: Origin { retry_of: Some(job.id), ..Origin::default() }, ..training(tenant) };
    let again = db.accept(again).await;
    assert_eq!((again.retry_of, see(&db, job.id).await.retried_as), (Some(job.id), Some(again.id)));
    let failed = AdminFilter { states: vec![State::Failed], ..AdminFilter::default() };
    assert_eq!(all(&db, failed.clone()).await, [job.id]);
    assert_eq!(all(&db, AdminFilter { not_retried: true, ..failed }).await, [], "it was retried already");
}

async fn a_requeued_job_is_taken_from_its_worker_at_the_cost_of_no_attempt(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let job = db.accept(training(tenant)).await;
    let claimed = db.claim().await.unwrap();
    let held = claimed.lease();
    db.store.commit_checkpoint(held, &checkpoint(100)).await.unwrap();
    assert_eq!(db.store.requeue(job.id).await.unwrap(), Some(Requeued::Released(State::Queued)));

    let waits = db.train(tenant, job.id).await.unwrap();
    assert_eq!((waits.state, waits.attempt, waits.checkpoint), (State::Queued, 0, Some(checkpoint(100))));
    assert!(waits.version > claimed.version && waits.run_lease > held.run_lease);
    // Whatever its worker still writes counts for nothing, before the next claim and after it.
    for _ in 0..2 {
        assert_eq!(db.store.renew(held, LONG, None).await.unwrap(), Renewal::Lost);
        let finished = db.store.finish(held, &json!({}), &[object("weights")]).await;
        assert!(matches!(finished, Err(Error::LeaseLost)), "{finished:?}");
        let committed = db.store.commit_checkpoint(held, &checkpoint(200)).await;
        assert!(matches!(committed, Err(Error::LeaseLost)), "{committed:?}");
        let _ = db.claim().await;
    }
    let again = db.train(tenant, job.id).await.unwrap();
    assert_eq!((again.state, again.attempt, &again.checkpoint), (State::Running, 1, &Some(checkpoint(100))));
    db.store.finish(again.lease(), &json!({}), &[]).await.unwrap();
}

async fn a_requeued_job_whose_owner_had_canceled_it_is_canceled(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let job = db.accept(training(tenant)).await;
    db.claim().await.unwrap();
    db.store.cancel(tenant, job.id).await.unwrap();
    assert_eq!(db.store.requeue(job.id).await.unwrap(), Some(Requeued::Released(State::Canceled)));
    let ended = db.train(tenant, job.id).await.unwrap();
    assert!(ended.state == State::Canceled && ended.finished_ms.is_some());
    assert!(db.claim().await.is_none());
}

async fn only_what_runs_is_requeued(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let job = db.accept(training(tenant)).await;
    let before = db.train(tenant, job.id).await;
    assert_eq!(db.store.requeue(job.id).await.unwrap(), Some(Requeued::NotRunning(State::Queued)));
    assert_eq!(db.train(tenant, job.id).await, before);
    db.store.cancel(tenant, job.id).await.unwrap();
    assert_eq!(db.store.requeue(job.id).await.unwrap(), Some(Requeued::NotRunning(State::Canceled)));
    assert_eq!(db.store.requeue(JobId::new()).await.unwrap(), None);
}

async fn what_is_paused_is_not_claimed_until_it_is_resumed(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let running = db.accept(training(tenant)).await;
    let held = db.claim().await.unwrap().lease();
    let job = db.accept(training(tenant)).await;
    db.store.pause(None, None, "the power goes at noon").await.unwrap();
    db.store.pause(None, None, "the power goes at one").await.unwrap();
    assert!(db.claim().await.is_none());
    assert!(see(&db, job.id).await.held_back);
    assert_eq!(
        db.store.queue_place(&job).await.unwrap().map(|place| place.position),
        Some(0),
        "its place is what it was"
    );
    // What runs goes on; what comes is accepted.
    assert_eq!(db.store.finish(held, &json!({}), &[]).await.unwrap(), State::Succeeded);
    let drawn = db.accept(sample(tenant, running.id)).await;
    assert!(db.claim().await.is_none());
    let pauses = db.store.pauses().await.unwrap();
    let [pause] = &pauses[..] else { panic!("{pauses:?}") };
    assert_eq!(
        (pause.reason.as_str(), &pause.tenant_name, pause.kind),
        ("the power goes at one", &None, None)
    );

    assert!(!db.store.resume(Some(tenant), None).await.unwrap(), "another pause");
    assert!(db.store.resume(None, None).await.unwrap());
    assert!(!db.store.resume(None, None).await.unwrap(), "there is none any more");
    let mut claimed = [db.claim().await.unwrap().id, db.claim().await.unwrap().id];
    claimed.sort_unstable();
    assert_eq!(claimed, [job.id, drawn.id]);
}

async fn a_pause_covers_a_tenant_a_kind_or_all(db: TestDatabase) {
    let [a, b] = [db.tenant("a").await, db.tenant("b").await];
    let [trained_a, trained_b] = [db.trained(a).await.id, db.trained(b).await.id];
    for tenant in [a, b] {
        db.accept(training(tenant)).await;
    }
    db.accept(sample(a, trained_a)).await;
    db.accept(sample(b, trained_b)).await;
    // Which (tenant, kind) could be claimed, found out by claiming and giving back.
    let open = async || {
        let mut held = Vec::new();
        while let Some(job) = db.claim().await {
            held.push(job);
        }
        let mut found: Vec<(TenantId, &str)> =
            held.iter().map(|job| (job.tenant, job.kind.as_str())).collect();
        for job in held {
            db.store.release(job.lease()).await.unwrap();
        }
        found.sort();
        found
    };
    let every = [(a, "sample"), (a, "train"), (b, "sample"), (b, "train")];
    assert_eq!(open().await, every);
    db.store.pause(Some(a), None, "").await.unwrap();
    assert_eq!(open().await, [(b, "sample"), (b, "train")]);
    db.store.pause(None, Some(Kind::Train), "").await.unwrap();
    assert_eq!(open().await, [(b, "sample")]);
    assert!(db.store.resume(Some(a), None).await.unwrap());
    assert_eq!(open().await, [(a, "sample"), (b, "sample")]);
    db.store.pause(Some(b), Some(Kind::Sample), "").await.unwrap();
    assert_eq!(open().await, [(a, "sample")]);
    assert!(db.store.resume(None, Some(Kind::Train)).await.unwrap());
    assert!(db.store.resume(Some(b), Some(Kind::Sample)).await.unwrap());
    assert_eq!(open().await, every);
}

async fn nothing_of_a_disabled_tenant_is_accepted_or_claimed(db: TestDatabase) {
    let [shop, other] = [db.tenant("shop").await, db.tenant("other").await];
    let running = db.accept(training(shop)).await;
    let held = db.claim().await.unwrap().lease();
    let waits = db.accept(training(shop)).await;
    assert!(db.store.enable_tenant(shop, false).await.unwrap());
    assert_eq!(db.store.submit(training(shop)).await.unwrap(), Submitted::Disabled);
    assert_eq!(db.store.submit(training(TenantId::new())).await.unwrap(), Submitted::Disabled, "nobody's");
    assert!(db.claim().await.is_none());
    let others = db.accept(training(other)).await;
    assert_eq!(db.claim().await.unwrap().id, others.id);
    // What runs goes on to its end.
    assert_eq!(db.store.finish(held, &json!({}), &[]).await.unwrap(), State::Succeeded);
    assert_eq!(db.train(shop, running.id).await.unwrap().state, State::Succeeded);

    assert!(db.store.enable_tenant(shop, true).await.unwrap());
    assert_eq!(db.claim().await.unwrap().id, waits.id);
    db.accept(training(shop)).await;
}

fn key(id: &str, tenant: TenantId) -> NewKey {
    NewKey {
        id: id.into(),
        tenant,
        name: String::new(),
        hash: "00".into(),
        scope: Scope::Write,
        expires_ms: None,
    }
}

async fn a_key_says_whether_its_tenant_is_active(db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    db.store.create_key(&key("k1", tenant)).await.unwrap();
    let state = async || db.store.find_key("k1").await.unwrap().map(|key| (key.live, key.tenant_state));
    assert_eq!(state().await, Some((true, TenantState::Active)));
    db.store.enable_tenant(tenant, false).await.unwrap();
    assert_eq!(state().await, Some((true, TenantState::Disabled)));
    assert_eq!(db.store.holdings(tenant).await.unwrap().keys, 1);
    db.store.delete_tenant(tenant).await.unwrap();
    assert_eq!(state().await, None, "the keys go first");
    assert!(!db.store.enable_tenant(tenant, true).await.unwrap(), "there is no way back");
}

/// Every row that names the tenant, by table.
async fn rows_of(db: &TestDatabase, tenant: TenantId) -> Vec<String> {
    let columns = if db.url.starts_with("sqlite:") {
        "select m.name as name, c.name as part from sqlite_master m join pragma_table_info(m.name) c where m.type = 'table'"
    } else {
        "select table_name as name, column_name as part from information_schema.columns c join information_schema.tables t \
         using (table_schema, table_name) where t.table_type = 'BASE TABLE' and table_schema = 'public'"
    };
    let mut left = Vec::new();
    for (table, column) in db.pairs(columns).await {
        let there =
            format!("select '{table}', '{column}' from {table} where cast({column} as text) = '{tenant}'");
        left.extend(db.pairs(&there).await.into_iter().map(|(table, column)| format!("{table}.{column}")));
    }
    left
}

/// A tenant with something in every table: jobs in each state, artifacts, class images, keys, idempotency, a pause.
async fn with_everything(db: &TestDatabase, name: &str) -> TenantId {
    let tenant = db.tenant(name).await;
    let trained = db.trained(tenant).await.id;
    db.accept(sample(tenant, trained)).await;
    db.claim().await.unwrap();
    let failed = db.accept(training(tenant)).await;
    db.store.fail(db.claim().await.unwrap().lease(), &fault(), None).await.unwrap();
    let origin = Origin { retry_of: Some(failed.id), ..Origin::default() };
    let idempotency = Some(named(&format!("order of {name}"), "abc"));
    db.accept(NewJob { idempotency, origin, ..training(tenant) }).await;
    db.store.create_key(&key(&format!("key of {name}"), tenant)).await.unwrap();
    db.store.add_class_image(tenant, "00ff", 1, &object("1.png"), None).await.unwrap();
    db.store.pause(Some(tenant), None, "").await.unwrap();
    tenant
}

/// Erases all that can be erased, as maintenance does, but for the objects.
async fn erase(db: &TestDatabase) {
    loop {
        let gone = db.store.erasable(None, 100).await.unwrap();
        for (_, id) in &gone {
            db.store.remove_erased(&[*id]).await.unwrap();
        }
        if gone.is_empty() {
            return;
        }
    }
}

async fn a_deleted_tenant_leaves_no_row(db: TestDatabase) {
    let [shop, other] = [with_everything(&db, "shop").await, with_everything(&db, "other").await];
    let (theirs, others) = (rows_of(&db, shop).await, rows_of(&db, other).await);
    assert!(theirs.len() >= 9 && theirs == others, "{theirs:?}");
    let running = AdminFilter { tenant: Some(shop), states: vec![State::Running], ..AdminFilter::default() };
    let running = db.store.all_jobs(&running, None, 10).await.unwrap().remove(0).job;

    db.store.delete_tenant(shop).await.unwrap();
    assert_eq!(db.store.deleting_tenants().await.unwrap(), [shop]);
    assert_eq!(db.store.submit(training(shop)).await.unwrap(), Submitted::Disabled);
    assert_eq!(db.store.delete_jobs_of(shop, 100).await.unwrap(), 4);
    assert_eq!(db.store.delete_jobs_of(other, 100).await.unwrap(), 0, "nobody asked for that");
    erase(&db).await;
    assert!(!db.store.remove_tenant(shop).await.unwrap(), "a worker still has one of its jobs");
    assert!(db.store.list(shop, &Filter::default(), None, 10).await.unwrap().is_empty());
    // Its worker hears that it is to end, and lets go.
    let Renewal::Held { cancel_requested } = db.store.renew(running.lease(), LONG, None).await.unwrap()
    else {
        panic!("the lease is held")
    };
    assert!(cancel_requested);
    db.store.cancelled(running.lease()).await.unwrap();
    erase(&db).await;
    assert!(db.store.remove_tenant(shop).await.unwrap());
    assert_eq!(rows_of(&db, shop).await, [""; 0]);
    assert_eq!(rows_of(&db, other).await, others, "another's are untouched");
    assert!(!db.store.remove_tenant(other).await.unwrap() && !db.store.remove_tenant(shop).await.unwrap());
    assert_ne!(db.tenant("shop").await, shop, "the name is free");
}

async fn a_deletion_resumes_wherever_it_was_interrupted(db: TestDatabase) {
    let shop = with_everything(&db, "shop").await;
    db.sql("update job set lease_until_ms = 0, lease_until_boot_ms = lease_until_boot_ms - 3600000 where state = 'running'").await;
    db.store.delete_tenant(shop).await.unwrap();
    // Every step by a process of its own, which dies after it.
    for step in 0..100 {
        let store = db.another().await;
        for tenant in store.deleting_tenants().await.unwrap() {
            match step % 4 {
                0 => drop(store.delete_jobs_of(tenant, 1).await.unwrap()),
                1 => drop(store.rescue().await.unwrap()),
                2 => {
                    if let Some((_, id)) = store.erasable(None, 1).await.unwrap().first() {
                        store.remove_erased(&[*id]).await.unwrap();
                    }
                }
                _ => drop(store.remove_tenant(tenant).await.unwrap()),
            }
        }
        store.close().await;
        if db.store.deleting_tenants().await.unwrap().is_empty() {
            assert_eq!(rows_of(&db, shop).await, [""; 0]);
            assert!(step > 10, "it took several");
            return;
        }
    }
    panic!("not erased: {:?}", rows_of(&db, shop).await);
}

async fn the_tenant_of_a_server_without_keys_stays(db: TestDatabase) {
    db.accept(training(TenantId::LOCAL)).await;
    let tenant_created_ms = db.store.tenant_created_ms(TenantId::LOCAL).await.unwrap();
    db.store.delete_tenant(TenantId::LOCAL).await.unwrap();
    db.store.delete_jobs_of(TenantId::LOCAL, 10).await.unwrap();
    erase(&db).await;
    assert!(db.store.remove_tenant(TenantId::LOCAL).await.unwrap());
    assert_eq!(db.store.tenant_named("local").await.unwrap().unwrap().state, TenantState::Active);
    // Its photos were written before the tenant's objects were erased, and are not there any more.
    let late =
        NewJob { origin: Origin { tenant_created_ms, ..Origin::default() }, ..training(TenantId::LOCAL) };
    assert_eq!(db.store.submit(late).await.unwrap(), Submitted::Disabled);
    let tenant_created_ms = db.store.tenant_created_ms(TenantId::LOCAL).await.unwrap();
    let now =
        NewJob { origin: Origin { tenant_created_ms, ..Origin::default() }, ..training(TenantId::LOCAL) };
    db.accept(now).await;
}

/// The schema as the first release had it, with a job in each state, brought up to date: nothing is lost, everyone is
/// served.
async fn a_database_of_the_first_schema_is_brought_up_to_date(db: TestDatabase) {
    db.back_to_the_first_schema().await;
    db
        .sql(
            "insert into tenant (id, name, created_ms) values ('0192d3a0-0000-7000-8000-000000000001', 'shop', 1);
            insert into job (id, tenant, kind, class_name, spec, photos, priority, max_attempts, not_before_ms, created_ms)
            values ('0192d3a0-0000-7000-8000-000000000002', '0192d3a0-0000-7000-8000-000000000001', 'train', 'mug', '{}',
                '[]', 0, 3, 0, 2);
            insert into job (id, tenant, kind, class_name, spec, photos, priority, max_attempts, not_before_ms, created_ms,
                state, attempt, error, finished_ms)
            values ('0192d3a0-0000-7000-8000-000000000003', '0192d3a0-0000-7000-8000-000000000001', 'train', 'mug', '{}',
                '[]', 0, 3, 0, 3, 'failed', 1, '{\"code\":\"input\",\"message\":\"x\",\"retryable\":false}', 4)",
        )
        .await;
    db.store.migrate().await.unwrap();
    db.store.check_schema().await.unwrap();
    let shop = db.store.tenant_named("shop").await.unwrap().expect("it is there");
    assert_eq!(shop.state, TenantState::Active);
    let jobs = db.store.all_jobs(&AdminFilter::default(), None, 10).await.unwrap();
    let seen: Vec<_> =
        jobs.iter().map(|job| (job.job.state, job.job.retry_of, job.job.trace.clone())).collect();
    assert_eq!(seen, [(State::Failed, None, None), (State::Queued, None, None)]);
    assert_eq!(db.claim().await.unwrap().tenant, shop.id);
}
