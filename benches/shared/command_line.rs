//! What is the same on every benchmark's command line: cargo's flag, the line of an error, and the exit code.

use std::io::Write;
use std::process::ExitCode;

use hypnos::ml;

/// What `cargo bench` says to every benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct CargoFlags {
    #[arg(long = "bench", hide = true)]
    _bench: bool,
}

/// Ends a benchmark: an error is one line in `errors`. Exit codes as those of `hypnos`: 0 success, 1 the machine
/// failed, 2 invalid input.
pub(crate) fn finish(done: Result<(), impl Into<anyhow::Error>>, errors: &mut dyn Write) -> ExitCode {
    let Err(error) = done.map_err(Into::<anyhow::Error>::into) else { return ExitCode::SUCCESS };
    let line = error.to_string().lines().collect::<Vec<_>>().join(" ");
    let _ = writeln!(errors, "error: {line}"); // a closed pipe leaves the exit code
    let is_input = error.downcast_ref::<ml::Error>().is_some_and(|error| !error.is_machine_failure());
    ExitCode::from(if is_input { 2 } else { 1 })
}
