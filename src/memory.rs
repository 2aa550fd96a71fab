//! What the allocator does with freed memory. Has an effect where mimalloc is the global allocator, as in `main.rs`.
#![allow(unsafe_code)] // the allocator's settings have no safe face

use libmimalloc_sys::{mi_option_set, mi_option_t};

/// `mi_option_purge_delay` of mimalloc.h, which the binding leaves out: milliseconds, 0 at once, -1 never.
const PURGE_DELAY: mi_option_t = 15;

/// Keeps freed memory from now on.
///
/// Gigabytes of tensors come and go each step. Giving their pages back to the kernel in between, as allocators do after
/// a moment, costs as much as the arithmetic: each page is cleared again when it returns.
pub fn keep_freed() {
    // SAFETY: sets one number that the allocator reads.
    unsafe { mi_option_set(PURGE_DELAY, -1) }
}

/// Runs `free`; what it frees goes back to the kernel at once, for whoever else needs it. What was freed before stays.
pub fn giving_back<T>(free: impl FnOnce() -> T) -> T {
    // SAFETY: sets one number that the allocator reads.
    unsafe { mi_option_set(PURGE_DELAY, 0) }
    let freed = free();
    keep_freed();
    freed
}
