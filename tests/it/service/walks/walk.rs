//! One walk: processes that work, clients that send requests, and randomly chosen faults.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use hypnos::blobs::Blobs;
use hypnos::job::JobId;
use hypnos::{clock, deployment};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::super::scripted::Script;
use super::act::DAY;
use super::bucket::{Bucket, Way};
use super::client::{Answer, ClientRequest, Clients};
use super::conditions::{Conditions, Outage};
use super::database::Database;
use super::idle::Idle;
use super::invariants::Seen;
use super::pace::Pace;
use super::random::Random;
use super::world::{BEGINNING_MS, Counts, Process, WalkClock, World};

/// When all goes well, everything must have ended after so many actions, and so long by the walk's clock.
const END_ACTIONS: usize = 20_000;
const END: Duration = Duration::from_hours(12);

/// What processes there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Server,
    Worker,
    Maintenance,
    Sweep,
}

/// Where they are; each place has a store of its own.
pub(super) const PLACES: [(Role, &str); 6] = [
    (Role::Server, "server A"),
    (Role::Server, "server B"),
    (Role::Worker, "worker A"),
    (Role::Worker, "worker B"),
    (Role::Maintenance, "maintenance"),
    (Role::Sweep, "sweep"),
];

/// A process that is up.
pub(super) struct Up {
    pub(super) process: Arc<Process>,
    pub(super) tasks: Vec<JoinHandle<()>>,
    /// Of a server, once it serves.
    pub(super) router: Arc<OnceLock<Router>>,
    /// Of a worker.
    pub(super) device: Option<Device>,
    pub(super) drain: CancellationToken,
}

pub(super) struct Device {
    pub(super) pace: Arc<Pace>,
    pub(super) script: Script,
    pub(super) n_seen: usize,
}

/// A request under way.
pub(super) struct PendingRequest {
    pub(super) place: usize,
    pub(super) request: ClientRequest,
    pub(super) task: JoinHandle<Answer>,
}

/// What may happen next.
#[derive(Clone, Debug)]
pub(super) enum Action {
    /// What waits at this gate goes on, well or not.
    Pass(u64),
    /// A device takes a step.
    Step(usize),
    /// The clock goes to the next moment for which somebody waits.
    Tick(Duration),
    Wait(Duration),
    NextDay,
    Want,
    Sample(String),
    Retry(String),
    Resend(usize),
    Send(ClientRequest),
    /// A client waits no longer for an answer.
    GiveUp(usize),
    /// A late call is done, or never.
    Land(usize),
    Lose(usize),
    Start(usize),
    Kill(usize),
    Freeze(usize),
    Thaw(usize),
    Drain(usize),
    /// Something goes wrong for a while.
    Outage(Outage),
    NoOutage,
}

pub(super) struct Walk<'a> {
    pub(super) random: Random,
    pub(super) conditions: Conditions,
    /// What goes wrong just now, at every call.
    pub(super) outage: Option<Outage>,
    pub(super) idle: Idle,
    pub(super) world: Arc<World>,
    pub(super) database: &'a mut Database,
    pub(super) bucket: Bucket,
    pub(super) scratch: &'a Path,
    pub(super) up: [Option<Up>; PLACES.len()],
    pub(super) n_started: usize,
    pub(super) clients: Clients,
    pub(super) pending: Vec<PendingRequest>,
    pub(super) seen: Seen,
    names: Names,
    pub(super) log: Vec<String>,
    pub(super) verbose: bool,
}

/// Ids differ from run to run; their numbers do not.
#[derive(Default)]
struct Names(Vec<String>);

impl Names {
    /// The text with a number for every id.
    fn plain(&mut self, text: &str) -> String {
        const LENGTH: usize = 36;
        let (mut plain, mut rest) = (String::new(), text);
        let is_id = |rest: &str, at: usize| {
            let dashed =
                rest.as_bytes().get(at + 8) == Some(&b'-') && rest.as_bytes().get(at + 13) == Some(&b'-');
            dashed && rest.get(at..at + LENGTH).is_some_and(|id| id.parse::<JobId>().is_ok())
        };
        while let Some(at) = (0..rest.len()).find(|&at| is_id(rest, at)) {
            let id = &rest[at..at + LENGTH];
            let number = self.0.iter().position(|known| known == id).unwrap_or_else(|| {
                self.0.push(id.to_owned());
                self.0.len() - 1
            });
            plain.push_str(&rest[..at]);
            plain += "#";
            plain += &number.to_string();
            rest = &rest[at + LENGTH..];
        }
        plain + rest
    }
}

/// Why a walk failed, and what happened before.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) why: String,
    pub(super) log: Vec<String>,
}

pub(super) type Checked<T = ()> = Result<T, String>;

