//! The environment of a walk's processes: a clock that the walk moves, and gates where every statement, every use of
//! the object store and every step of a device waits until the walk lets it through.

use std::any::Any;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hypnos::clock::TestClock;
use hypnos::store::{Commit, Delivery, FaultInjector, Guard, Statement};
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::bucket::Stored;

/// When every walk begins, in milliseconds since 1970.
pub(super) const BEGINNING_MS: i64 = 1_767_225_600_000;

/// What waits at a gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Statement(Statement),
    Put(String),
    Get(String),
    List(String),
    Delete(String),
    /// A call that was let through, and will never be answered.
    Nothing,
}

impl What {
    /// Whether it can be carried out when its caller has given up.
    pub(super) fn can_be_late(&self) -> bool {
        matches!(self, Self::Statement(Statement::Commit) | Self::Put(_) | Self::Delete(_))
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Statement(statement) => write!(f, "{statement:?}"),
            Self::Put(key) => write!(f, "put {key}"),
            Self::Get(key) => write!(f, "get {key}"),
            Self::List(key) => write!(f, "list {key}"),
            Self::Delete(key) => write!(f, "delete {key}"),
            Self::Nothing => f.write_str("nothing"),
        }
    }
}

pub(super) struct Gate {
    pub(super) id: u64,
    pub(super) process: Arc<Process>,
    pub(super) what: What,
    pub(super) since: Duration,
    /// The task that waits; older ones have smaller numbers.
    task: u64,
    /// It will never be let through; whoever waits has to give up by itself.
    pub(super) hangs: bool,
    go: oneshot::Sender<Delivery>,
}

struct Timer {
    due: Duration,
    ring: oneshot::Sender<()>,
}

/// What is carried out when nobody waits for it any more.
pub(super) enum LateCall {
    Commit(Commit),
    Put(String, Stored),
    Delete(String),
}

impl fmt::Display for LateCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Commit(_) => f.write_str("Commit"),
            Self::Put(key, _) => write!(f, "put {key}"),
            Self::Delete(key) => write!(f, "delete {key}"),
        }
    }
}

pub(super) struct Late {
    pub(super) process: Arc<Process>,
    pub(super) call: LateCall,
    /// Not before this time.
    pub(super) after: Duration,
}

/// What was done in a walk, to be reported.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Jobs that were accepted; of these, the retries; those that had a result.
    pub(super) jobs: u64,
    pub(super) retries: u64,
    pub(super) results: u64,
    pub(super) statements: u64,
    pub(super) objects: u64,
    pub(super) steps: u64,
    pub(super) faults: u64,
    pub(super) late: u64,
    pub(super) kills: u64,
    pub(super) freezes: u64,
    pub(super) moments: u64,
    pub(super) actions: u64,
    pub(super) looks: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.jobs += more.jobs;
        self.retries += more.retries;
        self.results += more.results;
        self.statements += more.statements;
        self.objects += more.objects;
        self.steps += more.steps;
        self.faults += more.faults;
        self.late += more.late;
        self.kills += more.kills;
        self.freezes += more.freezes;
        self.moments += more.moments;
        self.actions += more.actions;
        self.looks += more.looks;
    }
}

#[derive(Default)]
pub(super) struct State {
    /// Since the walk began.
    pub(super) now: Duration,
    pub(super) gates: Vec<Gate>,
    timers: Vec<Timer>,
    pub(super) late: Vec<Late>,
    /// How long after it was sent a late call is carried out at the earliest.
    pub(super) lateness: Duration,
    /// Transactions that were begun and have not ended.
    pub(super) open: usize,
    /// Statements that the database is at.
    pub(super) in_flight: BTreeMap<u64, Flight>,
    /// Whether rows or objects may have changed since that was last looked at.
    pub(super) dirty: bool,
    pub(super) counts: Counts,
    n_ids: u64,
    last_tidied: u64,
}

/// A statement that the database is at.
#[derive(Clone, Copy)]
pub(super) struct Flight {
    pub(super) since: Duration,
    /// Known to wait for a lock, until one is let go.
    pub(super) is_blocked: bool,
}

impl State {
    fn id(&mut self) -> u64 {
        self.n_ids += 1;
        self.n_ids
    }

    /// When somebody has waited long enough, if anybody waits.
    pub(super) fn next_timer(&self) -> Option<Duration> {
        self.timers.iter().filter(|timer| !timer.ring.is_closed()).map(|timer| timer.due).min()
    }
}

/// The world of one walk.
#[derive(Default)]
pub(super) struct World(Mutex<State>);

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("World")
    }
}

impl World {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets who has given up waiting, and puts who has come since into an order that does not depend on which of
    /// several answers of the database was the quicker.
    pub(super) fn tidy(&self) {
        let mut state = self.state();
        state.gates.retain(|gate| !gate.go.is_closed());
        state.timers.retain(|timer| !timer.ring.is_closed());
        let last = state.last_tidied;
        let n_old = state.gates.iter().filter(|gate| gate.id <= last).count();
        state.gates[n_old..]
            .sort_by(|a, b| (&a.process.name, a.task, a.id).cmp(&(&b.process.name, b.task, b.id)));
        state.last_tidied = state.n_ids;
    }

    /// Lets what waits at a gate go on.
    pub(super) fn let_through(&self, id: u64, delivery: Delivery) {
        let mut state = self.state();
        if let Some(place) = state.gates.iter().position(|gate| gate.id == id) {
            let gate = state.gates.remove(place);
            let _ = gate.go.send(delivery); // whoever has given up meanwhile does not hear it
        }
    }

