//! What the service is measured against: axum and sqlx as their own examples use them, the same queries, the same
//! facts as JSON. No keys, no limits, no links, no request ids.

use std::net::SocketAddr;

use anyhow::Result;
use axum::extract::{Path, State};
use axum::routing::get;
use axum::{Json, Router};
use hypnos::job::TenantId;
use serde::Serialize;
use serde_json::Value;
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{PgPool, SqlitePool};

/// The columns that the service reads, of which a client sees about half.
#[derive(Debug, sqlx::FromRow)]
struct Row {
    id: String,
    #[allow(dead_code, reason = "read because the service reads them")]
    tenant: String,
    #[allow(dead_code, reason = "read because the service reads them")]
    parent: Option<String>,
    spec: String,
    #[allow(dead_code, reason = "read because the service reads them")]
    photos: String,
    state: String,
    #[allow(dead_code, reason = "read because the service reads them")]
    run_lease: i64,
    attempt: i64,
    #[allow(dead_code, reason = "read because the service reads them")]
    max_attempts: i64,
    cancel_requested: i64,
    #[allow(dead_code, reason = "read because the service reads them")]
    checkpoint: Option<String>,
    progress: Option<String>,
    result: Option<String>,
    error: Option<String>,
    version: i64,
    created_ms: i64,
    started_ms: Option<i64>,
    finished_ms: Option<i64>,
}

/// A row as JSON, its documents as they are.
#[derive(Debug, Serialize)]
struct Shown {
    id: String,
    spec: Value,
    state: String,
    attempt: i64,
    cancel_requested: i64,
    progress: Option<Value>,
    result: Option<Value>,
    error: Option<Value>,
    version: i64,
    created_ms: i64,
    started_ms: Option<i64>,
    finished_ms: Option<i64>,
}

const ONE: &str = "select id, tenant, parent, spec, photos, state, run_lease, attempt, max_attempts, cancel_requested, \
    checkpoint, progress, result, error, version, created_ms, started_ms, finished_ms from job \
    where tenant = $1 and id = $2 and kind = 'train' and deleting = 0";
const LIST: &str = "select id, tenant, parent, spec, photos, state, run_lease, attempt, max_attempts, cancel_requested, \
    checkpoint, progress, result, error, version, created_ms, started_ms, finished_ms from job \
    where tenant = $1 and deleting = 0 and kind = 'train' order by id desc limit $2";

/// Serves `GET /job/{id}` and `GET /jobs/{n}` from the database at `url`; its address.
pub(super) async fn serve(url: &str, connections: u32, tenant: TenantId) -> Result<SocketAddr> {
    let tenant = tenant.to_string();
    let router = if let Some(path) = url.strip_prefix("sqlite:") {
        let options = SqliteConnectOptions::new().filename(path).read_only(true);
        on_sqlite(SqlitePoolOptions::new().max_connections(connections).connect_with(options).await?, tenant)
    } else {
        on_postgres(PgPoolOptions::new().max_connections(connections).connect(url).await?, tenant)
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async { axum::serve(listener, router).await });
    Ok(address)
}

/// The same two handlers for a pool of either kind.
macro_rules! handlers {
    ($name:ident, $pool:ty) => {
        fn $name(pool: $pool, tenant: String) -> Router {
            type Shared = State<($pool, String)>;
            async fn one(
                State((pool, tenant)): Shared,
                Path(id): Path<String>,
            ) -> Result<Json<Shown>, String> {
                let row = sqlx::query_as::<_, Row>(ONE).bind(tenant).bind(id).fetch_one(&pool);
                row.await.map_err(words).and_then(shown).map(Json)
            }
            async fn list(
                State((pool, tenant)): Shared,
                Path(n): Path<i64>,
            ) -> Result<Json<Vec<Shown>>, String> {
                let rows = sqlx::query_as::<_, Row>(LIST).bind(tenant).bind(n).fetch_all(&pool);
                rows.await.map_err(words)?.into_iter().map(shown).collect::<Result<_, _>>().map(Json)
            }
            Router::new()
                .route("/job/{id}", get(one))
                .route("/jobs/{n}", get(list))
                .with_state((pool, tenant))
        }
    };
}
handlers!(on_sqlite, SqlitePool);
handlers!(on_postgres, PgPool);

fn shown(row: Row) -> Result<Shown, String> {
    let document = |text: String| serde_json::from_str(&text).map_err(words);
    Ok(Shown {
        id: row.id,
        spec: document(row.spec)?,
        state: row.state,
        attempt: row.attempt,
        cancel_requested: row.cancel_requested,
        progress: row.progress.map(document).transpose()?,
        result: row.result.map(document).transpose()?,
        error: row.error.map(document).transpose()?,
        version: row.version,
        created_ms: row.created_ms,
        started_ms: row.started_ms,
        finished_ms: row.finished_ms,
    })
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}
