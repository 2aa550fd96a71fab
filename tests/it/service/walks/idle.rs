//! Detects that all processes of a walk are idle: every task waits at a gate, for the clock, for an answer of the
//! database that waits for a lock, or for another such task; and no thread computes.
//!
//! All tasks run on one thread, whose runtime reports when it has nothing to do. Work that it has given to other
//! threads is counted: with no keep-alive time, each is a thread that begins and ends.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use hypnos::store::Store;
use tokio::runtime::{Builder, Runtime};

use super::database::Database;
use super::pace::Pace;
use super::world::World;

/// What may be moving.
#[derive(Default)]
pub(super) struct Moving {
    pub(super) world: Arc<World>,
    pub(super) stores: Vec<Store>,
    /// Devices' threads.
    pub(super) devices: Vec<Arc<Pace>>,
}

impl Moving {
    fn is_still(&self) -> bool {
        let (open, moves) = {
            let state = self.world.state();
            (state.open, !state.in_flight.values().all(|flight| flight.is_blocked))
        };
        // A connection that nobody has any more is being given back: its transaction is rolled back first.
        !moves && Database::in_use(&self.stores) == open && self.devices.iter().all(|pace| pace.is_still())
    }
}

#[derive(Default)]
struct Shared {
    /// Threads begun so far, and those that have not ended.
    n_begun: AtomicUsize,
    n_alive: AtomicUsize,
    moving: Mutex<Moving>,
    /// The task that waits for this moment, and whether it has come.
    waiting: Mutex<(Option<Waker>, bool)>,
}

impl Shared {
    /// The runtime has nothing to do.
    fn parked(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.0.is_none() || self.n_alive.load(Ordering::SeqCst) > 0 {
            return;
        }
        let moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        if !moving.is_still() {
            return;
        }
        drop(moving);
        waiting.1 = true;
        if let Some(waker) = waiting.0.take() {
            waker.wake();
        }
    }
}

impl Shared {
    fn look_again(&self) {
        if let Some(waker) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).0.take() {
            waker.wake();
        }
    }
}

/// The runtime of all walks of a test, and how it knows that nothing moves.
#[derive(Clone, Default)]
pub(super) struct Idle(Arc<Shared>);

impl Idle {
    pub(super) fn runtime(&self) -> Runtime {
        let (named, parked, ended) = (self.0.clone(), self.0.clone(), self.0.clone());
        Builder::new_current_thread()
            .enable_all()
            .thread_keep_alive(Duration::ZERO)
            // Called where a thread is begun, not when it has got so far as to run.
            .thread_name_fn(move || {
                named.n_begun.fetch_add(1, Ordering::SeqCst);
                named.n_alive.fetch_add(1, Ordering::SeqCst);
                "blocking".into()
            })
            .on_thread_stop(move || {
                ended.n_alive.fetch_sub(1, Ordering::SeqCst);
                ended.look_again();
            })
            .on_thread_park(move || parked.parked())
            .build()
            .unwrap()
    }

    /// Something outside of the runtime has come to rest.
    pub(super) fn look_again(&self) {
        self.0.look_again();
    }

    /// Says what may be moving from now on.
    pub(super) fn watch(&self, change: impl FnOnce(&mut Moving)) {
        change(&mut self.0.moving.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Ends when nothing moves, or after a moment: which of them.
    pub(super) async fn wait(&self, moment: Duration) -> bool {
        *self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner) = (None, false);
        tokio::select! {
            biased;
            () = self.twice() => true,
            () = tokio::time::sleep(moment) => false,
        }
    }

    /// Nothing moved, and then again nothing, and nothing was begun between: what another thread had just handed over
    /// when the runtime first had nothing to do has been seen to.
    async fn twice(&self) {
        loop {
            self.once().await;
            let before = self.0.n_begun.load(Ordering::SeqCst);
            self.once().await;
            if self.0.n_begun.load(Ordering::SeqCst) == before {
                return;
            }
        }
    }

    async fn once(&self) {
        std::future::poll_fn(|context| {
            let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if std::mem::take(&mut waiting.1) {
                waiting.0 = None;
                return Poll::Ready(());
            }
            waiting.0 = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
