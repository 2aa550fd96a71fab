//! `hypnos backup`: a copy of the SQLite file while the service runs.
//!
//! The copy is one moment of the database, whole and checked. Copying the file itself is not: what was written last is in
//! another file beside it. Older programs for SQLite files must not be let near one that is in use.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::service::{self, Log};
use super::{Stop, say, warn};
use crate::config::Storage;
use crate::deployment;

#[derive(Debug, Args)]
pub(super) struct Backup {
    /// Where the copy is put; nothing may be there yet
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    #[command(flatten)]
    storage: Storage,
    #[command(flatten)]
    log: Log,
}

pub(super) fn run(args: &Backup) -> Result<ExitCode, Stop> {
    args.log.start()?;
    if !args.storage.is_sqlite()? {
        return Err(Stop::Input(
            "HYPNOS_DATABASE is Postgres, which is backed up by its own pg_dump: see docs/backup.md".into(),
        ));
    }
    service::run(|stop| async move {
        let store = service::open_existing_store(&args.storage).await?;
        if args.to.exists() {
            return Err(Stop::Input(format!("--to: {} is there already", args.to.display())));
        }
        let dir = args.to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Whatever ends this early takes the half of a copy with it.
        let part = tempfile::tempdir_in(dir).map_err(|error| unusable(dir, &error))?;
        let copy = part.path().join("hypnos.db");
        let copied = stop.run_until_cancelled(store.copy_to(&copy)).await;
        let copied = copied.ok_or_else(|| Stop::Failed("told to stop: there is no copy".into()))?;
        copied.map_err(|error| Stop::Failed(format!("the database cannot be copied: {error}")))?;
        place(&copy, &args.to, dir).map_err(|error| unusable(dir, &error))?;
        say(&format!("the database is copied to {}", args.to.display()));
        // From now on the object store knows of a later time than the copy: who restores it is told.
        let blobs = service::open_existing_blobs(&args.storage).await?;
        if let Err(error) = deployment::mark(&store, &blobs, true).await {
            warn(&format!("the deployment's marker could not be kept up: {error}"));
        }
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Puts a copy where it belongs, once it is on the disk.
fn place(copy: &Path, to: &Path, dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(copy)?.sync_all()?;
    std::fs::hard_link(copy, to)?; // unlike a renaming, it never replaces a file
    std::fs::File::open(dir)?.sync_all()
}

fn unusable(dir: &Path, error: &std::io::Error) -> Stop {
    Stop::Failed(format!("no copy can be put into {}: {}", dir.display(), error.kind()))
}
