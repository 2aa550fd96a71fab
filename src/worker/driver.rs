//! The driver of one device: claims what the device has time for, and keeps it from claiming while the machine is not
//! well.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::{Id, JoinError, JoinSet};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::Worker;
use super::device::Device;
use crate::clock;
use crate::health::Reporter;
use crate::job::{Fault, FaultCode, Kind, TenantId};
use crate::store::{Claim, Wanted};

/// Samples that one device holds at once: one a tenant, and one more of a tenant whose own is in its last batch.
const SAMPLES_MAX: usize = 4;

/// A sample beside a training is claimed so long before it may be drawn, to fetch its weights.
const AHEAD: Duration = Duration::from_secs(1);

/// The longest rest after a fault of the machine, in first rests.
const REST_MAX: u32 = 60;

/// So often in a row an engine may be lost, or not be made anew, before its device counts as dead.
const LOST_MAX: u32 = 3;

/// How long a device that holds no job may take to answer a probe; making an engine anew is part of it.
const PROBE_PATIENCE: Duration = Duration::from_mins(10);

/// A job that this device holds.
struct Holding {
    kind: Kind,
    tenant: TenantId,
    /// Pictures of a sample that no batch was begun for.
    left: Arc<AtomicUsize>,
}

/// What a job's task tells its driver when its machine failed, before it writes that to the row.
#[derive(Clone, Debug, Default)]
pub(super) struct Alarm(Arc<Mutex<Option<Fault>>>);

impl Alarm {
    pub(super) fn ring(&self, fault: &Fault) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault.clone());
    }

    fn take(&self) -> Option<Fault> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// How a device recovers from faults of its machine.
struct Rest {
    /// No claims and no probe until then.
    until: Option<Instant>,
    /// How long the next rest is.
    pause: Duration,
    /// How often in a row the engine was lost.
    n_lost: u32,
    /// Faults of the whole process that this device was probed after.
    n_seen: u64,
}

/// Whether a device may claim.
enum Fit {
    Yes,
    /// It rests; look again after that.
    NotFor(Duration),
}

pub(super) struct Driver {
    worker: Worker,
    device: Device,
    bundle: String,
    reporter: Reporter,
    /// Fresh with every start: names of machines come again.
    identity: Uuid,
    alarm: Alarm,
    rest: Rest,
    /// Whether each job that ended did so well.
    jobs: JoinSet<bool>,
    held: HashMap<Id, Holding>,
}

impl Driver {
    pub(super) fn new(worker: Worker, device: Device, bundle: String, reporter: Reporter) -> Self {
        let rest = Rest { until: None, pause: worker.settings.rest, n_lost: 0, n_seen: 0 };
        Self {
            worker,
            device,
            bundle,
            reporter,
            identity: Uuid::now_v7(),
            alarm: Alarm::default(),
            rest,
            jobs: JoinSet::new(),
            held: HashMap::new(),
        }
    }

    /// Claims and runs jobs until told to drain, then waits for those that it holds. Fails if the device is dead.
    pub(super) async fn drive(mut self) -> Result<(), Fault> {
        self.reporter.working();
        let drain = self.worker.drain.clone();
        let mut wakes = self.worker.store.wakes();
        let mut away = false;
        let mut ended = Ok(());
        while !drain.is_cancelled() {
            let fit = tokio::select! {
                biased;
                () = drain.cancelled() => break,
                fit = self.is_fit() => fit,
            };
            let pause = match fit {
                Err(dead) => {
                    ended = Err(dead);
                    break;
                }
                Ok(Fit::NotFor(pause)) => pause,
                Ok(Fit::Yes) => match self.claim().await {
                    Ok(true) => continue, // there may be more
                    Ok(false) => {
                        away = false;
                        self.pause()
                    }
                    Err(error) => {
                        if !away {
                            warn!("no jobs can be claimed: {error}");
                        }
                        away = true;
                        self.worker.settings.poll
                    }
                },
            };
            tokio::select! {
                biased;
                () = drain.cancelled() => {}
                () = wakes.wait() => {}
                Some(done) = self.jobs.join_next_with_id() => self.forget(done),
                () = clock::sleep(pause) => {}
            }
        }
        if let Err(dead) = &ended {
            error!("the device is dead: {}", dead.message);
            self.reporter.dead(&dead.message);
        }
        while let Some(done) = self.jobs.join_next_with_id().await {
            self.forget(done);
        }
        if let Err(error) = self.worker.store.settle_claims().await {
            warn!("a job that may have been claimed is left to its lease: {error}");
        }
        ended
    }

