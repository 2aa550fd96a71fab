//! `hypnos sweep`: finds and removes orphaned objects, which killed processes left in the object store.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use jiff::{SignedDuration, Timestamp};

use super::error::CliError;
use super::output::print_line;
use super::service::{self, Log};
use crate::blobs::{self, Blobs};
use crate::config::Storage;
use crate::store::Store;
use crate::sweep::{self, Doubt, Found, Removed};
use crate::{deployment, store};

#[derive(Debug, Args)]
pub(super) struct Sweep {
    /// Remove what is found; without it, it is only listed
    #[arg(long)]
    remove: bool,
    /// Remove despite a suspicion, which must be named. most-objects: more than half of all
    /// objects would be removed, as with a wrong database. newer-than-rows: the database looks like a restored backup,
    /// and what would go may be all that is left of the jobs since
    #[arg(long, value_name = "WHAT", value_delimiter = ',', requires = "remove")]
    despite: Vec<Despite>,
    /// Leave younger objects alone; longer than any upload takes
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    older_hours: u32,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

/// Doubts that the operator overrides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Despite {
    MostObjects,
    NewerThanRows,
}

pub(super) fn run(args: &Sweep) -> Result<ExitCode, CliError> {
    args.log.start()?;
    service::run(|stop| async move {
        let store = service::open_existing_store(&args.storage).await?;
        let blobs = service::open_existing_blobs(&args.storage).await?;
        stop.run_until_cancelled(Box::pin(sweep(args, &store, &blobs)))
            .await
            .unwrap_or_else(|| Err(CliError::Failed("stopped: some objects may be left".into())))
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn sweep(args: &Sweep, store: &Store, blobs: &Blobs) -> Result<(), CliError> {
    let older = Duration::from_hours(args.older_hours.into());
    let before = Timestamp::now() - SignedDuration::from_hours(args.older_hours.into());
    let found = sweep::find(store, blobs, before).await.map_err(stopped)?;
    let n_bytes: u64 = found.orphans.iter().map(|orphan| orphan.size).sum();
    for orphan in &found.orphans {
        print_line(&format!("{}\t{} bytes", orphan.key, orphan.size));
    }
    for key in &found.foreign {
        print_line(&format!("{}\tnot written by Hypnos, left alone", key.escape_debug()));
    }
    let n_orphans = found.orphans.len();
    let counted = format!("{n_orphans} objects of {} that no row names, {n_bytes} bytes", found.n_objects);
    if !args.remove {
        print_line(&format!("{counted}; 0 removed"));
        for doubt in &found.doubts {
            print_line(&format!("not removed without --despite {}: {}", word(*doubt), why(*doubt, &found)));
        }
        return Ok(());
    }
    if let Some(doubt) = found.doubts.iter().find(|doubt| !args.despite.contains(&despite(**doubt))) {
        return Err(CliError::Input(format!(
            "{counted}; nothing was removed, for {}. To remove them anyway: --despite {}",
            why(*doubt, &found),
            word(*doubt)
        )));
    }
    let Removed { n_removed, n_kept, failed } =
        sweep::remove(store, blobs, &found.orphans).await.map_err(stopped)?;
    let unfinished = blobs.sweep_unfinished(older).await;
    print_line(&format!("{counted}; {n_removed} removed"));
    if n_kept > 0 {
        print_line(&format!("{n_kept} were kept: rows name them now"));
    }
    for (key, error) in &failed {
        print_line(&format!("{key}\tnot removed: {error}"));
    }
    if let Some((_, error)) = failed.first() {
        return Err(CliError::Failed(format!("{} objects could not be removed: {error}", failed.len())));
    }
    unfinished.map_err(|error| stopped(error.into()))?;
    sweep::clear_restored(store, before).await.map_err(stopped)
}

fn despite(doubt: Doubt) -> Despite {
    match doubt {
        Doubt::MostObjects => Despite::MostObjects,
        Doubt::NewerThanRows(_) => Despite::NewerThanRows,
    }
}

fn word(doubt: Doubt) -> String {
    despite(doubt).to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn why(doubt: Doubt, found: &Found) -> String {
    match doubt {
        Doubt::MostObjects => format!(
            "{} of {} objects would be removed, which looks like a wrong database",
            found.orphans.len(),
            found.n_objects
        ),
        Doubt::NewerThanRows(n) => format!(
            "{n} of them are newer than the rows, which looks like a restored backup: they may be all that is left of \
             the jobs since"
        ),
    }
}

fn stopped(error: sweep::Error) -> CliError {
    match error {
        sweep::Error::Deployment(error) => service::pairing_error(error),
        sweep::Error::Blobs(error @ blobs::Error::Refused(_)) => {
            service::pairing_error(deployment::Error::Blobs(error))
        }
        sweep::Error::Store(error @ (store::Error::Schema(_) | store::Error::InvalidSettings(_))) => {
            CliError::Input(error.to_string())
        }
        error => CliError::Failed(error.to_string()),
    }
}
