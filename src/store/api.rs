//! Operations of clients: submit, read, cancel, delete. Every query takes a tenant, and a row that is being deleted
//! counts as absent.

use std::time::Duration;

use serde_json::Value;

use super::db::{Arg, Row, Tx, args, locking};
use super::error::Result;
use super::handle::Store;
use super::in_doubt::write_resolving;
use super::jobs::{Filter, Gauge, Gauges, Idempotency, NewJob, Submitted};
use super::json::{json, parse};
use crate::job::{Job, JobId, Kind, ModelPart, Spec, State, TenantId};

/// How long an idempotency key is kept.
const IDEMPOTENCY: Duration = Duration::from_hours(24);
/// By how much, in milliseconds, a job's id may be older than its row: the id has the HTTP server's clock, the row the
/// database's.
const ID_EARLIER_MS: i64 = 24 * 60 * 60 * 1000;

macro_rules! job_columns {
    () => {
        "id, tenant, parent, kind, spec, photos, state, run_lease, attempt, max_attempts, cancel_requested, \
         checkpoint, progress, result, error, version, created_ms, started_ms, finished_ms, retry_of, trace, \
         model"
    };
}
pub(super) use job_columns;

/// Cancels a waiting job, requests the cancel of a running one, leaves an ended one.
macro_rules! cancel_columns {
    () => {
        "cancel_requested = case when finished_ms is null then 1 else cancel_requested end, \
         finished_ms = case when state = 'queued' then (select ms from clock) else finished_ms end, \
         state = case when state = 'queued' then 'canceled' else state end, version = version + 1"
    };
}
pub(super) use cancel_columns;

/// The job of the idempotency key `$2`, if the key is younger than `$3`.
const FIND_BY_KEY: &str = concat!(
    "select request_hash, ",
    job_columns!(),
    " from (select job as accepted, request_hash from idempotency
        where tenant = $1 and key = $2 and created_ms > (select ms from clock) - $3) request
    join job on id = accepted where deleting = 0"
);

impl Store {
    /// Accepts a job, or returns why not, in one transaction. Once this returns [`Submitted::New`], a power failure
    /// does not undo it. A key whose job was deleted, or that is older than a day, is free again.
    ///
    /// After [`Error::Unknown`](super::Error::Unknown), and no other error, the job may exist: the objects that it
    /// names must stay.
    pub async fn submit(&self, new: NewJob) -> Result<Submitted> {
        write_resolving(|| self.submit_once(&new), || self.find_submitted(&new)).await
    }

    async fn submit_once(&self, new: &NewJob) -> Result<Submitted> {
        let mut tx = self.db.begin().await?;
        // Serializes a tenant's submissions, so that neither its quota nor its keys can be raced.
        let tenant = locking!(
            "select id from tenant where id = $1 and state = 'active' and created_ms = coalesce($2, created_ms)";
            "for no key update"
        );
        if tx.row(tenant, args![new.tenant, new.origin.tenant_created_ms]).await?.is_none() {
            return Ok(Submitted::Disabled);
        }
        if let Some(idempotency) = &new.idempotency {
            remove_old_keys(&mut tx, new.tenant, &idempotency.key).await?;
            if let Some(row) = tx.row(FIND_BY_KEY, &key_args(new.tenant, idempotency)).await? {
                return by_key(&row, idempotency);
            }
        }
        let mut model = new.spec.needed_model().map(ToOwned::to_owned);
        if let Some(parent) = new.parent {
            // The lock prevents a deletion between this read and the insert of the new row. A training that has not
            // succeeded is not locked: a worker that claims meanwhile would pass it over.
            let succeeded = locking!(
                "select result from job where tenant = $1 and id = $2 and kind = 'train' and state = 'succeeded' \
                 and deleting = 0";
                "for share"
            );
            let any =
                "select state from job where tenant = $1 and id = $2 and kind = 'train' and deleting = 0";
            model = loop {
                if let Some(row) = tx.row(succeeded, args![new.tenant, parent]).await? {
                    break trained_model(&row)?;
                }
                let other = tx.row(any, args![new.tenant, parent]).await?;
                let state = other.map(|row| row.parsed("state")).transpose()?;
                if state != Some(State::Succeeded) {
                    return Ok(Submitted::NoParent(state));
                } // it has succeeded between the two
            };
        }
        let kind = new.spec.kind();
        let count = "select count(*) as jobs from job where tenant = $1 and kind = $2 and state = 'queued'";
        let waiting = tx.row(count, args![new.tenant, kind.as_str()]).await?;
        if waiting.map_or(Ok(0), |row| row.int("jobs"))? as u64 >= new.queue_max {
            return Ok(Submitted::QueueFull);
        }
        let job = insert(&mut tx, new, model).await?;
        if let Some(Idempotency { key, request_hash }) = &new.idempotency {
            let insert = "insert into idempotency (tenant, key, request_hash, job, created_ms) \
                          select $1, $2, $3, $4, ms from clock";
            tx.run(insert, args![new.tenant, key.as_str(), request_hash.as_str(), new.id]).await?;
        }
        tx.notify().await?;
        tx.commit().await?;
        self.notifier.notify();
        Ok(Submitted::New(job))
    }

