//! Concurrency limits that tenants share fairly.
//!
//! A [`FairPool`] has a number of permits. One tenant alone may hold all of them; as soon as others ask, each gets as
//! many as the rest: a released permit goes to the waiting tenant that holds fewest, and where the work can be cut
//! short without harm, the tenant that holds most has one revoked for a tenant that holds fewer. So no tenant is
//! refused because of what another does, as long as there are at least as many permits as tenants.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::activity::Activity;
use super::problem::{Kind, Problem};
use crate::job::TenantId;

/// How often a waiting request checks whether a permit can be revoked for it.
const REVOCATION_CHECK: Duration = Duration::from_millis(250);

/// The pools of a server.
pub(super) struct FairPools {
    /// Requests that are answered at once.
    pub(super) requests: FairPool,
    /// JSON bodies that are being received.
    pub(super) bodies: FairPool,
    /// Requests that wait for a change.
    pub(super) waits: FairPool,
    /// Event streams and downloads.
    pub(super) streams: FairPool,
}

impl FairPools {
    /// Pools of these sizes; `requests_max` is that of `bodies` too.
    pub(super) fn new(requests_max: usize, waits_max: usize, streams_max: usize) -> Self {
        let secs = Duration::from_secs;
        let bodies = Revocation { for_others: Some(secs(1)), for_own: Some(secs(2)) };
        // A wait that ends early is still answered: with the current state.
        let waits = Revocation { for_others: Some(Duration::ZERO), for_own: Some(Duration::ZERO) };
        let streams = Revocation { for_others: Some(Duration::ZERO), for_own: Some(secs(30)) };
        Self {
            requests: FairPool::new(requests_max, Revocation::NEVER, secs(10)),
            bodies: FairPool::new(requests_max, bodies, secs(10)),
            waits: FairPool::new(waits_max, waits, Duration::ZERO),
            streams: FairPool::new(streams_max, streams, Duration::ZERO),
        }
    }
}

/// How long a permit must have been idle to be revoked when none is free; never if none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Revocation {
    /// For another tenant, which holds at least two permits fewer.
    pub(super) for_others: Option<Duration>,
    /// For the same tenant.
    pub(super) for_own: Option<Duration>,
}

impl Revocation {
    pub(super) const NEVER: Self = Self { for_others: None, for_own: None };
}

/// Permits that tenants share. Clones are one.
#[derive(Clone)]
pub(super) struct FairPool {
    state: Arc<Mutex<State>>,
    revocation: Revocation,
    /// How long a request waits for a permit.
    wait_max: Duration,
    /// Requests of one tenant that may wait; more are refused at once.
    waiting_max: usize,
}

/// No permit was free in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exhausted {
    /// The tenant has its share.
    ByTenant,
    /// There are as many tenants as permits.
    ByOthers,
}

impl From<Exhausted> for Problem {
    fn from(exhausted: Exhausted) -> Self {
        match exhausted {
            Exhausted::ByTenant => {
                Self::new(Kind::TooMany, "this tenant has as many concurrent requests as it may have")
            }
            Exhausted::ByOthers => Self::new(Kind::Overloaded, "the server has too many concurrent requests"),
        }
    }
}

struct State {
    free: usize,
    /// Permits granted so far: their ids, and the order in which tenants were served.
    n_granted: u64,
    /// Requests that had to wait so far.
    n_waited: u64,
    tenants: HashMap<TenantId, TenantPermits>,
}

#[derive(Default)]
struct TenantPermits {
    held: Vec<HeldPermit>,
    /// Waiting requests, by the order in which they came.
    waiting: VecDeque<(u64, oneshot::Sender<Permit>)>,
    /// Id of the last permit that it was granted.
    last_granted: u64,
}

struct HeldPermit {
    id: u64,
    activity: Activity,
    /// Tells the holder that the permit is revoked; none if it cannot be.
    revoked: Option<CancellationToken>,
}

