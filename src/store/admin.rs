//! Operations of operators: list the jobs of every tenant, requeue a running one, pause claims.

use std::time::Duration;

use super::api::{job, job_columns};
use super::db::{Arg, Row, args, locking};
use super::error::Result;
use super::fair_queue::charge;
use super::handle::Store;
use super::json::parse;
use super::worker::released_columns;
use crate::job::{Job, JobId, Kind, State, TenantId};

/// A job as operators see it, with details that clients do not see.
#[derive(Clone, Debug, PartialEq)]
pub struct AdminJob {
    /// The job.
    pub job: Job,
    /// Name of its tenant.
    pub tenant_name: String,
    /// A training's class.
    pub class_name: Option<String>,
    /// Order among the tenant's own waiting jobs: larger first.
    pub priority: i64,
    /// The worker that holds it: a UUID, new at every start of the worker.
    pub worker: Option<String>,
    /// How often it was taken from a worker whose lease had expired.
    pub rescues: i64,
    /// Machines that failed under it.
    pub fault_hosts: Vec<String>,
    /// Device time of its last attempt, in milliseconds.
    pub used_ms: i64,
    /// No worker claims it earlier.
    pub not_before_ms: i64,
    /// When it was last claimed.
    pub claimed_ms: Option<i64>,
    /// Whether it was deleted and is being erased: no client sees it any more.
    pub deleting: bool,
    /// The newest job that retries it.
    pub retried_as: Option<JobId>,
    /// Whether claims of its tenant and kind are paused.
    pub held_back: bool,
}

/// Conditions on jobs of all tenants; `None` means any.
#[derive(Clone, Debug, Default)]
pub struct AdminFilter {
    /// Of this tenant.
    pub tenant: Option<TenantId>,
    /// Of this kind.
    pub kind: Option<Kind>,
    /// In one of these states; in any if there are none.
    pub states: Vec<State>,
    /// Trainings of this class.
    pub class_name: Option<String>,
    /// Accepted longer ago than this.
    pub older_than: Option<Duration>,
    /// Only those that no other job retries.
    pub not_retried: bool,
}

/// The outcome of a requeue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requeued {
    /// Released from its worker. Its new state: queued, or canceled if its owner had requested that.
    Released(State),
    /// Not running; its state.
    NotRunning(State),
}

/// A pause of claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Name of the tenant; none for every tenant.
    pub tenant_name: Option<String>,
    /// The kind; none for both.
    pub kind: Option<Kind>,
    /// The operator's reason.
    pub reason: String,
    /// Since when.
    pub created_ms: i64,
}

macro_rules! admin_select {
    () => {
        concat!(
            "select ",
            job_columns!(),
            ", class_name, priority, worker, rescues, fault_hosts, used_ms, not_before_ms, claimed_ms, deleting, \
             (select name from tenant where tenant.id = job.tenant) as tenant_name, \
             (select max(again.id) from job again where again.retry_of = job.id) as retried_as, \
             (select count(*) from held_back where held_back.tenant = job.tenant and held_back.kind = job.kind) as held_back \
             from job"
        )
    };
}

impl Store {
    /// Jobs of every tenant, newest first, at most `limit`, those before `before` if given.
    pub async fn all_jobs(
        &self,
        filter: &AdminFilter,
        before: Option<JobId>,
        limit: u32,
    ) -> Result<Vec<AdminJob>> {
        let mut conditions = Vec::new();
        let mut values: Vec<Arg> = Vec::new();
        let mut and = |condition: &str, value: Option<Arg>| {
            if let Some(value) = value {
                values.push(value);
                conditions.push(format!("{condition} ${}", values.len()));
            }
        };
        and("tenant =", filter.tenant.map(Into::into));
        and("kind =", filter.kind.map(|kind| kind.as_str().into()));
        and("class_name =", filter.class_name.as_deref().map(Into::into));
        and("created_ms < (select ms from clock) -", filter.older_than.map(Into::into));
        and("id <", before.map(Into::into));
        if !filter.states.is_empty() {
            let states: Vec<String> = filter.states.iter().map(|state| format!("'{state}'")).collect();
            conditions.push(format!("state in ({})", states.join(", ")));
        }
        if filter.not_retried {
            conditions.push("not exists (select 1 from job again where again.retry_of = job.id)".into());
        }
        values.push(i64::from(limit).into());
        let all = if conditions.is_empty() {
            String::new()
        } else {
            format!(" where {}", conditions.join(" and "))
        };
        let sql = format!("{}{all} order by id desc limit ${}", admin_select!(), values.len());
        self.db.read(sql, &values).await?.iter().map(admin_job).collect()
    }

