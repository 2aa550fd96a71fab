//! The schema: brought up to this program, or refused.

use std::collections::BTreeMap;

use sqlx::migrate::{Migrate, MigrateError, Migrator};
use sqlx::{ConnectOptions, Connection};

use super::db::{Db, begin, fault};
use super::{Error, Result};

static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");
static POSTGRES: Migrator = sqlx::migrate!("migrations/postgres");

pub(super) async fn migrate(db: &Db) -> Result<()> {
    match db {
        Db::Sqlite { write, .. } => {
            // sqlx takes no lock on SQLite; the one writer of all processes is lock enough.
            let mut tx = begin(write).await.map_err(fault)?;
            SQLITE.run_direct(None, &mut *tx, false).await.map_err(refusal)?;
            tx.commit().await.map_err(fault)
        }
        Db::Postgres { options, .. } => {
            // Outside of the pool, whose connections may not wait as long as another's migration takes.
            let mut connection = options.connect().await.map_err(fault)?;
            POSTGRES.run_direct(None, &mut connection, false).await.map_err(refusal)?;
            connection.close().await.map_err(fault)
        }
    }
}

pub(super) async fn check(db: &Db) -> Result<()> {
    match db {
        Db::Sqlite { read, .. } => compare(&SQLITE, &mut *read.acquire().await.map_err(fault)?).await,
        Db::Postgres { pool, .. } => compare(&POSTGRES, &mut *pool.acquire().await.map_err(fault)?).await,
    }
}

/// Refuses what is not exactly the schema that `wanted` makes.
async fn compare(wanted: &Migrator, connection: &mut impl Migrate) -> Result<()> {
    let found = connection.list_applied_migrations(&wanted.table_name).await.map_err(refusal)?;
    let found: BTreeMap<_, _> = found.into_iter().map(|one| (one.version, one.checksum)).collect();
    for one in wanted.iter() {
        match found.get(&one.version) {
            None => return Err(older()),
            Some(checksum) if *checksum != one.checksum => return Err(changed(one.version)),
            Some(_) => {}
        }
    }
    match found.keys().find(|&&version| !wanted.version_exists(version)) {
        Some(&version) => Err(newer(version)),
        None => Ok(()),
    }
}

fn refusal(error: MigrateError) -> Error {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => fault(error),
        MigrateError::VersionMissing(version) => newer(version),
        MigrateError::VersionMismatch(version) => changed(version),
        other => Error::Corrupt(other.into()),
    }
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
