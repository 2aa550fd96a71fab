//! What a worker does: claim, renew, report, end; and what every worker does for the dead: rescue, erase.
//!
//! Every write names the lease, and takes the job's row before it writes. [`Error::LeaseLost`] means that nothing was
//! written and that the claim is over. A write whose outcome is unknown is said again: the row shows whether it was done.

use std::ops::Deref;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::api::{job, job_columns};
use super::db::{Arg, Tx, args, locking};
use super::turns::{Turn, charge, turns};
use super::{Error, Result, Store, json, parse};
use crate::job::{Checkpoint, Fault, FaultCode, Job, JobId, Kind, Lease, Object, Progress, State, TenantId};

/// Machines that may fail under a job before it is taken for the job's own fault.
pub const HOSTS_MAX: usize = 3;

/// What a worker could begin now.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Jobs of these kinds.
    pub kinds: &'a [Kind],
    /// But no samples of these tenants, since it holds some already.
    pub no_samples_of: &'a [TenantId],
}

impl<'a> From<&'a [Kind]> for Wanted<'a> {
    fn from(kinds: &'a [Kind]) -> Self {
        Self { kinds, no_samples_of: &[] }
    }
}

impl<'a, const N: usize> From<&'a [Kind; N]> for Wanted<'a> {
    fn from(kinds: &'a [Kind; N]) -> Self {
        Self::from(&kinds[..])
    }
}

/// A job that was claimed.
#[derive(Clone, Debug, PartialEq)]
pub struct Claim {
    /// The job, running.
    pub job: Job,
    /// Its tenant's turn, in microseconds of device time divided by the weight: of two jobs that one device holds, the
    /// one with the earlier turn goes on.
    pub turn: i64,
    /// Its tenant's weight.
    pub weight: i64,
}

impl Deref for Claim {
    type Target = Job;

    fn deref(&self) -> &Job {
        &self.job
    }
}

/// What a renewal found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The lease is held.
    Held {
        /// Whether the job's owner wants it to end.
        cancel_requested: bool,
    },
    /// It is not. Stop, write nothing.
    Lost,
}

/// What became of jobs whose workers were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rescued {
    /// Wait again.
    pub requeued: u64,
    /// Had no attempt left.
    pub failed: u64,
    /// Were to be canceled anyway.
    pub canceled: u64,
}

/// The row of a lease that is held.
macro_rules! held {
    () => {
        "id = $1 and state = 'running' and run_lease = $2"
    };
}

/// Whether a time is over: by the wall clock that is beside it, or, where the row names a start of the machine, by the time
/// since that start, which is over with the start. Wants `clock`, and the two of [`Db::lease_clock`](super::db::Db::lease_clock) as `$3` and `$4`.
macro_rules! over {
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

/// A row whose worker is not believed any more.
macro_rules! overdue {
    () => {
        concat!(
            "state = 'running' and (",
            over!("lease_until_ms", "lease_until_boot_ms"),
            " or ",
            over!("deadline_ms", "deadline_boot_ms"),
            ")"
        )
    };
}

/// What a row that stops running loses.
macro_rules! let_go {
    () => {
        "worker = null, lease_until_ms = null, deadline_ms = null, boot = null, lease_until_boot_ms = null, \
         deadline_boot_ms = null, version = version + 1"
    };
}
pub(super) use let_go;

/// A deleted row, called `gone`, that nothing hangs on any more.
macro_rules! erasable {
    () => {
        "deleting = 1 and state <> 'running' and not exists (select 1 from job where job.parent = gone.id)"
    };
}

/// How a worker wants a job to end. A job whose owner was told of its cancel ends canceled, whatever is wanted.
#[derive(Clone, Copy, Debug)]
pub enum Wish<'a> {
    /// Succeeded, with its result and what it has to show.
    Succeed {
        /// Facts about what came out.
        result: &'a Value,
        /// What it has to show from now on.
        artifacts: &'a [Object],
    },
    /// Failed; or it waits again, for after `retry`, if that is given and an attempt is left.
    Fail {
        /// Why.
        fault: &'a Fault,
        /// How long it waits before the next attempt.
        retry: Option<Duration>,
    },
    /// Given back because the machine `host` failed under it: at the cost of no attempt, if that is the first time for
    /// this machine; else for after `retry`, and it counts. When [`HOSTS_MAX`] machines failed under it, it is the job's
    /// own fault, and it fails.
    MachineFailed {
        /// How the machine failed.
        fault: &'a Fault,
        /// The machine's name.
        host: &'a str,
        /// How long it waits before the next attempt, where this one counts.
        retry: Duration,
    },
    /// Canceled, as its owner wanted.
    Cancel,
    /// Given back unfinished, at the cost of no attempt. It goes on from its checkpoint.
    GiveBack,
}

