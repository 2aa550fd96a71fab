//! Rows to results: claims jobs, has a device do them, stores what came out.
//!
//! One driver a device. It holds at most one training, and beside it a few samples, as many as the samples' share of the
//! device allows: their rows are claimed and their weights fetched while the device takes steps. Every write goes under
//! the job's lease; a lease that is lost, or cannot be confirmed, ends the work without a trace. When the machine fails
//! under a job, the job goes back to the queue and the driver claims nothing more until a probe finds that it can work.
//!
//! ```text
//! claim -> fetch -> device thread (engine) -> put objects -> finish      one task a job
//!            heart: renews the lease, writes progress, hears of cancellation
//! ```

mod cache;
mod device;
mod driver;
mod lease;
mod sample;
mod scratch;
mod settle;
mod shares;
mod train;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span, info, info_span, warn};

use crate::blobs::Blobs;
use crate::clock;
use crate::health::Health;
use crate::job::{Fault, FaultCode, Spec};
use crate::store::{Claim, Store};
use crate::telemetry;
use cache::WeightsCache;
use device::Device;
pub use device::MakeEngine;
use driver::{Alarm, Driver};
pub use lease::Heart;
use scratch::Scratch;
use settle::Outcome;
pub use shares::Clock;

/// How often weights of deleted products are looked for on the disk.
const FORGET_EVERY: Duration = Duration::from_secs(10);

/// How a worker goes about its work.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the heart connects to.
    pub database: String,
    /// How long a claim holds without being renewed.
    pub lease: Duration,
    /// How often leases are renewed.
    pub beat: Duration,
    /// How long one attempt may take.
    pub deadline: Duration,
    /// How often the table is looked at when nothing wakes the worker.
    pub poll: Duration,
    /// How often a training is written to the store.
    pub checkpoint_every: Duration,
    /// For files in use; may be emptied between runs.
    pub scratch: PathBuf,
    /// Bound on the weights kept in `scratch`.
    pub weights_bytes_max: u64,
    /// The part of a device's time that samples may take while it trains: above 0, at most 1.
    pub sample_share: f64,
    /// How long nothing is claimed after a first fault of the machine; twice as long after each further one.
    pub rest: Duration,
    /// How long work under way may take to be stored when told to drain.
    pub drain: Duration,
    /// Which machine this is: rows remember those that failed under them.
    pub host: String,
    /// What device time is measured by.
    pub clock: Clock,
}

/// What all the drivers of a process share.
#[derive(Clone, Debug)]
struct Worker {
    store: Store,
    blobs: Blobs,
    settings: Arc<Settings>,
    heart: Heart,
    weights: WeightsCache,
    scratch: Arc<Scratch>,
    /// Faults of the machine, on any device of this process: a device that has not looked at itself since does so before
    /// it claims.
    n_faults: Arc<AtomicU64>,
    /// No more claims; what is under way goes back to the queue, trainings with a checkpoint.
    drain: CancellationToken,
}

/// Works until `drain` is called and what is held has been finished or given back. One driver for each engine, by the
/// name of its device; `health` hears how each is doing.
///
/// Fails before the first claim if an engine cannot be made, and later only if every device is dead, or if what was under
/// way when `drain` was called could not be stored in time: then its leases run out.
pub async fn run(
    settings: Settings,
    store: Store,
    blobs: Blobs,
    engines: Vec<(String, MakeEngine)>,
    health: &Health,
    drain: CancellationToken,
) -> Result<(), Fault> {
    let stop_heart = CancellationToken::new();
    let _stops = stop_heart.clone().drop_guard();
    let heart = Heart::new(settings.lease);
    heart
        .start(&settings.database, settings.beat, stop_heart)
        .map_err(|error| Fault::new(FaultCode::Machine, format!("no thread for leases: {error}")))?;
    run_with(heart, settings, store, blobs, engines, health, drain).await
}

