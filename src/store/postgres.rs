//! Connections to Postgres, directly or through a pooler.
//!
//! A direct connection has its own session: settings and prepared statements stay. Behind a pooler in transaction mode
//! every transaction may run in another session, which other clients share: nothing may be left there and nothing
//! relied on. There every statement is part of a transaction and prepared without a name, limits are set per
//! transaction, and nothing listens.
//!
//! The first connection finds out which of the two it is: its start-up packet sets a parameter, and only a session that
//! was begun by this packet has it.

use std::str::FromStr;
use std::time::Duration;

use sqlx::pool::{PoolConnection, PoolOptions};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool};
use sqlx::{ConnectOptions, Connection, Postgres};
use tokio::runtime::Handle;
use tokio::time::timeout;
use uuid::Uuid;

use super::error::{Error, Result, classify_connect, session_is_usable_after};
use super::fault_injection::Executor;
use super::timeout::with_timeout;

/// How long a statement waits for a connection of the pool.
const ACQUIRE: Duration = Duration::from_secs(2);
/// How long a rollback may take before the connection is closed, which has the same effect.
const ROLLBACK: Duration = Duration::from_secs(5);
/// How long the first connection may take.
const CONNECT: Duration = Duration::from_secs(5);

/// Limits of a session: a worker that is frozen in the middle of a transaction must not hold its rows forever.
const LIMITS: [(&str, &str); 3] =
    [("statement_timeout", "10s"), ("lock_timeout", "5s"), ("idle_in_transaction_session_timeout", "10s")];
/// Begins a transaction in a shared session, with the same limits. `unlisten`: another client may have left a LISTEN
/// there, and its notifications among the answers would be unexpected.
const BEGIN_SHARED: &str = "begin; unlisten *; set local statement_timeout = '10s'; \
    set local lock_timeout = '5s'; set local idle_in_transaction_session_timeout = '10s'";
/// The parameter that marks a session as this process's own.
const MARK: &str = "hypnos.session";

/// Whether the sessions that statements run in are this process's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sessions {
    /// Its own, each for the life of its connection.
    Own,
    /// Shared: a pooler assigns one to each transaction.
    Shared,
}

/// The connections to a server.
#[derive(Clone, Debug)]
pub(super) struct PostgresServer {
    pub(super) pool: PgPool,
    pub(super) sessions: Sessions,
    /// Options of a connection with its own session, to listen in; none if there is none.
    pub(super) listen: Option<Box<PgConnectOptions>>,
    pub(super) executor: Executor,
}

impl PostgresServer {
    /// Connects. `direct` is an address of the same database that bypasses a pooler.
    pub(super) async fn connect(url: &str, direct: Option<&str>, pool_max: u32) -> Result<Self> {
        let plain = options(url, "the database's address")?;
        let mark = Uuid::now_v7().to_string();
        let sessions = sessions(&plain, &mark).await?;
        let chosen = if sessions == Sessions::Own { marked(&plain, &mark) } else { plain };
        let listen = match direct {
            Some(direct) => Some(Box::new(direct_options(direct, &mark).await?)),
            None => (sessions == Sessions::Own).then(|| Box::new(chosen.clone())),
        };
        let pool = PoolOptions::<Postgres>::new().max_connections(pool_max).acquire_timeout(ACQUIRE);
        let pool = match sessions {
            // If the address leads to a pooler later, nothing may run in sessions with other clients' prepared
            // statements.
            Sessions::Own => pool.after_connect(move |connection, _| {
                let mark = mark.clone();
                Box::pin(async move {
                    let own = is_marked(connection, &mark).await?;
                    own.then_some(()).ok_or_else(|| {
                        sqlx::Error::Protocol("the address now leads to a pooler; restart required".into())
                    })
                })
            }),
            Sessions::Shared => pool,
        };
        let pool = pool.connect_lazy_with(chosen);
        Ok(Self { pool, sessions, listen, executor: Executor::default() })
    }

    /// Begins a transaction.
    pub(super) async fn begin(&self) -> sqlx::Result<Session> {
        let mut session = Session::open(self).await?;
        let begin = match self.sessions {
            Sessions::Own => "begin",
            Sessions::Shared => BEGIN_SHARED,
        };
        session.execute(begin).await?;
        session.begun = true;
        Ok(session)
    }
}

fn options(url: &str, what: &str) -> Result<PgConnectOptions> {
    let parsed = PgConnectOptions::from_str(url);
    // The URL itself is not shown: it holds a password.
    let parsed = parsed.map_err(|_| Error::InvalidSettings(format!("{what} is not a postgres:// URL")))?;
    // Poolers that do not know `extra_float_digits` reject it; no column holds a fraction.
    Ok(parsed.application_name("hypnos").extra_float_digits(None).disable_statement_logging())
}

