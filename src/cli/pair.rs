//! `hypnos pair`: marks a database and an object store as one deployment.

use std::process::ExitCode;

use clap::Args;

use super::error::CliError;
use super::output::print_line;
use super::service::{self, Log};
use crate::config::Storage;
use crate::deployment;

/// Check that the database and the object store belong together, and mark both if they have no marker yet, as every
/// process does at its start.
///
/// Where they have different markers, or nothing shows that they belong together, nothing starts: one of them may be
/// another deployment's, and a sweep would take its objects for orphans. To pair them anyway, because the database was
/// created again or both were copied to become a deployment of their own, use --replace.
#[derive(Debug, Args)]
pub(super) struct Pair {
    /// Mark both as one deployment, whatever their markers are. MARKER is the object store's, as the refusal names it,
    /// or none
    #[arg(long, value_name = "MARKER")]
    replace: Option<String>,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

pub(super) fn run(args: &Pair) -> Result<ExitCode, CliError> {
    args.log.start()?;
    service::run(|_| async move {
        let store = service::open_existing_store(&args.storage).await?;
        let blobs = service::open_existing_blobs(&args.storage).await?;
        let paired = match &args.replace {
            Some(replaced) => deployment::replace(&store, &blobs, replaced).await,
            None => deployment::pair(&store, &blobs).await,
        };
        let deployment = paired.map_err(service::pairing_error)?;
        print_line(&format!("database and object store are of deployment {}", deployment.id));
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}
