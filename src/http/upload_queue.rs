//! The queue of uploads: which may be sent now, whose photos are processed next, and who has to retry, and when.
//!
//! Decoding photos takes long, so few uploads are processed at a time, tenant by tenant. A received upload waits for a
//! processing slot. One that would wait longer than [`WAIT_MAX`] is refused before its body is read, with the time at
//! which to retry; that time is reserved: the reservation counts like a queued upload, and the retry is admitted. An
//! upload that is still being received holds no slot, and once it has stalled it does not count at all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::activity::Activity;
use super::fair_pool::{Exhausted, FairPool, Permit, Revocation};
use super::problem::{Kind, Problem};
use crate::job::{N_PHOTOS_MAX, TenantId};

/// Longest expected wait of an upload that is admitted: a client and the proxies before it wait about a minute.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// With a shorter expected wait, every upload is admitted.
const SHORT_WAIT: Duration = Duration::from_secs(10);
/// How long before its expected turn a refused client is asked to retry.
const RETRY_EARLY: Duration = Duration::from_secs(10);
/// How long a reservation is kept for a client that does not retry.
const RESERVATION_GRACE: Duration = Duration::from_mins(1);
/// Reservations of one tenant.
const RESERVATIONS_MAX: usize = 1000;
/// A longer wait is announced, but not reserved.
const RESERVATION_WAIT_MAX: Duration = Duration::from_hours(1);
/// How long an upload waits for a processing slot when the queue moves slower than expected.
const SLOT_WAIT_MAX: Duration = Duration::from_secs(75);
/// An upload that has sent nothing for this long has stalled, and does not count.
const STALLED: Duration = Duration::from_secs(5);

/// What a photo costs besides its bytes, as bytes.
const PHOTO_OVERHEAD: u64 = 64 << 10;
/// The same for a whole upload.
const UPLOAD_OVERHEAD: u64 = PHOTO_OVERHEAD * N_PHOTOS_MAX as u64;
/// Processing time of a byte until it is measured. Rather too long than too short, for a reservation has to hold.
const INITIAL_SECS_PER_BYTE: f64 = 3e-7;
/// Weight, in processed bytes, that earlier measurements have at most against the next one.
const WEIGHT_MAX: f64 = 64e6;
/// Weight of [`INITIAL_SECS_PER_BYTE`], so that the first upload counts for more.
const INITIAL_WEIGHT: f64 = 8e6;
/// Factor by which the wait announced to a client exceeds the expected one, for others that may come.
const RETRY_MARGIN: f64 = 1.25;

/// The uploads that are being received, queued or processed.
pub(super) struct UploadQueue {
    /// One permit for each upload that is being received, queued or processed; each has its photos on disk.
    uploads: FairPool,
    /// One permit for each upload that is being processed.
    slots: FairPool,
    backlog: Arc<Mutex<Backlog>>,
}

/// All work that is expected, and the measured processing time of a byte.
struct Backlog {
    n_slots: usize,
    secs_per_byte: f64,
    /// Weight of `secs_per_byte` against the next measurement, in bytes.
    weight: f64,
    next_id: u64,
    tenants: HashMap<TenantId, Vec<Entry>>,
}

struct Entry {
    id: u64,
    bytes: u64,
    stage: Stage,
}

enum Stage {
    Receiving(Activity),
    /// Received; waits or is processed.
    Queued,
    /// Its client was told to retry at this time.
    Reserved(Instant),
}

/// A refusal that says when to retry.
#[derive(Debug)]
struct RetryLater {
    wait: Duration,
    cause: Exhausted,
}

impl From<RetryLater> for Problem {
    fn from(refusal: RetryLater) -> Self {
        let (kind, whose) = match refusal.cause {
            Exhausted::ByTenant => (Kind::TooMany, "this tenant's uploads"),
            Exhausted::ByOthers => (Kind::Overloaded, "uploads of other tenants"),
        };
        let detail =
            format!("{whose} are queued before this one for about {} s; retry then", refusal.wait.as_secs());
        Self::new(kind, detail).retry_after(refusal.wait)
    }
}

/// How long an upload is expected to wait.
struct ExpectedWait {
    /// For what is received or queued.
    queued: Duration,
    /// For that and what is reserved.
    with_reserved: Duration,
}

fn lock(backlog: &Mutex<Backlog>) -> MutexGuard<'_, Backlog> {
    backlog.lock().unwrap_or_else(PoisonError::into_inner)
}

