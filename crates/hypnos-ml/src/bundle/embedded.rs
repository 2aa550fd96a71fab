//! The miniature bundle, embedded in the program: Hypnos works from any directory, with nothing beside it.

use std::io;
use std::path::{Path, PathBuf};

use include_dir::{Dir, include_dir};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

static MINIATURE: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/../../bundles/miniature");

/// What stands for it where the directory of a bundle is wanted.
pub const MINIATURE_NAME: &str = "miniature";

/// The directory of the miniature beneath `cache`, written there if it is not there yet. [`Error::File`] names the
/// directory that cannot be written.
pub fn miniature(cache: &Path) -> Result<PathBuf> {
    let dir = cache.join("bundles").join(format!("{MINIATURE_NAME}-{}", version()));
    if !dir.is_dir() {
        write(&dir).map_err(|error| Error::io(&dir, "cannot be written", error))?;
    }
    Ok(dir)
}

/// Tells this miniature from that of another version: its `hypnos.json` holds the hashes of all its files.
fn version() -> String {
    let manifest = MINIATURE.get_file("hypnos.json").expect("every bundle of ours has one");
    format!("{:x}", Sha256::digest(manifest.contents()))[..12].to_owned()
}

/// Whole or not at all, however many processes do it at once.
fn write(dir: &Path) -> io::Result<()> {
    let parent = dir.parent().expect("it is beneath the cache");
    std::fs::create_dir_all(parent)?;
    let part = tempfile::tempdir_in(parent)?;
    MINIATURE.extract(part.path())?;
    match std::fs::rename(part.path(), dir) {
        Err(_) if dir.is_dir() => Ok(()), // another was quicker
        renamed => renamed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::check;

    #[test]
    fn the_miniature_is_written_once_and_is_sound() {
        let cache = tempfile::tempdir().unwrap();
        let dirs: Vec<_> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| miniature(cache.path()).unwrap())).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert!(dirs.iter().all(|dir| dir == &dirs[0]));
        let report = check(&dirs[0]);
        assert!(report.errors.is_empty(), "{report:?}");
        assert_eq!(std::fs::read_dir(cache.path().join("bundles")).unwrap().count(), 1, "nothing else stays");
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let said = miniature(file.path()).unwrap_err().to_string();
        assert!(said.contains(&file.path().display().to_string()), "{said}");
    }
}
