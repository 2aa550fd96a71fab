//! What tenants share: places for what is under way at once.
//!
//! A [`Pool`] has a number of places. One tenant alone may hold them all; as soon as others ask, each gets as many as
//! the rest: a place that is given back goes to the tenant that holds fewest, and where what is under way can be cut short
//! without harm, the tenant that holds most gives one back for a tenant that holds fewer. So nobody is refused
//! because of what another does, as long as there are at least as many places as tenants.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::activity::Life;
use super::problem::{Kind, Problem};
use crate::job::TenantId;

/// How often one that waits looks whether somebody can be asked to give a place back.
const LOOK: Duration = Duration::from_millis(250);

/// The places of a server.
pub(super) struct Shares {
    /// Requests that are answered at once.
    pub(super) requests: Pool,
    /// Small bodies that are on their way.
    pub(super) bodies: Pool,
    /// Requests that wait for a change.
    pub(super) waits: Pool,
    /// Event streams and downloads.
    pub(super) streams: Pool,
}

impl Shares {
    pub(super) fn new(requests_max: usize, waits_max: usize, streams_max: usize) -> Self {
        let secs = Duration::from_secs;
        Self {
            requests: Pool::new(requests_max, Recall::NEVER, secs(10)),
            bodies: Pool::new(requests_max, Recall { others: Some(secs(1)), own: Some(secs(2)) }, secs(10)),
            // One that ends early has its answer all the same: what there is now.
            waits: Pool::new(
                waits_max,
                Recall { others: Some(Duration::ZERO), own: Some(Duration::ZERO) },
                Duration::ZERO,
            ),
            streams: Pool::new(
                streams_max,
                Recall { others: Some(Duration::ZERO), own: Some(secs(30)) },
                Duration::ZERO,
            ),
        }
    }
}

/// After how long without a sign of life a place is asked back, if there is none left; never if none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recall {
    /// For another tenant, which holds at least two fewer.
    pub(super) others: Option<Duration>,
    /// For the same tenant.
    pub(super) own: Option<Duration>,
}

impl Recall {
    pub(super) const NEVER: Self = Self { others: None, own: None };
}

/// Places that tenants share.
#[derive(Clone)]
pub(super) struct Pool {
    state: Arc<Mutex<State>>,
    recall: Recall,
    /// How long a request waits for a place.
    patience: Duration,
    /// Requests of one tenant that may wait for one; more are refused at once.
    waiting_max: usize,
}

/// There is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// The tenant has its share.
    Own,
    /// There are as many tenants as places.
    All,
}

impl From<Full> for Problem {
    fn from(full: Full) -> Self {
        match full {
            Full::Own => Self::new(Kind::TooMany, "as many requests of this tenant are under way as may be"),
            Full::All => Self::new(Kind::Overloaded, "too many requests at once"),
        }
    }
}

struct State {
    free: usize,
    /// Places given so far: names for them, and the order in which tenants were served.
    given: u64,
    /// Requests that had to wait so far.
    waited: u64,
    tenants: HashMap<TenantId, Share>,
}

#[derive(Default)]
struct Share {
    held: Vec<Holder>,
    /// Those that wait, by the order in which they came.
    waiting: VecDeque<(u64, oneshot::Sender<Place>)>,
    /// When it was last served, as a number of places given.
    served: u64,
}

struct Holder {
    name: u64,
    life: Life,
    /// Tells the holder to give the place back; none if it cannot.
    leave: Option<CancellationToken>,
}

/// A place; given back when it is dropped.
pub(super) struct Place {
    state: Arc<Mutex<State>>,
    tenant: TenantId,
    name: u64,
    life: Life,
    leave: CancellationToken,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// `max` places.
    pub(super) fn new(max: usize, recall: Recall, patience: Duration) -> Self {
        let state = State { free: max, given: 0, waited: 0, tenants: HashMap::new() };
        Self { state: Arc::new(Mutex::new(state)), recall, patience, waiting_max: 64 }
    }

    /// The same, with more who may wait.
    pub(super) fn with_waiting(self, waiting_max: usize) -> Self {
        Self { waiting_max, ..self }
    }

    /// A place, at once or within the pool's patience.
    pub(super) async fn take(&self, tenant: TenantId) -> Result<Place, Full> {
        self.take_or_leave(tenant, CancellationToken::new()).await
    }