    /// Looks up a submission whose commit was not answered, which holds its tenant's row until it is resolved. It is
    /// not repeated instead: the job may have existed, been seen, and been deleted with its objects.
    async fn find_submitted(&self, new: &NewJob) -> Result<Option<Submitted>> {
        let tenant = locking!("select id from tenant where id = $1"; "for no key update");
        let select = concat!("select ", job_columns!(), " from job where id = $1");
        let mut tx = self.db.begin().await?;
        tx.row(tenant, args![new.tenant]).await?;
        let row = tx.row(select, args![new.id]).await?;
        tx.end_locking_read().await?;
        if row.is_some() {
            self.notifier.notify();
        }
        row.map(|row| job(&row).map(Submitted::New)).transpose()
    }

    /// The outcome of a request that was sent before: [`Submitted::Replayed`], [`Submitted::OtherRequest`], or none if
    /// the key is free. A cheap check before objects are written; [`Store::submit`] checks again.
    pub async fn replay(&self, tenant: TenantId, idempotency: &Idempotency) -> Result<Option<Submitted>> {
        let row = self.db.row(FIND_BY_KEY, &key_args(tenant, idempotency)).await?;
        row.map(|row| by_key(&row, idempotency)).transpose()
    }

    /// One job of that kind.
    pub async fn find(&self, tenant: TenantId, id: JobId, kind: Kind) -> Result<Option<Job>> {
        let sql = concat!(
            "select ",
            job_columns!(),
            " from job where tenant = $1 and id = $2 and kind = $3 and deleting = 0"
        );
        self.db.row(sql, args![tenant, id, kind.as_str()]).await?.as_ref().map(job).transpose()
    }

    /// Jobs, the newest first, at most `limit`, those before `before` if it is given.
    pub async fn list(
        &self,
        tenant: TenantId,
        filter: &Filter,
        before: Option<JobId>,
        limit: u32,
    ) -> Result<Vec<Job>> {
        // Only the conditions that are given, so that each query uses the right index.
        let mut conditions = vec!["tenant = $1 and deleting = 0".to_owned()];
        let mut values = vec![Arg::from(tenant)];
        let mut and = |condition: &str, value: Option<Arg>| {
            if let Some(value) = value {
                values.push(value);
                conditions.push(format!("{condition} ${}", values.len()));
            }
        };
        // Only samples have a parent, and few share one: with their kind as well, a less selective index might be used.
        let kind = filter.kind.filter(|kind| filter.parent.is_none() || *kind != Kind::Sample);
        and("kind =", kind.map(|kind| kind.as_str().into()));
        and("state =", filter.state.map(|state| state.as_str().into()));
        and("class_name =", filter.class_name.as_deref().map(Into::into));
        and("created_ms >", filter.created_after_ms.map(Into::into));
        and("id >", filter.created_after_ms.map(|ms| first_id_after(ms - ID_EARLIER_MS).into()));
        and("parent =", filter.parent.map(Into::into));
        and("id <", before.map(Into::into));
        values.push(i64::from(limit).into());
        let sql = format!(
            "select {} from job where {} order by id desc limit ${}",
            job_columns!(),
            conditions.join(" and "),
            values.len()
        );
        let rows = self.db.read(sql, &values).await?;
        rows.iter().map(job).collect()
    }

