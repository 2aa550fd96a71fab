//! What a worker does: claim, renew, report, end; and what every worker does for the dead: rescue, erase.
//!
//! Every write names the lease, and takes the job's row before it writes. [`Error::LeaseLost`] means that nothing was
//! written and that the claim is over. A write whose outcome is unknown is said again: the row shows whether it was done.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::api::{TURNS, job, job_columns};
use super::db::{Arg, Tx, args, locking};
use super::{Error, Result, Store, json, parse};
use crate::job::{Checkpoint, Fault, FaultCode, Job, JobId, Kind, Lease, Object, Progress, State, TenantId};

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
/// since that start, which is over with the start. Wants `clock`, and the two of [`Db::lease_clock`] as `$3` and `$4`.
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

/// How a worker wants a job to end.
enum Wish<'a> {
    Succeed { result: &'a Value },
    Fail { fault: &'a Fault, retry: Option<Duration> },
    Cancel,
    GiveBack,
}

impl Wish<'_> {
    /// Where it goes: a cancel that its owner was told of comes before everything.
    fn state(&self, cancel_requested: bool, attempts_left: bool) -> State {
        match self {
            _ if cancel_requested => State::Canceled,
            Self::Cancel => State::Canceled,
            Self::Succeed { .. } => State::Succeeded,
            Self::Fail { retry: Some(_), .. } if attempts_left => State::Queued,
            Self::Fail { .. } => State::Failed,
            Self::GiveBack => State::Queued,
        }
    }
}

impl Store {
    /// Claims the job whose turn it is, of those `kinds`: samples before trainings, then tenants by turns, then a
    /// tenant's own by priority and age. Until `lease` is over nobody else gets it, unless `deadline` comes first,
    /// which no renewal puts off.
    pub async fn claim(
        &self,
        worker: Uuid,
        kinds: &[Kind],
        lease: Duration,
        deadline: Duration,
    ) -> Result<Option<Job>> {
        self.settle_claims().await?;
        // Most looks find nothing, and need not wait for those who write.
        let look =
            "select id from job where state = 'queued' and not_before_ms <= (select ms from clock) limit 1";
        if self.db.row(look, &[]).await?.is_none() {
            return Ok(None);
        }
        let mut tx = self.db.begin().await?;
        for kind in [Kind::Sample, Kind::Train].into_iter().filter(|kind| kinds.contains(kind)) {
            for turn in tx.rows(TURNS, args![kind.as_str()]).await? {
                let Some(id) = pick(&mut tx, kind, turn.word("tenant")?).await? else { continue };
                let job = take(&mut tx, id, worker, lease, deadline, self.db.lease_clock()).await?;
                return match tx.commit().await {
                    Ok(()) => Ok(Some(job)),
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

    /// Ends a job with its result and shows what came out, in one transaction. The state it is in then: succeeded, or
    /// canceled if its owner was told so before, and then nothing of this is shown.
    pub async fn finish(&self, lease: Lease, result: &Value, artifacts: &[Object]) -> Result<State> {
        self.end(lease, Wish::Succeed { result }, artifacts).await
    }

    /// Ends a job by a fault, or puts it back for after `retry` if that is given and an attempt is left. The state it
    /// is in then: queued, failed or canceled.
    pub async fn fail(&self, lease: Lease, fault: &Fault, retry: Option<Duration>) -> Result<State> {
        self.end(lease, Wish::Fail { fault, retry }, &[]).await
    }

    /// Ends a job whose owner wanted it to end.
    pub async fn cancelled(&self, lease: Lease) -> Result<()> {
        self.end(lease, Wish::Cancel, &[]).await.map(drop)
    }

    /// Gives a job back unfinished, at the cost of no attempt. It goes on from its checkpoint. The state it is in
    /// then: queued or canceled.
    pub async fn release(&self, lease: Lease) -> Result<State> {
        self.end(lease, Wish::GiveBack, &[]).await
    }

    /// The one way out of a running job for its worker. Said again, it changes nothing, and tells what it has made of the
    /// job: the row keeps which claim it was that its own worker ended.
    async fn end(&self, lease: Lease, wish: Wish<'_>, artifacts: &[Object]) -> Result<State> {
        let select = locking!(
            "select state, run_lease, ended_lease, cancel_requested, attempt, max_attempts from job where id = $1";
            "for update"
        );
        let update = concat!(
            "update job set state = $3, cancel_requested = case when $3 = 'canceled' then 1 else 0 end, \
             result = $4, error = $5, not_before_ms = coalesce(ms + $6, not_before_ms), attempt = attempt - $7, \
             finished_ms = case when $3 = 'queued' then null else ms end, ended_lease = run_lease, ",
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
        let state = wish.state(row.flag("cancel_requested")?, attempts_left);
        let (mut result, mut error, mut wait, mut uncounted) = (None, None, None, false);
        match (state, &wish) {
            (State::Succeeded, Wish::Succeed { result: facts }) => result = Some(json(facts)),
            (State::Failed, Wish::Fail { fault, .. }) => error = Some(json(fault)),
            (State::Queued, Wish::Fail { retry, .. }) => wait = *retry,
            (State::Queued, _) => uncounted = true,
            _ => {}
        }
        let values = args![lease.job, lease.run_lease, state.as_str(), result, error, wait, uncounted];
        held(tx.run(update, values).await?)?;
        if state == State::Succeeded {
            for object in artifacts {
                put_artifact(&mut tx, lease.job, object).await?;
            }
        }
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
        for row in &rows {
            match row.word("state")? {
                State::Queued => rescued.requeued += 1,
                State::Canceled => rescued.canceled += 1,
                _ => rescued.failed += 1,
            }
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
                "update job set rescues = rescues + 1, \
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
                " returning state"
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
    worker: Uuid,
    lease: Duration,
    deadline: Duration,
    clock: [Arg; 2],
) -> Result<Job> {
    let update = concat!(
        "update job set state = 'running', run_lease = run_lease + 1, attempt = attempt + 1, worker = $2, \
         lease_until_ms = ms + $3, deadline_ms = ms + $4, boot = $5, lease_until_boot_ms = $6 + $3, \
         deadline_boot_ms = $6 + $4, claimed_ms = ms, started_ms = coalesce(started_ms, ms), version = version + 1 \
         from clock where id = $1 and state = 'queued' returning ",
        job_columns!()
    );
    let values = [args![id, worker.to_string(), lease, deadline], &clock[..]].concat();
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