impl UploadQueue {
    /// At most `uploads_max` uploads at a time, of which `n_slots` are processed.
    pub(super) fn new(uploads_max: usize, n_slots: usize) -> Self {
        let secs = Duration::from_secs;
        let revocation = Revocation { for_others: Some(secs(1)), for_own: Some(STALLED) };
        let n_slots = n_slots.max(1);
        let slots = FairPool::new(n_slots, Revocation::NEVER, SLOT_WAIT_MAX);
        Self {
            uploads: FairPool::new(uploads_max, revocation, secs(10)),
            slots: slots.with_waiting_max(uploads_max),
            backlog: Arc::new(Mutex::new(Backlog::new(n_slots))),
        }
    }

    /// Admits an upload of `bytes`, or refuses it with the time at which to retry.
    pub(super) async fn admit(&self, tenant: TenantId, bytes: u64) -> Result<AdmittedUpload, Problem> {
        let bytes = bytes + UPLOAD_OVERHEAD;
        let id = lock(&self.backlog).admit(tenant, bytes, Instant::now())?;
        let entry = EntryGuard { backlog: Arc::clone(&self.backlog), tenant, id };
        match self.uploads.acquire(tenant).await {
            Ok(permit) => {
                lock(&self.backlog).set_stage(tenant, entry.id, Stage::Receiving(permit.activity()));
                Ok(AdmittedUpload { permit, entry, slots: self.slots.clone(), bytes })
            }
            Err(cause) => {
                drop(entry);
                Err(lock(&self.backlog).refuse(tenant, bytes, cause, Instant::now()).into())
            }
        }
    }
}

/// An upload that may be sent.
pub(super) struct AdmittedUpload {
    permit: Permit,
    entry: EntryGuard,
    slots: FairPool,
    bytes: u64,
}

impl AdmittedUpload {
    /// To be touched whenever something is received.
    pub(super) fn activity(&self) -> Activity {
        self.permit.activity()
    }

    /// Waits until the upload has to end because others need its permit, and says so.
    pub(super) async fn revoked(&self) -> Problem {
        self.permit.revoked().await;
        let wait = lock(&self.entry.backlog).retry_wait(self.entry.tenant, self.bytes);
        let detail = "the upload stalled while others waited to send theirs";
        Problem::new(Kind::TooMany, detail).retry_after(wait)
    }

    /// The upload has been received, with so many bytes: waits for a processing slot.
    pub(super) async fn wait_for_slot(self, bytes: u64) -> Result<ProcessingSlot, Problem> {
        let Self { permit, entry, slots, .. } = self;
        permit.make_irrevocable();
        let bytes = bytes + UPLOAD_OVERHEAD;
        {
            let mut backlog = lock(&entry.backlog);
            backlog.set_stage(entry.tenant, entry.id, Stage::Queued);
            backlog.set_bytes(entry.tenant, entry.id, bytes);
        }
        match slots.acquire(entry.tenant).await {
            Ok(slot) => Ok(ProcessingSlot {
                _slot: slot,
                _upload: permit,
                entry,
                photo_started: Instant::now(),
                bytes,
            }),
            Err(cause) => {
                let (tenant, backlog) = (entry.tenant, Arc::clone(&entry.backlog));
                drop(entry);
                Err(lock(&backlog).refuse(tenant, bytes, cause, Instant::now()).into())
            }
        }
    }
}

/// An upload is processed while this is held.
pub(super) struct ProcessingSlot {
    _slot: Permit,
    _upload: Permit,
    entry: EntryGuard,
    photo_started: Instant,
    bytes: u64,
}

impl ProcessingSlot {
    /// A photo of so many bytes is done: it took the time since the last one.
    pub(super) fn photo_done(&mut self, bytes: u64) {
        let secs = self.photo_started.elapsed().as_secs_f64();
        self.photo_started = Instant::now();
        self.bytes = self.bytes.saturating_sub(bytes);
        let mut backlog = lock(&self.entry.backlog);
        backlog.record_time(bytes + PHOTO_OVERHEAD, secs);
        backlog.set_bytes(self.entry.tenant, self.entry.id, self.bytes);
    }
}

/// An entry of the backlog; removed when this is dropped.
struct EntryGuard {
    backlog: Arc<Mutex<Backlog>>,
    tenant: TenantId,
    id: u64,
}

impl Drop for EntryGuard {
    fn drop(&mut self) {
        lock(&self.backlog).remove(self.tenant, self.id);
    }
}

