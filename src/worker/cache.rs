//! Cache of weights on the local disk, named by their hash, so that a second sample does not fetch them again.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex;
use tracing::{info, warn};

use crate::blobs::{self, Blobs};
use crate::job::Object;
use crate::store::{self, Store};

/// Age of an unfinished file at which its process must have been killed.
const UNFINISHED: Duration = Duration::from_hours(1);

/// How often a file is fetched again that another process removes before it is pinned.
const FETCHES_MAX: usize = 3;

/// A directory of weights with a bound on its bytes. The least recently used are evicted first, but none that is in use
/// in this or another process. One object is always kept, however large.
#[derive(Clone, Debug)]
pub(super) struct WeightsCache {
    dir: PathBuf,
    bytes_max: u64,
    /// One fetch at a time: samples of one product come in bursts.
    fetching: Arc<Mutex<()>>,
}

/// A file that no process evicts while this is alive: it holds a shared lock on the file.
#[derive(Debug)]
pub(super) struct Pinned {
    path: PathBuf,
    _lock: File,
}

impl Pinned {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes an unusable file. Processes that have it open keep it.
    pub(super) fn discard(self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            warn!(error = %error.kind(), "cached file not removed");
        }
    }
}

impl WeightsCache {
    pub(super) fn open(dir: PathBuf, bytes_max: u64) -> std::io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir, bytes_max, fetching: Arc::default() })
    }

    /// The file of `object`, fetched and verified if it is not cached.
    pub(super) async fn file(&self, blobs: &Blobs, object: &Object) -> Result<Pinned, blobs::Error> {
        let file = self.dir.join(format!("{}.safetensors", object.sha256));
        if let Some(pinned) = pin(&file, object.size) {
            return Ok(pinned);
        }
        let _one = self.fetching.lock().await;
        for _ in 0..FETCHES_MAX {
            if let Some(pinned) = pin(&file, object.size) {
                return Ok(pinned); // fetched meanwhile
            }
            fs::create_dir_all(&self.dir)?; // somebody may have removed it
            self.make_room(object.size);
            blobs.get_to_file(object, &file).await?;
        }
        pin(&file, object.size)
            .ok_or_else(|| blobs::Error::Local("it is removed whenever it is fetched".into()))
    }

    /// Removes the weights that no row names any more: those of deleted products. Keeps everything if the database
    /// fails, and files in use until the next call.
    pub(super) async fn remove_deleted(&self, store: &Store) -> store::Result<()> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Ok(()) };
        let mut held = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            match name.to_str().and_then(|name| name.strip_suffix(".safetensors")) {
                Some(sha256) => held.push(sha256.to_owned()),
                None => drop(remove_unfinished(&entry.path())),
            }
        }
        let in_use = store.weights_in_use(&held).await?;
        for sha256 in held.iter().filter(|sha256| !in_use.contains(*sha256)) {
            if evict(&self.dir.join(format!("{sha256}.safetensors"))) {
                info!(sha256, "cached weights of a deleted product removed");
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
            if path.extension().is_none() {
                if remove_unfinished(&path) {
                    total -= bytes;
                }
                continue;
            }
            if total + size > self.bytes_max && evict(&path) {
                total -= bytes;
            }
        }
    }
}

/// Pins a file, if it is there and complete, and marks it as just used.
fn pin(path: &Path, size: u64) -> Option<Pinned> {
    let file = File::open(path).ok()?;
    // An exclusive lock means that it is about to be removed. A disk without locks is used by one process only.
    if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
        return None;
    }
    let (held, there) = (file.metadata().ok()?, fs::metadata(path).ok()?);
    if held.len() != size || (held.dev(), held.ino()) != (there.dev(), there.ino()) {
        return None;
    }
    let _ = file.set_modified(SystemTime::now()); // on failure it is only evicted earlier
    Some(Pinned { path: path.to_owned(), _lock: file })
}

