//! The store's contract: one suite, run against both databases, and against Postgres behind a pooler.

mod contract;
mod crash;
mod pooler;
mod unknown;
mod upgrade;
mod walk;

use std::time::Duration;

use hypnos::job::{
    Checkpoint, Fault, FaultCode, Job, JobId, Kind, Lease, Object, Phase, Progress, SampleSpec, Spec,
    TenantId, TrainOptions, TrainSpec,
};
use hypnos::store::{Idempotency, NewJob, Sessions, Store, Submitted, Wakes};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use uuid::Uuid;

use super::postgres::{Bouncer, Postgres, socket_of};

const LONG: Duration = Duration::from_mins(10);
const NONE: Duration = Duration::ZERO;
const BOTH: &[Kind] = &[Kind::Train, Kind::Sample];

/// A database of a test's own.
struct House {
    /// Where the store connects to.
    url: String,
    /// The database itself, where a pooler is in between.
    direct: Option<String>,
    store: Store,
    dir: Option<tempfile::TempDir>,
    _bouncer: Option<Bouncer>,
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

    /// Behind a PgBouncer in transaction mode.
    async fn pgbouncer() -> Self {
        let direct = Postgres::database().await;
        let bouncer = Bouncer::start(socket_of(&direct), "");
        let house = Self::at(bouncer.through(&direct)).await;
        assert_eq!(house.store.sessions(), Some(Sessions::Shared));
        Self { direct: Some(direct), _bouncer: Some(bouncer), ..house }
    }

    async fn at(url: String) -> Self {
        let store = Store::connect(&url, 16).await.unwrap();
        store.migrate().await.unwrap();
        Self { url, direct: None, store, dir: None, _bouncer: None }
    }

    /// As another process would have it.
    async fn another(&self) -> Store {
        Store::connect_past(&self.url, self.direct.as_deref(), 16).await.unwrap()
    }

    /// Does to the database what the store would not.
    async fn sql(&self, text: &str) {
        let text = sqlx::raw_sql(AssertSqlSafe(text.to_owned()));
        if self.url.starts_with("sqlite:") {
            let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
            text.execute(&mut connection).await.unwrap();
        } else {
            let direct = self.direct.as_ref().unwrap_or(&self.url);
            let mut connection = PgConnection::connect(direct).await.unwrap();
            text.execute(&mut connection).await.unwrap();
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
        self.store.claim(Uuid::now_v7(), BOTH, LONG, LONG).await.unwrap()
    }

    /// Claims under a lease that is over at once.
    async fn claim_briefly(&self) -> Option<Job> {
        self.store.claim(Uuid::now_v7(), BOTH, NONE, LONG).await.unwrap()
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

/// Runs each promise against either database, and against one behind a pooler.
macro_rules! on_each {
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
        mod pgbouncer {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $promise() {
                    super::$promise(super::House::pgbouncer().await).await;
                }
            )+
        }
    };
}
use on_each;
