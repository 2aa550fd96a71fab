//! `hypnos migrate`: migrates the database, and marks it and the object store as one deployment.

use std::process::ExitCode;

use clap::Args;

use super::error::CliError;
use super::output::{print_line, print_warning};
use super::service::{self, Log};
use crate::config::Storage;
use crate::deployment;

#[derive(Debug, Args)]
pub(super) struct Migrate {
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

pub(super) fn run(args: &Migrate) -> Result<ExitCode, CliError> {
    args.log.start()?;
    service::run(|stop| async move {
        let store = service::open_store(&args.storage, true, &stop).await?;
        print_line("the database is up to date");
        // Without a configured object store, the first program that needs one pairs them.
        let is_named = args.storage.objects.is_some() || args.storage.is_sqlite()?;
        if !is_named || args.storage.place().is_err() {
            return Ok(());
        }
        let blobs = service::open_blobs(&args.storage, None).await?;
        match deployment::pair(&store, &blobs).await {
            Ok(_) => Ok(()),
            Err(deployment::Error::Blobs(error)) if error.is_transient() => {
                print_warning(&format!(
                    "the deployment's marker is not written until the next start: {error}"
                ));
                Ok(())
            }
            Err(error) => Err(service::pairing_error(error)),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
