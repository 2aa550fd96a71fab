//! Benchmark of our operations and models, side by side with PyTorch eager on the same device.
//!
//! ```sh
//! cargo bench --bench torch_eager -- [--python PYTHON] [--only SUBSTRING ...] [--repeats 5] [--json FILE]
//! ```
//!
//! Method. Each side runs in a process of its own, PyTorch's in a child that is given by `--python`. Both have as many
//! threads as rayon. A case is built on both sides from the same description, with seeded normal numbers; the upstream
//! gradient is normal too. After a warm-up the sides take turns: ours, theirs, ours, theirs. Before each measurement
//! both are idle for 50 ms, because OpenMP's threads spin a little after their work. Short cases are run several times
//! in a measurement, as often on both sides, so that one lasts 50 ms or more; data are warm in the caches then. Time is
//! taken inside each process and holds no building of inputs and no freeing of results; gradients are dropped between
//! runs, so that each backward makes them anew. A case too large to be in memory twice runs in blocks (ours, theirs,
//! ours, theirs), the other side's memory given back; one too large even for that is left out and says so.
//!
//! `ratio` is our median over theirs, `paired` the median of the ratios of neighbouring measurements, which suffers
//! less where a machine grows slower and faster with time, `fastest` the ratio of the shortest times. `others` is the
//! share of the machine that other programs took meanwhile. Above a few per cent the ratios flatter us: foreign load
//! makes OpenMP wait at its barriers, up to tenfold as we saw, and hinders rayon's stealing less. Nothing here is a
//! test: a time that fails a build would measure the build machine.
//!
//! Departure: our backward begins with candle's store adding the upstream gradient to zeros, one pass over the output
//! that PyTorch has no need of. It is counted as ours. Fresh memory that is zero already is paid for by who writes it
//! first: the rows of an embedding's gradient that no token picked cost us nothing until the optimiser reads them.
//!
//! On a GPU both sides wait for it before they read the clock, and there are cases at Stable Diffusion 1.5's own size.
//! In bf16 PyTorch has bf16 weights where a model only computes, and autocast over f32 weights where it trains, as
//! diffusers' training scripts do; in f32 it never uses TF32. Neither do we.

use std::io;
use std::process::ExitCode;

#[path = "bench.rs"] // by its path, as in tests/it/bench.rs: its own modules are found beside it then
mod bench;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    hypnos::memory::keep_freed();
    bench::main(std::env::args_os(), &mut io::stdout(), &mut io::stderr())
}
