//! `hypnos sample`: draws images from a bundle and a prompt.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use clap::Args;

use super::bundle::BundleArgs;
use super::error::unusable;
use super::output::{print_line, print_warning, progress_bar};
use crate::job::PRODUCT;
use crate::ml::bundle::{Bundle, hash_file};
use crate::ml::finetuned::FineTuned;
use crate::ml::precision::Precision;
use crate::ml::product::Product;
use crate::ml::provenance::{FineTune, Provenance};
use crate::ml::sample::{ImageRequest, Models, SampleSettings, decode, initial_noise, latents};
use crate::ml::samplers::Sampler;
use crate::ml::tensorfile::{TensorFile, save};
use crate::ml::{Error, Result, device, image_io};

/// Name of the tensor in latents files.
const LATENTS: &str = "latents";

#[derive(Debug, Args)]
pub(super) struct Sample {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Fine-tuned weights to draw with: `weights.safetensors` of a training from this bundle.
    #[arg(long, value_name = "WEIGHTS")]
    model: Option<PathBuf>,
    /// Prompt; {product} stands for the product of --model.
    #[arg(long)]
    prompt: String,
    /// Negative prompt.
    #[arg(long, default_value = "")]
    negative: String,
    /// Steps of the sampler.
    #[arg(long, default_value_t = 25)]
    steps: usize,
    /// Weight of the prompt against the negative prompt, by default what suits the bundle; 1 switches guidance off.
    #[arg(long)]
    guidance: Option<f64>,
    /// ddim, pndm, dpmpp-2m, dpmpp-2m-karras, euler or euler-a; by default what suits the bundle.
    #[arg(long)]
    scheduler: Option<Sampler>,
    /// Seed of the first picture; each further one takes the next.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many pictures.
    #[arg(short, long, default_value_t = 1)]
    n: usize,
    /// Pictures drawn at once: more is quicker for each and takes more memory.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Pixels; the bundle's own size if not given.
    #[arg(long)]
    width: Option<usize>,
    /// Pixels; the bundle's own size if not given.
    #[arg(long)]
    height: Option<usize>,
    /// Directory for the pictures; created if it does not exist.
    #[arg(long)]
    out: PathBuf,
    /// Noise to begin with instead of the seeds': a safetensors file with `latents` [n, c, h, w], unit normal.
    #[arg(long)]
    latents: Option<PathBuf>,
    /// Write the final latents, before decoding, as `latents` [n, c, h, w] f32 in the UNet's scale.
    #[arg(long)]
    save_latents: Option<PathBuf>,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// f32, tf32 or bf16; by default bf16 on GPUs from Ampere on, f32 elsewhere.
    #[arg(long)]
    precision: Option<Precision>,
}

pub(super) fn run(args: &Sample) -> Result<ExitCode> {
    if args.n == 0 || args.batch == 0 {
        return Err(Error::input("-n and --batch: wanted at least 1"));
    }
    let (device, precision) = device::open_in(&args.device, args.precision)?;
    let bundle = Bundle::open(&args.bundle.dir()?)?;
    bundle.warnings().iter().for_each(|warning| print_warning(warning));
    let mut models = Models::load(&bundle, &device, precision)?;
    let mut product = bundle.manifest().product.clone();
    if let Some(file) = &args.model {
        let finetuned = FineTuned::load(file, &bundle, &models)?;
        (models, product) = (finetuned.models, Some(finetuned.product));
    }
    let prompt = named("--prompt", &args.prompt, product.as_ref())?;
    let negative = named("--negative", &args.negative, product.as_ref())?;
    let (side, own) = (bundle.resolution(), bundle.manifest().drawing);
    let settings = SampleSettings {
        sampler: args.scheduler.unwrap_or(own.scheduler),
        steps: args.steps,
        guidance: args.guidance.unwrap_or(own.guidance),
        width: args.width.unwrap_or(side),
        height: args.height.unwrap_or(side),
    };
    settings.check(&models)?;
    warn_of_long_prompts(&prompt, &negative, &models);
    let pictures: Vec<ImageRequest> = (0..args.n as u64)
        .map(|i| ImageRequest {
            prompt: prompt.clone(),
            negative: negative.clone(),
            seed: args.seed.wrapping_add(i),
        })
        .collect();
    let noise = match &args.latents {
        Some(file) => read_latents(file, args.n, settings.latent_dims(&models))?,
        None => initial_noise(&pictures, settings.latent_dims(&models))?,
    };
    std::fs::create_dir_all(&args.out)
        .map_err(|error| Error::input(unusable(&args.out, "cannot be created", &error)))?;
    draw(args, &bundle, &models, &pictures, &settings, &noise)
}

