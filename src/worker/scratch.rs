//! The directory of this process for files in use.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

/// What is written to see whether the disk takes it.
const PROBE_BYTES: usize = 1 << 20;

/// A directory of this process's own below the one of the settings, and the lock that says it is in use.
#[derive(Debug)]
pub(super) struct Scratch {
    own: PathBuf,
    lock: Mutex<File>,
}

impl Scratch {
    /// Makes it, and removes those of processes that have died.
    pub(super) fn open(scratch: &Path) -> io::Result<Self> {
        let runs = scratch.join("runs");
        fs::create_dir_all(&runs)?;
        for entry in fs::read_dir(&runs)?.flatten() {
            let abandoned = match File::open(entry.path().join("lock")) {
                Ok(lock) => lock.try_lock().is_ok(),
                Err(_) => false, // just being made, or not ours
            };
            if abandoned {
                fs::remove_dir_all(entry.path())?;
            }
        }
        let own = runs.join(Uuid::now_v7().to_string());
        let lock = Mutex::new(locked(&own)?);
        Ok(Self { own, lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.own
    }

    /// Whether what is written there can be read again. If somebody removed it, it is made anew.
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
            Err(io::Error::other("it gives back other bytes than were written"))
        }
    }

    /// Removes it, with all that is in it.
    pub(super) fn remove(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.own)
    }
}

/// Makes the directory and locks it for as long as the file is open.
fn locked(own: &Path) -> io::Result<File> {
    fs::create_dir_all(own)?;
    let lock = File::create(own.join("lock"))?;
    lock.lock()?;
    Ok(lock)
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
