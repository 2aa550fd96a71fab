//! `hypnos migrate`: brings the database up to date, and marks it and the object store as one deployment.

use std::process::ExitCode;

use clap::Args;

use super::service::{self, Log};
use super::{Stop, say, warn};
use crate::config::Storage;
use crate::deployment;

#[derive(Debug, Args)]
pub(super) struct Migrate {
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

pub(super) fn run(args: &Migrate) -> Result<ExitCode, Stop> {
    args.log.start()?;
    service::run(|stop| async move {
        let store = service::open_store(&args.storage, true, &stop).await?;
        say("the database is up to date");
        // Where nothing says which object store goes with it, whoever needs that says so at its start.
        let is_named = args.storage.objects.is_some() || args.storage.is_sqlite()?;
        if !is_named || args.storage.place().is_err() {
            return Ok(());
        }
        let blobs = service::open_blobs(&args.storage, None).await?;
        match deployment::pair(&store, &blobs).await {
            Ok(_) => Ok(()),
            Err(deployment::Error::Blobs(error)) if error.is_of_the_moment() => {
                warn(&format!("the deployment's marker is left to the next start: {error}"));
                Ok(())
            }
            Err(error) => Err(service::apart(error)),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
