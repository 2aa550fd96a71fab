//! `hypnos train`: trains a model without a service. It runs the workers' engine, and keeps the result in a directory.

pub(super) mod out;
mod show;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::bundle::BundleArgs;
use super::error::{CliError, unusable};
use super::export::{self, FormatName, PrecisionName};
use super::output::{print_line, print_warning};
use super::{photos, service};
use crate::engine::{CandleEngine, Ending, Engine, EngineSettings, TraceInput, TrainInput};
use crate::job::{Invalid, Method, TrainOptions, TrainSpec, merge_json};
use crate::ml::bundle::Bundle;
use crate::ml::precision::Precision;
use out::{ClassImageCache, Out};
use show::Show;

#[derive(Clone, Debug, Args)]
pub(super) struct Train {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Directory with 3 to 5 photos of the product: PNG, JPEG or WebP
    #[arg(long)]
    photos: PathBuf,
    /// Class name of the product, such as "coffee mug"
    #[arg(long)]
    class_name: String,
    /// hypnos, dreambooth or textual_inversion
    #[arg(long, default_value = "hypnos")]
    method: Method,
    /// Output directory; new or empty, unless --resume is given
    #[arg(long)]
    out: PathBuf,
    /// Any option of a training by its name in the API, such as steps=400 or loss_weights.prior=0.5
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Resume from the last checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// Steps between two checkpoints
    #[arg(long, value_name = "STEPS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: u64,
    /// Directory of class images, shared by trainings; inside --out if not given
    #[arg(long, value_name = "DIR")]
    class_images: Option<PathBuf>,
    /// Write the steps of --trace-steps, with inputs and outputs, as safetensors into this directory
    #[arg(long, value_name = "DIR", requires = "trace_steps")]
    trace: Option<PathBuf>,
    /// The steps to write, counted from 1
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "trace")]
    trace_steps: Vec<u64>,
    /// Also export the result in this format; may be repeated
    #[arg(long, value_enum, value_name = "FORM")]
    export: Vec<FormatName>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// f32, tf32 or bf16; by default bf16 on GPUs from Ampere on, f32 elsewhere
    #[arg(long)]
    precision: Option<Precision>,
    /// Pictures drawn at once: more is quicker for each and takes more memory
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Gradient checkpointing: less memory for a third more time
    #[arg(long, alias = "checkpointing")]
    gradient_checkpointing: bool,
    /// Begin even if the memory estimate says that the training does not fit
    #[arg(long)]
    ignore_memory: bool,
}

pub(super) fn run(args: &Train) -> Result<ExitCode, CliError> {
    // 1. Everything that can be rejected, before anything is loaded or written.
    let spec = spec(args)?;
    let photos = photos::of_product(&args.photos)?;
    if let Some(step) =
        args.trace_steps.iter().find(|&&step| step == 0 || step > u64::from(spec.options.steps))
    {
        return Err(CliError::Input(format!(
            "--trace-steps: wanted 1 to {}, got {step}",
            spec.options.steps
        )));
    }
    for format in &args.export {
        format.vacant(&args.out)?;
    }
    let engine = CandleEngine::open(EngineSettings {
        bundle: args.bundle.dir()?,
        device: args.device.clone(),
        precision: args.precision,
        batch: args.batch,
        finetuned_bytes_max: 0,
        checkpointing: args.gradient_checkpointing,
        memory: service::own_memory_check(args.ignore_memory),
    })?;
    engine.check(&spec, &photos)?;
    engine.warnings().iter().for_each(|warning| print_warning(warning));
    if let Some(warning) = engine.model().class_warning(&spec.class_name) {
        print_warning(&warning.message);
    }
    let (out, spec) = Out::open(&args.out, &spec, &engine.model().card.sha256, args.resume)?;

    // 2. The training, in its own thread, while signals are handled here.
    let args = args.clone();
    service::run(|stop| async move {
        let trained = tokio::task::spawn_blocking(move || train(&args, engine, &spec, &photos, &out, &stop));
        trained.await.map_err(|error| CliError::Failed(format!("the training panicked: {error}")))?
    })
}

fn train(
    args: &Train,
    mut engine: CandleEngine,
    spec: &TrainSpec,
    photos: &[Vec<u8>],
    out: &Out,
    stop: &CancellationToken,
) -> Result<ExitCode, CliError> {
    let trace = args.trace.as_deref().map(|dir| trace(dir, &args.trace_steps)).transpose()?;
    let class_image_cache = out.class_images(args.class_images.as_deref(), &engine.class_images(spec))?;
    let checkpoint_every = args.checkpoint_every;
    let work = Work {
        spec,
        photos,
        out,
        class_image_cache: &class_image_cache,
        trace: trace.as_ref(),
        checkpoint_every,
        stop,
        again: "--resume",
    };
    let weights = work.done_by(&mut engine, ProgressBar::new(0))?;
    print_line(&out.dir().display().to_string());
    drop(engine); // its models take the memory that an export may need
    export::write(&args.bundle.dir()?, &weights, &args.export, PrecisionName::F32, out.dir())?;
    Ok(ExitCode::SUCCESS)
}

