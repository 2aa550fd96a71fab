//! A training under way: what it tells its observer, what it draws, and the files it writes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::RgbImage;

use super::plan::Plan;
use crate::engine::api::{Ending, Flow, Image, ImageGenerator, Observer, Shown, TrainEvent, TrainInput};
use crate::engine::base::Base;
use crate::engine::faults::{fault, unwritable};
use crate::job::{Fault, FaultCode, Format, Phase, Progress};
use crate::ml::models::vae::Moments;
use crate::ml::provenance::FineTune;
use crate::ml::sample::{self, ImageRequest, Models, SampleSettings};
use crate::ml::train::{Recipe, State};
use crate::ml::{Error, Interrupt, image_io};
use crate::report::{Gallery, Thumbnail};

/// Longest side of an image on a report's page, and how many views it shows.
const THUMBNAIL_SIDE: u32 = 320;
const THUMBNAIL_VIEWS: usize = 24;

/// Why a training ends early.
pub(super) enum Halt {
    /// The observer requested it.
    Requested(Box<Ending>),
    /// It cannot continue.
    Fault(Fault),
}

impl Halt {
    fn requested(ending: Ending) -> Self {
        Self::Requested(Box::new(ending))
    }
}

impl From<Fault> for Halt {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Fault(fault(error))
    }
}

impl From<candle_core::Error> for Halt {
    fn from(error: candle_core::Error) -> Self {
        Error::from(error).into()
    }
}

impl From<Interrupt<Self>> for Halt {
    fn from(interrupt: Interrupt<Self>) -> Self {
        match interrupt {
            Interrupt::Stopped(halt) => halt,
            Interrupt::Failed(error) => error.into(),
        }
    }
}

/// A training under way.
pub(super) struct Session<'a, 'o> {
    pub(super) base: Arc<Base>,
    pub(super) input: TrainInput<'a>,
    pub(super) plan: Plan,
    /// The images of the report's page.
    pub(super) gallery: Gallery,
    /// What the observer may draw with.
    generator: &'a mut dyn ImageGenerator,
    observe: &'a mut Observer<'o>,
    n_previews: u64,
}

impl<'a, 'o> Session<'a, 'o> {
    pub(super) fn new(
        base: &Arc<Base>,
        generator: &'a mut dyn ImageGenerator,
        input: TrainInput<'a>,
        observe: &'a mut Observer<'o>,
    ) -> Result<Self, Fault> {
        let plan = Plan::new(base, input.spec)?;
        let (base, gallery) = (Arc::clone(base), Gallery::default());
        Ok(Self { base, input, plan, gallery, generator, observe, n_previews: 0 })
    }

    /// Images drawn at once where their number does not decide what is learned or served.
    pub(super) fn batch(&self) -> usize {
        self.generator.batch()
    }

    /// The latents of pixels, as a distribution.
    pub(super) fn encode(&self, pixels: &RgbImage) -> Result<Moments, Halt> {
        let shared = &self.base.shared;
        Ok(shared.vae.encode(&image_io::signed(pixels)?.to_device(&shared.device)?)?)
    }

    /// Progress of a phase: so many of all its parts are done.
    pub(super) fn at(&self, phase: Phase, step: usize, total: usize) -> Progress {
        Progress { step: step as u64, images: self.n_previews, ..Progress::begin(phase, total as u64) }
    }

    /// Progress of the training's steps.
    pub(super) fn at_step(&self, state: &State) -> Progress {
        let at = self.at(Phase::Training, state.n_steps() as usize, self.plan.recipe.n_steps as usize);
        Progress { loss: state.history().last().map(|metrics| f64::from(metrics.loss)), ..at }
    }

    /// Takes the previews of the steps so far as drawn.
    pub(super) fn count_previews(&mut self, state: &State) {
        self.n_previews = self.plan.preview_steps.range(..=state.n_steps()).count() as u64;
    }

    /// Draws a preview with the weights as they are, and shows it.
    pub(super) fn preview(&mut self, state: &State) -> Result<(), Halt> {
        let (at, step) = (self.at_step(state), state.n_steps());
        let wanted = [(self.plan.recipe.templates.photo.clone(), self.plan.preview_seed)];
        let models = state.frozen(&self.base.bundle, &self.base.shared)?;
        for (picture, _) in self.draw_product(&models, &wanted, &at, state)? {
            self.n_previews += 1;
            self.tell(TrainEvent::Shown { what: Shown::Preview(step), picture }, Some(state))?;
        }
        Ok(())
    }

    /// Tells the observer and does what it answers. `state` is what there is to save, if anything.
    pub(super) fn tell(&mut self, event: TrainEvent, state: Option<&State>) -> Result<(), Halt> {
        match (self.observe)(self.generator, event) {
            Flow::Continue => Ok(()),
            Flow::Stop => Err(Halt::requested(Ending::Stopped)),
            Flow::Pause => Err(Halt::requested(Ending::Paused(self.checkpoint(state)?))),
            Flow::Checkpoint => {
                let Some((step, file)) = self.checkpoint(state)? else { return Ok(()) };
                match (self.observe)(self.generator, TrainEvent::Checkpoint { step, file }) {
                    Flow::Continue | Flow::Checkpoint => Ok(()), // it has one of this very step
                    Flow::Stop => Err(Halt::requested(Ending::Stopped)),
                    Flow::Pause => Err(Halt::requested(Ending::Paused(self.checkpoint(state)?))),
                }
            }
        }
    }

