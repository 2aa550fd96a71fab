//! A SQLite file: one connection writes, any number read.

use std::path::Path;
use std::time::Duration;

use sqlx::pool::{PoolConnection, PoolOptions};
use sqlx::sqlite::{
    Sqlite, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use super::error::{Error, Result, classify_connect, is_busy};
use super::fault_injection::Executor;

/// How long a read waits for a connection of the pool.
const ACQUIRE: Duration = Duration::from_secs(2);
/// How long a writer waits for the current writer, in this process and then in others.
const BUSY: Duration = Duration::from_secs(5);
/// How often it tries. SQLite's own busy handler tries only ten times a second, and so starves for seconds beside busy
/// writers.
const BUSY_RETRY: Duration = Duration::from_millis(2);
/// In older versions a reset of the write-ahead log can damage the file.
const VERSION_MIN: &[u32] = &[3, 51, 3];

/// The connections to a SQLite file.
#[derive(Clone, Debug)]
pub(super) struct SqliteFile {
    /// One connection: SQLite has a single writer.
    pub(super) write: SqlitePool,
    pub(super) read: SqlitePool,
    pub(super) executor: Executor,
}

impl SqliteFile {
    pub(super) async fn open(path: &str, readers: u32) -> Result<Self> {
        if path.is_empty() || path == ":memory:" {
            return Err(Error::InvalidSettings("the database's address: sqlite wants a file".into()));
        }
        let common =
            SqliteConnectOptions::new().filename(path).foreign_keys(true).disable_statement_logging();
        let reading = common.clone().read_only(true).busy_timeout(BUSY);
        let writing = common
            .busy_timeout(Duration::ZERO) // see `BUSY_RETRY`
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full); // an accepted job survives a power failure
        // An idle connection costs nothing, and closing the last one would remove the log. A file does not hang up, so
        // that connections need no test before use.
        let pool =
            || PoolOptions::<Sqlite>::new().idle_timeout(None).max_lifetime(None).test_before_acquire(false);
        let write = pool().max_connections(1).acquire_timeout(BUSY).connect_lazy_with(writing);
        let read = pool().max_connections(readers).acquire_timeout(ACQUIRE);
        let read = read.connect_lazy_with(reading);
        let deadline = Instant::now() + BUSY;
        loop {
            // Of the processes that create the file at the same time, all but one find it locked, without waiting.
            match write.acquire().await {
                Err(error) if is_busy(&error) && Instant::now() < deadline => sleep(BUSY_RETRY).await,
                opened => break drop(opened.map_err(classify_connect)?),
            }
        }
        let version: String = sqlx::query_scalar("select sqlite_version()")
            .fetch_one(&write)
            .await
            .map_err(classify_connect)?;
        let numbers: Vec<u32> = version.split('.').filter_map(|number| number.parse().ok()).collect();
        if numbers[..] < *VERSION_MIN {
            return Err(Error::InvalidSettings(format!(
                "this program was built with SQLite {version}, which can lose writes; wanted 3.51.3 or later"
            )));
        }
        Ok(Self { write, read, executor: Executor::default() })
    }

    /// Begins a transaction that writes, once no other connection writes.
    pub(super) async fn begin(&self) -> sqlx::Result<Writer> {
        let mut writer = Writer { connection: Some(self.write.acquire().await?), begun: false };
        let deadline = Instant::now() + BUSY;
        loop {
            writer.begun = true; // even if the answer is lost
            match writer.execute("begin immediate").await {
                Err(error) if is_busy(&error) => {
                    writer.begun = false;
                    if Instant::now() >= deadline {
                        return Err(error);
                    }
                    sleep(BUSY_RETRY).await;
                }
                begun => return begun.map(|()| writer),
            }
        }
    }

    /// Writes a consistent copy to a new file; the result of its integrity check.
    pub(super) async fn copy_to(&self, file: &Path) -> sqlx::Result<String> {
        let mut connection = self.read.acquire().await?;
        sqlx::query("vacuum into ?").bind(file.to_string_lossy()).execute(&mut *connection).await?;
        let options = SqliteConnectOptions::new().filename(file).read_only(true).disable_statement_logging();
        let mut copy = options.connect().await?;
        let check = sqlx::query_scalar("pragma integrity_check(1)").fetch_one(&mut copy).await?;
        copy.close().await?;
        Ok(check)
    }

    pub(super) async fn close(&self) {
        self.read.close().await;
        self.write.close().await; // last, so that it can merge the log into the file
    }
}

/// The connection that writes, in a transaction. Rolled back if it is dropped before its commit.
///
/// Not sqlx's own `Transaction`: SQLite rolls back by itself when the disk is full or fails, and then rejects the
/// rollback that sqlx still sends. sqlx would count one transaction too many from then on, and refuse to begin another.
pub(super) struct Writer {
    connection: Option<PoolConnection<Sqlite>>,
    begun: bool,
}

impl Writer {
    pub(super) fn connection(&mut self) -> &mut SqliteConnection {
        self.connection.as_mut().expect("it is there until the end")
    }

    async fn execute(&mut self, command: &'static str) -> sqlx::Result<()> {
        sqlx::query(command).execute(self.connection()).await.map(drop)
    }

    pub(super) async fn commit(mut self) -> sqlx::Result<()> {
        self.execute("commit").await?;
        self.begun = false;
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if !self.begun {
            return;
        }
        // After whatever the connection still executes: nothing else may write before.
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move {
                if sqlx::query("rollback").execute(&mut *connection).await.is_err() {
                    drop(connection.detach()); // nothing to roll back, or a broken connection: another is opened
                }
            })),
            Err(_) => drop(connection.detach()),
        }
    }
}
