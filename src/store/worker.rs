//! Operations of workers: claim, renew, report progress, end an attempt; and of maintenance: rescue and erase.
//!
//! Every write names the lease, and locks the job's row before it writes. [`Error::LeaseLost`] means that nothing was
//! written and that the claim is over. A write whose outcome is unknown is sent again: the row shows whether it was
//! done.

use std::ops::Deref;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::api::{job, job_columns};
use super::db::{Arg, Tx, args, locking};
use super::error::{Error, Result};
use super::fair_queue::{Turn, charge, model_args, runnable, turns};
use super::handle::Store;
use super::json::{json, parse};
use crate::job::{
    Checkpoint, Fault, FaultCode, Job, JobId, Kind, Lease, ModelCard, ModelPart, Object, Progress, Spec,
    State, TenantId, TrainSpec,
};

/// Number of failed machines at which the fault counts as the job's own.
pub const HOSTS_MAX: usize = 3;

/// Which jobs a worker can begin now.
#[derive(Clone, Copy, Debug)]
pub struct ClaimFilter<'a> {
    /// Jobs of these kinds.
    pub kinds: &'a [Kind],
    /// But no samples of these tenants, of which it holds some already.
    pub no_samples_of: &'a [TenantId],
    /// The model that it holds; none if it can run a job of any.
    pub model: Option<&'a ModelCard>,
}

impl<'a> From<&'a [Kind]> for ClaimFilter<'a> {
    fn from(kinds: &'a [Kind]) -> Self {
        Self { kinds, no_samples_of: &[], model: None }
    }
}

impl<'a, const N: usize> From<&'a [Kind; N]> for ClaimFilter<'a> {
    fn from(kinds: &'a [Kind; N]) -> Self {
        Self::from(&kinds[..])
    }
}

/// A claimed job.
#[derive(Clone, Debug, PartialEq)]
pub struct Claim {
    /// The running job.
    pub job: Job,
    /// The tenant's turn, in microseconds of device time divided by the weight: of two jobs that a device holds, the
    /// one with the earlier turn goes on.
    pub turn: i64,
    /// The tenant's weight.
    pub weight: i64,
}

impl Deref for Claim {
    type Target = Job;

    fn deref(&self) -> &Job {
        &self.job
    }
}

/// The outcome of a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The lease is held.
    Held {
        /// Whether the job's owner has requested its cancellation.
        cancel_requested: bool,
    },
    /// The lease is lost: stop and write nothing.
    Lost,
}

/// Numbers of jobs taken back from lost workers, by what happened to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rescued {
    /// Waiting again.
    pub requeued: u64,
    /// Failed: no attempt was left.
    pub failed: u64,
    /// Canceled, as requested before.
    pub canceled: u64,
}

/// Condition: the row of a held lease.
macro_rules! lease_held {
    () => {
        "id = $1 and state = 'running' and run_lease = $2"
    };
}

/// Condition: a time is over, by the wall clock, or, if the row names a boot of the machine, by the time since that
/// boot, which is over after the next boot. Needs `clock`, and the arguments of
/// [`Db::lease_clock`](super::db::Db::lease_clock) as `$3` and `$4`.
macro_rules! expired {
    ($wall:literal, $boot:literal) => {
        concat!(
            "case when boot is null then ",
            $wall,
            " <= ms when boot <> $3 then true else ",
            $boot,
            " <= $4 end"
        )
    };
}

/// Condition: a running row whose lease or deadline is over.
macro_rules! overdue {
    () => {
        concat!(
            "state = 'running' and (",
            expired!("lease_until_ms", "lease_until_boot_ms"),
            " or ",
            expired!("deadline_ms", "deadline_boot_ms"),
            ")"
        )
    };
}

/// Clears the columns of a running row.
macro_rules! released_columns {
    () => {
        "worker = null, lease_until_ms = null, deadline_ms = null, boot = null, lease_until_boot_ms = null, \
         deadline_boot_ms = null, version = version + 1"
    };
}
pub(super) use released_columns;

/// Condition: a deleted row, called `gone`, that no other row depends on.
macro_rules! erasable {
    () => {
        "deleting = 1 and state <> 'running' and not exists (select 1 from job where job.parent = gone.id)"
    };
}

