//! The object store: the only place that accesses one, and the only one that names objects.
//!
//! A local directory, with every write synced, or a bucket of an S3-compatible server; both behave alike. Only put,
//! get, range, list, delete and multipart are used, since everything else differs between servers. Size, hash and type
//! are kept in the row ([`Object`]) and verified on every read. Only one holder of a lease writes a key, so that a
//! write whose answer was lost can be sent again.

mod directory;
mod error;
mod key;
mod link;
mod listing;
mod s3;
mod upload;

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, FuturesUnordered};
use futures_util::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use jiff::Timestamp;
use object_store::aws::AmazonS3;
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::signer::{Method, SignedUrlOptions, Signer};
use object_store::{ObjectStore, ObjectStoreExt};
use secrecy::SecretString;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

pub use error::{Error, Refusal};
pub use key::{Key, Name, Scope};
pub use link::BadLink;
pub(crate) use link::hex;
pub use listing::{Entry, Listing};
pub use s3::{Bucket, Credentials};

use crate::clock;
use crate::job::Object;
use upload::Upload;

/// Files are sent and fetched in parts of this size, several at a time; S3 accepts none below 5 MiB but the last.
const PART_BYTES: u64 = 8 << 20;
const N_PARTS_AT_ONCE: usize = 4;
/// S3 accepts 10,000 parts of one object.
const N_PARTS_MAX: u64 = 9_000;
/// Limit of one request with all its retries, well below a lease of 60 s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(45);
/// Objects removed or looked up at once.
const N_AT_ONCE: usize = 16;
/// Number of keys that S3 accepts in one bulk delete.
const N_IN_BULK: usize = 1000;
/// Key of the deployment's marker.
const MARKER: &str = "deployment.json";
/// Prefix of the objects that probes write.
const PROBES: &str = "probe";
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum duration of an upload: older unfinished files were left behind by a crash.
const UNFINISHED: Duration = Duration::from_hours(24);

/// Configuration of the object store.
#[derive(Clone, Debug)]
pub struct BlobsConfig {
    /// Where objects are kept.
    pub place: Place,
    /// How links to objects of a directory are signed; only needed by processes that serve clients. A bucket signs its
    /// own.
    pub links: Option<Links>,
}

/// Where objects are kept.
#[derive(Clone, Debug)]
pub enum Place {
    /// A local directory, created if needed.
    Directory(PathBuf),
    /// A bucket of an S3-compatible server.
    Bucket(Bucket),
}

/// How links to objects of a directory are signed.
#[derive(Clone, Debug)]
pub struct Links {
    /// This server's address for clients, such as `https://hypnos.example`: the beginning of links.
    pub public_url: String,
    /// The signing key; the same in every process that serves links.
    pub secret: SecretString,
}

/// The object store. Cheap to clone.
#[derive(Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    prefix: String,
    signer: Signing,
    /// The directory of a local store.
    directory: Option<PathBuf>,
    /// Bulk deletes of a bucket.
    bulk: Option<Arc<Bulk>>,
    timeout: Duration,
    probe: ObjectPath,
}

/// A client of the same bucket that deletes a thousand objects with one request, which not every server supports.
struct Bulk {
    store: AmazonS3,
    /// Whether a bulk delete was rejected while single deletes succeeded: then it is not tried again.
    unsupported: AtomicBool,
}

/// Who signs links: the bucket's client, or this process, if configured.
#[derive(Clone)]
enum Signing {
    Bucket(Arc<AmazonS3>),
    Local(Option<Links>),
}

impl fmt::Debug for Blobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blobs({})", self.store)
    }
}

impl Blobs {
    /// Opens a store, and removes what crashed uploads left in a directory. Sends nothing to a bucket yet; see
    /// [`Blobs::probe`].
    pub async fn open(config: &BlobsConfig) -> Result<Self, Error> {
        if let Place::Directory(directory) = &config.place {
            tokio::fs::create_dir_all(directory).await?;
        }
        let blobs = Self::existing(config)?;
        if blobs.directory.is_some() {
            blobs.sweep_unfinished(UNFINISHED).await?;
        }
        Ok(blobs)
    }

