//! An object store that fails on demand: before an operation, after it, or by never answering.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, Error, Extensions, GetOptions, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    UploadPart,
};

/// What happens to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreFault {
    /// It fails and has done nothing.
    FailsBefore,
    /// It is done, but the caller gets an error.
    FailsAfter,
    /// It never answers and has done nothing.
    HangsBefore,
    /// It is done, but never answers.
    HangsAfter,
    /// It panics.
    Panics,
    /// The disk is full.
    Full,
    /// A read returns only its first half. Other operations succeed.
    Short,
}

/// Counts operations from 0: put, begin, part, complete and abort of a multipart upload, get (head too), delete, list.
#[derive(Clone)]
pub(crate) struct Chaos {
    inner: Arc<dyn ObjectStore>,
    plan: Arc<Plan>,
}

#[derive(Default)]
struct Plan {
    n_operations: AtomicUsize,
    n_answered: AtomicUsize,
    faults: Mutex<BTreeMap<usize, StoreFault>>,
    always: Mutex<Option<StoreFault>>,
}

impl Chaos {
    pub(crate) fn over(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, plan: Arc::default() }
    }

    /// The `nth` operation from now, 0 the next one, fails.
    pub(crate) fn inject(&self, nth: usize, what: StoreFault) {
        let at = self.n_operations() + nth;
        self.plan.faults.lock().unwrap().insert(at, what);
    }

    /// All operations from now on fail, until `None`.
    pub(crate) fn inject_all(&self, what: Option<StoreFault>) {
        *self.plan.always.lock().unwrap() = what;
    }

    /// How many operations were begun.
    pub(crate) fn n_operations(&self) -> usize {
        self.plan.n_operations.load(Ordering::SeqCst)
    }

    /// How many were answered, well or not.
    pub(crate) fn n_answered(&self) -> usize {
        self.plan.n_answered.load(Ordering::SeqCst)
    }
}

impl Plan {
    fn next(&self) -> Option<StoreFault> {
        let n = self.n_operations.fetch_add(1, Ordering::SeqCst);
        self.faults.lock().unwrap().remove(&n).or(*self.always.lock().unwrap())
    }

    async fn run<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        let outcome = self.try_run(operation).await;
        self.n_answered.fetch_add(1, Ordering::SeqCst);
        outcome
    }

    async fn try_run<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        match self.next() {
            Some(StoreFault::FailsBefore) => Err(failure(io::ErrorKind::ConnectionReset)),
            Some(StoreFault::Full) => Err(failure(io::ErrorKind::StorageFull)),
            Some(StoreFault::Panics) => panic!("chaos"),
            Some(StoreFault::HangsBefore) => std::future::pending().await,
            Some(StoreFault::FailsAfter) => {
                operation.await?;
                Err(failure(io::ErrorKind::ConnectionReset))
            }
            Some(StoreFault::HangsAfter) => {
                operation.await?;
                std::future::pending().await
            }
            Some(StoreFault::Short) | None => operation.await,
        }
    }
}

fn failure(kind: io::ErrorKind) -> Error {
    Error::Generic { store: "chaos", source: Box::new(io::Error::from(kind)) }
}

fn troubled<T: Send + 'static>(
    plan: Arc<Plan>,
    items: BoxStream<'static, Result<T>>,
) -> BoxStream<'static, Result<T>> {
    let begun = async move {
        // A stream that fails afterwards has given all its items first.
        let whole = plan.run(async { Ok(items.collect::<Vec<_>>().await) }).await;
        stream::iter(whole.unwrap_or_else(|error| vec![Err(error)]))
    };
    stream::once(begun).flatten().boxed()
}

impl fmt::Debug for Chaos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chaos({})", self.inner)
    }
}

impl fmt::Display for Chaos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chaos({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Chaos {
    async fn put_opts(&self, place: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.plan.run(self.inner.put_opts(place, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        place: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.plan.run(self.inner.put_multipart_opts(place, options)).await?;
        Ok(Box::new(Troubled { inner, plan: Arc::clone(&self.plan) }))
    }

    async fn get_opts(&self, place: &Path, options: GetOptions) -> Result<GetResult> {
        let what = self.plan.faults.lock().unwrap().get(&self.n_operations()).copied();
        let mut found = self.plan.run(self.inner.get_opts(place, options)).await?;
        if what == Some(StoreFault::Short) {
            let (meta, range) = (found.meta.clone(), found.range.clone());
            let bytes = found.bytes().await?;
            let half = bytes.slice(..bytes.len() / 2);
            let payload = GetResultPayload::Stream(stream::once(async { Ok(half) }).boxed());
            found = GetResult {
                payload,
                meta,
                range,
                attributes: Attributes::default(),
                extensions: Extensions::default(),
            };
        }
        Ok(found)
    }

    fn delete_stream(&self, places: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        troubled(Arc::clone(&self.plan), self.inner.delete_stream(places))
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        troubled(Arc::clone(&self.plan), self.inner.list(prefix))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.plan.run(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.plan.run(self.inner.copy_opts(from, to, options)).await
    }
}

struct Troubled {
    inner: Box<dyn MultipartUpload>,
    plan: Arc<Plan>,
}

impl fmt::Debug for Troubled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Troubled")
    }
}

#[async_trait]
impl MultipartUpload for Troubled {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let part = self.inner.put_part(data);
        let plan = Arc::clone(&self.plan);
        Box::pin(async move { plan.run(part).await })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.plan.run(self.inner.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.plan.run(self.inner.abort()).await
    }
}

/// Every key in the store, read past the service.
pub(crate) async fn keys(store: &dyn ObjectStore) -> Vec<String> {
    let mut keys: Vec<_> =
        store.list(None).map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap();
    keys.sort();
    keys
}
