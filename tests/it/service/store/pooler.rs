//! Postgres behind a pooler in transaction mode: every transaction runs in another, shared session.

use futures_util::future::join_all;
use hypnos::store::Error;
use sqlx::ConnectOptions;
use sqlx::postgres::PgConnectOptions;
use tokio::task::JoinSet;

use super::super::wire::Wire;
use super::*;

/// A client of the pooler that is none of ours.
async fn stranger(db: &TestDatabase) -> PgConnection {
    let options: PgConnectOptions = db.url.parse().unwrap();
    options.extra_float_digits(None).connect().await.unwrap()
}

/// What `text` says in every session that the pooler has: in several transactions at once.
async fn in_every_session(db: &TestDatabase, text: &'static str) -> Vec<String> {
    let mut clients = join_all((0..4).map(|_| stranger(db))).await;
    let mut found = Vec::new();
    for client in &mut clients {
        sqlx::raw_sql("begin").execute(&mut *client).await.unwrap();
        let row = sqlx::raw_sql(text).fetch_one(&mut *client).await.unwrap();
        found.push(sqlx::Row::get(&row, 0));
    }
    for client in &mut clients {
        sqlx::raw_sql("commit").execute(&mut *client).await.unwrap();
    }
    found
}

// case A7
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_is_detected_at_the_first_connection() {
    let direct = Postgres::database().await;
    let sessions = async |url: &str| Store::connect(url, 2).await.unwrap().sessions();
    assert_eq!(sessions(&direct).await, Some(Sessions::Own));
    for more in [
        "",
        "ignore_startup_parameters = options",
        "ignore_startup_parameters = options,extra_float_digits",
        "pool_mode = session", // cannot be distinguished from the other, and works alike
    ] {
        let bouncer = Bouncer::start(socket_of(&direct), more);
        assert_eq!(sessions(&bouncer.through(&direct)).await, Some(Sessions::Shared), "{more}");
    }
    let sqlite = TestDatabase::sqlite().await;
    assert_eq!(sqlite.store.sessions(), None);
    let bouncer = Bouncer::start(socket_of(&direct), "pool_mode = statement");
    match Store::connect(&bouncer.through(&direct), 2).await {
        Err(Error::InvalidSettings(line)) => {
            assert!(line.contains("statement mode); wanted transaction or"), "{line}");
        }
        other => panic!("{other:?}"),
    }
}

/// An address that leads to Postgres itself, and to a pooler later: nothing runs under another session's statements.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_later_leads_to_a_pooler_is_unavailable_until_a_restart() {
    let db = TestDatabase::postgres().await;
    let tenant = db.tenant("shop").await;
    let wire = Wire::before(socket_of(&db.url)).await;
    let url = wire.through(&db.url);
    let store = Store::connect(&url, 4).await.unwrap();
    assert!(matches!(store.submit(training(tenant)).await, Ok(Submitted::New(_))));
    let bouncer = Bouncer::start(socket_of(&db.url), "ignore_startup_parameters = options");
    wire.lead_to(socket_of(&bouncer.through(&db.url)));
    let kill = "select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid()";
    db.sql(kill).await;
    for _ in 0..3 {
        let refused = store.submit(training(tenant)).await;
        assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    }
    let restarted = Store::connect(&url, 4).await.unwrap();
    assert_eq!(restarted.sessions(), Some(Sessions::Shared));
    assert!(matches!(restarted.submit(training(tenant)).await, Ok(Submitted::New(_))));
}

// case A7
#[tokio::test(flavor = "multi_thread")]
async fn a_direct_address_bypasses_the_pooler_or_is_refused() {
    let db = TestDatabase::pgbouncer().await;
    let direct = db.direct.as_deref().unwrap();
    let tenant = db.tenant("shop").await;
    // Who listens there hears of what is committed through the pooler.
    let other = Store::connect_with_direct(&db.url, Some(direct), 2).await.unwrap();
    let mut hints = other.subscribe();
    notified(&mut hints).await; // it listens
    db.accept(training(tenant)).await;
    notified(&mut hints).await;
    let refusal = async |url: &str, direct: &str| match Store::connect_with_direct(url, Some(direct), 2).await
    {
        Err(Error::InvalidSettings(line)) => line,
        other => panic!("{other:?}"),
    };
    let line = refusal(&db.url, &db.url).await;
    assert!(line.contains("HYPNOS_DATABASE_DIRECT leads to a pooler too"), "{line}");
    let line = refusal(&db.url, "postgres://host:99999/x").await;
    assert!(line.contains("HYPNOS_DATABASE_DIRECT is not a postgres:// URL"), "{line}");
    let sqlite = TestDatabase::sqlite().await;
    let line = refusal(&sqlite.url, direct).await;
    assert!(line.contains("HYPNOS_DATABASE_DIRECT is set, but the database is a SQLite file"), "{line}");
}

// case A7
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_in_shared_sessions() {
    let db = TestDatabase::pgbouncer().await;
    let tenant = db.tenant("shop").await;
    let mut hints = db.store.subscribe();
    for _ in 0..20 {
        db.trained(tenant).await;
    }
    db.store.migrate().await.unwrap();
    db.store.check_schema().await.unwrap();
    db.store.rescue().await.unwrap();
    notified(&mut hints).await;
    let select = "select (select count(*) from pg_prepared_statements where name <> '')
        + (select count(*) from pg_listening_channels())
        + (select count(*) from pg_locks where locktype = 'advisory')
        || current_setting('statement_timeout') || current_setting('lock_timeout')
        || current_setting('idle_in_transaction_session_timeout')";
    assert_eq!(in_every_session(&db, select).await, ["0000"; 4]);
}

// case A7
#[tokio::test(flavor = "multi_thread")]
async fn settings_that_others_left_in_a_session_have_no_effect() {
    let db = TestDatabase::pgbouncer().await;
    let tenant = db.tenant("shop").await;
    // As the build before did: it listened on a session that was not its own.
    in_every_session(&db, "listen hypnos; select ''").await;
    // And statements by the names that a client like ours gives.
    in_every_session(&db, "prepare sqlx_s_1 as select 1; prepare sqlx_s_2 as select 2; select ''").await;
    let submits = (0..40).map(|_| db.store.submit(training(tenant)));
    for answer in join_all(submits).await {
        assert!(matches!(answer, Ok(Submitted::New(_))), "{answer:?}");
    }
    let listening = "select count(*)::text from pg_listening_channels()";
    assert_eq!(
        in_every_session(&db, listening).await,
        ["0"; 4],
        "sessions that do not listen get no notification"
    );
}

// case A7
#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_die_behind_a_pooler_lose_nothing_that_was_acknowledged() {
    let db = TestDatabase::pgbouncer().await;
    let tenant = db.tenant("shop").await;
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let store = db.store.clone();
        clients.spawn(async move {
            let mut accepted = Vec::new();
            for _ in 0..50 {
                let new = training(tenant);
                let id = new.id;
                match store.submit(new).await {
                    Ok(Submitted::New(_)) => accepted.push(id),
                    Err(Error::Unavailable(_) | Error::Unknown(_)) => {}
                    other => panic!("{other:?}"),
                }
            }
            accepted
        });
    }
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let kill = "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()";
        db.sql(kill).await;
    }
    let accepted: Vec<JobId> = clients.join_all().await.concat();
    for &id in &accepted {
        assert!(db.train(tenant, id).await.is_some(), "an accepted job is gone");
    }
    assert!(accepted.len() > 300, "most of them were accepted in spite of it: {}", accepted.len());
    db.accept(training(tenant)).await;
}
