//! SQLite and Postgres behind one interface: statements and rows of text and integers.
//!
//! Most statements are the same text for both databases. Where they differ, a [`Sql`] holds two.

use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row as _, SqlSafeStr, SqlStr};

use super::boot_clock::BootTime;
use super::error::{Error, Result, classify, classify_commit};
use super::fault_injection::{Executor, Guard, Statement};
use super::postgres::{PostgresServer, Session, Sessions};
use super::sqlite::{SqliteFile, Writer};
use super::timeout::STATEMENT_TIMEOUT;
use crate::clock;
use crate::job::{JobId, TenantId};

/// How long a read is retried. It changes nothing, and a broken connection is replaced at once.
const READ_RETRY: Duration = Duration::from_secs(3);
/// The channel of notifications.
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

/// The texts for SQLite and for Postgres.
impl From<(&'static str, &'static str)> for Sql {
    fn from((sqlite, postgres): (&'static str, &'static str)) -> Self {
        Self { sqlite: sqlite.into_sql_str(), postgres: postgres.into_sql_str() }
    }
}

impl From<SqlStr> for Sql {
    fn from(text: SqlStr) -> Self {
        Self { sqlite: text.clone(), postgres: text }
    }
}

/// A text composed of constant parts, never of a client's data.
impl From<String> for Sql {
    fn from(text: String) -> Self {
        let text = AssertSqlSafe(text).into_sql_str();
        Self { sqlite: text.clone(), postgres: text }
    }
}

/// A statement with a row lock at its end on Postgres; SQLite's only writer needs none.
macro_rules! locking {
    ($($text:expr),+ ; $lock:literal) => { (concat!($($text),+), concat!($($text),+, " ", $lock)) };
}
pub(super) use locking;

/// A parameter of a statement.
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
    ($sql:expr, $args:expr) => {
        bound!($sql, $args, true)
    };
    ($sql:expr, $args:expr, $keep:expr) => {{
        let mut query = sqlx::query($sql).persistent($keep);
        for arg in $args {
            query = match arg {
                Arg::Int(value) => query.bind(*value),
                Arg::Text(value) => query.bind(value.clone()),
            };
        }
        query
    }};
}

/// A row of text and integers.
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
            .map_err(classify)
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

    /// A text column, parsed.
    pub(super) fn parsed<T: FromStr>(&self, column: &str) -> Result<T> {
        let text = self.text(column)?;
        text.parse().map_err(|_| Error::Corrupt(format!("column {column} holds an invalid value").into()))
    }

    /// A nullable text column, parsed.
    pub(super) fn parsed_or_none<T: FromStr>(&self, column: &str) -> Result<Option<T>> {
        self.text_or_none(column)?.map(|_| self.parsed(column)).transpose()
    }
}

/// The connections to a database.
#[derive(Clone, Debug)]
pub(super) enum Db {
    Sqlite(SqliteFile),
    Postgres(PostgresServer),
}

impl Db {
    /// Connects. `direct` is an address of the same database that bypasses a pooler, if there is one.
    pub(super) async fn connect(url: &str, direct: Option<&str>, pool_max: u32) -> Result<Self> {
        match (url.split_once(':'), direct) {
            (Some(("sqlite", _)), Some(_)) => Err(Error::InvalidSettings(
                "HYPNOS_DATABASE_DIRECT is set, but the database is a SQLite file".into(),
            )),
            (Some(("sqlite", path)), None) => {
                SqliteFile::open(path.strip_prefix("//").unwrap_or(path), pool_max).await.map(Self::Sqlite)
            }
            (Some(("postgres" | "postgresql", _)), direct) => {
                Box::pin(PostgresServer::connect(url, direct, pool_max)).await.map(Self::Postgres)
            }
            _ => Err(Error::InvalidSettings(
                "the database's address: wanted sqlite:PATH or postgres://…".into(),
            )),
        }
    }

