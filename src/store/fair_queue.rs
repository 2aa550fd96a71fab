//! Fair queueing: tenants share the devices by the device time of their jobs, divided by their weights.
//!
//! Start-time fair queueing (Goyal, Vin and Cheng 1996) over the seconds of both kinds of jobs. Each tenant has a
//! *turn*, a point in virtual time. The earliest turn is served next, and the device time of its job, divided by the
//! tenant's weight, postpones its next turn. No turn is earlier than where the last served one began, so that a tenant
//! that was idle comes next but does not catch up on time that it did not use. A running job counts as long as the
//! tenant's recent jobs.

use super::db::{Arg, Row, Tx, args};
use super::error::{Error, Result};
use super::handle::Store;
use crate::job::{Job, JobId, Kind, ModelCard, ModelPart, State, TenantId};

/// Condition: a worker with the model of [`model_args`] can run the job; one without a model can run every job.
macro_rules! runnable {
    ($sha256:literal, $name:literal, $lacks:literal) => {
        concat!(
            "(cast(",
            $sha256,
            " as text) is null or model is null or model = ",
            $sha256,
            " or model = ",
            $name,
            ") and needs & ",
            $lacks,
            " = 0"
        )
    };
}
pub(super) use runnable;

/// The arguments of `runnable!`: hash and name of a model, and the parts that it lacks.
pub(super) fn model_args(model: Option<&ModelCard>) -> [Arg; 3] {
    let sha256 = model.map(|card| card.sha256.as_str());
    [sha256.into(), model.map(|card| card.name.as_str()).into(), model.map_or(0, lacks).into()]
}

/// The parts that a model lacks, as a sum.
pub(super) fn lacks(model: &ModelCard) -> i64 {
    ModelPart::mask(ModelPart::ALL) & !ModelPart::mask(&model.parts)
}

/// Largest weight of a tenant; the smallest is 1.
pub const WEIGHT_MAX: u32 = 1000;

/// Assumed device time of a job before one of the tenant's has ended, in milliseconds.
fn assumed_ms(kind: Kind) -> i64 {
    match kind {
        Kind::Train => 10 * 60 * 1000,
        Kind::Sample => 10 * 1000,
    }
}

/// Selects what the turns of the tenants in `waiting` follow from, of tenants whose jobs of kind `$1` are not paused.
/// `$2` and `$3` are the assumed device times of a training and of a sample.
macro_rules! turns {
    ($with:literal, $($waiting:expr),+) => {
        concat!(
            $with,
            "
            select waiting.tenant, waiting.jobs, weight, coalesce(turn, 0) as turn,
                coalesce((select max(begun) from device_time), 0) as begun,
                coalesce(case when $1 = 'train' then train_ms else sample_ms end,
                    case when $1 = 'train' then $2 else $3 end) as cost_ms,
                (select cast(coalesce(sum(case when ms - claimed_ms > expected_ms then ms - claimed_ms else expected_ms end), 0)
                        as bigint)
                    from (select claimed_ms, coalesce(case when kind = 'train' then train_ms else sample_ms end,
                            case when kind = 'train' then $2 else $3 end) as expected_ms
                        from job where job.tenant = waiting.tenant and state = 'running') running
                    cross join clock) as running_ms
            from (",
            $($waiting,)+
            ") waiting
            join tenant on tenant.id = waiting.tenant
            left join device_time on device_time.tenant = waiting.tenant
            where not exists (select 1 from held_back where held_back.tenant = waiting.tenant and held_back.kind = $1)"
        )
    };
}

/// Tenants with jobs to claim, one index lookup each: equally fast however many jobs they have.
const TO_CLAIM: &str = turns!(
    "with recursive queued (tenant) as (
        select min(tenant) from job where state = 'queued' and kind = $1
        union all
        select (select min(tenant) from job where state = 'queued' and kind = $1 and tenant > queued.tenant)
        from queued where queued.tenant is not null)",
    "select tenant, cast(0 as bigint) as jobs from queued where exists (select 1 from job where state = 'queued'
        and kind = $1 and job.tenant = queued.tenant and not_before_ms <= (select ms from clock) and ",
    runnable!("$4", "$5", "$6"),
    ")"
);

/// Condition: a worker that can run a job for the model `$model` may have to choose between the two.
macro_rules! competing {
    ($model:literal) => {
        concat!("(cast(", $model, " as text) is null or model is null or model = ", $model, ")")
    };
}

/// The same, with the number of jobs of each that compete with one for the model `$4`.
const TO_COUNT: &str = turns!(
    "",
    "select tenant, count(*) as jobs from job where state = 'queued' and kind = $1
        and not_before_ms <= (select ms from clock) and ",
    competing!("$4"),
    " group by tenant"
);