/// How a worker ends an attempt. A job whose cancel was acknowledged to its owner ends canceled in any case.
#[derive(Clone, Copy, Debug)]
pub enum Completion<'a> {
    /// Succeeded, with its result and artifacts.
    Succeed {
        /// The result.
        result: &'a Value,
        /// The artifacts that the row names from now on.
        artifacts: &'a [Object],
    },
    /// Failed; or, if `retry` is given and an attempt is left, waiting again for that time.
    Fail {
        /// Why.
        fault: &'a Fault,
        /// Wait before the next attempt.
        retry: Option<Duration>,
    },
    /// Released because the machine `host` failed under it. The first failure on a machine does not count as an
    /// attempt; a further one does, and the job waits for `retry`. When [`HOSTS_MAX`] machines have failed under it,
    /// the fault counts as the job's own, and it fails.
    MachineFailed {
        /// How the machine failed.
        fault: &'a Fault,
        /// The machine's name.
        host: &'a str,
        /// Wait before the next attempt, if this one counts.
        retry: Duration,
    },
    /// Canceled by its owner.
    Cancel,
    /// Released unfinished, without counting an attempt. It resumes from its checkpoint.
    Release,
}

/// The transition of a row that stops running.
struct Transition {
    state: State,
    /// The fault of a failed job.
    error: Option<String>,
    /// Wait before the next claim.
    wait: Option<Duration>,
    /// Whether the attempt is not counted.
    is_free: bool,
}

impl Transition {
    fn to(state: State) -> Self {
        Self { state, error: None, wait: None, is_free: false }
    }

    fn failed(fault: &Fault) -> Self {
        Self { error: Some(json(fault)), ..Self::to(State::Failed) }
    }

    fn retry(fault: &Fault, wait: Duration, attempts_left: bool) -> Self {
        if attempts_left { Self { wait: Some(wait), ..Self::to(State::Queued) } } else { Self::failed(fault) }
    }

    fn release() -> Self {
        Self { is_free: true, ..Self::to(State::Queued) }
    }
}

impl Completion<'_> {
    /// The transition of the row. An acknowledged cancel comes before everything else. Adds the failed machine, if any,
    /// to `hosts`.
    fn transition(&self, cancel_requested: bool, attempts_left: bool, hosts: &mut Vec<String>) -> Transition {
        match self {
            _ if cancel_requested => Transition::to(State::Canceled),
            Self::Cancel => Transition::to(State::Canceled),
            Self::Succeed { .. } => Transition::to(State::Succeeded),
            Self::Fail { fault, retry: Some(wait) } => Transition::retry(fault, *wait, attempts_left),
            Self::Fail { fault, retry: None } => Transition::failed(fault),
            // The machine was probed successfully since it failed under this job: an attempt like any other.
            Self::MachineFailed { fault, host, retry } if hosts.iter().any(|known| known == host) => {
                Transition::retry(fault, *retry, attempts_left)
            }
            Self::MachineFailed { fault, host, .. } => {
                hosts.push((*host).to_owned());
                if hosts.len() < HOSTS_MAX {
                    Transition::release()
                } else {
                    Transition::failed(&own_fault(fault))
                }
            }
            Self::Release => Transition::release(),
        }
    }
}

/// The fault of a job under which [`HOSTS_MAX`] machines failed.
fn own_fault(last: &Fault) -> Fault {
    let message = format!("{HOSTS_MAX} machines failed under it, the last one with: {}", last.message);
    Fault { message, retryable: false, ..last.clone() }
}

