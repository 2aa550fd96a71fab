//! `hypnos bench-serve`: what the service costs beside a bare handler, and how soon a job starts.
//!
//! Method. In one process, on one database with `--jobs` trainings in it, run the service as `serve` runs it, with
//! keys, and bare axum + sqlx (`bench_serve/bare.rs`) doing the same queries. Clients of [`client`] keep `--clients`
//! connections busy, first those of one server, then those of the other, in turns, `--rounds` times after a warm-up. A
//! round's ratio is our requests a second over the bare handler's beside it; what is said is the median ratio, with the
//! smallest and the largest. Client and servers share the machine's cores, which pulls every ratio towards 1: where it
//! matters, give the two servers and the client cores of their own.
//!
//! How soon a job starts: on an idle worker whose engine does nothing, `--starts` trainings are sent in by HTTP, one
//! after the other; counted are milliseconds from the row's creation to its claim, by the database's clock.
//!
//! How many deletions a second: `bench_serve/deletions.rs`. Lists and claims beside many ended jobs:
//! `bench_serve/history.rs`.

mod bare;
mod client;
mod deletions;
mod history;

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio_util::sync::CancellationToken;

use super::error::CliError;
use super::output::print_line;
use crate::blobs::{Blobs, BlobsConfig, Place};
use crate::engine::{
    ClassImages, DrawInput, Ending, Engine, Flow, Image, ImageGenerator, Observer, TrainInput,
};
use crate::health::Health;
use crate::http::{self, AppState, Auth, Timeouts, keys::make_key};
use crate::job::{Fault, FaultCode, JobId, Kind, Spec, TenantId, TrainOptions, TrainSpec};
use crate::photo::{Decoder, Limits};
use crate::store::{NewJob, NewKey, Origin, Scope, Store, Submitted};
use crate::worker;

/// Connections of each server to the database.
const CONNECTIONS: u32 = 8;

#[derive(Debug, Args)]
pub(super) struct BenchServe {
    /// sqlite:PATH or postgres://…, empty; by default a SQLite file that goes with the run
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Trainings in the table
    #[arg(long, default_value_t = 1000)]
    jobs: usize,
    /// Connections that are kept busy
    #[arg(long, default_value_t = 8)]
    clients: usize,
    /// Rounds, each with both servers
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds of one server in one round
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Trainings sent in to see how soon they start
    #[arg(long, default_value_t = 200)]
    starts: usize,
    /// Trainings with their objects that are deleted to the last of them
    #[arg(long, default_value_t = 300)]
    deletions: usize,
    /// Ended jobs in the table, beside which lists and claims are timed as well
    #[arg(long, default_value_t = 0)]
    ended: usize,
}

