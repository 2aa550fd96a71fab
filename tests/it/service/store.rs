//! The store's contract: one suite, run against both databases, and against Postgres behind a pooler.

mod admin;
mod contract;
mod crash;
mod deployment;
mod in_doubt;
mod model_based;
mod models;
mod pooler;
mod upgrade;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use hypnos::job::{
    Checkpoint, Fault, FaultCode, Job, JobId, Kind, Lease, Object, Phase, Progress, SampleSpec, Spec,
    TenantId, TrainOptions, TrainSpec,
};
use hypnos::store::{Idempotency, NewJob, Origin, Sessions, Store, Submitted, Subscription};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use uuid::Uuid;

use super::monitoring;
use super::postgres::{Bouncer, Postgres, socket_of};

const LONG: Duration = Duration::from_mins(10);
const NONE: Duration = Duration::ZERO;
const BOTH: &[Kind] = &[Kind::Train, Kind::Sample];

/// A database of a test's own.
struct TestDatabase {
    /// Where the store connects to.
    url: String,
    /// The database itself, where a pooler is in between.
    direct: Option<String>,
    store: Store,
    dir: Option<tempfile::TempDir>,
    _bouncer: Option<Bouncer>,
}

impl TestDatabase {
    async fn sqlite() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}/hypnos.db", dir.path().display());
        Self { dir: Some(dir), ..Self::at(url).await }
    }

    async fn postgres() -> Self {
        Self::at(Postgres::database().await).await
    }

    /// Behind a PgBouncer in transaction mode.
    async fn pgbouncer() -> Self {
        let direct = Postgres::database().await;
        let bouncer = Bouncer::start(socket_of(&direct), "");
        let db = Self::at(bouncer.through(&direct)).await;
        assert_eq!(db.store.sessions(), Some(Sessions::Shared));
        Self { direct: Some(direct), _bouncer: Some(bouncer), ..db }
    }

    async fn at(url: String) -> Self {
        let store = Store::connect(&url, 16).await.unwrap();
        store.migrate().await.unwrap();
        Self { url, direct: None, store, dir: None, _bouncer: None }
    }

    /// As another process would have it.
    async fn another(&self) -> Store {
        Store::connect_with_direct(&self.url, self.direct.as_deref(), 16).await.unwrap()
    }

    /// The address of the database itself.
    fn direct(&self) -> &str {
        self.direct.as_ref().unwrap_or(&self.url)
    }

    /// Does to the database what the store would not.
    async fn sql(&self, text: &str) {
        let text = sqlx::raw_sql(AssertSqlSafe(text.to_owned()));
        if self.url.starts_with("sqlite:") {
            let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
            text.execute(&mut connection).await.unwrap();
        } else {
            let mut connection = PgConnection::connect(self.direct()).await.unwrap();
            text.execute(&mut connection).await.unwrap();
        }
    }

    /// Rows of two texts.
    async fn pairs(&self, text: &str) -> Vec<(String, String)> {
        if self.url.starts_with("sqlite:") {
            let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
            sqlx::query_as(AssertSqlSafe(text.to_owned())).fetch_all(&mut connection).await.unwrap()
        } else {
            let mut connection = PgConnection::connect(self.direct()).await.unwrap();
            sqlx::query_as(AssertSqlSafe(text.to_owned())).fetch_all(&mut connection).await.unwrap()
        }
    }

    /// Empties the database and gives it the schema of migration 0001, as the first release left it.
    async fn back_to_the_first_schema(&self) {
        self.clear().await;
        let sqlite = self.url.starts_with("sqlite:");
        let dir = format!("{}/migrations", env!("CARGO_MANIFEST_DIR"));
        let dir = Path::new(&dir).join(if sqlite { "sqlite" } else { "postgres" });
        let mut first = sqlx::migrate::Migrator::new(dir).await.unwrap();
        first.migrations.to_mut().retain(|migration| migration.version == 1);
        if sqlite {
            first.run(&mut SqliteConnection::connect(&self.url).await.unwrap()).await.unwrap();
        } else {
            first.run(&mut PgConnection::connect(self.direct()).await.unwrap()).await.unwrap();
        }
    }

    /// As if it had just been made.
    async fn clear(&self) {
        if !self.url.starts_with("sqlite:") {
            return self.sql("drop schema public cascade; create schema public").await;
        }
        let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
        let select =
            "select 'drop ' || type || ' ' || name from sqlite_master where type in ('table', 'view')";
        let drops: Vec<String> = sqlx::query_scalar(select).fetch_all(&mut connection).await.unwrap();
        sqlx::raw_sql("pragma foreign_keys = off").execute(&mut connection).await.unwrap();
        for drop in drops {
            sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut connection).await.unwrap();
        }
    }

    /// What the database knows of the tenants' device time.
    async fn device_time(&self) -> BTreeMap<String, DeviceTime> {
        let select = "select tenant, turn, begun, train_ms, sample_ms from device_time";
        let rows: Vec<DeviceTimeRow> = if self.url.starts_with("sqlite:") {
            let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
            sqlx::query_as(select).fetch_all(&mut connection).await.unwrap()
        } else {
            let mut connection = PgConnection::connect(self.direct()).await.unwrap();
            sqlx::query_as(select).fetch_all(&mut connection).await.unwrap()
        };
        let of = |(tenant, turn, begun, train_ms, sample_ms)| {
            (tenant, DeviceTime { turn, begun, train_ms, sample_ms })
        };
        rows.into_iter().map(of).collect()
    }

    async fn tenant(&self, name: &str) -> TenantId {
        self.store.ensure_tenant(name).await.unwrap()
    }

    async fn accept(&self, new: NewJob) -> Job {
        match self.store.submit(new).await.unwrap() {
            Submitted::New(job) => job,
            other => panic!("not accepted: {other:?}"),
        }
    }

    async fn claim(&self) -> Option<Job> {
        self.store.claim(Uuid::now_v7(), BOTH, LONG, LONG).await.unwrap().map(|claim| claim.job)
    }

    /// Claims under a lease that is over at once.
    async fn claim_briefly(&self) -> Option<Job> {
        self.store.claim(Uuid::now_v7(), BOTH, NONE, LONG).await.unwrap().map(|claim| claim.job)
    }

    async fn train(&self, tenant: TenantId, id: JobId) -> Option<Job> {
        self.store.find(tenant, id, Kind::Train).await.unwrap()
    }

    /// A training that succeeded.
    async fn trained(&self, tenant: TenantId) -> Job {
        let job = self.accept(training(tenant)).await;
        let claimed = self.claim().await.unwrap();
        assert_eq!(claimed.id, job.id);
        self.store.finish(claimed.lease(), &json!({"bundle": "x"}), &[object("weights")]).await.unwrap();
        self.train(tenant, job.id).await.unwrap()
    }
}