/// A permit of a pool; released when dropped.
pub(super) struct Permit {
    state: Arc<Mutex<State>>,
    tenant: TenantId,
    id: u64,
    activity: Activity,
    revoked: CancellationToken,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FairPool {
    /// A pool of `size` permits, for one of which a request waits `wait_max`.
    pub(super) fn new(size: usize, revocation: Revocation, wait_max: Duration) -> Self {
        let state = State { free: size, n_granted: 0, n_waited: 0, tenants: HashMap::new() };
        Self { state: Arc::new(Mutex::new(state)), revocation, wait_max, waiting_max: 64 }
    }

    /// The same, with `waiting_max` requests of one tenant that may wait.
    pub(super) fn with_waiting_max(self, waiting_max: usize) -> Self {
        Self { waiting_max, ..self }
    }

    /// A permit, at once or within the pool's waiting time.
    pub(super) async fn acquire(&self, tenant: TenantId) -> Result<Permit, Exhausted> {
        self.acquire_revocable(tenant, CancellationToken::new()).await
    }

    /// A permit whose holder learns by `revoked` that it is revoked.
    pub(super) async fn acquire_revocable(
        &self,
        tenant: TenantId,
        revoked: CancellationToken,
    ) -> Result<Permit, Exhausted> {
        let mut granted = {
            let mut state = lock(&self.state);
            if state.free > 0 || state.revoke_for(tenant, self.revocation) {
                return Ok(state.grant(&self.state, tenant, revoked));
            }
            if self.wait_max.is_zero() {
                return Err(state.exhausted(tenant));
            }
            state.n_waited += 1;
            let number = state.n_waited;
            let waiting = &mut state.tenant(tenant).waiting;
            if waiting.len() >= self.waiting_max {
                waiting.retain(|(_, sender)| !sender.is_closed());
            }
            if waiting.len() >= self.waiting_max {
                return Err(Exhausted::ByTenant);
            }
            let (sender, receiver) = oneshot::channel();
            waiting.push_back((number, sender));
            receiver
        };
        let deadline = Instant::now() + self.wait_max;
        loop {
            let next_check = deadline.min(Instant::now() + REVOCATION_CHECK);
            let mut permit = match tokio::time::timeout_at(next_check, &mut granted).await {
                Ok(Ok(permit)) => permit,
                Ok(Err(_)) => return Err(Exhausted::ByOthers), // the pool is gone
                Err(_) => {
                    // Permits are handed over under the lock: one that has not arrived by now was not granted.
                    let mut state = lock(&self.state);
                    match granted.try_recv() {
                        Ok(permit) => permit,
                        Err(_) if state.revoke_for(tenant, self.revocation) => {
                            return Ok(state.grant(&self.state, tenant, revoked));
                        }
                        Err(_) if Instant::now() >= deadline => return Err(state.exhausted(tenant)),
                        Err(_) => continue,
                    }
                }
            };
            lock(&self.state).set_revocation_token(&mut permit, revoked);
            return Ok(permit);
        }
    }
}

impl State {
    fn tenant(&mut self, tenant: TenantId) -> &mut TenantPermits {
        self.tenants.entry(tenant).or_default()
    }

    fn exhausted(&self, tenant: TenantId) -> Exhausted {
        let holds = self.tenants.get(&tenant).is_some_and(|permits| !permits.held.is_empty());
        if holds { Exhausted::ByTenant } else { Exhausted::ByOthers }
    }

    /// Grants a free permit.
    fn grant(&mut self, pool: &Arc<Mutex<Self>>, tenant: TenantId, revoked: CancellationToken) -> Permit {
        let (id, activity) = (self.n_granted, Activity::new());
        self.free -= 1;
        self.n_granted += 1;
        let permits = self.tenant(tenant);
        permits.last_granted = id;
        permits.held.push(HeldPermit { id, activity: activity.clone(), revoked: Some(revoked.clone()) });
        Permit { state: Arc::clone(pool), tenant, id, activity, revoked }
    }

    /// Revokes a permit that can be spared for `tenant`; whether there was one.
    fn revoke_for(&mut self, tenant: TenantId, revocation: Revocation) -> bool {
        let own = self.tenants.get(&tenant).map_or(0, |permits| permits.held.len());
        let most = self
            .tenants
            .iter()
            .filter(|(other, permits)| **other != tenant && permits.held.len() >= own + 2)
            .max_by_key(|(_, permits)| permits.held.len())
            .map(|(other, _)| *other);
        let try_revoke = |state: &mut Self, holder: Option<TenantId>, idle_min: Option<Duration>| {
            let (Some(holder), Some(idle_min)) = (holder, idle_min) else { return false };
            state.revoke_idlest(holder, idle_min)
        };
        try_revoke(self, most, revocation.for_others) || try_revoke(self, Some(tenant), revocation.for_own)
    }

