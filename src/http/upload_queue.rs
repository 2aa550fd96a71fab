//! The line of uploads: who may send one now, whose photos are worked on next, and who is told to come back, and when.
//!
//! Decoding is what takes long, so few uploads are worked on at a time, tenant by tenant. One that has come whole waits
//! for its turn; one that would wait for more than [`WAIT_MAX`] is refused before its body is read, with the time to
//! come back at, and is let in then: what was promised counts as if it stood in the line already. One that is still
//! being sent holds no turn, and once it is silent it does not count at all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::activity::Life;
use super::fair_pool::{Full, Place, Pool, Recall};
use super::problem::{Kind, Problem};
use crate::job::{N_PHOTOS_MAX, TenantId};

/// Longest wait in the line that is begun: a client and the proxies before it wait about a minute.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// A line that is shorter lets in whoever comes.
const SHORT: Duration = Duration::from_secs(10);
/// How long before its turn one that was told to come back is asked to be there.
const EARLY: Duration = Duration::from_secs(10);
/// How long a promise is kept for one that does not come.
const KEPT: Duration = Duration::from_mins(1);
/// Promises of one tenant.
const PROMISES_MAX: usize = 1000;
/// A longer wait is not promised, only said.
const PROMISE_MAX: Duration = Duration::from_hours(1);
/// The line moves slower than was foreseen: it is left.
const PATIENCE: Duration = Duration::from_secs(75);
/// Silent for so long, what is being sent does not count.
const SILENT: Duration = Duration::from_secs(5);

/// What a photo takes beside its bytes, as bytes.
const EACH_PHOTO: u64 = 64 << 10;
/// The same of a whole upload.
const EACH: u64 = EACH_PHOTO * N_PHOTOS_MAX as u64;
/// How long a byte takes until that is measured. Rather too long than too short, for a promise has to hold.
const SECS_PER_BYTE: f64 = 3e-7;
/// Bytes of work that the pace is learned from: what was measured before counts as no more.
const MEMORY: f64 = 64e6;
/// The same of the pace that nothing was measured for: the first upload says more.
const MEMORY_AT_FIRST: f64 = 8e6;
/// What is added to a wait that is promised, for others that may come.
const MARGIN: f64 = 1.25;

/// The line.
pub(super) struct Line {
    /// Uploads that are on their way or in the line; each has its photos on disk.
    places: Pool,
    turns: Pool,
    book: Arc<Mutex<Book>>,
}

/// All that is to be worked on, and the pace.
struct Book {
    n_turns: usize,
    secs_per_byte: f64,
    /// Bytes of work that this was learned from.
    learned_from: f64,
    names: u64,
    tenants: HashMap<TenantId, Vec<Entry>>,
}

struct Entry {
    name: u64,
    bytes: u64,
    stage: Stage,
}

enum Stage {
    /// It is being sent.
    Coming(Life),
    /// It is there.
    Whole,
    /// Its client was told to come back.
    Promised(Instant),
}

/// What a client is told that is to come back.
#[derive(Debug)]
struct Told {
    wait: Duration,
    full: Full,
}

impl From<Told> for Problem {
    fn from(told: Told) -> Self {
        let (kind, whose) = match told.full {
            Full::Own => (Kind::TooMany, "this tenant's uploads"),
            Full::All => (Kind::Overloaded, "uploads of others"),
        };
        let detail =
            format!("{whose} before this one take about {} s; send it again then", told.wait.as_secs());
        Self::new(kind, detail).after(told.wait)
    }
}