    /// Leaves it at its gate for ever.
    pub(super) fn hang(&self, id: u64) {
        if let Some(gate) = self.state().gates.iter_mut().find(|gate| gate.id == id) {
            gate.hangs = true;
        }
    }

    /// Moves the clock. Whoever has waited until then goes on.
    pub(super) fn move_clock(&self, to: Duration) {
        let mut state = self.state();
        state.now = state.now.max(to);
        let now = state.now;
        let (due, waiting) =
            std::mem::take(&mut state.timers).into_iter().partition(|timer| timer.due <= now);
        state.timers = waiting;
        let mut due: Vec<Timer> = due;
        due.sort_by_key(|timer| timer.due);
        for timer in due {
            let _ = timer.ring.send(());
        }
    }

    pub(super) fn do_later(self: &Arc<Self>, process: &Arc<Process>, call: LateCall) {
        let mut state = self.state();
        let after = state.now + state.lateness;
        state.counts.late += 1;
        state.late.push(Late { process: process.clone(), call, after });
    }

    /// A statement that the database is at until this is dropped.
    pub(super) fn in_flight(self: &Arc<Self>) -> InFlight {
        let mut state = self.state();
        let (id, now) = (state.id(), state.now);
        state.in_flight.insert(id, Flight { since: now, is_blocked: false });
        InFlight { world: self.clone(), id }
    }
}

pub(super) struct InFlight {
    world: Arc<World>,
    id: u64,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.world.state().in_flight.remove(&self.id);
    }
}

struct Open(Arc<World>);

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.open -= 1;
        // Somebody may have waited for its locks.
        state.in_flight.values_mut().for_each(|flight| flight.is_blocked = false);
        state.dirty = true;
    }
}

/// The clock of all processes of a walk.
#[derive(Debug)]
pub(super) struct WalkClock(pub(super) Arc<World>);

impl TestClock for WalkClock {
    fn now(&self) -> Instant {
        static BASE: LazyLock<Instant> = LazyLock::new(Instant::now);
        *BASE + self.0.state().now
    }

    fn timestamp(&self) -> Timestamp {
        let now = BEGINNING_MS + self.0.state().now.as_millis() as i64;
        Timestamp::from_millisecond(now).expect("a time that a calendar has")
    }

    fn since_boot(&self) -> Duration {
        Duration::from_hours(1) + self.0.state().now
    }

    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        let (ring, rung) = oneshot::channel();
        let left = at.saturating_duration_since(self.now());
        let mut state = self.0.state();
        let due = state.now + left;
        if left.is_zero() {
            let _ = ring.send(());
        } else {
            state.timers.push(Timer { due, ring });
        }
        async {
            if rung.await.is_err() {
                std::future::pending::<()>().await; // the walk is over
            }
        }
        .boxed()
    }
}

/// A process that was killed unwinds with this, wherever it waits.
pub(super) struct Killed;

/// A process of the service, from its start to its end.
pub(super) struct Process {
    pub(super) name: String,
    world: Arc<World>,
    dead: AtomicBool,
    frozen: AtomicBool,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Process {
    pub(super) fn new(name: String, world: &Arc<World>) -> Arc<Self> {
        let (dead, frozen) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { name, world: world.clone(), dead, frozen })
    }

    pub(super) fn world(&self) -> &Arc<World> {
        &self.world
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire)
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub(super) fn freeze(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::Release);
    }

    /// Nothing of it goes on: whatever waits at a gate unwinds, and whatever comes to one.
    pub(super) fn kill(self: &Arc<Self>) {
        self.dead.store(true, Ordering::Release);
        self.world.state().gates.retain(|gate| !Arc::ptr_eq(&gate.process, self));
    }

    /// Waits at a gate; what becomes of it.
    pub(super) async fn pass(self: &Arc<Self>, what: What) -> Delivery {
        self.check_alive();
        let (go, passed) = oneshot::channel();
        {
            let mut state = self.world.state();
            let (id, since, hangs) = (state.id(), state.now, what == What::Nothing);
            let task = tokio::task::try_id().map_or(0, |id| id.to_string().parse().expect("a number"));
            state.gates.push(Gate { id, process: self.clone(), what, since, task, hangs, go });
        }
        let delivery = passed.await;
        self.check_alive();
        match delivery {
            Ok(delivery) => delivery,
            Err(_) => std::future::pending().await, // the walk is over
        }
    }

    /// Waits for an answer that never comes.
    pub(super) async fn wait_in_vain(self: &Arc<Self>) -> Infallible {
        loop {
            self.pass(What::Nothing).await;
        }
    }

    fn check_alive(&self) {
        if self.is_dead() {
            std::panic::resume_unwind(Box::new(Killed) as Box<dyn Any + Send>);
        }
    }
}

/// The way of a process to its database.
#[derive(Debug)]
pub(super) struct Line(pub(super) Arc<Process>);

impl FaultInjector for Line {
    fn before(&self, statement: Statement) -> BoxFuture<'_, (Delivery, Guard)> {
        async move {
            let delivery = self.0.pass(What::Statement(statement)).await;
            (delivery, Box::new(self.0.world.in_flight()) as Guard)
        }
        .boxed()
    }

    fn begun(&self) -> Guard {
        self.0.world.state().open += 1;
        Box::new(Open(self.0.world.clone()))
    }

    fn later(&self, commit: Commit) -> BoxFuture<'_, Infallible> {
        self.0.world.do_later(&self.0, LateCall::Commit(commit));
        self.0.wait_in_vain().boxed()
    }
}
