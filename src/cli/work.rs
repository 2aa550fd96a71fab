//! `hypnos work`: a worker for each device.

use std::process::ExitCode;

use clap::Args;

use super::Stop;
use super::service::{self, Log};
use crate::config::{Storage, Working};
use crate::health::Health;
use crate::janitor;
use crate::worker;

#[derive(Debug, Args)]
pub(super) struct Work {
    /// Workers; by default one for each device
    #[arg(long, env = "HYPNOS_WORKERS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    working: Working,
    #[command(flatten)]
    log: Log,
}

pub(super) fn run(args: &Work) -> Result<ExitCode, Stop> {
    args.log.start()?;
    let n = args.workers.map_or(args.working.devices.len(), usize::from);
    let (settings, engines) = service::worker(&args.storage, &args.working, n)?;
    service::run(|stop| async move {
        let sqlite = args.storage.is_sqlite()?;
        let store = service::open_store(&args.storage, sqlite, &stop).await?;
        let blobs = service::open_blobs(&args.storage, None).await?;
        let pause = service::janitor_pause(settings.lease);
        tokio::spawn(janitor::run(store.clone(), blobs.clone(), pause, stop.clone()));
        let health = Health::default();
        let worked = worker::run(settings, store, blobs, engines, &health, stop).await;
        worked.map_err(Stop::from)
    })?;
    Ok(ExitCode::SUCCESS)
}
