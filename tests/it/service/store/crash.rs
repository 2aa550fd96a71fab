//! The store while the database is unavailable, and its errors.

use std::fs;

use hypnos::job::State;
use hypnos::store::{Error, Filter};
use tokio::task::JoinSet;

use super::super::test_workers::eventually;
use super::*;

/// Submits and works until the database is gone: the jobs that were acknowledged, and those that were said to be done.
async fn until_it_is_gone(store: Store, tenant: TenantId) -> (Vec<JobId>, Vec<JobId>) {
    let (mut accepted, mut done) = (Vec::new(), Vec::new());
    loop {
        let new = training(tenant);
        let id = new.id;
        match store.submit(new).await {
            Ok(_) => accepted.push(id),
            Err(_) => return (accepted, done),
        }
        let Ok(Some(job)) = store.claim(Uuid::now_v7(), BOTH, LONG, LONG).await else {
            return (accepted, done);
        };
        match store.finish(job.lease(), &json!({}), &[object("weights")]).await {
            Ok(_) => done.push(job.id),
            Err(_) => return (accepted, done),
        }
    }
}

/// Every answer that was given holds.
async fn everything_said_holds(db: &TestDatabase, tenant: TenantId, accepted: &[JobId], done: &[JobId]) {
    for &id in accepted {
        assert!(db.train(tenant, id).await.is_some(), "an accepted job is gone");
    }
    for &id in done {
        assert_eq!(db.train(tenant, id).await.unwrap().state, State::Succeeded);
        assert_eq!(db.store.artifacts(tenant, id).await.unwrap(), [object("weights")]);
    }
}

// case 60, 73
#[tokio::test(flavor = "multi_thread")]
async fn a_power_cut_of_postgres_loses_nothing_that_was_acknowledged() {
    let server = Postgres::own();
    let db = TestDatabase::at(server.fresh().await).await;
    a_power_cut_loses_nothing(&server, db).await;
}

// case 60, 73
#[tokio::test(flavor = "multi_thread")]
async fn a_power_cut_behind_a_pooler_loses_nothing_that_was_acknowledged() {
    let server = Postgres::own();
    let direct = server.fresh().await;
    let bouncer = Bouncer::start(socket_of(&direct), "server_login_retry = 1");
    let db = TestDatabase::at(bouncer.through(&direct)).await;
    a_power_cut_loses_nothing(&server, TestDatabase { direct: Some(direct), _bouncer: Some(bouncer), ..db })
        .await;
}

async fn a_power_cut_loses_nothing(server: &Postgres, db: TestDatabase) {
    let tenant = db.tenant("shop").await;
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        clients.spawn(until_it_is_gone(db.store.clone(), tenant));
    }
    while db.store.list(tenant, &Filter::default(), None, 200).await.unwrap().len() < 200 {
        tokio::task::yield_now().await;
    }
    server.cut_power();
    let said = clients.join_all().await;
    let (accepted, done): (Vec<_>, Vec<_>) = said.into_iter().unzip();
    assert!(matches!(db.store.ping().await, Err(Error::Unavailable(_))));
    assert!(matches!(db.store.submit(training(tenant)).await, Err(Error::Unavailable(_))));
    server.start();
    let (accepted, done) = (accepted.concat(), done.concat());
    assert!(accepted.len() > 150 && done.len() > 100, "{} {}", accepted.len(), done.len());
    eventually("it answers again", async || db.store.ping().await.ok()).await;
    everything_said_holds(&db, tenant, &accepted, &done).await;
    db.accept(training(tenant)).await; // the same store goes on
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_killed_are_replaced() {
    let db = TestDatabase::postgres().await;
    let tenant = db.tenant("shop").await;
    let mut hints = db.store.subscribe();
    notified(&mut hints).await; // its listener listens
    let other = db.another().await;
    db.sql(
        "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()",
    )
    .await;
    notified(&mut hints).await; // it listens again, and says so
    db.accept(training(tenant)).await;
    assert!(other.claim(Uuid::now_v7(), BOTH, LONG, LONG).await.unwrap().is_some());
}

