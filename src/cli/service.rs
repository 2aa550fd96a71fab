//! Shared by `serve` and `work`: log, metrics, signals, and opening of the database and the object store.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
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

use super::error::CliError;
use crate::blobs::{self, Blobs, BlobsConfig, Links, Place};
use crate::config::{self, Signals, Storage, Working};
use crate::deployment;
use crate::engine::memory::{MemoryCheck, Products};
use crate::engine::{self, CandleEngine, Engine};
use crate::http;
use crate::job::{Fault, FaultCode};
use crate::machine;
use crate::ml::bundle::Bundle;
use crate::store::{self, Sessions, Store};
use crate::telemetry::{LATENCIES, Telemetry};
use crate::worker::{self, Clock, MakeEngine};

/// Longest wait between two attempts to reach the database at the start.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How often the pushed metrics of the queue are updated.
const COUNT_QUEUE: Duration = Duration::from_secs(15);

/// How often recorded values are aggregated into histogram buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

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
    /// Format of the log
    #[arg(long, env = "HYPNOS_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

impl Log {
    /// Only warnings, unless a filter was given.
    pub(super) fn quieter(self) -> Self {
        let log = if self.log == "info" { "warn".into() } else { self.log };
        Self { log, ..self }
    }

    /// Starts the log, on the standard error stream.
    pub(super) fn start(&self) -> Result<(), CliError> {
        self.start_with(None)
    }

    /// The same, with spans exported to a collector.
    fn start_with(&self, telemetry: Option<&Telemetry>) -> Result<(), CliError> {
        let filter = || {
            let filter = tracing_subscriber::EnvFilter::try_new(&self.log);
            filter.map_err(|error| CliError::Input(format!("HYPNOS_LOG: {error}")))
        };
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let log = log.with_ansi(std::io::stderr().is_terminal());
        let log = match self.log_format {
            LogFormat::Text => log.with_target(false).with_filter(filter()?).boxed(),
            LogFormat::Json => log.json().flatten_event(true).with_filter(filter()?).boxed(),
        };
        let all = tracing_subscriber::registry().with(log).with(telemetry.and_then(Telemetry::layer));
        all.try_init().map_err(|error| CliError::Failed(format!("the log cannot be started: {error}")))
    }
}

/// Log, metrics and traces of a process that serves or works.
pub(super) struct Instrumentation {
    /// The metrics that `/metrics` shows.
    pub(super) metrics: PrometheusHandle,
    telemetry: Option<Telemetry>,
}

impl Instrumentation {
    /// Starts all of them. `role` is the process's part of the service.
    pub(super) fn start(log: &Log, role: &'static str) -> Result<Self, CliError> {
        let telemetry = Telemetry::start(Signals::from_environment()?, role).map_err(CliError::Input)?;
        log.start_with(telemetry.as_ref())?;
        let failed =
            |error: &dyn std::error::Error| CliError::Failed(format!("metrics cannot be recorded: {error}"));
        let prometheus = PrometheusBuilder::new().set_buckets(&LATENCIES).map_err(|error| failed(&error))?;
        let prometheus = prometheus.build_recorder();
        let metrics = prometheus.handle();
        match telemetry.as_ref().and_then(Telemetry::recorder) {
            Some(pushed) => {
                let both = FanoutBuilder::default().add_recorder(prometheus).add_recorder(pushed).build();
                metrics::set_global_recorder(both).map_err(|error| failed(&error))?;
            }
            None => metrics::set_global_recorder(prometheus).map_err(|error| failed(&error))?,
        }
        Ok(Self { metrics, telemetry })
    }

    /// Updates the metrics of the queue while metrics are pushed; returns at once if they are not.
    pub(super) async fn count_queue(&self, store: &Store, stop: &CancellationToken) {
        if self.telemetry.as_ref().and_then(Telemetry::recorder).is_none() {
            return;
        }
        let count = async {
            loop {
                let _ = http::update_queue_metrics(store).await; // other users of the database log that it is unavailable
                tokio::time::sleep(COUNT_QUEUE).await;
            }
        };
        stop.run_until_cancelled(Box::pin(count)).await;
    }

    /// Runs `work` like [`run`], and exports the remaining telemetry at the end, unless the process was interrupted.
    pub(super) fn run<T>(
        self,
        work: impl AsyncFnOnce(&Self, CancellationToken) -> Result<T, CliError>,
    ) -> Result<T, CliError> {
        let this = &self;
        let done = run(|stop| async move {
            tokio::spawn(run_upkeep(this.metrics.clone()));
            work(this, stop).await
        });
        if let Some(telemetry) = self.telemetry.filter(|_| !matches!(&done, Err(CliError::Interrupted))) {
            telemetry.flush();
        }
        done
    }
}

/// Aggregates recorded values into histogram buckets. Until then every single value is kept, even if nothing reads
/// `/metrics`.
async fn run_upkeep(metrics: PrometheusHandle) {
    loop {
        tokio::time::sleep(UPKEEP_INTERVAL).await;
        metrics.run_upkeep();
    }
}

