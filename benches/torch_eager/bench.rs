//! The whole benchmark but for its process, which `main.rs` describes and `tests/it/bench.rs` has in its place.

mod cases;
#[path = "../shared/command_line.rs"]
mod command_line;
#[path = "../shared/inputs.rs"]
mod inputs;
#[path = "../shared/machine.rs"]
mod machine;
mod ours;
#[path = "../shared/side_by_side.rs"]
mod side_by_side;
#[path = "../shared/spread.rs"]
mod spread;
mod table;
mod torch;

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::DType;
use clap::Parser;
use hypnos::memory::giving_back;
use hypnos::ml::{Error, Result, device};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use self::cases::Case;
use self::command_line::CargoFlags;
use self::machine::{Load, Room, first_line_value};
use self::ours::{Place, Ready};
use self::side_by_side::{n_runs, quietly, warm_up};
use self::table::{Measured, Outcome};
use self::torch::Torch;

/// Measures operations and models, side by side with PyTorch where it is given.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench torch_eager --")]
struct Args {
    /// A Python with torch, diffusers and transformers to measure against; without it only our times are taken.
    #[arg(long)]
    python: Option<String>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What our side computes in; the optimiser has f32 alone
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// What PyTorch's side computes in, if not the same
    #[arg(long, value_enum)]
    torch_precision: Option<Precision>,
    /// Measure only cases that have one of these in their names.
    #[arg(long, value_name = "SUBSTRING", num_args = 1..)]
    only: Vec<String>,
    /// Measurements of each case on each side.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Write every single measurement there too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only say the names of the cases.
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    _cargo: CargoFlags,
}

/// What is computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Precision {
    F32,
    Bf16,
}

