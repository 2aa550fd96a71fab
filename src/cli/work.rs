//! `hypnos work`: workers, one for each device.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::bundle;
use super::error::CliError;
use super::service::{self, Instrumentation, Log, bind};
use crate::config::{Monitoring, Storage, Working};
use crate::health::Health;
use crate::http::{self, Operations, Timeouts};
use crate::{maintenance, worker};

/// Connections of the operators' listener.
const CONNECTIONS: usize = 64;

#[derive(Clone, Debug, Args)]
pub(super) struct Work {
    /// Workers; by default one for each device
    #[arg(long, env = "HYPNOS_WORKERS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    working: Working,
    #[command(flatten)]
    monitoring: Monitoring,
    #[command(flatten)]
    log: Log,
}

pub(super) fn run(args: &Work) -> Result<ExitCode, CliError> {
    let instrumentation = Instrumentation::start(&args.log, "work")?;
    let args = &Work { working: bundle::opened(&args.working)?, ..args.clone() };
    let n = args.workers.map_or(args.working.devices.len(), usize::from);
    let work = service::worker(&args.storage, &args.working, n)?;
    instrumentation.run(async |instrumentation, stop| work_on(args, work, instrumentation, stop).await)?;
    Ok(ExitCode::SUCCESS)
}

async fn work_on(
    args: &Work,
    (settings, engines): service::Work,
    instrumentation: &Instrumentation,
    stop: CancellationToken,
) -> Result<(), CliError> {
    let listener = match args.monitoring.metrics_listen {
        Some(address) => Some(bind("HYPNOS_METRICS_LISTEN", address).await?),
        None => None,
    };
    let store = service::open_store(&args.storage, args.storage.is_sqlite()?, &stop).await?;
    let blobs = service::open_blobs(&args.storage, None).await?;
    service::pair(&store, &blobs, &stop).await?;
    let pause = service::maintenance_interval(settings.lease);
    tokio::spawn(maintenance::run(store.clone(), blobs.clone(), pause, stop.clone()));
    let health = Health::default();
    // The operators' listener runs until the last job is released; it reports the shutdown from its beginning.
    let ended = CancellationToken::new();
    let answer = async {
        if let Some(listener) = listener {
            let (metrics, health) = (instrumentation.metrics.clone(), health.clone());
            let (store, blobs, stop) = (store.clone(), blobs.clone(), stop.clone());
            let operations = Arc::new(Operations::for_worker(store, blobs, metrics, stop, health));
            http::serve(listener, operations.router(), CONNECTIONS, Timeouts::default(), ended.clone()).await;
        }
    };
    let work = async {
        let worked =
            worker::run(settings, store.clone(), blobs.clone(), engines, &health, stop.clone()).await;
        ended.cancel();
        worked
    };
    let ((), worked) = tokio::join!(answer, work);
    worked.map_err(CliError::from)
}
