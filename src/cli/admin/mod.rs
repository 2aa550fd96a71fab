//! `hypnos admin`: operators' commands on jobs and tenants, directly on the database.

mod export;
mod jobs;
mod selection;
mod tenants;
mod text;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;

use super::error::CliError;
use super::service::{self, Log};
use crate::blobs::Blobs;
use crate::config::Storage;
use crate::deployment;
use crate::store::{self, Store, Tenant};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List and change the jobs of every tenant.
    #[command(subcommand)]
    Jobs(jobs::Command),
    /// List, disable, export and delete tenants.
    #[command(subcommand)]
    Tenants(tenants::Command),
}

pub(super) fn run(command: &Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Jobs(command) => jobs::run(command),
        Command::Tenants(command) => tenants::run(command),
    }
}

/// The service's database and object store.
#[derive(Debug, Args)]
struct Place {
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

impl Place {
    /// Runs `work` with the service's database and a token that SIGINT and SIGTERM cancel.
    fn with_store<T, F: Future<Output = Result<T, CliError>>>(
        &self,
        work: impl FnOnce(Store, CancellationToken) -> F,
    ) -> Result<T, CliError> {
        self.log.clone().quieter().start()?;
        service::run(|stop| async move {
            let store = service::open_existing_store(&self.storage).await?;
            work(store, stop).await
        })
    }

    /// Opens the object store, which must be paired with the database.
    async fn blobs(&self, store: &Store) -> Result<Blobs, CliError> {
        let blobs = service::open_existing_blobs(&self.storage).await?;
        deployment::pair(store, &blobs).await.map_err(service::pairing_error)?;
        Ok(blobs)
    }
}

/// The tenant of that name.
async fn tenant_named(store: &Store, name: &str) -> Result<Tenant, CliError> {
    let tenant = store.tenant_named(name).await.map_err(failed)?;
    tenant.ok_or_else(|| {
        CliError::Input(format!("there is no tenant {name:?}; `hypnos admin tenants list` lists all"))
    })
}

fn failed(error: store::Error) -> CliError {
    CliError::Failed(error.to_string())
}
