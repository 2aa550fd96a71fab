//! An object store in memory whose every use waits at a gate, and may fail before it, lose its answer, or be carried
//! out after its caller has given up.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt};
use hypnos::store::Delivery;
use jiff::Timestamp;
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, Error, Extensions, GetOptions, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use sha2::{Digest, Sha256};

use super::world::{BEGINNING_MS, LateCall, Process, What};

#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) bytes: Bytes,
    pub(super) sha256: String,
    pub(super) modified_ms: i64,
}

/// What is in the store, by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Bucket(Arc<Mutex<BTreeMap<String, Stored>>>);

impl Bucket {
    pub(super) fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Stored>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way of a process to the store.
#[derive(Clone)]
pub(super) struct Way {
    process: Arc<Process>,
    /// Whether nothing of it waits at a gate.
    is_at_once: bool,
    bucket: Bucket,
}

impl Way {
    pub(super) fn new(process: &Arc<Process>, bucket: &Bucket) -> Arc<Self> {
        Arc::new(Self { process: process.clone(), is_at_once: false, bucket: bucket.clone() })
    }

    /// One on which nothing goes wrong, and nothing waits.
    pub(super) fn at_once(process: &Arc<Process>, bucket: &Bucket) -> Arc<Self> {
        Arc::new(Self { process: process.clone(), is_at_once: true, bucket: bucket.clone() })
    }

    /// Does it, or not, and answers, or not, as it fares at its gate.
    async fn call<T>(
        &self,
        what: What,
        call: Option<LateCall>,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if self.is_at_once {
            return work();
        }
        match self.process.pass(what).await {
            Delivery::Answered => work(),
            Delivery::NotSent => Err(broken()),
            Delivery::AnswerLost => work().and(Err(broken())),
            Delivery::Late => {
                if let Some(call) = call {
                    self.process.world().do_later(&self.process, call);
                }
                match self.process.wait_in_vain().await {}
            }
        }
    }

    fn stored(&self, bytes: Bytes) -> Stored {
        let sha256 = format!("{:x}", Sha256::digest(&bytes));
        let modified_ms = BEGINNING_MS + self.process.world().state().now.as_millis() as i64;
        Stored { bytes, sha256, modified_ms }
    }

    async fn delete_one(self, place: Path) -> Result<Path> {
        let key = place.to_string();
        let call = LateCall::Delete(key.clone());
        self.call(What::Delete(key.clone()), Some(call), || {
            self.process.world().state().dirty = true;
            self.bucket.objects().remove(&key);
            Ok(place)
        })
        .await
    }

    fn meta(key: &str, stored: &Stored) -> ObjectMeta {
        let modified = Timestamp::from_millisecond(stored.modified_ms).expect("a time that a calendar has");
        let since_1970 = std::time::SystemTime::from(modified);
        ObjectMeta {
            location: Path::from(key),
            last_modified: since_1970.into(),
            size: stored.bytes.len() as u64,
            e_tag: None,
            version: None,
        }
    }
}

fn broken() -> Error {
    Error::Generic { store: "walk", source: Box::new(io::Error::from(io::ErrorKind::ConnectionReset)) }
}

fn unused<T>() -> Result<T> {
    Err(Error::NotImplemented { operation: "what no walk needs".into(), implementer: "walk".into() })
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Way({:?})", self.process)
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

#[async_trait]
impl ObjectStore for Way {
    async fn put_opts(&self, place: &Path, payload: PutPayload, _: PutOptions) -> Result<PutResult> {
        let (key, stored) = (place.to_string(), self.stored(payload.into()));
        let call = LateCall::Put(key.clone(), stored.clone());
        self.call(What::Put(key.clone()), Some(call), || {
            self.bucket.objects().insert(key, stored);
            Ok(PutResult { e_tag: None, version: None, extensions: Extensions::default() })
        })
        .await
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        unused()
    }

    async fn get_opts(&self, place: &Path, options: GetOptions) -> Result<GetResult> {
        let key = place.to_string();
        self.call(What::Get(key.clone()), None, || {
            let Some(stored) = self.bucket.objects().get(&key).cloned() else {
                return Err(Error::NotFound { path: key.clone(), source: "it is not there".into() });
            };
            let meta = Self::meta(&key, &stored);
            let whole = 0..meta.size;
            let range: Range<u64> = match options.range {
                Some(range) => range
                    .as_range(meta.size)
                    .map_err(|error| Error::Generic { store: "walk", source: Box::new(error) })?,
                None => whole,
            };
            let bytes = stored.bytes.slice(range.start as usize..range.end as usize);
            let payload = GetResultPayload::Stream(stream::once(async { Ok(bytes) }).boxed());
            Ok(GetResult {
                payload,
                meta,
                range,
                attributes: Attributes::default(),
                extensions: Extensions::default(),
            })
        })
        .await
    }

    fn delete_stream(&self, places: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let way = self.clone();
        let one = move |place: Result<Path>| {
            let way = way.clone();
            async move { way.delete_one(place?).await }
        };
        places.then(one).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (way, prefix) = (self.clone(), prefix.map(ToString::to_string).unwrap_or_default());
        let all = async move {
            let within = format!("{prefix}/");
            let listed = way.call(What::List(within.clone()), None, || {
                let objects = way.bucket.objects();
                let below = objects.iter().filter(|(key, _)| prefix.is_empty() || key.starts_with(&within));
                Ok(below.map(|(key, stored)| Ok(Self::meta(key, stored))).collect::<Vec<_>>())
            });
            stream::iter(listed.await.unwrap_or_else(|error| vec![Err(error)]))
        };
        all.into_stream().flatten().boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        unused()
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        unused()
    }
}
