//! Rows to results: claims jobs, has a device do them, stores what came out.
//!
//! One driver a device. It holds at most one training, and beside it a few samples: their rows are claimed and their
//! weights fetched while the device takes steps, so that a sample waits for the step at hand and no longer. Every write
//! goes under the job's lease; a lease that is lost, or cannot be confirmed, ends the work without a trace.
//!
//! ```text
//! claim -> fetch -> device thread (engine) -> put objects -> finish      one task a job
//!            heart: renews the lease, writes progress, hears of cancellation
//! ```

mod cache;
mod device;
mod lease;
mod sample;
mod settle;
mod train;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span, info, info_span, warn};
use uuid::Uuid;

use crate::blobs::Blobs;
use crate::health::{Health, Reporter};
use crate::job::{Fault, FaultCode, Job, Kind, Spec};
use crate::store::Store;
use crate::telemetry;
use cache::WeightsCache;
use device::Device;
pub use device::MakeEngine;
use lease::Heart;
use settle::Outcome;

/// Samples that one device has claimed at once: one being drawn, one being fetched.
const SAMPLES_MAX: usize = 2;

/// How often weights of deleted products are looked for on the disk.
const FORGET_EVERY: Duration = Duration::from_secs(10);

/// How the name of a scratch directory ends while it is being made.
const MAKING: &str = "making";

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
}

/// What all the drivers of a process share.
#[derive(Clone, Debug)]
struct Worker {
    store: Store,
    blobs: Blobs,
    settings: Arc<Settings>,
    heart: Heart,
    weights: WeightsCache,
    scratch: PathBuf,
    /// No more claims; trainings write a checkpoint and go back to the queue.
    drain: CancellationToken,
}