fn marked(options: &PgConnectOptions, mark: &str) -> PgConnectOptions {
    options.clone().options(LIMITS).options([(MARK, mark)])
}

/// Finds out whether the address leads to own or shared sessions.
async fn sessions(plain: &PgConnectOptions, mark: &str) -> Result<Sessions> {
    match once(&marked(plain, mark), async |connection| is_marked(connection, mark).await).await {
        Ok(true) => return Ok(Sessions::Own),
        Ok(false) => {} // the parameter was silently ignored
        Err(error) if refuses_parameter(&error) => {}
        Err(error) => return Err(classify_connect(error)),
    }
    // A server that rejects the parameter but accepts connections without it is a pooler.
    let transaction = async |connection: &mut PgConnection| {
        sqlx::raw_sql(BEGIN_SHARED).execute(&mut *connection).await?;
        sqlx::raw_sql("rollback").execute(connection).await.map(drop)
    };
    match once(plain, transaction).await {
        Ok(()) => Ok(Sessions::Shared),
        Err(error) if error.to_string().contains("statement pooling") => Err(Error::InvalidSettings(
            "the pooler in front of the database allows no transactions (statement mode); wanted transaction or session mode"
                .into(),
        )),
        Err(error) => Err(classify_connect(error)),
    }
}

/// The options of an address that must lead to own sessions.
async fn direct_options(url: &str, mark: &str) -> Result<PgConnectOptions> {
    let plain = options(url, "HYPNOS_DATABASE_DIRECT")?;
    match sessions(&plain, mark).await? {
        Sessions::Own => Ok(marked(&plain, mark)),
        Sessions::Shared => Err(Error::InvalidSettings(
            "HYPNOS_DATABASE_DIRECT leads to a pooler too; wanted the address of Postgres itself".into(),
        )),
    }
}

/// Connects once, to run one query.
async fn once<T>(
    options: &PgConnectOptions,
    query: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<T>,
) -> sqlx::Result<T> {
    with_timeout(CONNECT, async {
        let mut connection = options.connect().await?;
        let answer = query(&mut connection).await?;
        connection.close().await?;
        Ok(answer)
    })
    .await
}

async fn is_marked(connection: &mut PgConnection, mark: &str) -> sqlx::Result<bool> {
    let query = sqlx::raw_sql("select coalesce(current_setting('hypnos.session', true), '') as mark");
    let row = query.fetch_one(connection).await?;
    Ok(sqlx::Row::try_get::<&str, _>(&row, "mark")? == mark)
}

/// Whether the error is about the start-up packet rather than the user, the database or the server's state.
fn refuses_parameter(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| !matches!(code.get(..2), Some("28" | "3D" | "53" | "57")))
}

/// A connection taken from the pool. One that did not answer properly is closed instead of returned: the pool would
/// wait for its answer forever.
pub(super) struct Session {
    connection: Option<PoolConnection<Postgres>>,
    /// Whether the last statement was answered and left the session usable.
    usable: bool,
    /// Whether a transaction has begun.
    begun: bool,
    /// Whether statements may be prepared by name.
    pub(super) keeps_statements: bool,
}

impl Session {
    /// A connection without a transaction.
    pub(super) async fn open(server: &PostgresServer) -> sqlx::Result<Self> {
        let connection = Some(server.pool.acquire().await?);
        Ok(Self {
            connection,
            usable: true,
            begun: false,
            keeps_statements: server.sessions == Sessions::Own,
        })
    }

    /// The connection, to run a statement; its outcome must be passed to [`Session::completed`].
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        self.usable = false;
        self.connection.as_mut().expect("it is there until the end")
    }

    /// Records the outcome of a statement.
    pub(super) fn completed<T>(&mut self, answer: sqlx::Result<T>) -> sqlx::Result<T> {
        self.usable = answer.as_ref().err().is_none_or(session_is_usable_after);
        answer
    }

    async fn execute(&mut self, command: &'static str) -> sqlx::Result<()> {
        let done = sqlx::raw_sql(command).execute(self.connection()).await;
        self.completed(done).map(drop)
    }

    pub(super) async fn commit(mut self) -> sqlx::Result<()> {
        let done = self.execute("commit").await;
        self.begun = done.is_err();
        done
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        match (self.usable, self.begun, Handle::try_current()) {
            (true, false, _) => {}
            (true, true, Ok(runtime)) => {
                runtime.spawn(async move {
                    let rollback = sqlx::raw_sql("rollback").execute(&mut *connection);
                    if !matches!(timeout(ROLLBACK, rollback).await, Ok(Ok(_))) {
                        drop(connection.detach());
                    }
                });
            }
            _ => drop(connection.detach()),
        }
    }
}
