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

use super::answers::Answers;
use super::faults::{is_busy, refusal};
use super::session::ACQUIRE;
use super::{Error, Result};

/// How long a writer waits for another to be done, in this process and then in others.
const BUSY: Duration = Duration::from_secs(5);
/// How often it looks. SQLite's own way to wait looks ten times a second only, and so starves for seconds beside busy writers.
const BUSY_LOOK: Duration = Duration::from_millis(2);
/// Below this, a reset of the write-ahead log can damage the file.
const VERSION_MIN: &[u32] = &[3, 51, 3];

/// The connections to a file.
#[derive(Clone, Debug)]
pub(super) struct File {
    /// One, for SQLite knows but one writer.
    pub(super) write: SqlitePool,
    pub(super) read: SqlitePool,
    pub(super) answers: Answers,
}

impl File {
    pub(super) async fn open(path: &str, readers: u32) -> Result<Self> {
        if path.is_empty() || path == ":memory:" {
            return Err(Error::Bad("the database's address: sqlite wants a file".into()));
        }
        let common =
            SqliteConnectOptions::new().filename(path).foreign_keys(true).disable_statement_logging();
        let reading = common.clone().read_only(true).busy_timeout(BUSY);
        let writing = common
            .busy_timeout(Duration::ZERO) // see `BUSY_LOOK`
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full); // an accepted job survives a power cut
        // An idle connection costs nothing, and the last one to go would take the log with it. A file does not hang up,
        // so that nobody needs to ask it whether it is still there.
        let pool =
            || PoolOptions::<Sqlite>::new().idle_timeout(None).max_lifetime(None).test_before_acquire(false);
        let write = pool().max_connections(1).acquire_timeout(BUSY).connect_lazy_with(writing);
        let read = pool().max_connections(readers).acquire_timeout(ACQUIRE);
        let read = read.connect_lazy_with(reading);
        let deadline = Instant::now() + BUSY;
        loop {
            // Of those who make the file at the same time all but one find it locked, and do not wait.
            match write.acquire().await {
                Err(error) if is_busy(&error) && Instant::now() < deadline => sleep(BUSY_LOOK).await,
                opened => break drop(opened.map_err(refusal)?),
            }
        }
        let version: String =
            sqlx::query_scalar("select sqlite_version()").fetch_one(&write).await.map_err(refusal)?;
        let numbers: Vec<u32> = version.split('.').filter_map(|number| number.parse().ok()).collect();
        if numbers[..] < *VERSION_MIN {
            return Err(Error::Bad(format!(
                "this program was built with SQLite {version}, which can lose writes; wanted 3.51.3 or later"
            )));
        }
        Ok(Self { write, read, answers: Answers::default() })
    }

    /// The right to write, once nobody else has it.
    pub(super) async fn begin(&self) -> sqlx::Result<Writer> {
        let mut writer = Writer { connection: Some(self.write.acquire().await?), begun: false };
        let deadline = Instant::now() + BUSY;
        loop {
            writer.begun = true; // whatever becomes of the answer
            match writer.tell("begin immediate").await {
                Err(error) if is_busy(&error) => {
                    writer.begun = false;
                    if Instant::now() >= deadline {
                        return Err(error);
                    }
                    sleep(BUSY_LOOK).await;
                }
                begun => return begun.map(|()| writer),
            }
        }
    }

    /// Copies all of it to a file that is not there yet, as it is at this moment, and says what a check of the copy finds.
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
        self.write.close().await; // last, so that it can fold the log into the file
    }
}

/// The connection that writes, in a transaction. Dropped before its commit, it is rolled back.
///
/// Not sqlx's own `Transaction`: SQLite undoes one by itself when the disk is full or fails, and then refuses the rollback
/// that sqlx still owes. It would count one transaction too many ever after, and refuse to begin another.
pub(super) struct Writer {
    connection: Option<PoolConnection<Sqlite>>,
    begun: bool,
}

impl Writer {
    pub(super) fn connection(&mut self) -> &mut SqliteConnection {
        self.connection.as_mut().expect("it is there until the end")
    }

    async fn tell(&mut self, command: &'static str) -> sqlx::Result<()> {
        sqlx::query(command).execute(self.connection()).await.map(drop)
    }

    pub(super) async fn commit(mut self) -> sqlx::Result<()> {
        self.tell("commit").await?;
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
        // Behind whatever it may still be at: nobody else may write before.
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move {
                if sqlx::query("rollback").execute(&mut *connection).await.is_err() {
                    drop(connection.detach()); // there was nothing to roll back, or it is broken: another is opened
                }
            })),
            Err(_) => drop(connection.detach()),
        }
    }
}
