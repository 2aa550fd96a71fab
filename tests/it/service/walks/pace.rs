//! A device's thread that takes a step when the walk decides.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use hypnos::clock::{self, TestClock};
use hypnos::worker::MakeEngine;
use jiff::Timestamp;

use super::super::scripted::Script;
use super::idle::Idle;
use super::world::{Killed, WalkClock, World};

/// What the thread waits for before each step.
pub(super) struct Pace {
    state: Mutex<PaceState>,
    /// Whether the thread is about to wait for an order, or does.
    waits_for_order: AtomicBool,
    changed: Condvar,
    idle: Idle,
}

#[derive(Default)]
struct PaceState {
    waits: bool,
    may_go: bool,
    is_over: bool,
    /// What the kernel says of the thread, once it has begun.
    stat: Option<File>,
}

impl Pace {
    /// Of a device that is about to be started.
    pub(super) fn new(idle: &Idle) -> Arc<Self> {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Arc::new(Self { state, waits_for_order: AtomicBool::new(false), changed, idle: idle.clone() })
    }

    /// An engine of `script`'s kind that waits here, on a thread whose clock is the walk's.
    pub(super) fn engine(self: &Arc<Self>, script: &Script, world: &Arc<World>) -> MakeEngine {
        let (pace, world, make) = (self.clone(), world.clone(), script.engine());
        Box::new(move || {
            clock::set(Some(Arc::new(DeviceClock { clock: WalkClock(world.clone()), pace: pace.clone() })));
            pace.lock().stat =
                Some(File::open("/proc/thread-self/stat").expect("the thread's place in /proc"));
            make()
        })
    }

    /// Called on the device's thread before a step.
    pub(super) fn wait(&self) {
        self.lock().waits = true;
        self.idle.look_again();
        let mut state = self.lock();
        while !state.may_go && !state.is_over {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        (state.waits, state.may_go) = (false, false);
        if state.is_over {
            drop(state);
            std::panic::resume_unwind(Box::new(Killed));
        }
    }

    /// Whether a step could be taken.
    pub(super) fn is_waiting(&self) -> bool {
        let state = self.lock();
        state.waits && !state.may_go
    }

    pub(super) fn step(&self) {
        self.lock().may_go = true;
        self.changed.notify_all();
    }

    /// The device's process is dead: no further step.
    pub(super) fn end(&self) {
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Whether the thread waits, here or for an order. Of the latter the kernel knows: one that has been woken does not
    /// sleep, whether it runs yet or not. One that sleeps and waits for no order waits for a lock, which is about to be
    /// let go.
    pub(super) fn is_still(&self) -> bool {
        let state = self.lock();
        if state.waits && !state.may_go && !state.is_over {
            return true;
        }
        let Some(stat) = &state.stat else { return false };
        let waits_for_order = self.waits_for_order.load(Ordering::SeqCst);
        let mut line = [0; 64];
        match stat.read_at(&mut line, 0) {
            // Its number, its name in brackets, its state.
            Ok(n) => {
                let sleeps =
                    line[..n].rsplit(|byte| *byte == b')').next().is_some_and(|rest| rest.starts_with(b" S"));
                sleeps && waits_for_order && self.waits_for_order.load(Ordering::SeqCst)
            }
            Err(_) => true, // it has ended
        }
    }

    /// Whether the thread has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.lock().stat.as_ref().is_some_and(|stat| stat.read_at(&mut [0; 64], 0).is_err())
    }

    fn lock(&self) -> MutexGuard<'_, PaceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clock of a device's thread, which shows when the thread waits for an order.
struct DeviceClock {
    clock: WalkClock,
    pace: Arc<Pace>,
}

impl fmt::Debug for DeviceClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceClock")
    }
}

impl TestClock for DeviceClock {
    fn now(&self) -> Instant {
        self.clock.now()
    }

    fn timestamp(&self) -> Timestamp {
        self.clock.timestamp()
    }

    fn since_boot(&self) -> Duration {
        self.clock.since_boot()
    }

    fn set_waiting(&self, waiting: bool) {
        self.pace.waits_for_order.store(waiting, Ordering::SeqCst);
    }

    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        self.clock.sleep_until(at)
    }
}
