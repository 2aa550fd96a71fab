//! What the allocator does with freed memory. Has an effect where mimalloc is the global allocator, as in `main.rs`.
#![allow(unsafe_code)] // the allocator's settings have no safe face

use std::sync::{Mutex, PoisonError};

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

/// How many run that give back what they free.
static GIVING: Mutex<usize> = Mutex::new(0);

/// Runs `free`; what it frees goes back to the kernel at once, for whoever else needs it. What was freed before stays. Several
/// may run at once; meanwhile nobody in this process keeps what is freed.
pub fn giving_back<T>(free: impl FnOnce() -> T) -> T {
    let _giver = Giver::begin();
    free()
}

/// Gives back what is freed from now on: for a process that computes no tensors.
pub fn always_give_back() {
    std::mem::forget(Giver::begin());
}

/// One that gives back, until it is dropped.
struct Giver;

impl Giver {
    fn begin() -> Self {
        let mut giving = GIVING.lock().unwrap_or_else(PoisonError::into_inner);
        *giving += 1;
        // SAFETY: sets one number that the allocator reads.
        unsafe { mi_option_set(PURGE_DELAY, 0) }
        Self
    }
}

impl Drop for Giver {
    fn drop(&mut self) {
        let mut giving = GIVING.lock().unwrap_or_else(PoisonError::into_inner);
        *giving -= 1;
        if *giving == 0 {
            keep_freed();
        }
    }
}
