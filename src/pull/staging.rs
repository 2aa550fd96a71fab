//! `.pull` in the directory of a bundle: files on their way, and the lock of the one pull that may write there.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Error;

/// The directory of what is not finished, below that of the bundle.
const DIR: &str = ".pull";

const LOCK: &str = "lock";

/// The directory of a pull, locked until this is dropped.
pub(super) struct Staging {
    dir: PathBuf,
    _lock: File,
}

impl Staging {
    /// Opens the staging directory of the bundle in `out`, and makes both if they are not there. [`Error::Input`] if
    /// another pull is at work.
    pub(super) fn open(out: &Path) -> Result<Self, Error> {
        let dir = out.join(DIR);
        let path = dir.join(LOCK);
        loop {
            let failed = |error: std::io::Error| Error::io(&path, "cannot be locked", &error);
            fs::create_dir_all(&dir).map_err(|error| Error::io(&dir, "cannot be made", &error))?;
            let file =
                File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let what = "another `hypnos models pull` is at work here";
                    return Err(Error::Input(format!("{}: {what}", out.display())));
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            // A pull that has just ended took its lock with it, and another may have made a new one.
            let (own, there) = (file.metadata().map_err(failed)?, fs::metadata(&path));
            if there.is_ok_and(|there| there.ino() == own.ino()) {
                return Ok(Self { dir, _lock: file });
            }
        }
    }

    /// Where the files of a part are until they are in their places.
    pub(super) fn part(&self, name: &str) -> PathBuf {
        self.dir.join(format!("part-{name}"))
    }

    /// Removes what belongs to a part that is finished.
    pub(super) fn finish(&self, part: &str) {
        let _ = fs::remove_dir_all(self.part(part)); // what stays does no harm
    }
}

impl Drop for Staging {
    /// Removes the directory, unless it holds something that a later pull can go on with.
    fn drop(&mut self) {
        let n_entries = fs::read_dir(&self.dir).map(|entries| entries.flatten().count());
        if n_entries.is_ok_and(|n| n == 1) {
            // The lock is held until then. What cannot be removed does no harm.
            let _ = fs::remove_file(self.dir.join(LOCK)).and_then(|()| fs::remove_dir(&self.dir));
        }
    }
}