fn draw(
    args: &Sample,
    bundle: &Bundle,
    models: &Models,
    pictures: &[ImageRequest],
    settings: &SampleSettings,
    noise: &Tensor,
) -> Result<ExitCode> {
    let bar = progress_bar("{bar:40} step {pos} of {len}, {elapsed} gone, {eta} left", 0);
    let n_batches = pictures.len().div_ceil(args.batch);
    let weights_sha256 = args.model.as_deref().map(hash_file).transpose()?;
    let finetune = weights_sha256.as_deref().map(|hash| FineTune { weights_sha256: Some(hash), job: None });
    let mut done = Vec::new();
    for (i, batch) in pictures.chunks(args.batch).enumerate() {
        let noise = noise.narrow(0, i * args.batch, batch.len())?;
        let drawn = latents(models, batch, settings, &noise, &mut |step, n_steps| {
            bar.set_length((n_batches * n_steps) as u64);
            bar.set_position((i * n_steps + step) as u64);
            Ok(())
        })?;
        for (picture, pixels) in batch.iter().zip(decode(models, &drawn)?) {
            let file = args.out.join(format!("{}.png", picture.seed));
            let (own_latents, precision) = (args.latents.is_some(), models.precision);
            let drawn = Provenance::new(picture, settings, bundle, finetune, own_latents, precision)?;
            image_io::save_png(&file, &pixels, (settings.width, settings.height), &drawn.texts())?;
            bar.suspend(|| print_line(&file.display().to_string()));
        }
        done.push(drawn.to_device(&Device::Cpu)?);
    }
    bar.finish_and_clear();
    if let Some(file) = &args.save_latents {
        let tensors = BTreeMap::from([(LATENTS.to_string(), Tensor::cat(&done, 0)?)]);
        save(file, &tensors, &BTreeMap::new(), DType::F32)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A prompt with the product's words in place of the placeholder.
fn named(option: &str, prompt: &str, product: Option<&Product>) -> Result<String> {
    match product {
        Some(product) => Ok(product.named(prompt)),
        None if prompt.contains(PRODUCT) => Err(Error::input(format!(
            "{option}: asks for {PRODUCT}, but the bundle has none; --model has one"
        ))),
        None => Ok(prompt.to_owned()),
    }
}

fn warn_of_long_prompts(prompt: &str, negative: &str, models: &Models) {
    let room = models.tokenizer.length() - 2;
    for (name, text) in [("--prompt", prompt), ("--negative", negative)] {
        let n_tokens = models.tokenizer.count(text);
        if n_tokens > room {
            print_warning(&format!("{name} has {n_tokens} tokens; all after the first {room} are not seen"));
        }
    }
}

fn read_latents(file: &Path, n: usize, [c, h, w]: [usize; 3]) -> Result<Tensor> {
    let tensors = TensorFile::open(file)?;
    let wanted = [n, c, h, w];
    match tensors.shape(LATENTS) {
        Some(shape) if shape == wanted => {
            Ok(Tensor::from_vec(tensors.read(LATENTS)?, &wanted, &Device::Cpu)?)
        }
        Some(shape) => {
            Err(Error::input(format!("{}: `{LATENTS}` is {shape:?}, wanted {wanted:?}", file.display())))
        }
        None => Err(Error::input(format!("{}: has no tensor `{LATENTS}`", file.display()))),
    }
}