    /// Opens a store that is there; a directory is neither made nor tidied.
    pub fn existing(config: &BlobsConfig) -> Result<Self, Error> {
        match &config.place {
            Place::Directory(directory) => {
                let store = LocalFileSystem::new_with_prefix(directory)?;
                let store = Arc::new(store.with_fsync(true).with_automatic_cleanup(true));
                let signer = Signing::Local(config.links.clone());
                Ok(Self { directory: Some(directory.clone()), ..Self::new(store, "", signer) })
            }
            Place::Bucket(bucket) => {
                let store = Arc::new(bucket.client()?);
                let signer = match bucket.public_endpoint.as_deref() {
                    Some(endpoint) => Arc::new(bucket.in_public(&store, endpoint)?),
                    None => Arc::clone(&store),
                };
                let bulk = Bulk { store: bucket.in_bulk(&store)?, unsupported: AtomicBool::new(false) };
                let blobs = Self::new(store, &bucket.prefix, Signing::Bucket(signer));
                Ok(Self { bulk: Some(Arc::new(bulk)), ..blobs })
            }
        }
    }

    /// Uses the given store, with its own signing key: for tests that make it fail.
    pub fn over(store: Arc<dyn ObjectStore>) -> Self {
        let links =
            Links { public_url: "http://localhost".into(), secret: Uuid::new_v4().to_string().into() };
        Self::new(store, "", Signing::Local(Some(links)))
    }

    fn new(store: Arc<dyn ObjectStore>, prefix: &str, signer: Signing) -> Self {
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let probe = ObjectPath::from(format!("{prefix}{PROBES}/{}", Uuid::now_v7()));
        Self { store, prefix, signer, directory: None, bulk: None, timeout: REQUEST_TIMEOUT, probe }
    }

    /// Sets the limit of one request with its retries, instead of 45 s.
    #[must_use]
    pub fn with_request_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Writes a small object. Once it returns, the object survives a power failure.
    pub async fn put(&self, key: &Key, bytes: impl Into<Bytes>) -> Result<Object, Error> {
        let bytes = bytes.into();
        let object = key.object(bytes.len() as u64, hex(&Sha256::digest(&bytes)));
        let sent = self.with_timeout(self.store.put(&self.path(key.as_str()), bytes.into())).await;
        sent.map_err(Error::while_writing)?;
        Ok(object)
    }

