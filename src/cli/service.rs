//! What `serve` and `work` have in common: the log, the signals, the database and the store that may not be up yet.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use secrecy::ExposeSecret;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use super::Stop;
use crate::blobs::{Blobs, BlobsConfig, Links};
use crate::config::{Storage, Working, gigabytes, seconds};
use crate::engine::{self, CandleEngine, Engine};
use crate::job::{Fault, FaultCode};
use crate::store::{self, Store};
use crate::worker::{self, Clock, MakeEngine};

/// Longest wait between two tries to reach the database at the start.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Args)]
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
        let filter = tracing_subscriber::EnvFilter::try_new(&self.log)
            .map_err(|error| Stop::Input(format!("HYPNOS_LOG: {error}")))?;
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        let log = log.with_ansi(std::io::stderr().is_terminal());
        let started = match self.log_format {
            LogFormat::Text => log.with_target(false).try_init(),
            LogFormat::Json => log.json().flatten_event(true).try_init(),
        };
        started.map_err(|error| Stop::Failed(format!("the log cannot be started: {error}")))
    }
}

/// Signals that come within this time of the first one are one: `timeout` signals its child and then the whole group.
const ONE_SIGNAL: Duration = Duration::from_secs(1);

/// Runs `work` on a runtime of many threads, until it ends or the process is told to for the second time.
///
/// `work` is given a token that the first SIGTERM or SIGINT cancels.
pub(super) fn run<T, F: Future<Output = Result<T, Stop>>>(
    work: impl FnOnce(CancellationToken) -> F,
) -> Result<T, Stop> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
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
                Some(_) => {
                    return Err(Stop::Failed("told to stop for the second time: stopped at once".into()));
                }
            }
        }
    });
    runtime.shutdown_background(); // a device may be in the middle of a step; its lease will run out
    done
}

fn no_signals(error: std::io::Error) -> Stop {
    Stop::Failed(format!("signals cannot be heard: {error}"))
}

/// The database, waited for if it is not up yet. Its schema is brought up to date if `migrate`, else checked.
pub(super) async fn open_store(
    storage: &Storage,
    migrate: bool,
    stop: &CancellationToken,
) -> Result<Store, Stop> {
    let url = storage.database_url()?;
    storage.check_local()?;
    let mut wait = Duration::from_millis(200);
    loop {
        let opened = async {
            let store = Store::connect(url.expose_secret(), storage.database_connections).await?;
            if migrate {
                store.migrate().await?;
            }
            store.check_schema().await?;
            Ok(store)
        };
        match opened.await {
            Ok(store) => return Ok(store),
            Err(store::Error::Away(why)) => warn!("the database cannot be reached yet: {why}"),
            Err(error) => return Err(Stop::Input(error.to_string())),
        }
        tokio::select! {
            () = stop.cancelled() => return Err(Stop::Failed("told to stop before the database could be reached".into())),
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(WAIT_MAX);
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