    /// Revokes the permit of `tenant` that has been idle longest, if it has been for `idle_min`.
    fn revoke_idlest(&mut self, tenant: TenantId, idle_min: Duration) -> bool {
        let Some(permits) = self.tenants.get_mut(&tenant) else { return false };
        let revocable = permits.held.iter().enumerate().filter(|(_, held)| held.revoked.is_some());
        let idlest = revocable.max_by_key(|(at, held)| (held.activity.idle(), usize::MAX - at));
        let Some((at, held)) = idlest else { return false };
        if held.activity.idle() < idle_min {
            return false;
        }
        if let Some(revoked) = &held.revoked {
            revoked.cancel();
        }
        permits.held.remove(at);
        self.free += 1;
        true
    }

    /// Takes a permit back and grants what is free to waiting requests. Permits whose requests have given up meanwhile
    /// are returned, to be dropped without the lock.
    fn release(&mut self, pool: &Arc<Mutex<Self>>, tenant: TenantId, id: u64) -> Vec<Permit> {
        if let Some(permits) = self.tenants.get_mut(&tenant)
            && let Some(at) = permits.held.iter().position(|held| held.id == id)
        {
            permits.held.remove(at);
            self.free += 1;
        }
        let mut left_over = Vec::new();
        while self.free > 0 {
            for permits in self.tenants.values_mut() {
                while permits.waiting.front().is_some_and(|(_, sender)| sender.is_closed()) {
                    permits.waiting.pop_front();
                }
            }
            let waiting = self.tenants.iter().filter(|(_, permits)| !permits.waiting.is_empty());
            let order = |permits: &TenantPermits| {
                let first = permits.waiting.front().map(|(number, _)| *number);
                (permits.held.len(), permits.last_granted, first)
            };
            let next = waiting.min_by_key(|(_, permits)| order(permits));
            let Some(next) = next.map(|(tenant, _)| *tenant) else { break };
            let sender = self.tenant(next).waiting.pop_front();
            let permit = self.grant(pool, next, CancellationToken::new());
            if let Some((_, sender)) = sender
                && let Err(permit) = sender.send(permit)
            {
                left_over.push(permit);
            }
        }
        self.tenants.retain(|_, permits| !permits.held.is_empty() || !permits.waiting.is_empty());
        left_over
    }

    /// From now on `revoked` tells the holder of a permit that it is revoked.
    fn set_revocation_token(&mut self, permit: &mut Permit, revoked: CancellationToken) {
        let held = &mut self.tenant(permit.tenant).held;
        if let Some(held) = held.iter_mut().find(|held| held.id == permit.id) {
            held.revoked = Some(revoked.clone());
        } else {
            revoked.cancel(); // it was revoked already
        }
        permit.revoked = revoked;
    }
}

impl Permit {
    /// Records activity: the permit is in use.
    pub(super) fn touch(&self) {
        self.activity.touch();
    }

    /// The permit's activity, for what uses it.
    pub(super) fn activity(&self) -> Activity {
        self.activity.clone()
    }

    /// Waits until the permit is revoked.
    pub(super) async fn revoked(&self) {
        self.revoked.cancelled().await;
    }

