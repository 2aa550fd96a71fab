//! `hypnos evaluate`: scores images against the photos of a product and their prompts.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::bundle::BundleArgs;
use super::error::{CliError, unusable};
use super::output::{print_line, print_warning, progress_bar};
use super::photos;
use crate::ml::bundle::{Bundle, Drawing, hash_file};
use crate::ml::evaluate::{Evaluator, Generated, GeneratedSet, PromptLists};
use crate::ml::finetuned::FineTuned;
use crate::ml::precision::Precision;
use crate::ml::provenance::{FineTune, Provenance};
use crate::ml::sample::{self, ImageRequest, Models, SampleSettings};
use crate::ml::{self, device, image_io};
use crate::report::{Scores, scores_table};

#[derive(Debug, Args)]
pub(super) struct Evaluate {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Directory with photos of the product: PNG, JPEG or WebP
    #[arg(long)]
    photos: PathBuf,
    /// Directory with generated pictures, from anywhere
    #[arg(
        long,
        value_name = "DIR",
        requires = "prompts",
        conflicts_with = "model",
        required_unless_present = "model"
    )]
    generated: Option<PathBuf>,
    /// Their prompts, a line for each in the order of their names, with {product} for the product
    #[arg(long, value_name = "FILE", requires = "generated")]
    prompts: Option<PathBuf>,
    /// Fine-tuned weights that draw the pictures to score
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Class name of the product; by default that of --model
    #[arg(long, value_name = "NAME", required_unless_present = "model", conflicts_with = "model")]
    class_name: Option<String>,
    /// The prompt of the prompt-invariant protocol; pictures of all others are prompt-varying
    #[arg(long, value_name = "PROMPT", default_value = "a photo of {product}")]
    standard: String,
    /// Pictures that a model draws for each protocol, and of the class
    #[arg(short, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    n: u32,
    /// Image types, backgrounds and styles of the prompts that a model is given: JSON; our own if not given
    #[arg(long, value_name = "FILE", requires = "model")]
    prompt_lists: Option<PathBuf>,
    /// Seed of a model's prompts and noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Steps of the sampler
    #[arg(long, default_value_t = 25)]
    steps: usize,
    /// Weight of the prompt, by default what suits the bundle; 1 switches guidance off
    #[arg(long)]
    guidance: Option<f64>,
    /// Pictures drawn at once
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,
    /// Directory for the pictures that a model draws; not kept if not given
    #[arg(long, value_name = "DIR", requires = "model")]
    out: Option<PathBuf>,
    /// Print all scores as JSON
    #[arg(long)]
    json: bool,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What --model draws in: f32, tf32 or bf16; by default bf16 on GPUs from Ampere on, f32 elsewhere. tf32 also rounds
    /// the factors of the networks that judge
    #[arg(long)]
    precision: Option<Precision>,
}

/// The images to evaluate.
struct Pictures {
    class_name: String,
    /// Each with its name, the prompt-invariant ones first.
    all: Vec<(String, Generated)>,
    n_invariant: usize,
    class_images: Vec<Generated>,
}

pub(super) fn run(args: &Evaluate) -> Result<ExitCode, CliError> {
    let read = photos::pngs(&args.photos, 1..=usize::MAX)?;
    let real = read.iter().map(|(_, png)| image_io::read_png(png)).collect::<Result<Vec<_>, _>>()?;
    let generated = args.generated.as_deref().map(|dir| from_disk(args, dir)).transpose()?;
    let lists = args.prompt_lists.as_deref().map(prompt_lists).transpose()?.unwrap_or_default();
    let (device, precision) = device::open_in(&args.device, args.precision)?;
    let bundle = Bundle::open(&args.bundle.dir()?)?;
    let evaluator = Evaluator::new(&bundle, &device, real)?;
    let pictures = match (generated, &args.model) {
        (Some(pictures), _) => pictures,
        (None, Some(model)) => {
            bundle.warnings().iter().for_each(|warning| print_warning(warning));
            let base = Models::load(&bundle, &device, precision)?;
            let finetuned = FineTuned::load(model, &bundle, &base)?;
            drawn(args, &bundle, &finetuned, &lists, evaluator.can_score_class())?
        }
        (None, None) => return Err(CliError::Input("wanted --generated or --model".into())),
    };
    let scores = scores(&evaluator, &pictures)?;
    if args.json {
        print_line(&format!("{:#}", with_names(&scores, &pictures)));
    } else {
        print_line(scores_table(&scores).markdown().trim_end());
        print_line("");
        print_line(&scores.pairing);
    }
    Ok(ExitCode::SUCCESS)
}

