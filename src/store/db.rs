//! Two databases as one: statements of text and numbers in, rows of text and numbers out.
//!
//! Most statements are one text for both. Where they must differ, a [`Sql`] holds two.

use std::io;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row as _, SqlSafeStr, SqlStr};

use super::answers::{Answers, Guard, Statement};
use super::boot::Moment;
use super::faults::{fault, uncommitted};
use super::file::{File, Writer};
use super::session::{Server, Session, Sessions};
use super::{Error, Result};
use crate::clock;
use crate::job::{JobId, TenantId};

/// How long one statement may take before the database counts as away: longer than the server's own limit.
pub(super) const ANSWER: Duration = Duration::from_secs(15);
/// How long a commit may take before its outcome counts as unknown. The server has no limit for it.
pub(super) const COMMIT: Duration = Duration::from_secs(10);
/// How long a read is tried again. It changes nothing, and a connection that broke is replaced at once.
const AGAIN: Duration = Duration::from_secs(3);
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

impl From<SqlStr> for Sql {
    fn from(text: SqlStr) -> Self {
        Self { sqlite: text.clone(), postgres: text }
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
    Sqlite(File),
    Postgres(Server),
}

impl Db {
    /// Connects. `direct` is a way to the same database past a pooler, if there is one.
    pub(super) async fn connect(url: &str, direct: Option<&str>, pool_max: u32) -> Result<Self> {
        match (url.split_once(':'), direct) {
            (Some(("sqlite", _)), Some(_)) => {
                Err(Error::Bad("HYPNOS_DATABASE_DIRECT is set, but the database is a SQLite file".into()))
            }
            (Some(("sqlite", path)), None) => {
                File::open(path.strip_prefix("//").unwrap_or(path), pool_max).await.map(Self::Sqlite)
            }
            (Some(("postgres" | "postgresql", _)), direct) => {
                Box::pin(Server::connect(url, direct, pool_max)).await.map(Self::Postgres)
            }
            _ => Err(Error::Bad("the database's address: wanted sqlite:PATH or postgres://…".into())),
        }
    }

