//! `hypnos bench-shares`: what a training keeps of its device beside another tenant's samples, and how soon one starts.
//!
//! Method. One worker with a real engine, on a database and a directory of its own. A first tenant trains a product in
//! a few steps, to have something to draw with. Then, for a second tenant:
//!
//! 1. *Undisturbed*: a training takes steps for `--seconds`; counted are the steps between two looks at its row.
//! 2. *Beside a flood*: the same training while `--samples` samples of the first tenant wait, which the worker draws
//!    beside it. Said are its steps a second over those of 1., the smallest part that any fifth of the time kept, and
//!    how many samples ended meanwhile.
//! 3. *Start*: the flood alone, and into it a training is sent in, `--starts` times. Said are the seconds from its row
//!    to its claim and to the device's first word of it, beside the seconds that one sample takes on the device alone.
//!
//! On a CPU the engine's threads and the rest of this process share the cores; nothing else should run.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::demo::products;
use super::error::CliError;
use super::output::print_line;
use crate::blobs::{Blobs, BlobsConfig, Key, Place};
use crate::config;
use crate::engine::{self, CandleEngine, Engine};
use crate::health::Health;
use crate::job::{
    Fault, FaultCode, Job, JobId, Kind, Phase, SampleSpec, Spec, State, TenantId, TrainOptions, TrainSpec,
};
use crate::ml::bundle::MINIATURE_NAME;
use crate::photo::{self, Limits};
use crate::store::{NewJob, Origin, Store, Submitted};
use crate::worker::{self, Clock, MakeEngine};

/// How long the worker may take for anything.
const PATIENCE: Duration = Duration::from_mins(30);

/// Parts of the time under a flood that are looked at by themselves.
const N_PARTS: u32 = 5;

#[derive(Debug, Args)]
pub(super) struct BenchShares {
    /// Directory of the models, in the diffusers layout
    #[arg(long, value_name = "DIR", default_value = MINIATURE_NAME, value_parser = config::bundle)]
    bundle: PathBuf,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// sqlite:PATH or postgres://…, empty; by default a SQLite file that goes with the run
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Part of the device's time that samples may take while it trains
    #[arg(long, value_name = "PART", default_value_t = 0.5)]
    sample_share: f64,
    /// Samples that wait
    #[arg(long, default_value_t = 1000)]
    samples: usize,
    /// Pictures of each sample
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pictures: u32,
    /// Seconds of training that are looked at
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Trainings sent into the flood to see how soon they start
    #[arg(long, default_value_t = 5)]
    starts: usize,
}

