//! The machine as Linux describes it; elsewhere nothing is known. How busy others keep it while we measure, and which
//! cases its memory holds.

use std::fs;

use candle_core::Device;
use hypnos::ml::{Result, device};

/// Memory left alone when it is decided what fits.
const SPARE_GIB: f64 = 1.0;

/// Counters at one moment, in the kernel's ticks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Ticks of all processors together, idle ones too.
    all: u64,
    /// Ticks spent on the processes of the benchmark.
    own: u64,
    /// Ticks without work.
    idle: u64,
}

impl Load {
    /// Now; `processes` are the ids of those whose work is ours.
    pub(crate) fn now(processes: &[u32]) -> Option<Self> {
        let (all, idle) = machine_ticks(&fs::read_to_string("/proc/stat").ok()?)?;
        let own =
            processes.iter().map(|id| process_ticks(&fs::read_to_string(format!("/proc/{id}/stat")).ok()?));
        Some(Self { all, own: own.sum::<Option<u64>>()?, idle })
    }

    /// Share of the machine that others took since `before`, 0..1.
    pub(crate) fn others_since(self, before: Self) -> f64 {
        let since = |now: u64, before: u64| now.saturating_sub(before) as f64;
        let (all, idle) = (since(self.all, before.all), since(self.idle, before.idle));
        ((all - idle - since(self.own, before.own)) / all.max(1.0)).clamp(0.0, 1.0)
    }
}

/// The share of the machine that others took, as a cell of a table.
pub(crate) fn percent(others: Option<f64>) -> String {
    others.map_or("unknown".into(), |share| format!("{:.0} %", 100.0 * share))
}

/// All ticks and the idle ones, of the line `cpu user nice system idle iowait irq softirq steal ..`.
fn machine_ticks(stat: &str) -> Option<(u64, u64)> {
    let fields = stat.lines().find_map(|line| line.strip_prefix("cpu "))?.split_whitespace();
    // What follows the eighth is counted in the first two already.
    let ticks = fields.take(8).map(|field| field.parse().ok()).collect::<Option<Vec<u64>>>()?;
    Some((ticks.iter().sum(), ticks.get(3)? + ticks.get(4)?))
}

/// Ticks of one process in user and system mode: the 14th and 15th field, behind a name that may hold anything.
fn process_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11).map(|field| field.parse::<u64>().ok());
    Some(fields.next()?? + fields.next()??)
}

/// Memory that a case may take, in GiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room(f64);

impl Room {
    /// Of a device; where nothing is known, without a limit.
    pub(crate) fn on(place: &Device) -> Result<Self> {
        let free = match device::free_bytes(place)? {
            Some(bytes) => Some(bytes as f64 / f64::from(1 << 30)),
            None => available_gib(),
        };
        Ok(Self(free.map_or(f64::INFINITY, |gib| (gib - SPARE_GIB).max(0.0))))
    }

    pub(crate) fn holds(self, gib: f64) -> bool {
        gib <= self.0
    }

    /// Why a case that needs so much is left out, if it is.
    pub(crate) fn refusal(self, gib: f64) -> Option<String> {
        (!self.holds(gib)).then(|| format!("left out: needs {gib:.1} GiB, {:.1} GiB are free", self.0))
    }
}

fn available_gib() -> Option<f64> {
    let kib = first_line_value("/proc/meminfo", "MemAvailable")?;
    Some(kib.strip_suffix(" kB")?.parse::<f64>().ok()? / f64::from(1 << 20))
}

/// The value of the first `key: value` line of a file.
pub(crate) fn first_line_value(file: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let (_, value) = text.lines().find(|line| line.starts_with(key))?.split_once(':')?;
    Some(value.trim().to_string())
}

#[test]
fn others_took_what_neither_we_nor_idleness_did() {
    let before = Load { all: 1000, own: 100, idle: 500 };
    let now = Load { all: 1400, own: 300, idle: 600 };
    assert!((now.others_since(before) - 0.25).abs() < 1e-12); // 400 ticks: 200 ours, 100 idle
}

#[test]
fn counters_are_read_as_linux_writes_them() {
    let stat = "cpu  10 20 30 400 50 6 7 8 9 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n";
    assert_eq!(machine_ticks(stat), Some((531, 450)));
    let stat = "77 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 1100 33 0 0 20 0 3";
    assert_eq!(process_ticks(stat), Some(1133));
    assert_eq!((machine_ticks("intr 5"), process_ticks("77")), (None, None));
}

#[test]
fn a_case_that_needs_more_than_there_is_says_so() {
    assert_eq!(Room(2.0).refusal(2.0), None);
    assert_eq!(Room(2.0).refusal(19.04).as_deref(), Some("left out: needs 19.0 GiB, 2.0 GiB are free"));
}
