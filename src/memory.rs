//! Settings of the allocator for freed memory. They apply where mimalloc is the global allocator, as in `main.rs`.
#![allow(unsafe_code)] // the allocator's settings have no safe API

use std::sync::{Mutex, PoisonError};

use libmimalloc_sys::{mi_option_set, mi_option_t};

/// `mi_option_purge_delay` of mimalloc.h, which the binding lacks: milliseconds, 0 at once, -1 never.
const PURGE_DELAY: mi_option_t = 15;

/// Keeps freed memory in the process from now on.
///
/// Every step allocates and frees gigabytes of tensors. Returning their pages to the kernel in between, as allocators
/// do after a moment, costs as much time as the arithmetic, since each page is cleared when it comes back.
pub fn keep_freed() {
    // SAFETY: sets one integer option of the allocator.
    unsafe { mi_option_set(PURGE_DELAY, -1) }
}

/// Number of live [`ReturnGuard`]s.
static N_GUARDS: Mutex<usize> = Mutex::new(0);

/// Runs `free` and returns the memory that it frees to the kernel at once. Memory freed before stays. Several calls may
/// run at once; meanwhile all memory that the process frees is returned.
pub fn giving_back<T>(free: impl FnOnce() -> T) -> T {
    let _guard = ReturnGuard::new();
    free()
}

/// Returns freed memory to the kernel from now on: for a process that computes no tensors.
pub fn always_give_back() {
    std::mem::forget(ReturnGuard::new());
}

/// Returns freed memory to the kernel until it is dropped.
struct ReturnGuard;

impl ReturnGuard {
    fn new() -> Self {
        let mut n_guards = N_GUARDS.lock().unwrap_or_else(PoisonError::into_inner);
        *n_guards += 1;
        // SAFETY: sets one integer option of the allocator.
        unsafe { mi_option_set(PURGE_DELAY, 0) }
        Self
    }
}

impl Drop for ReturnGuard {
    fn drop(&mut self) {
        let mut n_guards = N_GUARDS.lock().unwrap_or_else(PoisonError::into_inner);
        *n_guards -= 1;
        if *n_guards == 0 {
            keep_freed();
        }
    }
}
