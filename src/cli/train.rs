//! `hypnos train`: photos to a model, by hand. It runs the engine that workers run, and keeps what comes out in a
//! directory instead of a store.

mod out;
mod plot;
mod show;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::{Stop, say, service, warn};
use crate::engine::{CandleEngine, Ending, Engine, Settings, TrainInput};
use crate::job::{Method, N_PHOTOS_MAX, N_PHOTOS_MIN, TrainOptions, TrainSpec};
use crate::ml::train::Trace;
use crate::photo::{self, Limits};
use out::Out;
use show::Show;

/// Shortest side of a photo here, where it may be meant for a small model.
const SIDE_MIN: u32 = 32;

#[derive(Clone, Debug, Args)]
pub(super) struct Train {
    /// Directory of the models, in the diffusers layout
    #[arg(long)]
    bundle: PathBuf,
    /// Directory with 3 to 5 photos of the product: PNG, JPEG or WebP
    #[arg(long)]
    photos: PathBuf,
    /// What kind of thing it is, such as "coffee mug"
    #[arg(long)]
    class_name: String,
    /// hypnos, dreambooth or textual_inversion
    #[arg(long, default_value = "hypnos")]
    method: Method,
    /// Directory for what comes out; new or empty, unless --resume is given
    #[arg(long)]
    out: PathBuf,
    /// Any option of a training by its name in the API, such as steps=400 or loss_weights.prior=0.5
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on from the last checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// Steps between two checkpoints
    #[arg(long, value_name = "STEPS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: u64,
    /// Directory of class images, shared by trainings; inside --out if not given
    #[arg(long, value_name = "DIR")]
    class_images: Option<PathBuf>,
    /// Write chosen steps down whole, as safetensors, in this directory
    #[arg(long, value_name = "DIR", requires = "trace_steps")]
    trace: Option<PathBuf>,
    /// The steps to write down, counted from 1
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "trace")]
    trace_steps: Vec<u64>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Pictures drawn at once: more is quicker for each and takes more memory
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Compute blocks again instead of keeping them: less memory for a third more time
    #[arg(long)]
    checkpointing: bool,
}

pub(super) fn run(args: &Train) -> Result<ExitCode, Stop> {
    // 1. All that can be refused, before anything is loaded or written.
    let spec = spec(args)?;
    let photos = photos(&args.photos)?;
    if let Some(step) =
        args.trace_steps.iter().find(|&&step| step == 0 || step > u64::from(spec.options.steps))
    {
        return Err(Stop::Input(format!("--trace-steps: wanted 1 to {}, got {step}", spec.options.steps)));
    }
    let engine = CandleEngine::open(Settings {
        bundle: args.bundle.clone(),
        device: args.device.clone(),
        batch: args.batch,
        adapted_bytes_max: 0,
        checkpointing: args.checkpointing,
    })?;
    engine.check(&spec)?;
    let (out, spec) = Out::open(&args.out, &spec, engine.bundle(), args.resume)?;

    // 2. The training, in a thread of its own, while signals are heard here.
    let args = args.clone();
    service::run(|stop| async move {
        let trained = tokio::task::spawn_blocking(move || train(&args, engine, &spec, &photos, &out, &stop));
        trained.await.map_err(|error| Stop::Failed(format!("the training broke: {error}")))?
    })
}