    /// Rows of a statement that writes nothing.
    pub(super) async fn read(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Vec<Row>> {
        let sql = sql.into();
        again(|| self.read_once(&sql, args, false)).await
    }

    /// The first row, if there is one. Unlike all rows of a statement with one, it comes without another word of the database's
    /// that there are no more: on SQLite that is a change of threads.
    pub(super) async fn row(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Option<Row>> {
        let sql = sql.into();
        Ok(again(|| self.read_once(&sql, args, true)).await?.into_iter().next())
    }

    /// `first_only` spares what comes after the first row, where that is a way to spare it.
    async fn read_once(&self, sql: &Sql, args: &[Arg], first_only: bool) -> Result<Vec<Row>> {
        let rows = self.answers().wait(Statement::Read, async {
            match self {
                Self::Sqlite(File { read, .. }) => {
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
        rows.await.map_err(fault)
    }

    /// Begins to write. On SQLite this waits until nobody else does.
    pub(super) async fn begin(&self) -> Result<Tx> {
        let answers = self.answers();
        let begun = answers.wait(Statement::Begin, async {
            Ok(match self {
                Self::Sqlite(file) => Begun::Sqlite(file.begin().await?),
                Self::Postgres(server) => Begun::Postgres(server.begin().await?),
            })
        });
        let begun = begun.await.map_err(fault)?;
        Ok(Tx { begun, open: answers.begun(), answers: answers.clone() })
    }

    /// One statement that writes, and the number of rows that it wrote.
    pub(super) async fn write(&self, sql: impl Into<Sql>, args: &[Arg]) -> Result<u64> {
        let mut tx = self.begin().await?;
        let count = tx.run(sql, args).await?;
        tx.commit().await?;
        Ok(count)
    }

    /// Copies SQLite's file. However long it takes, nobody waits for it: it reads.
    pub(super) async fn copy_to(&self, file: &std::path::Path) -> Result<()> {
        let Self::Sqlite(own) = self else {
            return Err(Error::Bad("only a SQLite file can be copied".into()));
        };
        let check = own.copy_to(file).await.map_err(fault)?;
        if check == "ok" { Ok(()) } else { Err(Error::Corrupt(check.into())) }
    }

    /// The two arguments by which leases are measured, `boot` and `now`: which start of the machine and milliseconds since
    /// then in a SQLite file; nulls where the database's own clock does it, which every process shares.
    pub(super) fn lease_clock(&self) -> [Arg; 2] {
        let moment = match self {
            Self::Sqlite(_) => Moment::now(),
            Self::Postgres(_) => None,
        };
        [Arg::from(moment.map(|moment| moment.boot)), Arg::from(moment.map(|moment| moment.ms))]
    }

    /// How its statements are waited for.
    pub(super) fn answers(&self) -> &Answers {
        match self {
            Self::Sqlite(file) => &file.answers,
            Self::Postgres(server) => &server.answers,
        }
    }

    /// The same connections, with statements that are waited for in another way.
    pub(super) fn with(&self, answers: Answers) -> Self {
        match self {
            Self::Sqlite(file) => Self::Sqlite(File { answers, ..file.clone() }),
            Self::Postgres(server) => Self::Postgres(Server { answers, ..server.clone() }),
        }
    }

    /// Connections that are neither idle nor gone.
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
        let _ = clock::timeout(ANSWER, close).await; // a disk that does not answer keeps nobody from ending
    }
}

fn busy<DB: sqlx::Database>(pool: &sqlx::Pool<DB>) -> usize {
    (pool.size() as usize).saturating_sub(pool.num_idle())
}

/// A transaction. Dropped, it is rolled back.
pub(super) struct Tx {
    begun: Begun,
    answers: Answers,
    /// A test knows by it that the transaction is open.
    open: Option<Guard>,
}

enum Begun {
    Sqlite(Writer),
    Postgres(Session),
}

impl Tx {
    /// Runs a statement to its end and gives its rows.
    pub(super) async fn rows(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Vec<Row>> {
        let sql = sql.into();
        let Self { begun, answers, .. } = self;
        let rows = answers.wait(Statement::Within, async {
            match begun {
                Begun::Sqlite(writer) => {
                    let rows = bound!(sql.sqlite, args).fetch_all(writer.connection()).await?;
                    Ok(rows.into_iter().map(Row::Sqlite).collect())
                }
                Begun::Postgres(session) => postgres_rows(session, &sql, args).await,
            }
        });
        rows.await.map_err(fault)
    }

    /// The only row, if there is one.
    pub(super) async fn row(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<Option<Row>> {
        Ok(self.rows(sql, args).await?.pop())
    }

    /// How many rows a statement wrote.
    pub(super) async fn run(&mut self, sql: impl Into<Sql>, args: &[Arg]) -> Result<u64> {
        let sql = sql.into();
        let Self { begun, answers, .. } = self;
        let count = answers.wait(Statement::Within, async {
            match begun {
                Begun::Sqlite(writer) => {
                    let done = bound!(sql.sqlite, args).execute(writer.connection()).await?;
                    Ok(done.rows_affected())
                }
                Begun::Postgres(session) => {
                    let query = bound!(sql.postgres, args, session.keeps_statements);
                    let done = query.execute(session.ask()).await;
                    Ok(session.heard(done)?.rows_affected())
                }
            }
        });
        count.await.map_err(fault)
    }

    /// Runs statements without parameters, for as long as they take: a change of the schema waits for whoever is at it.
    pub(super) async fn script(&mut self, sql: impl Into<Sql>) -> Result<()> {
        let sql = sql.into();
        let done = match &mut self.begun {
            Begun::Sqlite(writer) => sqlx::raw_sql(sql.sqlite).execute(writer.connection()).await.map(drop),
            Begun::Postgres(session) => {
                let done = sqlx::raw_sql(sql.postgres).execute(session.ask()).await;
                session.heard(done).map(drop)
            }
        };
        done.map_err(fault)
    }

    /// Tells other processes, once this is committed, that there is something to look at.
    pub(super) async fn notify(&mut self) -> Result<()> {
        match self.begun {
            Begun::Sqlite(_) => Ok(()), // they poll
            Begun::Postgres(_) => self.rows("select pg_notify($1, '')", args![CHANNEL]).await.map(drop),
        }
    }

    /// Commits. Of all errors only [`Error::Unknown`] leaves it open whether that was done: see [`settle`](super::settle).
    pub(super) async fn commit(self) -> Result<()> {
        let Self { begun, answers, open } = self;
        let commit = async move {
            let done = match begun {
                Begun::Sqlite(writer) => writer.commit().await,
                Begun::Postgres(session) => session.commit().await,
            };
            drop(open);
            done
        };
        answers.wait_for_commit(commit).await.map_err(uncommitted)
    }

    /// Ends a locking read, after which what it saw is settled.
    ///
    /// On SQLite that takes a write: a commit that failed while the log was being synced may have left all its pages there,
    /// and a crash would bring them to life unless others have been written over them.
    pub(super) async fn end_look(mut self) -> Result<()> {
        if let Begun::Postgres(_) = self.begun {
            return Ok(());
        }
        self.run("update settled set looks = looks + 1", &[]).await?;
        self.commit().await
    }
}

async fn postgres_rows(session: &mut Session, sql: &Sql, args: &[Arg]) -> sqlx::Result<Vec<Row>> {
    let query = bound!(sql.postgres.clone(), args, session.keeps_statements);
    let rows = query.fetch_all(session.ask()).await;
    Ok(session.heard(rows)?.into_iter().map(Row::Postgres).collect())
}

/// Waits for the database, but not for ever: a host that vanished never answers. All that is said to a database, and all
/// that it answers, passes here.
///
/// In a box: what waits for it would else hold it twice, and so on outwards.
pub(super) fn answer_within<T>(
    time: Duration,
    work: impl Future<Output = sqlx::Result<T>>,
) -> impl Future<Output = sqlx::Result<T>> {
    let work = Box::pin(work);
    async move {
        let late =
            || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", time.as_secs()));
        clock::timeout(time, work).await.unwrap_or_else(|_| Err(late().into()))
    }
}

/// Asks what changes nothing again while the database is away, for some seconds.
async fn again<T, F: Future<Output = Result<T>>>(ask: impl Fn() -> F) -> Result<T> {
    let until = clock::now() + AGAIN;
    let mut wait = Duration::from_millis(20);
    loop {
        match ask().await {
            Err(Error::Away(_)) if clock::now() < until => clock::sleep(wait).await,
            done => return done,
        }
        wait = (wait * 2).min(Duration::from_millis(500));
    }
}
