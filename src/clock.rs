//! The clock of timeouts, leases and retries: the machine's own, or, on a test's threads, one that the test controls.
//! Client connections and measurements of computations use the machine's clock directly.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc::UnboundedReceiver;

/// A clock that a test controls.
pub trait TestClock: fmt::Debug + Send + Sync {
    /// The current instant, comparable within this process.
    fn now(&self) -> Instant;
    /// The current date and time.
    fn timestamp(&self) -> Timestamp;
    /// Time since the machine's boot.
    fn since_boot(&self) -> Duration;
    /// Called when this thread, which runs no tasks, begins or ends to wait for a message.
    fn set_waiting(&self, waiting: bool) {
        let _ = waiting;
    }
    /// Waits until `at`.
    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()>;
}

thread_local! {
    static TEST_CLOCK: RefCell<Option<Arc<dyn TestClock>>> = const { RefCell::new(None) };
}

/// Sets this thread's clock; the machine's own again if none.
pub fn set(clock: Option<Arc<dyn TestClock>>) {
    TEST_CLOCK.set(clock);
}

fn test_clock() -> Option<Arc<dyn TestClock>> {
    TEST_CLOCK.with_borrow(Clone::clone)
}

/// The current instant, comparable within this process.
pub fn now() -> Instant {
    test_clock().map_or_else(Instant::now, |clock| clock.now())
}

/// Time since `moment`.
pub fn since(moment: Instant) -> Duration {
    now().saturating_duration_since(moment)
}

/// The current date and time.
pub fn timestamp() -> Timestamp {
    test_clock().map_or_else(Timestamp::now, |clock| clock.timestamp())
}

/// Time since the machine's boot, including the time it slept; none where it is not available.
pub fn since_boot() -> Option<Duration> {
    match test_clock() {
        None => clock_gettime(ClockId::CLOCK_BOOTTIME).ok().map(Duration::from),
        Some(clock) => Some(clock.since_boot()),
    }
}

/// Waits for `time`.
pub async fn sleep(time: Duration) {
    match test_clock() {
        None => tokio::time::sleep(time).await,
        Some(clock) => clock.sleep_until(clock.now() + time).await,
    }
}

/// The time limit was exceeded, and the work dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedOut;

/// Runs `work` for at most `limit`.
pub async fn timeout<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, TimedOut> {
    if test_clock().is_none() {
        return tokio::time::timeout(limit, work).await.map_err(|_| TimedOut);
    }
    tokio::select! {
        biased;
        done = work => Ok(done),
        () = sleep(limit) => Err(TimedOut),
    }
}

/// Waits for a message on a thread that runs no tasks, for at most `limit` if given; none when the channel is closed.
pub fn receive<T>(inbox: &mut UnboundedReceiver<T>, limit: Option<Duration>) -> Result<Option<T>, TimedOut> {
    let clock = test_clock();
    let set_waiting = |waiting| clock.iter().for_each(|clock| clock.set_waiting(waiting));
    let Some(limit) = limit else {
        set_waiting(true);
        let received = inbox.blocking_recv();
        set_waiting(false);
        return Ok(received);
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime with time only opens nothing");
    set_waiting(true);
    let received = runtime.block_on(timeout(limit, inbox.recv()));
    set_waiting(false);
    received
}