    /// A place whose holder is told by `leave` to give it back.
    pub(super) async fn take_or_leave(
        &self,
        tenant: TenantId,
        leave: CancellationToken,
    ) -> Result<Place, Full> {
        let mut call = {
            let mut state = lock(&self.state);
            if state.free > 0 || state.make_room(tenant, self.recall) {
                return Ok(state.give(&self.state, tenant, leave));
            }
            if self.patience.is_zero() {
                return Err(state.full(tenant));
            }
            state.waited += 1;
            let number = state.waited;
            let waiting = &mut state.share(tenant).waiting;
            if waiting.len() >= self.waiting_max {
                waiting.retain(|(_, call)| !call.is_closed());
            }
            if waiting.len() >= self.waiting_max {
                return Err(Full::Own);
            }
            let (sender, receiver) = oneshot::channel();
            waiting.push_back((number, sender));
            receiver
        };
        let deadline = Instant::now() + self.patience;
        loop {
            let next_look = deadline.min(Instant::now() + LOOK);
            let mut place = match tokio::time::timeout_at(next_look, &mut call).await {
                Ok(Ok(place)) => place,
                Ok(Err(_)) => return Err(Full::All), // the pool is gone
                Err(_) => {
                    // Places are handed over under the lock: one that has not come by now was not given.
                    let mut state = lock(&self.state);
                    match call.try_recv() {
                        Ok(place) => place,
                        Err(_) if state.make_room(tenant, self.recall) => {
                            return Ok(state.give(&self.state, tenant, leave));
                        }
                        Err(_) if Instant::now() >= deadline => return Err(state.full(tenant)),
                        Err(_) => continue,
                    }
                }
            };
            lock(&self.state).told_by(&mut place, leave);
            return Ok(place);
        }
    }
}

impl State {
    fn share(&mut self, tenant: TenantId) -> &mut Share {
        self.tenants.entry(tenant).or_default()
    }

    fn full(&self, tenant: TenantId) -> Full {
        let holds = self.tenants.get(&tenant).is_some_and(|share| !share.held.is_empty());
        if holds { Full::Own } else { Full::All }
    }

    /// Gives a free place away.
    fn give(&mut self, pool: &Arc<Mutex<Self>>, tenant: TenantId, leave: CancellationToken) -> Place {
        let (name, life) = (self.given, Life::begin());
        self.free -= 1;
        self.given += 1;
        let share = self.share(tenant);
        share.served = name;
        share.held.push(Holder { name, life: life.clone(), leave: Some(leave.clone()) });
        Place { state: Arc::clone(pool), tenant, name, life, leave }
    }

    /// Asks for a place back that can be spared for `tenant`; whether there was one.
    fn make_room(&mut self, tenant: TenantId, recall: Recall) -> bool {
        let own = self.tenants.get(&tenant).map_or(0, |share| share.held.len());
        let most =
            self.tenants.iter().filter(|(other, share)| **other != tenant && share.held.len() >= own + 2);
        let most = most.max_by_key(|(_, share)| share.held.len()).map(|(other, _)| *other);
        let asked = |state: &mut Self, whom: Option<TenantId>, after: Option<Duration>| {
            let (Some(whom), Some(after)) = (whom, after) else { return false };
            state.recall(whom, after)
        };
        asked(self, most, recall.others) || asked(self, Some(tenant), recall.own)
    }

    /// Asks back the place of `tenant` that has been quiet longest, if that is as long as `after`.
    fn recall(&mut self, tenant: TenantId, after: Duration) -> bool {
        let Some(share) = self.tenants.get_mut(&tenant) else { return false };
        let quiet = share.held.iter().enumerate().filter(|(_, holder)| holder.leave.is_some());
        let quietest = quiet.max_by_key(|(at, holder)| (holder.life.silence(), usize::MAX - at));
        let Some((at, holder)) = quietest else { return false };
        if holder.life.silence() < after {
            return false;
        }
        if let Some(leave) = &holder.leave {
            leave.cancel();
        }
        share.held.remove(at);
        self.free += 1;
        true
    }

    /// Takes a place back, and hands on what is free. What nobody is there for any more is returned, to be dropped without
    /// the lock.
    fn take_back(&mut self, pool: &Arc<Mutex<Self>>, tenant: TenantId, name: u64) -> Vec<Place> {
        if let Some(share) = self.tenants.get_mut(&tenant)
            && let Some(at) = share.held.iter().position(|holder| holder.name == name)
        {
            share.held.remove(at);
            self.free += 1;
        }
        let mut left_over = Vec::new();
        while self.free > 0 {
            for share in self.tenants.values_mut() {
                while share.waiting.front().is_some_and(|(_, call)| call.is_closed()) {
                    share.waiting.pop_front();
                }
            }
            let waiting = self.tenants.iter().filter(|(_, share)| !share.waiting.is_empty());
            let turn = |share: &Share| {
                (share.held.len(), share.served, share.waiting.front().map(|(number, _)| *number))
            };
            let next = waiting.min_by_key(|(_, share)| turn(share));
            let Some(next) = next.map(|(tenant, _)| *tenant) else { break };
            let call = self.share(next).waiting.pop_front();
            let place = self.give(pool, next, CancellationToken::new());
            if let Some((_, call)) = call
                && let Err(place) = call.send(place)
            {
                left_over.push(place);
            }
        }
        self.tenants.retain(|_, share| !share.held.is_empty() || !share.waiting.is_empty());
        left_over
    }