/// One training in its own directory.
pub(super) struct Work<'a> {
    pub(super) spec: &'a TrainSpec,
    pub(super) photos: &'a [Vec<u8>],
    pub(super) out: &'a Out,
    pub(super) class_image_cache: &'a ClassImageCache,
    pub(super) trace: Option<&'a TraceInput>,
    /// Steps between two checkpoints.
    pub(super) checkpoint_every: u64,
    pub(super) stop: &'a CancellationToken,
    /// The command that resumes it.
    pub(super) again: &'static str,
}

impl Work<'_> {
    /// Trains, from the last checkpoint if there is one, and keeps the result; the path of the weights. An interruption
    /// is an error.
    pub(super) fn done_by(&self, engine: &mut CandleEngine, bar: ProgressBar) -> Result<PathBuf, CliError> {
        let (resume, scratch) = (self.out.checkpoint(), self.out.scratch()?);
        let input = TrainInput {
            spec: self.spec,
            job: None,
            photos: self.photos,
            class_images: self.class_image_cache.had(),
            resume: resume.as_deref(),
            scratch: scratch.path(),
            trace: self.trace,
        };
        let mut show = Show::new(self.out, self.class_image_cache, self.checkpoint_every, self.stop, bar);
        let ending = engine.train(input, &mut |_, event| show.observe(event));
        let seconds = show.finish()?;
        match ending? {
            Ending::Trained(mut trained) => {
                trained.report.seconds = seconds;
                self.out.keep(&trained)
            }
            Ending::Paused(checkpoint) => {
                let at = match checkpoint {
                    Some((step, file)) => {
                        self.out.keep_checkpoint(&file)?;
                        format!("after step {step}; {} continues from there", self.again)
                    }
                    None => "before the first step".into(),
                };
                Err(CliError::Failed(format!("stopped {at}")))
            }
            Ending::Stopped => Err(CliError::Failed("the training was stopped".into())),
        }
    }
}

/// The training of the arguments.
fn spec(args: &Train) -> Result<TrainSpec, CliError> {
    let mut all = Bundle::open(&args.bundle.dir()?)?.manifest().suited(args.method.as_str());
    merge_json(&mut all, &Value::Object(options(&args.set)?));
    merge_json(&mut all, &json!({ "method": args.method }));
    let options = all.as_object().cloned().unwrap_or_default();
    let drawn = getrandom::u64().map_err(|error| CliError::Failed(format!("no random numbers: {error}")))?;
    spec_of(&args.class_name, options, drawn).map_err(|invalid| {
        let name = invalid.pointer.trim_start_matches('/').replace('/', ".");
        let flag = match name.as_str() {
            "class_name" => "--class-name".to_owned(),
            "" => "--set".to_owned(),
            name => format!("--set {name}"),
        };
        CliError::Input(format!("{flag}: {}", invalid.message))
    })
}

/// A training with these options, which takes `drawn_seed` if they name none.
pub(super) fn spec_of(
    class_name: &str,
    options: Map<String, Value>,
    drawn_seed: u64,
) -> Result<TrainSpec, Invalid> {
    TrainSpec::new(class_name, TrainOptions::given(&Value::Object(options))?, drawn_seed)
}

/// Options from KEY=VALUE pairs.
pub(super) fn options(pairs: &[String]) -> Result<Map<String, Value>, CliError> {
    let mut options = Map::new();
    for pair in pairs {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(CliError::Input(format!("--set: wanted KEY=VALUE, got {pair:?}")));
        };
        // Invalid JSON counts as a string: method=hypnos needs no quotes.
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        set(&mut options, key, value)
            .map_err(|()| CliError::Input(format!("--set: {key} is not an option")))?;
    }
    Ok(options)
}

/// Sets the value of a dotted key.
pub(super) fn set(options: &mut Map<String, Value>, key: &str, value: Value) -> Result<(), ()> {
    match key.split_once('.') {
        None => {
            options.insert(key.to_owned(), value);
            Ok(())
        }
        Some((outer, inner)) => {
            let place = options.entry(outer).or_insert_with(|| json!({}));
            set(place.as_object_mut().ok_or(())?, inner, value)
        }
    }
}

fn trace(dir: &Path, steps: &[u64]) -> Result<TraceInput, CliError> {
    std::fs::create_dir_all(dir)
        .map_err(|error| CliError::Input(unusable(dir, "cannot be created", &error)))?;
    Ok(TraceInput { dir: dir.to_owned(), steps: steps.iter().copied().collect() })
}
