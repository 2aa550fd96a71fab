//! `hypnos serve`: the HTTP server, and with `--workers` workers in the same process.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::bundle;
use super::error::CliError;
use super::output::print_line;
use super::product_detector;
use super::service::{self, Instrumentation, Log, bind};
use crate::blobs::Links;
use crate::config::{Monitoring, Serving, Storage, Working, seconds};
use crate::health::Health;
use crate::http::{self, AppState, Auth, Timeouts};
use crate::photo::{Decoder, Limits};
use crate::store::Store;
use crate::{maintenance, memory, worker};

/// Maximum number of photos decoded at once: each may take half a GiB.
const DECODERS_MAX: usize = 4;

/// How long one photo may take to decode.
const DECODE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, Args)]
pub(super) struct Serve {
    /// Workers in this process, each with the next of the devices; 0 leaves the work to `hypnos work`
    #[arg(long, env = "HYPNOS_WORKERS", value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub(super) workers: u16,
    /// Bring the database up to date first; always done for a SQLite file
    #[arg(long, env = "HYPNOS_MIGRATE")]
    pub(super) migrate: bool,
    #[command(flatten)]
    pub(super) storage: Storage,
    #[command(flatten)]
    pub(super) serving: Serving,
    #[command(flatten)]
    pub(super) working: Working,
    #[command(flatten)]
    pub(super) monitoring: Monitoring,
    #[command(flatten)]
    pub(super) log: Log,
}

pub(super) fn run(args: &Serve) -> Result<ExitCode, CliError> {
    let instrumentation = Instrumentation::start(&args.log, "serve")?;
    args.serving.keys_wanted()?;
    args.serving.check()?;
    let args = &Serve { working: bundle::opened(&args.working)?, ..args.clone() };
    let work = match args.workers {
        0 => {
            memory::always_give_back();
            None
        }
        n => Some(service::worker(&args.storage, &args.working, n.into())?),
    };
    instrumentation
        .run(async |instrumentation, stop| Box::pin(serve(args, work, instrumentation, stop)).await)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn serve(
    args: &Serve,
    work: Option<service::Work>,
    instrumentation: &Instrumentation,
    stop: CancellationToken,
) -> Result<(), CliError> {
    let (storage, serving) = (&args.storage, &args.serving);
    let listener = bind("HYPNOS_LISTEN", serving.listen).await?;
    let bound = listener.local_addr().map_err(|error| CliError::Failed(error.to_string()))?;
    let public_url = serving.public_url(bound)?;
    let keys = serving.keys_wanted()?;

    let store = service::open_store(storage, args.migrate || storage.is_sqlite()?, &stop).await?;
    if keys {
        warn_without_keys(&store).await?;
    }
    let links = Links { public_url: public_url.clone(), secret: serving.url_secret(&storage.data)? };
    let blobs = service::open_blobs(storage, Some(links)).await?;
    service::pair(&store, &blobs, &stop).await?;
    let limits = Limits { side_min: serving.photo_side_min, ..Limits::default() };
    let n_parallel = std::thread::available_parallelism().map_or(1, usize::from).min(DECODERS_MAX);
    let settings = http_settings(args, &public_url, keys)?;
    let detector = product_detector::open(&args.working.bundle)?;
    let decoder = Decoder::new(limits, n_parallel, DECODE);
    let (metrics, health) = (instrumentation.metrics.clone(), Health::default());
    let state = AppState::new(
        store.clone(),
        blobs.clone(),
        decoder,
        settings,
        metrics,
        stop.clone(),
        health.clone(),
        detector,
    );
    let timeouts = Timeouts {
        head: seconds("HYPNOS_HEADER_SECS", serving.header_secs)?,
        drain: seconds("HYPNOS_DRAIN_SECS", serving.drain_secs)?,
        ..Timeouts::default()
    };

    // All parts share one shutdown token.
    let n_connections = serving.connections_max as usize;
    let serve = http::serve(listener, state.router(), n_connections, timeouts.clone(), stop.clone());
    let operations = match args.monitoring.metrics_listen {
        Some(address) => Some(bind("HYPNOS_METRICS_LISTEN", address).await?),
        None => None,
    };
    let operations = async {
        if let Some(listener) = operations {
            http::serve(listener, state.operations(), 64, timeouts.clone(), stop.clone()).await;
        }
    };
    let pause = service::maintenance_interval(seconds("HYPNOS_LEASE_SECS", args.working.lease_secs)?);
    tokio::spawn(maintenance::run(store.clone(), blobs.clone(), pause, stop.clone()));
    let count_queue = instrumentation.count_queue(&store, &stop);
    let work = async {
        let worked = match work {
            Some((settings, engines)) => {
                worker::run(settings, store.clone(), blobs, engines, &health, stop.clone()).await
            }
            None => Ok(()),
        };
        if worked.is_err() {
            stop.cancel(); // without its workers the server must not run on
        }
        worked
    };
    info!(keys, workers = args.workers, address = %bound, "listening");
    print_line(&format!("Hypnos listens on {public_url}"));
    let ((), (), (), worked) = tokio::join!(serve, operations, count_queue, work);
    worked.map_err(CliError::from)
}

/// Warns if no request can be made for lack of an API key.
async fn warn_without_keys(store: &Store) -> Result<(), CliError> {
    let keys = store.list_keys().await.map_err(|error| CliError::Failed(error.to_string()))?;
    if !keys.iter().any(|key| key.live) {
        warn!(
            "requests need an API key, and none exists: create one with `hypnos keys create --tenant NAME`"
        );
    }
    Ok(())
}

fn http_settings(args: &Serve, public_url: &str, keys: bool) -> Result<http::Settings, CliError> {
    let serving = &args.serving;
    let spool = args.working.scratch.clone().unwrap_or_else(|| args.storage.scratch());
    let writable = std::fs::create_dir_all(&spool).and_then(|()| tempfile::tempfile_in(&spool));
    writable.map_err(|error| {
        CliError::Input(format!("HYPNOS_SCRATCH: {} cannot be written to: {}", spool.display(), error.kind()))
    })?;
    Ok(http::Settings {
        public_url: public_url.to_owned(),
        auth: if keys { Auth::Keys } else { Auth::None },
        photo_bytes_max: (serving.photo_mb as usize) << 20,
        upload_time: seconds("HYPNOS_BODY_SECS", serving.body_secs)?,
        uploads_max: serving.uploads_max as usize,
        spool,
        streams_max: serving.streams_max as usize,
        queue_max: serving.queue_max.into(),
        attempts_max: serving.attempts_max.into(),
        url_time: Duration::from_secs(serving.url_secs),
        default_model: serving.default_model.clone(),
        models: serving.models.clone(),
        ..http::Settings::default()
    })
}
