//! What `serve` and `work` have in common: the log, the signals, the database and the store that may not be up yet.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use metrics_util::layers::FanoutBuilder;
use secrecy::ExposeSecret;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use uuid::Uuid;

use super::Stop;
use crate::blobs::{self, Blobs, BlobsConfig, Links, Place};
use crate::config::{Signals, Storage, Working, gigabytes, seconds};
use crate::deployment;
use crate::engine::{self, CandleEngine, Engine};
use crate::http;
use crate::job::{Fault, FaultCode};
use crate::store::{self, Sessions, Store};
use crate::telemetry::{LATENCIES, Telemetry};
use crate::worker::{self, Clock, MakeEngine};

/// Longest wait between two tries to reach the database at the start.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How often figures of the queue that are pushed are counted.
const COUNT_QUEUE: Duration = Duration::from_secs(15);

/// How often measured values are sorted into their buckets.
const KEEP_UP: Duration = Duration::from_secs(5);

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Log")]
pub(super) struct Log {
    /// What is logged: error, warn, info, debug, or a filter such as info,hypnos=debug
    #[arg(long, env = "HYPNOS_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// How it is written
    #[arg(long, env = "HYPNOS_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

impl Log {
    /// Only what is odd, unless more was asked for.
    pub(super) fn quieter(self) -> Self {
        let log = if self.log == "info" { "warn".into() } else { self.log };
        Self { log, ..self }
    }

    /// Starts the log, on the standard error stream.
    pub(super) fn start(&self) -> Result<(), Stop> {
        self.start_with(None)
    }

    /// The same, its spans heard by a collector as well.
    fn start_with(&self, telemetry: Option<&Telemetry>) -> Result<(), Stop> {
        let filter = || {
            let filter = tracing_subscriber::EnvFilter::try_new(&self.log);
            filter.map_err(|error| Stop::Input(format!("HYPNOS_LOG: {error}")))
        };
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let log = log.with_ansi(std::io::stderr().is_terminal());
        let log = match self.log_format {
            LogFormat::Text => log.with_target(false).with_filter(filter()?).boxed(),
            LogFormat::Json => log.json().flatten_event(true).with_filter(filter()?).boxed(),
        };
        let all = tracing_subscriber::registry().with(log).with(telemetry.and_then(Telemetry::layer));
        all.try_init().map_err(|error| Stop::Failed(format!("the log cannot be started: {error}")))
    }
}

/// How a process that serves or works is watched: its log, its figures, its traces.
pub(super) struct Watch {
    /// What `/metrics` shows.
    pub(super) figures: PrometheusHandle,
    telemetry: Option<Telemetry>,
}

impl Watch {
    /// Starts all of it. `role` says which part of the service the process is.
    pub(super) fn start(log: &Log, role: &'static str) -> Result<Self, Stop> {
        let telemetry = Telemetry::start(Signals::from_environment()?, role).map_err(Stop::Input)?;
        log.start_with(telemetry.as_ref())?;
        let failed = |error: &dyn std::error::Error| Stop::Failed(format!("no figures can be kept: {error}"));
        let prometheus = PrometheusBuilder::new().set_buckets(&LATENCIES).map_err(|error| failed(&error))?;
        let prometheus = prometheus.build_recorder();
        let figures = prometheus.handle();
        match telemetry.as_ref().and_then(Telemetry::recorder) {
            Some(pushed) => {
                let both = FanoutBuilder::default().add_recorder(prometheus).add_recorder(pushed).build();
                metrics::set_global_recorder(both).map_err(|error| failed(&error))?;
            }
            None => metrics::set_global_recorder(prometheus).map_err(|error| failed(&error))?,
        }
        Ok(Self { figures, telemetry })
    }

    /// Brings the figures of the queue up to date for as long as they are pushed; returns at once where they are not.
    pub(super) async fn count_queue(&self, store: &Store, stop: &CancellationToken) {
        if self.telemetry.as_ref().and_then(Telemetry::recorder).is_none() {
            return;
        }
        let count = async {
            loop {
                let _ = http::update_queue_metrics(store).await; // whoever else asks the database says that it is away
                tokio::time::sleep(COUNT_QUEUE).await;
            }
        };
        stop.run_until_cancelled(Box::pin(count)).await;
    }

