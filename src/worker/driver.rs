//! The driver of one device: claims the jobs that the device has time for, and stops claiming while the machine fails.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::{Id, JoinError, JoinSet};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::context::Worker;
use super::device::Device;
use super::job::MachineFault;
use super::registration::Registration;
use super::scratch::scratch_fault;
use crate::clock;
use crate::health::Reporter;
use crate::job::{Fault, HeldModel, Kind, TenantId};
use crate::store::{Claim, ClaimFilter};

/// Samples that one device holds at once: one per tenant, and one more of a tenant whose own is in its last batch.
const SAMPLES_MAX: usize = 4;

/// How long before a sample may be drawn beside a training it is claimed, to fetch its weights.
const CLAIM_AHEAD: Duration = Duration::from_secs(1);

/// The longest backoff after a fault of the machine, as a multiple of the first.
const BACKOFF_MAX: u32 = 60;

/// How often in a row an engine may be lost, or fail to be made again, before its device counts as dead.
const LOST_MAX: u32 = 3;

/// How long a device that draws no samples beside a training claims samples first after one has ended.
///
/// Assumption: samples take seconds and trainings minutes to hours, so that this holds up trainings little.
const SAMPLES_FIRST: Duration = Duration::from_mins(1);

/// How long a device that holds no job may take to answer a probe, which may include making an engine.
const PROBE_TIMEOUT: Duration = Duration::from_mins(10);

/// A job that this device holds.
struct HeldJob {
    kind: Kind,
    tenant: TenantId,
    /// Images of a sample that no batch was begun for.
    left: Arc<AtomicUsize>,
}

/// The device's recovery from faults of its machine.
struct Backoff {
    /// Nothing is claimed and nothing probed until then.
    until: Option<Instant>,
    /// Length of the next backoff.
    next: Duration,
    /// How often in a row the engine was lost.
    n_lost: u32,
    /// Count of the process's machine faults at this device's last successful probe.
    n_faults_seen: u64,
}

/// Whether a device may claim.
enum Readiness {
    Ready,
    /// It backs off: check again after that time.
    After(Duration),
}

pub(super) struct Driver {
    worker: Worker,
    device: Device,
    name: String,
    model: Arc<HeldModel>,
    reporter: Reporter,
    /// New at every start, since names of machines repeat.
    identity: Uuid,
    machine_fault: MachineFault,
    backoff: Backoff,
    /// The tasks of held jobs; each returns whether its job succeeded.
    jobs: JoinSet<bool>,
    held: HashMap<Id, HeldJob>,
    /// Until when samples go before trainings, if none is drawn beside one.
    samples_first_until: Option<Instant>,
}

impl Driver {
    /// `name` is the device's.
    pub(super) fn new(
        worker: Worker,
        name: String,
        device: Device,
        model: HeldModel,
        reporter: Reporter,
    ) -> Self {
        let backoff = Backoff { until: None, next: worker.settings.backoff, n_lost: 0, n_faults_seen: 0 };
        Self {
            worker,
            device,
            name,
            model: Arc::new(model),
            reporter,
            identity: Uuid::now_v7(),
            machine_fault: MachineFault::default(),
            backoff,
            jobs: JoinSet::new(),
            held: HashMap::new(),
            samples_first_until: None,
        }
    }

    /// Claims and runs jobs until shutdown, then waits for the held ones. Fails if the device is dead.
    pub(super) async fn drive(mut self) -> Result<(), Fault> {
        self.reporter.working();
        let registration = self.register();
        let drain = self.worker.drain.clone();
        let mut subscription = self.worker.store.subscribe();
        let mut failing = false;
        let mut ended = Ok(());
        while !drain.is_cancelled() {
            let readiness = tokio::select! {
                biased;
                () = drain.cancelled() => break,
                readiness = self.readiness() => readiness,
            };
            let pause = match readiness {
                Err(dead) => {
                    ended = Err(dead);
                    break;
                }
                Ok(Readiness::After(pause)) => pause,
                Ok(Readiness::Ready) => match self.claim().await {
                    Ok(true) => continue, // there may be more
                    Ok(false) => {
                        failing = false;
                        self.poll_interval()
                    }
                    Err(error) => {
                        if !failing {
                            warn!(%error, "job claim failed");
                        }
                        failing = true;
                        self.worker.settings.poll
                    }
                },
            };
            tokio::select! {
                biased;
                () = drain.cancelled() => {}
                () = subscription.wait() => {}
                Some(done) = self.jobs.join_next_with_id() => self.on_job_ended(done),
                () = clock::sleep(pause) => {}
            }
        }
        if let Err(dead) = &ended {
            error!(fault = dead.message, "device is dead");
            self.reporter.dead(&dead.message);
        }
        while let Some(done) = self.jobs.join_next_with_id().await {
            self.on_job_ended(done);
        }
        registration.end().await;
        if let Err(error) = self.worker.store.resolve_claims().await {
            warn!(%error, "claim with unknown outcome not released; its lease will expire");
        }
        ended
    }

    /// Keeps registered what this device holds.
    fn register(&self) -> Registration {
        let lease = self.worker.settings.lease;
        Registration::start(self.worker.store.clone(), self.identity, &self.name, self.model.clone(), lease)
    }

    /// Claims one job that the device has time for, and starts it. Whether there was one.
    async fn claim(&mut self) -> crate::store::Result<bool> {
        if self.worker.settings.sample_share <= 0.0 {
            return self.claim_alone().await;
        }
        let n_samples = self.held.values().filter(|held| held.kind == Kind::Sample).count();
        let trains = self.held.values().any(|held| held.kind == Kind::Train);
        let draws = n_samples < SAMPLES_MAX && self.device.sample_wait() <= CLAIM_AHEAD;
        match (trains, draws) {
            (false, true) => self.claim_of(&[Kind::Train, Kind::Sample]).await,
            (false, false) => self.claim_of(&[Kind::Train]).await,
            (true, true) => self.claim_of(&[Kind::Sample]).await,
            (true, false) => Ok(false),
        }
    }

