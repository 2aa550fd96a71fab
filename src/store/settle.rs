//! What is done about a write whose outcome is unknown.
//!
//! Only a commit can have one. A statement before it whose answer is lost is undone with its transaction; but a commit that
//! was sent ([`Error::Unknown`]) may have been carried out before its answer was lost, or may still be under way: a disk
//! that is slow, a standby that is awaited, a connection that broke.
//!
//! The rule: **nothing that cannot be undone happens until a locking read has settled it.** Every write takes a lock before it
//! writes (a submission its tenant's row, a worker's write its job's row, on SQLite the file's one right to write) and holds
//! it until it is committed or undone. Whoever gets the same lock later sees what became of it, for good. So
//!
//! - a write that may be repeated begins with the lock and recognises its own first coming: it is simply sent again;
//! - what may not be repeated is looked for, under the lock;
//! - objects are removed only when [`Store::named`](super::Store::named), a locking read, does not name them, or when a
//!   submission is surely not there; else they stay for the collector (`hypnos sweep`), and the log says so.
//!
//! An unlocked read settles nothing: it does not see a commit that is under way. It is enough where what it shows never
//! changes again, such as a job that has ended or that is being deleted.

use std::time::Duration;

use super::{Cause, Error, Result};
use crate::clock;

/// How long a write that surely was not done is tried again, for a client that waits.
const AGAIN: Duration = Duration::from_secs(3);
/// How long an unknown outcome is asked after, for a client that waits.
const PATIENCE: Duration = Duration::from_secs(8);
const WAIT: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// A write for somebody who waits for its answer: done, or surely not done, or unknown in spite of all asking.
///
/// `write` is tried for some seconds while the database is away. Once a commit of it was not answered, `look` is asked
/// instead until it answers: it takes the lock that `write` takes, and gives what came of it, or none if nothing did.
pub(super) async fn settle<T, F, G>(write: impl Fn() -> F, look: impl Fn() -> G) -> Result<T>
where
    F: Future<Output = Result<T>>,
    G: Future<Output = Result<Option<T>>>,
{
    let write_until = clock::now() + AGAIN;
    let mut wait = WAIT;
    loop {
        let away = match write().await {
            Err(Error::Unknown(cause)) => match look_until_seen(&look, cause).await? {
                Seen::Done(done) => return Ok(done),
                Seen::NotDone(cause) => cause,
            },
            Err(Error::Away(cause)) => cause,
            done => return done,
        };
        if clock::now() >= write_until {
            return Err(Error::Away(away));
        }
        pause(&mut wait).await;
    }
}

enum Seen<T> {
    Done(T),
    NotDone(Cause),
}

/// What became of a commit whose answer was lost by `cause`.
async fn look_until_seen<T, G>(look: impl Fn() -> G, cause: Cause) -> Result<Seen<T>>
where
    G: Future<Output = Result<Option<T>>>,
{
    let until = clock::now() + PATIENCE;
    let mut wait = WAIT;
    loop {
        match look().await {
            Ok(Some(done)) => return Ok(Seen::Done(done)),
            Ok(None) => return Ok(Seen::NotDone(cause)),
            Err(Error::Away(_) | Error::Unknown(_)) if clock::now() < until => pause(&mut wait).await,
            Err(Error::Away(_) | Error::Unknown(_)) => return Err(Error::Unknown(cause)),
            Err(error) => return Err(error),
        }
    }
}

async fn pause(wait: &mut Duration) {
    clock::sleep(*wait).await;
    *wait = (*wait * 2).min(WAIT_MAX);
}