    /// Tells how far the training is.
    pub(super) fn progress(&mut self, at: Progress, state: Option<&State>) -> Result<(), Halt> {
        self.tell(TrainEvent::Progress(at), state)
    }

    /// Shows an image to the observer, and keeps it for the report's page.
    pub(super) fn show(
        &mut self,
        what: Shown,
        pixels: &RgbImage,
        prompt: &str,
        seed: u64,
    ) -> Result<(), Halt> {
        match what {
            Shown::Mask(_) => self.gallery.masks.push(thumbnail(pixels, prompt)?),
            Shown::View(n) if n < THUMBNAIL_VIEWS => self.gallery.views.push(thumbnail(pixels, prompt)?),
            Shown::Attention(_) => self.gallery.attention.push(thumbnail(pixels, prompt)?),
            Shown::View(_) | Shown::Preview(_) => {}
        }
        let (width, height) = pixels.dimensions();
        let bytes = image_io::png(pixels, (width as usize, height as usize), &[])?;
        let picture = Image { bytes, format: Format::Png, width, height, prompt: prompt.to_owned(), seed };
        self.tell(TrainEvent::Shown { what, picture }, None)
    }

    /// The product as `models` draw it, each image with its prompt and seed, as one batch: files and pixels.
    pub(super) fn draw_product(
        &mut self,
        models: &Models,
        wanted: &[(String, u64)],
        at: &Progress,
        state: &State,
    ) -> Result<Vec<(Image, RgbImage)>, Halt> {
        let product = &self.plan.recipe.product;
        let request = |(prompt, seed): &(String, u64)| ImageRequest {
            prompt: product.named(prompt),
            negative: String::new(),
            seed: *seed,
        };
        let requests: Vec<ImageRequest> = wanted.iter().map(request).collect();
        let settings = self.base.drawing(self.input.spec.options.evaluation.steps as usize);
        let drawn = self.draw(models, &requests, &settings, at, Some(state))?;
        let job = self.input.job.map(|job| job.to_string());
        let finetune = FineTune { weights_sha256: None, job: job.as_deref() }; // they have no file yet
        let files = wanted.iter().zip(&requests).zip(drawn).map(|(((prompt, _), request), pixels)| {
            let file = self.base.encoded(prompt, request, &settings, finetune, &pixels, Format::Png)?;
            Ok((file, image_io::from_pixels(pixels, (settings.width, settings.height))?))
        });
        files.collect()
    }

    /// Pixels of `requests`, as one batch; the observer gets `at` after each step of the sampler.
    pub(super) fn draw(
        &mut self,
        models: &Models,
        requests: &[ImageRequest],
        settings: &SampleSettings,
        at: &Progress,
        state: Option<&State>,
    ) -> Result<Vec<Vec<u8>>, Halt> {
        let drawn = sample::draw(models, requests, settings, &mut |_, _| {
            self.progress(at.clone(), state).map_err(Interrupt::Stopped)
        });
        drawn.map_err(|interrupt| match (interrupt, state) {
            // The settings were checked: it is the image of these weights that is not a number.
            (Interrupt::Failed(error), Some(_)) if error.is_input() => {
                Fault::new(FaultCode::Diverged, error.to_string()).into()
            }
            (interrupt, _) => interrupt.into(),
        })
    }

    /// Writes weights into the training's directory.
    pub(super) fn saved(
        &self,
        name: &str,
        state: &State,
        save: fn(&State, &Path, &str, &Recipe) -> crate::ml::Result<()>,
    ) -> Result<PathBuf, Halt> {
        let file = self.input.scratch.join(name);
        let saved = save(state, &file, self.base.hash(), &self.plan.recipe);
        saved.map_err(|error| unwritable(error, &file, "the weights"))?;
        Ok(file)
    }

    /// The fault of a step: of the disk, where it could not keep the best weights in a file.
    pub(super) fn unwritten(&self, error: Error) -> Fault {
        match &error {
            Error::File { path, .. } if path.starts_with(self.input.scratch) => {
                let file = path.clone();
                unwritable(error, &file, "the best weights so far")
            }
            _ => fault(error),
        }
    }

    /// Steps done and the file that holds them; `None` before the first step.
    fn checkpoint(&self, state: Option<&State>) -> Result<Option<(u64, PathBuf)>, Fault> {
        let Some(state) = state.filter(|state| state.n_steps() > 0) else { return Ok(None) };
        let step = state.n_steps();
        let file = self.input.scratch.join(format!("checkpoint-{step}.safetensors"));
        let saved = state.save(&file, &self.plan.learned_with, &self.plan.recipe);
        saved.map_err(|error| unwritable(error, &file, "the checkpoint"))?;
        Ok(Some((step, file)))
    }
}

/// An image for the report's page.
pub(super) fn thumbnail(pixels: &RgbImage, caption: &str) -> Result<Thumbnail, Error> {
    Ok(Thumbnail { webp: image_io::thumbnail(pixels, THUMBNAIL_SIDE)?, caption: caption.to_owned() })
}