/// What stands before an upload.
struct Ahead {
    /// In the line.
    line: Duration,
    /// In the line and promised.
    all: Duration,
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Line {
    /// At most `max` uploads on their way or in the line, and `n_turns` worked on at a time.
    pub(super) fn new(max: usize, n_turns: usize) -> Self {
        let secs = Duration::from_secs;
        let recall = Recall { others: Some(secs(1)), own: Some(SILENT) };
        let n_turns = n_turns.max(1);
        Self {
            places: Pool::new(max, recall, secs(10)),
            turns: Pool::new(n_turns, Recall::NEVER, PATIENCE).with_waiting(max),
            book: Arc::new(Mutex::new(Book::new(n_turns))),
        }
    }

    /// Lets an upload of `bytes` in, or says when to come back.
    pub(super) async fn admit(&self, tenant: TenantId, bytes: u64) -> Result<Admitted, Problem> {
        let bytes = bytes + EACH;
        let entry = lock(&self.book).admit(tenant, bytes, Instant::now())?;
        let entry = Booked { book: Arc::clone(&self.book), tenant, name: entry };
        match self.places.take(tenant).await {
            Ok(place) => {
                lock(&self.book).set(tenant, entry.name, Stage::Coming(place.life()));
                Ok(Admitted { place, entry, turns: self.turns.clone(), bytes })
            }
            Err(full) => {
                drop(entry);
                Err(lock(&self.book).promise(tenant, bytes, full, Instant::now()).into())
            }
        }
    }
}

/// An upload that may be sent.
pub(super) struct Admitted {
    place: Place,
    entry: Booked,
    turns: Pool,
    bytes: u64,
}

impl Admitted {
    /// To be told of all that comes.
    pub(super) fn life(&self) -> Life {
        self.place.life()
    }

    /// Waits until the place is needed by others, and why this upload ends then.
    pub(super) async fn asked_back(&self) -> Problem {
        self.place.asked_back().await;
        let wait = lock(&self.entry.book).wait(self.entry.tenant, self.bytes);
        Problem::new(Kind::TooMany, "nothing more came, and others waited to send").after(wait)
    }

    /// The upload has come, with so many bytes: waits for its turn.
    pub(super) async fn turn(self, bytes: u64) -> Result<Turn, Problem> {
        let Self { place, entry, turns, .. } = self;
        place.keep();
        let bytes = bytes + EACH;
        {
            let mut book = lock(&entry.book);
            book.set(entry.tenant, entry.name, Stage::Whole);
            book.resize(entry.tenant, entry.name, bytes);
        }
        match turns.take(entry.tenant).await {
            Ok(turn) => Ok(Turn { _turn: turn, _place: place, entry, began: Instant::now(), bytes }),
            Err(full) => {
                let (tenant, book) = (entry.tenant, Arc::clone(&entry.book));
                drop(entry);
                Err(lock(&book).promise(tenant, bytes, full, Instant::now()).into())
            }
        }
    }
}

/// An upload that is worked on, until this is dropped.
pub(super) struct Turn {
    _turn: Place,
    _place: Place,
    entry: Booked,
    began: Instant,
    bytes: u64,
}

impl Turn {
    /// A photo of so many bytes is done: it took the time since the last one.
    pub(super) fn done(&mut self, bytes: u64) {
        let secs = self.began.elapsed().as_secs_f64();
        self.began = Instant::now();
        self.bytes = self.bytes.saturating_sub(bytes);
        let mut book = lock(&self.entry.book);
        book.learn(bytes + EACH_PHOTO, secs);
        book.resize(self.entry.tenant, self.entry.name, self.bytes);
    }
}

/// An entry of the book, which goes with this.
struct Booked {
    book: Arc<Mutex<Book>>,
    tenant: TenantId,
    name: u64,
}

impl Drop for Booked {
    fn drop(&mut self) {
        lock(&self.book).strike(self.tenant, self.name);
    }
}

impl Book {
    fn new(n_turns: usize) -> Self {
        let (secs_per_byte, learned_from) = (SECS_PER_BYTE, MEMORY_AT_FIRST);
        Self { n_turns, secs_per_byte, learned_from, names: 0, tenants: HashMap::new() }
    }

