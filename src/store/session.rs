//! Connections to Postgres, and whose session is behind one.
//!
//! A connection to Postgres itself has a session of its own: what is set there stays, and a statement that was prepared is
//! there the next time. Behind a pooler in transaction mode every transaction may run in another session, which is
//! everybody's: nothing may be left there, and nothing relied on. So there every statement is part of a transaction and is
//! prepared without a name, limits are set for the transaction only, and nobody listens.
//!
//! Which of the two it is shows at the first connection: its start-up packet sets a parameter of ours, and only a session
//! that was begun by this packet has it.

use std::str::FromStr;
use std::time::Duration;

use sqlx::pool::{PoolConnection, PoolOptions};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool};
use sqlx::{ConnectOptions, Connection, Postgres};
use tokio::runtime::Handle;
use tokio::time::timeout;
use uuid::Uuid;

use super::answers::Answers;
use super::db::answer_within;
use super::faults::{leaves_session_sound, refusal};
use super::{Error, Result};

/// How long anybody waits for a connection.
pub(super) const ACQUIRE: Duration = Duration::from_secs(2);
/// How long a rollback may take before the connection is given up, which has the same effect.
const ROLLBACK: Duration = Duration::from_secs(5);
/// How long the first connection of all may take.
const CONNECT: Duration = Duration::from_secs(5);

/// A worker that is stopped in the middle of a transaction must not hold its rows for ever.
const LIMITS: [(&str, &str); 3] =
    [("statement_timeout", "10s"), ("lock_timeout", "5s"), ("idle_in_transaction_session_timeout", "10s")];
/// The same for one transaction. `unlisten`: where a session is everybody's, somebody may have left a LISTEN in it, and a
/// notification among the answers is none that a client expects.
const BEGIN_SHARED: &str = "begin; unlisten *; set local statement_timeout = '10s'; \
    set local lock_timeout = '5s'; set local idle_in_transaction_session_timeout = '10s'";
/// The parameter that shows whether a session is ours.
const MARK: &str = "hypnos.session";

/// Whose the sessions are that statements run in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sessions {
    /// Ours, each for as long as its connection.
    Own,
    /// Everybody's: a pooler gives one to each transaction.
    Shared,
}

/// The way to a server.
#[derive(Clone, Debug)]
pub(super) struct Server {
    pub(super) pool: PgPool,
    pub(super) sessions: Sessions,
    /// How to reach a session of one's own, to listen in; none if there is no way.
    pub(super) listen: Option<Box<PgConnectOptions>>,
    pub(super) answers: Answers,
}

impl Server {
    /// Connects. `direct` is another way to the same database, past a pooler.
    pub(super) async fn connect(url: &str, direct: Option<&str>, pool_max: u32) -> Result<Self> {
        let plain = options(url, "the database's address")?;
        let mark = Uuid::now_v7().to_string();
        let sessions = sessions(&plain, &mark).await?;
        let chosen = if sessions == Sessions::Own { marked(&plain, &mark) } else { plain };
        let listen = match direct {
            Some(direct) => Some(Box::new(straight(direct, &mark).await?)),
            None => (sessions == Sessions::Own).then(|| Box::new(chosen.clone())),
        };
        let pool = PoolOptions::<Postgres>::new().max_connections(pool_max).acquire_timeout(ACQUIRE);
        let pool = match sessions {
            // Should the address lead to a pooler later, nothing must run under another session's prepared statements.
            Sessions::Own => pool.after_connect(move |connection, _| {
                let mark = mark.clone();
                Box::pin(async move {
                    let own = is_marked(connection, &mark).await?;
                    own.then_some(()).ok_or_else(|| {
                        sqlx::Error::Protocol("the address leads to a pooler since; wanted a restart".into())
                    })
                })
            }),
            Sessions::Shared => pool,
        };
        let pool = pool.connect_lazy_with(chosen);
        Ok(Self { pool, sessions, listen, answers: Answers::default() })
    }

    /// Begins a transaction.
    pub(super) async fn begin(&self) -> sqlx::Result<Session> {
        let mut session = Session::open(self).await?;
        let begin = match self.sessions {
            Sessions::Own => "begin",
            Sessions::Shared => BEGIN_SHARED,
        };
        session.tell(begin).await?;
        session.begun = true;
        Ok(session)
    }
}

