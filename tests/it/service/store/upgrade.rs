//! Databases of earlier builds: their rows keep working.

use std::borrow::Cow;
use std::path::Path;

use hypnos::job::State;
use hypnos::store::{Error, Rescued};
use sqlx::migrate::{Migration, Migrator};
use sqlx::{AssertSqlSafe, SqlSafeStr};

use super::*;

/// Applies these migrations as the builds before did, by sqlx's own migrator.
async fn migrate_as_before(url: &str, versions: &[i64]) {
    migrate_with(url, versions, |text| text).await;
}

/// The same, each migration's text changed.
async fn migrate_with(url: &str, versions: &[i64], change: impl Fn(String) -> String) {
    let kind = if url.starts_with("sqlite:") { "sqlite" } else { "postgres" };
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(kind);
    let mut migrator = Migrator::new(directory).await.unwrap();
    let kept = migrator.migrations.iter().filter(|one| versions.contains(&one.version)).map(|one| {
        let sql = AssertSqlSafe(change(one.sql.as_str().to_owned())).into_sql_str();
        Migration::new(one.version, one.description.clone(), one.migration_type, sql, one.no_tx)
    });
    migrator.migrations = Cow::Owned(kept.collect());
    assert_eq!(migrator.migrations.len(), versions.len());
    if kind == "sqlite" {
        let options: sqlx::sqlite::SqliteConnectOptions = url.parse().unwrap();
        let pool = sqlx::SqlitePool::connect_with(options.create_if_missing(true)).await.unwrap();
        migrator.run(&pool).await.unwrap();
        pool.close().await;
    } else {
        let mut connection = PgConnection::connect(url).await.unwrap();
        migrator.run(&mut connection).await.unwrap();
    }
}

/// Rows as build a18987a left them: one that waits, one that ran and whose worker is gone, one whose worker is alive.
async fn of_the_first_build(url: String) {
    migrate_as_before(&url, &[1]).await;
    let store = Store::connect(&url, 4).await.unwrap();
    match store.check_schema().await {
        Err(Error::Schema(line)) => assert!(line.contains("run `hypnos migrate`"), "{line}"),
        other => panic!("{other:?}"),
    }
    let db = TestDatabase { url, direct: None, store, dir: None, _bouncer: None };
    let ids = [JobId::new(), JobId::new(), JobId::new()];
    let spec = json!({"kind": "train", "class_name": "mug", "seed": 7, "options": TrainOptions::default()});
    for (id, running) in ids.iter().zip([None, Some(-1000), Some(600_000)]) {
        let (state, attempt, worker, times) = match running {
            None => ("queued", 0, "null".to_owned(), "null, null, null, null".to_owned()),
            Some(left) => {
                ("running", 1, format!("'{}'", Uuid::now_v7()), format!("ms + {left}, ms + 3600000, ms, ms"))
            }
        };
        let insert = format!(
            "insert into job (id, tenant, kind, class_name, spec, photos, priority, state, run_lease, attempt,
                max_attempts, not_before_ms, created_ms, worker, lease_until_ms, deadline_ms, claimed_ms, started_ms)
             select '{id}', '{}', 'train', 'mug', '{spec}', '[]', 0, '{state}', {attempt}, {attempt}, 3, ms, ms,
                {worker}, {times} from clock",
            TenantId::LOCAL
        );
        db.sql(&insert).await;
    }
    db.store.migrate().await.unwrap();
    db.store.check_schema().await.unwrap();
    let state = async |id| db.train(TenantId::LOCAL, id).await.unwrap().state;
    assert_eq!(db.store.rescue().await.unwrap(), Rescued { requeued: 1, ..Rescued::default() });
    assert_eq!(state(ids[1]).await, State::Queued, "its lease was over");
    assert_eq!(state(ids[2]).await, State::Running, "the build before still holds it");
    db.sql(&format!("update job set lease_until_ms = lease_until_ms - 700000 where id = '{}'", ids[2])).await;
    assert_eq!(db.store.rescue().await.unwrap(), Rescued { requeued: 1, ..Rescued::default() });
    for _ in 0..3 {
        let lease = db.claim().await.unwrap().lease();
        assert_eq!(db.store.finish(lease, &json!({}), &[]).await.unwrap(), State::Succeeded);
    }
    // What sqlx's migrator wrote down is what ours writes, and the reverse.
    migrate_as_before(&db.url, &(1..=newest()).collect::<Vec<_>>()).await;
}

