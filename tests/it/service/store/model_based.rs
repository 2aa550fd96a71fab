//! Model-based test: random operations of clients and workers on both databases, compared with a model in memory.
//!
//! After every step each row is what the model says: so at most one lease is live, ended jobs never change, a cancel
//! that was acknowledged never succeeds, and the states add up to what was accepted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use hypnos::job::State;
use hypnos::store::{Completion, Error, Renewal};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::*;

/// One step. Numbers choose among what there is at that moment.
#[derive(Clone, Debug)]
enum Step {
    Train { tenant: usize, priority: i32, max_attempts: i64 },
    Sample { tenant: usize, parent: usize },
    Claim { kinds: &'static [Kind], brief: bool, late: bool },
    Renew { lease: usize, brief: bool },
    Checkpoint { lease: usize, step: u64 },
    Show { lease: usize },
    Finish { lease: usize, used: Duration },
    Fail { lease: usize, retry: Option<Duration> },
    MachineFails { lease: usize, host: usize },
    Cancelled { lease: usize },
    Release { lease: usize },
    Rescue,
    Cancel { tenant: usize, job: usize },
    Delete { tenant: usize, job: usize },
    Erase,
}

fn step() -> impl Strategy<Value = Step> {
    let (tenant, number) = (0..2_usize, 0..64_usize);
    let kinds = prop::sample::select(vec![BOTH, BOTH, &[Kind::Train][..], &[Kind::Sample][..]]);
    let retry = prop::sample::select(vec![None, Some(NONE), Some(LONG)]);
    // Far longer than a walk takes, so that what runs counts as what such a job takes and not as what it took so far.
    let used = prop::sample::select(vec![NONE, LONG, 7 * LONG]);
    prop_oneof![
        4 => (tenant.clone(), -1..=1, 1..4_i64)
            .prop_map(|(tenant, priority, max_attempts)| Step::Train { tenant, priority, max_attempts }),
        3 => (tenant.clone(), number.clone()).prop_map(|(tenant, parent)| Step::Sample { tenant, parent }),
        6 => (kinds, any::<bool>(), prop::bool::weighted(0.1))
            .prop_map(|(kinds, brief, late)| Step::Claim { kinds, brief, late }),
        2 => (number.clone(), any::<bool>()).prop_map(|(lease, brief)| Step::Renew { lease, brief }),
        2 => (number.clone(), 1..9_u64).prop_map(|(lease, step)| Step::Checkpoint { lease, step }),
        1 => number.clone().prop_map(|lease| Step::Show { lease }),
        5 => (number.clone(), used).prop_map(|(lease, used)| Step::Finish { lease, used }),
        2 => (number.clone(), retry).prop_map(|(lease, retry)| Step::Fail { lease, retry }),
        2 => (number.clone(), 0..4_usize).prop_map(|(lease, host)| Step::MachineFails { lease, host }),
        1 => number.clone().prop_map(|lease| Step::Cancelled { lease }),
        1 => number.clone().prop_map(|lease| Step::Release { lease }),
        2 => Just(Step::Rescue),
        2 => (tenant.clone(), number.clone()).prop_map(|(tenant, job)| Step::Cancel { tenant, job }),
        1 => (tenant, number).prop_map(|(tenant, job)| Step::Delete { tenant, job }),
        1 => Just(Step::Erase),
    ]
}

/// What the model knows of a job.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)] // as flat as the row
struct Known {
    tenant: TenantId,
    kind: Kind,
    parent: Option<JobId>,
    priority: i32,
    max_attempts: i64,
    state: State,
    run_lease: i64,
    attempt: i64,
    cancel_requested: bool,
    deleting: bool,
    overdue: bool,
    late: bool,
    waits: bool,
    checkpoint: Option<Checkpoint>,
    shown: Vec<String>,
    /// The claim that its own worker ended last.
    ended: i64,
    /// Machines that failed under it.
    hosts: BTreeSet<usize>,
}

impl Known {
    fn new(new: &NewJob) -> Self {
        Self {
            tenant: new.tenant,
            kind: new.spec.kind(),
            parent: new.parent,
            priority: new.priority,
            max_attempts: new.max_attempts,
            state: State::Queued,
            run_lease: 0,
            attempt: 0,
            cancel_requested: false,
            deleting: false,
            overdue: false,
            late: false,
            waits: false,
            checkpoint: None,
            shown: Vec::new(),
            ended: 0,
            hosts: BTreeSet::new(),
        }
    }

    /// Stops running, for `state` unless it was to be canceled.
    fn stop(&mut self, state: State) {
        self.state = if self.cancel_requested { State::Canceled } else { state };
        self.cancel_requested |= self.state == State::Canceled;
    }