    /// Writes a file of any size, in parts. `sent` receives the number of bytes that have arrived so far. Unless it
    /// succeeds, the parts are removed, also when it is dropped; parts left by a killed process are removed by a rule
    /// of the bucket (`AbortIncompleteMultipartUpload`).
    pub async fn put_file(
        &self,
        key: &Key,
        file: &Path,
        mut sent: impl FnMut(u64) + Send,
    ) -> Result<Object, Error> {
        let mut file = tokio::fs::File::open(file).await?;
        let size = file.metadata().await?.len();
        if size <= PART_BYTES {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).await?;
            let object = self.put(key, bytes).await?;
            sent(object.size);
            return Ok(object);
        }
        let begun = self.with_timeout(self.store.put_multipart(&self.path(key.as_str()))).await;
        let mut upload = Upload(Some(begun.map_err(Error::while_writing)?));
        let mut parts = FuturesUnordered::new();
        let outcome = self.send(&mut upload, &mut parts, file, part_size(size), &mut sent).await;
        let (size, sha256) = match outcome {
            Ok(done) => done,
            Err(error) => {
                // Parts that arrive after the abort might stay.
                while parts.next().await.is_some() {}
                upload.abort(self.timeout).await;
                return Err(error);
            }
        };
        let head = self.with_timeout(self.store.head(&self.path(key.as_str()))).await?;
        if head.size == size { Ok(key.object(size, sha256)) } else { Err(Error::Damaged) }
    }

    async fn send(
        &self,
        upload: &mut Upload,
        parts: &mut FuturesUnordered<BoxFuture<'static, Result<u64, Error>>>,
        mut file: tokio::fs::File,
        part_size: u64,
        sent: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(u64, String), Error> {
        let mut hash = Sha256::new();
        let (mut size, mut arrived) = (0, 0);
        loop {
            let mut part = BytesMut::with_capacity(part_size as usize);
            while (part.len() as u64) < part_size {
                let room = part_size - part.len() as u64;
                if (&mut file).take(room).read_buf(&mut part).await? == 0 {
                    break;
                }
            }
            if part.is_empty() {
                break;
            }
            hash.update(&part);
            let n_bytes = part.len() as u64;
            size += n_bytes;
            let sending = self.with_timeout(upload.part(part.freeze()));
            parts.push(sending.map_ok(move |()| n_bytes).boxed());
            while parts.len() >= N_PARTS_AT_ONCE {
                arrived += parts.try_next().await?.unwrap_or(0);
                sent(arrived);
            }
        }
        while let Some(n_bytes) = parts.try_next().await? {
            arrived += n_bytes;
            sent(arrived);
        }
        self.with_timeout(upload.complete()).await?;
        Ok((size, hex(&hash.finalize())))
    }

    /// Reads an object, verified.
    pub async fn get(&self, object: &Object) -> Result<Bytes, Error> {
        match self.get_once(object).await {
            // It may have been damaged in transit.
            Err(Error::Damaged) => self.get_once(object).await,
            outcome => outcome,
        }
    }

    async fn get_once(&self, object: &Object) -> Result<Bytes, Error> {
        let path = self.path_of(object)?;
        let found = self.with_timeout(self.store.get(&path)).await?;
        if found.meta.size != object.size {
            return Err(Error::Damaged);
        }
        let bytes = self.with_timeout(found.bytes()).await?;
        let is_valid = bytes.len() as u64 == object.size && hex(&Sha256::digest(&bytes)) == object.sha256;
        if is_valid { Ok(bytes) } else { Err(Error::Damaged) }
    }

    /// Fetches an object, verified, to `file`, which appears only when it is complete.
    pub async fn get_to_file(&self, object: &Object, file: &Path) -> Result<(), Error> {
        match self.get_to_file_once(object, file).await {
            Err(Error::Damaged) => self.get_to_file_once(object, file).await,
            outcome => outcome,
        }
    }

    async fn get_to_file_once(&self, object: &Object, file: &Path) -> Result<(), Error> {
        let path = self.path_of(object)?;
        if self.with_timeout(self.store.head(&path)).await?.size != object.size {
            return Err(Error::Damaged);
        }
        let staging = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new(".")))?;
        let mut sink = tokio::fs::File::from_std(staging.reopen()?);
        let mut hash = Sha256::new();
        let (mut size, part_size) = (0, PART_BYTES);
        let ranges =
            (0..object.size.div_ceil(part_size)).map(|n| n * part_size..object.size.min((n + 1) * part_size));
        let fetch = |range: Range<u64>| self.with_timeout(self.store.get_range(&path, range));
        let mut parts = stream::iter(ranges.map(fetch)).buffered(N_PARTS_AT_ONCE);
        while let Some(part) = parts.try_next().await? {
            hash.update(&part);
            size += part.len() as u64;
            sink.write_all(&part).await?;
        }
        sink.flush().await?;
        if size != object.size || hex(&hash.finalize()) != object.sha256 {
            return Err(Error::Damaged);
        }
        staging.persist(file).map_err(|error| error.error)?;
        Ok(())
    }

    /// Streams an object. The last chunk is sent only when the whole object is verified, so that a damaged object never
    /// looks complete.
    pub async fn stream(&self, object: &Object) -> Result<BoxStream<'static, Result<Bytes, Error>>, Error> {
        let path = self.path_of(object)?;
        let found = self.with_timeout(self.store.get(&path)).await?;
        if found.meta.size != object.size {
            return Err(Error::Damaged);
        }
        let (size, sha256, timeout) = (object.size, object.sha256.clone(), self.timeout);
        let state = (found.into_stream(), Sha256::new(), 0_u64, None::<Bytes>, false);
        let verified =
            stream::try_unfold(state, move |(mut chunks, mut hash, mut n_bytes, mut held, done)| {
                let sha256 = sha256.clone();
                async move {
                    if done {
                        return Ok(None);
                    }
                    loop {
                        let next = clock::timeout(timeout, chunks.try_next()).await;
                        if let Some(chunk) = next.map_err(|_| Error::timeout())?? {
                            hash.update(&chunk);
                            n_bytes += chunk.len() as u64;
                            if let Some(ready) = held.replace(chunk) {
                                return Ok(Some((ready, (chunks, hash, n_bytes, held, false))));
                            }
                        } else if n_bytes != size || hex(&hash.clone().finalize()) != sha256 {
                            return Err(Error::Damaged);
                        } else {
                            let last = held.take();
                            return Ok(last.map(|last| (last, (chunks, hash, n_bytes, None, true))));
                        }
                    }
                }
            });
        Ok(verified.boxed())
    }

    /// Removes an object, if it exists.
    pub async fn delete(&self, key: &Key) -> Result<(), Error> {
        match self.with_timeout(self.store.delete(&self.path(key.as_str()))).await {
            Err(Error::Missing) => Ok(()),
            outcome => outcome,
        }
    }

    /// Removes objects; returns those that could not be removed, and why. A missing object counts as removed.
    pub async fn delete_each(&self, keys: &[Key]) -> Vec<(Key, Error)> {
        let mut left = keys.to_vec();
        let (mut failed, mut refused) = (Vec::new(), false);
        if let Some(bulk) = &self.bulk
            && left.len() > 1
            && !bulk.unsupported.load(Ordering::Relaxed)
        {
            (failed, left) = self.delete_in_bulk(bulk, &left).await;
            refused = !left.is_empty();
        }
        let n_failed = left.len() + failed.len();
        let each = left.into_iter().map(|key| async move {
            let error = self.delete(&key).await.err()?;
            Some((key, error))
        });
        let mut done = stream::iter(each).buffer_unordered(N_AT_ONCE);
        while let Some(done) = done.next().await {
            failed.extend(done);
        }
        if refused
            && failed.len() < n_failed
            && let Some(bulk) = &self.bulk
            && !bulk.unsupported.swap(true, Ordering::Relaxed)
        {
            tracing::info!("bulk delete not supported by the object store; deleting objects one by one");
        }
        failed
    }

    /// Returns the keys that failed, and those to delete one by one because this server does not support bulk deletes.
    async fn delete_in_bulk(&self, bulk: &Bulk, keys: &[Key]) -> (Vec<(Key, Error)>, Vec<Key>) {
        let (mut failed, mut refused) = (Vec::new(), Vec::new());
        for chunk in keys.chunks(N_IN_BULK) {
            if !refused.is_empty() {
                refused.extend_from_slice(chunk);
                continue;
            }
            let paths: Vec<_> = chunk.iter().map(|key| Ok(self.path(key.as_str()))).collect();
            let mut answers = self.with_item_timeout(bulk.store.delete_stream(stream::iter(paths).boxed()));
            let (mut gone, mut why) = (HashSet::new(), None);
            while let Some(answer) = answers.next().await {
                match answer {
                    Ok(path) => drop(gone.insert(path)),
                    Err(error) => why = Some(error),
                }
            }
            let Some(why) = why else { continue };
            let left = chunk.iter().filter(|key| !gone.contains(&self.path(key.as_str()))).cloned();
            if why.is_transient() {
                failed.extend(left.map(|key| (key, why.clone())));
            } else {
                refused.extend(left);
            }
        }
        (failed, refused)
    }

    /// Removes all objects of an owner; their number. Continues after a failure; returns the first error.
    pub async fn delete_all(&self, scope: &Scope) -> Result<usize, Error> {
        let Listing { entries, foreign, unfinished } = self.list_all(scope).await?;
        if !unfinished.is_empty() {
            let removing = move || directory::remove_older(&unfinished, Duration::ZERO);
            let _ = tokio::task::spawn_blocking(removing).await; // the rest is removed by its age
        }
        if !foreign.is_empty() {
            tracing::warn!(n = foreign.len(), "foreign keys in the object store not removed");
        }
        let keys: Vec<Key> = entries.into_iter().map(|entry| entry.key).collect();
        match self.delete_each(&keys).await.into_iter().next() {
            None => Ok(keys.len()),
            Some((_, error)) => Err(error),
        }
    }

    /// All objects of an owner, sorted by key.
    pub async fn list(&self, scope: &Scope) -> Result<Vec<Entry>, Error> {
        Ok(self.list_all(scope).await?.entries)
    }

    /// Everything under the prefix of an owner, foreign keys included.
    pub async fn list_all(&self, scope: &Scope) -> Result<Listing, Error> {
        let mut found = match self.directory.clone() {
            Some(root) => {
                let scope = scope.as_str().to_owned();
                let listed = tokio::task::spawn_blocking(move || directory::list(&root, &scope)).await;
                let listed = listed.map_err(|_| Error::Unavailable("the listing panicked".into()))?;
                listed.map_err(|error| Error::from(error.kind()))?
            }
            None => self.list_bucket(scope).await?,
        };
        found.entries.sort_by(|a, b| a.key.cmp(&b.key));
        found.foreign.sort();
        Ok(found)
    }

    async fn list_bucket(&self, scope: &Scope) -> Result<Listing, Error> {
        let place = self.path(scope.as_str());
        let mut found = Listing::default();
        let mut listing = self.with_item_timeout(self.store.list(Some(&place)));
        while let Some(meta) = listing.try_next().await? {
            let text = meta.location.as_ref();
            if let Some(key) = text.strip_prefix(&self.prefix).and_then(Key::parse) {
                let modified_ms = meta.last_modified.timestamp_millis();
                found.entries.push(Entry { key, size: meta.size, modified_ms });
            } else {
                found.foreign.push(s3::foreign(text).unwrap_or_else(|| text.to_owned()));
            }
        }
        Ok(found)
    }

    /// Whether the store holds no objects with valid keys.
    pub async fn is_empty(&self) -> Result<bool, Error> {
        Ok(self.list(&Scope::all()).await?.is_empty())
    }

    /// How many of these objects are in the store with the right size.
    pub async fn count(&self, objects: &[Object]) -> Result<usize, Error> {
        let mut lookups = FuturesUnordered::new();
        let mut n_there = 0;
        for object in objects {
            let Ok(path) = self.path_of(object) else { continue };
            lookups.push(async move {
                match self.with_timeout(self.store.head(&path)).await {
                    Ok(head) => Ok(head.size == object.size),
                    Err(Error::Missing) => Ok(false),
                    Err(error) => Err(error),
                }
            });
            if lookups.len() >= N_AT_ONCE {
                n_there += usize::from(lookups.try_next().await? == Some(true));
            }
        }
        while let Some(there) = lookups.try_next().await? {
            n_there += usize::from(there);
        }
        Ok(n_there)
    }

    /// Reads the deployment's marker.
    pub async fn marker(&self) -> Result<Option<Bytes>, Error> {
        let path = self.path(MARKER);
        let read = async { self.store.get(&path).await?.bytes().await };
        match self.with_timeout(read).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::Missing) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes the deployment's marker.
    pub async fn put_marker(&self, bytes: impl Into<Bytes>) -> Result<(), Error> {
        let bytes = bytes.into();
        let sent = self.with_timeout(self.store.put(&self.path(MARKER), bytes.into())).await;
        sent.map(drop).map_err(Error::while_writing)
    }

    /// Removes leftovers of killed processes that are older than `older_than`: unfinished files of uploads to a
    /// directory (a bucket has a rule for these) and objects of probes. How many.
    pub async fn sweep_unfinished(&self, older_than: Duration) -> Result<usize, Error> {
        let mut n_removed = 0;
        if let Some(root) = self.directory.clone() {
            let removed = tokio::task::spawn_blocking(move || directory::sweep_unfinished(&root, older_than));
            let removed = removed.await.map_err(|_| Error::Unavailable("the cleanup panicked".into()))?;
            n_removed += removed.map_err(|error| Error::from(error.kind()))?;
        }
        let mut probes = self.with_item_timeout(self.store.list(Some(&self.path(PROBES))));
        let before =
            clock::timestamp().as_millisecond().saturating_sub_unsigned(older_than.as_millis() as u64);
        while let Some(meta) = probes.try_next().await? {
            if meta.last_modified.timestamp_millis() <= before {
                match self.with_timeout(self.store.delete(&meta.location)).await {
                    Ok(()) | Err(Error::Missing) => n_removed += 1,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(n_removed)
    }

    /// Checks that an object can be written and read back, within 5 s. Removing it again is tried but not required:
    /// what is left is removed by [`Blobs::sweep_unfinished`].
    pub async fn probe(&self) -> Result<(), Error> {
        let timeout = self.timeout.min(PROBE_TIMEOUT);
        let round = async {
            self.store.put(&self.probe, Bytes::from_static(b"hypnos").into()).await?;
            self.store.get(&self.probe).await?.bytes().await
        };
        let back = clock::timeout(timeout, round).await.map_err(|_| Error::timeout())?;
        let back = back.map_err(|error| Error::from(error).while_writing())?;
        let _ = clock::timeout(timeout, self.store.delete(&self.probe)).await;
        if back == b"hypnos"[..] { Ok(()) } else { Err(Error::Damaged) }
    }

    /// A URL by which anyone can read the object for `ttl`. Its path ends with the object's name. A bucket's own
    /// signature counts from the machine's clock, not from `now`.
    pub async fn sign(&self, object: &Object, ttl: Duration, now: Timestamp) -> Result<String, Error> {
        let path = self.path_of(object)?;
        match &self.signer {
            Signing::Local(Some(Links { public_url, secret })) => {
                let expires = now.as_second().saturating_add_unsigned(ttl.as_secs());
                let query = link::query(secret, object, expires);
                Ok(format!("{}/v1/files/{}?{query}", public_url.trim_end_matches('/'), object.key))
            }
            Signing::Local(None) => {
                Err(Error::Unavailable("signing of links is not configured in this process".into()))
            }
            Signing::Bucket(client) => {
                let shown = format!("inline; filename=\"{}\"", object.name);
                let options = SignedUrlOptions::new().with_query([
                    ("response-content-disposition", shown.as_str()),
                    ("response-content-type", object.content_type.as_str()),
                ]);
                Ok(client.signed_url_opts(Method::GET, &path, ttl, &options).await?.to_string())
            }
        }
    }

    /// The object of a signed link to a directory's object: `key` is what follows `/v1/files/`, `query` what follows
    /// the question mark.
    pub fn verify(&self, key: &str, query: &str, now: Timestamp) -> Result<Object, BadLink> {
        match &self.signer {
            Signing::Local(Some(links)) => link::verify(&links.secret, key, query, now),
            _ => Err(BadLink::Forged),
        }
    }

    fn path(&self, key: &str) -> ObjectPath {
        ObjectPath::from(format!("{}{key}", self.prefix))
    }

    /// An invalid key counts as a missing object.
    fn path_of(&self, object: &Object) -> Result<ObjectPath, Error> {
        Key::parse(&object.key).map(|key| self.path(key.as_str())).ok_or(Error::Missing)
    }

    /// Limits the time of one request, its retries included.
    fn with_timeout<T, F: Future<Output = object_store::Result<T>>>(
        &self,
        request: F,
    ) -> impl Future<Output = Result<T, Error>> + use<T, F> {
        let timeout = self.timeout;
        async move {
            let outcome = clock::timeout(timeout, request).await;
            Ok(outcome.map_err(|_| Error::timeout())??)
        }
    }

    /// Limits the time of each item of a stream; each is at most one request.
    fn with_item_timeout<'a, T: Send + 'a>(
        &self,
        items: BoxStream<'a, object_store::Result<T>>,
    ) -> BoxStream<'a, Result<T, Error>> {
        let timeout = self.timeout;
        let next = move |mut items: BoxStream<'a, object_store::Result<T>>| async move {
            match clock::timeout(timeout, items.next()).await {
                Ok(Some(item)) => Some((item.map_err(Error::from), Some(items))),
                Ok(None) => None,
                Err(_elapsed) => Some((Err(Error::timeout()), None)),
            }
        };
        let items = stream::unfold(Some(items), move |items| async move { next(items?).await });
        items.boxed()
    }
}

/// Size of a part: small enough for memory, large enough for S3's maximum number of parts.
fn part_size(size: u64) -> u64 {
    PART_BYTES.max(size.div_ceil(N_PARTS_MAX))
}