/// The place of a waiting job in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePlace {
    /// How many jobs of its kind are claimed before it: 0 for the next one.
    pub position: u64,
    /// Whether a running worker holds the model that it needs, with the parts that it needs.
    pub served: bool,
}

/// A tenant with waiting jobs, and its turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) tenant: TenantId,
    /// Jobs of the kind that could be claimed now, if counted.
    jobs: i64,
    /// Virtual time at which its next job begins; the job's row keeps it.
    pub(super) begin: i64,
    /// `begin`, postponed by the tenant's running jobs: the smallest is next.
    pub(super) at: i64,
    /// How far one more job postpones the turn.
    cost: i64,
    pub(super) weight: i64,
}

impl Turn {
    fn read(row: &Row) -> Result<Self> {
        let weight = row.int("weight")?;
        let begin = row.int("turn")?.max(row.int("begun")?);
        Ok(Self {
            tenant: row.parsed("tenant")?,
            jobs: row.int("jobs")?,
            begin,
            at: begin.saturating_add(stretch(row.int("running_ms")?, weight)),
            cost: stretch(row.int("cost_ms")?.max(1), weight),
            weight,
        })
    }

    /// How many of this tenant's jobs come before the job of `other` that is behind `own` of that tenant's jobs.
    fn before(&self, other: &Self, own: i64) -> i64 {
        let until = other.at.saturating_add(other.cost.saturating_mul(own));
        let gap = until.saturating_sub(self.at);
        match gap {
            ..0 => 0,
            // That many begin earlier, and one more at the same virtual time if this tenant is the older one.
            _ if gap % self.cost == 0 => gap / self.cost + i64::from(self.tenant < other.tenant),
            _ => gap / self.cost + 1,
        }
    }
}

/// Device time converted to the tenant's virtual time.
fn stretch(ms: i64, weight: i64) -> i64 {
    ms.saturating_mul(1000) / weight.max(1)
}

fn in_order(rows: &[Row]) -> Result<Vec<Turn>> {
    let mut turns = rows.iter().map(Turn::read).collect::<Result<Vec<_>>>()?;
    turns.sort_by_key(|turn| (turn.at, turn.tenant));
    Ok(turns)
}

/// How many jobs are claimed before the job that is behind `own` jobs of its tenant: those, and of every other tenant
/// as many as its turn puts first.
pub(super) fn position(tenant: TenantId, own: i64, turns: &[Turn]) -> u64 {
    let mine = turns.iter().find(|turn| turn.tenant == tenant);
    let ahead = turns.iter().filter(|turn| turn.tenant != tenant).map(|other| match mine {
        Some(mine) => other.jobs.min(other.before(mine, own)),
        None => other.jobs.min(own + 1), // the job waits for its retry, and its tenant has no turn yet
    });
    (own + ahead.sum::<i64>()) as u64
}

impl Store {
    /// Sets a tenant's weight, its share of the devices: 1, which every tenant has at first, to [`WEIGHT_MAX`]. Applies
    /// to every claim from now on. Whether the tenant exists.
    pub async fn set_tenant_weight(&self, tenant: TenantId, weight: u32) -> Result<bool> {
        if !(1..=WEIGHT_MAX).contains(&weight) {
            return Err(Error::InvalidSettings(format!("weight: wanted 1 to {WEIGHT_MAX}, got {weight}")));
        }
        let update = "update tenant set weight = $2 where id = $1";
        Ok(self.db.write(update, args![tenant, i64::from(weight)]).await? > 0)
    }

    /// A tenant's weight, if the tenant exists.
    pub async fn tenant_weight(&self, tenant: TenantId) -> Result<Option<u32>> {
        let row = self.db.row("select weight from tenant where id = $1", args![tenant]).await?;
        row.map(|row| row.int("weight").map(|weight| weight as u32)).transpose()
    }

    /// The place of a job in the queue, if it waits. An estimate: every job is assumed to take as long as its tenant's
    /// recent jobs.
    pub async fn queue_place(&self, job: &Job) -> Result<Option<QueuePlace>> {
        if job.state != State::Queued {
            return Ok(None);
        }
        let ahead = "
            select (select count(*) from job where state = 'queued' and kind = me.kind and tenant = me.tenant
                and (me.model is null or model is null or model = me.model)
                and (priority > me.priority or (priority = me.priority and id < me.id))) as own,
                (select count(*) from model_worker join model on model.sha256 = model_worker.model
                    where until_ms > (select ms from clock)
                    and (me.model is null or me.model = sha256 or me.model = name)
                    and me.needs & lacks = 0) as workers
            from job me where tenant = $1 and id = $2 and state = 'queued' and deleting = 0";
        let row = self.db.row(ahead, args![job.tenant, job.id]).await?;
        let Some(row) = row else { return Ok(None) };
        let values = [&assumed_args(job.kind)[..], args![job.model.as_deref()]].concat();
        let turns = in_order(&self.db.read(TO_COUNT, &values).await?)?;
        let position = position(job.tenant, row.int("own")?, &turns);
        Ok(Some(QueuePlace { position, served: row.int("workers")? > 0 }))
    }
}

