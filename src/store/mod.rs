//! The only SQL: the queue, the tenants and their keys, on SQLite and on Postgres behind one face.
//!
//! The table `job` is a queue with leases. A claim bumps `run_lease`, and every later write of the worker names it:
//! `where id and state = 'running' and run_lease`. No row means the lease is lost, and nothing was written. Terminal
//! states never change; an acknowledged cancel never succeeds; another tenant's row is a row that is not there. Time is
//! the database's. No photo, no picture and no weight comes here: a row names objects that are already in the bucket.
//!
//! ```text
//! api       what a client does: submit, look, cancel, delete      worker    claim, renew, finish, rescue
//! admin     what an operator does: look at all, requeue, pause    tenants   serve, disable, erase
//! keys      API keys                                              objects   artifacts and class images
//! settle    what is done about a write whose outcome is unknown   faults    what can be done about an error
//! db        the two databases as one: text, numbers, rows         schema    migrations
//! file      SQLite: one writer                                    session   Postgres, and poolers before it
//! boot      what SQLite's leases are measured by                  wakes     hints between processes
//! turns     whose turn it is to be claimed                        answers   how statements are waited for, faults for tests
//! deployment  which object store goes with it, what a sweep keeps
//! ```

mod admin;
mod answers;
mod api;
mod boot;
mod db;
mod deployment;
mod faults;
mod file;
mod keys;
mod objects;
mod schema;
mod session;
mod settle;
mod tenants;
mod turns;
mod wakes;
mod worker;

use std::sync::{Arc, Mutex};

use crate::job::{Job, JobId, Kind, Lease, Object, Spec, State, TenantId};

pub use admin::{AdminFilter, AdminJob, Pause, Requeued};
pub use answers::{Commit, Delivery, Faults, Guard, Statement};
pub use deployment::{Deployment, Kept};
pub use keys::{Key, NewKey, Scope};
pub use session::Sessions;
pub use tenants::{Holdings, Tenant, TenantState};
pub use turns::WEIGHT_MAX;
pub use wakes::Wakes;
pub use worker::{Claim, HOSTS_MAX, Renewal, Rescued, Wanted, Wish};

use answers::Answers;
use db::Db;

