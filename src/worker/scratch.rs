//! The process's own scratch directory, for temporary files.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use crate::job::{Fault, FaultCode};

/// Size of the file that a probe writes.
const PROBE_BYTES: usize = 1 << 20;

/// Below the setting's directory: where the processes of a machine have theirs.
const RUNS: &str = "runs";

/// Extension of a directory while it is being made.
const MAKING: &str = "making";

/// The process's own directory below the one of the settings, and the lock that marks it as in use.
#[derive(Debug)]
pub(super) struct Scratch {
    own: PathBuf,
    lock: Mutex<File>,
}

impl Scratch {
    /// Makes the directory, and removes those of dead processes.
    pub(super) fn open(scratch: &Path) -> io::Result<Self> {
        let runs = scratch.join(RUNS);
        fs::create_dir_all(&runs)?;
        remove_abandoned(scratch)?;
        let own = runs.join(Uuid::now_v7().to_string());
        let lock = Mutex::new(locked(&own)?);
        Ok(Self { own, lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.own
    }

    /// Whether a file written there can be read back. A removed directory is made again.
    pub(super) fn probe(&self) -> io::Result<()> {
        if !self.own.join("lock").exists() {
            *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = locked(&self.own)?;
        }
        let mut file = tempfile::NamedTempFile::new_in(&self.own)?;
        let written: Vec<u8> = (0..PROBE_BYTES).map(|i| (i % 251) as u8).collect();
        file.write_all(&written)?;
        file.as_file().sync_all()?;
        if fs::read(file.path())? == written {
            Ok(())
        } else {
            Err(io::Error::other("the bytes read back differ from those written"))
        }
    }

    /// Removes the directory with everything in it.
    pub(super) fn remove(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.own)
    }
}

/// Makes the directory, locked for as long as the file is open. It gets its final name once it is locked, so that no
/// process takes it for abandoned.
fn locked(own: &Path) -> io::Result<File> {
    let is_there = own.is_dir(); // somebody removed the lock alone
    let making = if is_there { own.to_owned() } else { own.with_extension(MAKING) };
    fs::create_dir_all(&making)?;
    let lock = File::create(making.join("lock"))?;
    lock.lock()?;
    if !is_there {
        fs::rename(&making, own)?;
    }
    Ok(lock)
}

/// Removes the directories of dead processes, which may hold customers' data.
pub(super) fn remove_abandoned(scratch: &Path) -> io::Result<()> {
    for entry in fs::read_dir(scratch.join(RUNS))?.flatten() {
        let is_being_made = entry.path().extension().is_some_and(|end| end == MAKING);
        let is_abandoned = match File::open(entry.path().join("lock")) {
            Ok(lock) if !is_being_made => lock.try_lock().is_ok(),
            _ => false, // or not ours
        };
        if is_abandoned
            && let Err(error) = fs::remove_dir_all(entry.path())
            && error.kind() != io::ErrorKind::NotFound
        // another process did it
        {
            return Err(error);
        }
    }
    Ok(())
}

/// The fault of the machine for a failing scratch directory.
pub(super) fn scratch_fault(error: &io::Error) -> Fault {
    Fault::new(FaultCode::Machine, format!("the directory for files in use fails: {}", error.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_was_removed_is_made_anew_and_still_counts_as_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(dir.path()).unwrap();
        scratch.probe().unwrap();
        fs::remove_dir_all(dir.path().join("runs")).unwrap();
        scratch.probe().unwrap();
        let other = Scratch::open(dir.path()).unwrap();
        assert!(scratch.path().exists(), "another process leaves it alone");
        let gone = other.path().to_owned();
        drop(other);
        Scratch::open(dir.path()).unwrap();
        assert!(!gone.exists(), "that of a process that has died is removed");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "a probe leaves nothing but the lock");
    }

    #[test]
    fn a_place_that_cannot_be_written_to_is_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(dir.path()).unwrap();
        fs::remove_dir_all(dir.path().join("runs")).unwrap();
        fs::write(dir.path().join("runs"), "a file where the directory was").unwrap();
        scratch.probe().unwrap_err();
        fs::remove_file(dir.path().join("runs")).unwrap();
        scratch.probe().unwrap();
    }
}
