//! What a device can do: train on photos, draw with the result. The one seam of the crate with a double in its tests.
//!
//! An engine is owned by one OS thread. It does no network and no SQL, and it knows no queue: it is given files and
//! bytes and reports through a *watch* between two steps; the watch says whether to go on. Time is the caller's too.

mod candle;
mod recipe;
mod shelf;
mod training;

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::job::{Fault, Format, Progress, SampleSpec, TrainSpec};
use crate::ml::train::{Taken, Trace};
use crate::report::Gallery;

pub use candle::{CandleEngine, Settings};

/// What the watcher wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Write a checkpoint, report it, and go on. Where there is nothing to save yet, just go on.
    Checkpoint,
    /// Write a checkpoint if there is anything to save, and end with [`Ending::Paused`].
    Pause,
    /// End with [`Ending::Stopped`]; write nothing.
    Stop,
}

/// What a training reports, between two steps.
#[derive(Debug)]
pub enum Beat {
    /// How far it is. `eta_seconds` is left to the watcher, who has a clock.
    Progress(Progress),
    /// A class image was drawn: its place in [`ClassImages::seeds`], and the picture as PNG.
    ClassImage {
        /// Its place.
        index: usize,
        /// The picture.
        png: Vec<u8>,
    },
    /// What a step found.
    Taken {
        /// The step, counted from 1.
        step: u64,
        /// Its losses.
        taken: Taken,
    },
    /// A picture that people may look at while the training goes on.
    Shown {
        /// Which.
        what: Shown,
        /// The picture.
        picture: Drawn,
    },
    /// A checkpoint was written as asked; the file is the watcher's now.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// The file, in the training's scratch directory.
        file: PathBuf,
    },
}

/// A picture from the midst of a training. A training that goes on from a checkpoint shows the first two again, as they
/// were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Where the product was found in this photo.
    Mask(usize),
    /// This view, as it is learned from.
    View(usize),
    /// Where the discriminator looks in the first view of this photo, when all is learned.
    Attention(usize),
    /// The product as it is drawn after so many steps.
    Preview(u64),
}

/// Hears each beat and may draw meanwhile with the device that it is handed.
pub type Watch<'a> = dyn FnMut(&mut dyn Artist, Beat) -> Flow + 'a;

/// Which class images a training wants. Two trainings with the same `settings` want the same pictures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassImages {
    /// SHA-256, in hexadecimal, of all that decides what they show: bundle, prompt, sampler, steps, guidance, size.
    pub settings: String,
    /// The seed of each picture.
    pub seeds: Vec<u64>,
}

/// What a training needs.
#[derive(Debug)]
pub struct TrainInput<'a> {
    /// What is asked for.
    pub spec: &'a TrainSpec,
    /// The photos as PNG, in order.
    pub photos: &'a [Vec<u8>],
    /// As PNG, for each of [`ClassImages::seeds`], those that were drawn before; the others are drawn.
    pub class_images: Vec<Option<Vec<u8>>>,
    /// The checkpoint to go on from.
    pub resume: Option<&'a Path>,
    /// An empty directory for the training's files.
    pub scratch: &'a Path,
    /// Steps to write down whole, and where.
    pub trace: Option<&'a Trace>,
}

/// How a training ended.
#[derive(Debug)]
pub enum Ending {
    /// It took all its steps.
    Trained(Trained),
    /// It was asked to pause: the steps done and the checkpoint, if there was anything to save.
    Paused(Option<(u64, PathBuf)>),
    /// It was asked to stop.
    Stopped,
}

/// The result of a training.
#[derive(Debug)]
pub struct Trained {
    /// The fine-tuned weights that are served: safetensors, in the scratch directory.
    pub weights: PathBuf,
    /// Those of the last step, where another's are served.
    pub last: Option<PathBuf>,
    /// Pictures drawn with the served ones.
    pub images: Vec<Drawn>,
    /// A JSON object with all that led here: settings, hashes, seeds, prompts, losses, and what the pictures are worth.
    pub report: Value,
    /// Pictures of the report's page, [`crate::report::page`].
    pub gallery: Gallery,
}

/// What a sample needs.
#[derive(Debug)]
pub struct DrawInput<'a> {
    /// What is asked for, its seed drawn.
    pub spec: &'a SampleSpec,
    /// The training whose product is drawn.
    pub train: &'a TrainSpec,
    /// Its weights.
    pub weights: &'a Path,
    /// Their SHA-256, by which loaded models are kept.
    pub weights_sha256: &'a str,
}

/// A picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The encoded file.
    pub bytes: Vec<u8>,
    /// What it is encoded as.
    pub format: Format,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// The prompt as it was asked for, with `{product}` in place.
    pub prompt: String,
    /// Draws it again.
    pub seed: u64,
}

/// Draws pictures.
pub trait Artist {
    /// Pictures that it draws at once, at least 1.
    fn batch(&self) -> usize;

    /// Draws some pictures of a sample as one batch: those whose places in [`SampleSpec::pictures`] are given, at most
    /// [`Artist::batch`] of them. Which picture comes in which batch changes the rounding of sums and nothing else.
    /// `watch` hears of steps done and steps in all; [`Flow::Continue`] goes on, anything else ends the drawing at once
    /// with `None`.
    fn draw(
        &mut self,
        input: &DrawInput<'_>,
        pictures: Range<usize>,
        watch: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Drawn>>, Fault>;

    /// Computes something small, and looks whether it is right.
    fn probe(&mut self) -> Result<(), Fault>;
}

/// Everything a device can do.
pub trait Engine: Artist {
    /// SHA-256 of the bundle that it draws with.
    fn bundle(&self) -> &str;

    /// The class images that a training of `spec` wants.
    fn class_images(&self, spec: &TrainSpec) -> ClassImages;

    /// Trains. The watch is called after every step, every class image and every picture: never more than one step
    /// passes between two calls. The same input gives the same bytes on the same device, however often it was paused.
    fn train(&mut self, input: TrainInput<'_>, watch: &mut Watch<'_>) -> Result<Ending, Fault>;
}