fn options(url: &str, what: &str) -> Result<PgConnectOptions> {
    let parsed = PgConnectOptions::from_str(url);
    let parsed = parsed.map_err(|_| Error::Bad(format!("{what} is not a postgres:// URL")))?; // it holds a password
    // Poolers that do not know `extra_float_digits` refuse it; no column holds a fraction.
    Ok(parsed.application_name("hypnos").extra_float_digits(None).disable_statement_logging())
}

fn marked(options: &PgConnectOptions, mark: &str) -> PgConnectOptions {
    options.clone().options(LIMITS).options([(MARK, mark)])
}

/// Finds out whose sessions these are.
async fn sessions(plain: &PgConnectOptions, mark: &str) -> Result<Sessions> {
    match once(&marked(plain, mark), async |connection| is_marked(connection, mark).await).await {
        Ok(true) => return Ok(Sessions::Own),
        Ok(false) => {} // the parameter was passed over in silence
        Err(error) if refuses_parameter(&error) => {}
        Err(error) => return Err(refusal(error)),
    }
    // Whoever does not take the parameter but does without it is a pooler.
    let transaction = async |connection: &mut PgConnection| {
        sqlx::raw_sql(BEGIN_SHARED).execute(&mut *connection).await?;
        sqlx::raw_sql("rollback").execute(connection).await.map(drop)
    };
    match once(plain, transaction).await {
        Ok(()) => Ok(Sessions::Shared),
        Err(error) if error.to_string().contains("statement pooling") => Err(Error::Bad(
            "the pooler before the database allows no transactions (statement mode); wanted transaction or session mode"
                .into(),
        )),
        Err(error) => Err(refusal(error)),
    }
}

/// The options of a way that must lead to a session of one's own.
async fn straight(url: &str, mark: &str) -> Result<PgConnectOptions> {
    let plain = options(url, "HYPNOS_DATABASE_DIRECT")?;
    match sessions(&plain, mark).await? {
        Sessions::Own => Ok(marked(&plain, mark)),
        Sessions::Shared => Err(Error::Bad(
            "HYPNOS_DATABASE_DIRECT leads to a pooler too; wanted the address of Postgres itself".into(),
        )),
    }
}

/// Connects once, to ask one thing.
async fn once<T>(
    options: &PgConnectOptions,
    ask: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<T>,
) -> sqlx::Result<T> {
    answer_within(CONNECT, async {
        let mut connection = options.connect().await?;
        let answer = ask(&mut connection).await?;
        connection.close().await?;
        Ok(answer)
    })
    .await
}

async fn is_marked(connection: &mut PgConnection, mark: &str) -> sqlx::Result<bool> {
    let ask = sqlx::raw_sql("select coalesce(current_setting('hypnos.session', true), '') as mark");
    let row = ask.fetch_one(connection).await?;
    Ok(sqlx::Row::try_get::<&str, _>(&row, "mark")? == mark)
}

/// Whether this is said of the start-up packet rather than of the user, the database or the server's state.
fn refuses_parameter(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| !matches!(code.get(..2), Some("28" | "3D" | "53" | "57")))
}

/// A connection of the pool that somebody uses. One that did not answer, or not as it should, is thrown away rather than
/// given back: the pool would wait for its answer for ever.
pub(super) struct Session {
    connection: Option<PoolConnection<Postgres>>,
    sound: bool,
    /// Whether a transaction is under way.
    begun: bool,
    /// Whether statements may be prepared by name.
    pub(super) keeps_statements: bool,
}

impl Session {
    /// A connection, with no transaction begun.
    pub(super) async fn open(server: &Server) -> sqlx::Result<Self> {
        let connection = Some(server.pool.acquire().await?);
        Ok(Self { connection, sound: true, begun: false, keeps_statements: server.sessions == Sessions::Own })
    }

    /// To ask something; [`Session::heard`] must be told of the answer.
    pub(super) fn ask(&mut self) -> &mut PgConnection {
        self.sound = false;
        self.connection.as_mut().expect("it is there until the end")
    }

    pub(super) fn heard<T>(&mut self, answer: sqlx::Result<T>) -> sqlx::Result<T> {
        self.sound = answer.as_ref().err().is_none_or(leaves_session_sound);
        answer
    }

    async fn tell(&mut self, command: &'static str) -> sqlx::Result<()> {
        let done = sqlx::raw_sql(command).execute(self.ask()).await;
        self.heard(done).map(drop)
    }

    pub(super) async fn commit(mut self) -> sqlx::Result<()> {
        let done = self.tell("commit").await;
        self.begun = done.is_err();
        done
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        match (self.sound, self.begun, Handle::try_current()) {
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
