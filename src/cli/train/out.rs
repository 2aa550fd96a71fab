//! The directory of one training: what it was asked for, where it stands, and what came out.
//!
//! ```text
//! job.json                      what was asked for, and of which bundle
//! checkpoint.safetensors        the last checkpoint, while the training goes on
//! log.jsonl                     what each step found
//! masks/ views/ previews/       what it looks like on the way
//! weights.safetensors           the weights that are served; weights-last.safetensors beside them, if they are others
//! report.html report.json       what led to them and what they are worth
//! losses.svg images/
//! diffusers/ single-file.safetensors   what --export asks for
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::Stop;
use crate::engine::{ClassImages, Drawn, Shown, Trained};
use crate::job::{Format, PAGE, REPORT, TrainSpec, WEIGHTS};
use crate::report;

const JOB: &str = "job.json";
const CHECKPOINT: &str = "checkpoint.safetensors";

/// A directory that belongs to one training.
pub(crate) struct Out {
    dir: PathBuf,
}

impl Out {
    /// A new directory for this training, or with `resume` the one that it was begun in. A directory that holds anything
    /// else is left alone.
    pub(crate) fn open(
        dir: &Path,
        spec: &TrainSpec,
        bundle: &str,
        resume: bool,
    ) -> Result<(Self, TrainSpec), Stop> {
        let out = Self { dir: dir.to_owned() };
        let job = dir.join(JOB);
        let begun = fs::read(&job).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        if let Some(begun) = begun.filter(|_| resume) {
            return Ok((out, same_training(&job, &begun, spec, bundle)?));
        }
        let entries = fs::read_dir(dir).map(Iterator::count);
        if entries.is_ok_and(|n| n > 0) {
            let what = if resume {
                "holds no training to go on with"
            } else {
                "is not empty; --resume goes on with what is there"
            };
            return Err(Stop::Input(format!("{}: {what}", dir.display())));
        }
        fs::create_dir_all(dir).map_err(|error| unmade(dir, &error))?;
        out.write(Path::new(JOB), to_json(&json!({ "spec": spec, "bundle": bundle })).as_bytes())?;
        Ok((out, spec.clone()))
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The checkpoint to go on from.
    pub(crate) fn checkpoint(&self) -> Option<PathBuf> {
        Some(self.dir.join(CHECKPOINT)).filter(|file| file.exists())
    }

    /// Whether everything is there already.
    pub(crate) fn is_done(&self) -> bool {
        self.dir.join(WEIGHTS).exists()
    }

    /// What is said of the training, once it is done.
    pub(crate) fn report(&self) -> Result<Value, Stop> {
        let path = self.dir.join(REPORT);
        let bytes = fs::read(&path).map_err(|error| unread(&path, &error))?;
        serde_json::from_slice(&bytes).map_err(|error| Stop::Input(format!("{}: {error}", path.display())))
    }

    /// The pictures that were drawn with the result, in order, as PNG.
    pub(crate) fn images(&self) -> Result<Vec<Vec<u8>>, Stop> {
        let n = self.report()?["images"].as_array().map_or(0, Vec::len);
        let paths = (0..n).map(|i| self.dir.join(image_name(i, Format::Png)));
        paths.map(|path| fs::read(&path).map_err(|error| unread(&path, &error))).collect()
    }

    /// A place on the same disk, empty, gone with what it is given as.
    pub(crate) fn scratch(&self) -> Result<tempfile::TempDir, Stop> {
        let made = tempfile::Builder::new().prefix(".scratch-").tempdir_in(&self.dir);
        made.map_err(|error| unmade(&self.dir, &error))
    }

    /// Puts a checkpoint in the place of the one before.
    pub(crate) fn keep_checkpoint(&self, file: &Path) -> Result<(), Stop> {
        let kept = fs::rename(file, self.dir.join(CHECKPOINT));
        kept.map_err(|error| Stop::Failed(format!("the checkpoint cannot be kept: {error}")))
    }

    /// Keeps a picture from the midst of the training.
    pub(crate) fn show(&self, what: Shown, picture: &Drawn) -> Result<(), Stop> {
        let name = match what {
            Shown::Mask(n) => format!("masks/{}.png", n + 1),
            Shown::View(n) => format!("views/{n:03}.png"),
            Shown::Attention(n) => format!("attention/{}.png", n + 1),
            Shown::Preview(step) => format!("previews/{step:05}.png"),
        };
        self.write(Path::new(&name), &picture.bytes)
    }

    /// Keeps the result, and says where its weights are. They come last: where they are, everything is.
    pub(crate) fn keep(&self, trained: &Trained) -> Result<PathBuf, Stop> {
        for (i, image) in trained.images.iter().enumerate() {
            self.write(Path::new(&image_name(i, image.format)), &image.bytes)?;
        }
        self.write(Path::new(REPORT), to_json(&trained.report).as_bytes())?;
        self.write(Path::new(PAGE), report::page(&trained.report, &trained.gallery).as_bytes())?;
        let last = trained.last.iter().map(|file| (file, "weights-last.safetensors"));
        for (file, name) in last.chain([(&trained.weights, WEIGHTS)]) {
            let path = self.dir.join(name);
            fs::rename(file, &path)
                .map_err(|error| Stop::Failed(format!("{}: cannot be written: {error}", path.display())))?;
        }
        let _ = fs::remove_file(self.dir.join(CHECKPOINT)); // it has done its work
        Ok(self.dir.join(WEIGHTS))
    }

    /// The shelf of class images: in `shared`, by their settings, or in this directory.
    pub(crate) fn class_images(&self, shared: Option<&Path>, wanted: &ClassImages) -> Result<Shelf, Stop> {
        let dir = shared.map_or_else(|| self.dir.join("class_images"), |dir| dir.join(&wanted.settings));
        if !wanted.seeds.is_empty() {
            fs::create_dir_all(&dir).map_err(|error| unmade(&dir, &error))?;
        }
        Ok(Shelf { dir, seeds: wanted.seeds.clone() })
    }

    /// Writes a file of the directory, whole or not at all.
    pub(crate) fn write(&self, name: &Path, bytes: &[u8]) -> Result<(), Stop> {
        let path = self.dir.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| unmade(parent, &error))?;
        }
        whole(&path, bytes)
            .map_err(|error| Stop::Failed(format!("{}: cannot be written: {error}", path.display())))
    }
}

