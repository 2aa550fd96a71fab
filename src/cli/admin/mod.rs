//! `hypnos admin`: what whoever runs the service does to jobs and tenants, on the database itself.

mod export;
mod jobs;
mod selection;
mod tenants;
mod text;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;

use super::Stop;
use super::service::{self, Log};
use crate::blobs::Blobs;
use crate::config::Storage;
use crate::deployment;
use crate::store::{self, Store, Tenant};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Look at jobs of every tenant, and act on them.
    #[command(subcommand)]
    Jobs(jobs::Command),
    /// Look at tenants; disable, export and delete them.
    #[command(subcommand)]
    Tenants(tenants::Command),
}

pub(super) fn run(command: &Command) -> Result<ExitCode, Stop> {
    match command {
        Command::Jobs(command) => jobs::run(command),
        Command::Tenants(command) => tenants::run(command),
    }
}

/// Where the service keeps what it has.
#[derive(Debug, Args)]
struct Place {
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

impl Place {
    /// Runs `work` with the service's database and a token that SIGINT and SIGTERM cancel.
    fn with_store<T, F: Future<Output = Result<T, Stop>>>(
        &self,
        work: impl FnOnce(Store, CancellationToken) -> F,
    ) -> Result<T, Stop> {
        self.log.clone().quieter().start()?;
        service::run(|stop| async move {
            let store = service::open_existing_store(&self.storage).await?;
            work(store, stop).await
        })
    }

    /// The service's objects, which must be those that go with its database.
    async fn blobs(&self, store: &Store) -> Result<Blobs, Stop> {
        let blobs = service::open_existing_blobs(&self.storage).await?;
        deployment::pair(store, &blobs).await.map_err(service::apart)?;
        Ok(blobs)
    }
}

/// The tenant that somebody named.
async fn tenant_named(store: &Store, name: &str) -> Result<Tenant, Stop> {
    let tenant = store.tenant_named(name).await.map_err(failed)?;
    tenant.ok_or_else(|| {
        Stop::Input(format!("there is no tenant {name:?}; `hypnos admin tenants list` has all"))
    })
}

fn failed(error: store::Error) -> Stop {
    Stop::Failed(error.to_string())
}
