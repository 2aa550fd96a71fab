//! `hypnos sweep`: finds objects that no row names, left by processes that were killed between the two.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use jiff::{SignedDuration, Timestamp};

use super::service::{self, Log};
use super::{Stop, say};
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
    /// Remove although it looks like a mistake; what it looks like is to be named. most-objects: more than half of all
    /// objects would go, as with a wrong database. newer-than-rows: the database looks like a restored backup, and what
    /// would go may be all that is left of the jobs since
    #[arg(long, value_name = "WHAT", value_delimiter = ',', requires = "remove")]
    despite: Vec<Despite>,
    /// Leave alone what is younger: no upload may take longer
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=87_600))]
    older_hours: u32,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

/// What a removal looks like, and is done all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Despite {
    MostObjects,
    NewerThanRows,
}

pub(super) fn run(args: &Sweep) -> Result<ExitCode, Stop> {
    args.log.start()?;
    service::run(|stop| async move {
        let store = service::open_existing_store(&args.storage).await?;
        let blobs = service::open_existing_blobs(&args.storage).await?;
        stop.run_until_cancelled(Box::pin(sweep(args, &store, &blobs)))
            .await
            .unwrap_or_else(|| Err(Stop::Failed("told to stop: some of it may be left".into())))
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn sweep(args: &Sweep, store: &Store, blobs: &Blobs) -> Result<(), Stop> {
    let older = Duration::from_hours(args.older_hours.into());
    let before = Timestamp::now() - SignedDuration::from_hours(args.older_hours.into());
    let found = sweep::find(store, blobs, before).await.map_err(stopped)?;
    let n_bytes: u64 = found.orphans.iter().map(|orphan| orphan.size).sum();
    for orphan in &found.orphans {
        say(&format!("{}\t{} bytes", orphan.key, orphan.size));
    }
    for key in &found.foreign {
        say(&format!("{}\tnot written by Hypnos, left alone", key.escape_debug()));
    }
    let n_orphans = found.orphans.len();
    let counted = format!("{n_orphans} objects of {} that no row names, {n_bytes} bytes", found.n_objects);
    if !args.remove {
        say(&format!("{counted}; 0 removed"));
        for doubt in &found.doubts {
            say(&format!("not removed without --despite {}: {}", word(*doubt), why(*doubt, &found)));
        }
        return Ok(());
    }
    if let Some(doubt) = found.doubts.iter().find(|doubt| !args.despite.contains(&despite(**doubt))) {
        return Err(Stop::Input(format!(
            "{counted}; nothing was removed, for {}. If they are to go all the same: --despite {}",
            why(*doubt, &found),
            word(*doubt)
        )));
    }
    let Removed { n_removed, n_kept, failed } =
        sweep::remove(store, blobs, &found.orphans).await.map_err(stopped)?;
    let unfinished = blobs.sweep_unfinished(older).await;
    say(&format!("{counted}; {n_removed} removed"));
    if n_kept > 0 {
        say(&format!("{n_kept} were kept: meanwhile rows name them"));
    }
    for (key, error) in &failed {
        say(&format!("{key}\tnot removed: {error}"));
    }
    if let Some((_, error)) = failed.first() {
        return Err(Stop::Failed(format!("{} objects could not be removed: {error}", failed.len())));
    }
    unfinished.map_err(|error| stopped(error.into()))?;
    sweep::settled(store, before).await.map_err(stopped)
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
            "{} of {} objects would go, which looks like a wrong database",
            found.orphans.len(),
            found.n_objects
        ),
        Doubt::NewerThanRows(n) => format!(
            "{n} of them are newer than the rows, which looks like a restored backup: they may be all that is left of \
             the jobs since"
        ),
    }
}

fn stopped(error: sweep::Error) -> Stop {
    match error {
        sweep::Error::Deployment(error) => service::apart(error),
        sweep::Error::Blobs(error @ blobs::Error::Refused(_)) => {
            service::apart(deployment::Error::Blobs(error))
        }
        sweep::Error::Store(error @ (store::Error::Schema(_) | store::Error::Bad(_))) => {
            Stop::Input(error.to_string())
        }
        error => Stop::Failed(error.to_string()),
    }
}