/// Works until `drain` is called and what is held has been finished or given back. One driver for each engine, by the
/// name of its device; `health` hears how each is doing.
///
/// Fails before the first claim if an engine cannot be made, and later only if every device's thread has died.
pub async fn run(
    settings: Settings,
    store: Store,
    blobs: Blobs,
    engines: Vec<(String, MakeEngine)>,
    health: &Health,
    drain: CancellationToken,
) -> Result<(), Fault> {
    let machine =
        |error: std::io::Error| Fault::new(crate::job::FaultCode::Machine, format!("scratch: {error}"));
    let (scratch, _in_use) = own_scratch(&settings.scratch).map_err(machine)?;
    let weights = WeightsCache::open(settings.scratch.join("weights"), settings.weights_bytes_max);
    let stop_heart = CancellationToken::new();
    let _stops = stop_heart.clone().drop_guard();
    let heart =
        Heart::start(&settings.database, settings.lease, settings.beat, stop_heart).map_err(machine)?;
    let worker = Worker {
        store,
        blobs,
        settings: Arc::new(settings),
        heart,
        weights: weights.map_err(machine)?,
        scratch: scratch.clone(),
        drain,
    };
    let _forgetting = AbortOnDropHandle::new(tokio::spawn(worker.clone().forget_deleted()));
    let engines: Vec<_> = engines.into_iter().map(|(name, make)| (health.add(&name), name, make)).collect();
    let mut drivers = JoinSet::new();
    for (reporter, name, make) in engines {
        let (device, bundle) = Device::start(&name, make).await?;
        info!(device = name, bundle, "ready");
        let span = info_span!("worker", device = name);
        drivers.spawn(worker.clone().drive(device, bundle, reporter).instrument(span));
    }
    drivers.join_all().await;
    if let Err(error) = std::fs::remove_dir_all(&scratch) {
        warn!("scratch is left behind: {error}");
    }
    Ok(())
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
            tokio::time::sleep(FORGET_EVERY).await;
        }
    }

    async fn try_forget_deleted(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.weights.retain(&self.store).await?;
        Ok(remove_abandoned(&self.settings.scratch.join("runs"))?)
    }

    /// Claims and runs jobs until told to drain, then waits for those that it holds.
    async fn drive(self, device: Device, bundle: String, reporter: Reporter) {
        reporter.working();
        let identity = Uuid::now_v7(); // fresh with every start: names of machines come again
        let mut wakes = self.store.wakes();
        let mut jobs: JoinSet<Kind> = JoinSet::new();
        let (mut n_trainings, mut n_samples) = (0, 0);
        let mut away = false;
        while !self.drain.is_cancelled() {
            let kinds: &[Kind] = match (n_trainings, n_samples) {
                (0, n) if n < SAMPLES_MAX => &[Kind::Sample, Kind::Train],
                (0, _) => &[],
                (_, n) if n < SAMPLES_MAX => &[Kind::Sample],
                _ => &[],
            };
            let asked = Instant::now();
            let claimed = match kinds {
                [] => None,
                kinds => match self.claim(identity, kinds).await {
                    Ok(claimed) => {
                        away = false;
                        claimed
                    }
                    Err(error) => {
                        if !away {
                            warn!("no jobs can be claimed: {error}");
                        }
                        away = true;
                        None
                    }
                },
            };
            if let Some(job) = claimed {
                match job.kind {
                    Kind::Train => n_trainings += 1,
                    Kind::Sample => n_samples += 1,
                }
                jobs.spawn(self.clone().run(device.clone(), bundle.clone(), job, asked));
                continue; // there may be more
            }
            tokio::select! {
                () = self.drain.cancelled() => {}
                () = wakes.wait() => {}
                Some(done) = jobs.join_next() => match done {
                    Ok(Kind::Train) => n_trainings -= 1,
                    Ok(Kind::Sample) => n_samples -= 1,
                    Err(panic) => {
                        warn!("a job's task panicked: {panic}");
                        (n_trainings, n_samples) = (0, 0); // counted anew: its kind is not known
                        jobs.detach_all();
                    }
                },
                () = tokio::time::sleep(self.settings.poll) => {}
            }
        }
        jobs.join_all().await;
        if let Err(error) = self.store.settle_claims().await {
            warn!("a job that may have been claimed is left to its lease: {error}");
        }
    }

    async fn claim(&self, identity: Uuid, kinds: &[Kind]) -> crate::store::Result<Option<Job>> {
        self.store.claim(identity, kinds, self.settings.lease, self.settings.deadline).await
    }

    /// One job from its claim to its last row.
    async fn run(self, device: Device, bundle: String, job: Job, asked: Instant) -> Kind {
        let kind = job.kind;
        let span = info_span!("job", job = %job.id, kind = %kind, attempt = job.attempt);
        telemetry::adopt(&span, job.trace.as_deref());
        let holding = self.heart.hold(job.lease(), asked);
        async {
            info!("claimed");
            let outcome = match job.spec() {
                Ok(Spec::Train(spec)) => self.train(&device, &bundle, &job, &spec, &holding.held).await,
                Ok(Spec::Sample(spec)) => self.sample(&device, &job, &spec, &holding.held).await,
                Err(_) => Fault::new(FaultCode::Internal, "its row does not say what it is to do").into(),
            };
            if let Outcome::Failed(fault) = &outcome {
                telemetry::failed(&Span::current(), fault.code.as_str());
            }
            self.settle(&job, &holding.held, outcome).await;
        }
        .instrument(span)
        .await;
        kind
    }
}

/// A directory of this process below `scratch`, and the lock that says it is in use. Those of processes that have died
/// are removed.
fn own_scratch(scratch: &Path) -> std::io::Result<(PathBuf, std::fs::File)> {
    use fs4::FileExt;
    let runs = scratch.join("runs");
    std::fs::create_dir_all(&runs)?;
    remove_abandoned(&runs)?;
    let own = runs.join(Uuid::now_v7().to_string());
    // It gets its name when it is locked: whoever sees it before could take it for abandoned.
    let making = own.with_extension(MAKING);
    std::fs::create_dir(&making)?;
    let lock = std::fs::File::create(making.join("lock"))?;
    FileExt::lock(&lock)?;
    std::fs::rename(&making, &own)?;
    Ok((own, lock))
}

/// Removes the directories of processes that have died, with what they hold of products.
fn remove_abandoned(runs: &Path) -> std::io::Result<()> {
    use fs4::FileExt;
    for entry in std::fs::read_dir(runs)?.flatten() {
        let is_being_made = entry.path().extension().is_some_and(|end| end == MAKING);
        let abandoned = match std::fs::File::open(entry.path().join("lock")) {
            Ok(lock) if !is_being_made => FileExt::try_lock(&lock).is_ok(),
            _ => false, // or not ours
        };
        if abandoned
            && let Err(error) = std::fs::remove_dir_all(entry.path())
            && error.kind() != std::io::ErrorKind::NotFound
        // another process did it
        {
            return Err(error);
        }
    }
    Ok(())
}
