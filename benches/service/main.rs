//! Benchmark of the service: what it costs beside a bare handler, and how soon a job starts.
//!
//! ```sh
//! cargo bench --bench service -- [--database URL] [--ended N]
//! ```
//!
//! Method. In one process, on one database with `--jobs` trainings in it, run the service as `hypnos serve` runs it,
//! with keys, and bare axum + sqlx (`bare.rs`) doing the same queries. Clients of [`client`] keep `--clients`
//! connections busy, first those of one server, then those of the other, in turns, `--rounds` times after a warm-up. A
//! round's ratio is our requests a second over the bare handler's beside it; what is said is the median ratio, with the
//! smallest and the largest. Client and servers share the machine's cores, which pulls every ratio towards 1: where it
//! matters, give the two servers and the client cores of their own.
//!
//! How soon a job starts: `starts.rs`. How many deletions a second: `deletions.rs`. Lists and claims beside many ended
//! jobs: `history.rs`.
#![allow(clippy::print_stdout)] // the figures are what it is for

mod bare;
mod client;
#[path = "../shared/command_line.rs"]
mod command_line;
mod deletions;
mod history;
mod quantiles;
#[path = "../shared/seconds.rs"]
mod seconds;
#[path = "../shared/spread.rs"]
mod spread;
mod starts;

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use clap::Parser;
use hypnos::blobs::{Blobs, BlobsConfig, Place};
use hypnos::health::Health;
use hypnos::http::{self, AppState, Auth, Timeouts, keys::make_key};
use hypnos::job::{JobId, Spec, TenantId, TrainOptions, TrainSpec};
use hypnos::photo::{Decoder, Limits};
use hypnos::store::{NewJob, NewKey, Origin, Scope, Store, Submitted};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio_util::sync::CancellationToken;

use self::command_line::CargoFlags;
use self::spread::Spread;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Connections of each server to the database.
const CONNECTIONS: u32 = 8;

/// Measures the service beside a bare handler, how soon a job starts, and how fast jobs are deleted.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench service --")]
struct Args {
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
    #[arg(long, default_value = "2", value_parser = seconds::parse)]
    seconds: Duration,
    /// Trainings sent in to see how soon they start
    #[arg(long, default_value_t = 200)]
    starts: usize,
    /// Trainings with their objects that are deleted to the last of them
    #[arg(long, default_value_t = 300)]
    deletions: usize,
    /// Ended jobs in the table, beside which lists and claims are timed as well
    #[arg(long, default_value_t = 0)]
    ended: usize,
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
    let _ = rustls::crypto::ring::default_provider().install_default(); // for the clients of HTTP
    let dir = tempfile::tempdir()?;
    let url =
        args.database.clone().unwrap_or_else(|| format!("sqlite:{}", dir.path().join("bench.db").display()));
    let service = Service::open(&url, dir.path()).await?;
    let training = if args.ended > 0 { Some(history::fill(&service, args.ended).await?) } else { None };
    service.fill(args.jobs).await?;
    // One that has ended: a place in the queue is a second question, which the bare handler is not asked.
    let id = service.submit().await?;
    service.store.cancel(service.tenant, id).await?;
    let bare = bare::serve(&url, CONNECTIONS, service.tenant).await?;

    println!(
        "{} trainings, {} ended jobs, {} connections, {} rounds of {} s",
        args.jobs,
        args.ended,
        args.clients,
        args.rounds,
        args.seconds.as_secs_f64()
    );
    println!("case          ours/s    bare/s   ratio (smallest to largest)");
    let cases = [
        ("status", format!("/v1/jobs/{id}"), format!("/job/{id}")),
        ("list of 20", "/v1/jobs?limit=20".into(), "/jobs/20".into()),
    ];
    for (name, ours, theirs) in &cases {
        service.compare(args, name, ours, bare, theirs).await?;
    }
    starts::starts(&service, args.starts).await?;
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
    async fn open(url: &str, dir: &Path) -> Result<Self> {
        let store = Store::connect(url, CONNECTIONS).await?;
        store.migrate().await?;
        let tenant = store.ensure_tenant("bench").await?;
        let key = make_key()?;
        let new = NewKey {
            id: key.id,
            tenant,
            name: String::new(),
            hash: key.hash,
            scope: Scope::Write,
            expires_ms: None,
        };
        store.create_key(&new).await?;
        let config = BlobsConfig { place: Place::Directory(dir.join("objects")), links: None };
        let blobs = Blobs::open(&config).await?;
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let decoder = Decoder::new(Limits::default(), 2, Duration::from_secs(5));
        let settings =
            http::Settings { auth: Auth::Keys, queue_max: u64::MAX >> 1, ..http::Settings::default() };
        let stop = CancellationToken::new();
        let (rows, objects, health) = (store.clone(), blobs.clone(), Health::default());
        let front = AppState::new(rows, objects, decoder, settings, metrics, stop.clone(), health, None);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener?;
        let address = listener.local_addr()?;
        tokio::spawn(http::serve(listener, front.router(), 1024, Timeouts::default(), stop));
        let (database, scratch) = (url.to_owned(), dir.join("scratch"));
        Ok(Self { store, blobs, database, tenant, key: key.text, address, scratch })
    }

    /// Puts trainings into the table.
    async fn fill(&self, n: usize) -> Result<()> {
        for _ in 0..n {
            self.submit().await?;
        }
        Ok(())
    }

    async fn submit(&self) -> Result<JobId> {
        let spec =
            TrainSpec::new("mug", TrainOptions::default(), 1).map_err(|invalid| anyhow!(invalid.message))?;
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
        match self.store.submit(new).await? {
            Submitted::New(job) => Ok(job.id),
            other => bail!("a training was not accepted: {other:?}"),
        }
    }

    /// Both servers in turns on the same facts.
    async fn compare(
        &self,
        args: &Args,
        name: &str,
        ours: &str,
        bare: SocketAddr,
        theirs: &str,
    ) -> Result<()> {
        let key = format!("Authorization: Bearer {}\r\n", self.key);
        let sides = [(self.address, request(ours, &key)), (bare, request(theirs, ""))];
        for (address, request) in &sides {
            client::load(*address, request, args.clients, Duration::from_millis(500)).await?; // warm
        }
        let mut rates: [Vec<f64>; 2] = Default::default();
        for _ in 0..args.rounds.max(1) {
            for ((address, request), rates) in sides.iter().zip(&mut rates) {
                let seen = client::load(*address, request, args.clients, args.seconds).await?;
                rates.push(seen.requests as f64 / seen.time.as_secs_f64());
            }
        }
        let ratios: Vec<f64> = rates[0].iter().zip(&rates[1]).map(|(ours, bare)| ours / bare).collect();
        let Spread { min, median, max } = Spread::of(&ratios);
        let [ours, bare] = rates.map(|rates| Spread::of(&rates).median);
        println!("{name:<12} {ours:>7.0} {bare:>9.0}   {median:.2} ({min:.2} to {max:.2})");
        Ok(())
    }
}

fn request(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n")
}