pub(super) fn run(args: &BenchShares) -> Result<ExitCode, CliError> {
    if !(args.sample_share > 0.0 && args.sample_share <= 1.0) {
        let line = format!("--sample-share: wanted more than 0 and at most 1, got {}", args.sample_share);
        return Err(CliError::Input(line));
    }
    let runtime = tokio::runtime::Runtime::new().map_err(|error| CliError::Failed(error.to_string()))?;
    runtime.block_on(bench(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn bench(args: &BenchShares) -> Result<(), CliError> {
    let dir = tempfile::tempdir().map_err(|error| CliError::Failed(error.to_string()))?;
    let url =
        args.database.clone().unwrap_or_else(|| format!("sqlite:{}", dir.path().join("bench.db").display()));
    let store = Store::connect(&url, 8).await.map_err(failed)?;
    store.migrate().await.map_err(failed)?;
    let config = BlobsConfig { place: Place::Directory(dir.path().join("objects")), links: None };
    let blobs = Blobs::open(&config).await.map_err(|error| CliError::Failed(error.to_string()))?;
    let [drawer, trainer] = [
        store.ensure_tenant("bench-drawer").await.map_err(failed)?,
        store.ensure_tenant("bench-trainer").await.map_err(failed)?,
    ];
    let drain = CancellationToken::new();
    let settings = worker::Settings {
        database: url,
        lease: Duration::from_mins(1),
        heartbeat: Duration::from_millis(200), // as often as rows are looked at
        deadline: Duration::from_hours(12),
        poll: Duration::from_secs(1),
        checkpoint_every: Duration::from_mins(5),
        scratch: dir.path().join("scratch"),
        weights_bytes_max: 40 << 30,
        sample_share: args.sample_share,
        backoff: Duration::from_secs(5),
        drain: Duration::from_mins(5),
        host: "bench".into(),
        clock: Clock::default(),
    };
    let engine = engine::EngineSettings {
        bundle: args.bundle.clone(),
        device: args.device.clone(),
        batch: 4,
        finetuned_bytes_max: 8 << 30,
        checkpointing: false,
    };
    let make: MakeEngine = Box::new(move || {
        let opened = CandleEngine::open(engine.clone());
        let opened = opened.map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
        Ok(Box::new(opened) as Box<dyn Engine>)
    });
    let engines = vec![(args.device.clone(), make)];
    let bench = Bench { store: store.clone(), blobs: blobs.clone(), drawer, trainer };
    let work = {
        let drain = drain.clone();
        async move { worker::run(settings, store, blobs, engines, &Health::default(), drain).await }
    };
    let measured = async {
        let measured = bench.measure(args).await;
        drain.cancel();
        measured
    };
    // A worker that fails ends it all.
    let work = async { work.await.map_err(CliError::from) };
    tokio::try_join!(work, measured).map(drop)
}

/// A worker's database and store, and two tenants.
struct Bench {
    store: Store,
    blobs: Blobs,
    drawer: TenantId,
    trainer: TenantId,
}

impl Bench {
    async fn measure(&self, args: &BenchShares) -> Result<(), CliError> {
        print_line("a training to draw with …");
        let parent = self.train(self.drawer, 2).await?;
        let parent = self.until(&parent, |job| job.state.is_terminal()).await?;
        if parent.state != State::Succeeded {
            return Err(CliError::Failed(format!("the training failed: {:?}", parent.error)));
        }
        let time = Duration::from_secs_f64(args.seconds);

        let alone = self.train(self.trainer, crate::job::STEPS_MAX).await?;
        self.until(&alone, is_training).await?;
        let undisturbed = self.steps_a_second(&alone, time).await?;
        self.end(&alone).await?;
        print_line(&format!("undisturbed        {undisturbed:.2} steps a second"));

        let disturbed = self.train(self.trainer, crate::job::STEPS_MAX).await?;
        self.until(&disturbed, is_training).await?;
        for _ in 0..args.samples {
            self.sample(parent.id, args.pictures).await?;
        }
        let first = self.queued_samples().await?;
        let mut rates = Vec::new();
        for _ in 0..N_PARTS {
            rates.push(self.steps_a_second(&disturbed, time / N_PARTS).await? / undisturbed);
        }
        let drawn = first.saturating_sub(self.queued_samples().await?);
        self.end(&disturbed).await?;
        let kept = rates.iter().sum::<f64>() / f64::from(N_PARTS);
        let least = rates.iter().copied().fold(f64::INFINITY, f64::min);
        print_line(&format!(
            "beside a flood     {kept:.2} of that, {least:.2} in the worst fifth; {drawn} samples ended meanwhile"
        ));
        if self.queued_samples().await? == 0 {
            print_line("the flood has run dry: wanted more --samples, or fewer --seconds");
        }

        let (began, before) = (Instant::now(), self.queued_samples().await?);
        tokio::time::sleep(time.min(Duration::from_secs(20))).await;
        let n_drawn = before.saturating_sub(self.queued_samples().await?);
        let each = began.elapsed().as_secs_f64() / n_drawn.max(1) as f64;
        print_line(&format!("a sample alone     {each:.2} s"));
        for _ in 0..args.starts {
            let training = self.train(self.trainer, crate::job::STEPS_MAX).await?;
            let sent = Instant::now();
            let claimed = self.until(&training, |job| job.state == State::Running).await?;
            let claimed = claimed.started_ms.unwrap_or_default() - claimed.created_ms;
            self.until(&training, has_begun).await?;
            let waiting = self.queued_samples().await?;
            print_line(&format!(
                "start              claimed after {:.2} s, on the device after {:.2} s, with {waiting} samples waiting",
                claimed as f64 / 1e3,
                sent.elapsed().as_secs_f64()
            ));
            self.end(&training).await?;
        }
        Ok(())
    }

    /// A training without class images, discriminator and pictures of its own: nothing but steps.
    async fn train(&self, tenant: TenantId, steps: u32) -> Result<Job, CliError> {
        let product = products::find(products::FIRST).map_err(CliError::Failed)?;
        let mut options = TrainOptions { steps, class_images: 0, ..TrainOptions::default() };
        options.views.n = 8;
        options.loss_weights.prior = 0.0;
        options.loss_weights.discriminator = 0.0;
        options.evaluation.enabled = false;
        let spec = TrainSpec::new(&product.class_name, options, 1);
        let spec = spec.map_err(|invalid| CliError::Failed(invalid.message))?;
        let id = JobId::new();
        let mut photos = Vec::new();
        for (n, bytes) in product.photos.iter().enumerate() {
            let photo = photo::decode(bytes, &Limits::default())
                .map_err(|refusal| CliError::Failed(refusal.to_string()))?;
            let stored = self.blobs.put(&Key::photo(tenant, id, n), photo.png).await;
            photos.push(stored.map_err(|error| CliError::Failed(error.to_string()))?);
        }
        self.submit(NewJob { id, photos, ..plain(tenant, Spec::Train(Box::new(spec))) }).await
    }

    async fn sample(&self, parent: JobId, n: u32) -> Result<Job, CliError> {
        let spec = serde_json::json!({ "prompts": ["a photo of {product} on a beach"], "n": n });
        let spec: SampleSpec =
            serde_json::from_value(spec).map_err(|error| CliError::Failed(error.to_string()))?;
        let spec = spec.complete(1).map_err(|invalid| CliError::Failed(invalid.message))?;
        self.submit(NewJob { parent: Some(parent), ..plain(self.drawer, Spec::Sample(spec)) }).await
    }

    async fn submit(&self, new: NewJob) -> Result<Job, CliError> {
        match self.store.submit(new).await.map_err(failed)? {
            Submitted::New(job) => Ok(job),
            other => Err(CliError::Failed(format!("a job was not accepted: {other:?}"))),
        }
    }

    async fn look(&self, job: &Job) -> Result<Job, CliError> {
        let row = self.store.find(job.tenant, job.id, job.kind).await.map_err(failed)?;
        row.ok_or_else(|| CliError::Failed("a row is gone".into()))
    }

    async fn until(&self, job: &Job, wanted: impl Fn(&Job) -> bool) -> Result<Job, CliError> {
        let began = Instant::now();
        loop {
            let row = self.look(job).await?;
            if wanted(&row) {
                return Ok(row);
            }
            if row.state.is_terminal() || began.elapsed() > PATIENCE {
                return Err(CliError::Failed(format!("a job is {}: {:?}", row.state, row.error)));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn end(&self, job: &Job) -> Result<(), CliError> {
        self.store.cancel(job.tenant, job.id).await.map_err(failed)?;
        self.until(job, |job| job.state.is_terminal()).await.map(drop)
    }

    /// From one change of the row to another, at least `time` later.
    async fn steps_a_second(&self, job: &Job, time: Duration) -> Result<f64, CliError> {
        let next = async |after: u64| {
            let row = self.until(job, |job| step(job) > after).await?;
            Ok::<_, CliError>((Instant::now(), step(&row)))
        };
        let now = step(&self.look(job).await?);
        let (began, first) = next(now).await?;
        tokio::time::sleep(time).await;
        let now = step(&self.look(job).await?);
        let (ended, last) = next(now).await?;
        Ok((last - first) as f64 / ended.duration_since(began).as_secs_f64())
    }

    async fn queued_samples(&self) -> Result<u64, CliError> {
        let gauges = self.store.gauges().await.map_err(failed)?;
        Ok(gauges.kinds.iter().filter(|gauge| gauge.kind == Kind::Sample).map(|gauge| gauge.queued).sum())
    }
}

fn plain(tenant: TenantId, spec: Spec) -> NewJob {
    NewJob {
        id: JobId::new(),
        tenant,
        parent: None,
        spec,
        photos: Vec::new(),
        priority: 0,
        max_attempts: 1,
        idempotency: None,
        queue_max: u64::MAX >> 1,
        origin: Origin::default(),
    }
}

fn step(job: &Job) -> u64 {
    let progress = job.progress.as_ref().filter(|progress| progress.phase == Phase::Training);
    progress.map_or(0, |progress| progress.step)
}

fn is_training(job: &Job) -> bool {
    step(job) > 1
}

/// The device has said something of it.
fn has_begun(job: &Job) -> bool {
    job.progress.as_ref().is_some_and(|progress| progress.phase != Phase::Preparing || progress.total > 0)
}

fn failed(error: crate::store::Error) -> CliError {
    CliError::Failed(error.to_string())
}
