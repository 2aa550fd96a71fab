//! What an engine takes, gives and reports, in plain types.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::job::{Fault, Format, HeldModel, JobId, Progress, SampleSpec, TrainSpec};
use crate::report::{Gallery, Report};

/// What the observer wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Write a checkpoint, report it, and continue. Where there is nothing to save yet, just continue.
    Checkpoint,
    /// Write a checkpoint if there is anything to save, and end with [`Ending::Paused`].
    Pause,
    /// End with [`Ending::Stopped`]; write nothing.
    Stop,
}

/// What a training reports, between two steps.
#[derive(Debug)]
pub enum TrainEvent {
    /// How far it is. `eta_seconds` is left to the observer, who has a clock.
    Progress(Progress),
    /// A class image was drawn.
    ClassImage {
        /// Its place in [`ClassImages::seeds`].
        index: usize,
        /// The image as PNG.
        png: Vec<u8>,
    },
    /// A step was taken.
    Step {
        /// The step, counted from 1.
        step: u64,
        /// Name and value of each of its metrics; a value that the step did not compute is not a number.
        metrics: Vec<(&'static str, f32)>,
    },
    /// An image that people may look at while the training runs.
    Shown {
        /// Which.
        what: Shown,
        /// The image.
        picture: Image,
    },
    /// A checkpoint was written as asked; the file is the observer's now.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// The file, in the training's scratch directory.
        file: PathBuf,
    },
}

/// An image made during a training. A training that goes on from a checkpoint shows the first two kinds again, as they
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

/// Gets each event of a training, and may draw images for others meanwhile with the generator that it is given.
pub type Observer<'a> = dyn FnMut(&mut dyn ImageGenerator, TrainEvent) -> Flow + 'a;

/// Which class images a training wants. Two trainings with the same `settings` want the same pictures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassImages {
    /// SHA-256, in hexadecimal, of all that decides what they show: bundle, prompt, sampler, steps, guidance, size,
    /// precision.
    pub settings: String,
    /// The seed of each picture.
    pub seeds: Vec<u64>,
}

/// What a training needs.
#[derive(Debug)]
pub struct TrainInput<'a> {
    /// What is asked for.
    pub spec: &'a TrainSpec,
    /// Its job, which its pictures name; none on the command line.
    pub job: Option<JobId>,
    /// The photos as PNG, in order.
    pub photos: &'a [Vec<u8>],
    /// As PNG, for each of [`ClassImages::seeds`], those that were drawn before; the others are drawn.
    pub class_images: Vec<Option<Vec<u8>>>,
    /// The checkpoint to resume from.
    pub resume: Option<&'a Path>,
    /// An empty directory for the training's files.
    pub scratch: &'a Path,
    /// Steps to write to files whole, for checking by other programs.
    pub trace: Option<&'a TraceInput>,
}

/// Which steps of a training are written to files whole, with tensors and gradients, and where.
#[derive(Clone, Debug)]
pub struct TraceInput {
    /// A directory that exists.
    pub dir: PathBuf,
    /// Steps, counted from 1.
    pub steps: BTreeSet<u64>,
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
    pub images: Vec<Image>,
    /// The settings, hashes, seeds, prompts, losses and scores; its `seconds` are left to the caller, who has a clock.
    pub report: Box<Report>,
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
    /// Their SHA-256, by which loaded models are kept and which pictures name.
    pub weights_sha256: &'a str,
    /// The job that trained them, which pictures name.
    pub job: Option<JobId>,
}

/// An encoded image.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
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

/// Draws images with fine-tuned weights.
pub trait ImageGenerator {
    /// Images that it draws at once, at least 1.
    fn batch(&self) -> usize;

    /// Draws some pictures of a sample as one batch: those whose places in [`SampleSpec::pictures`] are given, at most
    /// [`ImageGenerator::batch`] of them. Which picture comes in which batch changes the rounding of sums and nothing
    /// else. `observe` gets the steps done and the steps in all; anything but [`Flow::Continue`] ends the drawing at
    /// once with `None`.
    fn draw(
        &mut self,
        input: &DrawInput<'_>,
        pictures: Range<usize>,
        observe: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Image>>, Fault>;

    /// Computes something small, and looks whether it is right.
    fn probe(&mut self) -> Result<(), Fault>;
}

/// Everything a device can do.
pub trait Engine: ImageGenerator {
    /// The model that it trains and draws with.
    fn model(&self) -> &HeldModel;

    /// The class images that a training of `spec` wants.
    fn class_images(&self, spec: &TrainSpec) -> ClassImages;

    /// Trains. The observer is called after every step, every class image and every picture: never more than one step
    /// passes between two calls. The same input gives the same bytes on the same device, however often it was paused.
    fn train(&mut self, input: TrainInput<'_>, observe: &mut Observer<'_>) -> Result<Ending, Fault>;
}
