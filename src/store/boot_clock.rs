//! The clock of SQLite's leases: the time since the machine's boot.
//!
//! All processes of a SQLite file are on one machine, and its wall clock may be set while they run. If it is set
//! forward by more than a lease, every running job would count as abandoned. The time since boot is never set, and goes
//! on while the machine sleeps. It means nothing after the next boot, so the boot's id stands beside it.

use std::sync::LazyLock;

use crate::clock;

/// A moment since a boot of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BootTime {
    /// The id of the boot.
    pub(super) boot: &'static str,
    /// Milliseconds since the boot.
    pub(super) ms: i64,
}

impl BootTime {
    /// Now; none where the kernel has no boot id, and the wall clock is used.
    pub(super) fn now() -> Option<Self> {
        static BOOT: LazyLock<Option<String>> = LazyLock::new(|| {
            let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
            Some(id.trim().to_owned()).filter(|id| !id.is_empty())
        });
        let boot = BOOT.as_deref()?;
        Some(Self { boot, ms: clock::since_boot()?.as_millis() as i64 })
    }
}