/// What went wrong. No message holds SQL, a path or what a client sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer now: not reachable, busy, read-only, out of connections or out of disk. Nothing was done; the same again
    /// may succeed.
    #[error("the database cannot be reached")]
    Away(#[source] Cause),
    /// A commit was sent and its answer was lost or is late: it may have been done, or may yet be. Nothing that cannot be
    /// undone may happen until that is settled.
    #[error("whether the database has done it is not known")]
    Unknown(#[source] Cause),
    /// The job is no longer this claim's: nothing was written, and nothing more may be.
    #[error("the lease was lost")]
    LeaseLost,
    /// The schema is not this program's; the text says what to do.
    #[error("{0}")]
    Schema(String),
    /// What no program of ours can have written, or a fault of ours.
    #[error("the database holds or refuses what it should not")]
    Corrupt(#[source] Cause),
    /// The settings cannot work: the address, the user, the file; the text says why.
    #[error("{0}")]
    Bad(String),
}

/// What the database said.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A result of the store.
pub type Result<T> = std::result::Result<T, Error>;

/// The store. Clones share their connections.
#[derive(Clone, Debug)]
pub struct Store {
    db: Db,
    wakes: Arc<wakes::Hub>,
    /// Claims whose commit was not answered.
    doubtful: Arc<Mutex<Vec<Lease>>>,
}

impl Store {
    /// Connects, and migrates nothing. `url` is `sqlite:PATH`, a file that is made if need be in a directory that is
    /// there, or `postgres://…`; `pool_max` is the most connections, on SQLite the most that read at once.
    pub async fn connect(url: &str, pool_max: u32) -> Result<Self> {
        Self::connect_past(url, None, pool_max).await
    }

    /// The same, with a second address of the same database that leads past a pooler, to listen at.
    pub async fn connect_past(url: &str, direct: Option<&str>, pool_max: u32) -> Result<Self> {
        let db = Db::connect(url, direct, pool_max.max(1)).await?;
        Ok(Self { db, wakes: Arc::default(), doubtful: Arc::default() })
    }

    /// Whose sessions its statements run in; none if the database has no sessions.
    pub fn sessions(&self) -> Option<Sessions> {
        match &self.db {
            Db::Sqlite(_) => None,
            Db::Postgres(server) => Some(server.sessions),
        }
    }

    /// Brings the schema up to this program. Of two that do so at once, one waits.
    pub async fn migrate(&self) -> Result<()> {
        schema::migrate(&self.db).await
    }

    /// Refuses a schema that is older or newer than this program, or not there at all.
    pub async fn check_schema(&self) -> Result<()> {
        schema::check(&self.db).await
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<()> {
        self.db.row("select 1", &[]).await.map(drop)
    }

    /// Hears of jobs to claim and of cancels, from this process and, on Postgres unless a pooler is in between, from others.
    /// A hint only: whoever waits for it looks once a second all the same. Call it within a runtime.
    pub fn wakes(&self) -> Wakes {
        self.wakes.listen(&self.db)
    }

    /// Waits until a job was deleted, or a deleted one ended, in this process: there may be something to erase. A hint
    /// only; for one who waits.
    pub async fn deletion(&self) {
        self.wakes.deletion().await;
    }

    /// Copies a SQLite database as it is at this moment to a file that is not there yet, and checks the copy.
    pub async fn copy_to(&self, file: &std::path::Path) -> Result<()> {
        self.db.copy_to(file).await
    }

    /// The same connections as another process would have them, whose statements fare as `faults` say: for tests. What
    /// other processes say is not listened to; whoever waits polls.
    #[must_use]
    pub fn with_faults(&self, faults: Arc<dyn Faults>) -> Self {
        Self { db: self.db.with(Answers(Some(faults))), wakes: Arc::default(), doubtful: Arc::default() }
    }

    /// Connections that somebody uses, a transaction that is being rolled back among them.
    pub fn connections_in_use(&self) -> usize {
        self.db.in_use()
    }

    /// Ends every connection, after what they are at.
    pub async fn close(&self) {
        self.db.close().await;
    }
}

/// A job to be accepted.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its id; the objects that it names lie under it already.
    pub id: JobId,
    /// Whose it is.
    pub tenant: TenantId,
    /// The training that a sample draws with; none for a training.
    pub parent: Option<JobId>,
    /// What it is to do.
    pub spec: Spec,
    /// A training's photos, in order.
    pub photos: Vec<Object>,
    /// Which of the tenant's own waiting jobs goes first: the larger.
    pub priority: i32,
    /// Attempts that it may have, at least 1.
    pub max_attempts: i64,
    /// What makes the same request, sent twice, one job.
    pub idempotency: Option<Idempotency>,
    /// Most waiting jobs of this kind that the tenant may have, this one among them.
    pub queue_max: u64,
    /// Where it came from.
    pub origin: Origin,
}

/// Where a job came from, beside its request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The job that it does again.
    pub retry_of: Option<JobId>,
    /// W3C `traceparent` of the request, so that the worker's spans belong to its trace.
    pub trace: Option<String>,
    /// What [`Store::tenant_made_ms`] said before the first of the job's objects was written. A tenant that was erased since
    /// then, with all objects under its id, gets no such job.
    pub tenant_made_ms: Option<i64>,
}

/// A request's own name, kept for a day.
#[derive(Clone, Debug)]
pub struct Idempotency {
    /// The client's name for it.
    pub key: String,
    /// Hash of all that was asked for.
    pub request_hash: String,
}

/// What became of a submission.
#[derive(Clone, Debug, PartialEq)]
pub enum Submitted {
    /// Accepted, durably.
    New(Job),
    /// The same request was accepted before; this is its job as it stands now.
    Replayed(Job),
    /// The idempotency key belongs to another request.
    OtherRequest,
    /// The tenant has as many waiting jobs as it may have.
    QueueFull,
    /// The training to draw with is not there, or there but not succeeded.
    NoParent(Option<State>),
    /// The tenant is not served: an operator disabled or deleted it.
    Disabled,
}

/// Which jobs to list; what is none does not matter.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this kind.
    pub kind: Option<Kind>,
    /// In this state.
    pub state: Option<State>,
    /// Trainings of this class.
    pub class_name: Option<String>,
    /// Accepted later than this, in milliseconds since 1970.
    pub created_after_ms: Option<i64>,
    /// Samples drawn with this training.
    pub parent: Option<JobId>,
}

/// How full the queue is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// By kind, in the order of [`Kind::ALL`].
    pub kinds: Vec<Gauge>,
}

/// How full the queue is of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gauge {
    /// The kind.
    pub kind: Kind,
    /// Jobs that wait.
    pub queued: u64,
    /// Jobs that run.
    pub running: u64,
    /// How long ago the oldest waiting one was accepted, in milliseconds; 0 if none waits.
    pub oldest_queued_ms: u64,
}

/// A JSON column.
fn parse<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T> {
    // serde_json's own message may quote the document
    serde_json::from_str(text)
        .map_err(|_| Error::Corrupt(format!("column {column} is not what it should be").into()))
}

/// What goes into a JSON column.
fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("our documents have string keys and finite numbers or null")
}