    fn cancel(&mut self) {
        self.cancel_requested |= !self.state.is_terminal();
        if self.state == State::Queued {
            self.state = State::Canceled;
        }
    }

    /// What its worker ended it as.
    fn end(&mut self, state: State) {
        self.stop(state);
        self.ended = self.run_lease;
    }

    /// What a worker hears that has ended it before, if that was the last that was ended by its worker.
    fn again(&self, lease: Lease) -> Option<State> {
        let state = if self.run_lease == lease.run_lease { self.state } else { State::Queued };
        (self.ended == lease.run_lease).then_some(state)
    }

    fn retries(&self) -> State {
        if self.attempt < self.max_attempts { State::Queued } else { State::Failed }
    }
}

/// A walk: the store, and what should be in it.
struct Walk<'a> {
    db: &'a TestDatabase,
    tenants: [TenantId; 2],
    jobs: BTreeMap<JobId, Known>,
    /// Every lease that was ever given.
    leases: Vec<Lease>,
    began: Instant,
}

type Checked = Result<(), TestCaseError>;

impl Walk<'_> {
    #[expect(clippy::too_many_lines, reason = "one arm for each operation of the store")]
    async fn step(&mut self, step: &Step) -> Checked {
        let store = &self.db.store;
        match *step {
            Step::Train { tenant, priority, max_attempts } => {
                let new = NewJob { priority, max_attempts, ..training(self.tenants[tenant]) };
                let known = Known::new(&new);
                prop_assert!(matches!(store.submit(new.clone()).await.unwrap(), Submitted::New(_)));
                self.jobs.insert(new.id, known);
            }
            Step::Sample { tenant, parent } => {
                let Some((parent, before)) = nth(&self.jobs, parent) else { return Ok(()) };
                let new = sample(self.tenants[tenant], parent);
                let there = before.tenant == new.tenant && before.kind == Kind::Train && !before.deleting;
                let answer = store.submit(new.clone()).await.unwrap();
                if there && before.state == State::Succeeded {
                    prop_assert!(matches!(answer, Submitted::New(_)), "{answer:?}");
                    self.jobs.insert(new.id, Known::new(&new));
                } else {
                    prop_assert_eq!(answer, Submitted::NoParent(there.then_some(before.state)));
                }
            }
            Step::Claim { kinds, brief, late } => {
                let [lease, deadline] = [brief, late].map(|over| if over { NONE } else { LONG });
                let used = self.db.device_time().await;
                let claimed = store.claim(Uuid::now_v7(), kinds, lease, deadline).await.unwrap();
                let claimed = claimed.map(|claim| claim.job);
                let id = self.check_turn(kinds, claimed.as_ref(), &used)?;
                let Some((id, job)) = id.zip(claimed) else { return Ok(()) };
                let known = self.jobs.get_mut(&id).unwrap();
                known.state = State::Running;
                known.run_lease += 1;
                known.attempt += 1;
                (known.overdue, known.late) = (brief, late);
                self.leases.push(job.lease());
            }
            Step::Renew { lease, brief } => {
                let Some((lease, held)) = self.lease(lease) else { return Ok(()) };
                let renewal = store.renew(lease, if brief { NONE } else { LONG }, None).await.unwrap();
                let Some(known) = held else {
                    prop_assert_eq!(renewal, Renewal::Lost);
                    return Ok(());
                };
                prop_assert_eq!(renewal, Renewal::Held { cancel_requested: known.cancel_requested });
                known.overdue = brief;
            }
            Step::Checkpoint { lease, step } => {
                let Some((lease, held)) = self.lease(lease) else { return Ok(()) };
                let answer = store.commit_checkpoint(lease, &checkpoint(step)).await;
                let Some(known) = held else { return lost(answer) };
                let before = known.checkpoint.replace(checkpoint(step)).filter(|before| before.step != step);
                prop_assert_eq!(answer.unwrap(), before);
            }
            Step::Show { lease } => {
                let Some((lease, held)) = self.lease(lease) else { return Ok(()) };
                let answer = store.add_artifact(lease, &object("preview")).await;
                let Some(known) = held else { return lost(answer) };
                known.shown = vec!["preview".into()];
            }
            Step::Finish { lease, used } => {
                let Some((lease, held)) = self.lease(lease) else { return Ok(()) };
                let done = Completion::Succeed { result: &json!({}), artifacts: &[object("weights")] };
                let answer = store.end(lease, done, used).await;
                let Some(known) = held else { return self.lost_or_again(lease, answer) };
                known.end(State::Succeeded);
                if known.state == State::Succeeded {
                    known.shown.push("weights".into());
                }
                prop_assert_eq!(answer.unwrap(), known.state);
            }
            Step::Fail { lease, retry } => {
                let Some((lease, held)) = self.lease(lease) else { return Ok(()) };
                let answer = store.fail(lease, &fault(), retry).await;
                let Some(known) = held else { return self.lost_or_again(lease, answer) };
                known.end(if retry.is_some() { known.retries() } else { State::Failed });
                known.waits = retry == Some(LONG);
                prop_assert_eq!(answer.unwrap(), known.state);
            }
            Step::MachineFails { lease, host } => {
                let Some((lease, held)) = self.lease(lease) else { return Ok(()) };
                let answer = store.machine_failed(lease, &fault(), &format!("host {host}"), LONG).await;
                let Some(known) = held else { return self.lost_or_again(lease, answer) };
                if known.cancel_requested {
                    known.end(State::Canceled);
                } else if known.hosts.insert(host) {
                    known.end(if known.hosts.len() < 3 { State::Queued } else { State::Failed });
                    known.attempt -= i64::from(known.state == State::Queued);
                } else {
                    known.end(known.retries());
                    known.waits = true;
                }
                prop_assert_eq!(answer.unwrap(), known.state);
            }
            Step::Cancelled { lease } => {
                let Some((lease, held)) = self.lease(lease) else { return Ok(()) };
                let answer = store.cancelled(lease).await;
                let Some(known) = held else {
                    return self.lost_or_again(lease, answer.map(|()| State::Canceled));
                };
                known.end(State::Canceled);
                prop_assert!(answer.is_ok());
            }
            Step::Release { lease } => {
                let Some((lease, held)) = self.lease(lease) else { return Ok(()) };
                let answer = store.release(lease).await;
                let Some(known) = held else { return self.lost_or_again(lease, answer) };
                known.end(State::Queued);
                known.attempt -= i64::from(known.state == State::Queued);
                prop_assert_eq!(answer.unwrap(), known.state);
            }
            Step::Rescue => {
                let rescued = store.rescue().await.unwrap();
                let mut counts = [0, 0, 0];
                for known in self.jobs.values_mut().filter(|known| known.state == State::Running) {
                    if known.overdue || known.late {
                        known.stop(known.retries());
                        let states = [State::Queued, State::Failed, State::Canceled];
                        counts[states.iter().position(|state| *state == known.state).unwrap()] += 1;
                    }
                }
                prop_assert_eq!([rescued.requeued, rescued.failed, rescued.canceled], counts);
            }
            Step::Cancel { tenant, job } => {
                let Some((id, before)) = nth(&self.jobs, job) else { return Ok(()) };
                let canceled = store.cancel(self.tenants[tenant], id).await.unwrap();
                let there = before.tenant == self.tenants[tenant] && !before.deleting;
                prop_assert_eq!(canceled.is_some(), there);
                if there {
                    self.jobs.get_mut(&id).unwrap().cancel();
                }
            }
            Step::Delete { tenant, job } => {
                let Some((id, before)) = nth(&self.jobs, job) else { return Ok(()) };
                let there = before.tenant == self.tenants[tenant] && !before.deleting;
                prop_assert_eq!(store.delete(self.tenants[tenant], id).await.unwrap(), there);
                for (other, known) in self.jobs.iter_mut().filter(|_| there) {
                    if *other == id || known.parent == Some(id) {
                        known.cancel();
                        known.deleting = true;
                    }
                }
            }
            Step::Erase => {
                let mut erasable = store.erasable(None, 1000).await.unwrap();
                erasable.sort();
                let gone = |(id, known): &(&JobId, &Known)| {
                    let left = self.jobs.values().any(|other| other.parent == Some(**id));
                    known.deleting && known.state != State::Running && !left
                };
                let mut wanted: Vec<_> =
                    self.jobs.iter().filter(gone).map(|(id, known)| (known.tenant, *id)).collect();
                wanted.sort();
                prop_assert_eq!(&erasable, &wanted);
                for (_, id) in wanted {
                    store.remove_erased(&[id]).await.unwrap();
                    self.jobs.remove(&id);
                }
            }
        }
        Ok(())
    }

    /// What was claimed is a job that may be, a training before a sample, of the tenant whose turn is the earliest, and
    /// of that tenant's the one with the largest priority, the oldest of these.
    fn check_turn(
        &self,
        kinds: &[Kind],
        claimed: Option<&Job>,
        used: &BTreeMap<String, DeviceTime>,
    ) -> Result<Option<JobId>, TestCaseError> {
        let free = |known: &Known| known.state == State::Queued && !known.waits;
        let Some(kind) = [Kind::Train, Kind::Sample].into_iter().find(|kind| {
            kinds.contains(kind) && self.jobs.values().any(|known| free(known) && known.kind == *kind)
        }) else {
            prop_assert!(claimed.is_none());
            return Ok(None);
        };
        let job = claimed.ok_or_else(|| TestCaseError::fail("nothing was claimed"))?;
        let free_ones = || self.jobs.iter().filter(|(_, known)| free(known) && known.kind == kind);
        let begun = used.values().map(|used| used.begun).max().unwrap_or(0);
        let turn = |tenant: TenantId| {
            let used = used.get(&tenant.to_string()).copied().unwrap_or_default();
            let runs =
                |(_, known): &(&JobId, &Known)| known.tenant == tenant && known.state == State::Running;
            let running = self.jobs.iter().filter(runs).map(|(_, known)| match known.kind {
                Kind::Train => used.train_ms.unwrap_or(600_000),
                Kind::Sample => used.sample_ms.unwrap_or(10_000),
            });
            used.turn.max(begun) + 1000 * running.sum::<i64>()
        };
        let first = free_ones().map(|(_, known)| known.tenant).min_by_key(|tenant| (turn(*tenant), *tenant));
        // On a machine that stands still for so long, what runs counts as more than such a job takes.
        if self.began.elapsed() < Duration::from_secs(9) {
            prop_assert_eq!(Some(job.tenant), first);
        }
        let own = free_ones().filter(|(_, known)| known.tenant == job.tenant);
        let first = own.min_by_key(|(id, known)| (-known.priority, **id)).map(|(id, _)| *id);
        prop_assert_eq!(Some(job.id), first);
        Ok(first)
    }

    /// A lease that was given at some time, and its job if it is still held.
    fn lease(&mut self, number: usize) -> Option<(Lease, Option<&mut Known>)> {
        let lease = *self.leases.get(number % self.leases.len().max(1))?;
        let known = self.jobs.get_mut(&lease.job);
        Some((
            lease,
            known.filter(|known| known.state == State::Running && known.run_lease == lease.run_lease),
        ))
    }

    /// The answer to an end under a lease that is not held: it was lost, or it was ended so before.
    fn lost_or_again(&self, lease: Lease, answer: Result<State, Error>) -> Checked {
        match self.jobs.get(&lease.job).and_then(|known| known.again(lease)) {
            // `cancelled` does not say what became of it.
            Some(state) => prop_assert!(answer.is_ok_and(|said| said == state || said == State::Canceled)),
            None => return lost(answer),
        }
        Ok(())
    }

    /// Every row is what the model says.
    async fn check_rows(&self) -> Checked {
        for (&id, known) in &self.jobs {
            let row = self.db.store.find(known.tenant, id, known.kind).await.unwrap();
            let shown = self.db.store.artifacts(known.tenant, id).await.unwrap();
            if known.deleting {
                prop_assert!(row.is_none() && shown.is_empty());
                continue;
            }
            let row = row.ok_or_else(|| TestCaseError::fail("a job is gone"))?;
            prop_assert_eq!(row.state, known.state);
            prop_assert_eq!((row.run_lease, row.attempt), (known.run_lease, known.attempt));
            prop_assert_eq!(
                (row.cancel_requested, &row.checkpoint),
                (known.cancel_requested, &known.checkpoint)
            );
            prop_assert_eq!(row.finished_ms.is_some(), known.state.is_terminal());
            let shown: Vec<_> = shown.into_iter().map(|object| object.name).collect();
            prop_assert_eq!(&shown, &known.shown);
        }
        Ok(())
    }
}

