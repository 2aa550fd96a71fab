//! Benchmark of Stable Diffusion 1.5's models, ours beside candle-transformers, the stock implementation on the same
//! tensor library: times, how far the outputs are apart, and how many weights get a gradient.
//!
//! ```sh
//! cargo bench --bench candle_stock -- [--only SUBSTRING] [--repeats 5]
//! ```
//!
//! Method, as that of `torch_eager`. Both sides have the same seeded random weights, run in one process with the
//! allocator of the program, and use the same number of threads. After a warm-up they take turns: ours, stock, ours,
//! stock. Before each measurement both are idle for 50 ms. Short cases are run several times in a measurement, as often
//! on both sides, so that one lasts 50 ms or more. A time holds no building of inputs and no freeing of results.
//! `ratio` is our median over theirs, `paired` the median of the ratios of neighbouring measurements, `fastest` the
//! ratio of the shortest times. `others` is the share of the machine that other programs took: above a few per cent the
//! ratios are not worth quoting. `apart` is the largest difference of the outputs over the largest element of ours. A
//! case that needs more memory than is free is left out. f32 on the CPU.
//!
//! What candle-transformers 0.11.1 cannot do decides the cases:
//!
//! * Its text encoder takes one prompt at a time, its UNet one timestep for a batch.
//! * Its autoencoder is wrong for more than one picture at a time on a CPU (huggingface/candle#3744): one is decoded.
//! * Its UNet has the tanh approximation of GELU in place of GELU, hence `apart` of about 1e-4.
//! * Its layer norms, and the softmax of the UNet's attentions, have no backward. `loss.backward()` succeeds all the
//!   same: the graph ends there silently, so weights behind them get no gradient, or that of the residual paths alone.
//!   `gradients` counts the trained tensors that got one, right or wrong, as stock / ours / all. Its text encoder ends
//!   with a layer norm and gets none at all. So `fwd+bwd` compares our whole backward with a part of one; only the
//!   autoencoder's, to the latents through frozen weights, is whole on both sides.
#![allow(clippy::print_stdout)] // the table is what it is for

mod cases;
#[path = "../shared/command_line.rs"]
mod command_line;
#[path = "../shared/inputs.rs"]
mod inputs;
#[path = "../shared/machine.rs"]
mod machine;
#[path = "../shared/side_by_side.rs"]
mod side_by_side;
mod sides;
#[path = "../shared/spread.rs"]
mod spread;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use hypnos::ml::{Error, Result};

use self::cases::Case;
use self::command_line::CargoFlags;
use self::machine::{Load, Room, percent};
use self::sides::{Pair, compare};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures our models beside those of candle-transformers.
#[derive(Parser)]
#[command(bin_name = "cargo bench --bench candle_stock --")]
struct Args {
    /// Measure only cases that have this in their names.
    #[arg(long, value_name = "SUBSTRING")]
    only: Option<String>,
    /// Measurements of each case on each side.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    #[command(flatten)]
    _cargo: CargoFlags,
}

fn main() -> ExitCode {
    hypnos::memory::keep_freed();
    command_line::finish(run(&Args::parse()), &mut std::io::stderr())
}

fn run(args: &Args) -> Result<()> {
    let wanted = |case: &Case| args.only.as_ref().is_none_or(|part| case.name.contains(part.as_str()));
    let chosen: Vec<Case> = cases::all().into_iter().filter(wanted).collect();
    if let (true, Some(only)) = (chosen.is_empty(), &args.only) {
        let names = cases::all().iter().map(|case| case.name).collect::<Vec<_>>().join(", ");
        return Err(Error::input(format!("--only {only}: wanted a part of one of {names}")));
    }
    let threads = rayon::current_num_threads();
    println!(
        "f32 on the CPU, {threads} threads each, {} repeats. Times: min / median / max.\n",
        args.repeats
    );
    println!("| case | ours, ms | stock, ms | ratio | paired | fastest | apart | gradients | others |");
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|");
    for case in chosen {
        println!("{}", row(&case, args.repeats as usize)?);
    }
    Ok(())
}

/// Measures a case.
fn row(case: &Case, repeats: usize) -> Result<String> {
    let name = case.name;
    if let Some(why) = Room::on(&Device::Cpu)?.refusal(case.gib) {
        return Ok(format!("| {name} | {why} | | | | | | | |"));
    }
    let Pair { ours, stock } = (case.build)(case.pass)?;
    let (apart, gradients) = compare(&ours, &stock)?;
    let processes = [std::process::id()];
    let before = Load::now(&processes);
    let (our_seconds, stock_seconds) =
        side_by_side::in_turns(|n| ours.measure(n), |n| stock.measure(n), repeats)?;
    let others = Load::now(&processes).zip(before).map(|(now, before)| now.others_since(before));
    let times = side_by_side::cells(&our_seconds, &stock_seconds);
    Ok(format!("| {name} | {times} | {apart:.0e} | {gradients} | {} |", percent(others)))
}
