//! The `hypnos` program.

use std::process::ExitCode;

/// Large tensors come and go each step; the system's allocator would hand their pages back to the kernel every time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    hypnos::cli::run()
}