    /// From now on `leave` tells the holder of a place that it is to be given back.
    fn told_by(&mut self, place: &mut Place, leave: CancellationToken) {
        let held = &mut self.share(place.tenant).held;
        if let Some(holder) = held.iter_mut().find(|holder| holder.name == place.name) {
            holder.leave = Some(leave.clone());
        } else {
            leave.cancel(); // asked back already
        }
        place.leave = leave;
    }
}

impl Place {
    /// Something happened: this place is in use.
    pub(super) fn sign(&self) {
        self.life.sign();
    }

    /// Signs of life, for whoever wants to know.
    pub(super) fn life(&self) -> Life {
        self.life.clone()
    }

    /// Waits until the place is asked back.
    pub(super) async fn asked_back(&self) {
        self.leave.cancelled().await;
    }

    /// From now on it is not asked back.
    pub(super) fn keep(&self) {
        let mut state = lock(&self.state);
        if let Some(holder) = state.share(self.tenant).held.iter_mut().find(|holder| holder.name == self.name)
        {
            holder.leave = None;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let left_over = lock(&self.state).take_back(&self.state, self.tenant, self.name);
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

    async fn take(pool: &Pool, n: u128) -> (Place, CancellationToken) {
        let leave = CancellationToken::new();
        (pool.take_or_leave(tenant(n), leave.clone()).await.expect("a place"), leave)
    }

    #[tokio::test]
    async fn a_place_that_is_given_back_goes_to_the_tenant_with_the_fewest() {
        let pool = Pool::new(3, Recall::NEVER, MS(1000));
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(take(&pool, 1).await); // one tenant may have them all
        }
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = tokio::task::JoinSet::new();
        for n in [1, 1, 1, 2, 2, 3] {
            let (pool, order) = (pool.clone(), Arc::clone(&order));
            waiting.spawn(async move {
                let place = pool.take(tenant(n)).await;
                order.lock().expect("no panic").push((n, place.is_ok()));
                std::mem::forget(place); // it is never given back
            });
            tokio::task::yield_now().await;
        }
        for place in held {
            drop(place);
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
    async fn who_has_most_gives_back_until_all_have_as_many() {
        let pool = Pool::new(6, Recall { others: Some(MS(0)), own: None }, MS(0));
        let mut first = Vec::new();
        for _ in 0..6 {
            first.push(take(&pool, 1).await);
            tokio::time::sleep(MS(5)).await;
        }
        first[0].0.sign();
        let mut second = Vec::new();
        for _ in 0..3 {
            second.push(take(&pool, 2).await);
        }
        let asked: Vec<_> = first.iter().map(|(_, leave)| leave.is_cancelled()).collect();
        assert_eq!(asked, [false, true, true, true, false, false], "the quietest go");
        assert_eq!(pool.take(tenant(2)).await.err(), Some(Full::Own));
        assert_eq!(pool.take(tenant(1)).await.err(), Some(Full::Own));
        let third = [take(&pool, 3).await, take(&pool, 3).await];
        let asked =
            |of: &[(Place, CancellationToken)]| of.iter().filter(|(_, leave)| leave.is_cancelled()).count();
        assert_eq!((asked(&first), asked(&second), asked(&third)), (4, 1, 0));
        drop((first, second, third));
        for n in 1..=6 {
            std::mem::forget(take(&pool, n).await); // each was given back once, and no more
        }
        assert_eq!(pool.take(tenant(7)).await.err(), Some(Full::All));
    }

    #[tokio::test]
    async fn a_place_is_asked_back_from_its_own_tenant_when_it_is_quiet_and_never_when_it_is_kept() {
        let pool = Pool::new(2, Recall { others: Some(MS(100)), own: Some(MS(600)) }, MS(2000));
        let (kept, idle) = (take(&pool, 1).await, take(&pool, 1).await);
        kept.0.keep();
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
        assert_eq!(pool.take(tenant(3)).await.err(), Some(Full::All));
        assert!(!other.1.is_cancelled());
    }

    #[tokio::test]
    async fn one_that_gave_up_waiting_gets_no_place_and_loses_none() {
        let pool = Pool::new(1, Recall::NEVER, MS(5000)).with_waiting(2);
        let held = take(&pool, 1).await;
        for _ in 0..5 {
            let gone = tokio::time::timeout(MS(20), pool.take(tenant(2))).await;
            assert!(gone.is_err());
        }
        let two = [pool.clone(), pool.clone()];
        let two = two.map(|pool| tokio::spawn(async move { pool.take(tenant(2)).await.err() }));
        tokio::time::sleep(MS(50)).await;
        assert_eq!(pool.take(tenant(2)).await.err(), Some(Full::Own), "as many wait as may");
        drop(held);
        for one in two {
            assert_eq!(one.await.expect("no panic"), None);
        }
        assert!(pool.take(tenant(3)).await.is_ok());
    }
}
