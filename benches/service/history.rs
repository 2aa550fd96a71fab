//! What jobs that ended long ago cost: how long lists and claims take beside `--ended` of them.
//!
//! The jobs are one tenant's, spread over 90 days: one in ten is a training, the others are samples, each drawn with
//! the training before it; four in five succeeded, one in 25 was canceled, the others failed. They are written with
//! SQL, for submitting a million takes an hour.
//!
//! A list is asked for by HTTP, one request at a time. A claim is that of a training that was just submitted, the only
//! one that waits; counted is the time in the worker's process until it has the job.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use hypnos::job::{Fault, FaultCode, JobId, Kind, TenantId, TrainOptions, TrainSpec};
use hypnos::ml;
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use uuid::Uuid;

use super::Service;
use super::quantiles::quantiles;

const ROWS_PER_STATEMENT: usize = 1000;
const SPAN: Duration = Duration::from_hours(24 * 90);
/// One training in so many has the class that nobody else has.
const RARE_EVERY: usize = 5_000;

/// Writes `n` jobs that have ended into the table; a training among them, from the middle.
pub(super) async fn fill(service: &Service, n: usize) -> Result<JobId> {
    let mut connection = Connected::open(&service.database).await?;
    let spec =
        TrainSpec::new("mug", TrainOptions::default(), 1).map_err(|invalid| anyhow!(invalid.message))?;
    let spec = serde_json::to_string(&spec)?;
    let now = jiff::Timestamp::now().as_millisecond();
    let (mut parent, mut middle) = (JobId::new(), None);
    for from in (0..n).step_by(ROWS_PER_STATEMENT) {
        let mut sql = String::from(INSERT);
        for i in from..n.min(from + ROWS_PER_STATEMENT) {
            let ended_ms = now - (SPAN.as_millis() as i64) * (n - i) as i64 / n as i64;
            let id = id_of(ended_ms, i);
            if i % 10 == 0 {
                parent = id;
                middle = middle.or_else(|| (i >= n / 2).then_some(id));
            }
            let comma = if i == from { "" } else { "," };
            write!(sql, "{comma}\n{}", row(service.tenant, id, parent, i, ended_ms, &spec))?;
        }
        connection.run(sql).await?;
    }
    if let Connected::Postgres(connection) = &mut connection {
        sqlx::raw_sql("analyze job").execute(connection).await?; // as its autovacuum does in time
    }
    Ok(middle.ok_or_else(|| ml::Error::input(format!("--ended: wanted at least 20, got {n}")))?)
}

const INSERT: &str = "insert into job (id, tenant, kind, parent, class_name, spec, photos, priority, state, cancel_requested, \
    attempt, max_attempts, not_before_ms, claimed_ms, result, error, created_ms, started_ms, finished_ms) values";

