//! Executes one action of a walk, and everything that follows from it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hypnos::blobs::Blobs;
use hypnos::health::Health;
use hypnos::store::{Delivery, Statement, Store};
use hypnos::worker::{self, LeaseKeeper};
use hypnos::{clock, deployment, maintenance, sweep};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::super::scripted::Script;
use super::bucket::Way;
use super::choose::BUSY;
use super::client::{self, ClientRequest, Submission, WantedJob};
use super::conditions::Passage;
use super::database::{Database, Kind};
use super::pace::Pace;
use super::walk::{Action, Checked, Device, PLACES, PendingRequest, Role, Up, Walk};
use super::world::{BEGINNING_MS, Late, LateCall, Line, Process, What};

const LEASE: Duration = Duration::from_mins(1);
const HEARTBEAT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(30);
const CHECKPOINT: Duration = Duration::from_secs(3);
const DEADLINE: Duration = Duration::from_hours(2);
/// How long nothing is claimed after a fault of the machine, and how long the end of a worker may take.
const BACKOFF: Duration = Duration::from_secs(5);
const DRAIN: Duration = Duration::from_secs(100);
/// By the device's own clock.
const DEVICE_STEP: Duration = Duration::from_secs(1);
/// One training's weights, so that another's take their place.
const WEIGHTS_BYTES_MAX: u64 = 40;
pub(super) const DAY: Duration = Duration::from_hours(24);
/// How long a statement waits for a lock: the program's own limit, which the server would keep by its own clock.
const LOCK: Duration = Duration::from_secs(5);
/// A look whether the database holds something up, and when the machine counts as stuck; by its own clock.
const MOMENT: Duration = Duration::from_millis(2);
const STUCK: Duration = Duration::from_mins(1);

/// What `hypnos sweep --remove` does for an operator who has no doubts.
async fn sweep(store: &Store, blobs: &Blobs) -> Result<(), sweep::Error> {
    let before = clock::timestamp() - jiff::SignedDuration::from_hours(24);
    let found = sweep::find(store, blobs, before).await?;
    let removed = sweep::remove(store, blobs, &found.orphans).await?;
    blobs.sweep_unfinished(DAY).await?;
    if removed.failed.is_empty() { sweep::clear_restored(store, before).await } else { Ok(()) }
}

/// What every process does first; whether it may go on. One that may not is started again.
async fn pair(store: &Store, blobs: &Blobs) -> bool {
    match deployment::pair(store, blobs).await {
        Ok(_) => true,
        Err(apart @ deployment::Error::Mismatch(_)) => panic!("{apart}"),
        Err(_) => false,
    }
}

