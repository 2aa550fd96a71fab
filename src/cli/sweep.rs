//! `hypnos sweep`: finds objects that no row names, left by processes that were killed between the two.

use std::process::ExitCode;

use clap::Args;
use jiff::{SignedDuration, Timestamp};

use super::service::{self, Log};
use super::{Stop, say};
use crate::blobs::{self, Blobs};
use crate::config::Storage;
use crate::store::{self, Store};

#[derive(Debug, Args)]
pub(super) struct Sweep {
    /// Remove what is found; without it, it is only listed
    #[arg(long)]
    remove: bool,
    /// Leave alone what is younger: no upload may take longer
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    older_hours: u32,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

/// What kept the sweep from going on.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
}

pub(super) fn run(args: &Sweep) -> Result<ExitCode, Stop> {
    args.log.start()?;
    service::run(|stop| async move {
        let store = service::open_store(&args.storage, args.storage.is_sqlite()?, &stop).await?;
        let blobs = service::open_blobs(&args.storage, None).await?;
        sweep(args, &store, &blobs).await.map_err(|error| Stop::Failed(error.to_string()))
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn sweep(args: &Sweep, store: &Store, blobs: &Blobs) -> Result<(), Error> {
    let before = Timestamp::now() - SignedDuration::from_hours(args.older_hours.into());
    let known = async |job, run_lease| Ok::<_, Error>(store.keeps(job, run_lease).await?);
    let orphans = blobs.orphans(before, known).await?;
    let (mut n_removed, mut n_bytes) = (0, 0);
    for orphan in &orphans {
        say(&format!("{}\t{} bytes", orphan.key, orphan.size));
        n_bytes += orphan.size;
        // Asked again: what was nobody's when the list was made may be somebody's now.
        if args.remove
            && let Some((_, job, run_lease)) = orphan.key.owner()
            && !store.keeps(job, run_lease).await?
        {
            blobs.delete(&orphan.key).await?;
            n_removed += 1;
        }
    }
    say(&format!("{} objects that no row names, {n_bytes} bytes; {n_removed} removed", orphans.len()));
    Ok(())
}
