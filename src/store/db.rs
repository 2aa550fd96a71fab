//! Two databases as one: statements of text and numbers in, rows of text and numbers out.
//!
//! Most statements are one text for both. Where they must differ, a [`Sql`] holds two.

use std::str::FromStr;
use std::time::Duration;

use sqlx::pool::PoolOptions;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous};
use sqlx::{
    AssertSqlSafe, ConnectOptions, PgPool, Postgres, Row as _, SqlSafeStr, SqlStr, Sqlite, SqlitePool,
    Transaction,
};
use tokio::time::{Instant, sleep, timeout};

use super::{Error, Result};
use crate::job::{JobId, TenantId};

/// How long anybody waits for a connection.
const ACQUIRE: Duration = Duration::from_secs(2);
/// How long a writer of SQLite waits for another to be done, in this process and then in others.
const BUSY: Duration = Duration::from_secs(5);
/// How long one statement may take before the database counts as away.
const ANSWER: Duration = Duration::from_secs(15);
/// Below this, a reset of the write-ahead log can damage the file.
const SQLITE_MIN: &[u32] = &[3, 51, 3];
/// The channel of hints.
pub(super) const CHANNEL: &str = "hypnos";

/// One statement for both databases.
pub(super) struct Sql {
    sqlite: SqlStr,
    postgres: SqlStr,
}

impl From<&'static str> for Sql {
    fn from(text: &'static str) -> Self {
        Self { sqlite: text.into_sql_str(), postgres: text.into_sql_str() }
    }
}

/// SQLite's text and Postgres'.
impl From<(&'static str, &'static str)> for Sql {
    fn from((sqlite, postgres): (&'static str, &'static str)) -> Self {
        Self { sqlite: sqlite.into_sql_str(), postgres: postgres.into_sql_str() }
    }
}

/// A text put together from pieces of this program, never from what came in.
impl From<String> for Sql {
    fn from(text: String) -> Self {
        let text = AssertSqlSafe(text).into_sql_str();
        Self { sqlite: text.clone(), postgres: text }
    }
}

/// The same statement with a row lock at its end where that exists; SQLite's only writer needs none.
macro_rules! locking {
    ($($text:expr),+ ; $lock:literal) => { (concat!($($text),+), concat!($($text),+, " ", $lock)) };
}
pub(super) use locking;

/// A parameter.
#[derive(Clone, Debug)]
pub(super) enum Arg {
    Int(Option<i64>),
    Text(Option<String>),
}

macro_rules! arg {
    ($($from:ty => $variant:ident, |$value:ident| $into:expr;)+) => {
        $(
            impl From<$from> for Arg {
                fn from($value: $from) -> Self {
                    Self::$variant(Some($into))
                }
            }
            impl From<Option<$from>> for Arg {
                fn from(value: Option<$from>) -> Self {
                    Self::$variant(value.map(|$value| $into))
                }
            }
        )+
    };
}

arg! {
    i64 => Int, |value| value;
    bool => Int, |value| i64::from(value);
    Duration => Int, |value| i64::try_from(value.as_millis()).unwrap_or(i64::MAX / 4);
    &str => Text, |value| value.to_owned();
    String => Text, |value| value;
    JobId => Text, |value| value.to_string();
    TenantId => Text, |value| value.to_string();
}

/// The parameters of a statement, in order.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$(crate::store::db::Arg::from($value)),*] };
}
pub(super) use args;

macro_rules! bound {
    ($sql:expr, $args:expr) => {{
        let mut query = sqlx::query($sql);
        for arg in $args {
            query = match arg {
                Arg::Int(value) => query.bind(*value),
                Arg::Text(value) => query.bind(value.clone()),
            };
        }
        query
    }};
}

