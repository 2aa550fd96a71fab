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

use tokio::time::{Instant, sleep};

use super::{Cause, Error, Result};

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
    let mut unknown: Option<Cause> = None;
    let mut until = Instant::now() + AGAIN;
    let mut wait = WAIT;
    loop {
        let done = match &unknown {
            None => write().await.map(Some),
            Some(_) => look().await,
        };
        let now = Instant::now();
        let away = match done {
            Ok(Some(done)) => return Ok(done),
            Ok(None) => unknown.take().expect("only a look finds nothing"),
            Err(Error::Unknown(cause)) => {
                if unknown.is_none() {
                    until = now + PATIENCE;
                    unknown = Some(cause);
                    continue;
                }
                cause
            }
            Err(Error::Away(cause)) => cause,
            Err(error) => return Err(error),
        };
        if now >= until {
            return Err(unknown.map_or(Error::Away(away), Error::Unknown));
        }
        sleep(wait).await;
        wait = (wait * 2).min(WAIT_MAX);
    }
}