    /// The rows of a statement that only reads.
    pub(super) async fn read(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Vec<Row>> {
        let sql = sql.into();
        retry_read(|| self.read_once(&sql, args, false)).await
    }

    /// The first row, if there is one. It does not wait for the database to report the end of the rows, which on SQLite
    /// takes another switch of threads.
    pub(super) async fn row(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Option<Row>> {
        let sql = sql.into();
        Ok(retry_read(|| self.read_once(&sql, args, true)).await?.into_iter().next())
    }

    /// `first_only` skips what comes after the first row, where the driver allows it.
    async fn read_once(&self, sql: &Sql, args: &[Arg], first_only: bool) -> Result<Vec<Row>> {
        let rows = self.executor().execute(Statement::Read, async {
            match self {
                Self::Sqlite(SqliteFile { read, .. }) => {
                    let query = bound!(sql.sqlite.clone(), args);
                    let rows = if first_only {
                        query.fetch_optional(read).await?.into_iter().collect()
                    } else {
                        query.fetch_all(read).await?
                    };
                    Ok(rows.into_iter().map(Row::Sqlite).collect())
                }
                Self::Postgres(server) => {
                    let mut session = match server.sessions {
                        Sessions::Own => Session::open(server).await?,
                        Sessions::Shared => server.begin().await?,
                    };
                    postgres_rows(&mut session, sql, args).await
                }
            }
        });
        rows.await.map_err(classify)
    }

    /// Begins a transaction that writes. On SQLite this waits for the current writer.
    pub(super) async fn begin(&self) -> Result<Tx> {
        let executor = self.executor();
        let begun = executor.execute(Statement::Begin, async {
            Ok(match self {
                Self::Sqlite(file) => Begun::Sqlite(file.begin().await?),
                Self::Postgres(server) => Begun::Postgres(server.begin().await?),
            })
        });
        let begun = begun.await.map_err(classify)?;
        Ok(Tx { begun, open: executor.transaction_begun(), executor: executor.clone() })
    }

    /// Runs one statement that writes, in a transaction of its own; the number of rows written.
    pub(super) async fn write(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<u64> {
        let mut tx = self.begin().await?;
        let count = tx.run(sql, args).await?;
        tx.commit().await?;
        Ok(count)
    }

    /// Copies SQLite's file. It only reads, so that it blocks no writer.
    pub(super) async fn copy_to(&self, file: &std::path::Path) -> Result<()> {
        let Self::Sqlite(own) = self else {
            return Err(Error::InvalidSettings("only a SQLite file can be copied".into()));
        };
        let check = own.copy_to(file).await.map_err(classify)?;
        if check == "ok" { Ok(()) } else { Err(Error::Corrupt(check.into())) }
    }

    /// The two arguments that leases are measured by, `boot` and `now`: in a SQLite file the machine's boot id and the
    /// milliseconds since that boot; nulls on Postgres, whose own clock all processes share.
    pub(super) fn lease_clock(&self) -> [Arg; 2] {
        let moment = match self {
            Self::Sqlite(_) => BootTime::now(),
            Self::Postgres(_) => None,
        };
        [Arg::from(moment.map(|moment| moment.boot)), Arg::from(moment.map(|moment| moment.ms))]
    }

    /// What runs its statements.
    pub(super) fn executor(&self) -> &Executor {
        match self {
            Self::Sqlite(file) => &file.executor,
            Self::Postgres(server) => &server.executor,
        }
    }

    /// The same connections with another executor.
    pub(super) fn with_executor(&self, executor: Executor) -> Self {
        match self {
            Self::Sqlite(file) => Self::Sqlite(SqliteFile { executor, ..file.clone() }),
            Self::Postgres(server) => Self::Postgres(PostgresServer { executor, ..server.clone() }),
        }
    }

    /// Connections in use.
    pub(super) fn in_use(&self) -> usize {
        match self {
            Self::Sqlite(file) => busy(&file.write) + busy(&file.read),
            Self::Postgres(server) => busy(&server.pool),
        }
    }

    pub(super) async fn close(&self) {
        let close = async {
            match self {
                Self::Sqlite(file) => file.close().await,
                Self::Postgres(server) => server.pool.close().await,
            }
        };
        let _ = clock::timeout(STATEMENT_TIMEOUT, close).await; // a disk that does not answer must not block shutdown
    }
}

fn busy<DB: sqlx::Database>(pool: &sqlx::Pool<DB>) -> usize {
    (pool.size() as usize).saturating_sub(pool.num_idle())
}

/// A transaction. Rolled back when dropped.
pub(super) struct Tx {
    begun: Begun,
    executor: Executor,
    /// Shows a test that the transaction is open.
    open: Option<Guard>,
}

enum Begun {
    Sqlite(Writer),
    Postgres(Session),
}

impl Tx {
    /// Runs a statement to its end; its rows.
    pub(super) async fn rows(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Vec<Row>> {
        let sql = sql.into();
        let Self { begun, executor, .. } = self;
        let rows = executor.execute(Statement::InTransaction, async {
            match begun {
                Begun::Sqlite(writer) => {
                    let rows = bound!(sql.sqlite, args).fetch_all(writer.connection()).await?;
                    Ok(rows.into_iter().map(Row::Sqlite).collect())
                }
                Begun::Postgres(session) => postgres_rows(session, &sql, args).await,
            }
        });
        rows.await.map_err(classify)
    }

    /// Runs a statement that gives at most one row.
    pub(super) async fn row(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Option<Row>> {
        Ok(self.rows(sql, args).await?.pop())
    }

    /// Runs a statement; the number of rows written.
    pub(super) async fn run(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<u64> {
        let sql = sql.into();
        let Self { begun, executor, .. } = self;
        let count = executor.execute(Statement::InTransaction, async {
            match begun {
                Begun::Sqlite(writer) => {
                    let done = bound!(sql.sqlite, args).execute(writer.connection()).await?;
                    Ok(done.rows_affected())
                }
                Begun::Postgres(session) => {
                    let query = bound!(sql.postgres, args, session.keeps_statements);
                    let done = query.execute(session.connection()).await;
                    Ok(session.completed(done)?.rows_affected())
                }
            }
        });
        count.await.map_err(classify)
    }

    /// Runs statements without parameters and without a time limit: a migration waits for concurrent ones.
    pub(super) async fn script(&mut self, sql: impl Into<Sql>) -> Result<()> {
        let sql = sql.into();
        let done = match &mut self.begun {
            Begun::Sqlite(writer) => sqlx::raw_sql(sql.sqlite).execute(writer.connection()).await.map(drop),
            Begun::Postgres(session) => {
                let done = sqlx::raw_sql(sql.postgres).execute(session.connection()).await;
                session.completed(done).map(drop)
            }
        };
        done.map_err(classify)
    }

    /// Notifies other processes, once this is committed, that there is something to do.
    pub(super) async fn notify(&mut self) -> Result<()> {
        match self.begun {
            Begun::Sqlite(_) => Ok(()), // they poll
            Begun::Postgres(_) => self.rows("select pg_notify($1, '')", args![CHANNEL]).await.map(drop),
        }
    }

    /// Commits. Only [`Error::Unknown`] leaves open whether that was done: see `in_doubt.rs`.
    pub(super) async fn commit(self) -> Result<()> {
        let Self { begun, executor, open } = self;
        let commit = async move {
            let done = match begun {
                Begun::Sqlite(writer) => writer.commit().await,
                Begun::Postgres(session) => session.commit().await,
            };
            drop(open);
            done
        };
        executor.commit(commit).await.map_err(classify_commit)
    }

    /// Ends a locking read; what it saw is final.
    ///
    /// On SQLite that takes a write: a commit that failed while the log was being synced may have left all its pages
    /// there, and a crash would revive them unless others have been written over them.
    pub(super) async fn end_locking_read(mut self) -> Result<()> {
        if let Begun::Postgres(_) = self.begun {
            return Ok(());
        }
        self.run("update settled set looks = looks + 1", &[]).await?;
        self.commit().await
    }
}

async fn postgres_rows(session: &mut Session, sql: &Sql, args: &[Arg]) -> sqlx::Result<Vec<Row>> {
    let query = bound!(sql.postgres.clone(), args, session.keeps_statements);
    let rows = query.fetch_all(session.connection()).await;
    Ok(session.completed(rows)?.into_iter().map(Row::Postgres).collect())
}

/// Retries a read for some seconds while the database is unavailable.
async fn retry_read<T, F: Future<Output = Result<T>>>(read: impl Fn() -> F) -> Result<T> {
    let until = clock::now() + READ_RETRY;
    let mut wait = Duration::from_millis(20);
    loop {
        match read().await {
            Err(Error::Unavailable(_)) if clock::now() < until => clock::sleep(wait).await,
            done => return done,
        }
        wait = (wait * 2).min(Duration::from_millis(500));
    }
}