    /// A job's version, which changes with every visible change.
    pub async fn version(&self, tenant: TenantId, id: JobId) -> Result<Option<i64>> {
        let sql = "select version from job where tenant = $1 and id = $2 and deleting = 0";
        self.db.row(sql, args![tenant, id]).await?.map(|row| row.int("version")).transpose()
    }

    /// Cancels a waiting job at once, and requests the cancel of a running one, which cannot succeed any more. An ended
    /// job stays as it is. The job after that.
    pub async fn cancel(&self, tenant: TenantId, id: JobId) -> Result<Option<Job>> {
        write_resolving(
            || self.cancel_once(tenant, id),
            async || self.cancel_once(tenant, id).await.map(Some),
        )
        .await
    }

    async fn cancel_once(&self, tenant: TenantId, id: JobId) -> Result<Option<Job>> {
        let update = concat!(
            "update job set ",
            cancel_columns!(),
            " where tenant = $1 and id = $2 and deleting = 0 and cancel_requested = 0 and finished_ms is null"
        );
        let select = locking!(
            "select ", job_columns!(), " from job where tenant = $1 and id = $2 and deleting = 0"; "for no key update"
        );
        let mut tx = self.db.begin().await?;
        if tx.run(update, args![tenant, id]).await? > 0 {
            tx.notify().await?;
        }
        let row = tx.row(select, args![tenant, id]).await?;
        tx.commit().await?;
        self.notifier.notify();
        row.as_ref().map(job).transpose()
    }

    /// Deletes a job, and with a training its samples: from now on no reader sees them, and a running one is canceled.
    /// Their objects are removed later, see [`Store::erasable`]. Whether the job existed.
    pub async fn delete(&self, tenant: TenantId, id: JobId) -> Result<bool> {
        // The job existed, or there had been no commit. When repeated it is gone, whoever deleted it.
        write_resolving(
            || self.delete_once(tenant, id),
            async || self.delete_once(tenant, id).await.map(|_| Some(true)),
        )
        .await
    }

    async fn delete_once(&self, tenant: TenantId, id: JobId) -> Result<bool> {
        let mut tx = self.db.begin().await?;
        // The training first: a submission of one of its samples holds its row or waits for it.
        let update = concat!(
            "update job set deleting = 1, ",
            cancel_columns!(),
            " where tenant = $1 and id = $2 and deleting = 0"
        );
        if tx.run(update, args![tenant, id]).await? == 0 {
            return Ok(false);
        }
        let update = concat!(
            "update job set deleting = 1, ",
            cancel_columns!(),
            " where tenant = $1 and parent = $2 and deleting = 0"
        );
        tx.run(update, args![tenant, id]).await?;
        tx.notify().await?;
        tx.commit().await?;
        self.notifier.notify();
        self.notifier.notify_deletion();
        Ok(true)
    }

    /// The lengths of the queue.
    pub async fn gauges(&self) -> Result<Gauges> {
        let queued = "select kind, count(*) as jobs, max(ms - created_ms) as oldest_ms from job cross join clock \
                      where state = 'queued' group by kind";
        let running = "select kind, count(*) as jobs from job where state = 'running' group by kind";
        let (queued, running) = (self.db.read(queued, &[]).await?, self.db.read(running, &[]).await?);
        let number = |rows: &[Row], kind: Kind, column: &str| {
            let row = rows.iter().find(|row| row.text("kind").is_ok_and(|word| word == kind.as_str()));
            row.map_or(Ok(0), |row| row.int(column)).map(|number| number.max(0) as u64)
        };
        let gauge = |&kind: &Kind| {
            Ok(Gauge {
                kind,
                queued: number(&queued, kind, "jobs")?,
                running: number(&running, kind, "jobs")?,
                oldest_queued_ms: number(&queued, kind, "oldest_ms")?,
            })
        };
        Ok(Gauges { kinds: Kind::ALL.iter().map(gauge).collect::<Result<_>>()? })
    }
}

