//! The worker: claims jobs, runs them on devices, and stores their results.
//!
//! Each device has one driver. It holds at most one training, and beside it as many samples as their share of the
//! device allows: their rows are claimed and their weights fetched while the device trains. Every write names the job's
//! lease; a lease that is lost, or cannot be confirmed, ends the work without any write. When the machine fails under a
//! job, the job goes back to the queue, and the driver claims nothing until a probe succeeds.
//!
//! ```text
//! claim -> fetch -> device thread (engine) -> store objects -> finish      one task per job
//!          lease keeper: renews the leases, writes progress, learns of cancellation
//!
//! driver    one device: claims, backs off after machine faults   job        one job from claim to end
//! device    the thread that owns a device                        train      a training's steps
//! shares    device time of trainings and samples                 sample     a sample's steps
//! lease     held leases and their renewal                        artifacts  objects in the store
//! retry     retries while a lease is held                        finish     the last write of an attempt
//! cache     weights on the local disk                            outcome    how an attempt ended
//! scratch   the process's temporary directory                    progress   phases and their remaining time
//! registration  the model that a device holds
//! ```

mod artifacts;
mod cache;
mod context;
mod device;
mod disk_cleanup;
mod driver;
mod finish;
mod job;
mod lease;
mod outcome;
mod progress;
mod registration;
mod retry;
mod sample;
mod scratch;
mod settings;
mod shares;
mod train;

use std::sync::Arc;

use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, info, info_span, warn};

use crate::blobs::Blobs;
use crate::clock;
use crate::health::Health;
use crate::job::{Fault, FaultCode};
use crate::store::Store;
use cache::WeightsCache;
use context::Worker;
use device::Device;
pub use device::MakeEngine;
use driver::Driver;
pub use lease::LeaseKeeper;
use scratch::{Scratch, scratch_fault};
pub use settings::Settings;
pub use shares::Clock;

/// Works until `drain` is cancelled and all held jobs are finished or given back. Starts one driver for each engine,
/// named by its device; `health` receives the condition of each.
///
/// Fails before the first claim if an engine cannot be created. Fails later only if every device is dead, or if the work
/// in progress at shutdown could not be stored in time: then its leases expire.
pub async fn run(
    settings: Settings,
    store: Store,
    blobs: Blobs,
    engines: Vec<(String, MakeEngine)>,
    health: &Health,
    drain: CancellationToken,
) -> Result<(), Fault> {
    let stop_keeper = CancellationToken::new();
    let _stop_on_return = stop_keeper.clone().drop_guard();
    let lease_keeper = LeaseKeeper::new(settings.lease);
    lease_keeper
        .start(&settings.database, settings.heartbeat, stop_keeper)
        .map_err(|error| Fault::new(FaultCode::Machine, format!("no thread for leases: {error}")))?;
    run_with(lease_keeper, settings, store, blobs, engines, health, drain).await
}

/// [`run`] with a lease keeper that the caller runs: for tests.
pub async fn run_with(
    lease_keeper: LeaseKeeper,
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
        lease_keeper,
        weights: weights.map_err(|error| scratch_fault(&error))?,
        scratch: scratch.clone(),
        n_machine_faults: Arc::default(),
        drain: drain.clone(),
    };
    let _cleanup = AbortOnDropHandle::new(tokio::spawn(worker.clone().clean_up_disk()));
    let limit = worker.settings.drain;
    let mut drivers = JoinSet::new();
    for (reporter, name, make) in engines {
        let (share, clock) = (worker.settings.sample_share, worker.settings.clock.clone());
        let (device, model) = Device::start(&name, make, share, clock).await?;
        info!(device = name, model = model.card.name, sha256 = model.card.sha256, "device ready");
        let span = info_span!("worker", device = name);
        let driver = Driver::new(worker.clone(), name, device, model, reporter);
        drivers.spawn(driver.drive().instrument(span));
    }
    let worked = tokio::select! {
        biased;
        worked = all_ended(&mut drivers) => worked,
        () = async { drain.cancelled().await; clock::sleep(limit).await } => {
            let message =
                format!("the work in progress could not be stored within {} s", limit.as_secs_f64());
            return Err(Fault::new(FaultCode::Machine, message)); // its tasks end with the drivers
        }
    };
    if let Err(error) = scratch.remove() {
        warn!(%error, "scratch directory not removed");
    }
    worked
}

/// Waits for all drivers. Fails if each of them failed: one working device is enough to continue.
async fn all_ended(drivers: &mut JoinSet<Result<(), Fault>>) -> Result<(), Fault> {
    let (mut worked, mut failed) = (0, None);
    while let Some(ended) = drivers.join_next().await {
        match ended.unwrap_or_else(|error| Err(driver_panicked(&error))) {
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

fn driver_panicked(error: &JoinError) -> Fault {
    Fault::new(FaultCode::Internal, format!("the driver of a device panicked: {error}"))
}