    /// Writes an upload down, or when it may come back.
    fn admit(&mut self, tenant: TenantId, bytes: u64, now: Instant) -> Result<u64, Told> {
        self.forget_promises(now);
        let kept = self.keep_promise(tenant, now);
        let Ahead { line, all } = self.ahead(tenant, bytes);
        if kept || line <= SHORT || all <= WAIT_MAX {
            return Ok(self.write(tenant, bytes, Stage::Coming(Life::begin())));
        }
        let has_own = self.tenants.get(&tenant).is_some_and(|entries| !entries.is_empty());
        let full = if has_own { Full::Own } else { Full::All };
        Err(self.promise(tenant, bytes, full, now))
    }

    /// How long a client is asked to wait before it sends again.
    fn wait(&self, tenant: TenantId, bytes: u64) -> Duration {
        let wait = self.ahead(tenant, bytes).all.mul_f64(MARGIN).saturating_sub(EARLY);
        Duration::from_secs(wait.as_secs() + 1)
    }

    /// Tells a client when to come back, and remembers it.
    fn promise(&mut self, tenant: TenantId, bytes: u64, full: Full, now: Instant) -> Told {
        let wait = self.wait(tenant, bytes);
        let promised = self.tenants.get(&tenant).map_or(0, |entries| {
            entries.iter().filter(|entry| matches!(entry.stage, Stage::Promised(_))).count()
        });
        if wait <= PROMISE_MAX && promised < PROMISES_MAX {
            self.write(tenant, bytes, Stage::Promised(now + wait));
        }
        Told { wait, full }
    }

    /// The time that passes before an upload is worked on that comes now: all of the tenant's own goes before it, and
    /// of every other tenant as much, for they take turns.
    fn ahead(&self, tenant: TenantId, bytes: u64) -> Ahead {
        let sum = |entries: &[Entry], promised: bool| -> u64 {
            let counts = |entry: &&Entry| match &entry.stage {
                Stage::Coming(life) => life.silence() < SILENT,
                Stage::Whole => true,
                Stage::Promised(_) => promised,
            };
            entries.iter().filter(counts).map(|entry| entry.bytes).sum()
        };
        let time = |promised: bool| {
            let own = self.tenants.get(&tenant).map_or(0, |entries| sum(entries, promised));
            let others = self.tenants.iter().filter(|(other, _)| **other != tenant);
            let others: u64 = others.map(|(_, entries)| sum(entries, promised).min(own + bytes)).sum();
            let secs = (own + others) as f64 * self.secs_per_byte / self.n_turns as f64;
            Duration::from_secs_f64(secs.clamp(0.0, 86_400.0))
        };
        Ahead { line: time(false), all: time(true) }
    }

    /// Whether the tenant was promised to be let in by now. A promise is kept once.
    fn keep_promise(&mut self, tenant: TenantId, now: Instant) -> bool {
        let Some(entries) = self.tenants.get_mut(&tenant) else { return false };
        // Clients count whole seconds from when they hear.
        let due =
            |entry: &Entry| matches!(entry.stage, Stage::Promised(at) if at <= now + Duration::from_secs(1));
        let Some(at) = entries.iter().position(due) else { return false };
        entries.remove(at);
        true
    }

    fn forget_promises(&mut self, now: Instant) {
        let over = |entry: &Entry| matches!(entry.stage, Stage::Promised(at) if at + KEPT < now);
        self.tenants.values_mut().for_each(|entries| entries.retain(|entry| !over(entry)));
        self.tenants.retain(|_, entries| !entries.is_empty());
    }

    fn write(&mut self, tenant: TenantId, bytes: u64, stage: Stage) -> u64 {
        let name = self.names;
        self.names += 1;
        self.tenants.entry(tenant).or_default().push(Entry { name, bytes, stage });
        name
    }

    fn entry(&mut self, tenant: TenantId, name: u64) -> Option<&mut Entry> {
        self.tenants.get_mut(&tenant)?.iter_mut().find(|entry| entry.name == name)
    }