// case 60: the files as a crash at this moment would leave them, without what only memory knows
#[tokio::test(flavor = "multi_thread")]
async fn sqlite_s_files_contain_what_was_acknowledged_at_any_moment() {
    let db = TestDatabase::sqlite().await;
    let tenant = db.tenant("shop").await;
    let mut accepted = Vec::new();
    for _ in 0..40 {
        accepted.push(db.accept(training(tenant)).await.id);
    }
    let job = db.claim().await.unwrap();
    db.store.finish(job.lease(), &json!({}), &[object("weights")]).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    for suffix in ["", "-wal"] {
        let name = format!("hypnos.db{suffix}");
        fs::copy(db.dir.as_ref().unwrap().path().join(&name), dir.path().join(&name)).unwrap();
    }
    let after = TestDatabase::at(format!("sqlite:{}/hypnos.db", dir.path().display())).await;
    everything_said_holds(&after, tenant, &accepted, &[job.id]).await;
}

// case 74
#[tokio::test(flavor = "multi_thread")]
async fn sqlite_locked_by_another_process_is_unavailable_and_recovers() {
    let db = TestDatabase::sqlite().await;
    let tenant = db.tenant("shop").await;
    let job = db.accept(training(tenant)).await;
    let mut other = SqliteConnection::connect(&db.url).await.unwrap();
    sqlx::raw_sql("begin immediate").execute(&mut other).await.unwrap();
    let refused = db.store.submit(training(tenant)).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    assert_eq!(db.train(tenant, job.id).await, Some(job), "readers do not mind");
    sqlx::raw_sql("rollback").execute(&mut other).await.unwrap();
    db.accept(training(tenant)).await;
}

// case 74
#[tokio::test(flavor = "multi_thread")]
async fn a_row_locked_in_postgres_is_unavailable_and_not_rescued() {
    let db = TestDatabase::postgres().await;
    let tenant = db.tenant("shop").await;
    db.accept(training(tenant)).await;
    let job = db.claim_briefly().await.unwrap();
    let mut other = PgConnection::connect(&db.url).await.unwrap();
    sqlx::raw_sql("begin; select 1 from job for update").execute(&mut other).await.unwrap();
    assert_eq!(db.store.rescue().await.unwrap().requeued, 0, "it does not wait for the row");
    let refused = db.store.renew(job.lease(), LONG, None).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    sqlx::raw_sql("rollback").execute(&mut other).await.unwrap();
    assert_eq!(db.store.rescue().await.unwrap().requeued, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_cannot_work_are_refused_in_one_line_without_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().display();
    fs::write(dir.path().join("text"), "This is no database. ".repeat(99)).unwrap();
    let postgres = Postgres::database().await;
    let (server, _) = postgres.split_once("/t").unwrap();
    let nowhere = format!("{server}/nowhere{}", &postgres[postgres.find('?').unwrap()..]);
    for (url, wanted) in [
        (String::new(), "wanted sqlite:PATH or postgres://"),
        ("mysql://user:hunter2@host/db".into(), "wanted sqlite:PATH or postgres://"),
        ("sqlite:".into(), "sqlite wants a file"),
        ("sqlite::memory:".into(), "sqlite wants a file"),
        (format!("sqlite:{here}/missing/hypnos.db"), "cannot be opened or created"),
        (format!("sqlite:{here}"), "cannot be opened or created"),
        (format!("sqlite:{here}/text"), "is not a SQLite database"),
        ("postgres://user:hunter2@host:99999/db".into(), "not a postgres:// URL"),
        (nowhere, "no database of that name"),
    ] {
        match Store::connect(&url, 2).await {
            Err(Error::InvalidSettings(line)) => {
                assert!(line.contains(wanted), "{url}: {line}");
                assert!(!line.contains("hunter2") && !line.contains('\n'), "{line}");
            }
            other => panic!("{url}: {other:?}"),
        }
    }
    let away = Store::connect("postgres://user:hunter2@127.0.0.1:1/db", 2).await;
    assert!(matches!(away, Err(Error::Unavailable(_))), "{away:?}");
}
