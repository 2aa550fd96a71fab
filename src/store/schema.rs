//! The schema: migrations, and the check that it is this program's.

use std::collections::BTreeMap;

use sqlx::migrate::{Migration, Migrator};

use super::db::{Db, Row, args};
use super::error::{Error, Result};
use crate::blobs::hex;

static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");
static POSTGRES: Migrator = sqlx::migrate!("migrations/postgres");

/// The table in which sqlx's own migrator, used by the first builds, records applied migrations. The migrator itself is
/// not used: it locks a session and leaves prepared statements there, which a pooler would hand to other clients.
const TABLE: (&str, &str) = (
    "create table if not exists _sqlx_migrations (version bigint primary key, description text not null, \
     installed_on timestamp not null default current_timestamp, success boolean not null, checksum blob not null, \
     execution_time bigint not null)",
    "create table if not exists _sqlx_migrations (version bigint primary key, description text not null, \
     installed_on timestamptz not null default now(), success boolean not null, checksum bytea not null, \
     execution_time bigint not null)",
);
const APPLIED: (&str, &str) = (
    "select version, lower(hex(checksum)) as checksum from _sqlx_migrations order by version",
    "select version, encode(checksum, 'hex') as checksum from _sqlx_migrations order by version",
);
const APPLY: (&str, &str) = (
    "insert into _sqlx_migrations (version, description, success, checksum, execution_time) \
     values ($1, $2, true, unhex($3), -1) on conflict (version) do update set checksum = excluded.checksum",
    "insert into _sqlx_migrations (version, description, success, checksum, execution_time) \
     values ($1, $2, true, decode($3, 'hex'), -1) on conflict (version) do update set checksum = excluded.checksum",
);

/// A migration that a release had with another text, and what brings that release's databases to the text of now.
struct OtherText {
    version: i64,
    /// Checksum of the other text, for SQLite and for Postgres.
    checksums: [&'static str; 2],
    sql: (&'static str, &'static str),
}

/// The build of 29 November 2026 had migration 9 without the first of its columns.
const OTHER_TEXTS: [OtherText; 1] = [OtherText {
    version: 9,
    checksums: [
        "96ba68004fd0226f07c85b9b02ebd18127a587669ba5c1490a0448f538bc95c71cb1ff835b1408e8bcb871590ba7f193",
        "6afec7cd8962fd1132eabc7173359da436ca78e81dde76f10edcbbffa43813824b408cb8e3b23910f05462e0b71d86d7",
    ],
    sql: (
        "alter table model add column parts integer not null default 0",
        "alter table model add column parts bigint not null default 0",
    ),
}];

/// Migrates the schema to this program's, in one transaction.
pub(super) async fn migrate(db: &Db) -> Result<()> {
    let mut tx = db.begin().await?; // on SQLite no other process writes until it is done
    if let Db::Postgres(_) = db {
        // Migrations may take long, concurrent ones too.
        tx.script("set local statement_timeout = 0; set local lock_timeout = 0").await?;
        let name = tx.row("select current_database()::text as name", &[]).await?;
        let name = name.map_or(Ok(0), |row| row.text("name").map(|name| crc32fast::hash(name.as_bytes())))?;
        // The lock that sqlx's migrator of the first builds takes for its session, so that it waits for this one.
        tx.script(format!("select pg_advisory_xact_lock({})", 0x3d32_ad9e * i64::from(name))).await?;
    }
    tx.script(TABLE).await?;
    let applied = tx.rows(APPLIED, &[]).await?;
    let missing = compare(migrator(db), &applied)?;
    for (migration, step) in &missing {
        match step {
            Step::Apply => tx.script(migration.sql.clone()).await?,
            Step::Amend(sql) => tx.script(*sql).await?,
        }
        let values = args![migration.version, &*migration.description, checksum(migration)];
        tx.run(APPLY, values).await?;
    }
    // If nothing was applied, no commit is needed, which may fail.
    if missing.is_empty() { Ok(()) } else { tx.commit().await }
}

/// Fails if the schema is not exactly this program's.
pub(super) async fn check(db: &Db) -> Result<()> {
    let applied = db.read(APPLIED, &[]).await?;
    if compare(migrator(db), &applied)?.is_empty() { Ok(()) } else { Err(older()) }
}

fn migrator(db: &Db) -> &'static Migrator {
    match db {
        Db::Sqlite(_) => &SQLITE,
        Db::Postgres(_) => &POSTGRES,
    }
}

/// What a migration still needs.
enum Step {
    /// To be applied.
    Apply,
    /// Its other text was applied: this brings the database to the text of now.
    Amend((&'static str, &'static str)),
}

/// The migrations that are not in the database as they are now; fails if another program has applied others.
fn compare<'a>(wanted: &'a Migrator, applied: &[Row]) -> Result<Vec<(&'a Migration, Step)>> {
    let mut found = BTreeMap::new();
    for row in applied {
        found.insert(row.int("version")?, row.text("checksum")?);
    }
    if let Some(&version) = found.keys().find(|&&version| !wanted.version_exists(version)) {
        return Err(newer(version));
    }
    let mut missing = Vec::new();
    for one in wanted.iter() {
        match found.get(&one.version) {
            None => missing.push((one, Step::Apply)),
            Some(&hash) if hash == checksum(one) => {}
            Some(&hash) => {
                let is_other =
                    |text: &&OtherText| text.version == one.version && text.checksums.contains(&hash);
                let other = OTHER_TEXTS.iter().find(is_other).ok_or_else(|| changed(one.version))?;
                missing.push((one, Step::Amend(other.sql)));
            }
        }
    }
    Ok(missing)
}

fn checksum(migration: &Migration) -> String {
    hex(&migration.checksum)
}

fn older() -> Error {
    Error::Schema("the database's schema is older than this program: run `hypnos migrate`".into())
}

fn newer(version: i64) -> Error {
    Error::Schema(format!(
        "the database's schema is newer than this program, which does not know migration {version}: run a newer hypnos"
    ))
}

fn changed(version: i64) -> Error {
    Error::Schema(format!("the database's schema comes from another build: its migration {version} differs"))
}