    /// The same for a device that draws no samples beside a training: it holds one job at a time. Samples go first for a
    /// while after a training, so that trainings in a row do not hold them up for ever.
    async fn claim_alone(&mut self) -> crate::store::Result<bool> {
        if !self.held.is_empty() {
            return Ok(false);
        }
        let samples_first = self.samples_first_until.is_some_and(|until| clock::now() < until);
        if samples_first && self.claim_of(&[Kind::Sample]).await? {
            return Ok(true);
        }
        self.claim_of(&[Kind::Train, Kind::Sample]).await
    }

    /// Claims one job of these kinds, and starts it.
    async fn claim_of(&mut self, kinds: &[Kind]) -> crate::store::Result<bool> {
        let samples = self.held.values().filter(|held| held.kind == Kind::Sample);
        let unfinished = samples.filter(|held| held.left.load(Ordering::Acquire) > 0);
        let no_samples_of: Vec<TenantId> = unfinished.map(|held| held.tenant).collect();
        let filter = ClaimFilter { kinds, no_samples_of: &no_samples_of, model: Some(&self.model.card) };
        let requested = clock::now();
        let settings = &self.worker.settings;
        let claimed =
            self.worker.store.claim(self.identity, filter, settings.lease, settings.deadline).await?;
        let Some(Claim { job, turn, weight }) = claimed else { return Ok(false) };
        let left = Arc::new(AtomicUsize::new(usize::MAX)); // not known yet
        let held_job = HeldJob { kind: job.kind, tenant: job.tenant, left: left.clone() };
        let (device, model) = (self.device.clone(), self.model.clone());
        let claim = Claim { job, turn, weight };
        let job =
            self.worker.clone().run_job(device, model, claim, left, requested, self.machine_fault.clone());
        let task = self.jobs.spawn(job);
        self.held.insert(task.id(), held_job);
        Ok(true)
    }

    /// How long until the queue is polled again if no notification arrives.
    fn poll_interval(&self) -> Duration {
        match self.device.sample_wait().saturating_sub(CLAIM_AHEAD) {
            Duration::ZERO => self.worker.settings.poll,
            wait => wait.min(self.worker.settings.poll),
        }
    }

    fn on_job_ended(&mut self, done: Result<(Id, bool), JoinError>) {
        let id = match done {
            Ok((id, succeeded)) => {
                if succeeded {
                    (self.backoff.next, self.backoff.n_lost) = (self.worker.settings.backoff, 0);
                }
                id
            }
            Err(panic) => {
                // Its lease expires; what its device does for it ends at the next step.
                error!(%panic, "job task panicked");
                panic.id()
            }
        };
        if self.held.remove(&id).is_some_and(|held| held.kind == Kind::Train) {
            self.samples_first_until = Some(clock::now() + SAMPLES_FIRST);
        }
    }

    /// Whether the device may claim. After a fault of the machine it backs off and must be probed first; a fault on
    /// another device of this process has it probed as well, since they share a disk.
    async fn readiness(&mut self) -> Result<Readiness, Fault> {
        if let Some(fault) = self.machine_fault.take()
            && self.backoff.until.is_none()
        {
            return self.back_off(&fault).map(Readiness::After);
        }
        let n_faults = self.worker.n_machine_faults.load(Ordering::Acquire);
        match self.backoff.until.map(|until| until.saturating_duration_since(clock::now())) {
            Some(left) if !left.is_zero() => return Ok(Readiness::After(left)),
            None if self.backoff.n_faults_seen == n_faults && self.device.has_engine() => {
                return Ok(Readiness::Ready);
            }
            _ => {}
        }
        if let Err(fault) = self.probe().await {
            return self.back_off(&fault).map(Readiness::After);
        }
        if self.backoff.until.take().is_some() {
            info!("device recovered");
            self.reporter.working();
        }
        self.backoff.n_faults_seen = n_faults;
        Ok(Readiness::Ready)
    }

    /// Starts a backoff, twice as long as the last; its length. Fails if the device has to be given up.
    fn back_off(&mut self, fault: &Fault) -> Result<Duration, Fault> {
        self.backoff.n_lost = if fault.device_lost { self.backoff.n_lost + 1 } else { 0 };
        if self.backoff.n_lost >= LOST_MAX {
            return Err(fault.clone());
        }
        let pause = self.backoff.next;
        self.backoff.next = (pause * 2).min(self.worker.settings.backoff * BACKOFF_MAX);
        self.backoff.until = Some(clock::now() + pause);
        self.reporter.backing_off(&fault.message, pause);
        warn!(fault = fault.message, seconds = pause.as_secs_f64(), "machine fault; claims are suspended");
        metrics::counter!("hypnos_rests_total").increment(1);
        Ok(pause)
    }

    /// Whether the machine works: first the disk, then the device.
    async fn probe(&self) -> Result<(), Fault> {
        let scratch = self.worker.scratch.clone();
        let probed = tokio::task::spawn_blocking(move || scratch.probe()).await;
        let probed = probed.unwrap_or_else(|panic| Err(std::io::Error::other(panic.to_string())));
        probed.map_err(|error| scratch_fault(&error))?;
        if self.held.is_empty() {
            let timed_out = || Err(Fault::device_lost("the device does not answer"));
            return clock::timeout(PROBE_TIMEOUT, self.device.probe()).await.unwrap_or_else(|_| timed_out());
        }
        self.device.probe().await // answered between two steps of its work
    }
}