fn train(
    args: &Train,
    mut engine: CandleEngine,
    spec: &TrainSpec,
    photos: &[Vec<u8>],
    out: &Out,
    stop: &CancellationToken,
) -> Result<ExitCode, Stop> {
    let trace = args.trace.as_deref().map(|dir| trace(dir, &args.trace_steps)).transpose()?;
    let shelf = out.class_images(args.class_images.as_deref(), &engine.class_images(spec))?;
    let (resume, scratch) = (out.checkpoint(), out.scratch()?);
    let input = TrainInput {
        spec,
        photos,
        class_images: shelf.had(),
        resume: resume.as_deref(),
        scratch: scratch.path(),
        trace: trace.as_ref(),
    };
    let mut show = Show::new(out, &shelf, args.checkpoint_every, stop);
    let ending = engine.train(input, &mut |_, beat| show.hear(beat));
    show.finish()?;
    match ending? {
        Ending::Trained(trained) => {
            out.keep(&trained)?;
            say(&out.dir().display().to_string());
            Ok(ExitCode::SUCCESS)
        }
        Ending::Paused(checkpoint) => {
            let at = match checkpoint {
                Some((step, file)) => {
                    out.keep_checkpoint(&file)?;
                    format!("after step {step}; --resume goes on from there")
                }
                None => "before the first step".into(),
            };
            Err(Stop::Failed(format!("told to stop: stopped {at}")))
        }
        Ending::Stopped => Err(Stop::Failed("the training was stopped".into())),
    }
}

/// The training that the arguments ask for.
fn spec(args: &Train) -> Result<TrainSpec, Stop> {
    let mut options = Map::new();
    for pair in &args.set {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(Stop::Input(format!("--set: wanted KEY=VALUE, got {pair:?}")));
        };
        // What is no JSON is a text: method=hypnos needs no quotes.
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        set(&mut options, key, value).map_err(|()| Stop::Input(format!("--set: {key} is no option")))?;
    }
    options.insert("method".to_owned(), json!(args.method));
    let options = TrainOptions::given(&Value::Object(options));
    let options = options.map_err(|error| Stop::Input(format!("--set: {error}")))?;
    let drawn = getrandom::u64().map_err(|error| Stop::Failed(format!("no random numbers: {error}")))?;
    TrainSpec::new(&args.class_name, options, drawn).map_err(|invalid| {
        let name = invalid.pointer.trim_start_matches('/').replace('/', ".");
        let flag = if name == "class_name" { "--class-name".to_owned() } else { format!("--set {name}") };
        Stop::Input(format!("{flag}: {}", invalid.message))
    })
}

/// Puts a value at a dotted key.
fn set(options: &mut Map<String, Value>, key: &str, value: Value) -> Result<(), ()> {
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

/// The photos of a directory, by name, as an upload would be kept.
fn photos(dir: &Path) -> Result<Vec<Vec<u8>>, Stop> {
    let unread = |path: &Path, error: std::io::Error| {
        Stop::Input(format!("{}: cannot be read: {error}", path.display()))
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|error| unread(dir, error))? {
        let path = entry.map_err(|error| unread(dir, error))?.path();
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        if extension.is_some_and(|e| ["png", "jpg", "jpeg", "webp"].contains(&e.as_str())) {
            files.push(path);
        }
    }
    files.sort();
    let n = files.len();
    if !(N_PHOTOS_MIN..=N_PHOTOS_MAX).contains(&n) {
        let (wanted, dir) = (format!("{N_PHOTOS_MIN} to {N_PHOTOS_MAX}"), dir.display());
        return Err(Stop::Input(format!("{dir}: wanted {wanted} photos ({}), got {n}", photo::ACCEPTED)));
    }
    let limits = Limits { side_min: SIDE_MIN, ..Limits::default() };
    let decoded = files.iter().map(|file| {
        let bytes = std::fs::read(file).map_err(|error| unread(file, error))?;
        let photo = photo::decode(&bytes, &limits);
        let photo = photo.map_err(|refusal| Stop::Input(format!("{}: {refusal}", file.display())))?;
        Ok((file, photo))
    });
    let decoded = decoded.collect::<Result<Vec<_>, Stop>>()?;
    for (file, photo) in &decoded {
        for warning in &photo.inspection.warnings {
            warn(&format!("{}: is {warning}", file.display()));
        }
    }
    Ok(decoded.into_iter().map(|(_, photo)| photo.png).collect())
}

fn trace(dir: &Path, steps: &[u64]) -> Result<Trace, Stop> {
    std::fs::create_dir_all(dir)
        .map_err(|error| Stop::Input(format!("{}: cannot be made: {error}", dir.display())))?;
    Ok(Trace { dir: dir.to_owned(), steps: steps.iter().copied().collect() })
}
