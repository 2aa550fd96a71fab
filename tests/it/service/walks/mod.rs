//! Random walks of the whole service over real SQL, in which every statement and every use of the object store may fail
//! before it, lose its answer, or be carried out when its caller has long given up, and any process may die or freeze.
//!
//! What runs is the service's own code: HTTP servers behind their router, workers with scripted engines, maintenance
//! and sweeps, each on connections of its own and with its own client of one object store. Every call of theirs waits
//! at a gate, and the walk lets one of them go on at a time, chosen at random; so a seed replays a walk. The clock is
//! the walk's own.
//!
//! ```text
//! walk        one walk, from its first process to its last check     conditions  how often what goes wrong
//! choose      what could happen next                                 act         what happens
//! world       the clock, the gates, calls that are carried out late  idle        when nothing moves by itself
//! database    both databases, and their time                         bucket      the object store
//! client      requests, and what their answers said                  pace        a device, step by step
//! invariants  what must be true                                      random      numbers that a seed decides
//! ```

mod act;
mod bucket;
mod choose;
mod client;
mod conditions;
mod database;
mod idle;
mod invariants;
mod pace;
mod random;
mod walk;
mod world;

use std::time::Instant;

use database::{Database, Kind, in_memory};
use idle::Idle;
use walk::{Failed, walk};
use world::Counts;

/// Actions that are shown before a failure.
const N_ACTIONS_SHOWN: usize = 80;
/// Failures after which there are no further walks.
const N_FAILED: u64 = 10;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var_os(name)?;
    Some(
        value
            .to_str()
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("{name}: wanted a number")),
    )
}

/// All processes of a walk run in one thread, one inside the other where a future is polled: built without
/// optimizations that takes more than a test's own thread has.
const STACK_BYTES: usize = 64 << 20;

fn on_a_large_stack(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(work).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// `n` walks, or as many as `HYPNOS_TEST_WALKS` says, from seed `HYPNOS_TEST_WALKS_FROM` on; or only the one of seed
/// `HYPNOS_TEST_WALK`, with every action printed. Goes on after a failure, to see whether it is one of many.
fn walks(kind: Kind, n: u64) {
    let one = number("HYPNOS_TEST_WALK");
    let from = one.or_else(|| number("HYPNOS_TEST_WALKS_FROM")).unwrap_or(0);
    let n = if one.is_some() { 1 } else { number("HYPNOS_TEST_WALKS").unwrap_or(n) };
    let idle = Idle::default();
    let failed = idle.runtime().block_on(async {
        let mut database = Database::open(kind).await;
        let (mut counts, mut failed) = (Counts::default(), 0);
        let began = Instant::now();
        for (done, seed) in (1..).zip(from..from + n) {
            let scratch = in_memory();
            match walk(seed, &idle, &mut database, scratch.path(), one.is_some()).await {
                Ok((more, _)) => counts += more,
                Err(Failed { why, log }) => {
                    failed += 1;
                    eprintln!("walk {seed} on {kind:?}: {why}");
                    if failed == 1 && one.is_none() {
                        eprintln!("{}", log[log.len().saturating_sub(N_ACTIONS_SHOWN)..].join("\n"));
                    }
                    if failed == number("HYPNOS_TEST_WALKS_FAILED").unwrap_or(N_FAILED) {
                        break;
                    }
                }
            }
            if done % n.div_ceil(10) == 0 || done == n {
                let (time, each) = (began.elapsed(), began.elapsed() / done as u32);
                eprintln!(
                    "{done} walks on {kind:?} in {time:.1?}, {each:.1?} each: {failed} failed; {counts:?}"
                );
            }
        }
        failed
    });
    assert_eq!(failed, 0, "walks that failed, of at most {n}");
}

/// The same seeds twice are the same walks, action by action.
fn replays(kind: Kind) {
    let idle = Idle::default();
    idle.runtime().block_on(async {
        let mut database = Database::open(kind).await;
        let from = number("HYPNOS_TEST_WALKS_FROM").unwrap_or(0);
        for seed in from..from + number("HYPNOS_TEST_WALKS").unwrap_or(5) {
            let mut logs = Vec::new();
            for _ in 0..2 {
                let scratch = in_memory();
                logs.push(match walk(seed, &idle, &mut database, scratch.path(), false).await {
                    Ok((_, log)) | Err(Failed { log, .. }) => log,
                });
            }
            let same = logs[0].iter().zip(&logs[1]).take_while(|(first, second)| first == second).count();
            let rest = |log: &[String]| log[same..log.len().min(same + 5)].join("\n");
            let before = logs[0][same.saturating_sub(20)..same].join("\n");
            let (first, second) = (rest(&logs[0]), rest(&logs[1]));
            assert!(
                first.is_empty() && second.is_empty(),
                "walk {seed}:\n{before}\nthen\n{first}\nor\n{second}"
            );
        }
    });
}

#[test]
fn a_seed_replays_a_walk_on_sqlite() {
    on_a_large_stack(|| replays(Kind::Sqlite));
}

#[test]
fn a_seed_replays_a_walk_on_postgres() {
    on_a_large_stack(|| replays(Kind::Postgres));
}

#[test]
fn random_walks_on_sqlite_keep_every_promise() {
    on_a_large_stack(|| walks(Kind::Sqlite, 200));
}

#[test]
fn random_walks_on_postgres_keep_every_promise() {
    on_a_large_stack(|| walks(Kind::Postgres, 50));
}
