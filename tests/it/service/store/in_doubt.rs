//! In-doubt commits: their outcome is resolved before anything irreversible happens.

use std::path::Path;

use hypnos::job::State;
use hypnos::store::{Error, NewKey, Scope};

use super::super::disk::Disk;
use super::super::postgres::socket_of;
use super::super::test_workers::eventually;
use super::super::wire::{Loss, Wire};
use super::*;

/// A store whose commits pass a wire, and a second store at the same database whose commits do not.
async fn over_a_wire() -> (TestDatabase, Store, Wire) {
    let db = TestDatabase::postgres().await;
    let wire = Wire::before(socket_of(&db.url)).await;
    let store = Store::connect(&wire.through(&db.url), 4).await.unwrap();
    (db, store, wire)
}

const LOSSES: [Loss; 2] = [Loss::Before, Loss::Answer];

#[tokio::test(flavor = "multi_thread")]
async fn a_client_s_write_is_done_once_however_its_answer_was_lost() {
    let (db, store, wire) = over_a_wire().await;
    for loss in LOSSES {
        wire.inject(0, loss);
        let tenant = store.ensure_tenant(&format!("{loss:?}")).await.unwrap();
        assert_eq!(tenant, db.tenant(&format!("{loss:?}")).await);

        let new = NewJob { idempotency: Some(named("order-1", "abc")), ..training(tenant) };
        wire.inject(0, loss);
        let answer = store.submit(new.clone()).await.unwrap();
        assert!(matches!(&answer, Submitted::New(job) if job.id == new.id), "{loss:?}: {answer:?}");
        let same = NewJob { id: JobId::new(), ..new.clone() };
        let answer = store.submit(same).await.unwrap();
        assert!(matches!(answer, Submitted::Replayed(job) if job.id == new.id), "{loss:?}");

        wire.inject(0, loss);
        let canceled = store.cancel(tenant, new.id).await.unwrap().unwrap();
        assert_eq!(canceled.state, State::Canceled, "{loss:?}");
        wire.inject(0, loss);
        assert!(store.delete(tenant, new.id).await.unwrap(), "{loss:?}: there was one");
        assert!(!store.delete(tenant, new.id).await.unwrap());

        let id = format!("{loss:?}");
        let key = NewKey {
            id: id.clone(),
            tenant,
            name: "backend".into(),
            hash: "ab".repeat(32),
            scope: Scope::Write,
            expires_ms: None,
        };
        wire.inject(0, loss);
        store.create_key(&key).await.unwrap();
        assert!(store.find_key(&id).await.unwrap().unwrap().live);
        let other = store.create_key(&NewKey { hash: "cd".repeat(32), ..key }).await;
        assert!(matches!(other, Err(Error::Corrupt(_))), "another key of that id: {other:?}");
        wire.inject(0, loss);
        assert!(store.revoke_key(&id).await.unwrap(), "{loss:?}: there was one to revoke");
        assert!(!store.revoke_key(&id).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_s_write_repeated_after_a_lost_answer_is_done_once() {
    let (db, store, wire) = over_a_wire().await;
    let tenant = db.tenant("shop").await;
    // A row whose lock the server has not given up yet is passed over.
    let claimed = async || {
        for _ in 0..500 {
            if let Some(job) = db.claim().await {
                return job;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("there is a job to claim")
    };
    for loss in LOSSES {
        let unknown = |answer: Result<(), Error>| {
            assert!(matches!(answer, Err(Error::Unknown(_))), "{loss:?}: {answer:?}");
        };
        let row = async |id| db.train(tenant, id).await.unwrap();

        // A claim that nobody knows of is given back at no cost before there is another.
        let id = db.accept(training(tenant)).await.id;
        wire.inject(0, loss);
        let claim = async || store.claim(Uuid::now_v7(), BOTH, LONG, LONG).await;
        unknown(claim().await.map(drop));
        let job = claim().await.unwrap().unwrap();
        assert_eq!((job.id, job.attempt), (id, 1), "{loss:?}");
        assert_eq!(job.run_lease, if loss == Loss::Answer { 2 } else { 1 });
        let lease = job.lease();

        let commit = async |step| store.commit_checkpoint(lease, &checkpoint(step)).await;
        assert_eq!(commit(1).await.unwrap(), None);
        wire.inject(0, loss);
        unknown(commit(2).await.map(drop));
        let before = commit(2).await.unwrap();
        assert_ne!(before, Some(checkpoint(2)), "{loss:?}: what was just written is not the one before");
        assert_eq!(before, (loss == Loss::Before).then(|| checkpoint(1)));
        assert_eq!(row(id).await.checkpoint, Some(checkpoint(2)));

        wire.inject(0, loss);
        unknown(store.add_artifact(lease, &object("preview-0.png")).await);
        store.add_artifact(lease, &object("preview-0.png")).await.unwrap();
        wire.inject(0, loss);
        unknown(store.renew(lease, LONG, None).await.map(drop));
        store.renew(lease, LONG, None).await.unwrap();

        wire.inject(0, loss);
        unknown(store.release(lease).await.map(drop));
        assert_eq!(store.release(lease).await.unwrap(), State::Queued, "{loss:?}");
        assert_eq!(row(id).await.attempt, 0, "{loss:?}: at no cost, and only once");

        let lease = claimed().await.lease();
        wire.inject(0, loss);
        unknown(store.fail(lease, &fault(), Some(NONE)).await.map(drop));
        assert_eq!(store.fail(lease, &fault(), Some(NONE)).await.unwrap(), State::Queued, "{loss:?}");
        assert_eq!(row(id).await.attempt, 1);

        let lease = claimed().await.lease();
        let finish = async || store.finish(lease, &json!({"n": 1}), &[object("weights")]).await;
        wire.inject(0, loss);
        unknown(finish().await.map(drop));
        assert_eq!(finish().await.unwrap(), State::Succeeded, "{loss:?}");
        let (done, shown) = (row(id).await, db.store.artifacts(tenant, id).await.unwrap());
        assert_eq!((done.state, done.result), (State::Succeeded, Some(json!({"n": 1}))));
        assert_eq!(shown, [object("preview-0.png"), object("weights")]);

        let id = db.accept(training(tenant)).await.id;
        let lease = claimed().await.lease();
        db.store.cancel(tenant, id).await.unwrap();
        wire.inject(0, loss);
        unknown(store.cancelled(lease).await);
        store.cancelled(lease).await.unwrap();
        assert_eq!(row(id).await.state, State::Canceled, "{loss:?}");
    }
}

/// A commit that is done while its answer never comes: the connection is given up, and others take its place.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_never_come_use_up_no_connections() {
    let db = TestDatabase::postgres().await;
    let tenants = [db.tenant("a").await, db.tenant("b").await, db.tenant("c").await];
    let wire = Wire::before(socket_of(&db.url)).await;
    let store = Store::connect(&wire.through(&db.url), 3).await.unwrap();
    (0..3).for_each(|nth| wire.inject(nth, Loss::AnswerHangs));
    let submit = async |tenant| store.submit(training(tenant)).await;
    let answers = futures_util::future::join_all(tenants.map(submit)).await;
    for answer in answers {
        assert!(matches!(answer, Ok(Submitted::New(_))), "{answer:?}");
    }
    let answer = submit(tenants[0]).await;
    assert!(matches!(answer, Ok(Submitted::New(_))), "{answer:?}");
}

// case A1
#[tokio::test(flavor = "multi_thread")]
async fn a_submission_that_waits_for_a_standby_is_in_doubt_until_its_commit_is_resolved() {
    let server = Postgres::own();
    let db = TestDatabase::at(server.fresh().await).await;
    let tenant = db.tenant("shop").await;
    server.lose_standby().await;
    let new = training(tenant);
    let answer = db.store.submit(new.clone()).await;
    assert!(matches!(answer, Err(Error::Unknown(_))), "{answer:?}");
    assert_eq!(db.train(tenant, new.id).await, None, "what is not seen is not what is not there");
    // The next submission of that tenant cannot pass the one that is under way.
    let next = db.store.submit(training(tenant)).await;
    assert!(matches!(next, Err(Error::Unavailable(_))), "{next:?}");
    server.find_standby().await;
    let landed = eventually("the commit lands", async || db.train(tenant, new.id).await);
    assert_eq!(landed.await.photos, new.photos);
}

// case A1
#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_waits_for_a_standby_is_in_doubt_until_its_commit_is_resolved() {
    let server = Postgres::own();
    let db = TestDatabase::at(server.fresh().await).await;
    let tenant = db.tenant("shop").await;
    let job = db.accept(training(tenant)).await;
    let lease = db.claim().await.unwrap().lease();
    server.lose_standby().await;
    let finish = async || db.store.finish(lease, &json!({}), &[object("weights")]).await;
    let answer = finish().await;
    assert!(matches!(answer, Err(Error::Unknown(_))), "{answer:?}");
    assert_eq!(db.train(tenant, job.id).await.unwrap().state, State::Running);
    let named = db.store.referenced_keys(job.id).await;
    assert!(matches!(named, Err(Error::Unavailable(_))), "it waits for the lock: {named:?}");
    let again = finish().await;
    assert!(matches!(again, Err(Error::Unavailable(_))), "so does this: {again:?}");
    // Its commit holds a lock that every other with a notification needs, which says so, and is surely not done.
    let other = db.store.submit(training(tenant)).await;
    assert!(matches!(other, Err(Error::Unavailable(_))), "{other:?}");
    server.find_standby().await;
    let landed = async || db.train(tenant, job.id).await.filter(|job| job.state == State::Succeeded);
    eventually("the commit lands", landed).await;
    assert_eq!(db.store.referenced_keys(job.id).await.unwrap(), [object("weights").key].into());
    assert_eq!(finish().await.unwrap(), State::Succeeded);
    assert_eq!(db.store.list(tenant, &hypnos::store::Filter::default(), None, 9).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_terminated_after_its_commit_has_committed() {
    let server = Postgres::own();
    let db = TestDatabase::at(server.fresh().await).await;
    let tenant = db.tenant("shop").await;
    server.lose_standby().await;
    let new = training(tenant);
    let (store, sent) = (db.store.clone(), new.clone());
    let submitting = tokio::spawn(async move { store.submit(sent).await });
    let pid = eventually("it waits for a standby", async || server.waiting_for_standby().await).await;
    let terminate = sqlx::query("select pg_terminate_backend($1)").bind(pid);
    terminate.execute(&mut server.admin().await).await.unwrap();
    let answer = submitting.await.unwrap();
    assert!(matches!(&answer, Ok(Submitted::New(job)) if job.id == new.id), "{answer:?}");
}

// case A1
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_a_slow_disk_delays_is_in_doubt_until_it_is_resolved() {
    let Some(disk) = Disk::under(
        "service::store::in_doubt::a_commit_that_a_slow_disk_delays_is_in_doubt_until_it_is_resolved",
    ) else {
        return;
    };
    let db = TestDatabase::sqlite().await;
    let tenant = db.tenant("shop").await;
    disk.hold();
    let new = NewJob { idempotency: Some(named("order-1", "abc")), ..training(tenant) };
    let answer = db.store.submit(new.clone()).await;
    assert!(matches!(answer, Err(Error::Unknown(_))), "{answer:?}");
    assert_eq!(db.train(tenant, new.id).await, None, "readers go on, and do not see it yet");
    let other = db.store.submit(training(tenant)).await;
    assert!(matches!(other, Err(Error::Unavailable(_))), "the one writer is busy, in words: {other:?}");
    assert!(matches!(db.store.referenced_keys(new.id).await, Err(Error::Unavailable(_))));
    // Another process waits for the file's lock, and says so too.
    let other = db.another().await.submit(training(tenant)).await;
    assert!(matches!(other, Err(Error::Unavailable(_))), "{other:?}");
    disk.mend();
    let landed = eventually("the commit lands", async || db.train(tenant, new.id).await).await;
    let answer = db.store.submit(NewJob { id: JobId::new(), ..new }).await.unwrap();
    assert_eq!(answer, Submitted::Replayed(landed));
    db.accept(training(tenant)).await; // the writer goes on
}

/// The files as a crash at this moment would leave them, opened anew.
async fn after_a_crash(db: &TestDatabase) -> (TestDatabase, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    for suffix in ["", "-wal"] {
        let name = format!("hypnos.db{suffix}");
        let from: &Path = db.dir.as_ref().unwrap().path();
        std::fs::copy(from.join(&name), dir.path().join(&name)).unwrap();
    }
    (TestDatabase::at(format!("sqlite:{}/hypnos.db", dir.path().display())).await, dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_sync_failed_is_in_doubt_and_its_resolution_survives_a_crash() {
    let Some(disk) = Disk::under(
        "service::store::in_doubt::a_commit_whose_sync_failed_is_in_doubt_and_its_resolution_survives_a_crash",
    ) else {
        return;
    };
    let db = TestDatabase::sqlite().await;
    let tenant = db.tenant("shop").await;
    let job = db.accept(training(tenant)).await;
    let lease = db.claim().await.unwrap().lease();
    disk.fail();
    let answer = db.store.finish(lease, &json!({}), &[object("weights")]).await;
    assert!(matches!(answer, Err(Error::Unknown(_))), "{answer:?}");
    assert_eq!(db.train(tenant, job.id).await.unwrap().state, State::Running);
    let (crashed, _dir) = after_a_crash(&db).await;
    let found = crashed.train(tenant, job.id).await.unwrap().state;
    assert_eq!(found, State::Succeeded, "all of it was in the file: a crash would have brought it to life");
    let named = db.store.referenced_keys(job.id).await;
    assert!(named.is_err(), "nothing is settled on such a disk: {named:?}");
    disk.mend();
    assert_eq!(db.store.referenced_keys(job.id).await.unwrap(), [].into(), "now its weights may go");
    let (crashed, _dir) = after_a_crash(&db).await;
    assert_eq!(crashed.train(tenant, job.id).await.unwrap().state, State::Running, "and nothing names them");
    assert_eq!(db.store.finish(lease, &json!({}), &[]).await.unwrap(), State::Succeeded);
}

/// SQLite undoes a transaction by itself when the disk is full or fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_full_or_failed_for_a_while_is_written_again() {
    let name = "service::store::in_doubt::a_disk_that_was_full_or_failed_for_a_while_is_written_again";
    let Some(disk) = Disk::under(name) else { return };
    let db = TestDatabase::sqlite().await;
    let tenant = db.tenant("shop").await;
    for full in [true, false] {
        if full {
            disk.fill();
        } else {
            disk.fail();
        }
        let refused = db.store.submit(training(tenant)).await;
        if full {
            assert!(
                matches!(refused, Err(Error::Unavailable(_))),
                "its own word that nothing was done: {refused:?}"
            );
        } else {
            assert!(matches!(refused, Err(Error::Unknown(_))), "{refused:?}");
        }
        disk.mend();
        db.accept(training(tenant)).await;
        db.accept(training(tenant)).await;
        assert!(db.claim().await.is_some());
    }
}

// case A6
#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_primary_is_unavailable_and_recovers() {
    let server = Postgres::own();
    let db = TestDatabase::at(server.fresh().await).await;
    let tenant = db.tenant("shop").await;
    db.accept(training(tenant)).await;
    let lease = db.claim().await.unwrap().lease();
    server.set("default_transaction_read_only", Some("on")).await;
    let refused = db.store.submit(training(tenant)).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    let refused = db.store.finish(lease, &json!({}), &[]).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    server.set("default_transaction_read_only", None).await;
    let done = eventually("it can be written", async || db.store.finish(lease, &json!({}), &[]).await.ok());
    assert_eq!(done.await, State::Succeeded);
}
