//! `hypnos models plan`: what a training and a sample of a bundle take in memory, files and time, and whether they fit.

use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::bundle::BundleArgs;
use crate::cli::error::CliError;
use crate::cli::output::print_line;
use crate::cli::train;
use crate::engine::memory::{Fit, MemorySettings, PHOTOS, Products, gib, sample_fit, training_fit};
use crate::engine::missing_part;
use crate::job::{Invalid, Method, TrainOptions, merge_json};
use crate::machine::Memory;
use crate::ml;
use crate::ml::bundle::Bundle;
use crate::ml::device::{self, DeviceKind};
use crate::ml::plan::{Arithmetic, Calibration, Needs, Rates, SamplePlan, SampleSizes, TrainingPlan};
use crate::ml::precision::Precision;

/// How long each of two operations is measured, in seconds, after one that is not.
const CALIBRATION_SECS: f64 = 0.8;

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools)] // flags
pub(in crate::cli) struct Plan {
    #[command(flatten)]
    bundle: BundleArgs,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// f32, tf32 or bf16; by default bf16 on GPUs from Ampere on, f32 elsewhere
    #[arg(long)]
    precision: Option<Precision>,
    /// hypnos, dreambooth or textual_inversion
    #[arg(long, default_value = "hypnos")]
    method: Method,
    /// Options of the training, a JSON object as in the API; the others are the bundle's or the method's defaults
    #[arg(long, value_name = "JSON", default_value = "{}")]
    options: String,
    /// Gradient checkpointing: less memory for a third more time
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Pictures drawn at once
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    batch: u16,
    /// Width of a sample, in pixels; by default the bundle's own
    #[arg(long, value_name = "PIXELS")]
    width: Option<usize>,
    /// Height of a sample, in pixels; by default the bundle's own
    #[arg(long, value_name = "PIXELS")]
    height: Option<usize>,
    /// Number of photos of the product
    #[arg(long, value_name = "N", default_value_t = PHOTOS.0)]
    photos: usize,
    /// Size of each photo, in millions of pixels
    #[arg(long, value_name = "MEGAPIXELS", default_value_t = PHOTOS.1 as f64 / 1e6)]
    photo_size: f64,
    /// Also count the fine-tuned model of a sample that is drawn during the training, as by a worker
    #[arg(long)]
    worker: bool,
    /// Skip the measurement of the device, which takes two seconds, and give no times
    #[arg(long)]
    no_time: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Everything that is printed.
#[derive(Serialize)]
struct Planned {
    bundle: String,
    resolution: usize,
    device: String,
    precision: Precision,
    free_bytes: Option<u64>,
    /// Why this bundle cannot be trained so, whatever the memory is.
    lacks: Option<String>,
    rates: Option<Rates>,
    training: Counted<TrainingPlan>,
    sample: Counted<SamplePlan>,
}

#[derive(Serialize)]
struct Counted<P> {
    plan: P,
    fit: Fit,
    fits: bool,
}

impl<P> From<(P, Fit)> for Counted<P> {
    fn from((plan, fit): (P, Fit)) -> Self {
        let fits = fit.fits();
        Self { plan, fit, fits }
    }
}

/// Prints the plan. The exit code is 2 if the training cannot be done or does not fit, or the sample does not fit.
pub(super) fn run(args: &Plan) -> Result<ExitCode, CliError> {
    let bundle = Bundle::open(&args.bundle.dir()?)?;
    let options = options(args, &bundle)?;
    let planned = planned(args, &bundle, &options)?;
    if args.json {
        print_line(&format!("{:#}", serde_json::to_value(&planned).unwrap_or(Value::Null)));
    } else {
        print(args, &options, &planned);
    }
    let fits = planned.training.fits && planned.sample.fits && planned.lacks.is_none();
    Ok(if fits { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// The options of the training: what is asked for, on top of what suits the bundle.
fn options(args: &Plan, bundle: &Bundle) -> Result<TrainOptions, CliError> {
    let asked: Value = serde_json::from_str(&args.options)
        .map_err(|error| CliError::Input(format!("--options: wanted a JSON object: {error}")))?;
    suited_options(bundle, args.method, &asked).map_err(|invalid| {
        let name = invalid.pointer.trim_start_matches('/').replace('/', ".");
        let name = if name.is_empty() { String::new() } else { format!(" {name}") };
        CliError::Input(format!("--options{name}: {}", invalid.message))
    })
}

/// The options that a training by `method` has where it asks for `asked`: those that suit the bundle, and the method's
/// defaults, for the others.
pub(in crate::cli) fn suited_options(
    bundle: &Bundle,
    method: Method,
    asked: &Value,
) -> Result<TrainOptions, Invalid> {
    if !asked.is_object() {
        return Err(Invalid::new("", format!("wanted a JSON object, got {asked}")));
    }
    let mut all = bundle.manifest().suited(method.as_str());
    merge_json(&mut all, asked);
    merge_json(&mut all, &json!({ "method": method }));
    let all = all.as_object().cloned().unwrap_or_default();
    train::spec_of("thing", all, 0).map(|spec| spec.options)
}

fn planned(args: &Plan, bundle: &Bundle, options: &TrainOptions) -> Result<Planned, CliError> {
    let (width, height) =
        (args.width.unwrap_or(bundle.resolution()), args.height.unwrap_or(bundle.resolution()));
    for (name, size) in [("--width", width), ("--height", height)] {
        if size == 0 || size > 8192 || size % bundle.factor() != 0 {
            let factor = bundle.factor();
            return Err(CliError::Input(format!(
                "{name}: wanted a multiple of {factor} up to 8192, got {size}"
            )));
        }
    }
    if !(args.photo_size > 0.0 && args.photo_size <= 1000.0) || args.photos == 0 {
        return Err(CliError::Input("--photos and --photo-size: wanted more than none".into()));
    }
    let (opened, precision) = device::open_in(&args.device, args.precision)?;
    let settings = MemorySettings {
        batch: args.batch.into(),
        checkpointing: args.gradient_checkpointing,
        precision,
        products: if args.worker { Products::BesideTrainings } else { Products::Never },
        photos: (args.photos, (args.photo_size * 1e6) as u64),
    };
    let kind = DeviceKind::of(&opened);
    let free = match device::free_bytes(&opened)? {
        Some(bytes) => Some(bytes),
        None => Memory::now().free(),
    };
    let sizes = SampleSizes { batch: args.batch.into(), width, height };
    Ok(Planned {
        bundle: bundle.manifest().name.clone(),
        resolution: bundle.resolution(),
        device: args.device.clone(),
        precision,
        free_bytes: free,
        lacks: missing_part(bundle, options).map(|part| format!("{}/ {}", part.part(), part.missing())),
        rates: (!args.no_time).then(|| rates(&Calibration::new(bundle, &opened, precision)?)).transpose()?,
        training: training_fit(bundle, options, &settings, kind, free)?.into(),
        sample: sample_fit(bundle, &sizes, &settings, kind, free)?.into(),
    })
}

/// Measures a device for about two seconds.
fn rates(calibration: &Calibration) -> ml::Result<Rates> {
    let rate = |once: &dyn Fn() -> ml::Result<f64>| -> ml::Result<f64> {
        once()?; // the first run of a kernel takes longer
        let (start, mut done) = (Instant::now(), 0.0);
        loop {
            done += once()?;
            let seconds = start.elapsed().as_secs_f64();
            if seconds >= CALIBRATION_SECS {
                return Ok(done / seconds);
            }
        }
    };
    Ok(Rates {
        products: rate(&|| calibration.product())?,
        convolutions: rate(&|| calibration.convolution())?,
    })
}

fn print(args: &Plan, options: &TrainOptions, planned: &Planned) {
    let free = planned.free_bytes.map_or("memory unknown".into(), |bytes| format!("{} free", gib(bytes)));
    let Planned { bundle, resolution: side, device, precision, .. } = planned;
    print_line(&format!("{bundle}, {side} x {side} pixels, on {device} in {precision}: {free}"));
    let checkpointing = if args.gradient_checkpointing { "with" } else { "without" };
    let TrainOptions { method, steps, .. } = options;
    print_line(&format!(
        "\nA training: {method}, {steps} steps, {checkpointing} gradient checkpointing; GiB\n"
    ));
    if let Some(lacks) = &planned.lacks {
        print_line(&format!("This bundle cannot be trained so, and what it lacks is not counted: {lacks}\n"));
    }
    let TrainingPlan { needs, disk, work, .. } = &planned.training.plan;
    table(needs).iter().for_each(|line| print_line(line));
    verdict(&planned.training.fit).iter().for_each(|line| print_line(line));
    print_line(&format!(
        "Files: weights {}, a checkpoint up to {}, the best step's weights {}, class images up to {}",
        gib(disk.weights),
        gib(disk.checkpoint),
        gib(disk.best),
        gib(disk.class_images)
    ));
    let time = |work: &Arithmetic| in_words(work, planned.rates.as_ref());
    print_line(&format!("A step: {}", time(&work.step)));
    if work.plain_step != work.step {
        print_line(&format!("A step without the perceptual loss: {}", time(&work.plain_step)));
    }
    print_line(&format!("A class image: {}", time(&work.class_image)));
    print_line(&format!("All of it: {}", time(&work.total)));

    let SamplePlan { sizes, needs, step, decoding, .. } = &planned.sample.plan;
    let SampleSizes { batch, width, height } = sizes;
    print_line(&format!("\nA sample: {batch} at once, {width} x {height} pixels; GiB\n"));
    table(needs).iter().for_each(|line| print_line(line));
    verdict(&planned.sample.fit).iter().for_each(|line| print_line(line));
    print_line(&format!("A step of the sampler: {}", time(step)));
    print_line(&format!("Decoding a picture: {}", time(decoding)));
    if let Some(rates) = &planned.rates {
        print_line(&format!(
            "\nSeconds are estimates: counted operations at {:.0} GFLOP/s of products and {:.0} of convolutions, as measured \
             on this device just now",
            rates.products / 1e9,
            rates.convolutions / 1e9
        ));
    }
}

/// Items by phase, and their sums.
pub(super) fn table(needs: &Needs) -> Vec<String> {
    let phases = needs.phases();
    let width = needs.items.iter().map(|item| item.name.len()).max().unwrap_or(0).max("in all".len());
    let number = |bytes: u64| match bytes {
        0 => format!("{:>14}", "-"),
        bytes => format!("{:>14.2}", bytes as f64 / f64::from(1 << 30)),
    };
    let row = |name: &str, cells: Vec<String>| format!("{name:<width$}{}", cells.concat());
    let mut lines = vec![row("", phases.iter().map(|phase| format!("{phase:>14}")).collect())];
    for item in &needs.items {
        lines.push(row(item.name, phases.iter().map(|phase| number(item.at(*phase))).collect()));
    }
    lines.push(row("in all", phases.iter().map(|phase| number(needs.at(*phase, None))).collect()));
    lines
}

/// Whether it fits, and what makes it fit.
pub(super) fn verdict(fit: &Fit) -> Vec<String> {
    let wanted = gib(fit.wanted);
    let Some(free) = fit.free else { return vec![format!("Peak: {wanted}")] };
    if fit.fits() {
        return vec![format!("Peak: {wanted} of {} free: it fits", gib(free))];
    }
    let mut lines = vec![format!("Peak: {wanted}, but {} free: it does not fit", gib(free))];
    for (i, remedy) in fit.remedies.iter().enumerate() {
        let also = if i == 0 { "with" } else { "and" };
        let fits = if remedy.bytes <= free { ": it fits" } else { "" };
        lines.push(format!("  {also} {}: {}{fits}", remedy.setting, gib(remedy.bytes)));
    }
    lines
}

/// Operations, and about how long they take.
fn in_words(work: &Arithmetic, rates: Option<&Rates>) -> String {
    let counted = format!("{:.3} TFLOP", work.total() / 1e12);
    rates.map_or(counted.clone(), |rates| format!("{counted}, about {}", span(work.seconds(rates))))
}

/// Seconds for people.
fn span(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} minutes", s / 60.0),
        s => format!("{:.1} hours", s / 3600.0),
    }
}