/// Walks. `verbose` prints every action.
pub(super) async fn walk(
    seed: u64,
    idle: &Idle,
    database: &mut Database,
    scratch: &Path,
    verbose: bool,
) -> Result<(Counts, Vec<String>), Failed> {
    let mut random = Random::new(seed);
    let conditions = Conditions::new(&mut random);
    let world = Arc::<World>::default();
    clock::set(Some(Arc::new(WalkClock(world.clone()))));
    let stores = database.stores.clone();
    idle.watch(|moving| (moving.world, moving.stores, moving.devices) = (world.clone(), stores, Vec::new()));
    let mut walk = Walk {
        random,
        conditions,
        outage: None,
        idle: idle.clone(),
        world,
        database,
        bucket: Bucket::default(),
        scratch,
        up: Default::default(),
        n_started: 0,
        clients: Clients::default(),
        pending: Vec::new(),
        seen: Seen::default(),
        names: Names::default(),
        log: Vec::new(),
        verbose,
    };
    let walked = walk.run().await;
    let ended = walk.end().await;
    let known = walk.clients.known.values();
    let retries = known.clone().filter(|known| walk.clients.wanted[known.wanted].retry_of.is_some()).count();
    let counts = Counts {
        jobs: known.count() as u64,
        retries: retries as u64,
        results: walk.seen.n_results() as u64,
        ..walk.world.state().counts
    };
    clock::set(None);
    match walked.and(ended) {
        Ok(()) => Ok((counts, walk.log)),
        Err(why) => Err(Failed { why: walk.names.plain(&why), log: walk.log }),
    }
}

impl Walk<'_> {
    async fn run(&mut self) -> Checked {
        self.say(format!("{:?}", self.conditions));
        self.database.set_time(BEGINNING_MS).await;
        if self.conditions.is_paired {
            let nobody = Process::new("nobody".into(), &self.world);
            let paired =
                deployment::pair(&self.database.stores[0], &Blobs::over(Way::at_once(&nobody, &self.bucket)))
                    .await;
            paired.map_err(|error| format!("the walk cannot begin: {error}"))?;
        }
        for (place, (role, _)) in PLACES.iter().enumerate() {
            if *role != Role::Sweep {
                self.start(place);
                self.rest().await?;
            }
        }
        let conditions = self.conditions;
        for n in 0..conditions.n_actions {
            self.conditions = if n < conditions.n_warm { conditions.warm() } else { conditions };
            let action = self.choose()?;
            self.act(action).await?;
            self.rest().await?;
        }
        self.end_faults().await?;
        self.finish().await?;
        self.sweep_all().await
    }

    /// From now on all goes well.
    async fn end_faults(&mut self) -> Checked {
        self.say("no more faults".into());
        self.conditions = Conditions::FAULTLESS;
        self.outage = None;
        for up in self.up.iter().flatten() {
            up.process.freeze(false);
        }
        loop {
            let n_late = self.world.state().late.len();
            if n_late == 0 {
                return Ok(());
            }
            let one = self.random.below(n_late as u64) as usize;
            let lands = self.random.per_mille(800);
            self.act(if lands { Action::Land(one) } else { Action::Lose(one) }).await?;
            self.rest().await?;
        }
    }

    /// Goes on until everything has ended.
    async fn finish(&mut self) -> Checked {
        let until = self.world.state().now + END;
        for _ in 0..END_ACTIONS {
            if self.pending.is_empty() && self.seen.unfinished(&self.clients).is_empty() {
                return Ok(());
            }
            if self.world.state().now > until {
                break;
            }
            let action = self.choose()?;
            self.act(action).await?;
            self.rest().await?;
        }
        let left = self.seen.unfinished(&self.clients).join("; ");
        Err(format!("not everything ends: {left}"))
    }

    /// A day later, with nobody at work, a sweep leaves what rows name and nothing else.
    async fn sweep_all(&mut self) -> Checked {
        self.kill_all().await?;
        self.rest().await?;
        let tomorrow = self.world.state().now + DAY + DAY;
        self.move_clock(tomorrow).await?;
        let sweep = PLACES.iter().position(|(role, _)| *role == Role::Sweep).expect("there is a sweep");
        self.start(sweep);
        self.rest().await?;
        while self.up[sweep].is_some() {
            let action = self.choose_at(|place| place == sweep)?;
            self.act(action).await?;
            self.rest().await?;
        }
        self.seen.nothing_is_left(&self.bucket)
    }

    async fn kill_all(&mut self) -> Checked {
        for place in 0..PLACES.len() {
            self.kill(place).await?;
        }
        Ok(())
    }

    /// Leaves nothing behind for the next walk.
    async fn end(&mut self) -> Checked {
        self.kill_all().await?;
        let late = std::mem::take(&mut self.world.state().late);
        drop(late); // with their transactions, which tell the world
        self.come_to_rest().await?;
        // Tasks that their process did not wait for wait for the clock, or for a gate that is shut.
        for _ in 0..100 {
            let Some(due) = self.world.state().next_timer() else { break };
            self.world.move_clock(due);
            self.come_to_rest().await?;
        }
        self.idle.watch(|moving| moving.devices.clear());
        self.database.empty().await;
        Ok(())
    }

    pub(super) fn say(&mut self, what: String) {
        let what = self.names.plain(&what);
        let line = format!("{:5} {:10.3} s  {what}", self.log.len(), self.world.state().now.as_secs_f64());
        if self.verbose {
            eprintln!("{line}");
        }
        self.log.push(line);
    }
}
