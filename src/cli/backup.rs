//! `hypnos backup`: a copy of the SQLite file while the service runs.
//!
//! The copy is consistent and checked. Copying the file itself is not enough: the last writes are in another file
//! beside it. Old SQLite programs must not open a file that is in use.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::error::CliError;
use super::output::{print_line, print_warning};
use super::service::{self, Log};
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

pub(super) fn run(args: &Backup) -> Result<ExitCode, CliError> {
    args.log.start()?;
    if !args.storage.is_sqlite()? {
        return Err(CliError::Input(
            "HYPNOS_DATABASE is Postgres, which is backed up by its own pg_dump: see docs/backup.md".into(),
        ));
    }
    service::run(|stop| async move {
        let store = service::open_existing_store(&args.storage).await?;
        if args.to.exists() {
            return Err(CliError::Input(format!("--to: {} already exists", args.to.display())));
        }
        let dir = args.to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // An unfinished copy is removed with this directory.
        let part = tempfile::tempdir_in(dir).map_err(|error| unusable(dir, &error))?;
        let copy = part.path().join("hypnos.db");
        let copied = stop.run_until_cancelled(store.copy_to(&copy)).await;
        let copied = copied.ok_or_else(|| CliError::Failed("stopped: no copy was made".into()))?;
        copied.map_err(|error| CliError::Failed(format!("the database cannot be copied: {error}")))?;
        place(&copy, &args.to, dir).map_err(|error| unusable(dir, &error))?;
        print_line(&format!("the database is copied to {}", args.to.display()));
        // The object store gets a later time than the copy, so that a restore is recognised.
        let blobs = service::open_existing_blobs(&args.storage).await?;
        if let Err(error) = deployment::mark(&store, &blobs, true).await {
            print_warning(&format!("the deployment's marker could not be updated: {error}"));
        }
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Moves a copy to its place, once it is synced.
fn place(copy: &Path, to: &Path, dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(copy)?.sync_all()?;
    std::fs::hard_link(copy, to)?; // unlike a rename, it never replaces a file
    std::fs::File::open(dir)?.sync_all()
}

fn unusable(dir: &Path, error: &std::io::Error) -> CliError {
    CliError::Failed(format!("cannot write a copy into {}: {}", dir.display(), error.kind()))
}
