//! Weights on the local disk, named by their content, so that a second sample does not fetch them again.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::Mutex;
use tracing::warn;

use crate::blobs::{self, Blobs};
use crate::job::Object;

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

/// Marks a file as just used. Where that fails, it only goes earlier than it should.
fn touch(file: &Path) {
    if let Ok(file) = fs::File::open(file) {
        let _ = file.set_modified(SystemTime::now());
    }
}
