//! Benchmark of a device's shares: what a training keeps of it beside another tenant's samples, and how soon one
//! starts.
//!
//! ```sh
//! cargo bench --bench shares -- [--bundle DIR] [--device cpu] [--samples 1000] [--seconds 60]
//! ```
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
#![allow(clippy::print_stdout)] // the figures are what it is for

#[path = "../shared/command_line.rs"]
mod command_line;
#[path = "../shared/seconds.rs"]
mod seconds;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Parser;
use hypnos::blobs::{Blobs, BlobsConfig, Key, Place};
use hypnos::config;
use hypnos::engine::{self, CandleEngine, Engine};
use hypnos::health::Health;
use hypnos::job::{
    Fault, FaultCode, Job, JobId, Kind, Phase, STEPS_MAX, SampleSpec, Spec, State, TenantId, TrainOptions,
    TrainSpec,
};
use hypnos::ml;
use hypnos::ml::bundle::MINIATURE_NAME;
use hypnos::photo::{self, Limits};
use hypnos::store::{NewJob, Origin, Store, Submitted};
use hypnos::worker::{self, Clock, MakeEngine};
use tokio_util::sync::CancellationToken;

use self::command_line::CargoFlags;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What is trained on.
const CLASS_NAME: &str = "teapot";
const PHOTOS: [&[u8]; 4] = [
    include_bytes!("../../examples/products/dotted-teapot/1.jpg"),
    include_bytes!("../../examples/products/dotted-teapot/2.jpg"),
    include_bytes!("../../examples/products/dotted-teapot/3.jpg"),
    include_bytes!("../../examples/products/dotted-teapot/4.jpg"),
];

/// How long the worker may take for anything.
const PATIENCE: Duration = Duration::from_mins(30);

/// Parts of the time under a flood that are looked at by themselves.
const N_PARTS: u32 = 5;

/// Measures what a training keeps of its device beside samples, and how soon one starts.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench shares --")]
struct Args {
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
    #[arg(long, default_value = "60", value_parser = seconds::parse)]
    seconds: Duration,
    /// Trainings sent into the flood to see how soon they start
    #[arg(long, default_value_t = 5)]
    starts: usize,
    #[command(flatten)]
    _cargo: CargoFlags,
}

fn main() -> ExitCode {
    hypnos::memory::keep_freed();
    let args = Args::parse();
    let runtime = tokio::runtime::Runtime::new().map_err(anyhow::Error::from);
    let done = runtime.and_then(|runtime| runtime.block_on(run(&args)));
    command_line::finish(done, &mut std::io::stderr())
}

