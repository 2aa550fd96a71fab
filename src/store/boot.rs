//! The time since the machine was started, by which leases are measured in a SQLite file.
//!
//! Its processes are all on one machine, and the machine's wall clock may be set while they run: forward by more than a lease,
//! and every running job would count as abandoned. The time since the start is never set, and goes on while the machine
//! sleeps. It means nothing after the next start; so the start's own id stands beside it.

use std::sync::LazyLock;

use crate::clock;

/// A moment after a start of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// Which start.
    pub(super) boot: &'static str,
    /// Milliseconds since then.
    pub(super) ms: i64,
}

impl Moment {
    /// Now; none where the kernel does not tell its starts apart, and the wall clock has to do.
    pub(super) fn now() -> Option<Self> {
        static BOOT: LazyLock<Option<String>> = LazyLock::new(|| {
            let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
            Some(id.trim().to_owned()).filter(|id| !id.is_empty())
        });
        let boot = BOOT.as_deref()?;
        Some(Self { boot, ms: clock::since_boot()?.as_millis() as i64 })
    }
}