fn row(tenant: TenantId, id: JobId, parent: JobId, i: usize, ended_ms: i64, spec: &str) -> String {
    let (kind, parent, class, spec) = match i % 10 {
        0 if (i / 10).is_multiple_of(RARE_EVERY) => ("train", "null".into(), "'lighthouse'".into(), spec),
        0 => ("train", "null".into(), format!("'class {}'", i / 10 % 7), spec),
        _ => ("sample", format!("'{parent}'"), "null".into(), r#"{"prompts": ["{product} on a table"]}"#),
    };
    let (state, result, error, canceled) = match i % 25 {
        0..20 => ("succeeded", "'{}'", "null", 0),
        20..24 => ("failed", "null", r#"'{"code": "input", "message": "", "retryable": false}'"#, 0),
        _ => ("canceled", "null", "null", 1),
    };
    format!(
        "('{id}', '{tenant}', '{kind}', {parent}, {class}, '{spec}', '[]', 0, '{state}', {canceled}, \
         1, 3, {ended_ms}, {ended_ms}, {result}, {error}, {ended_ms}, {ended_ms}, {ended_ms})"
    )
}

/// An id of that time, as [`JobId::new`] makes them.
fn id_of(ms: i64, i: usize) -> JobId {
    let mut random = [0; 10];
    random[2..].copy_from_slice(&(i as u64).to_be_bytes());
    JobId(uuid::Builder::from_unix_timestamp_millis(ms as u64, &random).into_uuid())
}

/// Times lists and claims, `n` times each.
pub(super) async fn measure(service: &Service, training: JobId, n: usize) -> Result<()> {
    let days = |days: i32| {
        let then = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24 * i64::from(days));
        then.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    };
    let cursor = training.0.simple();
    let lists = [
        ("trainings, newest", "/v1/jobs?limit=20".to_owned()),
        ("trainings, page in the middle", format!("/v1/jobs?limit=20&cursor={cursor}")),
        ("trainings, 200", "/v1/jobs?limit=200".to_owned()),
        ("trainings, running", "/v1/jobs?state=running".to_owned()),
        ("trainings, failed", "/v1/jobs?limit=20&state=failed".to_owned()),
        ("trainings of a rare class", "/v1/jobs?limit=20&class_name=lighthouse".to_owned()),
        ("trainings of a class not there", "/v1/jobs?class_name=violin".to_owned()),
        ("trainings of the last minute", format!("/v1/jobs?created_after={}", days(0))),
        ("trainings of a week", format!("/v1/jobs?limit=20&created_after={}", days(7))),
        ("samples, newest", "/v1/samples?limit=20".to_owned()),
        ("samples, canceled", "/v1/samples?limit=20&state=canceled".to_owned()),
        ("samples of one training", format!("/v1/samples?job_id={training}")),
    ];
    println!("{:<32} {:>8} {:>8} {:>8}", "ms", "median", "p95", "largest");
    let client = reqwest::Client::new();
    for (name, path) in lists {
        let mut times = Vec::new();
        for _ in 0..n {
            let began = Instant::now();
            let request = client.get(format!("http://{}{path}", service.address)).bearer_auth(&service.key);
            let answer = request.send().await?;
            let status = answer.status().as_u16();
            answer.bytes().await?;
            ensure!(status == 200, "{path}: wanted 200, got {status}");
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
        print(name, &times);
    }
    let (worker, kinds) = (Uuid::now_v7(), [Kind::Train, Kind::Sample]);
    let (lease, deadline) = (Duration::from_mins(1), Duration::from_mins(10));
    let mut times = Vec::new();
    for _ in 0..n {
        let id = service.submit().await?;
        let began = Instant::now();
        let claim = service.store.claim(worker, &kinds, lease, deadline).await?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
        let claim = claim.filter(|claim| claim.job.id == id);
        let claim = claim.context("the training that was submitted was not claimed")?;
        let fault = Fault::new(FaultCode::Input, "nothing is trained here");
        service.store.fail(claim.job.lease(), &fault, None).await?;
    }
    print("claim", &times);
    Ok(())
}

/// One line of times in milliseconds.
fn print(name: &str, times: &[f64]) {
    let [median, p95, largest] = quantiles(times, [0.5, 0.95, 1.0]);
    println!("{name:<32} {median:>8.2} {p95:>8.2} {largest:>8.2}");
}

/// A connection of its own, for what no service does.
enum Connected {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Connected {
    async fn open(url: &str) -> sqlx::Result<Self> {
        if url.starts_with("sqlite:") {
            SqliteConnection::connect(url).await.map(Self::Sqlite)
        } else {
            PgConnection::connect(url).await.map(Self::Postgres)
        }
    }

    async fn run(&mut self, sql: String) -> sqlx::Result<()> {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql)); // ours, every letter of it
        match self {
            Self::Sqlite(connection) => sql.execute(connection).await.map(drop),
            Self::Postgres(connection) => sql.execute(connection).await.map(drop),
        }
    }
}