impl Backlog {
    fn new(n_slots: usize) -> Self {
        let (secs_per_byte, weight) = (INITIAL_SECS_PER_BYTE, INITIAL_WEIGHT);
        Self { n_slots, secs_per_byte, weight, next_id: 0, tenants: HashMap::new() }
    }

    /// Adds an upload, or a reservation for it.
    fn admit(&mut self, tenant: TenantId, bytes: u64, now: Instant) -> Result<u64, RetryLater> {
        self.remove_expired_reservations(now);
        let was_reserved = self.use_reservation(tenant, now);
        let expected = self.expected_wait(tenant, bytes);
        if was_reserved || expected.queued <= SHORT_WAIT || expected.with_reserved <= WAIT_MAX {
            return Ok(self.add(tenant, bytes, Stage::Receiving(Activity::new())));
        }
        let has_own = self.tenants.get(&tenant).is_some_and(|entries| !entries.is_empty());
        let cause = if has_own { Exhausted::ByTenant } else { Exhausted::ByOthers };
        Err(self.refuse(tenant, bytes, cause, now))
    }

    /// How long a client is asked to wait before it retries.
    fn retry_wait(&self, tenant: TenantId, bytes: u64) -> Duration {
        let expected = self.expected_wait(tenant, bytes).with_reserved;
        let wait = expected.mul_f64(RETRY_MARGIN).saturating_sub(RETRY_EARLY);
        Duration::from_secs(wait.as_secs() + 1)
    }

    /// Refuses an upload, and reserves the time at which its client is to retry.
    fn refuse(&mut self, tenant: TenantId, bytes: u64, cause: Exhausted, now: Instant) -> RetryLater {
        let wait = self.retry_wait(tenant, bytes);
        let n_reserved = self.tenants.get(&tenant).map_or(0, |entries| {
            entries.iter().filter(|entry| matches!(entry.stage, Stage::Reserved(_))).count()
        });
        if wait <= RESERVATION_WAIT_MAX && n_reserved < RESERVATIONS_MAX {
            self.add(tenant, bytes, Stage::Reserved(now + wait));
        }
        RetryLater { wait, cause }
    }

    /// The time until an upload that comes now is processed: all of the tenant's own goes before it, and of every other
    /// tenant as much, for they take turns.
    fn expected_wait(&self, tenant: TenantId, bytes: u64) -> ExpectedWait {
        let sum = |entries: &[Entry], with_reserved: bool| -> u64 {
            let counts = |entry: &&Entry| match &entry.stage {
                Stage::Receiving(activity) => activity.idle() < STALLED,
                Stage::Queued => true,
                Stage::Reserved(_) => with_reserved,
            };
            entries.iter().filter(counts).map(|entry| entry.bytes).sum()
        };
        let time = |with_reserved: bool| {
            let own = self.tenants.get(&tenant).map_or(0, |entries| sum(entries, with_reserved));
            let others = self.tenants.iter().filter(|(other, _)| **other != tenant);
            let others: u64 = others.map(|(_, entries)| sum(entries, with_reserved).min(own + bytes)).sum();
            let secs = (own + others) as f64 * self.secs_per_byte / self.n_slots as f64;
            Duration::from_secs_f64(secs.clamp(0.0, 86_400.0))
        };
        ExpectedWait { queued: time(false), with_reserved: time(true) }
    }

    /// Removes a reservation of the tenant that is due; whether there was one.
    fn use_reservation(&mut self, tenant: TenantId, now: Instant) -> bool {
        let Some(entries) = self.tenants.get_mut(&tenant) else { return false };
        // Clients count whole seconds from when they receive the answer.
        let due =
            |entry: &Entry| matches!(entry.stage, Stage::Reserved(at) if at <= now + Duration::from_secs(1));
        let Some(at) = entries.iter().position(due) else { return false };
        entries.remove(at);
        true
    }

    fn remove_expired_reservations(&mut self, now: Instant) {
        let expired =
            |entry: &Entry| matches!(entry.stage, Stage::Reserved(at) if at + RESERVATION_GRACE < now);
        self.tenants.values_mut().for_each(|entries| entries.retain(|entry| !expired(entry)));
        self.tenants.retain(|_, entries| !entries.is_empty());
    }

