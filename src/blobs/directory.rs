//! A directory of this machine as an object store: what lies in it.
//!
//! Walked here and not by the library, whose listing ends at the first file that it has no name for.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{Entry, Key, Listing};

/// Directories below one another in the longest of our keys, the store's own not counted.
const DEPTH_MAX: usize = 6;

/// What lies below `scope`, which is a path from `root` without a slash at its end. What another process takes away
/// meanwhile may be in it or not.
pub(super) fn list(root: &Path, scope: &str) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let mut waiting = vec![scope.to_owned()];
    while let Some(place) = waiting.pop() {
        let entries = match std::fs::read_dir(root.join(&place)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let shown = format!("{place}/{}", name.to_string_lossy());
            // A link is what it leads to: directories may lie on another disk.
            let Ok(meta) = std::fs::metadata(entry.path()) else {
                if std::fs::symlink_metadata(entry.path()).is_ok() {
                    listing.foreign.push(shown); // a link that leads nowhere
                }
                continue;
            };
            let is_text = name.to_str().is_some();
            if meta.is_dir() {
                if is_text && place.matches('/').count() + 1 < DEPTH_MAX {
                    waiting.push(shown);
                } else {
                    listing.foreign.push(shown);
                }
            } else if is_unfinished(&name) {
                listing.unfinished.push(entry.path());
            } else {
                match Key::parse(&shown).filter(|_| is_text && meta.is_file()) {
                    Some(key) => {
                        listing.entries.push(Entry {
                            key,
                            size: meta.len(),
                            modified_ms: modified_ms(&meta),
                        });
                    }
                    None => listing.foreign.push(shown),
                }
            }
        }
    }
    Ok(listing)
}

/// Whether this is what the library calls a file that is not whole yet: `name#1`, `name#2`, …
pub(super) fn is_unfinished(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Removes those of these files that are older than that; how many.
pub(super) fn remove_older(files: &[PathBuf], older_than: Duration) -> usize {
    let old = |file: &PathBuf| {
        let written = std::fs::symlink_metadata(file).and_then(|meta| meta.modified());
        written.ok().and_then(|at| at.elapsed().ok()).is_some_and(|age| age >= older_than)
    };
    // Another process may be removing them too.
    files.iter().filter(|file| old(file) && std::fs::remove_file(file).is_ok()).count()
}

/// Removes from all of the directory what uploads left unfinished, if it is older than that; how many.
pub(super) fn sweep_unfinished(root: &Path, older_than: Duration) -> io::Result<usize> {
    let mut n_swept = 0;
    let mut waiting = vec![root.to_path_buf()];
    while let Some(place) = waiting.pop() {
        for entry in std::fs::read_dir(&place)? {
            let entry = entry?;
            // Another process may be sweeping too.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                waiting.push(entry.path());
            } else if is_unfinished(&entry.file_name()) {
                n_swept += remove_older(&[entry.path()], older_than);
            }
        }
    }
    Ok(n_swept)
}

fn modified_ms(meta: &std::fs::Metadata) -> i64 {
    let since = meta.modified().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_millis() as i64)
}