/// Signals within this time of the first one count as one: `timeout` signals its child and then the whole group.
const ONE_SIGNAL: Duration = Duration::from_secs(1);

/// How long an idle blocking thread is kept. Each keeps memory of its own; a new one starts in microseconds.
const IDLE_THREAD: Duration = Duration::from_secs(1);

/// Runs `work` on a multi-threaded runtime, until it ends or a second termination signal arrives.
///
/// The first SIGTERM or SIGINT cancels the token that `work` gets.
pub(super) fn run<T, F: Future<Output = Result<T, CliError>>>(
    work: impl FnOnce(CancellationToken) -> F,
) -> Result<T, CliError> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().thread_keep_alive(IDLE_THREAD).build();
    let runtime = runtime.map_err(|error| CliError::Failed(format!("no runtime: {error}")))?;
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
                    info!("termination signal received; shutting down");
                    first = Some(Instant::now());
                    stop.cancel();
                }
                Some(first) if first.elapsed() < ONE_SIGNAL => {}
                Some(_) => return Err(CliError::Interrupted),
            }
        }
    });
    runtime.shutdown_background(); // a device may be in the middle of a step; its lease will expire
    done
}

fn no_signals(error: std::io::Error) -> CliError {
    CliError::Failed(format!("signals cannot be handled: {error}"))
}

/// A listener at the address of the setting `name`.
pub(super) async fn bind(name: &str, address: SocketAddr) -> Result<TcpListener, CliError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| CliError::Input(format!("{name}: cannot listen on {address}: {}", error.kind())))
}

