//! The directory of one training: its specification, checkpoint and results.
//!
//! ```text
//! job.json                      the specification, and the bundle's hash
//! checkpoint.safetensors        the last checkpoint, while the training runs
//! log.jsonl                     metrics of each step
//! masks/ views/ previews/       images from the course of the training
//! weights.safetensors           the weights that are served; weights-last.safetensors, if the last step's differ
//! report.html report.json       the report
//! losses.svg images/
//! diffusers/ single-file.safetensors   exports, with --export
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::error::{CliError, unusable};
use crate::engine::{ClassImages, Image, Shown, Trained};
use crate::job::{Format, PAGE, REPORT, TrainSpec, WEIGHTS};
use crate::report::{self, Report};

const JOB: &str = "job.json";
const CHECKPOINT: &str = "checkpoint.safetensors";

/// A directory that belongs to one training.
pub(crate) struct Out {
    dir: PathBuf,
}

impl Out {
    /// Creates a directory for this training, or with `resume` opens the one that it was begun in. Fails for a
    /// directory with other contents.
    pub(crate) fn open(
        dir: &Path,
        spec: &TrainSpec,
        bundle: &str,
        resume: bool,
    ) -> Result<(Self, TrainSpec), CliError> {
        let out = Self { dir: dir.to_owned() };
        let job = dir.join(JOB);
        let begun = fs::read(&job).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        if let Some(begun) = begun.filter(|_| resume) {
            return Ok((out, same_training(&job, &begun, spec, bundle)?));
        }
        let entries = fs::read_dir(dir).map(Iterator::count);
        if entries.is_ok_and(|n| n > 0) {
            let what = if resume {
                "has no training to resume"
            } else {
                "is not empty; --resume continues the training in it"
            };
            return Err(CliError::Input(format!("{}: {what}", dir.display())));
        }
        fs::create_dir_all(dir).map_err(|error| unmade(dir, &error))?;
        out.write(Path::new(JOB), to_json(&json!({ "spec": spec, "bundle": bundle })).as_bytes())?;
        Ok((out, spec.clone()))
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The checkpoint to resume from.
    pub(crate) fn checkpoint(&self) -> Option<PathBuf> {
        Some(self.dir.join(CHECKPOINT)).filter(|file| file.exists())
    }

    /// Whether the training is complete.
    pub(crate) fn is_done(&self) -> bool {
        self.dir.join(WEIGHTS).exists()
    }

    /// The report of a complete training.
    pub(crate) fn report(&self) -> Result<Report, CliError> {
        let path = self.dir.join(REPORT);
        let bytes = fs::read(&path).map_err(|error| unread(&path, &error))?;
        serde_json::from_slice(&bytes)
            .map_err(|error| CliError::Input(format!("{}: {error}", path.display())))
    }

    /// Image `i` of those drawn with the result, as PNG.
    pub(crate) fn image(&self, i: usize) -> Result<Vec<u8>, CliError> {
        let path = self.dir.join(image_name(i, Format::Png));
        fs::read(&path).map_err(|error| unread(&path, &error))
    }

    /// An empty temporary directory on the same disk.
    pub(crate) fn scratch(&self) -> Result<tempfile::TempDir, CliError> {
        let made = tempfile::Builder::new().prefix(".scratch-").tempdir_in(&self.dir);
        made.map_err(|error| unmade(&self.dir, &error))
    }

    /// Replaces the checkpoint.
    pub(crate) fn keep_checkpoint(&self, file: &Path) -> Result<(), CliError> {
        let kept = fs::rename(file, self.dir.join(CHECKPOINT));
        kept.map_err(|error| CliError::Failed(format!("the checkpoint cannot be kept: {error}")))
    }

    /// Keeps an image from the course of the training.
    pub(crate) fn show(&self, what: Shown, picture: &Image) -> Result<(), CliError> {
        let name = match what {
            Shown::Mask(n) => format!("masks/{}.png", n + 1),
            Shown::View(n) => format!("views/{n:03}.png"),
            Shown::Attention(n) => format!("attention/{}.png", n + 1),
            Shown::Preview(step) => format!("previews/{step:05}.png"),
        };
        self.write(Path::new(&name), &picture.bytes)
    }

    /// Keeps the result; the path of its weights. They are written last: if they exist, everything does.
    pub(crate) fn keep(&self, trained: &Trained) -> Result<PathBuf, CliError> {
        for (i, image) in trained.images.iter().enumerate() {
            self.write(Path::new(&image_name(i, image.format)), &image.bytes)?;
        }
        let written = trained.report.to_json();
        let written =
            written.map_err(|error| CliError::Failed(format!("the report cannot be written: {error}")))?;
        self.write(Path::new(REPORT), (written + "\n").as_bytes())?;
        self.write(Path::new(PAGE), report::page(&trained.report, &trained.gallery).as_bytes())?;
        let last = trained.last.iter().map(|file| (file, "weights-last.safetensors"));
        for (file, name) in last.chain([(&trained.weights, WEIGHTS)]) {
            let path = self.dir.join(name);
            fs::rename(file, &path)
                .map_err(|error| CliError::Failed(unusable(&path, "cannot be written", &error)))?;
        }
        let _ = fs::remove_file(self.dir.join(CHECKPOINT)); // no longer needed
        Ok(self.dir.join(WEIGHTS))
    }

    /// The cache of class images: in `shared`, by their settings, or in this directory.
    pub(crate) fn class_images(
        &self,
        shared: Option<&Path>,
        wanted: &ClassImages,
    ) -> Result<ClassImageCache, CliError> {
        let dir = shared.map_or_else(|| self.dir.join("class_images"), |dir| dir.join(&wanted.settings));
        if !wanted.seeds.is_empty() {
            fs::create_dir_all(&dir).map_err(|error| unmade(&dir, &error))?;
        }
        Ok(ClassImageCache { dir, seeds: wanted.seeds.clone() })
    }

    /// Writes a file of the directory atomically.
    pub(crate) fn write(&self, name: &Path, bytes: &[u8]) -> Result<(), CliError> {
        let path = self.dir.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| unmade(parent, &error))?;
        }
        write_atomically(&path, bytes)
            .map_err(|error| CliError::Failed(unusable(&path, "cannot be written", &error)))
    }
}