/// The same with a heart that the caller has beat: for tests.
pub async fn run_with(
    heart: Heart,
    settings: Settings,
    store: Store,
    blobs: Blobs,
    engines: Vec<(String, MakeEngine)>,
    health: &Health,
    drain: CancellationToken,
) -> Result<(), Fault> {
    let engines: Vec<_> = engines.into_iter().map(|(name, make)| (health.add(&name), name, make)).collect();
    let scratch = Arc::new(Scratch::open(&settings.scratch).map_err(|error| scratch_fault(&error))?);
    let weights = WeightsCache::open(settings.scratch.join("weights"), settings.weights_bytes_max);
    let worker = Worker {
        store,
        blobs,
        settings: Arc::new(settings),
        heart,
        weights: weights.map_err(|error| scratch_fault(&error))?,
        scratch: scratch.clone(),
        n_faults: Arc::default(),
        drain: drain.clone(),
    };
    let _forgetting = AbortOnDropHandle::new(tokio::spawn(worker.clone().forget_deleted()));
    let limit = worker.settings.drain;
    let mut drivers = JoinSet::new();
    for (reporter, name, make) in engines {
        let (share, clock) = (worker.settings.sample_share, worker.settings.clock.clone());
        let (device, bundle) = Device::start(&name, make, share, clock).await?;
        info!(device = name, bundle, "ready");
        let span = info_span!("worker", device = name);
        drivers.spawn(Driver::new(worker.clone(), device, bundle, reporter).drive().instrument(span));
    }
    let worked = tokio::select! {
        biased;
        worked = all_ended(&mut drivers) => worked,
        () = async { drain.cancelled().await; clock::sleep(limit).await } => {
            let message = format!("what was under way could not be stored within {} s", limit.as_secs_f64());
            return Err(Fault::new(FaultCode::Machine, message)); // its tasks end with the drivers
        }
    };
    if let Err(error) = scratch.remove() {
        warn!("scratch is left behind: {error}");
    }
    worked
}

/// Waits for all drivers. Fails if each of them failed: one device that works is enough to go on.
async fn all_ended(drivers: &mut JoinSet<Result<(), Fault>>) -> Result<(), Fault> {
    let (mut worked, mut failed) = (0, None);
    while let Some(ended) = drivers.join_next().await {
        match ended.unwrap_or_else(|error| Err(driver::died(&error))) {
            Ok(()) => worked += 1,
            Err(fault) => failed = Some(fault),
        }
    }
    match failed {
        Some(fault) if worked == 0 => {
            let message = format!("no device can be used any more: {}", fault.message);
            Err(Fault { message, ..fault })
        }
        _ => Ok(()),
    }
}

/// Files in use cannot be written or read.
fn scratch_fault(error: &std::io::Error) -> Fault {
    Fault::new(FaultCode::Machine, format!("the directory for files in use fails: {}", error.kind()))
}

impl Worker {
    /// Removes from the disk the weights of deleted products, as they are deleted, and what processes that have died left.
    async fn forget_deleted(self) {
        let mut failing = false;
        loop {
            match self.try_forget_deleted().await {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true; // said once, until it goes well
                    warn!("what is left of deleted products on the disk stays for now: {error}");
                }
                Err(_) => {}
            }
            clock::sleep(FORGET_EVERY).await;
        }
    }

    async fn try_forget_deleted(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.weights.retain(&self.store).await?;
        Ok(scratch::remove_abandoned(&self.settings.scratch)?)
    }

    /// One job from its claim to its last row; whether it ended well. `left` are the pictures of a sample that no batch
    /// was begun for.
    async fn run(
        self,
        device: Device,
        bundle: String,
        claim: Claim,
        left: Arc<AtomicUsize>,
        asked: Instant,
        alarm: Alarm,
    ) -> bool {
        let job = &claim.job;
        let span = info_span!("job", job = %job.id, kind = %job.kind, attempt = job.attempt);
        telemetry::set_parent(&span, job.trace.as_deref());
        let holding = self.heart.hold(job.lease(), asked);
        async {
            info!("claimed");
            let outcome = match job.spec() {
                Ok(Spec::Train(spec)) => self.train(&device, &bundle, job, &spec, &holding.held).await,
                Ok(Spec::Sample(spec)) => self.sample(&device, &claim, &spec, left, &holding.held).await,
                Err(_) => Fault::new(FaultCode::Internal, "its row does not say what it is to do").into(),
            };
            if let Outcome::Failed(fault) = &outcome {
                telemetry::record_error(&Span::current(), fault.code.as_str());
                if fault.code == FaultCode::Machine {
                    self.n_faults.fetch_add(1, Ordering::AcqRel);
                    alarm.ring(fault);
                }
            }
            let is_done = matches!(outcome, Outcome::Done { .. });
            self.settle(job, &holding.held, outcome).await;
            is_done
        }
        .instrument(span)
        .await
    }
}