pub(super) fn run(args: &BenchServe) -> Result<ExitCode, CliError> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| CliError::Failed(error.to_string()))?;
    runtime.block_on(bench(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn bench(args: &BenchServe) -> Result<(), CliError> {
    let _ = rustls::crypto::ring::default_provider().install_default(); // for the clients of HTTP
    let dir = tempfile::tempdir().map_err(|error| CliError::Failed(error.to_string()))?;
    let url =
        args.database.clone().unwrap_or_else(|| format!("sqlite:{}", dir.path().join("bench.db").display()));
    let service = Service::open(&url, dir.path()).await?;
    let training = if args.ended > 0 { Some(history::fill(&service, args.ended).await?) } else { None };
    service.fill(args.jobs).await?;
    // One that has ended: a place in the queue is a second question, which the bare handler is not asked.
    let id = service.submit().await?;
    service.store.cancel(service.tenant, id).await.map_err(failed)?;
    let bare = bare::serve(&url, CONNECTIONS, service.tenant).await?;

    print_line(&format!(
        "{} trainings, {} ended jobs, {} connections, {} rounds of {} s",
        args.jobs, args.ended, args.clients, args.rounds, args.seconds
    ));
    print_line("case          ours/s    bare/s   ratio (smallest to largest)");
    let cases = [
        ("status", format!("/v1/jobs/{id}"), format!("/job/{id}")),
        ("list of 20", "/v1/jobs?limit=20".into(), "/jobs/20".into()),
    ];
    for (name, ours, theirs) in &cases {
        service.compare(args, name, ours, bare, theirs).await?;
    }
    starts(args, &service).await?;
    if let Some(training) = training {
        history::measure(&service, training, args.starts).await?;
    }
    if args.deletions > 0 {
        deletions::deletions(&service, args.deletions, args.clients).await?;
    }
    Ok(())
}

/// The service as `serve` runs it, with a key.
struct Service {
    store: Store,
    blobs: Blobs,
    database: String,
    tenant: TenantId,
    key: String,
    address: SocketAddr,
    scratch: std::path::PathBuf,
}

impl Service {
    async fn open(url: &str, dir: &Path) -> Result<Self, CliError> {
        let store = Store::connect(url, CONNECTIONS).await.map_err(failed)?;
        store.migrate().await.map_err(failed)?;
        let tenant = store.ensure_tenant("bench").await.map_err(failed)?;
        let key = make_key().map_err(|error| CliError::Failed(error.to_string()))?;
        let new = NewKey {
            id: key.id,
            tenant,
            name: String::new(),
            hash: key.hash,
            scope: Scope::Write,
            expires_ms: None,
        };
        store.create_key(&new).await.map_err(failed)?;
        let config = BlobsConfig { place: Place::Directory(dir.join("objects")), links: None };
        let blobs = Blobs::open(&config).await.map_err(|error| CliError::Failed(error.to_string()))?;
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let decoder = Decoder::new(Limits::default(), 2, Duration::from_secs(5));
        let settings =
            http::Settings { auth: Auth::Keys, queue_max: u64::MAX >> 1, ..http::Settings::default() };
        let stop = CancellationToken::new();
        let (rows, objects, health) = (store.clone(), blobs.clone(), Health::default());
        let front = AppState::new(rows, objects, decoder, settings, metrics, stop.clone(), health, None);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.map_err(|error| CliError::Failed(error.to_string()))?;
        let address = listener.local_addr().map_err(|error| CliError::Failed(error.to_string()))?;
        tokio::spawn(http::serve(listener, front.router(), 1024, Timeouts::default(), stop));
        let (database, scratch) = (url.to_owned(), dir.join("scratch"));
        Ok(Self { store, blobs, database, tenant, key: key.text, address, scratch })
    }

    /// Puts trainings into the table.
    async fn fill(&self, n: usize) -> Result<(), CliError> {
        for _ in 0..n {
            self.submit().await?;
        }
        Ok(())
    }

    async fn submit(&self) -> Result<JobId, CliError> {
        let spec = TrainSpec::new("mug", TrainOptions::default(), 1)
            .map_err(|error| CliError::Failed(error.message))?;
        let new = NewJob {
            id: JobId::new(),
            tenant: self.tenant,
            parent: None,
            spec: Spec::Train(Box::new(spec)),
            photos: Vec::new(),
            priority: 0,
            max_attempts: 1,
            idempotency: None,
            queue_max: u64::MAX >> 1,
            origin: Origin::default(),
        };
        match self.store.submit(new).await.map_err(failed)? {
            Submitted::New(job) => Ok(job.id),
            other => Err(CliError::Failed(format!("a training was not accepted: {other:?}"))),
        }
    }

    /// Both servers in turns on the same facts.
    async fn compare(
        &self,
        args: &BenchServe,
        name: &str,
        ours: &str,
        bare: SocketAddr,
        theirs: &str,
    ) -> Result<(), CliError> {
        let key = format!("Authorization: Bearer {}\r\n", self.key);
        let sides = [(self.address, request(ours, &key)), (bare, request(theirs, ""))];
        for (address, request) in &sides {
            client::load(*address, request, args.clients, Duration::from_millis(500)).await?; // warm
        }
        let mut rates: [Vec<f64>; 2] = Default::default();
        for _ in 0..args.rounds.max(1) {
            for ((address, request), rates) in sides.iter().zip(&mut rates) {
                let time = Duration::from_secs_f64(args.seconds);
                let seen = client::load(*address, request, args.clients, time).await?;
                rates.push(seen.requests as f64 / seen.time.as_secs_f64());
            }
        }
        let ratios: Vec<f64> = rates[0].iter().zip(&rates[1]).map(|(ours, bare)| ours / bare).collect();
        let [smallest, middle, largest] = spread(&ratios);
        let [ours, bare] = rates.map(|rates| spread(&rates)[1]);
        print_line(&format!(
            "{name:<12} {ours:>7.0} {bare:>9.0}   {middle:.2} ({smallest:.2} to {largest:.2})"
        ));
        Ok(())
    }
}

fn request(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n")
}

/// How soon a training starts on a worker that has nothing else to do.
async fn starts(args: &BenchServe, service: &Service) -> Result<(), CliError> {
    let drain = CancellationToken::new();
    let settings = worker::Settings {
        database: service.database.clone(),
        lease: Duration::from_mins(1),
        heartbeat: Duration::from_secs(2),
        deadline: Duration::from_mins(10),
        poll: Duration::from_secs(1),
        checkpoint_every: Duration::from_mins(5),
        scratch: service.scratch.clone(),
        weights_bytes_max: 1 << 20,
        sample_share: 0.5,
        backoff: Duration::from_secs(5),
        drain: Duration::from_mins(1),
        host: "bench".into(),
        clock: worker::Clock::default(),
    };
    let make: worker::MakeEngine = Box::new(|| Ok(Box::new(Idle)));
    let engines = vec![("idle".to_owned(), make)];
    let (store, blobs, stop) = (service.store.clone(), service.blobs.clone(), drain.clone());
    let work = async move { worker::run(settings, store, blobs, engines, &Health::default(), stop).await };
    let work = tokio::spawn(work);
    // First what was put there to be looked at; then one after the other.
    let mut waited: Vec<f64> = Vec::new();
    for i in 0..=args.starts {
        let id = service.submit().await?;
        let job = loop {
            let found = service.store.find(service.tenant, id, Kind::Train).await.map_err(failed)?;
            match found {
                Some(job) if job.state.is_terminal() => break job,
                _ => tokio::time::sleep(Duration::from_millis(if i == 0 { 50 } else { 2 })).await,
            }
        };
        if let (Some(started), true) = (job.started_ms, i > 0) {
            waited.push((started - job.created_ms) as f64);
        }
    }
    drain.cancel();
    work.await.map_err(|error| CliError::Failed(error.to_string()))??;
    waited.sort_by(f64::total_cmp);
    let at = |share: f64| waited[((waited.len() - 1) as f64 * share).round() as usize];
    if !waited.is_empty() {
        print_line(&format!(
            "enqueue to start, ms, of {}: median {:.0}, p99 {:.0}, largest {:.0}",
            waited.len(),
            at(0.5),
            at(0.99),
            at(1.0)
        ));
    }
    Ok(())
}

/// Smallest, median and largest.
fn spread(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]]
}

fn failed(error: crate::store::Error) -> CliError {
    CliError::Failed(error.to_string())
}

/// An engine that refuses every training at once: what is measured is the way to it.
struct Idle;

impl ImageGenerator for Idle {
    fn batch(&self) -> usize {
        1
    }

    fn draw(
        &mut self,
        _: &DrawInput<'_>,
        _: std::ops::Range<usize>,
        _: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Image>>, Fault> {
        Ok(None)
    }

    fn probe(&mut self) -> Result<(), Fault> {
        Ok(())
    }
}

impl Engine for Idle {
    fn bundle(&self) -> &'static str {
        "none"
    }

    fn class_images(&self, _: &TrainSpec) -> ClassImages {
        ClassImages { settings: "none".into(), seeds: Vec::new() }
    }

    fn train(&mut self, _: TrainInput<'_>, _: &mut Observer<'_>) -> Result<Ending, Fault> {
        Err(Fault::new(FaultCode::Input, "nothing is trained here"))
    }
}