    fn add(&mut self, tenant: TenantId, bytes: u64, stage: Stage) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.tenants.entry(tenant).or_default().push(Entry { id, bytes, stage });
        id
    }

    fn entry(&mut self, tenant: TenantId, id: u64) -> Option<&mut Entry> {
        self.tenants.get_mut(&tenant)?.iter_mut().find(|entry| entry.id == id)
    }

    fn set_stage(&mut self, tenant: TenantId, id: u64, stage: Stage) {
        if let Some(entry) = self.entry(tenant, id) {
            entry.stage = stage;
        }
    }

    fn set_bytes(&mut self, tenant: TenantId, id: u64, bytes: u64) {
        if let Some(entry) = self.entry(tenant, id) {
            entry.bytes = bytes;
        }
    }

    fn remove(&mut self, tenant: TenantId, id: u64) {
        if let Some(entries) = self.tenants.get_mut(&tenant) {
            entries.retain(|entry| entry.id != id);
        }
    }

    /// Updates the processing time of a byte: a running mean, weighted by bytes.
    fn record_time(&mut self, bytes: u64, secs: f64) {
        let bytes = bytes as f64;
        let share = bytes / (self.weight + bytes);
        self.secs_per_byte += share * (secs / bytes - self.secs_per_byte);
        self.weight = (self.weight + bytes).min(WEIGHT_MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const MB: u64 = 1_000_000;

    fn tenant(n: u128) -> TenantId {
        TenantId(uuid::Uuid::from_u128(n))
    }

    /// A client's upload: when it was done, how long it took once admitted, how often it was refused before.
    #[derive(Clone, Copy, Debug)]
    struct Done {
        at: Duration,
        took: Duration,
        n_refused: usize,
    }

    /// Simulates clients that come at some time with an upload of so many bytes, and a server that takes
    /// `secs_per_byte` to process them. A refused client retries at the announced time.
    fn serve(backlog: &mut Backlog, clients: &[(TenantId, Duration, u64)], secs_per_byte: f64) -> Vec<Done> {
        let zero = Instant::now();
        let mut coming: Vec<_> = clients.iter().enumerate().map(|(n, client)| (client.1, n)).collect();
        let mut n_refused = vec![0; clients.len()];
        let mut queue: VecDeque<(usize, u64, Duration)> = VecDeque::new();
        let mut working: Vec<(Duration, usize, u64, Duration)> = Vec::new();
        let mut done = vec![None; clients.len()];
        let step = Duration::from_millis(100);
        let mut now = Duration::ZERO;
        while done.iter().any(Option::is_none) {
            let ended: Vec<_> = working.iter().copied().filter(|work| work.0 <= now).collect();
            working.retain(|work| work.0 > now);
            for (at, n, id, admitted) in ended {
                let (whose, _, bytes) = clients[n];
                backlog.record_time(bytes + UPLOAD_OVERHEAD, bytes as f64 * secs_per_byte);
                backlog.remove(whose, id);
                done[n] = Some(Done { at, took: at.saturating_sub(admitted), n_refused: n_refused[n] });
            }
            coming.sort_unstable();
            while let Some(&(at, n)) = coming.first().filter(|(at, _)| *at <= now) {
                coming.remove(0);
                let (whose, _, bytes) = clients[n];
                match backlog.admit(whose, bytes + UPLOAD_OVERHEAD, zero + at) {
                    Ok(id) => {
                        backlog.set_stage(whose, id, Stage::Queued);
                        queue.push_back((n, id, at));
                    }
                    Err(refusal) => {
                        n_refused[n] += 1;
                        coming.push((at + refusal.wait, n));
                    }
                }
            }
            while working.len() < backlog.n_slots && !queue.is_empty() {
                // As the pool of slots does: the tenant that holds the fewest.
                let n_held =
                    |n: usize| working.iter().filter(|work| clients[work.1].0 == clients[n].0).count();
                let next = (0..queue.len()).min_by_key(|&at| n_held(queue[at].0)).expect("one");
                let (n, id, admitted) = queue.remove(next).expect("one");
                let end = now + Duration::from_secs_f64(clients[n].2 as f64 * secs_per_byte);
                working.push((end, n, id, admitted));
            }
            now += step;
        }
        done.into_iter().flatten().collect()
    }

    #[test]
    fn a_retry_time_holds_and_no_wait_lasts_longer_than_a_minute() {
        let secs = Duration::from_secs;
        let many = vec![(tenant(1), Duration::ZERO, 73 * MB); 50];
        // The time as it was measured, and slower and faster than that: photos differ.
        for secs_per_byte in [0.5e-7, 1.4e-7, 1.7e-7] {
            let mut backlog = Backlog::new(2);
            for _ in 0..10 {
                backlog.record_time(73 * MB, 73e6 * 1.4e-7);
            }
            let done = serve(&mut backlog, &many, secs_per_byte);
            assert!(done.iter().all(|one| one.n_refused <= 1), "{secs_per_byte}: {done:?}");
            assert!(done.iter().all(|one| one.took < secs(60)), "{secs_per_byte}: {done:?}");
            let work = Duration::from_secs_f64(50.0 * 73e6 * secs_per_byte.max(1.4e-7) / 2.0);
            let all = done.iter().map(|one| one.at).max().expect("fifty");
            assert!(all < work.mul_f64(1.5) + secs(20), "{secs_per_byte}: the server is kept busy: {all:?}");
        }
        // Just started: nothing was measured yet.
        let done = serve(&mut Backlog::new(2), &many, 2.5e-7);
        assert!(done.iter().all(|one| one.n_refused <= 1 && one.took < secs(75)), "{done:?}");
    }

    #[test]
    fn another_tenant_is_admitted_at_once_however_many_uploads_are_queued() {
        let mut backlog = Backlog::new(2);
        let mut clients = vec![(tenant(1), Duration::ZERO, 73 * MB); 50];
        for n in 0..5 {
            clients.push((tenant(2), Duration::from_secs(3 + 40 * n), 73 * MB));
        }
        let done = serve(&mut backlog, &clients, 1.4e-7);
        for one in &done[50..] {
            assert!(one.n_refused == 0 && one.took < Duration::from_secs(35), "{one:?}");
        }
        // And a reservation counts for its own tenant only.
        let mut backlog = Backlog::new(2);
        for _ in 0..30 {
            let _ = backlog.admit(tenant(1), 73 * MB, Instant::now());
        }
        assert!(backlog.admit(tenant(1), 73 * MB, Instant::now()).is_err());
        assert!(backlog.admit(tenant(2), 73 * MB, Instant::now()).is_ok());
    }

    #[test]
    fn small_uploads_are_admitted_and_unused_reservations_expire() {
        let now = Instant::now();
        let mut backlog = Backlog::new(2);
        let small =
            (0..60).filter(|_| backlog.admit(tenant(1), UPLOAD_OVERHEAD + 20_000, now).is_ok()).count();
        assert_eq!(small, 60);
        let mut backlog = Backlog::new(2);
        let refusals: Vec<_> =
            (0..200).filter_map(|_| backlog.admit(tenant(1), 73 * MB, now).err()).collect();
        assert!(
            refusals.len() > 190 && refusals.windows(2).all(|pair| pair[0].wait < pair[1].wait),
            "they come one by one"
        );
        assert!(refusals.iter().all(|refusal| refusal.cause == Exhausted::ByTenant));
        let ids: Vec<_> = backlog.tenants[&tenant(1)].iter().map(|entry| entry.id).collect();
        let n_admitted = 200 - refusals.len();
        ids.into_iter().take(n_admitted).for_each(|id| backlog.remove(tenant(1), id));
        let later = now + refusals.last().expect("some").wait + RESERVATION_GRACE + Duration::from_secs(1);
        assert!(backlog.admit(tenant(1), 73 * MB, later).is_ok());
        assert_eq!(backlog.tenants[&tenant(1)].len(), 1);
    }

    #[test]
    fn a_stalled_upload_does_not_count() {
        let mut backlog = Backlog::new(2);
        backlog.admit(tenant(1), 500 * MB, Instant::now()).expect("the first");
        assert!(backlog.expected_wait(tenant(1), MB).queued > WAIT_MAX);
        std::thread::sleep(STALLED);
        assert_eq!(backlog.expected_wait(tenant(1), MB).queued, Duration::ZERO);
        assert!(backlog.admit(tenant(1), 73 * MB, Instant::now()).is_ok());
    }

    #[test]
    fn the_time_of_a_byte_is_a_mean_weighted_by_bytes() {
        let mut backlog = Backlog::new(1);
        backlog.record_time(10_000, 1.0);
        assert!(
            backlog.secs_per_byte < 1e-5,
            "a small measurement counts for little: {}",
            backlog.secs_per_byte
        );
        backlog.record_time(640 * MB, 64.0);
        assert!((backlog.secs_per_byte / 1e-7 - 1.0).abs() < 0.1, "{}", backlog.secs_per_byte);
    }
}
