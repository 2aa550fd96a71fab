//! The handle to the store: connections, schema and notifications.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::db::Db;
use super::error::{Error, Result};
use super::fault_injection::{Executor, FaultInjector};
use super::notifier::{Notifier, Subscription};
use super::postgres::Sessions;
use super::schema;
use crate::job::Lease;

/// The server's version, and its clock in milliseconds since 1970.
const SERVER: (&str, &str) = (
    "select sqlite_version() as version, cast(round(unixepoch('subsec') * 1000) as integer) as now_ms",
    "select current_setting('server_version') as version, \
     cast(extract(epoch from clock_timestamp()) * 1000 as bigint) as now_ms",
);

/// What a database server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseServer {
    /// Its version, such as `17.2`.
    pub version: String,
    /// Its clock, in milliseconds since 1970; of a SQLite file this machine's.
    pub now_ms: i64,
}

/// The store. Clones share their connections.
#[derive(Clone, Debug)]
pub struct Store {
    pub(super) db: Db,
    pub(super) notifier: Arc<Notifier>,
    /// Claims whose commit was not answered.
    pub(super) in_doubt: Arc<Mutex<Vec<Lease>>>,
}

impl Store {
    /// Connects, without migrating. `url` is `sqlite:PATH`, a file that is created if needed in an existing directory,
    /// or `postgres://…`. `pool_max` is the maximum number of connections, on SQLite of concurrent readers.
    pub async fn connect(url: &str, pool_max: u32) -> Result<Self> {
        Self::connect_with_direct(url, None, pool_max).await
    }

    /// [`Store::connect`] with a second address of the same database that bypasses a pooler, to listen at.
    pub async fn connect_with_direct(url: &str, direct: Option<&str>, pool_max: u32) -> Result<Self> {
        let db = Db::connect(url, direct, pool_max.max(1)).await?;
        Ok(Self { db, notifier: Arc::default(), in_doubt: Arc::default() })
    }

    /// Whether its sessions are its own or shared by a pooler; none for SQLite, which has no sessions.
    pub fn sessions(&self) -> Option<Sessions> {
        match &self.db {
            Db::Sqlite(_) => None,
            Db::Postgres(server) => Some(server.sessions),
        }
    }

    /// Migrates the schema to this program's version. Concurrent migrations wait for each other.
    pub async fn migrate(&self) -> Result<()> {
        schema::migrate(&self.db).await
    }

    /// Fails if the schema is older or newer than this program's, or missing.
    pub async fn check_schema(&self) -> Result<()> {
        schema::check(&self.db).await
    }

    /// Checks that the database answers.
    pub async fn ping(&self) -> Result<()> {
        self.db.row("select 1", &[]).await.map(drop)
    }

    /// What the database server says of itself.
    pub async fn server(&self) -> Result<DatabaseServer> {
        let row = self.db.row(SERVER, &[]).await?;
        let row = row.ok_or_else(|| Error::Corrupt("the database does not say its version".into()))?;
        Ok(DatabaseServer { version: row.text("version")?.to_owned(), now_ms: row.int("now_ms")? })
    }

    /// Subscribes to notifications of new jobs and of cancels, from this process and, on Postgres without a pooler in
    /// between, from others. They are hints only: subscribers poll once a second as well. Call it within a runtime.
    pub fn subscribe(&self) -> Subscription {
        self.notifier.subscribe(&self.db)
    }

    /// Waits until a job was deleted, or a deleted one ended, in this process: there may be something to erase. A hint
    /// only, for a single waiter.
    pub async fn wait_for_deletion(&self) {
        self.notifier.deletion().await;
    }

    /// Writes a consistent copy of a SQLite database to a new file, and checks the copy.
    pub async fn copy_to(&self, file: &Path) -> Result<()> {
        self.db.copy_to(file).await
    }

    /// The same connections as another process would have them, with statements subject to `faults`: for tests. Other
    /// processes are not listened to; subscribers poll.
    #[must_use]
    pub fn with_faults(&self, faults: Arc<dyn FaultInjector>) -> Self {
        Self {
            db: self.db.with_executor(Executor(Some(faults))),
            notifier: Arc::default(),
            in_doubt: Arc::default(),
        }
    }

    /// Connections in use, including one whose transaction is being rolled back.
    pub fn connections_in_use(&self) -> usize {
        self.db.in_use()
    }

    /// Closes all connections, after their current statements.
    pub async fn close(&self) {
        self.db.close().await;
    }
}