/// Class images on disk.
pub(crate) struct ClassImageCache {
    dir: PathBuf,
    seeds: Vec<u64>,
}

impl ClassImageCache {
    /// The images drawn before; none for the others.
    pub(crate) fn had(&self) -> Vec<Option<Vec<u8>>> {
        self.seeds.iter().map(|seed| fs::read(self.dir.join(format!("{seed}.png"))).ok()).collect()
    }

    pub(crate) fn keep(&self, index: usize, png: &[u8]) -> Result<(), CliError> {
        let Some(seed) = self.seeds.get(index) else { return Ok(()) };
        let path = self.dir.join(format!("{seed}.png"));
        write_atomically(&path, png)
            .map_err(|error| CliError::Failed(unusable(&path, "cannot be written", &error)))
    }
}

/// The training that was begun here, if it is the requested one. If no seed is requested, it keeps the one drawn then.
fn same_training(job: &Path, begun: &Value, spec: &TrainSpec, bundle: &str) -> Result<TrainSpec, CliError> {
    let other = |what: &str| {
        CliError::Input(format!(
            "{}: was started with another {what}; it cannot be resumed with this one",
            job.display()
        ))
    };
    let theirs: TrainSpec = serde_json::from_value(begun["spec"].clone()).map_err(|error| {
        CliError::Input(format!("{}: is not the record of a training: {error}", job.display()))
    })?;
    if begun["bundle"] != bundle {
        return Err(other("bundle"));
    }
    if theirs.class_name != spec.class_name {
        return Err(other("class name"));
    }
    let asked = match spec.options.seed {
        Some(_) => spec.clone(),
        None => TrainSpec { seed: theirs.seed, ..spec.clone() },
    };
    let (Value::Object(before), Value::Object(now)) = (json!(theirs.options), json!(asked.options)) else {
        return Err(other("training"));
    };
    if let Some((name, _)) = now.iter().find(|(name, value)| before.get(*name) != Some(value)) {
        return Err(other(name));
    }
    if asked.seed != theirs.seed {
        return Err(other("seed"));
    }
    Ok(theirs)
}

fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, bytes).and_then(|()| fs::rename(&part, path)).inspect_err(|_| {
        let _ = fs::remove_file(&part); // incomplete
    })
}

fn image_name(i: usize, format: Format) -> String {
    format!("images/{i:02}.{}", format.extension())
}

fn to_json(value: &Value) -> String {
    format!("{value:#}\n")
}

fn unmade(path: &Path, error: &io::Error) -> CliError {
    CliError::Input(unusable(path, "cannot be created", error))
}

fn unread(path: &Path, error: &io::Error) -> CliError {
    CliError::Failed(unusable(path, "cannot be read", error))
}
