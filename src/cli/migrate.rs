//! `hypnos migrate`: brings the database up to date.

use std::process::ExitCode;

use clap::Args;

use super::service::{self, Log};
use super::{Stop, say};
use crate::config::Storage;

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
        service::open_store(&args.storage, true, &stop).await?;
        say("the database is up to date");
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}