/// How a job that stops running goes on.
struct End {
    state: State,
    /// Of a job that failed.
    error: Option<String>,
    /// Before it may be claimed again.
    wait: Option<Duration>,
    /// Whether the attempt does not count.
    is_free: bool,
}

impl End {
    fn to(state: State) -> Self {
        Self { state, error: None, wait: None, is_free: false }
    }

    fn failed(fault: &Fault) -> Self {
        Self { error: Some(json(fault)), ..Self::to(State::Failed) }
    }

    fn again(fault: &Fault, wait: Duration, attempts_left: bool) -> Self {
        if attempts_left { Self { wait: Some(wait), ..Self::to(State::Queued) } } else { Self::failed(fault) }
    }

    fn free() -> Self {
        Self { is_free: true, ..Self::to(State::Queued) }
    }
}

impl Wish<'_> {
    /// How it ends: a cancel that its owner was told of comes before everything. `hosts` are the machines that failed
    /// under it, this one among them from now on if it did.
    fn end(&self, cancel_requested: bool, attempts_left: bool, hosts: &mut Vec<String>) -> End {
        match self {
            _ if cancel_requested => End::to(State::Canceled),
            Self::Cancel => End::to(State::Canceled),
            Self::Succeed { .. } => End::to(State::Succeeded),
            Self::Fail { fault, retry: Some(wait) } => End::again(fault, *wait, attempts_left),
            Self::Fail { fault, retry: None } => End::failed(fault),
            // It was found sound since it failed under this very job: an attempt as any other.
            Self::MachineFailed { fault, host, retry } if hosts.iter().any(|known| known == host) => {
                End::again(fault, *retry, attempts_left)
            }
            Self::MachineFailed { fault, host, .. } => {
                hosts.push((*host).to_owned());
                if hosts.len() < HOSTS_MAX { End::free() } else { End::failed(&of_the_job(fault)) }
            }
            Self::GiveBack => End::free(),
        }
    }
}

/// The fault of a job under which as many machines failed as may.
fn of_the_job(last: &Fault) -> Fault {
    let message = format!("{HOSTS_MAX} machines failed under it, the last one with: {}", last.message);
    Fault { message, retryable: false, ..last.clone() }
}