    /// From now on the permit is not revoked.
    pub(super) fn make_irrevocable(&self) {
        let mut state = lock(&self.state);
        if let Some(held) = state.tenant(self.tenant).held.iter_mut().find(|held| held.id == self.id) {
            held.revoked = None;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let left_over = lock(&self.state).release(&self.state, self.tenant, self.id);
        drop(left_over);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn tenant(n: u128) -> TenantId {
        TenantId(uuid::Uuid::from_u128(n))
    }

    async fn take(pool: &FairPool, n: u128) -> (Permit, CancellationToken) {
        let revoked = CancellationToken::new();
        (pool.acquire_revocable(tenant(n), revoked.clone()).await.expect("a permit"), revoked)
    }

    #[tokio::test]
    async fn a_released_permit_goes_to_the_tenant_with_the_fewest() {
        let pool = FairPool::new(3, Revocation::NEVER, MS(1000));
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(take(&pool, 1).await); // one tenant may have them all
        }
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = tokio::task::JoinSet::new();
        for n in [1, 1, 1, 2, 2, 3] {
            let (pool, order) = (pool.clone(), Arc::clone(&order));
            waiting.spawn(async move {
                let permit = pool.acquire(tenant(n)).await;
                order.lock().expect("no panic").push((n, permit.is_ok()));
                std::mem::forget(permit); // it is never released
            });
            tokio::task::yield_now().await;
        }
        for permit in held {
            drop(permit);
            tokio::time::sleep(MS(50)).await;
        }
        let served = [(2, true), (3, true), (1, true)];
        assert_eq!(*order.lock().expect("no panic"), served, "each has one, who waits longer first");
        waiting.join_all().await; // nobody waits for ever
        let mut order = order.lock().expect("no panic");
        order[3..].sort_unstable();
        assert_eq!(order[3..], [(1, false), (1, false), (2, false)]);
    }

    #[tokio::test]
    async fn permits_are_revoked_from_who_has_most_until_all_have_as_many() {
        let pool = FairPool::new(6, Revocation { for_others: Some(MS(0)), for_own: None }, MS(0));
        let mut first = Vec::new();
        for _ in 0..6 {
            first.push(take(&pool, 1).await);
            tokio::time::sleep(MS(5)).await;
        }
        first[0].0.touch();
        let mut second = Vec::new();
        for _ in 0..3 {
            second.push(take(&pool, 2).await);
        }
        let revoked: Vec<_> = first.iter().map(|(_, revoked)| revoked.is_cancelled()).collect();
        assert_eq!(revoked, [false, true, true, true, false, false], "the idlest go");
        assert_eq!(pool.acquire(tenant(2)).await.err(), Some(Exhausted::ByTenant));
        assert_eq!(pool.acquire(tenant(1)).await.err(), Some(Exhausted::ByTenant));
        let third = [take(&pool, 3).await, take(&pool, 3).await];
        let n_revoked = |of: &[(Permit, CancellationToken)]| {
            of.iter().filter(|(_, revoked)| revoked.is_cancelled()).count()
        };
        assert_eq!((n_revoked(&first), n_revoked(&second), n_revoked(&third)), (4, 1, 0));
        drop((first, second, third));
        for n in 1..=6 {
            std::mem::forget(take(&pool, n).await); // each was released once, and no more
        }
        assert_eq!(pool.acquire(tenant(7)).await.err(), Some(Exhausted::ByOthers));
    }

    #[tokio::test]
    async fn an_idle_permit_is_revoked_for_its_own_tenant_and_an_irrevocable_one_never() {
        let pool =
            FairPool::new(2, Revocation { for_others: Some(MS(100)), for_own: Some(MS(600)) }, MS(2000));
        let (kept, idle) = (take(&pool, 1).await, take(&pool, 1).await);
        kept.0.make_irrevocable();
        let began = Instant::now();
        let own = take(&pool, 1).await;
        assert!((MS(600)..MS(1500)).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert!(idle.1.is_cancelled() && !kept.1.is_cancelled());
        let began = Instant::now();
        let other = take(&pool, 2).await;
        assert!(
            (MS(100)..MS(500)).contains(&began.elapsed()),
            "another does not wait as long: {:?}",
            began.elapsed()
        );
        assert!(own.1.is_cancelled() && !kept.1.is_cancelled());
        assert_eq!(pool.acquire(tenant(3)).await.err(), Some(Exhausted::ByOthers));
        assert!(!other.1.is_cancelled());
    }

    #[tokio::test]
    async fn a_request_that_gave_up_waiting_gets_no_permit_and_loses_none() {
        let pool = FairPool::new(1, Revocation::NEVER, MS(5000)).with_waiting_max(2);
        let held = take(&pool, 1).await;
        for _ in 0..5 {
            let gone = tokio::time::timeout(MS(20), pool.acquire(tenant(2))).await;
            assert!(gone.is_err());
        }
        let two = [pool.clone(), pool.clone()];
        let two = two.map(|pool| tokio::spawn(async move { pool.acquire(tenant(2)).await.err() }));
        tokio::time::sleep(MS(50)).await;
        assert_eq!(pool.acquire(tenant(2)).await.err(), Some(Exhausted::ByTenant), "as many wait as may");
        drop(held);
        for one in two {
            assert_eq!(one.await.expect("no panic"), None);
        }
        assert!(pool.acquire(tenant(3)).await.is_ok());
    }
}
