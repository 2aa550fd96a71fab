//! The `hypnos` program.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    hypnos::memory::keep_freed();
    hypnos::cli::run()
}