    /// Runs `work` as [`run`] does, and sends at the end what is left to be sent, but not when the process was told to end
    /// at once.
    pub(super) fn run<T>(
        self,
        work: impl AsyncFnOnce(&Self, CancellationToken) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let this = &self;
        let done = run(|stop| async move {
            tokio::spawn(keep_up(this.figures.clone()));
            work(this, stop).await
        });
        if let Some(telemetry) = self.telemetry.filter(|_| !matches!(&done, Err(Stop::AtOnce))) {
            telemetry.flush();
        }
        done
    }
}

/// Sorts what was measured into its buckets. Until then every single value is kept, and nobody may ever ask for `/metrics`.
async fn keep_up(figures: PrometheusHandle) {
    loop {
        tokio::time::sleep(KEEP_UP).await;
        figures.run_upkeep();
    }
}

/// Signals that come within this time of the first one are one: `timeout` signals its child and then the whole group.
const ONE_SIGNAL: Duration = Duration::from_secs(1);

/// How long a thread for files and photos is kept without work. Each keeps memory of its own; a new one takes microseconds.
const IDLE_THREAD: Duration = Duration::from_secs(1);

/// Runs `work` on a runtime of many threads, until it ends or the process is told to for the second time.
///
/// `work` is given a token that the first SIGTERM or SIGINT cancels.
pub(super) fn run<T, F: Future<Output = Result<T, Stop>>>(
    work: impl FnOnce(CancellationToken) -> F,
) -> Result<T, Stop> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().thread_keep_alive(IDLE_THREAD).build();
    let runtime = runtime.map_err(|error| Stop::Failed(format!("no runtime: {error}")))?;
    let done = runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
        let work = work(stop.clone());
        tokio::pin!(work);
        let mut first: Option<Instant> = None;
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            match first {
                None => {
                    info!("told to stop: ending what is under way");
                    first = Some(Instant::now());
                    stop.cancel();
                }
                Some(first) if first.elapsed() < ONE_SIGNAL => {}
                Some(_) => return Err(Stop::AtOnce),
            }
        }
    });
    runtime.shutdown_background(); // a device may be in the middle of a step; its lease will run out
    done
}

fn no_signals(error: std::io::Error) -> Stop {
    Stop::Failed(format!("signals cannot be heard: {error}"))
}

/// A listener at the address of the setting `name`.
pub(super) async fn bind(name: &str, address: SocketAddr) -> Result<TcpListener, Stop> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| Stop::Input(format!("{name}: {address} cannot be listened on: {}", error.kind())))
}