type DeviceTimeRow = (String, i64, i64, Option<i64>, Option<i64>);

/// A row of `device_time`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct DeviceTime {
    turn: i64,
    begun: i64,
    train_ms: Option<i64>,
    sample_ms: Option<i64>,
}

/// Waits for a hint that must come.
async fn notified(hints: &mut Subscription) {
    tokio::time::timeout(LONG / 10, hints.wait()).await.expect("a hint");
}

/// A training to be accepted.
fn training(tenant: TenantId) -> NewJob {
    NewJob {
        id: JobId::new(),
        tenant,
        parent: None,
        spec: Spec::Train(Box::new(TrainSpec::new("mug", TrainOptions::default(), 7).unwrap())),
        photos: vec![object("photo-0.png"), object("photo-1.png"), object("photo-2.png")],
        priority: 0,
        max_attempts: 3,
        idempotency: None,
        queue_max: u64::MAX,
        origin: Origin::default(),
    }
}

/// A sample to be accepted.
fn sample(tenant: TenantId, parent: JobId) -> NewJob {
    let spec: SampleSpec = serde_json::from_value(json!({"prompts": ["{product} on a table"]})).unwrap();
    let spec = Spec::Sample(spec.complete(7).unwrap());
    NewJob { parent: Some(parent), spec, photos: Vec::new(), ..training(tenant) }
}

fn named(key: &str, request_hash: &str) -> Idempotency {
    Idempotency { key: key.into(), request_hash: request_hash.into() }
}

fn object(name: &str) -> Object {
    Object {
        name: name.into(),
        key: format!("t/x/{name}"),
        size: 5,
        sha256: "00".repeat(32),
        content_type: "image/png".into(),
        meta: json!({"seed": 7}),
    }
}

fn checkpoint(step: u64) -> Checkpoint {
    Checkpoint { step, object: object(&format!("checkpoint-{step}")) }
}

fn progress(step: u64) -> Progress {
    Progress { step, ..Progress::begin(Phase::Training, 800) }
}

fn fault() -> Fault {
    Fault::new(FaultCode::Machine, "out of memory")
}

/// Runs each promise against either database, and against one behind a pooler.
macro_rules! on_each {
    ($($promise:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $promise() {
                    super::$promise(super::TestDatabase::sqlite().await).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $promise() {
                    super::$promise(super::TestDatabase::postgres().await).await;
                }
            )+
        }
        mod pgbouncer {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $promise() {
                    super::$promise(super::TestDatabase::pgbouncer().await).await;
                }
            )+
        }
    };
}
use on_each;