impl Precision {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// Runs the benchmark with the arguments of a process; the table goes to `out`, an error to `errors`.
pub(crate) fn main(
    args: impl IntoIterator<Item = OsString>,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> ExitCode {
    command_line::finish(run(&Args::parse_from(args), out), errors)
}

fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let place = Place { device: device::open(&args.device)?, dtype: args.precision.dtype() };
    if place.device.is_cpu() && place.dtype != DType::F32 {
        return Err(Error::input("--precision bf16: only a GPU computes in it"));
    }
    let chosen = chosen(&args.only, place.device.is_cuda())?;
    if args.list {
        for case in &chosen {
            print_line(out, &case.name);
        }
        return Ok(());
    }
    let n_threads = rayon::current_num_threads();
    let theirs = args.torch_precision.unwrap_or(args.precision);
    let start = |python: &String| Torch::start(python, n_threads, &args.device, theirs.dtype().as_str());
    let mut torch = args.python.as_ref().map(start).transpose()?;
    let about = about(n_threads, args, torch.as_ref());
    print_line(out, &format!("{}\n", about_words(&about)));
    for line in table::head(torch.is_some()) {
        print_line(out, line);
    }
    let bar = progress(chosen.len());
    let mut entries = Vec::new();
    for case in &chosen {
        bar.set_message(case.name.clone());
        bar.tick();
        let outcome = measure(case, &place, torch.as_mut(), args.repeats as usize);
        // On a GPU a case may be too large for the card, or without bf16: the others go on.
        let outcome = match outcome {
            Err(error) if place.device.is_cuda() => Outcome::Skipped(format!("left out: {error}")),
            outcome => outcome?,
        };
        bar.suspend(|| print_line(out, &table::row(case, &outcome, torch.is_some())));
        bar.inc(1);
        entries.push(table::entry(case, &outcome));
        if let Some(file) = &args.json {
            write(file, &json!({"about": about, "cases": entries}))?; // what there is, should a later case fail
        }
    }
    bar.finish_and_clear();
    if let Some(peak) = first_line_value("/proc/self/status", "VmHWM") {
        print_line(out, &format!("\nPeak memory of our side over all cases: {peak}"));
    }
    Ok(())
}

fn print_line(out: &mut dyn Write, line: &str) {
    let _ = writeln!(out, "{line}"); // a closed pipe is no reason to fail
}

fn chosen(only: &[String], on_gpu: bool) -> Result<Vec<Case>> {
    let wanted = |case: &Case| only.is_empty() || only.iter().any(|part| case.name.contains(part.as_str()));
    let chosen: Vec<Case> = cases::all(on_gpu).into_iter().filter(wanted).collect();
    if chosen.is_empty() {
        let only = only.join(" ");
        return Err(Error::input(format!("--only {only}: no case is named so; --list has the names")));
    }
    Ok(chosen)
}

/// Whatever a reader of the figures must know to compare them.
fn about(n_threads: usize, args: &Args, torch: Option<&Torch>) -> Value {
    json!({
        "hypnos": env!("CARGO_PKG_VERSION"),
        "build": if cfg!(debug_assertions) { "dev" } else { "release" },
        "cpu": first_line_value("/proc/cpuinfo", "model name"),
        "threads": n_threads,
        "repeats": args.repeats,
        "device": args.device,
        "precision": args.precision.dtype().as_str(),
        "torch": torch.map(|torch| &torch.about),
    })
}

fn about_words(about: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_string();
    let versions = ["torch", "diffusers", "transformers"]
        .iter()
        .filter_map(|&library| Some(format!(" {library} {}.", about["torch"][library].as_str()?)));
    let versions: String = versions.collect();
    format!(
        "hypnos {} ({} build), {} threads each, {} repeats, {} on {}, CPU {}. Times: min / median / max.{versions}",
        text(&about["hypnos"]),
        text(&about["build"]),
        about["threads"],
        about["repeats"],
        text(&about["precision"]),
        text(&about["torch"]["card"].as_str().map_or(about["device"].clone(), Value::from)),
        text(&about["cpu"]),
    )
}

fn progress(n: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} {msg}");
    ProgressBar::new(n as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn write(file: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    fs::write(file, text).map_err(|error| Error::input(format!("--json {}: {error}", file.display())))
}

fn measure(case: &Case, place: &Place, torch: Option<&mut Torch>, repeats: usize) -> Result<Outcome> {
    let room = Room::on(&place.device)?;
    if let Some(why) = room.refusal(case.gib) {
        return Ok(Outcome::Skipped(why));
    }
    let mut processes = vec![std::process::id()];
    processes.extend(torch.as_ref().map(|torch| torch.id()));
    let before = Load::now(&processes);
    let measured = match torch {
        None => alone(case, place, repeats)?,
        Some(torch) if room.holds(2.0 * case.gib) => in_turns(case, place, torch, repeats)?,
        Some(torch) => in_blocks(case, place, torch, repeats)?,
    };
    let others = Load::now(&processes).zip(before).map(|(now, before)| now.others_since(before));
    Ok(Outcome::Measured(Measured { others, ..measured }))
}

fn alone(case: &Case, place: &Place, repeats: usize) -> Result<Measured> {
    let mut ready = Ready::new(&case.work, case.pass, place)?;
    let n_runs = n_runs(warm_up(|n| ready.measure(n))?);
    let ours = (0..repeats).map(|_| quietly(|| ready.measure(n_runs))).collect::<Result<_>>()?;
    give_back(ready, place)?;
    Ok(Measured { ours, theirs: Vec::new(), how: "alone", others: None })
}

fn in_turns(case: &Case, place: &Place, torch: &mut Torch, repeats: usize) -> Result<Measured> {
    let mut ready = Ready::new(&case.work, case.pass, place)?;
    torch.set_up(case)?;
    let (ours, theirs) = side_by_side::in_turns(|n| ready.measure(n), |n| torch.measure(n), repeats)?;
    give_back(ready, place)?;
    torch.drop_case()?;
    Ok(Measured { ours, theirs, how: "in turns", others: None })
}

fn in_blocks(case: &Case, place: &Place, torch: &mut Torch, repeats: usize) -> Result<Measured> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let mut ready = Ready::new(&case.work, case.pass, place)?;
        ready.measure(1)?;
        for _ in 0..repeats.div_ceil(2) {
            ours.push(quietly(|| ready.measure(1))?);
        }
        give_back(ready, place)?;
        torch.set_up(case)?;
        torch.measure(1)?;
        for _ in 0..repeats.div_ceil(2) {
            theirs.push(quietly(|| torch.measure(1))?);
        }
        torch.drop_case()?;
    }
    Ok(Measured { ours, theirs, how: "in blocks", others: None })
}

/// Frees a case and hands its memory to whoever wants it next.
fn give_back(ready: Ready, place: &Place) -> Result<()> {
    giving_back(|| drop(ready));
    device::release(&place.device)
}