/// A row of text and numbers.
pub(super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

macro_rules! column {
    ($name:ident, $type:ty) => {
        pub(super) fn $name(&self, column: &str) -> Result<$type> {
            match self {
                Self::Sqlite(row) => row.try_get(column),
                Self::Postgres(row) => row.try_get(column),
            }
            .map_err(fault)
        }
    };
}

impl Row {
    column!(int, i64);
    column!(int_or_none, Option<i64>);
    column!(text, &str);
    column!(text_or_none, Option<&str>);

    pub(super) fn flag(&self, column: &str) -> Result<bool> {
        self.int(column).map(|value| value != 0)
    }

    /// A column that is written as its word.
    pub(super) fn word<T: FromStr>(&self, column: &str) -> Result<T> {
        let text = self.text(column)?;
        text.parse().map_err(|_| Error::Corrupt(format!("column {column} is not what it should be").into()))
    }

    /// The same of a column that may be null.
    pub(super) fn word_or_none<T: FromStr>(&self, column: &str) -> Result<Option<T>> {
        self.text_or_none(column)?.map(|_| self.word(column)).transpose()
    }
}

/// The connections.
#[derive(Clone, Debug)]
pub(super) enum Db {
    /// One connection writes, for SQLite knows but one writer; any number read.
    Sqlite { write: SqlitePool, read: SqlitePool },
    /// And how to open one outside of the pool.
    Postgres { pool: PgPool, options: Box<PgConnectOptions> },
}

impl Db {
    pub(super) async fn connect(url: &str, pool_max: u32) -> Result<Self> {
        match url.split_once(':') {
            Some(("sqlite", path)) => Self::sqlite(path.strip_prefix("//").unwrap_or(path), pool_max).await,
            Some(("postgres" | "postgresql", _)) => Self::postgres(url, pool_max).await,
            _ => Err(Error::Bad("the database's address: wanted sqlite:PATH or postgres://…".into())),
        }
    }

    async fn sqlite(path: &str, readers: u32) -> Result<Self> {
        if path.is_empty() || path == ":memory:" {
            return Err(Error::Bad("the database's address: sqlite wants a file".into()));
        }
        let common =
            SqliteConnectOptions::new().filename(path).foreign_keys(true).disable_statement_logging();
        let reading = common.clone().read_only(true).busy_timeout(BUSY);
        let writing = common
            .busy_timeout(Duration::ZERO) // see `patiently`
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
        patiently(|| write.acquire()).await.map_err(|error| match fault(error) {
            Error::Away(_) => Error::Bad("the database's file cannot be opened or made".into()),
            other => other,
        })?;
        let version: String =
            sqlx::query_scalar("select sqlite_version()").fetch_one(&write).await.map_err(fault)?;
        let numbers: Vec<u32> = version.split('.').filter_map(|number| number.parse().ok()).collect();
        if numbers[..] < *SQLITE_MIN {
            return Err(Error::Bad(format!(
                "this program was built with SQLite {version}, which can lose writes; wanted 3.51.3 or later"
            )));
        }
        Ok(Self::Sqlite { write, read })
    }

    async fn postgres(url: &str, pool_max: u32) -> Result<Self> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|_| Error::Bad("the database's address is not a postgres:// URL".into()))? // it holds a password
            .application_name("hypnos")
            .disable_statement_logging();
        let pool = PoolOptions::<Postgres>::new()
            .max_connections(pool_max)
            .acquire_timeout(ACQUIRE)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    // A worker that is stopped in the middle of a transaction must not hold its rows for ever.
                    let limits = "set statement_timeout = '10s'; set lock_timeout = '5s'; \
                                  set idle_in_transaction_session_timeout = '10s'";
                    sqlx::raw_sql(limits).execute(connection).await.map(drop)
                })
            })
            .connect_lazy_with(options.clone());
        drop(pool.acquire().await.map_err(fault)?);
        Ok(Self::Postgres { pool, options: Box::new(options) })
    }

    /// Rows of a statement that writes nothing.
    pub(super) async fn read(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Vec<Row>> {
        let sql = sql.into();
        answer(async {
            Ok(match self {
                Self::Sqlite { read, .. } => {
                    let rows = bound!(sql.sqlite, args).fetch_all(read).await?;
                    rows.into_iter().map(Row::Sqlite).collect()
                }
                Self::Postgres { pool, .. } => {
                    let rows = bound!(sql.postgres, args).fetch_all(pool).await?;
                    rows.into_iter().map(Row::Postgres).collect()
                }
            })
        })
        .await
    }

    /// The first row, if there is one. Unlike all rows of a statement with one, it comes without another word of the database's
    /// that there are no more: on SQLite that is a change of threads.
    pub(super) async fn row(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Option<Row>> {
        let sql = sql.into();
        answer(async {
            Ok(match self {
                Self::Sqlite { read, .. } => {
                    bound!(sql.sqlite, args).fetch_optional(read).await?.map(Row::Sqlite)
                }
                Self::Postgres { pool, .. } => {
                    bound!(sql.postgres, args).fetch_optional(pool).await?.map(Row::Postgres)
                }
            })
        })
        .await
    }

    /// Begins to write. On SQLite this waits until nobody else does.
    pub(super) async fn begin(&self) -> Result<Tx> {
        answer(async {
            Ok(match self {
                Self::Sqlite { write, .. } => Tx::Sqlite(begin(write).await?),
                Self::Postgres { pool, .. } => Tx::Postgres(pool.begin().await?),
            })
        })
        .await
    }

    /// One statement that writes, and the number of rows that it wrote.
    pub(super) async fn write(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<u64> {
        let mut tx = self.begin().await?;
        let count = tx.run(sql, args).await?;
        tx.commit().await?;
        Ok(count)
    }

    pub(super) async fn close(&self) {
        match self {
            Self::Sqlite { write, read } => {
                read.close().await;
                write.close().await; // last, so that it can fold the log into the file
            }
            Self::Postgres { pool, .. } => pool.close().await,
        }
    }
}

/// The right to write to SQLite's file.
pub(super) async fn begin(write: &SqlitePool) -> sqlx::Result<Transaction<'static, Sqlite>> {
    patiently(|| write.begin_with("begin immediate")).await
}

/// Waits for a lock on SQLite's file. Its own way to wait looks ten times a second only, and so starves for seconds beside
/// busy writers; and it does not wait at all for those who make the file at the same time.
async fn patiently<T, F: Future<Output = sqlx::Result<T>>>(attempt: impl Fn() -> F) -> sqlx::Result<T> {
    let deadline = Instant::now() + BUSY;
    loop {
        match attempt().await {
            Err(error) if is_busy(&error) && Instant::now() < deadline => {
                sleep(Duration::from_millis(2)).await;
            }
            done => return done,
        }
    }
}

/// A transaction. Dropped, it is rolled back.
pub(super) enum Tx {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

impl Tx {
    /// Runs a statement to its end and gives its rows.
    pub(super) async fn rows(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Vec<Row>> {
        let sql = sql.into();
        answer(async {
            Ok(match self {
                Self::Sqlite(tx) => {
                    let rows = bound!(sql.sqlite, args).fetch_all(&mut **tx).await?;
                    rows.into_iter().map(Row::Sqlite).collect()
                }
                Self::Postgres(tx) => {
                    let rows = bound!(sql.postgres, args).fetch_all(&mut **tx).await?;
                    rows.into_iter().map(Row::Postgres).collect()
                }
            })
        })
        .await
    }

    /// The only row, if there is one.
    pub(super) async fn row(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Option<Row>> {
        Ok(self.rows(sql, args).await?.pop())
    }

    /// How many rows a statement wrote.
    pub(super) async fn run(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<u64> {
        let sql = sql.into();
        answer(async {
            Ok(match self {
                Self::Sqlite(tx) => bound!(sql.sqlite, args).execute(&mut **tx).await?.rows_affected(),
                Self::Postgres(tx) => bound!(sql.postgres, args).execute(&mut **tx).await?.rows_affected(),
            })
        })
        .await
    }

    /// Tells other processes, once this is committed, that there is something to look at.
    pub(super) async fn notify(&mut self) -> Result<()> {
        match self {
            Self::Sqlite(_) => Ok(()), // they poll
            Self::Postgres(_) => self.rows("select pg_notify($1, '')", args![CHANNEL]).await.map(drop),
        }
    }

    pub(super) async fn commit(self) -> Result<()> {
        answer(async {
            match self {
                Self::Sqlite(tx) => tx.commit().await,
                Self::Postgres(tx) => tx.commit().await,
            }
        })
        .await
    }
}

/// Waits for the database, but not for ever: a host that vanished never answers.
async fn answer<T>(work: impl Future<Output = sqlx::Result<T>>) -> Result<T> {
    match timeout(ANSWER, work).await {
        Ok(done) => done.map_err(fault),
        Err(_) => Err(Error::Away(format!("no answer within {} s", ANSWER.as_secs()).into())),
    }
}

fn is_busy(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code()?.parse::<u32>().ok());
    code.is_some_and(|code| matches!(code & 0xff, 5 | 6))
}

/// Sorts the database's errors by what can be done about them.
pub(super) fn fault(error: sqlx::Error) -> Error {
    let sqlx::Error::Database(said) = &error else {
        return match error {
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => Error::Away(error.into()),
            _ => Error::Corrupt(error.into()),
        };
    };
    let code = said.code().unwrap_or_default().into_owned();
    if said.try_downcast_ref::<sqlx::postgres::PgDatabaseError>().is_some() {
        return match code.as_str() {
            "42P01" | "42703" => not_migrated(),
            "28000" | "28P01" => Error::Bad("the database refuses its user or password".into()),
            "3D000" => Error::Bad("the database's server has no database of that name".into()),
            "55P03" | "25P03" => Error::Away(error.into()), // lock timeout; cut off while idle
            code => match code.get(..2) {
                // connection, rollback for others' sake, resources, the operator, the system
                Some("08" | "40" | "53" | "57" | "58") => Error::Away(error.into()),
                _ => Error::Corrupt(error.into()),
            },
        };
    }
    match code.parse().unwrap_or(0) & 0xff {
        1 if said.message().starts_with("no such ") => not_migrated(), // a table, a column
        // busy, locked, no memory, read-only, interrupted, I/O, full, cannot open, protocol
        5 | 6 | 7 | 8 | 9 | 10 | 13 | 14 | 15 => Error::Away(error.into()),
        26 => Error::Bad("the database's file is something else".into()),
        _ => Error::Corrupt(error.into()),
    }
}

fn not_migrated() -> Error {
    Error::Schema("the database's schema is not this program's: run `hypnos migrate`".into())
}
