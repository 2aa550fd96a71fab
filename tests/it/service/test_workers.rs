//! Workers without an HTTP server: a database, a directory of objects, and workers with scripted engines that a test
//! starts, stops and kills.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hypnos::blobs::{Blobs, Key, Scope};
use hypnos::health::Health;
use hypnos::job::{
    Evaluation, Fault, Format, Job, JobId, SampleSpec, Scheduler, Spec, State, TenantId, TrainOptions,
    TrainSpec,
};
use hypnos::store::{NewJob, Origin, Store, Submitted};
use hypnos::worker::{self, Clock, MakeEngine, Settings};
use object_store::local::LocalFileSystem;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::postgres::Postgres;
use super::scripted::Script;

pub(super) const TENANT: TenantId = TenantId::LOCAL;

/// How long a test waits for what must happen before it says that it did not.
const PATIENCE: Duration = Duration::from_mins(3);

/// A database and an object store for workers. Its directory is removed with it.
pub(super) struct TestWorkers {
    pub(super) store: Store,
    pub(super) blobs: Blobs,
    pub(super) settings: Settings,
    dir: tempfile::TempDir,
}

impl TestWorkers {
    /// On SQLite.
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", dir.path().join("hypnos.db").display());
        Self::on(dir, &url).await
    }

    /// On a fresh database of that server.
    pub(super) async fn on_server(server: &Postgres) -> Self {
        Self::on(tempfile::tempdir().unwrap(), &server.fresh().await).await
    }

    /// On the database at `url`.
    pub(super) async fn on(dir: tempfile::TempDir, url: &str) -> Self {
        let store = Store::connect(url, 8).await.unwrap();
        store.migrate().await.unwrap();
        std::fs::create_dir_all(dir.path().join("objects")).unwrap();
        let blobs = Blobs::over(Arc::new(directory(dir.path())));
        let settings = Settings {
            database: url.into(),
            lease: Duration::from_millis(1500),
            heartbeat: Duration::from_millis(100),
            deadline: Duration::from_mins(10),
            poll: Duration::from_millis(50),
            checkpoint_every: Duration::from_millis(20),
            scratch: dir.path().join("scratch"),
            weights_bytes_max: 1 << 20,
            sample_share: 0.5,
            backoff: Duration::from_millis(50),
            drain: Duration::from_mins(2),
            host: "a machine".into(),
            clock: Clock::default(),
        };
        Self { store, blobs, settings, dir }
    }

    /// The directory of the objects.
    pub(super) fn objects(&self) -> PathBuf {
        self.dir.path().join("objects")
    }

    /// The same objects, by another way.
    pub(super) fn objects_store(&self) -> LocalFileSystem {
        directory(self.dir.path())
    }

    /// A worker with one scripted engine.
    pub(super) fn start(&self, script: &Script) -> Worker {
        self.start_with_blobs(script, self.blobs.clone())
    }

    /// The same, with another way to the objects.
    pub(super) fn start_with_blobs(&self, script: &Script, blobs: Blobs) -> Worker {
        self.start_devices(&[script], blobs)
    }

    /// The same, with another way to the database.
    pub(super) async fn start_on_database(&self, script: &Script, url: &str) -> Worker {
        let store = Store::connect(url, 8).await.unwrap();
        let settings = Settings { database: url.into(), ..self.settings.clone() };
        Worker::start(&[script], settings, store, self.blobs.clone())
    }

    /// A process with several devices; the first one's clock counts.
    pub(super) fn start_devices(&self, scripts: &[&Script], blobs: Blobs) -> Worker {
        Worker::start(scripts, self.settings.clone(), self.store.clone(), blobs)
    }

    /// A worker with this engine.
    pub(super) fn start_engine(&self, device: &str, make: MakeEngine) -> Worker {
        let engines = vec![(device.to_owned(), make)];
        Worker::of(engines, self.settings.clone(), self.store.clone(), self.blobs.clone())
    }

    /// A training of `steps` steps, with its photos in place.
    pub(super) async fn train(&self, class_name: &str, steps: u32) -> Job {
        self.train_of(TENANT, class_name, steps).await
    }

    /// The same of another tenant.
    pub(super) async fn train_of(&self, tenant: TenantId, class_name: &str, steps: u32) -> Job {
        let id = JobId::new();
        let mut photos = Vec::new();
        for n in 0..3 {
            let key = Key::photo(tenant, id, n);
            photos.push(self.blobs.put(&key, format!("photo {n}")).await.unwrap());
        }
        let options = TrainOptions {
            steps,
            class_images: 2,
            seed: Some(7),
            evaluation: Evaluation { images: 1, ..Evaluation::default() },
            ..TrainOptions::default()
        };
        let spec = Spec::Train(Box::new(TrainSpec::new(class_name, options, 0).unwrap()));
        self.submit(NewJob { id, tenant, parent: None, spec, photos, ..Self::plain() }).await
    }

    /// A sample of two pictures.
    pub(super) async fn sample(&self, parent: JobId, steps: u32) -> Job {
        self.sample_of(TENANT, parent, "a photo of {product} on a beach", 2, steps).await
    }

    /// A sample of any tenant: `n` pictures of one prompt.
    pub(super) async fn sample_of(
        &self,
        tenant: TenantId,
        parent: JobId,
        prompt: &str,
        n: u32,
        steps: u32,
    ) -> Job {
        let spec = SampleSpec {
            prompts: vec![prompt.into()],
            negative_prompt: String::new(),
            n,
            seed: Some(11),
            steps,
            guidance: Some(7.5),
            scheduler: Some(Scheduler::Ddim),
            width: None,
            height: None,
            format: Format::Webp,
        };
        let spec = Spec::Sample(spec.complete(0).unwrap());
        self.submit(NewJob { tenant, parent: Some(parent), spec, ..Self::plain() }).await
    }

    fn plain() -> NewJob {
        NewJob {
            id: JobId::new(),
            tenant: TENANT,
            parent: None,
            spec: Spec::Train(Box::new(TrainSpec::new("mug", TrainOptions::default(), 0).unwrap())),
            photos: Vec::new(),
            priority: 0,
            max_attempts: 3,
            idempotency: None,
            queue_max: 1000,
            origin: Origin::default(),
        }
    }

    async fn submit(&self, job: NewJob) -> Job {
        match self.store.submit(job).await.unwrap() {
            Submitted::New(job) => job,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn find(&self, job: &Job) -> Option<Job> {
        self.store.find(job.tenant, job.id, job.kind).await.unwrap()
    }

    /// The job once it is as `wanted`.
    pub(super) async fn until(&self, job: &Job, wanted: impl Fn(&Job) -> bool) -> Job {
        let found = eventually("the job is as wanted", async || {
            self.store.rescue().await.unwrap();
            self.find(job).await.filter(|job| wanted(job))
        });
        found.await
    }

    pub(super) async fn ended(&self, job: &Job) -> Job {
        self.until(job, |job| job.state.is_terminal()).await
    }

    /// Every byte that the row's artifacts name, verified.
    pub(super) async fn artifact(&self, job: &Job, name: &str) -> Bytes {
        let object = self.store.artifact(TENANT, job.id, name).await.unwrap();
        self.blobs.get(&object.unwrap_or_else(|| panic!("{name} is there"))).await.unwrap()
    }

    /// Names below the job's attempts in the store, whether a row names them or not.
    pub(super) async fn stored(&self, job: &Job) -> Vec<String> {
        let entries = self.blobs.list(&Scope::job(TENANT, job.id)).await.unwrap();
        let written =
            entries.iter().filter(|entry| entry.key.owner().is_some_and(|(_, _, lease)| lease.is_some()));
        written.map(|entry| entry.key.name()).collect()
    }

    /// Fails unless every object of the job is named by its row and the reverse.
    pub(super) async fn nothing_is_left_over(&self, job: &Job) {
        let same = eventually("the store holds what the rows name", async || {
            let row = self.find(job).await?;
            let mut named = self.store.artifacts(TENANT, job.id).await.unwrap();
            named.extend(row.photos);
            named.extend(row.checkpoint.map(|checkpoint| checkpoint.object));
            let mut named: Vec<String> = named.into_iter().map(|object| object.key).collect();
            named.sort();
            let there = self.blobs.list(&Scope::job(TENANT, job.id)).await.unwrap();
            (named == there.iter().map(|entry| entry.key.to_string()).collect::<Vec<_>>()).then_some(())
        });
        same.await;
    }
}

fn directory(dir: &Path) -> LocalFileSystem {
    LocalFileSystem::new_with_prefix(dir.join("objects")).unwrap()
}

/// A worker that is running.
pub(super) struct Worker {
    drain: CancellationToken,
    pub(super) health: Health,
    task: JoinHandle<Result<(), Fault>>,
}

impl Worker {
    fn start(scripts: &[&Script], settings: Settings, store: Store, blobs: Blobs) -> Self {
        let name = |(i, script): (usize, &&Script)| (format!("scripted:{i}"), script.engine());
        let engines = scripts.iter().enumerate().map(name).collect();
        Self::of(engines, Settings { clock: scripts[0].clock(), ..settings }, store, blobs)
    }

    fn of(engines: Vec<(String, MakeEngine)>, settings: Settings, store: Store, blobs: Blobs) -> Self {
        let (drain, health) = (CancellationToken::new(), Health::default());
        let (seen, stop) = (health.clone(), drain.clone());
        let run = async move { worker::run(settings, store, blobs, engines, &seen, stop).await };
        Self { drain, health, task: tokio::spawn(run) }
    }

    /// As SIGTERM does: it releases its jobs and ends.
    pub(super) async fn stop(self) {
        self.told_to_stop().await.unwrap();
    }

    /// Tells it to stop, and does not wait.
    pub(super) fn drain(&self) {
        self.drain.cancel();
    }

    /// The same, with what it says at its end.
    pub(super) async fn told_to_stop(self) -> Result<(), Fault> {
        self.drain.cancel();
        self.ended().await
    }

    /// What it says when it ends by itself.
    pub(super) async fn ended(self) -> Result<(), Fault> {
        tokio::time::timeout(PATIENCE, self.task).await.expect("it ends").unwrap()
    }

    /// As SIGKILL does, seen from the database and the store: no further write, no further heartbeat.
    pub(super) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// The value that `look` returns, as soon as it returns one.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether a row is of this kind and state, for filters in tests.
pub(super) fn is(state: State) -> impl Fn(&Job) -> bool {
    move |job| job.state == state
}