    /// One job of any tenant.
    pub async fn any_job(&self, id: JobId) -> Result<Option<AdminJob>> {
        let row = self.db.row(concat!(admin_select!(), " where id = $1"), args![id]).await?;
        row.as_ref().map(admin_job).transpose()
    }

    /// Takes a running job from its worker, without counting an attempt: whatever that worker still writes is rejected.
    /// The job waits again, to resume from its checkpoint. None if the job does not exist.
    pub async fn requeue(&self, id: JobId) -> Result<Option<Requeued>> {
        let select = locking!("select state, cancel_requested from job where id = $1"; "for update");
        let update = concat!(
            "update job set state = $2, run_lease = run_lease + 1, attempt = attempt - $3, not_before_ms = ms, \
             used_ms = ms - claimed_ms, finished_ms = case when $2 = 'canceled' then ms end, ",
            released_columns!(),
            " from clock where id = $1 and state = 'running'"
        );
        let mut tx = self.db.begin().await?;
        let Some(row) = tx.row(select, args![id]).await? else { return Ok(None) };
        let state: State = row.parsed("state")?;
        if state != State::Running {
            return Ok(Some(Requeued::NotRunning(state)));
        }
        let new_state = if row.flag("cancel_requested")? { State::Canceled } else { State::Queued };
        tx.run(update, args![id, new_state.as_str(), new_state == State::Queued]).await?;
        charge(&mut tx, id, false).await?; // its tenant has used the device all the same
        tx.notify().await?;
        tx.commit().await?;
        self.notifier.notify();
        Ok(Some(Requeued::Released(new_state)))
    }

    /// Pauses claims: of a tenant or of all, of a kind or of both. Running jobs continue. A repeated pause replaces the
    /// reason.
    pub async fn pause(&self, tenant: Option<TenantId>, kind: Option<Kind>, reason: &str) -> Result<()> {
        let insert = "insert into pause (tenant, kind, reason, created_ms) select $1, $2, $3, ms from clock where true \
                      on conflict (coalesce(tenant, ''), coalesce(kind, '')) do update set reason = excluded.reason";
        self.db.write(insert, args![tenant, kind.map(Kind::as_str), reason]).await.map(drop)
    }

    /// Ends one pause, given by the same tenant and kind. Whether there was one.
    pub async fn resume(&self, tenant: Option<TenantId>, kind: Option<Kind>) -> Result<bool> {
        let delete =
            "delete from pause where tenant is not distinct from $1 and kind is not distinct from $2";
        let mut tx = self.db.begin().await?;
        let resumed = tx.run(delete, args![tenant, kind.map(Kind::as_str)]).await? > 0;
        tx.notify().await?;
        tx.commit().await?;
        self.notifier.notify();
        Ok(resumed)
    }

    /// All pauses, oldest first.
    pub async fn pauses(&self) -> Result<Vec<Pause>> {
        let select = "select (select name from tenant where tenant.id = pause.tenant) as tenant_name, kind, reason, \
                      created_ms from pause order by created_ms, tenant_name, kind";
        let rows = self.db.read(select, &[]).await?;
        let pause = |row: &Row| {
            Ok(Pause {
                tenant_name: row.text_or_none("tenant_name")?.map(ToOwned::to_owned),
                kind: row.parsed_or_none("kind")?,
                reason: row.text("reason")?.to_owned(),
                created_ms: row.int("created_ms")?,
            })
        };
        rows.iter().map(pause).collect()
    }
}

fn admin_job(row: &Row) -> Result<AdminJob> {
    Ok(AdminJob {
        job: job(row)?,
        tenant_name: row.text("tenant_name")?.to_owned(),
        class_name: row.text_or_none("class_name")?.map(ToOwned::to_owned),
        priority: row.int("priority")?,
        worker: row.text_or_none("worker")?.map(ToOwned::to_owned),
        rescues: row.int("rescues")?,
        fault_hosts: parse("fault_hosts", row.text("fault_hosts")?)?,
        used_ms: row.int("used_ms")?,
        not_before_ms: row.int("not_before_ms")?,
        claimed_ms: row.int_or_none("claimed_ms")?,
        deleting: row.flag("deleting")?,
        retried_as: row.parsed_or_none("retried_as")?,
        held_back: row.flag("held_back")?,
    })
}