async fn run(args: &Args) -> Result<()> {
    if !(args.sample_share > 0.0 && args.sample_share <= 1.0) {
        let line = format!("--sample-share: wanted more than 0 and at most 1, got {}", args.sample_share);
        return Err(ml::Error::input(line).into());
    }
    let dir = tempfile::tempdir()?;
    let url =
        args.database.clone().unwrap_or_else(|| format!("sqlite:{}", dir.path().join("bench.db").display()));
    let store = Store::connect(&url, 8).await?;
    store.migrate().await?;
    let config = BlobsConfig { place: Place::Directory(dir.path().join("objects")), links: None };
    let blobs = Blobs::open(&config).await?;
    let [drawer, trainer] =
        [store.ensure_tenant("bench-drawer").await?, store.ensure_tenant("bench-trainer").await?];
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
        precision: None,
        batch: 4,
        finetuned_bytes_max: 8 << 30,
        checkpointing: false,
        memory: None,
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
    let work = async { work.await.map_err(error) };
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
    async fn measure(&self, args: &Args) -> Result<()> {
        println!("a training to draw with …");
        let parent = self.train(self.drawer, 2).await?;
        let parent = self.until(&parent, |job| job.state.is_terminal()).await?;
        if parent.state != State::Succeeded {
            bail!("the training failed: {:?}", parent.error);
        }
        let time = args.seconds;

        let alone = self.train(self.trainer, STEPS_MAX).await?;
        self.until(&alone, is_training).await?;
        let undisturbed = self.steps_a_second(&alone, time).await?;
        self.end(&alone).await?;
        println!("undisturbed        {undisturbed:.2} steps a second");

        let disturbed = self.train(self.trainer, STEPS_MAX).await?;
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
        println!(
            "beside a flood     {kept:.2} of that, {least:.2} in the worst fifth; {drawn} samples ended meanwhile"
        );
        if self.queued_samples().await? == 0 {
            println!("the flood has run dry: wanted more --samples, or fewer --seconds");
        }

        let (began, before) = (Instant::now(), self.queued_samples().await?);
        tokio::time::sleep(time.min(Duration::from_secs(20))).await;
        let n_drawn = before.saturating_sub(self.queued_samples().await?);
        let each = began.elapsed().as_secs_f64() / n_drawn.max(1) as f64;
        println!("a sample alone     {each:.2} s");
        for _ in 0..args.starts {
            let training = self.train(self.trainer, STEPS_MAX).await?;
            let sent = Instant::now();
            let claimed = self.until(&training, |job| job.state == State::Running).await?;
            let claimed = claimed.started_ms.unwrap_or_default() - claimed.created_ms;
            self.until(&training, has_begun).await?;
            let waiting = self.queued_samples().await?;
            println!(
                "start              claimed after {:.2} s, on the device after {:.2} s, with {waiting} samples waiting",
                claimed as f64 / 1e3,
                sent.elapsed().as_secs_f64()
            );
            self.end(&training).await?;
        }
        Ok(())
    }

    /// A training without class images, discriminator and pictures of its own: nothing but steps.
    async fn train(&self, tenant: TenantId, steps: u32) -> Result<Job> {
        let mut options = TrainOptions { steps, class_images: 0, ..TrainOptions::default() };
        options.views.n = 8;
        options.loss_weights.prior = 0.0;
        options.loss_weights.discriminator = 0.0;
        options.evaluation.enabled = false;
        let spec = TrainSpec::new(CLASS_NAME, options, 1);
        let spec = spec.map_err(|invalid| anyhow!(invalid.message))?;
        let id = JobId::new();
        let mut photos = Vec::new();
        for (n, bytes) in PHOTOS.iter().enumerate() {
            let photo =
                photo::decode(bytes, &Limits::default()).map_err(|refusal| anyhow!(refusal.message))?;
            photos.push(self.blobs.put(&Key::photo(tenant, id, n), photo.png).await?);
        }
        self.submit(NewJob { id, photos, ..plain(tenant, Spec::Train(Box::new(spec))) }).await
    }

    async fn sample(&self, parent: JobId, n: u32) -> Result<Job> {
        let spec = serde_json::json!({ "prompts": ["a photo of {product} on a beach"], "n": n });
        let spec: SampleSpec = serde_json::from_value(spec)?;
        let spec = spec.complete(1).map_err(|invalid| anyhow!(invalid.message))?;
        self.submit(NewJob { parent: Some(parent), ..plain(self.drawer, Spec::Sample(spec)) }).await
    }

    async fn submit(&self, new: NewJob) -> Result<Job> {
        match self.store.submit(new).await? {
            Submitted::New(job) => Ok(job),
            other => bail!("a job was not accepted: {other:?}"),
        }
    }

    async fn look(&self, job: &Job) -> Result<Job> {
        self.store.find(job.tenant, job.id, job.kind).await?.context("a row is gone")
    }

    async fn until(&self, job: &Job, wanted: impl Fn(&Job) -> bool) -> Result<Job> {
        let began = Instant::now();
        loop {
            let row = self.look(job).await?;
            if wanted(&row) {
                return Ok(row);
            }
            let may_come = !row.state.is_terminal() && began.elapsed() <= PATIENCE;
            ensure!(may_come, "a job is {}: {:?}", row.state, row.error);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn end(&self, job: &Job) -> Result<()> {
        self.store.cancel(job.tenant, job.id).await?;
        self.until(job, |job| job.state.is_terminal()).await.map(drop)
    }

    /// From one change of the row to another, at least `time` later.
    async fn steps_a_second(&self, job: &Job, time: Duration) -> Result<f64> {
        let next = async |after: u64| {
            let row = self.until(job, |job| step(job) > after).await?;
            anyhow::Ok((Instant::now(), step(&row)))
        };
        let now = step(&self.look(job).await?);
        let (began, first) = next(now).await?;
        tokio::time::sleep(time).await;
        let now = step(&self.look(job).await?);
        let (ended, last) = next(now).await?;
        Ok((last - first) as f64 / ended.duration_since(began).as_secs_f64())
    }

    async fn queued_samples(&self) -> Result<u64> {
        let gauges = self.store.gauges().await?;
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

/// A worker's fault as the benchmark's error: a bundle or a device that cannot be used is bad input.
fn error(fault: Fault) -> anyhow::Error {
    if fault.code == FaultCode::Input {
        ml::Error::input(fault.message).into()
    } else {
        anyhow!(fault.message)
    }
}