fn nth(jobs: &BTreeMap<JobId, Known>, number: usize) -> Option<(JobId, Known)> {
    jobs.iter().nth(number % jobs.len().max(1)).map(|(id, known)| (*id, known.clone()))
}

fn lost<T: std::fmt::Debug>(answer: Result<T, Error>) -> Checked {
    prop_assert!(matches!(answer, Err(Error::LeaseLost)), "{answer:?}");
    Ok(())
}

fn walk(db: impl Future<Output = TestDatabase>) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(db);
    let tenants = runtime.block_on(async { [db.tenant("a").await, db.tenant("b").await] });
    let config = Config { cases: 24, failure_persistence: None, ..Config::default() };
    let steps = prop::collection::vec(step(), 1..80);
    let walked = TestRunner::new(config).run(&steps, |steps| {
        runtime.block_on(async {
            db.sql("delete from job where parent is not null; delete from job").await;
            let (jobs, leases, began) = (BTreeMap::new(), Vec::new(), Instant::now());
            let mut walk = Walk { db: &db, tenants, jobs, leases, began };
            for step in &steps {
                walk.step(step).await?;
                walk.check_rows().await?;
            }
            Ok(())
        })
    });
    if let Err(error) = walked {
        panic!("{error}");
    }
}

#[test]
fn sqlite_agrees_with_the_model() {
    walk(TestDatabase::sqlite());
}

#[test]
fn postgres_agrees_with_the_model() {
    walk(TestDatabase::postgres());
}
