//! `hypnos compare`: trains several methods on several products and evaluates them, as in the paper's tables.
//!
//! Every cell is a training in a directory of its own, like that of `hypnos train`: one that is done is not repeated,
//! and one that was begun resumes from its checkpoint.

mod recipes;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use indicatif::{MultiProgress, ProgressBar};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::bundle::BundleArgs;
use super::error::{CliError, unusable};
use super::output::{print_line, print_warning, progress_bar};
use super::train::out::Out;
use super::train::{Work, options, spec_of};
use super::{evaluate, photos, service};
use crate::engine::{CandleEngine, Engine, EngineSettings};
use crate::job::TrainSpec;
use crate::ml::bundle::{Bundle, Manifest};
use crate::ml::image_io;
use crate::ml::precision::Precision;
use crate::report::{Evaluated, Gallery, Protocol, Report, Thumbnail, comparison_page, comparison_table};
use recipes::Recipe;

/// Longest side of an image on the page.
const THUMBNAIL_SIDE: u32 = 256;

#[derive(Clone, Debug, Args)]
pub(super) struct Compare {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Methods, each `METHOD[-no-PART][@RATE]`: hypnos, dreambooth or textual_inversion; without s_p, perceptual,
    /// discriminator, views or prior; at this learning rate
    #[arg(long, value_name = "LIST", value_delimiter = ',', required = true)]
    recipes: Vec<String>,
    /// Directories with 3 to 5 photos of a product each, as DIR=CLASS; without =CLASS the directory is named for it
    #[arg(long, value_name = "DIR", num_args = 1.., required = true)]
    subjects: Vec<String>,
    /// Output directory; trainings that are complete there are not repeated
    #[arg(long)]
    out: PathBuf,
    /// Any option of a training by its name in the API, for all of them; the options of a method's name take precedence
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The seed of every training
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Pictures that each model draws, half of them for each protocol
    #[arg(long, default_value_t = 16)]
    images: u32,
    /// Image types, backgrounds and styles of the prompts: JSON; our own if not given
    #[arg(long, value_name = "FILE")]
    prompt_lists: Option<PathBuf>,
    /// Steps between two checkpoints
    #[arg(long, value_name = "STEPS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: u64,
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

/// A product.
struct Subject {
    name: String,
    class_name: String,
    photos: Vec<Vec<u8>>,
}

/// A method on a product.
struct Cell {
    recipe: String,
    subject: usize,
    spec: TrainSpec,
}

pub(super) fn run(args: &Compare) -> Result<ExitCode, CliError> {
    // 1. Everything that can be rejected, before anything is loaded or written.
    let recipes = args.recipes.iter().map(|text| text.parse()).collect::<Result<Vec<Recipe>, String>>();
    let recipes = recipes.map_err(|what| CliError::Input(format!("--recipes: {what}")))?;
    let subjects = subjects(&args.subjects)?;
    let cells = cells(args, &recipes, &subjects, Bundle::open(&args.bundle.dir()?)?.manifest())?;
    let engine = CandleEngine::open(EngineSettings {
        bundle: args.bundle.dir()?,
        device: args.device.clone(),
        precision: args.precision,
        batch: args.batch,
        finetuned_bytes_max: 0,
        checkpointing: args.gradient_checkpointing,
        memory: service::own_memory_check(args.ignore_memory),
    })?;
    cells.iter().try_for_each(|cell| engine.check(&cell.spec, &subjects[cell.subject].photos))?;
    engine.warnings().iter().for_each(|warning| print_warning(warning));

    // 2. The trainings, in their own thread, while signals are handled here.
    let args = args.clone();
    service::run(|stop| async move {
        let compared = tokio::task::spawn_blocking(move || compare(&args, engine, &subjects, &cells, &stop));
        compared.await.map_err(|error| CliError::Failed(format!("the comparison panicked: {error}")))?
    })
}

fn subjects(all: &[String]) -> Result<Vec<Subject>, CliError> {
    let mut subjects: Vec<Subject> = Vec::new();
    for text in all {
        let (dir, class_name) = match text.rsplit_once('=') {
            Some((dir, class_name)) => (Path::new(dir), Some(class_name.to_owned())),
            None => (Path::new(text), None),
        };
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.is_empty() || subjects.iter().any(|other| other.name == name) {
            return Err(CliError::Input(format!(
                "--subjects: {text}: wanted directories with names of their own"
            )));
        }
        let class_name = class_name.unwrap_or_else(|| recipes::class_of(&name));
        subjects.push(Subject { name, class_name, photos: photos::of_product(dir)? });
    }
    Ok(subjects)
}

/// All trainings, grouped by method, as in the paper's tables.
fn cells(
    args: &Compare,
    recipes: &[Recipe],
    subjects: &[Subject],
    bundle: &Manifest,
) -> Result<Vec<Cell>, CliError> {
    let lists = args.prompt_lists.as_deref().map(evaluate::prompt_lists).transpose()?.unwrap_or_default();
    let n_varying = args.images as usize / 2;
    let mut common = json!({
        // The last step of each is compared, as in the paper, without previews and trials.
        "previews": [], "evaluation": { "images": args.images, "class_images": n_varying.max(1), "trials": [] },
    });
    if n_varying > 0 {
        common["evaluation"]["prompts"] = json!(lists.draw(n_varying, args.seed)?);
    }
    let asked = options(&args.set)?;
    let mut cells = Vec::new();
    for recipe in recipes {
        for (i, subject) in subjects.iter().enumerate() {
            let options = recipe.options(bundle, &common, &asked);
            let spec = spec_of(&subject.class_name, options, args.seed).map_err(|invalid| {
                let at = invalid.pointer.trim_start_matches('/').replace('/', ".");
                CliError::Input(format!("{recipe}, {}: {at}: {}", subject.name, invalid.message))
            })?;
            cells.push(Cell { recipe: recipe.to_string(), subject: i, spec });
        }
    }
    Ok(cells)
}

fn compare(
    args: &Compare,
    mut engine: CandleEngine,
    subjects: &[Subject],
    cells: &[Cell],
    stop: &CancellationToken,
) -> Result<ExitCode, CliError> {
    let (bars, class_image_cache) = (MultiProgress::new(), args.out.join("class_images"));
    let template = "{prefix:16} {bar:32} {pos} of {len}, {elapsed} gone  {msg}";
    let whole = bars.add(progress_bar(template, cells.len() as u64).with_prefix("trainings"));
    let mut done = Vec::new();
    for cell in cells {
        let subject = &subjects[cell.subject];
        whole.set_message(format!("{}, {}", cell.recipe, subject.name));
        let dir = args.out.join(&subject.name).join(&cell.recipe);
        let (out, spec) = Out::open(&dir, &cell.spec, &engine.model().card.sha256, dir.exists())?;
        if !out.is_done() {
            let class_image_cache =
                out.class_images(Some(&class_image_cache), &engine.class_images(&spec))?;
            let work = Work {
                spec: &spec,
                photos: &subject.photos,
                out: &out,
                class_image_cache: &class_image_cache,
                trace: None,
                checkpoint_every: args.checkpoint_every,
                stop,
                again: "the same command",
            };
            work.done_by(&mut engine, bars.add(ProgressBar::new(0)))?;
        }
        let report = out.report()?;
        let gallery = gallery(&out, &report)?;
        done.push((cell, report, gallery));
        whole.inc(1);
    }
    whole.finish_and_clear();
    write_report(args, subjects, &done)
}

/// The images of a cell, for the page.
fn gallery(out: &Out, report: &Report) -> Result<Gallery, CliError> {
    let thumbnails = report.images.iter().enumerate().map(|(i, image)| {
        let webp = image_io::thumbnail(&image_io::read_png(&out.image(i)?)?, THUMBNAIL_SIDE)?;
        Ok(Thumbnail { webp, caption: image.prompt.clone() })
    });
    Ok(Gallery { pictures: thumbnails.collect::<Result<_, CliError>>()?, ..Gallery::default() })
}

/// Prints and writes both tables, and writes the page.
fn write_report(
    args: &Compare,
    subjects: &[Subject],
    done: &[(&Cell, Report, Gallery)],
) -> Result<ExitCode, CliError> {
    let evaluated: Vec<Evaluated<'_>> = (done.iter())
        .map(|(cell, report, _)| Evaluated {
            method: &cell.recipe,
            subject: &subjects[cell.subject].name,
            scores: report.evaluation.as_ref(),
        })
        .collect();
    let table = |title: &str, protocol: Protocol| {
        format!("{title}\n\n{}", comparison_table(protocol, &evaluated).markdown())
    };
    let tables = table("Table 1: prompt-invariant", Protocol::PromptInvariant)
        + "\n"
        + &table("Table 2: prompt-varying", Protocol::PromptVarying);
    print_line(&tables);
    let drawn: Vec<(&Report, &Gallery)> = done.iter().map(|(_, report, gallery)| (report, gallery)).collect();
    let page = comparison_page("Methods side by side", &evaluated, &drawn);
    for (name, text) in [("tables.md", &tables), ("comparison.html", &page)] {
        let path = args.out.join(name);
        std::fs::write(&path, text)
            .map_err(|error| CliError::Failed(unusable(&path, "cannot be written", &error)))?;
    }
    print_line(&args.out.display().to_string());
    Ok(ExitCode::SUCCESS)
}