/// Class images on disk.
pub(crate) struct Shelf {
    dir: PathBuf,
    seeds: Vec<u64>,
}

impl Shelf {
    /// Those that were drawn before.
    pub(crate) fn had(&self) -> Vec<Option<Vec<u8>>> {
        self.seeds.iter().map(|seed| fs::read(self.dir.join(format!("{seed}.png"))).ok()).collect()
    }

    pub(crate) fn keep(&self, index: usize, png: &[u8]) -> Result<(), Stop> {
        let Some(seed) = self.seeds.get(index) else { return Ok(()) };
        let path = self.dir.join(format!("{seed}.png"));
        whole(&path, png)
            .map_err(|error| Stop::Failed(format!("{}: cannot be written: {error}", path.display())))
    }
}

/// The training that was begun here, if it is the one that is asked for now; a seed that is not asked for is the one that
/// was drawn then.
fn same_training(job: &Path, begun: &Value, spec: &TrainSpec, bundle: &str) -> Result<TrainSpec, Stop> {
    let other = |what: &str| {
        Stop::Input(format!(
            "{}: was begun with another {what}; it cannot go on with this one",
            job.display()
        ))
    };
    let theirs: TrainSpec = serde_json::from_value(begun["spec"].clone())
        .map_err(|error| Stop::Input(format!("{}: tells of no training: {error}", job.display())))?;
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

fn whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, bytes).and_then(|()| fs::rename(&part, path)).inspect_err(|_| {
        let _ = fs::remove_file(&part); // it is of no use to anyone
    })
}

fn image_name(i: usize, format: Format) -> String {
    format!("images/{i:02}.{}", format.extension())
}

fn to_json(value: &Value) -> String {
    format!("{value:#}\n")
}

fn unmade(path: &Path, error: &io::Error) -> Stop {
    Stop::Input(format!("{}: cannot be made: {error}", path.display()))
}

fn unread(path: &Path, error: &io::Error) -> Stop {
    Stop::Failed(format!("{}: cannot be read: {error}", path.display()))
}