/// Images from a directory, with their prompts.
fn from_disk(args: &Evaluate, dir: &Path) -> Result<Pictures, CliError> {
    let file = args.prompts.clone().unwrap_or_default();
    let text = read_text(&file)?;
    let prompts: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let files = photos::pngs(dir, 1..=usize::MAX)?;
    if prompts.len() != files.len() {
        let (n, wanted) = (prompts.len(), files.len());
        let (file, dir) = (file.display(), dir.display());
        return Err(CliError::Input(format!(
            "{file}: wanted {wanted} prompts, one for each picture of {dir}, got {n}"
        )));
    }
    let mut all = Vec::new();
    for ((file, png), prompt) in files.iter().zip(prompts) {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        all.push((name, Generated { pixels: image_io::read_png(png)?, prompt: prompt.to_owned() }));
    }
    all.sort_by_key(|(_, one)| one.prompt != args.standard); // stable: by name within a protocol
    let n_invariant = all.iter().filter(|(_, one)| one.prompt == args.standard).count();
    let class_name = args.class_name.clone().unwrap_or_default();
    Ok(Pictures { class_name, all, n_invariant, class_images: Vec::new() })
}

/// Prompt lists from a user's file.
pub(super) fn prompt_lists(file: &Path) -> Result<PromptLists, CliError> {
    PromptLists::parse(&read_text(file)?)
        .map_err(|error| CliError::Input(format!("{}: {error}", file.display())))
}

fn read_text(file: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(file).map_err(|error| CliError::Input(unusable(file, "cannot be read", &error)))
}

/// Images drawn by a fine-tuned model: `n` for each protocol, and `n` of the class if that is evaluated.
fn drawn(
    args: &Evaluate,
    bundle: &Bundle,
    finetuned: &FineTuned,
    lists: &PromptLists,
    with_class: bool,
) -> Result<Pictures, CliError> {
    let (n, side, product) = (args.n as usize, bundle.resolution(), &finetuned.product);
    let Drawing { scheduler, guidance } = bundle.manifest().drawing;
    let how = SampleSettings {
        sampler: scheduler,
        steps: args.steps,
        guidance: args.guidance.unwrap_or(guidance),
        width: side,
        height: side,
    };
    how.check(&finetuned.models)?;
    let standard = vec![args.standard.clone(); n];
    let of_class = vec![format!("a photo of {}", product.class_name); if with_class { n } else { 0 }];
    let prompts: Vec<String> =
        standard.into_iter().chain(lists.draw(n, args.seed)?).chain(of_class).collect();
    let bar =
        progress_bar("drawing {bar:40} {pos} of {len}, {elapsed} gone, {eta} left", prompts.len() as u64);
    let kept = args.out.as_ref().and(args.model.as_deref());
    let weights_sha256 = kept.map(hash_file).transpose()?;
    let finetune = Some(FineTune { weights_sha256: weights_sha256.as_deref(), job: None });
    let mut all = Vec::new();
    for batch in (0..prompts.len()).collect::<Vec<_>>().chunks(args.batch as usize) {
        let pictures: Vec<ImageRequest> = (batch.iter())
            .map(|&i| ImageRequest {
                prompt: product.named(&prompts[i]),
                negative: String::new(),
                seed: args.seed.wrapping_add(i as u64),
            })
            .collect();
        let pixels =
            sample::draw(&finetuned.models, &pictures, &how, &mut |_, _| Ok(())).map_err(ml::Error::from)?;
        for ((&i, picture), pixels) in batch.iter().zip(&pictures).zip(pixels) {
            let (name, prompt) = (format!("{i:04}.png"), prompts[i].clone());
            if let Some(dir) = &args.out {
                let precision = finetuned.models.precision;
                let texts = Provenance::new(picture, &how, bundle, finetune, false, precision)?.texts();
                std::fs::create_dir_all(dir)
                    .map_err(|error| CliError::Input(unusable(dir, "cannot be created", &error)))?;
                image_io::save_png(&dir.join(&name), &pixels, (side, side), &texts)?;
            }
            all.push((name, Generated { pixels: image_io::from_pixels(pixels, (side, side))?, prompt }));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let class_images = all.split_off(2 * n).into_iter().map(|(_, picture)| picture).collect();
    Ok(Pictures { class_name: product.class_name.clone(), all, n_invariant: n, class_images })
}

/// The scores of the images, as in reports.
fn scores(evaluator: &Evaluator, pictures: &Pictures) -> Result<Scores, CliError> {
    let generated: Vec<Generated> = pictures.all.iter().map(|(_, one)| one.clone()).collect();
    let (invariant, varying) = generated.split_at(pictures.n_invariant);
    let class_images: Vec<_> = pictures.class_images.iter().map(|one| one.pixels.clone()).collect();
    let bar = progress_bar("judging {bar:40} {percent}%, {elapsed} gone, {eta} left", 0);
    let drawn =
        GeneratedSet { class_name: &pictures.class_name, invariant, varying, class_images: &class_images };
    let found = evaluator.evaluate(&drawn, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        Ok(())
    });
    let found = found.map_err(ml::Error::from)?;
    bar.finish_and_clear();
    Ok(found.into())
}

/// Scores as JSON, each image with its name and its prompt.
fn with_names(scores: &Scores, pictures: &Pictures) -> Value {
    let mut scores = json!(scores);
    let each = scores["pictures"].as_array_mut().into_iter().flatten();
    for (picture, (name, generated)) in each.zip(&pictures.all) {
        picture["name"] = json!(name);
        picture["prompt"] = json!(generated.prompt);
    }
    scores
}
