//! The real databases of the walks: one of each kind, emptied for each walk, with the walk's clock.

use std::sync::atomic::{AtomicI64, Ordering};

use hypnos::store::Store;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use sqlx::{AssertSqlSafe, ConnectOptions, PgConnection, Row, SqliteConnection};

use super::super::postgres::Postgres;

/// Stores that a walk hands out, one to each process that is up at a time.
const N_STORES: usize = 6;

/// Which database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Sqlite,
    Postgres,
}

pub(super) struct Database {
    pub(super) kind: Kind,
    /// Each with connections of its own, as processes have them.
    pub(super) stores: Vec<Store>,
    control: Control,
    empty: String,
    _dir: Option<tempfile::TempDir>,
}

enum Control {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

/// A row of the queue, as far as a walk looks at it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct JobRow {
    pub(super) id: String,
    pub(super) kind: String,
    pub(super) parent: Option<String>,
    pub(super) spec: String,
    pub(super) photos: String,
    pub(super) state: String,
    pub(super) is_deleting: bool,
    pub(super) run_lease: i64,
    pub(super) cancel_requested: bool,
    pub(super) checkpoint: Option<String>,
    pub(super) result: Option<String>,
    pub(super) error: Option<String>,
    pub(super) finished_ms: Option<i64>,
}

/// An object that a row names beside its job's own columns.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Named {
    /// The job whose artifact it is; none for a class image.
    pub(super) job: Option<String>,
    pub(super) name: String,
    pub(super) key: String,
    pub(super) sha256: String,
}

/// All that is committed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Rows {
    pub(super) jobs: Vec<JobRow>,
    pub(super) named: Vec<Named>,
}

const JOBS: &str = "select id, kind, parent, spec, photos, state, deleting, run_lease, cancel_requested, checkpoint, \
    result, error, finished_ms from job order by id";
const NAMED: &str = "select job, name, key, sha256 from artifact union all \
    select null, name, key, sha256 from class_image order by key";

macro_rules! job_row {
    ($row:ty, $name:ident) => {
        fn $name(row: &$row) -> JobRow {
            JobRow {
                id: row.get("id"),
                kind: row.get("kind"),
                parent: row.get("parent"),
                spec: row.get("spec"),
                photos: row.get("photos"),
                state: row.get("state"),
                is_deleting: row.get::<i64, _>("deleting") != 0,
                run_lease: row.get("run_lease"),
                cancel_requested: row.get::<i64, _>("cancel_requested") != 0,
                checkpoint: row.get("checkpoint"),
                result: row.get("result"),
                error: row.get("error"),
                finished_ms: row.get("finished_ms"),
            }
        }
    };
}
job_row!(SqliteRow, sqlite_job);
job_row!(PgRow, postgres_job);

macro_rules! named {
    ($row:ty, $name:ident) => {
        fn $name(row: &$row) -> Named {
            Named {
                job: row.get("job"),
                name: row.get("name"),
                key: row.get("key"),
                sha256: row.get("sha256"),
            }
        }
    };
}
named!(SqliteRow, sqlite_named);
named!(PgRow, postgres_named);

