//! How busy others keep the machine while we measure, from Linux' counters; elsewhere it is not known.

use std::fs;

/// Counters at one moment, in the kernel's ticks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Ticks of all processors together, idle ones too.
    all: u64,
    /// Ticks spent on this program and PyTorch's.
    own: u64,
    /// Ticks without work.
    idle: u64,
}

impl Load {
    /// Now; `processes` are the ids of those whose work is ours.
    pub(super) fn now(processes: &[u32]) -> Option<Self> {
        let (all, idle) = machine_ticks(&fs::read_to_string("/proc/stat").ok()?)?;
        let own =
            processes.iter().map(|id| process_ticks(&fs::read_to_string(format!("/proc/{id}/stat")).ok()?));
        Some(Self { all, own: own.sum::<Option<u64>>()?, idle })
    }

    /// Share of the machine that others took since `before`, 0..1.
    pub(super) fn others_since(self, before: Self) -> f64 {
        let since = |now: u64, before: u64| now.saturating_sub(before) as f64;
        let (all, idle) = (since(self.all, before.all), since(self.idle, before.idle));
        ((all - idle - since(self.own, before.own)) / all.max(1.0)).clamp(0.0, 1.0)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
