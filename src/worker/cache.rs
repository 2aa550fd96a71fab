//! Weights on the local disk, named by their content, so that a second sample does not fetch them again.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex;
use tracing::{info, warn};

use crate::blobs::{self, Blobs};
use crate::job::Object;
use crate::store::{self, Store};

/// Nothing that is being fetched stands still for so long.
const ABANDONED: Duration = Duration::from_hours(1);

/// A directory of weights with a bound on its bytes; the least recently used go first. One object is always kept,
/// however large.
#[derive(Clone, Debug)]
pub(super) struct WeightsCache {
    dir: PathBuf,
    bytes_max: u64,
    /// One fetch at a time: samples of one product come in crowds.
    fetching: Arc<Mutex<()>>,
}

impl WeightsCache {
    pub(super) fn open(dir: PathBuf, bytes_max: u64) -> std::io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir, bytes_max, fetching: Arc::default() })
    }

    /// The file of `object`, fetched and verified if it is not there.
    pub(super) async fn file(&self, blobs: &Blobs, object: &Object) -> Result<PathBuf, blobs::Error> {
        let file = self.dir.join(format!("{}.safetensors", object.sha256));
        let _one = self.fetching.lock().await;
        if fs::metadata(&file).is_ok_and(|found| found.len() == object.size) {
            touch(&file);
            return Ok(file);
        }
        self.make_room(object.size);
        blobs.get_to_file(object, &file).await?;
        Ok(file)
    }

    /// Removes the weights that no job has to show any more: those of deleted products. Keeps all where the database cannot
    /// say.
    pub(super) async fn retain(&self, store: &Store) -> store::Result<()> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Ok(()) };
        let mut held = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            match name.to_str().and_then(|name| name.strip_suffix(".safetensors")) {
                Some(sha256) => held.push(sha256.to_owned()),
                None => remove_abandoned(&entry.path()), // what was being fetched
            }
        }
        let in_use = store.weights_in_use(&held).await?;
        for sha256 in held.iter().filter(|sha256| !in_use.contains(*sha256)) {
            match fs::remove_file(self.dir.join(format!("{sha256}.safetensors"))) {
                Ok(()) => info!("the weights of a deleted product are gone from the disk"),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {} // another process did it
                Err(error) => warn!("the weights of a deleted product cannot be removed: {error}"),
            }
        }
        Ok(())
    }

    /// Removes the least recently used files until `size` more bytes fit.
    fn make_room(&self, size: u64) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let found = entry.metadata().ok()?;
                Some((found.modified().ok()?, found.len(), entry.path()))
            })
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
        for (_, bytes, path) in files {
            if total + size <= self.bytes_max {
                break;
            }
            match fs::remove_file(&path) {
                Ok(()) => total -= bytes,
                Err(error) => warn!("a cached file cannot be removed: {error}"),
            }
        }
    }
}

/// Removes a file that nobody has written to for long: its process was killed.
fn remove_abandoned(file: &Path) {
    let written = fs::metadata(file).and_then(|found| found.modified());
    if written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED)) {
        let _ = fs::remove_file(file); // another process may have done it
    }
}

/// Marks a file as just used. Where that fails, it only goes earlier than it should.
fn touch(file: &Path) {
    if let Ok(file) = fs::File::open(file) {
        let _ = file.set_modified(SystemTime::now());
    }
}