impl Database {
    pub(super) async fn open(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => Self::sqlite().await,
            Kind::Postgres => Self::postgres().await,
        }
    }

    async fn sqlite() -> Self {
        sqlite_time::install();
        let dir = in_memory();
        let path = dir.path().join("hypnos.db");
        let stores = stores(&format!("sqlite:{}", path.display())).await;
        let options = SqliteConnectOptions::new().filename(&path).foreign_keys(true);
        let mut control = options.disable_statement_logging().connect().await.unwrap();
        let tables =
            "select name from sqlite_master where type = 'table' and name not like 'sqlite_%' order by name";
        let mut empty = String::new();
        for table in sqlx::query_scalar::<_, String>(tables).fetch_all(&mut control).await.unwrap() {
            let count = format!("select count(*) from {table}");
            let n: i64 = sqlx::query_scalar(AssertSqlSafe(count)).fetch_one(&mut control).await.unwrap();
            match (n, table.as_str()) {
                (0, "job") => empty += "delete from job where parent is not null; delete from job;", // samples first
                (0, _) => empty.extend(["delete from ", &table, ";"]),
                _ => {} // what the schema comes with
            }
        }
        Self { kind: Kind::Sqlite, stores, control: Control::Sqlite(control), empty, _dir: Some(dir) }
    }

    async fn postgres() -> Self {
        let url = Postgres::database().await;
        let stores = stores(&url).await;
        let options: PgConnectOptions = url.parse().unwrap();
        let mut control = options.disable_statement_logging().connect().await.unwrap();
        let all = "select tablename::text from pg_tables where schemaname = 'public' order by 1";
        let mut tables = Vec::new();
        for table in sqlx::query_scalar::<_, String>(all).fetch_all(&mut control).await.unwrap() {
            let count = format!("select count(*) from {table}");
            let n: i64 = sqlx::query_scalar(AssertSqlSafe(count)).fetch_one(&mut control).await.unwrap();
            if n == 0 {
                tables.push(table); // the others are what the schema comes with
            }
        }
        // The walk's own time; no process beside it that moves rows about.
        let prepare = "create sequence walk_clock minvalue 0; \
            create function walk_ms() returns bigint language sql as 'select last_value from walk_clock'; \
            create or replace view clock (ms) as select walk_ms();";
        let still = tables.iter().map(|table| format!("alter table {table} set (autovacuum_enabled = off);"));
        let prepare: String = std::iter::once(prepare.to_owned()).chain(still).collect();
        sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut control).await.unwrap();
        let empty = format!("truncate {}", tables.join(", "));
        Self { kind: Kind::Postgres, stores, control: Control::Postgres(control), empty, _dir: None }
    }

    /// Sets the clock that all statements read.
    pub(super) async fn set_time(&mut self, ms: i64) {
        match &mut self.control {
            Control::Sqlite(_) => sqlite_time::NOW_MS.store(ms, Ordering::Release),
            Control::Postgres(control) => {
                let set = sqlx::query("select setval('walk_clock', $1)").bind(ms);
                set.execute(control).await.unwrap();
            }
        }
    }

    /// Removes all rows but the tenant's.
    pub(super) async fn empty(&mut self) {
        let empty = sqlx::raw_sql(AssertSqlSafe(self.empty.clone()));
        match &mut self.control {
            Control::Sqlite(control) => empty.execute(control).await.map(drop),
            Control::Postgres(control) => empty.execute(control).await.map(drop),
        }
        .unwrap();
    }

    pub(super) async fn rows(&mut self) -> Rows {
        match &mut self.control {
            Control::Sqlite(control) => {
                let jobs = sqlx::query(JOBS).fetch_all(&mut *control).await.unwrap();
                let named = sqlx::query(NAMED).fetch_all(&mut *control).await.unwrap();
                Rows {
                    jobs: jobs.iter().map(sqlite_job).collect(),
                    named: named.iter().map(sqlite_named).collect(),
                }
            }
            Control::Postgres(control) => {
                let jobs = sqlx::query(JOBS).fetch_all(&mut *control).await.unwrap();
                let named = sqlx::query(NAMED).fetch_all(&mut *control).await.unwrap();
                Rows {
                    jobs: jobs.iter().map(postgres_job).collect(),
                    named: named.iter().map(postgres_named).collect(),
                }
            }
        }
    }

    /// How many statements wait for a lock that another holds.
    pub(super) async fn n_waiting(&mut self) -> usize {
        let Control::Postgres(control) = &mut self.control else { return 0 };
        let waiting = "select count(distinct pid) from pg_locks join pg_stat_activity using (pid) \
                       where not granted and datname = current_database()";
        let n: i64 = sqlx::query_scalar(waiting).fetch_one(control).await.unwrap();
        n as usize
    }

    /// Ends them as the server does with those that have waited long enough.
    pub(super) async fn cancel_waiting(&mut self) {
        let Control::Postgres(control) = &mut self.control else { return };
        let cancel = "select pg_cancel_backend(pid) from pg_locks join pg_stat_activity using (pid) \
                      where not granted and datname = current_database()";
        sqlx::query(cancel).execute(control).await.unwrap();
    }

    /// Connections of the stores that are neither idle nor gone.
    pub(super) fn in_use(stores: &[Store]) -> usize {
        stores.iter().map(Store::connections_in_use).sum()
    }
}

/// A directory in memory, where there is one.
pub(super) fn in_memory() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

async fn stores(url: &str) -> Vec<Store> {
    let first = Store::connect(url, 8).await.unwrap();
    first.migrate().await.unwrap();
    let mut stores = vec![first];
    while stores.len() < N_STORES {
        stores.push(Store::connect(url, 8).await.unwrap());
    }
    stores
}

/// What SQLite takes for the time: its own function, replaced in every connection of this process.
mod sqlite_time {
    #![allow(unsafe_code)] // SQLite's C interface: there is no other way to replace a function

    use std::ffi::{c_char, c_int};
    use std::ptr;

    use libsqlite3_sys::{
        SQLITE_INNOCUOUS, SQLITE_OK, SQLITE_UTF8, sqlite3, sqlite3_api_routines, sqlite3_auto_extension,
        sqlite3_context, sqlite3_create_function_v2, sqlite3_result_double, sqlite3_value,
    };

    use super::{AtomicI64, Ordering};

    pub(super) static NOW_MS: AtomicI64 = AtomicI64::new(0);

    pub(super) fn install() {
        // SAFETY: `replace` has the signature that SQLite documents for entry points, and lives as long as the process.
        let installed = unsafe { sqlite3_auto_extension(Some(replace)) };
        assert_eq!(installed, SQLITE_OK);
    }

    unsafe extern "C" fn replace(
        db: *mut sqlite3,
        _error: *mut *mut c_char,
        _api: *const sqlite3_api_routines,
    ) -> c_int {
        let flags = SQLITE_UTF8 | SQLITE_INNOCUOUS;
        // SAFETY: `db` is the connection that SQLite is opening; the name is a C string; there is no data to free.
        unsafe {
            sqlite3_create_function_v2(
                db,
                c"unixepoch".as_ptr(),
                1,
                flags,
                ptr::null_mut(),
                Some(unixepoch),
                None,
                None,
                None,
            )
        }
    }

    /// `unixepoch('subsec')`, the only call of it that there is.
    unsafe extern "C" fn unixepoch(
        context: *mut sqlite3_context,
        _n: c_int,
        _arguments: *mut *mut sqlite3_value,
    ) {
        let seconds = NOW_MS.load(Ordering::Acquire) as f64 / 1000.0;
        // SAFETY: `context` is the call that SQLite is making.
        unsafe { sqlite3_result_double(context, seconds) }
    }
}