impl Store {
    /// Claims the job whose turn it is, of those `wanted`: a training before a sample, for a device trains once at a
    /// time and draws beside it; then tenants by the device time that they had, over their weights; then a tenant's own
    /// by priority and age. Until `lease` is over nobody else gets it, unless `deadline` comes first, which no renewal
    /// puts off.
    pub async fn claim<'a>(
        &self,
        worker: Uuid,
        wanted: impl Into<Wanted<'a>>,
        lease: Duration,
        deadline: Duration,
    ) -> Result<Option<Claim>> {
        self.settle_claims().await?;
        let wanted = wanted.into();
        let [Some(first), Some(last)] = [wanted.kinds.first(), wanted.kinds.last()] else { return Ok(None) };
        // Most looks find nothing, and need not wait for those who write.
        let look = "select id from job where state = 'queued' and kind in ($1, $2) \
                    and not_before_ms <= (select ms from clock) limit 1";
        if self.db.row(look, args![first.as_str(), last.as_str()]).await?.is_none() {
            return Ok(None);
        }
        let mut tx = self.db.begin().await?;
        for kind in [Kind::Train, Kind::Sample].into_iter().filter(|kind| wanted.kinds.contains(kind)) {
            for turn in turns(&mut tx, kind).await? {
                if kind == Kind::Sample && wanted.no_samples_of.contains(&turn.tenant) {
                    continue;
                }
                let Some(id) = pick(&mut tx, kind, turn.tenant).await? else { continue };
                let job = take(&mut tx, id, &turn, worker, [lease, deadline], self.db.lease_clock()).await?;
                return match tx.commit().await {
                    Ok(()) => Ok(Some(Claim { job, turn: turn.at, weight: turn.weight })),
                    Err(error) => {
                        if let Error::Unknown(_) = error {
                            self.doubtful().push(job.lease());
                        }
                        Err(error)
                    }
                };
            }
        }
        Ok(None)
    }

    /// Gives back what was claimed by commits that were not answered, if they were done: nobody works on it, and its lease
    /// would run out at the cost of an attempt. As long as that is not settled there is no further claim.
    pub async fn settle_claims(&self) -> Result<()> {
        let doubtful = self.doubtful().clone();
        for lease in doubtful {
            match self.release(lease).await {
                Ok(_) | Err(Error::LeaseLost) => self.doubtful().retain(|other| *other != lease),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn doubtful(&self) -> MutexGuard<'_, Vec<Lease>> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a lease for `time` from now on, and says how far the job is if there is anything to say.
    pub async fn renew(&self, lease: Lease, time: Duration, progress: Option<&Progress>) -> Result<Renewal> {
        let update = concat!(
            "update job set lease_until_ms = ms + $3, lease_until_boot_ms = $5 + $3, \
             progress = coalesce($4, progress), version = version + case when $4 is not null and progress is distinct from $4 then 1 else 0 end \
             from clock where ",
            held!(),
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

    /// Makes a checkpoint, which is in the bucket, the one that a further attempt goes on from. It may be said again. The
    /// one before it, whose object can go: none where `checkpoint` itself was there already.
    pub async fn commit_checkpoint(
        &self,
        lease: Lease,
        checkpoint: &Checkpoint,
    ) -> Result<Option<Checkpoint>> {
        let select = locking!("select checkpoint from job where ", held!(); "for no key update");
        let update = concat!("update job set checkpoint = $3 where ", held!());
        let mut tx = self.db.begin().await?;
        let row = tx.row(select, args![lease.job, lease.run_lease]).await?.ok_or(Error::LeaseLost)?;
        held(tx.run(update, args![lease.job, lease.run_lease, json(checkpoint)]).await?)?;
        tx.commit().await?;
        let before: Option<Checkpoint> =
            row.text_or_none("checkpoint")?.map(|text| parse("checkpoint", text)).transpose()?;
        // An object that was just written is never the one before, whatever the row said.
        Ok(before.filter(|before| before.object.key != checkpoint.object.key))
    }

    /// Shows an object of a running job. One of that name from an earlier attempt is replaced.
    pub async fn add_artifact(&self, lease: Lease, object: &Object) -> Result<()> {
        let update = concat!("update job set version = version + 1 where ", held!());
        let mut tx = self.db.begin().await?;
        held(tx.run(update, args![lease.job, lease.run_lease]).await?)?;
        put_artifact(&mut tx, lease.job, object).await?;
        tx.commit().await
    }

    /// Ends a job with its result, as [`Store::end`] does, without device time.
    pub async fn finish(&self, lease: Lease, result: &Value, artifacts: &[Object]) -> Result<State> {
        self.end(lease, Wish::Succeed { result, artifacts }, Duration::ZERO).await
    }

    /// Ends a job by a fault, as [`Store::end`] does, without device time.
    pub async fn fail(&self, lease: Lease, fault: &Fault, retry: Option<Duration>) -> Result<State> {
        self.end(lease, Wish::Fail { fault, retry }, Duration::ZERO).await
    }

    /// Gives a job back because its machine failed, as [`Store::end`] does, without device time.
    pub async fn machine_failed(
        &self,
        lease: Lease,
        fault: &Fault,
        host: &str,
        retry: Duration,
    ) -> Result<State> {
        self.end(lease, Wish::MachineFailed { fault, host, retry }, Duration::ZERO).await
    }

    /// Ends a job whose owner wanted it to end, as [`Store::end`] does, without device time.
    pub async fn cancelled(&self, lease: Lease) -> Result<()> {
        self.end(lease, Wish::Cancel, Duration::ZERO).await.map(drop)
    }

    /// Gives a job back unfinished, as [`Store::end`] does, without device time.
    pub async fn release(&self, lease: Lease) -> Result<State> {
        self.end(lease, Wish::GiveBack, Duration::ZERO).await
    }

    /// Ends what its worker runs, in one transaction. `used` is how long the device worked for this attempt, which puts off
    /// its tenant's next turn. The state it is in then. Said again, it changes nothing, and tells what it has made of the
    /// job: the row keeps which claim it was that its own worker ended.
    pub async fn end(&self, lease: Lease, wish: Wish<'_>, used: Duration) -> Result<State> {
        let select = locking!(
            "select state, run_lease, ended_lease, cancel_requested, attempt, max_attempts, fault_hosts from job \
             where id = $1";
            "for update"
        );
        let update = concat!(
            "update job set state = $3, cancel_requested = case when $3 = 'canceled' then 1 else 0 end, \
             result = $4, error = $5, not_before_ms = coalesce(ms + $6, not_before_ms), attempt = attempt - $7, \
             fault_hosts = $8, used_ms = $9, finished_ms = case when $3 = 'queued' then null else ms end, ended_lease = run_lease, ",
            let_go!(),
            " from clock where ",
            held!()
        );
        let mut tx = self.db.begin().await?;
        let row = tx.row(select, args![lease.job]).await?.ok_or(Error::LeaseLost)?;
        let (found, run_lease) = (row.word("state")?, row.int("run_lease")?);
        if row.int_or_none("ended_lease")? == Some(lease.run_lease) {
            // Ended by this very claim. If others have claimed it since, it was put back.
            return Ok(if run_lease == lease.run_lease { found } else { State::Queued });
        }
        if found != State::Running || run_lease != lease.run_lease {
            return Err(Error::LeaseLost);
        }
        let attempts_left = row.int("attempt")? < row.int("max_attempts")?;
        let mut hosts: Vec<String> = parse("fault_hosts", row.text("fault_hosts")?)?;
        let End { state, error, wait, is_free } =
            wish.end(row.flag("cancel_requested")?, attempts_left, &mut hosts);
        let (result, artifacts) = match (state, &wish) {
            (State::Succeeded, Wish::Succeed { result, artifacts }) => (Some(json(result)), *artifacts),
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
        held(tx.run(update, values).await?)?;
        for object in artifacts {
            put_artifact(&mut tx, lease.job, object).await?;
        }
        charge(&mut tx, lease.job, state == State::Succeeded).await?;
        tx.notify().await?;
        tx.commit().await?;
        self.wakes.wake();
        if state == State::Canceled {
            self.wakes.deleted(); // it may have been canceled by being deleted
        }
        Ok(state)
    }

    /// Takes jobs from workers that did not renew their lease or passed their deadline: they wait again, or fail as
    /// `worker_lost` or `deadline` when no attempt is left. One statement, which looks again at every row it takes.
    pub async fn rescue(&self) -> Result<Rescued> {
        let lost = Fault::new(FaultCode::WorkerLost, "its worker was lost at every attempt");
        let late = Fault::new(FaultCode::Deadline, "it took longer than an attempt may");
        let mut tx = self.db.begin().await?;
        let faults = args![json(&lost), json(&late)];
        let rows = tx.rows(RESCUE, &[faults, &self.db.lease_clock()[..]].concat()).await?;
        let mut rescued = Rescued::default();
        let mut charged: Vec<(TenantId, JobId)> = Vec::new();
        for row in &rows {
            match row.word("state")? {
                State::Queued => rescued.requeued += 1,
                State::Canceled => rescued.canceled += 1,
                _ => rescued.failed += 1,
            }
            charged.push((row.word("tenant")?, row.word("id")?));
        }
        charged.sort_unstable(); // whoever locks several tenants' rows does so in this order
        for (_, id) in charged {
            charge(&mut tx, id, false).await?;
        }
        if !rows.is_empty() {
            tx.notify().await?;
        }
        tx.commit().await?;
        if !rows.is_empty() {
            self.wakes.wake();
        }
        Ok(rescued)
    }

    /// Jobs that have ended and still name a checkpoint, which nobody will read, in the order of their ids, those after
    /// `after` if it is given: the checkpoint's object can go, and then [`Store::forget_checkpoint`].
    pub async fn spent_checkpoints(
        &self,
        after: Option<JobId>,
        limit: u32,
    ) -> Result<Vec<(JobId, Checkpoint)>> {
        let select = "select id, checkpoint from job where checkpoint is not null and finished_ms is not null \
                      and id > $1 order by id limit $2";
        let after = after.map_or(String::new(), |after| after.to_string());
        let rows = self.db.read(select, args![after, i64::from(limit)]).await?;
        rows.iter().map(|row| Ok((row.word("id")?, parse("checkpoint", row.text("checkpoint")?)?))).collect()
    }

    /// The object of an ended job's checkpoint is gone.
    pub async fn forget_checkpoint(&self, id: JobId) -> Result<()> {
        let update = "update job set checkpoint = null where id = $1 and finished_ms is not null";
        self.db.write(update, args![id]).await.map(drop)
    }

    /// Deleted jobs whose objects can go, in the order of their ids, those after `after` if it is given: they do not run,
    /// and no sample of theirs is left.
    pub async fn erasable(&self, after: Option<JobId>, limit: u32) -> Result<Vec<(TenantId, JobId)>> {
        let select = concat!(
            "select tenant, id from job gone where ",
            erasable!(),
            " and id > $1 order by id limit $2"
        );
        let after = after.map_or(String::new(), |after| after.to_string());
        let rows = self.db.read(select, args![after, i64::from(limit)]).await?;
        rows.iter().map(|row| Ok((row.word("tenant")?, row.word("id")?))).collect()
    }

    /// The objects of erasable jobs are gone: so are their rows.
    pub async fn erased(&self, ids: &[JobId]) -> Result<()> {
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

    /// How many deleted jobs are not erased yet.
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
                over!("deadline_ms", "deadline_boot_ms"),
                " then $2 else $1 end, \
                 finished_ms = case when cancel_requested = 1 or attempt >= max_attempts then ms end, ",
                let_go!(),
                " from clock where id in (select id from job cross join clock where ",
                overdue!(),
                $lock,
                ") and ",
                overdue!(),
                " returning id, tenant, state"
            )
        };
    }
    // A row that somebody is writing to has a live worker, or is looked at in the next round.
    (rescue!(""), rescue!(" for update of job skip locked"))
};

/// The tenant's next job of that kind, locked for this transaction, if no other claim has it.
async fn pick(tx: &mut Tx, kind: Kind, tenant: TenantId) -> Result<Option<JobId>> {
    let select = locking!(
        "select id from job where state = 'queued' and kind = $1 and tenant = $2 \
         and not_before_ms <= (select ms from clock) order by priority desc, id limit 1";
        "for update skip locked"
    );
    let row = tx.row(select, args![kind.as_str(), tenant]).await?;
    row.map(|row| row.word("id")).transpose()
}

async fn take(
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
    job(&row.ok_or_else(|| Error::Corrupt("a locked row was taken".into()))?)
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

/// A guarded write that wrote nothing found the lease lost.
fn held(rows: u64) -> Result<()> {
    if rows == 0 { Err(Error::LeaseLost) } else { Ok(()) }
}