/// Opens the database, and waits for it if it is not up yet. Migrates its schema if `migrate`, else checks it.
pub(super) async fn open_store(
    storage: &Storage,
    migrate: bool,
    stop: &CancellationToken,
) -> Result<Store, CliError> {
    let (url, direct) = (storage.database_url()?, storage.database_direct()?);
    storage.check_local()?;
    let mut wait = Duration::from_millis(200);
    loop {
        let opened = async {
            let direct = direct.as_ref().map(ExposeSecret::expose_secret);
            let store =
                Store::connect_with_direct(url.expose_secret(), direct, storage.database_connections).await?;
            if migrate {
                store.migrate().await?;
            }
            store.check_schema().await?;
            Ok(store)
        };
        match opened.await {
            Ok(store) => {
                if store.sessions() == Some(Sessions::Shared) {
                    let notifications = match direct {
                        Some(_) => "notifications arrive through HYPNOS_DATABASE_DIRECT",
                        None => "without HYPNOS_DATABASE_DIRECT the queue is polled every HYPNOS_POLL_SECS",
                    };
                    info!("database behind a pooler in transaction mode; {notifications}");
                }
                return Ok(store);
            }
            Err(store::Error::Unavailable(why) | store::Error::Unknown(why)) => {
                warn!(error = %why, "database unavailable; retrying");
            }
            Err(error) => return Err(CliError::Input(error.to_string())),
        }
        tokio::select! {
            () = stop.cancelled() => return Err(CliError::Failed("stopped before the database could be reached".into())),
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(WAIT_MAX);
    }
}

/// Opens the database of an existing service. It is not created, migrated or waited for.
pub(super) async fn open_existing_store(storage: &Storage) -> Result<Store, CliError> {
    if let Some(file) = storage.sqlite_file()?
        && !file.is_file()
    {
        return Err(CliError::Input(format!(
            "there is no database at {}: set HYPNOS_DATABASE or HYPNOS_DATA to the service's",
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
        store::Error::Unavailable(_) => CliError::Failed(error.to_string()),
        error => CliError::Input(error.to_string()),
    })
}

/// Opens the object store of an existing deployment. A directory is not created.
pub(super) async fn open_existing_blobs(storage: &Storage) -> Result<Blobs, CliError> {
    if let Place::Directory(directory) = storage.place()?
        && !directory.is_dir()
    {
        return Err(CliError::Input(format!(
            "HYPNOS_OBJECTS: there is no directory {}",
            directory.display()
        )));
    }
    open_blobs(storage, None).await
}

/// Checks that database and object store belong together, and waits for an object store that is not up yet.
pub(super) async fn pair(store: &Store, blobs: &Blobs, stop: &CancellationToken) -> Result<(), CliError> {
    let mut wait = Duration::from_millis(200);
    loop {
        match deployment::pair(store, blobs).await {
            Ok(_) => return Ok(()),
            // Accepted jobs need the space; the marker can wait.
            Err(deployment::Error::Blobs(blobs::Error::Full)) => {
                warn!("object store full; deployment marker not written until the next start");
                return Ok(());
            }
            Err(deployment::Error::Store(store::Error::Unavailable(why))) => {
                warn!(error = %why, "database unavailable; retrying");
            }
            Err(deployment::Error::Blobs(blobs::Error::Unavailable(why))) => {
                warn!(error = why, "object store unavailable; retrying");
            }
            Err(error) => return Err(pairing_error(error)),
        }
        tokio::select! {
            () = stop.cancelled() => {
                return Err(CliError::Failed("stopped before the object store could be reached".into()));
            }
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(WAIT_MAX);
    }
}

/// The error for a failed pairing, with the details of the object store's answer.
pub(super) fn pairing_error(error: deployment::Error) -> CliError {
    match error {
        deployment::Error::Blobs(blobs::Error::Refused(refusal)) => CliError::Input(format!(
            "HYPNOS_OBJECTS: the object store rejects the request: {}",
            refusal.details()
        )),
        deployment::Error::Mismatch(_) => CliError::Input(error.to_string()),
        _ => CliError::Failed(error.to_string()),
    }
}

/// Opens the object store; `links` says how links to a directory's objects are signed, if needed.
pub(super) async fn open_blobs(storage: &Storage, links: Option<Links>) -> Result<Blobs, CliError> {
    let config = BlobsConfig { place: storage.place()?, links };
    Blobs::open(&config).await.map_err(|error| CliError::Input(format!("HYPNOS_OBJECTS: {error}")))
}

/// Settings of the workers, and an engine for each.
pub(super) type Work = (worker::Settings, Vec<(String, MakeEngine)>);

/// Settings of the workers, and an engine for each of `n` workers.
pub(super) fn worker(storage: &Storage, working: &Working, n: usize) -> Result<Work, CliError> {
    let limits = working.limits()?;
    let settings = worker::Settings {
        database: storage.database_url()?.expose_secret().to_owned(),
        lease: limits.lease,
        heartbeat: limits.heartbeat,
        deadline: limits.attempt,
        poll: limits.poll,
        checkpoint_every: limits.checkpoint,
        scratch: working.scratch.clone().unwrap_or_else(|| storage.scratch()),
        weights_bytes_max: limits.weights_bytes,
        sample_share: working.sample_share,
        backoff: limits.poll * 5,
        drain: limits.drain,
        host: host(),
        clock: Clock::default(),
    };
    let engine = engine::EngineSettings {
        bundle: working.bundle.clone(),
        device: String::new(),
        precision: working.precision,
        batch: working.batch.into(),
        finetuned_bytes_max: limits.models_bytes,
        checkpointing: working.gradient_checkpointing,
        memory: None,
    };
    let products = Products::of_worker(working.sample_share);
    let mut checks: Vec<(String, MemoryCheck)> = Vec::new(); // one for each device
    let engines = working.devices(n).into_iter().map(|device| {
        let known = checks.iter().find(|(other, _)| config::is_same_device(other, &device));
        let known = known.map(|(_, check)| check.clone());
        let check = known.unwrap_or_else(|| {
            let check = memory_check(working.sharers(&device, n), products);
            checks.push((device.clone(), check.clone()));
            check
        });
        let memory = (!working.ignore_memory).then_some(check);
        let settings = engine::EngineSettings { memory, ..engine.clone() };
        let name = device.clone();
        let make: MakeEngine = Box::new(move || {
            let opened =
                CandleEngine::open(engine::EngineSettings { device: device.clone(), ..settings.clone() });
            // The operator has to change something: the bundle, the device.
            let opened = opened.map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
            Ok(Box::new(opened) as Box<dyn Engine>)
        });
        (name, make)
    });
    log_limits(&working.bundle);
    Ok((settings, engines.collect()))
}

/// Logs what the bundle cannot be used for, and which of its settings are not followed. What keeps it from being opened
/// is for the engines to say.
fn log_limits(dir: &Path) {
    let Ok(bundle) = Bundle::open(dir) else { return };
    bundle.warnings().iter().for_each(|warning| warn!("{warning}"));
    for capability in bundle.missing() {
        let line = format!("{}: {}", dir.join(capability.part()).display(), capability.missing());
        if capability.option_without().is_some() { warn!("{line}") } else { info!("{line}") }
    }
    if let Some(line) = bundle.tokenizer().ok().and_then(|tokenizer| bundle.rare_tokens_missing(&tokenizer)) {
        warn!("{}: {line}", dir.join("tokenizer").display());
    }
}

/// How the one engine of a process that draws no products learns what memory it may take; none if it is to ignore that.
pub(super) fn own_memory_check(ignore: bool) -> Option<MemoryCheck> {
    (!ignore).then(|| memory_check(1, Products::Never))
}

fn memory_check(sharers: usize, products: Products) -> MemoryCheck {
    let (obtainable, capacity) = (machine::obtainable, machine::capacity);
    MemoryCheck { obtainable, capacity, gpu: Arc::default(), sharers, products }
}

/// An id of the machine, also in containers: all processes of one kernel are on one machine until its next boot.
fn host() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let boot = boot.ok().map(|id| id.trim().to_owned()).filter(|id| !id.is_empty());
    boot.unwrap_or_else(|| Uuid::now_v7().to_string()) // a machine that does not say is another at each start
}

/// Interval of the maintenance services.
pub(super) fn maintenance_interval(lease: Duration) -> Duration {
    (lease / 4).min(Duration::from_secs(15))
}