/// Removes a file, unless it is in use. Whether it is gone.
fn evict(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return true };
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return false;
    }
    let removed = fs::remove_file(path);
    if let Err(error) = &removed {
        warn!(error = %error.kind(), "cached file not removed");
    }
    removed.is_ok()
}

/// Removes a file whose fetch was killed, and leaves one that is being fetched. Whether it is gone.
fn remove_unfinished(file: &Path) -> bool {
    let written = fs::metadata(file).and_then(|found| found.modified());
    written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > UNFINISHED)) && fs::remove_file(file).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobs::{BlobsConfig, Key, Place};
    use crate::job::{JobId, Lease, TenantId};

    async fn a_store(dir: &Path) -> Blobs {
        let config = BlobsConfig { place: Place::Directory(dir.join("objects")), links: None };
        Blobs::open(&config).await.unwrap()
    }

    async fn stored(blobs: &Blobs, byte: u8, size: usize) -> Object {
        let lease = Lease { job: JobId::new(), run_lease: 1 };
        let key = Key::artifact(TenantId::LOCAL, lease, crate::blobs::Name::Weights);
        blobs.put(&key, vec![byte; size]).await.unwrap()
    }

    fn bytes(cache: &WeightsCache) -> u64 {
        fs::read_dir(&cache.dir).unwrap().flatten().map(|entry| entry.metadata().unwrap().len()).sum()
    }

    #[tokio::test]
    async fn what_is_in_use_stays_however_little_room_there_is_and_goes_when_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = a_store(dir.path()).await;
        let cache = WeightsCache::open(dir.path().join("weights"), 250).unwrap();
        let another = WeightsCache::open(dir.path().join("weights"), 250).unwrap(); // as another process has it
        let mut objects = Vec::new();
        for byte in 1..=4 {
            objects.push(stored(&blobs, byte, 100).await);
        }
        let first = cache.file(&blobs, &objects[0]).await.unwrap();
        let second = cache.file(&blobs, &objects[1]).await.unwrap();
        let third = another.file(&blobs, &objects[2]).await.unwrap();
        for (pinned, byte) in [(&first, 1), (&second, 2), (&third, 3)] {
            assert_eq!(fs::read(pinned.path()).unwrap(), [byte; 100]);
        }
        assert_eq!(bytes(&cache), 300, "more than the bound, but all of it in use");
        drop((first, third));
        let fourth = another.file(&blobs, &objects[3]).await.unwrap();
        assert_eq!((bytes(&cache), fs::read(fourth.path()).unwrap()), (200, vec![4; 100]));
        assert_eq!(fs::read(second.path()).unwrap(), [2; 100]);
    }

    #[tokio::test]
    async fn what_somebody_removed_or_cut_short_is_fetched_again() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = a_store(dir.path()).await;
        let cache = WeightsCache::open(dir.path().join("weights"), 250).unwrap();
        let object = stored(&blobs, 7, 100).await;
        let path = cache.file(&blobs, &object).await.unwrap().path().to_owned();
        fs::write(&path, [7; 50]).unwrap();
        assert_eq!(fs::read(cache.file(&blobs, &object).await.unwrap().path()).unwrap(), [7; 100]);
        fs::remove_dir_all(dir.path().join("weights")).unwrap();
        assert_eq!(fs::read(cache.file(&blobs, &object).await.unwrap().path()).unwrap(), [7; 100]);
        let half = dir.path().join("weights/.tmp1");
        fs::write(&half, [0; 200]).unwrap();
        let other = stored(&blobs, 8, 100).await;
        drop(cache.file(&blobs, &other).await.unwrap());
        assert!(half.exists(), "somebody may be fetching it");
        fs::File::open(&half).unwrap().set_modified(SystemTime::now() - 2 * UNFINISHED).unwrap();
        drop(cache.file(&blobs, &stored(&blobs, 9, 100).await).await.unwrap());
        assert!(!half.exists(), "nobody takes that long");
    }
}