/// Tenants with jobs of that kind for a worker with this model, in the order of their turns.
pub(super) async fn turns(tx: &mut Tx, kind: Kind, model: Option<&ModelCard>) -> Result<Vec<Turn>> {
    in_order(&tx.rows(TO_CLAIM, &[assumed_args(kind), model_args(model)].concat()).await?)
}

fn assumed_args(kind: Kind) -> [Arg; 3] {
    [kind.as_str().into(), assumed_ms(Kind::Train).into(), assumed_ms(Kind::Sample).into()]
}

/// Postpones the turn of a job's tenant by the device time of the job's last attempt. `learn` says whether that is the
/// time of a whole job, which future estimates use. Must be the last statement of a transaction that locks a row.
pub(super) async fn charge(tx: &mut Tx, id: JobId, learn: bool) -> Result<()> {
    let charge = "
        insert into device_time (tenant, turn, begun, train_ms, sample_ms)
        select job.tenant, coalesce(turn, 0) + case when used_ms > 0 then used_ms else 1 end * 1000 / weight, coalesce(turn, 0),
            case when $2 = 1 and used_ms > 0 and kind = 'train' then used_ms end,
            case when $2 = 1 and used_ms > 0 and kind = 'sample' then used_ms end
        from job join tenant on tenant.id = job.tenant where job.id = $1
        on conflict (tenant) do update set
            turn = excluded.turn + case when device_time.turn > excluded.begun then device_time.turn - excluded.begun else 0 end,
            begun = case when device_time.begun > excluded.begun then device_time.begun else excluded.begun end,
            train_ms = coalesce((3 * device_time.train_ms + excluded.train_ms) / 4, excluded.train_ms, device_time.train_ms),
            sample_ms = coalesce((3 * device_time.sample_ms + excluded.sample_ms) / 4, excluded.sample_ms, device_time.sample_ms)";
    tx.run(charge, args![id, learn]).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::TenantId;

    /// A tenant with `jobs` waiting jobs and its turn at `at`, which each job postpones by `cost`.
    fn turn(tenant: u128, jobs: i64, at: i64, cost: i64) -> Turn {
        let tenant = TenantId(uuid::Uuid::from_u128(tenant));
        Turn { tenant, jobs, begin: at, at, cost, weight: 1 }
    }

    #[test]
    fn a_position_counts_of_each_other_tenant_the_jobs_whose_turn_comes_first() {
        let (me, big) = (TenantId(uuid::Uuid::from_u128(1)), TenantId(uuid::Uuid::from_u128(2)));
        assert_eq!(position(me, 0, &[turn(1, 1, 0, 10)]), 0);
        assert_eq!(position(me, 0, &[turn(1, 1, 0, 10), turn(2, 10_000, 5, 10)]), 0);
        assert_eq!(position(me, 0, &[turn(2, 10_000, 0, 10), turn(1, 1, 1, 10)]), 1);
        assert_eq!(position(me, 0, &[turn(2, 10_000, 0, 10), turn(1, 1, 25, 10)]), 3, "at 0, 10 and 20");
        assert_eq!(
            position(me, 2, &[turn(2, 10_000, 0, 10), turn(1, 3, 5, 10), turn(3, 1, 7, 10)]),
            2 + 3 + 1
        );
        assert_eq!(
            position(big, 9_999, &[turn(1, 3, 0, 10), turn(3, 1, 0, 10), turn(2, 10_000, 0, 10)]),
            9_999 + 3 + 1
        );
        assert_eq!(
            position(me, 1, &[turn(2, 4, 0, 10)]),
            1 + 2,
            "a job that waits for its retry has no turn yet"
        );
    }

    #[test]
    fn of_two_whose_turn_is_at_once_the_older_tenant_comes_first() {
        let [first, second] = [turn(1, 5, 0, 10), turn(2, 5, 0, 10)];
        assert_eq!((first.before(&second, 0), second.before(&first, 0)), (1, 0));
        assert_eq!((first.before(&second, 1), second.before(&first, 1)), (2, 1));
    }

    #[test]
    fn a_long_job_lets_many_short_ones_of_another_go_first() {
        let (short, long) = (turn(1, 100, 0, 1_000), turn(2, 100, 0, 60_000));
        assert_eq!(short.before(&long, 1), 61);
        assert_eq!(long.before(&short, 60), 1);
    }
}