/// A database remembers the text of each migration that was applied to it: one that changes is refused there.
#[tokio::test]
async fn a_migration_that_was_published_never_changes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let published = std::fs::read_to_string(root.join("tests/golden/migrations.sha384")).unwrap();
    let mut found = Vec::new();
    for kind in ["postgres", "sqlite"] {
        let migrator = Migrator::new(root.join("migrations").join(kind)).await.unwrap();
        found.extend(migrator.iter().map(|one| {
            format!(
                "{}  {kind}/{:04}_{}.sql",
                monitoring::hex(&one.checksum),
                one.version,
                one.description.replace(' ', "_")
            )
        }));
    }
    let published: Vec<&str> = published.lines().collect();
    let how = "a change is a migration of its own, which adds its line: (cd migrations && sha384sum */*.sql)";
    assert_eq!(found, published, "{how}");
}

/// The newest migration.
fn newest() -> i64 {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations/sqlite");
    std::fs::read_dir(directory).unwrap().count() as i64
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_of_the_first_build_is_brought_up_to_date_with_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    of_the_first_build(format!("sqlite:{}/hypnos.db", dir.path().display())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_of_the_first_build_is_brought_up_to_date_with_its_rows() {
    of_the_first_build(Postgres::database().await).await;
}

/// A build between had the migrations 1, 3 and 6: the others come after them.
async fn of_a_build_between(url: String) {
    migrate_as_before(&url, &[1, 3, 6]).await;
    let store = Store::connect(&url, 4).await.unwrap();
    let db = TestDatabase { url, direct: None, store, dir: None, _bouncer: None };
    db.store.migrate().await.unwrap();
    db.store.check_schema().await.unwrap();
    let tenant = db.tenant("shop").await;
    db.accept(training(tenant)).await;
    let lease = db.claim().await.unwrap().lease();
    assert_eq!(db.store.finish(lease, &json!({}), &[]).await.unwrap(), State::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_of_an_intermediate_build_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    of_a_build_between(format!("sqlite:{}/hypnos.db", dir.path().display())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_of_an_intermediate_build_is_brought_up_to_date() {
    of_a_build_between(Postgres::database().await).await;
}

/// A build had migration 9 without the first of its columns.
async fn of_the_build_with_another_ninth_migration(url: String) {
    let without_parts = |text: String| {
        let mut paragraphs: Vec<&str> = text.split_inclusive("\n\n").collect();
        paragraphs.retain(|paragraph| !paragraph.contains("alter table model add column parts"));
        paragraphs.concat()
    };
    migrate_with(&url, &(1..=9).collect::<Vec<_>>(), without_parts).await;
    let store = Store::connect(&url, 4).await.unwrap();
    match store.check_schema().await {
        Err(Error::Schema(line)) => assert!(line.contains("run `hypnos migrate`"), "{line}"),
        other => panic!("{other:?}"),
    }
    store.migrate().await.unwrap();
    store.check_schema().await.unwrap();
    // The texts that sqlx finds recorded are those of now.
    migrate_as_before(&url, &(1..=newest()).collect::<Vec<_>>()).await;
    let db = TestDatabase { url, direct: None, store, dir: None, _bouncer: None };
    db.sql("update model set parts = parts").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_with_another_ninth_migration_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    of_the_build_with_another_ninth_migration(format!("sqlite:{}/hypnos.db", dir.path().display())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_with_another_ninth_migration_is_brought_up_to_date() {
    of_the_build_with_another_ninth_migration(Postgres::database().await).await;
}

/// A database that was made at the newest version and one that was brought there are the same, column for column.
#[tokio::test(flavor = "multi_thread")]
async fn both_databases_have_the_same_columns() {
    let columns = async |db: &TestDatabase, select: &'static str| -> Vec<String> {
        if db.url.starts_with("sqlite:") {
            let mut connection = SqliteConnection::connect(&db.url).await.unwrap();
            sqlx::query_scalar(select).fetch_all(&mut connection).await.unwrap()
        } else {
            let mut connection = PgConnection::connect(&db.url).await.unwrap();
            sqlx::query_scalar(select).fetch_all(&mut connection).await.unwrap()
        }
    };
    let (sqlite, postgres) = (TestDatabase::sqlite().await, TestDatabase::postgres().await);
    let sqlite = columns(
        &sqlite,
        "select m.name || '.' || c.name || case when c.type in ('INTEGER', 'integer') then ' number' else ' text' end
            || case when c.\"notnull\" then ' not null' else '' end
         from sqlite_master m join pragma_table_info(m.name) c
         where m.type = 'table' and m.name not like '\\_sqlx%' escape '\\' order by 1",
    );
    let postgres = columns(
        &postgres,
        "select (table_name || '.' || column_name || case data_type when 'bigint' then ' number' else ' text' end
            || case is_nullable when 'NO' then ' not null' else '' end)::text collate \"C\"
         from information_schema.columns where table_schema = 'public' and table_name not in ('clock', 'held_back')
            and table_name not like '\\_sqlx%' order by 1",
    );
    assert_eq!(sqlite.await, postgres.await);
}
