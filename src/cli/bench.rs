//! `hypnos bench`: how fast our operations and models are, side by side with PyTorch eager on the same device.
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

mod cases;
mod load;
mod ours;
mod table;
mod torch;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use candle_core::DType;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use self::cases::Case;
use self::load::Load;
use self::ours::{Place, Ready};
use self::table::{Measured, Outcome};
use self::torch::Torch;
use super::output::print_line;
use crate::memory::giving_back;
use crate::ml::{Error, Result, device};

/// Idle time before each measurement.
const QUIET: Duration = Duration::from_millis(50);

/// A measurement lasts at least this long, by repetition.
const SHORTEST_SECS: f64 = 0.05;

/// Runs of one measurement at most.
const MOST_RUNS: f64 = 1000.0;

/// Memory left alone when it is decided what fits.
const SPARE_GIB: f64 = 1.0;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A Python with torch, diffusers and transformers to measure against; without it only our times are taken.
    #[arg(long)]
    python: Option<String>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What our side computes in; what has no bf16 yet is left out
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

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let place = Place { device: device::open(&args.device)?, dtype: args.precision.dtype() };
    if place.device.is_cpu() && place.dtype != DType::F32 {
        return Err(Error::input("--precision bf16: only a GPU computes in it"));
    }
    let chosen = chosen(&args.only, place.device.is_cuda())?;
    if args.list {
        for case in &chosen {
            print_line(&case.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let n_threads = rayon::current_num_threads();
    let theirs = args.torch_precision.unwrap_or(args.precision);
    let start = |python: &String| Torch::start(python, n_threads, &args.device, theirs.dtype().as_str());
    let mut torch = args.python.as_ref().map(start).transpose()?;
    let about = about(n_threads, args, torch.as_ref());
    print_line(&format!("{}\n", about_words(&about)));
    for line in table::head(torch.is_some()) {
        print_line(line);
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
        bar.suspend(|| print_line(&table::row(case, &outcome, torch.is_some())));
        bar.inc(1);
        entries.push(table::entry(case, &outcome));
        if let Some(file) = &args.json {
            write(file, &json!({"about": about, "cases": entries}))?; // what there is, should a later case fail
        }
    }
    bar.finish_and_clear();
    if let Some(peak) = first_line_value("/proc/self/status", "VmHWM") {
        print_line(&format!("\nPeak memory of our side over all cases: {peak}"));
    }
    Ok(ExitCode::SUCCESS)
}

fn chosen(only: &[String], on_gpu: bool) -> Result<Vec<Case>> {
    let wanted = |case: &Case| only.is_empty() || only.iter().any(|part| case.name.contains(part.as_str()));
    let chosen: Vec<Case> = cases::all(on_gpu).into_iter().filter(wanted).collect();
    if chosen.is_empty() {
        let only = only.join(" ");
        return Err(Error::input(format!(
            "--only {only}: no case is named so; `hypnos bench --list` has the names"
        )));
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

/// The value of the first `key: value` line, on systems that have such files.
fn first_line_value(file: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let (_, value) = text.lines().find(|line| line.starts_with(key))?.split_once(':')?;
    Some(value.trim().to_string())
}

fn available_gib() -> Option<f64> {
    let kib = first_line_value("/proc/meminfo", "MemAvailable")?;
    Some(kib.strip_suffix(" kB")?.parse::<f64>().ok()? / f64::from(1 << 20))
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
    let free = match device::free_bytes(&place.device)? {
        Some(bytes) => Some(bytes as f64 / f64::from(1 << 30)),
        None => available_gib(),
    };
    let free = free.map_or(f64::INFINITY, |gib| gib - SPARE_GIB);
    if case.gib > free {
        let why = format!("left out: needs {:.1} GiB, {:.1} GiB are free", case.gib, free.max(0.0));
        return Ok(Outcome::Skipped(why));
    }
    let mut processes = vec![std::process::id()];
    processes.extend(torch.as_ref().map(|torch| torch.id()));
    let before = Load::now(&processes);
    let measured = match torch {
        None => alone(case, place, repeats)?,
        Some(torch) if 2.0 * case.gib <= free => in_turns(case, place, torch, repeats)?,
        Some(torch) => in_blocks(case, place, torch, repeats)?,
    };
    let others = Load::now(&processes).zip(before).map(|(now, before)| now.others_since(before));
    Ok(Outcome::Measured(Measured { others, ..measured }))
}

fn alone(case: &Case, place: &Place, repeats: usize) -> Result<Measured> {
    let mut ready = Ready::new(&case.work, case.pass, place)?;
    let n_runs = n_runs(warm_up(|| ready.measure(1))?);
    let ours = (0..repeats).map(|_| quietly(|| ready.measure(n_runs))).collect::<Result<_>>()?;
    give_back(ready, place)?;
    Ok(Measured { ours, theirs: Vec::new(), how: "alone", others: None })
}

fn in_turns(case: &Case, place: &Place, torch: &mut Torch, repeats: usize) -> Result<Measured> {
    let mut ready = Ready::new(&case.work, case.pass, place)?;
    torch.set_up(case)?;
    let slower_start = warm_up(|| ready.measure(1))?.min(warm_up(|| torch.measure(1))?);
    let n_runs = n_runs(slower_start);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..repeats {
        ours.push(quietly(|| ready.measure(n_runs))?);
        theirs.push(quietly(|| torch.measure(n_runs))?);
    }
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

fn quietly(measure: impl FnOnce() -> Result<f64>) -> Result<f64> {
    std::thread::sleep(QUIET);
    measure()
}

/// Seconds of a run that is not the first.
fn warm_up(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let first = measure()?;
    if first < SHORTEST_SECS { measure() } else { Ok(first) }
}

/// Runs that make one measurement, where one run takes `seconds`.
fn n_runs(seconds: f64) -> usize {
    (SHORTEST_SECS / seconds.max(1e-9)).ceil().clamp(1.0, MOST_RUNS) as usize
}