    fn set(&mut self, tenant: TenantId, name: u64, stage: Stage) {
        if let Some(entry) = self.entry(tenant, name) {
            entry.stage = stage;
        }
    }

    fn resize(&mut self, tenant: TenantId, name: u64, bytes: u64) {
        if let Some(entry) = self.entry(tenant, name) {
            entry.bytes = bytes;
        }
    }

    fn strike(&mut self, tenant: TenantId, name: u64) {
        if let Some(entries) = self.tenants.get_mut(&tenant) {
            entries.retain(|entry| entry.name != name);
        }
    }

    /// The pace is what was measured last, the more so the more work it was.
    fn learn(&mut self, bytes: u64, secs: f64) {
        let bytes = bytes as f64;
        let weight = bytes / (self.learned_from + bytes);
        self.secs_per_byte += weight * (secs / bytes - self.secs_per_byte);
        self.learned_from = (self.learned_from + bytes).min(MEMORY);
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

    /// What became of a client: when its upload was done, how long it took from when it was let in, how often it was told to
    /// come back.
    #[derive(Clone, Copy, Debug)]
    struct Done {
        at: Duration,
        took: Duration,
        told: usize,
    }

    /// Clients that come at some time with an upload of so many bytes, to a server whose workers take `pace` seconds for a
    /// byte. Whoever is told to come back does so.
    fn serve(book: &mut Book, clients: &[(TenantId, Duration, u64)], pace: f64) -> Vec<Done> {
        let zero = Instant::now();
        let mut coming: Vec<_> = clients.iter().enumerate().map(|(n, client)| (client.1, n)).collect();
        let mut told = vec![0; clients.len()];
        let mut line: VecDeque<(usize, u64, Duration)> = VecDeque::new();
        let mut working: Vec<(Duration, usize, u64, Duration)> = Vec::new();
        let mut done = vec![None; clients.len()];
        let step = Duration::from_millis(100);
        let mut now = Duration::ZERO;
        while done.iter().any(Option::is_none) {
            let ended: Vec<_> = working.iter().copied().filter(|work| work.0 <= now).collect();
            working.retain(|work| work.0 > now);
            for (at, n, name, since) in ended {
                let (whose, _, bytes) = clients[n];
                book.learn(bytes + EACH, bytes as f64 * pace);
                book.strike(whose, name);
                done[n] = Some(Done { at, took: at.saturating_sub(since), told: told[n] });
            }
            coming.sort_unstable();
            while let Some(&(at, n)) = coming.first().filter(|(at, _)| *at <= now) {
                coming.remove(0);
                let (whose, _, bytes) = clients[n];
                match book.admit(whose, bytes + EACH, zero + at) {
                    Ok(name) => {
                        book.set(whose, name, Stage::Whole);
                        line.push_back((n, name, at));
                    }
                    Err(wait) => {
                        told[n] += 1;
                        coming.push((at + wait.wait, n));
                    }
                }
            }
            while working.len() < book.n_turns && !line.is_empty() {
                // As the pool of turns does: the tenant with the fewest at work.
                let at_work =
                    |n: usize| working.iter().filter(|work| clients[work.1].0 == clients[n].0).count();
                let next = (0..line.len()).min_by_key(|&at| at_work(line[at].0)).expect("one");
                let (n, name, since) = line.remove(next).expect("one");
                let end = now + Duration::from_secs_f64(clients[n].2 as f64 * pace);
                working.push((end, n, name, since));
            }
            now += step;
        }
        done.into_iter().flatten().collect()
    }

    #[test]
    fn a_wait_that_is_told_holds_and_none_lasts_longer_than_a_minute() {
        let secs = Duration::from_secs;
        let many = vec![(tenant(1), Duration::ZERO, 73 * MB); 50];
        // The pace as it is believed, and slower and faster than that: cameras' photos differ.
        for pace in [0.5e-7, 1.4e-7, 1.7e-7] {
            let mut book = Book::new(2);
            for _ in 0..10 {
                book.learn(73 * MB, 73e6 * 1.4e-7);
            }
            let done = serve(&mut book, &many, pace);
            assert!(done.iter().all(|one| one.told <= 1), "{pace}: {done:?}");
            assert!(done.iter().all(|one| one.took < secs(60)), "{pace}: {done:?}");
            let work = Duration::from_secs_f64(50.0 * 73e6 * pace.max(1.4e-7) / 2.0);
            let all = done.iter().map(|one| one.at).max().expect("fifty");
            assert!(all < work.mul_f64(1.5) + secs(20), "{pace}: the server is kept busy: {all:?}");
        }
        // One that has just started, and knows no pace.
        let done = serve(&mut Book::new(2), &many, 2.5e-7);
        assert!(done.iter().all(|one| one.told <= 1 && one.took < secs(75)), "{done:?}");
    }

    #[test]
    fn another_tenant_is_let_in_at_once_however_many_stand_in_line() {
        let mut book = Book::new(2);
        let mut clients = vec![(tenant(1), Duration::ZERO, 73 * MB); 50];
        for n in 0..5 {
            clients.push((tenant(2), Duration::from_secs(3 + 40 * n), 73 * MB));
        }
        let done = serve(&mut book, &clients, 1.4e-7);
        for one in &done[50..] {
            assert!(one.told == 0 && one.took < Duration::from_secs(35), "{one:?}");
        }
        // And a promise counts for its own tenant only.
        let mut book = Book::new(2);
        for _ in 0..30 {
            let _ = book.admit(tenant(1), 73 * MB, Instant::now());
        }
        assert!(book.admit(tenant(1), 73 * MB, Instant::now()).is_err());
        assert!(book.admit(tenant(2), 73 * MB, Instant::now()).is_ok());
    }

    #[test]
    fn small_uploads_pass_and_promises_that_nobody_keeps_are_forgotten() {
        let now = Instant::now();
        let mut book = Book::new(2);
        let small = (0..60).filter(|_| book.admit(tenant(1), EACH + 20_000, now).is_ok()).count();
        assert_eq!(small, 60);
        let mut book = Book::new(2);
        let told: Vec<_> = (0..200).filter_map(|_| book.admit(tenant(1), 73 * MB, now).err()).collect();
        assert!(
            told.len() > 190 && told.windows(2).all(|pair| pair[0].wait < pair[1].wait),
            "they come one by one"
        );
        assert!(told.iter().all(|told| told.full == Full::Own));
        let names: Vec<_> = book.tenants[&tenant(1)].iter().map(|entry| entry.name).collect();
        let let_in = 200 - told.len();
        names.into_iter().take(let_in).for_each(|name| book.strike(tenant(1), name));
        let later = now + told.last().expect("some").wait + KEPT + Duration::from_secs(1);
        assert!(book.admit(tenant(1), 73 * MB, later).is_ok());
        assert_eq!(book.tenants[&tenant(1)].len(), 1);
    }

    #[test]
    fn what_is_silent_does_not_count() {
        let mut book = Book::new(2);
        book.admit(tenant(1), 500 * MB, Instant::now()).expect("the first");
        assert!(book.ahead(tenant(1), MB).line > WAIT_MAX);
        std::thread::sleep(SILENT);
        assert_eq!(book.ahead(tenant(1), MB).line, Duration::ZERO);
        assert!(book.admit(tenant(1), 73 * MB, Instant::now()).is_ok());
    }

    #[test]
    fn the_pace_is_what_much_work_says() {
        let mut book = Book::new(1);
        book.learn(10_000, 1.0);
        assert!(
            book.secs_per_byte < 1e-5,
            "one that waited for something else says little: {}",
            book.secs_per_byte
        );
        book.learn(640 * MB, 64.0);
        assert!((book.secs_per_byte / 1e-7 - 1.0).abs() < 0.1, "{}", book.secs_per_byte);
    }
}