impl Walk<'_> {
    pub(super) async fn act(&mut self, action: Action) -> Checked {
        match action {
            Action::Pass(gate) => self.pass(gate),
            Action::Step(place) => {
                let to = self.world.state().now + Duration::from_millis(self.random.below(4000));
                self.move_clock(to).await?;
                self.step(place);
            }
            Action::Tick(to) => return self.move_clock(to).await,
            Action::Wait(time) => {
                self.say(format!("{} s pass", time.as_secs_f64()));
                let to = self.world.state().now + time;
                return self.move_clock(to).await;
            }
            Action::NextDay => return self.next_day().await,
            Action::Want => self.want(None),
            Action::Sample(parent) => self.want(Some(parent)),
            Action::Retry(id) => self.want_again(&id),
            Action::Resend(n) => self.send(ClientRequest::Job(n)),
            Action::Send(request) => self.send(request),
            Action::GiveUp(n) => {
                let pending = self.pending.remove(n);
                pending.task.abort();
                return self.receive(&pending.request, None);
            }
            Action::Land(n) => {
                let late = self.world.state().late.remove(n);
                self.land(late);
            }
            Action::Lose(n) => {
                let late = self.world.state().late.remove(n);
                self.say(format!("{:?}: never done: {}", late.process, late.call));
            }
            Action::Start(place) => self.start(place),
            Action::Kill(place) => return self.kill(place).await,
            Action::Freeze(place) => self.freeze(place, true),
            Action::Thaw(place) => self.freeze(place, false),
            Action::Drain(place) => {
                self.say(format!("{} is told to stop", PLACES[place].1));
                if let Some(up) = &self.up[place] {
                    up.drain.cancel();
                }
            }
            Action::Outage(outage) => {
                self.say(format!("outage begins: {outage:?}"));
                self.outage = Some(outage);
            }
            Action::NoOutage => {
                self.say("the outage is over".into());
                self.outage = None;
            }
        }
        Ok(())
    }

    fn pass(&mut self, id: u64) {
        let found = |gate: &super::world::Gate| (gate.process.clone(), gate.what.clone(), gate.since);
        let (now, is_writing, gate) = {
            let state = self.world.state();
            (state.now, state.open > 0, state.gates.iter().find(|gate| gate.id == id).map(found))
        };
        let Some((process, what, since)) = gate else { return };
        let is_busy = self.database.kind == Kind::Sqlite
            && what == What::Statement(Statement::Begin)
            && is_writing
            && now >= since + BUSY;
        let in_outage = self.outage.and_then(|outage| outage.passage(&what, &mut self.random));
        let passage = match in_outage {
            _ if is_busy => Passage::Through(Delivery::NotSent),
            Some(passage) => passage,
            None => self.conditions.passage(&what, &mut self.random),
        };
        let outcome = match passage {
            _ if is_busy => "busy".into(),
            Passage::Through(delivery) => format!("{delivery:?}"),
            Passage::Hangs => "Hangs".into(),
        };
        self.say(format!("{process:?}: {what}: {outcome}"));
        let lateness = Duration::from_millis(self.conditions.lateness_ms(&mut self.random));
        {
            let mut state = self.world.state();
            match what {
                What::Statement(_) => state.counts.statements += 1,
                _ => state.counts.objects += 1,
            }
            state.counts.faults += u64::from(passage != Passage::Through(Delivery::Answered));
            state.lateness = lateness;
        }
        match passage {
            Passage::Through(delivery) => self.world.let_through(id, delivery),
            Passage::Hangs => self.world.hang(id),
        }
    }

    fn step(&mut self, place: usize) {
        self.say(format!("{}: its device takes a step", PLACES[place].1));
        self.world.state().counts.steps += 1;
        if let Some(Up { device: Some(device), .. }) = &self.up[place] {
            device.pace.step();
        }
    }

    /// The next moment for which somebody waits.
    pub(super) fn next_moment(&self) -> Option<Duration> {
        let state = self.world.state();
        let is_sqlite = self.database.kind == Kind::Sqlite;
        let begins = state
            .gates
            .iter()
            .filter(|gate| is_sqlite && !gate.hangs && gate.what == What::Statement(Statement::Begin));
        let busy = begins.map(|gate| gate.since + BUSY);
        let locked = state.in_flight.values().map(|flight| flight.since + LOCK);
        busy.chain(locked).filter(|at| *at > state.now).chain(state.next_timer()).min()
    }

    pub(super) async fn move_clock(&mut self, to: Duration) -> Checked {
        let waits_too_long = self.world.state().in_flight.values().any(|flight| flight.since + LOCK <= to);
        if waits_too_long {
            self.cancel_waiting().await?;
        }
        self.database.set_time(BEGINNING_MS + to.as_millis() as i64).await;
        self.world.move_clock(to);
        Ok(())
    }

    /// Ends statements that wait for a lock, as the server does.
    async fn cancel_waiting(&mut self) -> Checked {
        self.say("statements that wait for a lock are ended".into());
        let waiting: Vec<u64> = self.world.state().in_flight.keys().copied().collect();
        self.database.cancel_waiting().await;
        // The server is told; they are not ended yet.
        let began = Instant::now();
        while self.world.state().in_flight.keys().any(|id| waiting.contains(id)) {
            self.idle.wait(MOMENT).await;
            if began.elapsed() > STUCK {
                return Err("a statement that waits for a lock cannot be ended".into());
            }
        }
        self.come_to_rest().await
    }

    async fn next_day(&mut self) -> Checked {
        self.say("a day and an hour pass".into());
        let to = self.world.state().now + DAY + Duration::from_hours(1);
        for wanted in &mut self.clients.wanted {
            wanted.key = None; // names of requests are kept for a day
        }
        self.move_clock(to).await
    }

    fn want(&mut self, parent: Option<String>) {
        let n = self.clients.wanted.len();
        let wanted = WantedJob {
            key: self.random.per_mille(700).then(|| format!("request-{n}")),
            parent,
            retry_of: None,
            class_name: format!("thing-{n}"),
            steps: 3 + self.random.below(6),
            seed: self.random.below(1000),
            submission: Submission::Pending,
        };
        self.clients.wanted.push(wanted);
        self.send(ClientRequest::Job(n));
    }

    /// Wants a job done again that failed or was canceled.
    fn want_again(&mut self, id: &str) {
        let n = self.clients.wanted.len();
        let before = self.clients.wanted[self.clients.known[id].wanted].clone();
        self.clients.wanted.push(WantedJob {
            key: self.random.per_mille(700).then(|| format!("request-{n}")),
            retry_of: Some(id.to_owned()),
            submission: Submission::Pending,
            ..before
        });
        self.send(ClientRequest::Job(n));
    }

    fn send(&mut self, client_request: ClientRequest) {
        let servers: Vec<usize> = self.servers().collect();
        let place = self.random.of(&servers);
        self.say(format!("a client sends to {}: {client_request:?}", PLACES[place].1));
        let request = match &client_request {
            ClientRequest::Job(n) => {
                let wanted = &mut self.clients.wanted[*n];
                if wanted.submission == Submission::Unknown {
                    wanted.submission = Submission::Pending;
                }
                client::job(wanted)
            }
            ClientRequest::Cancel(id) | ClientRequest::Read { id, .. } => {
                client::about(&client_request, self.clients.known[id].is_sample)
            }
            ClientRequest::Delete(id) => {
                self.clients.delete_sent(id);
                client::about(&client_request, self.clients.known[id].is_sample)
            }
        };
        let Some(router) = self.up[place].as_ref().and_then(|up| up.router.get().cloned()) else { return };
        let task = tokio::spawn(client::send(router, request));
        self.pending.push(PendingRequest { place, request: client_request, task });
    }

    fn receive(&mut self, request: &ClientRequest, answer: Option<&client::Answer>) -> Checked {
        let said = self.clients.receive(request, answer)?;
        self.say(format!("a client gets an answer to {request:?}: {said}"));
        Ok(())
    }

    fn land(&mut self, late: Late) {
        self.say(format!("{:?}: done late: {}", late.process, late.call));
        let mut state = self.world.state();
        state.dirty = true;
        match late.call {
            LateCall::Commit(commit) => {
                drop(state);
                let in_flight = self.world.in_flight();
                tokio::spawn(async move {
                    commit.await;
                    drop(in_flight);
                });
            }
            LateCall::Put(key, mut stored) => {
                stored.modified_ms = BEGINNING_MS + state.now.as_millis() as i64;
                self.bucket.objects().insert(key, stored);
            }
            LateCall::Delete(key) => drop(self.bucket.objects().remove(&key)),
        }
    }

    fn freeze(&mut self, place: usize, frozen: bool) {
        self.say(format!("{} {}", PLACES[place].1, if frozen { "freezes" } else { "thaws" }));
        self.world.state().counts.freezes += u64::from(frozen);
        if let Some(up) = &self.up[place] {
            up.process.freeze(frozen);
        }
    }

    pub(super) fn start(&mut self, place: usize) {
        let (role, name) = PLACES[place];
        self.say(format!("{name} starts"));
        self.n_started += 1;
        let process = Process::new(name.into(), &self.world);
        let store = self.database.stores[place].with_faults(Arc::new(Line(process.clone())));
        let blobs = Blobs::over(Way::new(&process, &self.bucket));
        let drain = CancellationToken::new();
        let mut up =
            Up { process, tasks: Vec::new(), router: Arc::default(), device: None, drain: drain.clone() };
        match role {
            Role::Server => {
                let router =
                    client::server(store.clone(), blobs.clone(), self.conditions.attempts_max, self.scratch);
                let served = up.router.clone();
                up.tasks.push(tokio::spawn(async move {
                    if pair(&store, &blobs).await {
                        let _ = served.set(router); // it is set once
                        std::future::pending::<()>().await;
                    }
                }));
            }
            Role::Worker => {
                let (device, tasks) = self.start_worker(store, blobs, drain);
                (up.device, up.tasks) = (Some(device), tasks);
            }
            Role::Maintenance => {
                up.tasks.push(tokio::spawn(async move {
                    if pair(&store, &blobs).await {
                        maintenance::run(store, blobs, PAUSE, drain).await;
                    }
                }));
            }
            Role::Sweep => up.tasks.push(tokio::spawn(async move {
                let _ = sweep(&store, &blobs).await; // it is run again
            })),
        }
        self.up[place] = Some(up);
    }

    fn start_worker(
        &self,
        store: Store,
        blobs: Blobs,
        drain: CancellationToken,
    ) -> (Device, Vec<JoinHandle<()>>) {
        let pace = Pace::new(&self.idle);
        let paced = pace.clone();
        let script = Script::new(DEVICE_STEP).paced(move || paced.wait());
        let settings = worker::Settings {
            database: String::new(),
            lease: LEASE,
            heartbeat: HEARTBEAT,
            deadline: DEADLINE,
            poll: POLL,
            checkpoint_every: CHECKPOINT,
            scratch: self.scratch.to_owned(),
            weights_bytes_max: WEIGHTS_BYTES_MAX,
            sample_share: 0.5,
            backoff: BACKOFF,
            drain: DRAIN,
            host: format!("host-{}", self.n_started),
            clock: script.clock(),
        };
        let engines = vec![("scripted".to_owned(), pace.engine(&script, &self.world))];
        let lease_keeper = LeaseKeeper::new(LEASE);
        let connected = store.clone();
        let beating = lease_keeper.clone().run(
            move || std::future::ready(Ok(connected.clone())),
            HEARTBEAT,
            drain.child_token(),
        );
        let (idle, begun) = (self.idle.clone(), pace.clone());
        let working = async move {
            if !pair(&store, &blobs).await {
                return;
            }
            // Its thread begins before anything else can be looked at.
            idle.watch(|moving| {
                moving.devices.retain(|pace| !pace.has_ended());
                moving.devices.push(begun);
            });
            let health = Health::default();
            let worked =
                worker::run_with(lease_keeper, settings, store, blobs, engines, &health, drain.clone()).await;
            if let Err(fault) = worked {
                assert!(drain.is_cancelled(), "a worker ends: {fault}");
            }
        };
        (Device { pace, script, n_seen: 0 }, vec![tokio::spawn(working), tokio::spawn(beating)])
    }

    pub(super) async fn kill(&mut self, place: usize) -> Checked {
        let Some(up) = self.up[place].take() else { return Ok(()) };
        self.say(format!("{} is killed", PLACES[place].1));
        self.world.state().counts.kills += 1;
        if !self.world.state().in_flight.is_empty() {
            self.cancel_waiting().await?;
        }
        up.process.kill();
        up.tasks.iter().for_each(JoinHandle::abort);
        if let Some(device) = &up.device {
            device.pace.end();
        }
        let pending = std::mem::take(&mut self.pending);
        let (lost, left): (Vec<PendingRequest>, _) =
            pending.into_iter().partition(|request| request.place == place);
        self.pending = left;
        for pending in lost {
            pending.task.abort();
            self.receive(&pending.request, None)?;
        }
        // Of a file, what a dead process was at is done by now or never; a server goes on with it.
        while self.database.kind == Kind::Sqlite {
            let commit = |late: &Late| {
                Arc::ptr_eq(&late.process, &up.process) && matches!(late.call, LateCall::Commit(_))
            };
            let Some(n) = self.world.state().late.iter().position(commit) else { break };
            let late = self.world.state().late.remove(n);
            if self.random.per_mille(500) {
                self.land(late);
            }
        }
        Ok(())
    }

    /// Lets everything go as far as it goes by itself, and looks at what came of it.
    pub(super) async fn rest(&mut self) -> Checked {
        self.come_to_rest().await?;
        for (place, (_, name)) in PLACES.iter().enumerate() {
            let Some(up) = &mut self.up[place] else { continue };
            if let Some(device) = &mut up.device {
                let did = device.script.did.lock().unwrap();
                let new = did[device.n_seen..].to_vec();
                device.n_seen = did.len();
                drop(did);
                self.seen.did(&format!("{name} {}", Arc::as_ptr(&up.process).addr()), &new)?;
            }
            if up.tasks.first().is_some_and(JoinHandle::is_finished) {
                self.say(format!("{name} has ended"));
                self.end_of(place).await?;
            }
        }
        let pending = std::mem::take(&mut self.pending);
        let (answered, left): (Vec<PendingRequest>, _) =
            pending.into_iter().partition(|request| request.task.is_finished());
        self.pending = left;
        for pending in answered {
            let answer = pending.task.await.map_err(|error| format!("a server panicked: {error}"))?;
            self.receive(&pending.request, Some(&answer))?;
        }
        self.world.state().counts.actions += 1;
        let dirty = std::mem::take(&mut self.world.state().dirty);
        if dirty {
            self.world.state().counts.looks += 1;
            let rows = self.database.rows().await;
            self.seen.look(rows, &self.bucket, &self.clients)?;
        }
        Ok(())
    }

    /// A process has come to its end by itself: the rest of it goes as well.
    async fn end_of(&mut self, place: usize) -> Checked {
        let Some(mut up) = self.up[place].take() else { return Ok(()) };
        let first = up.tasks.remove(0);
        first.await.map_err(|error| format!("{} panicked: {error}", PLACES[place].1))?;
        up.process.kill();
        up.tasks.iter().for_each(JoinHandle::abort);
        if let Some(device) = &up.device {
            device.pace.end();
        }
        self.come_to_rest().await
    }

    /// Waits until nothing moves by itself.
    pub(super) async fn come_to_rest(&mut self) -> Checked {
        let began = Instant::now();
        while !self.idle.wait(MOMENT).await {
            self.world.state().counts.moments += 1;
            let (n_in_flight, open) = {
                let state = self.world.state();
                (state.in_flight.len(), state.open)
            };
            // A transaction that is being rolled back holds its locks until that is done.
            let is_settled = Database::in_use(&self.database.stores) == open;
            if n_in_flight > 0 && is_settled && self.database.n_waiting().await == n_in_flight {
                self.world.state().in_flight.values_mut().for_each(|flight| flight.is_blocked = true);
            }
            if began.elapsed() > STUCK {
                return Err(format!("something has not come to rest within {STUCK:?}"));
            }
        }
        self.world.tidy();
        Ok(())
    }
}
