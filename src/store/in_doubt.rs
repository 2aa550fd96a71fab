//! In-doubt writes: a commit was sent, and its answer was lost.
//!
//! Only a commit can be in doubt. A statement before it whose answer is lost is rolled back with its transaction. But a
//! commit that was sent ([`Error::Unknown`]) may have been done before its answer was lost, or may still be in
//! progress: a slow disk, a standby that is waited for, a broken connection.
//!
//! The rule: **nothing irreversible happens until a locking read has resolved the doubt.** Every write takes a lock
//! before it writes (a submission its tenant's row, a worker's write its job's row, on SQLite the file's write lock)
//! and holds it until it is committed or rolled back. Whoever gets the same lock later sees the final outcome.
//! Therefore
//!
//! - a write that may be repeated begins with the lock and recognises its own first execution: it is simply sent again;
//! - a write that may not be repeated is looked up under the lock;
//! - objects are removed only when [`Store::referenced_keys`](super::Store::referenced_keys), a locking read, does not
//!   name them, or when a submission certainly does not exist; otherwise they stay for `hypnos sweep`, and the log says
//!   so.
//!
//! An unlocked read resolves nothing: it does not see a commit in progress. It suffices where what it shows never
//! changes again, such as a job that has ended or is being deleted.

use std::time::Duration;

use super::error::{Cause, Error, Result};
use crate::clock;

/// How long a write that was certainly not done is retried while a client waits.
const WRITE_RETRY: Duration = Duration::from_secs(3);
/// How long an in-doubt write is looked up while a client waits.
const LOOKUP_RETRY: Duration = Duration::from_secs(8);
const WAIT: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Runs a write for a waiting client: done, certainly not done, or unknown in spite of all lookups.
///
/// `write` is retried for some seconds while the database is unavailable. Once one of its commits was not answered,
/// `lookup` is called until it succeeds: it takes the lock that `write` takes, and returns what `write` has done, or
/// none.
pub(super) async fn write_resolving<T, F, G>(write: impl Fn() -> F, lookup: impl Fn() -> G) -> Result<T>
where
    F: Future<Output = Result<T>>,
    G: Future<Output = Result<Option<T>>>,
{
    let write_until = clock::now() + WRITE_RETRY;
    let mut wait = WAIT;
    loop {
        let cause = match write().await {
            Err(Error::Unknown(cause)) => match resolve(&lookup, cause).await? {
                Resolved::Done(done) => return Ok(done),
                Resolved::NotDone(cause) => cause,
            },
            Err(Error::Unavailable(cause)) => cause,
            done => return done,
        };
        if clock::now() >= write_until {
            return Err(Error::Unavailable(cause));
        }
        pause(&mut wait).await;
    }
}

enum Resolved<T> {
    Done(T),
    NotDone(Cause),
}

/// Looks up a commit whose answer was lost because of `cause`.
async fn resolve<T, G>(lookup: impl Fn() -> G, cause: Cause) -> Result<Resolved<T>>
where
    G: Future<Output = Result<Option<T>>>,
{
    let until = clock::now() + LOOKUP_RETRY;
    let mut wait = WAIT;
    loop {
        match lookup().await {
            Ok(Some(done)) => return Ok(Resolved::Done(done)),
            Ok(None) => return Ok(Resolved::NotDone(cause)),
            Err(Error::Unavailable(_) | Error::Unknown(_)) if clock::now() < until => pause(&mut wait).await,
            Err(Error::Unavailable(_) | Error::Unknown(_)) => return Err(Error::Unknown(cause)),
            Err(error) => return Err(error),
        }
    }
}

async fn pause(wait: &mut Duration) {
    clock::sleep(*wait).await;
    *wait = (*wait * 2).min(WAIT_MAX);
}
