//! The store's contract: one suite, run against both databases.

mod contract;
mod crash;
mod walk;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use hypnos::job::{
    Checkpoint, Fault, FaultCode, Job, JobId, Kind, Lease, Object, Phase, Progress, SampleSpec, Spec,
    TenantId, TrainOptions, TrainSpec,
};
use hypnos::store::{Idempotency, NewJob, Store, Submitted, Wakes};
use serde_json::json;
use sqlx::migrate::Migrator;
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use uuid::Uuid;

use super::postgres::Postgres;

const LONG: Duration = Duration::from_mins(10);
const NONE: Duration = Duration::ZERO;
const BOTH: &[Kind] = &[Kind::Train, Kind::Sample];

/// A database of a test's own.
struct House {
    url: String,
    store: Store,
    dir: Option<tempfile::TempDir>,
}

impl House {
    async fn sqlite() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}/hypnos.db", dir.path().display());
        Self { dir: Some(dir), ..Self::at(url).await }
    }

    async fn postgres() -> Self {
        Self::at(Postgres::database().await).await
    }

    async fn at(url: String) -> Self {
        let store = Store::connect(&url, 16).await.unwrap();
        store.migrate().await.unwrap();
        Self { url, store, dir: None }
    }

    /// As another process would have it.
    async fn another(&self) -> Store {
        Store::connect(&self.url, 16).await.unwrap()
    }

    /// Does to the database what the store would not.
    async fn sql(&self, text: &str) {
        let text = sqlx::raw_sql(AssertSqlSafe(text.to_owned()));
        if self.url.starts_with("sqlite:") {
            let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
            text.execute(&mut connection).await.unwrap();
        } else {
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
            text.execute(&mut connection).await.unwrap();
        }
    }

    /// As before the first migration.
    async fn drop_all(&self) {
        self.sql("drop table idempotency; drop table class_image; drop table artifact; drop table job").await;
        self.sql("drop table api_key; drop table device_time; drop table tenant; drop view clock").await;
        self.sql("drop table _sqlx_migrations").await;
    }

    /// As the first build that had a database left it.
    async fn back_to_the_first_migration(&self) {
        self.drop_all().await;
        let kind = self.url.split(':').next().unwrap().replace("postgresql", "postgres");
        let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(kind);
        let first = tempfile::tempdir().unwrap();
        std::fs::copy(all.join("0001_queue.sql"), first.path().join("0001_queue.sql")).unwrap();
        let first = Migrator::new(first.path()).await.unwrap();
        if self.url.starts_with("sqlite:") {
            first
                .run_direct(None, &mut SqliteConnection::connect(&self.url).await.unwrap(), false)
                .await
                .unwrap();
        } else {
            first
                .run_direct(None, &mut PgConnection::connect(&self.url).await.unwrap(), false)
                .await
                .unwrap();
        }
    }

    /// What the database knows of the tenants' device time.
    async fn device_time(&self) -> BTreeMap<String, DeviceTime> {
        let select = "select tenant, turn, begun, train_ms, sample_ms from device_time";
        let rows: Vec<DeviceTimeRow> = if self.url.starts_with("sqlite:") {
            let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
            sqlx::query_as(select).fetch_all(&mut connection).await.unwrap()
        } else {
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
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
async fn woken(wakes: &mut Wakes) {
    tokio::time::timeout(LONG / 10, wakes.wait()).await.expect("a hint");
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

/// Runs each promise against either database.
macro_rules! on_both {
    ($($promise:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $promise() {
                    super::$promise(super::House::sqlite().await).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $promise() {
                    super::$promise(super::House::postgres().await).await;
                }
            )+
        }
    };
}
use on_both;
