//! The `hypnos` program.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    keep_freed_memory();
    hypnos::cli::run()
}

/// Gigabytes of tensors come and go each step. Giving their pages back to the kernel in between, as allocators do after
/// a moment, costs as much as the arithmetic: each page is cleared again when it returns.
#[allow(unsafe_code)] // an option of the allocator, which has no safe face for it
fn keep_freed_memory() {
    /// `mi_option_purge_delay` of mimalloc.h, which the binding leaves out; -1 is never.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: sets one number that the allocator reads.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) }
}