    /// Claims one job that the device has time for, and begins it. Whether there was one.
    async fn claim(&mut self) -> crate::store::Result<bool> {
        let samples = || self.held.values().filter(|held| held.kind == Kind::Sample);
        let trains = self.held.values().any(|held| held.kind == Kind::Train);
        let draws = samples().count() < SAMPLES_MAX && self.device.sample_wait() <= AHEAD;
        let kinds: &[Kind] = match (trains, draws) {
            (false, true) => &[Kind::Train, Kind::Sample],
            (false, false) => &[Kind::Train],
            (true, true) => &[Kind::Sample],
            (true, false) => return Ok(false),
        };
        let unfinished = samples().filter(|held| held.left.load(Ordering::Acquire) > 0);
        let no_samples_of: Vec<TenantId> = unfinished.map(|held| held.tenant).collect();
        let wanted = Wanted { kinds, no_samples_of: &no_samples_of };
        let asked = clock::now();
        let settings = &self.worker.settings;
        let claimed =
            self.worker.store.claim(self.identity, wanted, settings.lease, settings.deadline).await?;
        let Some(Claim { job, turn, weight }) = claimed else { return Ok(false) };
        let left = Arc::new(AtomicUsize::new(usize::MAX)); // not known yet
        let holding = Holding { kind: job.kind, tenant: job.tenant, left: left.clone() };
        let (device, bundle) = (self.device.clone(), self.bundle.clone());
        let claim = Claim { job, turn, weight };
        let task =
            self.jobs.spawn(self.worker.clone().run(device, bundle, claim, left, asked, self.alarm.clone()));
        self.held.insert(task.id(), holding);
        Ok(true)
    }

    /// How long until the queue is looked at again, if nothing wakes us.
    fn pause(&self) -> Duration {
        match self.device.sample_wait().saturating_sub(AHEAD) {
            Duration::ZERO => self.worker.settings.poll,
            wait => wait.min(self.worker.settings.poll),
        }
    }

    fn forget(&mut self, done: Result<(Id, bool), JoinError>) {
        let id = match done {
            Ok((id, well)) => {
                if well {
                    (self.rest.pause, self.rest.n_lost) = (self.worker.settings.rest, 0);
                }
                id
            }
            Err(panic) => {
                // Its lease runs out; what its device does for it ends at the next step.
                error!("a job's task panicked: {panic}");
                panic.id()
            }
        };
        self.held.remove(&id);
    }

    /// Whether the device may claim. After a fault of the machine it may not before it has rested and been found to work;
    /// a fault under another device of this process has it looked at as well, for they share a disk.
    async fn is_fit(&mut self) -> Result<Fit, Fault> {
        if let Some(fault) = self.alarm.take()
            && self.rest.until.is_none()
        {
            return self.lie_down(&fault).map(Fit::NotFor);
        }
        let n_faults = self.worker.n_faults.load(Ordering::Acquire);
        match self.rest.until.map(|until| until.saturating_duration_since(clock::now())) {
            Some(left) if !left.is_zero() => return Ok(Fit::NotFor(left)),
            None if self.rest.n_seen == n_faults && self.device.is_whole() => return Ok(Fit::Yes),
            _ => {}
        }
        if let Err(fault) = self.probe().await {
            return self.lie_down(&fault).map(Fit::NotFor);
        }
        if self.rest.until.take().is_some() {
            info!("the device works again");
            self.reporter.working();
        }
        self.rest.n_seen = n_faults;
        Ok(Fit::Yes)
    }

    /// Rests, longer from fault to fault; how long. Fails if there is no hope.
    fn lie_down(&mut self, fault: &Fault) -> Result<Duration, Fault> {
        self.rest.n_lost = if fault.device_lost { self.rest.n_lost + 1 } else { 0 };
        if self.rest.n_lost >= LOST_MAX {
            return Err(fault.clone());
        }
        let pause = self.rest.pause;
        self.rest.pause = (pause * 2).min(self.worker.settings.rest * REST_MAX);
        self.rest.until = Some(clock::now() + pause);
        self.reporter.resting(&fault.message, pause);
        warn!("no jobs are claimed for {} s: {}", pause.as_secs_f64(), fault.message);
        metrics::counter!("hypnos_rests_total").increment(1);
        Ok(pause)
    }

    /// Whether the machine can work: the disk first, then the device.
    async fn probe(&self) -> Result<(), Fault> {
        let scratch = self.worker.scratch.clone();
        let probed = tokio::task::spawn_blocking(move || scratch.probe()).await;
        let probed = probed.unwrap_or_else(|panic| Err(std::io::Error::other(panic.to_string())));
        probed.map_err(|error| super::scratch_fault(&error))?;
        if self.held.is_empty() {
            let silent = || Err(Fault::device_lost("the device does not answer"));
            return clock::timeout(PROBE_PATIENCE, self.device.probe()).await.unwrap_or_else(|_| silent());
        }
        self.device.probe().await // between two steps of whatever it is at
    }
}

/// A driver that did not end by itself.
pub(super) fn died(error: &JoinError) -> Fault {
    Fault::new(FaultCode::Internal, format!("a device's driver died: {error}"))
}
