//! Listing and cleanup of a local directory that is used as an object store.
//!
//! The directory is listed here instead of by the library, whose listing fails at the first file name that it cannot
//! represent.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::key::Key;
use super::listing::{Entry, Listing};

/// Depth of directories in the longest key, without the store's own.
const DEPTH_MAX: usize = 6;

/// Lists what is below `scope`, a path from `root` without a trailing slash. What another process removes meanwhile may
/// or may not be listed.
pub(super) fn list(root: &Path, scope: &str) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let mut pending = vec![scope.to_owned()];
    while let Some(place) = pending.pop() {
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
            // Links are followed: directories may be on another disk.
            let Ok(meta) = std::fs::metadata(entry.path()) else {
                if std::fs::symlink_metadata(entry.path()).is_ok() {
                    listing.foreign.push(shown); // a broken link
                }
                continue;
            };
            let is_text = name.to_str().is_some();
            if meta.is_dir() {
                if is_text && place.matches('/').count() + 1 < DEPTH_MAX {
                    pending.push(shown);
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

/// Whether this is the library's name of an unfinished file: `name#1`, `name#2`, …
pub(super) fn is_unfinished(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Removes those of the files that are older than `older_than`; how many.
pub(super) fn remove_older(files: &[PathBuf], older_than: Duration) -> usize {
    let old = |file: &PathBuf| {
        let written = std::fs::symlink_metadata(file).and_then(|meta| meta.modified());
        written.ok().and_then(|at| at.elapsed().ok()).is_some_and(|age| age >= older_than)
    };
    // Another process may be removing them too.
    files.iter().filter(|file| old(file) && std::fs::remove_file(file).is_ok()).count()
}

/// Removes unfinished uploads below `root` that are older than `older_than`; how many.
pub(super) fn sweep_unfinished(root: &Path, older_than: Duration) -> io::Result<usize> {
    let mut n_removed = 0;
    let mut pending = vec![root.to_path_buf()];
    while let Some(place) = pending.pop() {
        for entry in std::fs::read_dir(&place)? {
            let entry = entry?;
            // Another process may be removing them too.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                pending.push(entry.path());
            } else if is_unfinished(&entry.file_name()) {
                n_removed += remove_older(&[entry.path()], older_than);
            }
        }
    }
    Ok(n_removed)
}

fn modified_ms(meta: &std::fs::Metadata) -> i64 {
    let since = meta.modified().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_millis() as i64)
}
