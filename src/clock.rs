//! The time by which processes wait for each other: the machine's own, or, on a test's threads, one that the test moves by
//! hand. Answers, leases and patience go by it; what times a client's connection or a computation does not.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc::UnboundedReceiver;

/// A time that a test moves by hand.
pub trait Time: fmt::Debug + Send + Sync {
    /// A moment, to be compared with others of this process.
    fn now(&self) -> Instant;
    /// What a calendar says.
    fn timestamp(&self) -> Timestamp;
    /// How long ago the machine was started.
    fn since_boot(&self) -> Duration;
    /// Hears that this thread, which runs no tasks, is about to wait for a message, or waits no longer.
    fn waits(&self, waits: bool) {
        let _ = waits;
    }
    /// Waits until `at`.
    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()>;
}

thread_local! {
    static BY_HAND: RefCell<Option<Arc<dyn Time>>> = const { RefCell::new(None) };
}

/// On this thread it is `time` from now on; the machine's own again if that is none.
pub fn set(time: Option<Arc<dyn Time>>) {
    BY_HAND.set(time);
}

fn by_hand() -> Option<Arc<dyn Time>> {
    BY_HAND.with_borrow(Clone::clone)
}

/// This moment, to be compared with others of this process.
pub fn now() -> Instant {
    by_hand().map_or_else(Instant::now, |time| time.now())
}

/// How long ago that was.
pub fn since(moment: Instant) -> Duration {
    now().saturating_duration_since(moment)
}

/// What a calendar says.
pub fn timestamp() -> Timestamp {
    by_hand().map_or_else(Timestamp::now, |time| time.timestamp())
}

/// How long ago the machine was started, the time that it slept among it; none where it does not say.
pub fn since_boot() -> Option<Duration> {
    match by_hand() {
        None => clock_gettime(ClockId::CLOCK_BOOTTIME).ok().map(Duration::from),
        Some(time) => Some(time.since_boot()),
    }
}

/// Waits so long.
pub async fn sleep(time: Duration) {
    match by_hand() {
        None => tokio::time::sleep(time).await,
        Some(by_hand) => by_hand.sleep_until(by_hand.now() + time).await,
    }
}

/// The work took longer than it may. It was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedOut;

/// Waits for `work`, but no longer than `limit`.
pub async fn timeout<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, TimedOut> {
    if by_hand().is_none() {
        return tokio::time::timeout(limit, work).await.map_err(|_| TimedOut);
    }
    tokio::select! {
        biased;
        done = work => Ok(done),
        () = sleep(limit) => Err(TimedOut),
    }
}

/// Waits for a message on a thread that runs no tasks, but no longer than `limit` if there is one; none when no more will
/// come.
pub fn receive<T>(inbox: &mut UnboundedReceiver<T>, limit: Option<Duration>) -> Result<Option<T>, TimedOut> {
    let time = by_hand();
    let tell = |waits| time.iter().for_each(|time| time.waits(waits));
    let Some(limit) = limit else {
        tell(true);
        let received = inbox.blocking_recv();
        tell(false);
        return Ok(received);
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("one that has time only opens nothing");
    tell(true);
    let received = runtime.block_on(timeout(limit, inbox.recv()));
    tell(false);
    received
}