fn key_args(tenant: TenantId, idempotency: &Idempotency) -> [Arg; 3] {
    [tenant.into(), idempotency.key.as_str().into(), IDEMPOTENCY.into()]
}

fn by_key(row: &Row, idempotency: &Idempotency) -> Result<Submitted> {
    if row.text("request_hash")? == idempotency.request_hash {
        job(row).map(Submitted::Replayed)
    } else {
        Ok(Submitted::OtherRequest)
    }
}

/// Removes the tenant's keys that are older than a day, and this key if its job was deleted.
async fn remove_old_keys(tx: &mut Tx, tenant: TenantId, key: &str) -> Result<()> {
    let delete = "delete from idempotency where tenant = $1 and (created_ms <= (select ms from clock) - $3 \
                  or (key = $2 and exists (select 1 from job where id = idempotency.job and deleting = 1)))";
    tx.run(delete, args![tenant, key, IDEMPOTENCY]).await.map(drop)
}

/// An id that sorts before those made later than `ms`.
fn first_id_after(ms: i64) -> JobId {
    JobId(uuid::Builder::from_unix_timestamp_millis(ms.max(0) as u64, &[0; 10]).into_uuid())
}

async fn insert(tx: &mut Tx, new: &NewJob, model: Option<String>) -> Result<Job> {
    let insert = concat!(
        "insert into job (id, tenant, kind, parent, class_name, spec, photos, priority, max_attempts, retry_of, \
         trace, model, needs, not_before_ms, created_ms) \
         select $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, ms, ms from clock returning ",
        job_columns!()
    );
    let (class_name, needs) = match &new.spec {
        Spec::Train(spec) => (Some(spec.class_name.as_str()), ModelPart::mask(&spec.parts)),
        Spec::Sample(_) => (None, 0),
    };
    let values = args![
        new.id,
        new.tenant,
        new.spec.kind().as_str(),
        new.parent,
        class_name,
        json(&new.spec),
        json(&new.photos),
        i64::from(new.priority),
        new.max_attempts,
        new.origin.retry_of,
        new.origin.trace.as_deref(),
        model,
        needs,
    ];
    let row = tx.row(insert, values).await?;
    job(&row.expect("an insert of one row returns it"))
}

/// The hash of the model that a finished training's weights belong to.
fn trained_model(training: &Row) -> Result<Option<String>> {
    let result: Option<Value> =
        training.text_or_none("result")?.map(|text| parse("result", text)).transpose()?;
    Ok(result.and_then(|result| result["bundle_sha256"].as_str().map(ToOwned::to_owned)))
}

/// Reads a row of the queue.
pub(super) fn job(row: &Row) -> Result<Job> {
    let document = |column: &str| row.text_or_none(column);
    Ok(Job {
        id: row.parsed("id")?,
        tenant: row.parsed("tenant")?,
        parent: row.parsed_or_none("parent")?,
        kind: row.parsed("kind")?,
        spec_json: row.text("spec")?.to_owned(),
        photos: parse("photos", row.text("photos")?)?,
        state: row.parsed("state")?,
        run_lease: row.int("run_lease")?,
        attempt: row.int("attempt")?,
        max_attempts: row.int("max_attempts")?,
        cancel_requested: row.flag("cancel_requested")?,
        checkpoint: document("checkpoint")?.map(|text| parse("checkpoint", text)).transpose()?,
        progress: document("progress")?.map(|text| parse("progress", text)).transpose()?,
        result: document("result")?.map(|text| parse("result", text)).transpose()?,
        error: document("error")?.map(|text| parse("error", text)).transpose()?,
        version: row.int("version")?,
        created_ms: row.int("created_ms")?,
        started_ms: row.int_or_none("started_ms")?,
        finished_ms: row.int_or_none("finished_ms")?,
        retry_of: row.parsed_or_none("retry_of")?,
        trace: document("trace")?.map(ToOwned::to_owned),
        model: document("model")?.map(ToOwned::to_owned),
    })
}