impl Store {
    /// Claims the next job that `filter` allows: a training before a sample, since a device trains one at a time and
    /// draws beside it; then by the tenants' turns; then a tenant's own by priority and age. No other worker gets it
    /// until `lease` is over, or `deadline`, which no renewal postpones.
    pub async fn claim<'a>(
        &self,
        worker: Uuid,
        filter: impl Into<ClaimFilter<'a>>,
        lease: Duration,
        deadline: Duration,
    ) -> Result<Option<Claim>> {
        self.resolve_claims().await?;
        let filter = filter.into();
        let [Some(first), Some(last)] = [filter.kinds.first(), filter.kinds.last()] else { return Ok(None) };
        // Most polls find nothing, and need not wait for writers.
        let poll = concat!(
            "select id from job where state = 'queued' and kind in ($1, $2) \
             and not_before_ms <= (select ms from clock) and ",
            runnable!("$3", "$4", "$5"),
            " limit 1"
        );
        let kinds = [first, last].map(|kind| kind.as_str().into());
        if self.db.row(poll, &[&kinds[..], &model_args(filter.model)].concat()).await?.is_none() {
            return Ok(None);
        }
        let mut tx = self.db.begin().await?;
        for kind in [Kind::Train, Kind::Sample].into_iter().filter(|kind| filter.kinds.contains(kind)) {
            for turn in turns(&mut tx, kind, filter.model).await? {
                if kind == Kind::Sample && filter.no_samples_of.contains(&turn.tenant) {
                    continue;
                }
                let Some(id) = lock_next_job(&mut tx, kind, turn.tenant, filter.model).await? else {
                    continue;
                };
                let job = start_attempt(&mut tx, id, &turn, worker, [lease, deadline], self.db.lease_clock())
                    .await?;
                return match tx.commit().await {
                    Ok(()) => Ok(Some(Claim { job, turn: turn.at, weight: turn.weight })),
                    Err(error) => {
                        if let Error::Unknown(_) = error {
                            self.in_doubt().push(job.lease());
                        }
                        Err(error)
                    }
                };
            }
        }
        Ok(None)
    }

    /// Releases jobs that were claimed by in-doubt commits, if those were done: no worker runs them, and their leases
    /// would expire at the cost of an attempt. Until that is resolved nothing more is claimed.
    pub async fn resolve_claims(&self) -> Result<()> {
        let leases = self.in_doubt().clone();
        for lease in leases {
            match self.release(lease).await {
                Ok(_) | Err(Error::LeaseLost) => self.in_doubt().retain(|other| *other != lease),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn in_doubt(&self) -> MutexGuard<'_, Vec<Lease>> {
        self.in_doubt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Renews a lease for `time` from now on, and writes the job's progress if given.
    pub async fn renew(&self, lease: Lease, time: Duration, progress: Option<&Progress>) -> Result<Renewal> {
        let update = concat!(
            "update job set lease_until_ms = ms + $3, lease_until_boot_ms = $5 + $3, \
             progress = coalesce($4, progress), version = version + case when $4 is not null and progress is distinct from $4 then 1 else 0 end \
             from clock where ",
            lease_held!(),
            " returning cancel_requested"
        );
        let mut tx = self.db.begin().await?;
        let [_, now] = self.db.lease_clock();
        let values = [args![lease.job, lease.run_lease, time, progress.map(json)], &[now][..]].concat();
        let row = tx.row(update, &values).await?;
        tx.commit().await?;
        match row {
            Some(row) => Ok(Renewal::Held { cancel_requested: row.flag("cancel_requested")? }),
            None => Ok(Renewal::Lost),
        }
    }

    /// Replaces the specification of a running training whose options were open, and binds the job to the model that
    /// they were completed for. May be repeated.
    pub async fn bind_model(&self, lease: Lease, spec: &TrainSpec) -> Result<()> {
        let update = concat!(
            "update job set spec = $3, model = $4, needs = $5, version = version + 1 where ",
            lease_held!()
        );
        let document = json(&Spec::Train(Box::new(spec.clone())));
        let needs = ModelPart::mask(&spec.parts);
        let values = args![lease.job, lease.run_lease, document, spec.needed_model(), needs];
        ensure_held(self.db.write(update, values).await?)
    }

    /// Makes a stored checkpoint the one that the next attempt resumes from. May be repeated. Returns the previous
    /// checkpoint, whose object can be removed; none if `checkpoint` itself was there already.
    pub async fn commit_checkpoint(
        &self,
        lease: Lease,
        checkpoint: &Checkpoint,
    ) -> Result<Option<Checkpoint>> {
        let select = locking!("select checkpoint from job where ", lease_held!(); "for no key update");
        let update = concat!("update job set checkpoint = $3 where ", lease_held!());
        let mut tx = self.db.begin().await?;
        let row = tx.row(select, args![lease.job, lease.run_lease]).await?.ok_or(Error::LeaseLost)?;
        ensure_held(tx.run(update, args![lease.job, lease.run_lease, json(checkpoint)]).await?)?;
        tx.commit().await?;
        let before: Option<Checkpoint> =
            row.text_or_none("checkpoint")?.map(|text| parse("checkpoint", text)).transpose()?;
        // An object that was just written is never the previous one, whatever the row said.
        Ok(before.filter(|before| before.object.key != checkpoint.object.key))
    }

    /// Adds an artifact of a running job. One of the same name from an earlier attempt is replaced.
    pub async fn add_artifact(&self, lease: Lease, object: &Object) -> Result<()> {
        let update = concat!("update job set version = version + 1 where ", lease_held!());
        let mut tx = self.db.begin().await?;
        ensure_held(tx.run(update, args![lease.job, lease.run_lease]).await?)?;
        put_artifact(&mut tx, lease.job, object).await?;
        tx.commit().await
    }

    /// Ends a job with its result, like [`Store::end`], without device time.
    pub async fn finish(&self, lease: Lease, result: &Value, artifacts: &[Object]) -> Result<State> {
        self.end(lease, Completion::Succeed { result, artifacts }, Duration::ZERO).await
    }

    /// Ends a job with a fault, like [`Store::end`], without device time.
    pub async fn fail(&self, lease: Lease, fault: &Fault, retry: Option<Duration>) -> Result<State> {
        self.end(lease, Completion::Fail { fault, retry }, Duration::ZERO).await
    }

    /// Releases a job because its machine failed, like [`Store::end`], without device time.
    pub async fn machine_failed(
        &self,
        lease: Lease,
        fault: &Fault,
        host: &str,
        retry: Duration,
    ) -> Result<State> {
        self.end(lease, Completion::MachineFailed { fault, host, retry }, Duration::ZERO).await
    }

    /// Ends a canceled job, like [`Store::end`], without device time.
    pub async fn cancelled(&self, lease: Lease) -> Result<()> {
        self.end(lease, Completion::Cancel, Duration::ZERO).await.map(drop)
    }

    /// Releases a job unfinished, like [`Store::end`], without device time.
    pub async fn release(&self, lease: Lease) -> Result<State> {
        self.end(lease, Completion::Release, Duration::ZERO).await
    }

    /// Ends an attempt, in one transaction. `used` is its device time, which postpones its tenant's next turn. Returns
    /// the job's new state. When repeated it changes nothing, and returns the same state: the row keeps which claim was
    /// ended by its own worker.
    pub async fn end(&self, lease: Lease, completion: Completion<'_>, used: Duration) -> Result<State> {
        let select = locking!(
            "select state, run_lease, ended_lease, cancel_requested, attempt, max_attempts, fault_hosts from job \
             where id = $1";
            "for update"
        );
        let update = concat!(
            "update job set state = $3, cancel_requested = case when $3 = 'canceled' then 1 else 0 end, \
             result = $4, error = $5, not_before_ms = coalesce(ms + $6, not_before_ms), attempt = attempt - $7, \
             fault_hosts = $8, used_ms = $9, finished_ms = case when $3 = 'queued' then null else ms end, ended_lease = run_lease, ",
            released_columns!(),
            " from clock where ",
            lease_held!()
        );
        let mut tx = self.db.begin().await?;
        let row = tx.row(select, args![lease.job]).await?.ok_or(Error::LeaseLost)?;
        let (found, run_lease) = (row.parsed("state")?, row.int("run_lease")?);
        if row.int_or_none("ended_lease")? == Some(lease.run_lease) {
            // Ended by this very claim. If it was claimed again since, it had been requeued.
            return Ok(if run_lease == lease.run_lease { found } else { State::Queued });
        }
        if found != State::Running || run_lease != lease.run_lease {
            return Err(Error::LeaseLost);
        }
        let attempts_left = row.int("attempt")? < row.int("max_attempts")?;
        let mut hosts: Vec<String> = parse("fault_hosts", row.text("fault_hosts")?)?;
        let Transition { state, error, wait, is_free } =
            completion.transition(row.flag("cancel_requested")?, attempts_left, &mut hosts);
        let (result, artifacts) = match (state, &completion) {
            (State::Succeeded, Completion::Succeed { result, artifacts }) => (Some(json(result)), *artifacts),
            _ => (None, &[][..]),
        };
        let values = args![
            lease.job,
            lease.run_lease,
            state.as_str(),
            result,
            error,
            wait,
            is_free,
            json(&hosts),
            used
        ];
        ensure_held(tx.run(update, values).await?)?;
        for object in artifacts {
            put_artifact(&mut tx, lease.job, object).await?;
        }
        charge(&mut tx, lease.job, state == State::Succeeded).await?;
        tx.notify().await?;
        tx.commit().await?;
        self.notifier.notify();
        if state == State::Canceled {
            self.notifier.notify_deletion(); // it may have been canceled by being deleted
        }
        Ok(state)
    }

    /// Takes jobs from workers that did not renew their lease or exceeded their deadline: they wait again, or fail as
    /// `worker_lost` or `deadline` when no attempt is left. One statement, which checks every row that it changes
    /// again.
    pub async fn rescue(&self) -> Result<Rescued> {
        let lost = Fault::new(FaultCode::WorkerLost, "its worker was lost at every attempt");
        let late = Fault::new(FaultCode::Deadline, "it took longer than an attempt may");
        let mut tx = self.db.begin().await?;
        let faults = args![json(&lost), json(&late)];
        let rows = tx.rows(RESCUE, &[faults, &self.db.lease_clock()[..]].concat()).await?;
        let mut rescued = Rescued::default();
        let mut charged: Vec<(TenantId, JobId)> = Vec::new();
        for row in &rows {
            match row.parsed("state")? {
                State::Queued => rescued.requeued += 1,
                State::Canceled => rescued.canceled += 1,
                _ => rescued.failed += 1,
            }
            charged.push((row.parsed("tenant")?, row.parsed("id")?));
        }
        charged.sort_unstable(); // every transaction locks tenants' rows in this order
        for (_, id) in charged {
            charge(&mut tx, id, false).await?;
        }
        if !rows.is_empty() {
            tx.notify().await?;
        }
        tx.commit().await?;
        if !rows.is_empty() {
            self.notifier.notify();
        }
        Ok(rescued)
    }

    /// Ended jobs that still name a checkpoint, which nothing will read, in the order of their ids, those after `after`
    /// if given. The checkpoint's object can be removed, and then [`Store::forget_checkpoint`] called.
    pub async fn obsolete_checkpoints(
        &self,
        after: Option<JobId>,
        limit: u32,
    ) -> Result<Vec<(JobId, Checkpoint)>> {
        let select = "select id, checkpoint from job where checkpoint is not null and finished_ms is not null \
                      and id > $1 order by id limit $2";
        let after = after.map_or(String::new(), |after| after.to_string());
        let rows = self.db.read(select, args![after, i64::from(limit)]).await?;
        rows.iter()
            .map(|row| Ok((row.parsed("id")?, parse("checkpoint", row.text("checkpoint")?)?)))
            .collect()
    }

    /// Removes the mention of an ended job's checkpoint, whose object was removed.
    pub async fn forget_checkpoint(&self, id: JobId) -> Result<()> {
        let update = "update job set checkpoint = null where id = $1 and finished_ms is not null";
        self.db.write(update, args![id]).await.map(drop)
    }

    /// Deleted jobs whose objects can be removed, in the order of their ids, those after `after` if given: they do not
    /// run, and have no samples left.
    pub async fn erasable(&self, after: Option<JobId>, limit: u32) -> Result<Vec<(TenantId, JobId)>> {
        let select = concat!(
            "select tenant, id from job gone where ",
            erasable!(),
            " and id > $1 order by id limit $2"
        );
        let after = after.map_or(String::new(), |after| after.to_string());
        let rows = self.db.read(select, args![after, i64::from(limit)]).await?;
        rows.iter().map(|row| Ok((row.parsed("tenant")?, row.parsed("id")?))).collect()
    }

    /// Removes the rows of erasable jobs, whose objects were removed.
    pub async fn remove_erased(&self, ids: &[JobId]) -> Result<()> {
        let delete = concat!("delete from job as gone where id = $1 and ", erasable!());
        if ids.is_empty() {
            return Ok(());
        }
        let mut tx = self.db.begin().await?;
        for id in ids {
            tx.run(delete, args![*id]).await?;
        }
        tx.commit().await
    }

    /// Number of deleted jobs that are not erased yet.
    pub async fn n_deleting(&self) -> Result<u64> {
        let row = self.db.row("select count(*) as jobs from job where deleting = 1", &[]).await?;
        row.map_or(Ok(0), |row| row.int("jobs")).map(|jobs| jobs as u64)
    }
}

const RESCUE: (&str, &str) = {
    macro_rules! rescue {
        ($lock:literal) => {
            concat!(
                "update job set rescues = rescues + 1, used_ms = ms - claimed_ms, \
                 state = case when cancel_requested = 1 then 'canceled' when attempt >= max_attempts then 'failed' else 'queued' end, \
                 error = case when cancel_requested = 1 or attempt < max_attempts then null \
                              when ",
                expired!("deadline_ms", "deadline_boot_ms"),
                " then $2 else $1 end, \
                 finished_ms = case when cancel_requested = 1 or attempt >= max_attempts then ms end, ",
                released_columns!(),
                " from clock where id in (select id from job cross join clock where ",
                overdue!(),
                $lock,
                ") and ",
                overdue!(),
                " returning id, tenant, state"
            )
        };
    }
    // A locked row has a live worker, or is checked in the next round.
    (rescue!(""), rescue!(" for update of job skip locked"))
};

/// Locks the tenant's next job of that kind that no other claim has locked.
async fn lock_next_job(
    tx: &mut Tx,
    kind: Kind,
    tenant: TenantId,
    model: Option<&ModelCard>,
) -> Result<Option<JobId>> {
    let select = locking!(
        "select id from job where state = 'queued' and kind = $1 and tenant = $2 \
         and not_before_ms <= (select ms from clock) and ", runnable!("$3", "$4", "$5"), " order by priority desc, id limit 1";
        "for update skip locked"
    );
    let row = tx.row(select, &[&args![kind.as_str(), tenant][..], &model_args(model)].concat()).await?;
    row.map(|row| row.parsed("id")).transpose()
}

/// Marks a locked job as running under a new lease.
async fn start_attempt(
    tx: &mut Tx,
    id: JobId,
    turn: &Turn,
    worker: Uuid,
    [lease, deadline]: [Duration; 2],
    clock: [Arg; 2],
) -> Result<Job> {
    let update = concat!(
        "update job set state = 'running', run_lease = run_lease + 1, attempt = attempt + 1, worker = $2, \
         lease_until_ms = ms + $3, deadline_ms = ms + $4, boot = $6, lease_until_boot_ms = $7 + $3, \
         deadline_boot_ms = $7 + $4, claimed_ms = ms, started_ms = coalesce(started_ms, ms), version = version + 1, \
         turn = $5, used_ms = 0 from clock where id = $1 and state = 'queued' returning ",
        job_columns!()
    );
    let values = [args![id, worker.to_string(), lease, deadline, turn.begin], &clock[..]].concat();
    let row = tx.row(update, &values).await?;
    job(&row.ok_or_else(|| Error::Corrupt("a locked row was changed".into()))?)
}

async fn put_artifact(tx: &mut Tx, id: JobId, object: &Object) -> Result<()> {
    let upsert = "insert into artifact (job, name, key, size, sha256, content_type, meta) \
                  values ($1, $2, $3, $4, $5, $6, $7) on conflict (job, name) do update set key = excluded.key, \
                  size = excluded.size, sha256 = excluded.sha256, content_type = excluded.content_type, \
                  meta = excluded.meta";
    let Object { name, key, size, sha256, content_type, meta } = object;
    let values = args![
        id,
        name.as_str(),
        key.as_str(),
        *size as i64,
        sha256.as_str(),
        content_type.as_str(),
        json(meta)
    ];
    tx.run(upsert, values).await.map(drop)
}

/// A write under a lease that changed no row has lost the lease.
fn ensure_held(rows: u64) -> Result<()> {
    if rows == 0 { Err(Error::LeaseLost) } else { Ok(()) }
}