/// The database, waited for if it is not up yet. Its schema is brought up to date if `migrate`, else checked.
pub(super) async fn open_store(
    storage: &Storage,
    migrate: bool,
    stop: &CancellationToken,
) -> Result<Store, Stop> {
    let (url, direct) = (storage.database_url()?, storage.database_direct()?);
    storage.check_local()?;
    let mut wait = Duration::from_millis(200);
    loop {
        let opened = async {
            let direct = direct.as_ref().map(ExposeSecret::expose_secret);
            let store =
                Store::connect_past(url.expose_secret(), direct, storage.database_connections).await?;
            if migrate {
                store.migrate().await?;
            }
            store.check_schema().await?;
            Ok(store)
        };
        match opened.await {
            Ok(store) => {
                if store.sessions() == Some(Sessions::Shared) {
                    let hints = match direct {
                        Some(_) => "hints are heard at HYPNOS_DATABASE_DIRECT",
                        None => "without HYPNOS_DATABASE_DIRECT jobs are looked for every HYPNOS_POLL_SECS",
                    };
                    info!(
                        "the database is behind a pooler that gives every transaction another session; {hints}"
                    );
                }
                return Ok(store);
            }
            Err(store::Error::Away(why) | store::Error::Unknown(why)) => {
                warn!("the database cannot be reached yet: {why}");
            }
            Err(error) => return Err(Stop::Input(error.to_string())),
        }
        tokio::select! {
            () = stop.cancelled() => return Err(Stop::Failed("told to stop before the database could be reached".into())),
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(WAIT_MAX);
    }
}

/// The database of a service that has run before: none is made, none is changed, none is waited for.
pub(super) async fn open_existing_store(storage: &Storage) -> Result<Store, Stop> {
    if let Some(file) = storage.sqlite_file()?
        && !file.is_file()
    {
        return Err(Stop::Input(format!(
            "there is no database at {}: wanted that of a service, by HYPNOS_DATABASE or HYPNOS_DATA",
            file.display()
        )));
    }
    let url = storage.existing_database_url()?;
    storage.check_local()?;
    let opened = async {
        let store = Store::connect(url.expose_secret(), storage.database_connections).await?;
        store.check_schema().await?;
        Ok(store)
    };
    opened.await.map_err(|error| match error {
        store::Error::Away(_) => Stop::Failed(error.to_string()),
        error => Stop::Input(error.to_string()),
    })
}

/// The objects' store of a deployment that is there already: a directory is not made.
pub(super) async fn open_existing_blobs(storage: &Storage) -> Result<Blobs, Stop> {
    if let Place::Directory(directory) = storage.place()?
        && !directory.is_dir()
    {
        return Err(Stop::Input(format!("HYPNOS_OBJECTS: there is no directory {}", directory.display())));
    }
    open_blobs(storage, None).await
}

/// Sees to it that database and object store belong together, waiting for an object store that is not up yet.
pub(super) async fn pair(store: &Store, blobs: &Blobs, stop: &CancellationToken) -> Result<(), Stop> {
    let mut wait = Duration::from_millis(200);
    loop {
        match deployment::pair(store, blobs).await {
            Ok(_) => return Ok(()),
            // An accepted job needs room, the marker can wait.
            Err(deployment::Error::Blobs(blobs::Error::Full)) => {
                warn!("the object store is full: the deployment's marker is left to the next start");
                return Ok(());
            }
            Err(deployment::Error::Store(store::Error::Away(why))) => {
                warn!("the database cannot be reached: {why}");
            }
            Err(deployment::Error::Blobs(blobs::Error::Away(why))) => {
                warn!("the object store cannot be reached yet: {why}");
            }
            Err(error) => return Err(apart(error)),
        }
        tokio::select! {
            () = stop.cancelled() => {
                return Err(Stop::Failed("told to stop before the object store could be reached".into()));
            }
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(WAIT_MAX);
    }
}

/// Why database and object store cannot be worked with, with all that the object store said.
pub(super) fn apart(error: deployment::Error) -> Stop {
    match error {
        deployment::Error::Blobs(blobs::Error::Refused(refusal)) => {
            Stop::Input(format!("HYPNOS_OBJECTS: the object store refuses: {}", refusal.in_full()))
        }
        deployment::Error::Apart(_) => Stop::Input(error.to_string()),
        _ => Stop::Failed(error.to_string()),
    }
}

/// The objects' store; `links` says how links to a directory's objects are made, where any are.
pub(super) async fn open_blobs(storage: &Storage, links: Option<Links>) -> Result<Blobs, Stop> {
    let config = BlobsConfig { place: storage.place()?, links };
    Blobs::open(&config).await.map_err(|error| Stop::Input(format!("HYPNOS_OBJECTS: {error}")))
}

/// What workers are told, and an engine for each.
pub(super) type Work = (worker::Settings, Vec<(String, MakeEngine)>);

/// What a worker is told, and an engine for each of `n` devices.
pub(super) fn worker(storage: &Storage, working: &Working, n: usize) -> Result<Work, Stop> {
    working.check()?;
    let settings = worker::Settings {
        database: storage.database_url()?.expose_secret().to_owned(),
        lease: seconds("HYPNOS_LEASE_SECS", working.lease_secs)?,
        beat: seconds("HYPNOS_BEAT_SECS", working.beat_secs)?,
        deadline: seconds("HYPNOS_ATTEMPT_HOURS", working.attempt_hours * 3600.0)?,
        poll: seconds("HYPNOS_POLL_SECS", working.poll_secs)?,
        checkpoint_every: seconds("HYPNOS_CHECKPOINT_SECS", working.checkpoint_secs)?,
        scratch: working.scratch.clone().unwrap_or_else(|| storage.scratch()),
        weights_bytes_max: gigabytes("HYPNOS_WEIGHTS_GB", working.weights_gb)?,
        sample_share: working.sample_share,
        rest: seconds("HYPNOS_POLL_SECS", working.poll_secs)? * 5,
        drain: seconds("HYPNOS_WORK_DRAIN_SECS", working.work_drain_secs)?,
        host: host(),
        clock: Clock::default(),
    };
    let engine = engine::Settings {
        bundle: working.bundle.clone(),
        device: String::new(),
        batch: working.batch.into(),
        adapted_bytes_max: gigabytes("HYPNOS_MODELS_GB", working.models_gb)?,
        checkpointing: working.gradient_checkpointing,
    };
    let engines = working.devices(n).into_iter().map(|device| {
        let settings = engine.clone();
        let name = device.clone();
        let make: MakeEngine = Box::new(move || {
            let opened = CandleEngine::open(engine::Settings { device: device.clone(), ..settings.clone() });
            // Whoever runs the program has to change something: the bundle, the device.
            let opened = opened.map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
            Ok(Box::new(opened) as Box<dyn Engine>)
        });
        (name, make)
    });
    Ok((settings, engines.collect()))
}

/// Which machine this is, in a container too: all processes of one kernel are on one machine until it starts again.
fn host() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let boot = boot.ok().map(|id| id.trim().to_owned()).filter(|id| !id.is_empty());
    boot.unwrap_or_else(|| Uuid::now_v7().to_string()) // a machine that does not say is another at each start
}

/// How often rows of dead workers are looked for.
pub(super) fn janitor_pause(lease: Duration) -> Duration {
    (lease / 4).min(Duration::from_secs(15))
}
