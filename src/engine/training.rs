//! One training from photos to weights: find the product in its photos, draw what is missing of the class, teach the
//! discriminator, take steps, try a few of them out, draw and judge the best.
//!
//! Between two calls of the watch lies at most one step of training, one step of a sampler, or one picture through the
//! autoencoder. What the watch does meanwhile changes nothing: all random numbers come from the job's seed.

mod evaluation;
mod report;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::RgbImage;
use serde_json::{Value, json};

use super::candle::{CandleEngine, fault, named, without_path};
use super::recipe::recipe;
use super::{Beat, ClassImages, Drawn, Ending, Engine, Flow, Shown, TrainInput, Trained, Watch};
use crate::job::{Fault, FaultCode, Format, Phase, Progress, SEED_MAX, TrainSpec};
use crate::ml::models::vae::Moments;
use crate::ml::perceptual::Perceptual;
use crate::ml::picture;
use crate::ml::sample::{self, Models, Picture, Settings};
use crate::ml::segment::segment;
use crate::ml::train::{self, Critic, Instance, Learner, Material, Recipe, State};
use crate::ml::views::{self, Cut, View};
use crate::ml::{Error, random};
use crate::report::{Gallery, Shot};
use evaluation::Trying;

/// Steps of a class image's sampler: a quick one, for there are many of them.
pub(super) const CLASS_IMAGE_STEPS: usize = 25;

/// Class images drawn at once. Part of what a seed means: the size of a batch orders sums.
const CLASS_IMAGE_BATCH: usize = 4;

/// Longest side of a picture on a report's page, and how many views it shows.
const SHOT_SIDE: u32 = 320;
const SHOT_VIEWS: usize = 24;

/// Why a training ends before its time.
enum Halt {
    /// The watcher asked for it.
    Asked(Box<Ending>),
    /// It cannot go on.
    Fault(Fault),
}

impl Halt {
    fn asked(ending: Ending) -> Self {
        Self::Asked(Box::new(ending))
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

/// Trains. The seam says what comes and goes: [`Engine::train`].
pub(super) fn train(
    engine: &mut CandleEngine,
    input: TrainInput<'_>,
    watch: &mut Watch<'_>,
) -> Result<Ending, Fault> {
    let plan = Plan::new(engine, input.spec)?;
    let run = Run { engine, input, watch, plan, n_previews: 0, gallery: Gallery::default(), trying: None };
    match run.finish() {
        Ok(trained) => Ok(Ending::Trained(trained)),
        Err(Halt::Asked(ending)) => Ok(*ending),
        Err(Halt::Fault(fault)) => Err(fault),
    }
}

/// Refuses what [`train()`] would refuse before it computes anything.
pub(super) fn check(engine: &CandleEngine, spec: &TrainSpec) -> Result<(), Fault> {
    Plan::new(engine, spec).map(|_| ())
}

/// All that is decided before anything is computed.
struct Plan {
    recipe: Recipe,
    class_images: ClassImages,
    /// Steps after which a preview is drawn.
    preview_steps: BTreeSet<u64>,
    /// Steps after which a few pictures are scored.
    trial_steps: BTreeSet<u64>,
    preview_seed: u64,
    evaluation_seed: u64,
    trial_seed: u64,
    warnings: Vec<String>,
    /// What is thought of each photo's mask, as JSON.
    masks: Vec<Value>,
    /// Hash of all models that are learned with.
    learned_with: String,
}

impl Plan {
    fn new(engine: &CandleEngine, spec: &TrainSpec) -> Result<Self, Fault> {
        for steps in [CLASS_IMAGE_STEPS, spec.options.evaluation.steps as usize] {
            let checked = engine.how(steps).check(&engine.base);
            checked.map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
        }
        let class_images = engine.class_images(spec);
        let recipe = recipe(engine, spec, class_images.seeds.len())?;
        let warnings = warnings(&recipe, engine);
        let learned_with = engine.bundle.learning_hash().map_err(fault)?;
        // Assumption: three looks on the way are enough to see whether it is worth waiting.
        let quarters = || [1, 2, 3].map(|quarter| spec.options.steps * quarter / 4).to_vec();
        let previews = spec.options.previews.clone().unwrap_or_else(quarters).into_iter().map(u64::from);
        let previews = previews.filter(|&step| step > 0 && spec.options.evaluation.enabled);
        // Assumption: a model that learned too much is past its best somewhere in the second half.
        let halves = || vec![spec.options.steps / 2, spec.options.steps * 3 / 4, spec.options.steps];
        let trials = spec.options.evaluation.trials.clone().unwrap_or_else(halves).into_iter().map(u64::from);
        let trials = trials.filter(|&step| step > 0 && spec.options.evaluation.enabled);
        let seed = |label: &str| random::derive(spec.seed, label) & SEED_MAX;
        Ok(Self {
            recipe,
            class_images,
            preview_steps: previews.collect(),
            trial_steps: trials.collect(),
            preview_seed: seed("preview"),
            evaluation_seed: seed("evaluation"),
            trial_seed: seed("trial"),
            warnings,
            masks: Vec::new(),
            learned_with,
        })
    }
}

/// What may surprise whoever asked for this.
fn warnings(recipe: &Recipe, engine: &CandleEngine) -> Vec<String> {
    let tokenizer = &engine.base.tokenizer;
    let mut warnings = Vec::new();
    let prompt =
        recipe.views.as_ref().map_or_else(|| recipe.photo_prompt(), |_| recipe.view_prompt("purple"));
    let (n_tokens, room) = (tokenizer.count(&prompt), tokenizer.length() - 2);
    if n_tokens > room {
        warnings.push(format!(
            "class_name: its end is not seen; prompts hold {room} tokens, this has {n_tokens}"
        ));
    }
    if recipe.n_class_images == 0 && recipe.learner == Learner::Weights {
        warnings.push("no class images: every thing of the class may come to look like the product".into());
    }
    warnings
}

/// A training under way.
struct Run<'a, 'w> {
    engine: &'a mut CandleEngine,
    input: TrainInput<'a>,
    watch: &'a mut Watch<'w>,
    plan: Plan,
    n_previews: u64,
    /// The pictures of the report's page.
    gallery: Gallery,
    /// What trials are scored with, once there was one.
    trying: Option<Trying>,
}

impl Run<'_, '_> {
    fn finish(mut self) -> Result<Trained, Halt> {
        let photos = self.photos()?;
        let mut material = match &self.plan.recipe.views {
            Some(_) => self.refine(&photos)?,
            None => self.as_they_are(&photos)?,
        };
        material.class_images = self.class_images()?;
        let perceptual = self.perceptual()?;
        let mut state = self.state()?;
        self.teach_critic(&mut state, &material)?;
        self.take_steps(&mut state, &photos, &material, perceptual.as_ref())?;
        self.show_attention(&state, &material)?;
        let judged = self.evaluate(&state, &photos)?;
        let weights = self.saved("weights.safetensors", &state, State::save_weights)?;
        let last = (state.served_step() != state.n_steps())
            .then(|| self.saved("weights-last.safetensors", &state, State::save_last_weights));
        let report = self.report(&state, &photos, &material, &judged);
        Ok(Trained { weights, last: last.transpose()?, images: judged.images, report, gallery: self.gallery })
    }

    /// Writes weights into the training's directory.
    fn saved(
        &self,
        name: &str,
        state: &State,
        save: fn(&State, &Path, &str, &Recipe) -> crate::ml::Result<()>,
    ) -> Result<PathBuf, Halt> {
        let file = self.input.scratch.join(name);
        let saved = save(state, &file, self.engine.bundle(), &self.plan.recipe);
        saved.map_err(|error| unwritten(&error, &file, "the weights"))?;
        Ok(file)
    }

    /// The photos, whole.
    fn photos(&mut self) -> Result<Vec<RgbImage>, Halt> {
        let side = self.engine.bundle.resolution();
        let mut photos = Vec::new();
        for (i, png) in self.input.photos.iter().enumerate() {
            let photo = picture::read_png(png)
                .map_err(|error| Fault::new(FaultCode::Input, format!("photo {}: {error}", i + 1)))?;
            let (width, height) = photo.dimensions();
            if (width.min(height) as usize) < side {
                self.plan.warnings.push(format!(
                    "photo {}: has {width} x {height} pixels and was enlarged to the model's {side} x {side}",
                    i + 1
                ));
            }
            self.gallery.photos.push(shot(&photo, "")?);
            photos.push(photo);
        }
        if photos.is_empty() {
            return Err(Fault::new(FaultCode::Input, "photos: wanted at least one, got none").into());
        }
        Ok(photos)
    }

    /// The middle of each photo, learned from as it is.
    fn as_they_are(&mut self, photos: &[RgbImage]) -> Result<Material, Halt> {
        let (side, prompt) = (self.engine.bundle.resolution(), self.plan.recipe.photo_prompt());
        let mut instances = Vec::with_capacity(photos.len());
        for photo in photos {
            self.beat(Beat::Progress(self.at(Phase::Preparing, instances.len(), photos.len())), None)?;
            let pixels = picture::squared(photo, side);
            instances.push(Instance { moments: self.encode(&pixels)?, prompt: prompt.clone(), pixels });
        }
        Ok(Material { instances, ..Material::default() })
    }

    /// The product found in each photo, and views of it.
    fn refine(&mut self, photos: &[RgbImage]) -> Result<Material, Halt> {
        let recipe = self.plan.recipe.clone();
        let Some(settings) = &recipe.views else { return self.as_they_are(photos) };
        let total = photos.len() + settings.n;
        let cuts = self.cuts(photos, total)?;
        let mut material = Material::default();
        for i in 0..settings.n {
            self.beat(Beat::Progress(self.at(Phase::Refining, photos.len() + i, total)), None)?;
            let View { pixels, colour, removed, negated, .. } = views::view(&cuts, settings, recipe.seed, i);
            let prompt = recipe.view_prompt(colour.unwrap_or(&settings.background_token));
            self.show(Shown::View(i), &pixels, &prompt, recipe.seed)?;
            if recipe.has_critic() {
                material.spoiled.extend([self.encode(&removed)?, self.encode(&negated)?]);
            }
            material.instances.push(Instance { moments: self.encode(&pixels)?, prompt, pixels });
        }
        Ok(material)
    }

    /// Each photo cut around the product.
    fn cuts(&mut self, photos: &[RgbImage], total: usize) -> Result<Vec<Cut>, Halt> {
        let margin = self.plan.recipe.views.as_ref().map_or(0.0, |views| views.margin);
        let (side, seed) = (self.engine.bundle.resolution(), self.plan.recipe.seed);
        let segmenter = self.engine.bundle.segmenter(&self.engine.base.device)?;
        let mut cuts = Vec::with_capacity(photos.len());
        for (i, photo) in photos.iter().enumerate() {
            self.beat(Beat::Progress(self.at(Phase::Refining, i, total)), None)?;
            let (mask, judgement) = segment(&segmenter, photo, &self.engine.base.device)?.cleaned();
            let name = format!("photo {}", i + 1);
            if let Some(refusal) = judgement.refusal() {
                return Err(Fault::new(FaultCode::Input, format!("{name}: {refusal}")).into());
            }
            self.plan
                .warnings
                .extend(judgement.warnings().iter().map(|warning| format!("{name}: {warning}")));
            self.plan.masks.push(json!(judgement));
            self.show(Shown::Mask(i), &mask.picture(), "", seed)?;
            cuts.push(Cut::new(photo, mask.values(), side, margin)?);
        }
        Ok(cuts)
    }

    fn encode(&self, pixels: &RgbImage) -> Result<Moments, Halt> {
        let base = &self.engine.base;
        Ok(base.vae.encode(&picture::signed(pixels)?.to_device(&base.device)?)?)
    }

    fn perceptual(&self) -> Result<Option<Perceptual>, Halt> {
        let wanted = self.plan.recipe.has_perceptual();
        Ok(wanted.then(|| self.engine.bundle.perceptual(&self.engine.base.device)).transpose()?)
    }

    /// Shows a picture to the watcher.
    fn show(&mut self, what: Shown, pixels: &RgbImage, prompt: &str, seed: u64) -> Result<(), Halt> {
        match what {
            Shown::Mask(_) => self.gallery.masks.push(shot(pixels, prompt)?),
            Shown::View(n) if n < SHOT_VIEWS => self.gallery.views.push(shot(pixels, prompt)?),
            Shown::Attention(_) => self.gallery.attention.push(shot(pixels, prompt)?),
            Shown::View(_) | Shown::Preview(_) => {}
        }
        let (width, height) = pixels.dimensions();
        let bytes = picture::png(pixels, (width as usize, height as usize), &[])?;
        let picture = Drawn { bytes, format: Format::Png, width, height, prompt: prompt.to_owned(), seed };
        self.beat(Beat::Shown { what, picture }, None)
    }

    /// Those that came and those that are drawn now, all as the 8-bit pictures that are kept: a training that finds
    /// them drawn learns from the same pixels as the one that drew them.
    fn class_images(&mut self) -> Result<Vec<Moments>, Halt> {
        let seeds = self.plan.class_images.seeds.clone();
        let mut pngs = std::mem::take(&mut self.input.class_images);
        pngs.resize(seeds.len(), None);
        let mut encoded = Vec::with_capacity(seeds.len());
        for (i, seeds) in seeds.chunks(CLASS_IMAGE_BATCH).enumerate() {
            let pngs = &mut pngs[i * CLASS_IMAGE_BATCH..][..seeds.len()];
            // A batch that was begun before is drawn whole again: a smaller one would round otherwise.
            if pngs.contains(&None) {
                self.draw_class_images(i * CLASS_IMAGE_BATCH, seeds, pngs)?;
            }
            for png in pngs.iter_mut().filter_map(Option::take) {
                let at = self.at(Phase::ClassImages, encoded.len(), self.plan.recipe.n_class_images);
                self.beat(Beat::Progress(at), None)?;
                let pixels = picture::read_png(&png).map_err(|error| {
                    let message = format!("class image {}: {error}", encoded.len() + 1);
                    Fault::new(FaultCode::ArtifactMissing, message)
                })?;
                encoded.push(self.encode(&picture::squared(&pixels, self.engine.bundle.resolution()))?);
            }
        }
        Ok(encoded)
    }

    /// Fills the gaps of one batch, whose first picture has the place `first`.
    fn draw_class_images(
        &mut self,
        first: usize,
        seeds: &[u64],
        pngs: &mut [Option<Vec<u8>>],
    ) -> Result<(), Halt> {
        let prompt = self.plan.recipe.class_prompt();
        let picture = |&seed| Picture { prompt: prompt.clone(), negative: String::new(), seed };
        let pictures: Vec<Picture> = seeds.iter().map(picture).collect();
        let (base, how) = (Arc::clone(&self.engine.base), self.engine.how(CLASS_IMAGE_STEPS));
        let at = self.at(Phase::ClassImages, first, self.plan.recipe.n_class_images);
        let drawn = self.draw(&base, &pictures, &how, &at, None)?;
        for (i, pixels) in drawn.iter().enumerate().filter(|(i, _)| pngs[*i].is_none()).collect::<Vec<_>>() {
            let png = picture::png(pixels, (how.width, how.height), &[])?;
            self.beat(Beat::ClassImage { index: first + i, png: png.clone() }, None)?;
            pngs[i] = Some(png);
        }
        Ok(())
    }

    /// Where the steps begin: at the bundle's weights or at the checkpoint.
    fn state(&mut self) -> Result<State, Halt> {
        let (bundle, device) = (&self.engine.bundle, &self.engine.base.device);
        let recipe = &self.plan.recipe;
        let critic = || {
            let side = bundle.resolution() / bundle.factor();
            Critic::new(bundle.latent_channels(), side, recipe.critic.lr, recipe.seed, device)
        };
        let critic = recipe.has_critic().then(critic).transpose()?;
        let mut state = match recipe.learner {
            Learner::Weights => {
                let mut unet = bundle.unet(device, true)?;
                unet.model.checkpointing = self.engine.settings.checkpointing;
                State::new(bundle.text_encoder(device, true)?, unet, recipe.lr, critic)?
            }
            Learner::Embedding => State::of_embedding(&self.engine.base, &recipe.product, recipe.lr, critic)?,
        };
        if let Some(file) = self.input.resume {
            state.resume(file, &self.plan.learned_with, &self.plan.recipe).map_err(|error| match error {
                Error::Bad(_) => {
                    Fault::new(FaultCode::ArtifactMissing, without_path(&error, file, "the checkpoint"))
                }
                other => fault(other),
            })?;
        }
        self.n_previews = self.plan.preview_steps.range(..=state.n_steps()).count() as u64;
        Ok(state)
    }

    /// The discriminator's steps before the first one of the training.
    fn teach_critic(&mut self, state: &mut State, material: &Material) -> Result<(), Halt> {
        let (recipe, base) = (self.plan.recipe.clone(), Arc::clone(&self.engine.base));
        let total = recipe.critic.n_steps as usize;
        let mut halted = None;
        let taught = train::train_critic(state, material, &recipe, &base, &mut |step| {
            let at = self.at(Phase::Discriminating, step as usize, total);
            keep(self.beat(Beat::Progress(at), None), &mut halted)
        });
        ended(halted, taught).map(|_| ())
    }

    /// Where the discriminator looks in the first view of each photo (fig. 3b).
    fn show_attention(&mut self, state: &State, material: &Material) -> Result<(), Halt> {
        let Some(critic) = state.critic() else { return Ok(()) };
        let discriminator = critic.frozen()?;
        let scale = self.engine.base.vae.scaling_factor();
        for (i, instance) in material.instances.iter().take(self.input.photos.len()).enumerate() {
            let heads = discriminator.attention(&(&instance.moments.mean * scale)?)?; // [1, N, h, w]
            let map = heads.mean(1)?.squeeze(0)?.to_vec2::<f32>()?;
            let seed = self.plan.recipe.seed;
            self.show(Shown::Attention(i), &picture::heated(&instance.pixels, &map), &instance.prompt, seed)?;
        }
        Ok(())
    }

    fn take_steps(
        &mut self,
        state: &mut State,
        photos: &[RgbImage],
        material: &Material,
        perceptual: Option<&Perceptual>,
    ) -> Result<(), Halt> {
        self.beat(Beat::Progress(self.at_step(state)), Some(state))?;
        let (recipe, base) = (self.plan.recipe.clone(), Arc::clone(&self.engine.base));
        let trace = self.input.trace.cloned();
        loop {
            if self.is_to_be_tried(state) {
                self.try_out(state, photos)?;
            }
            let mut halted = None;
            let taken =
                train::train(state, material, &recipe, &base, perceptual, trace.as_ref(), &mut |state| {
                    match keep(self.after_step(state), &mut halted) {
                        ControlFlow::Continue(()) if self.is_to_be_tried(state) => ControlFlow::Break(()),
                        flow => flow,
                    }
                });
            if ended(halted, taken)? && !self.is_to_be_tried(state) {
                return Ok(());
            }
        }
    }

    fn after_step(&mut self, state: &State) -> Result<(), Halt> {
        let at = self.at_step(state);
        if let Some(&taken) = state.history().last() {
            self.beat(Beat::Taken { step: state.n_steps(), taken }, None)?;
        }
        self.beat(Beat::Progress(at.clone()), Some(state))?;
        if !self.plan.preview_steps.contains(&state.n_steps()) {
            return Ok(());
        }
        let wanted = [(self.plan.recipe.templates.photo.clone(), self.plan.preview_seed)];
        let models = state.frozen(&self.engine.bundle, &self.engine.base)?;
        for (picture, _) in self.draw_product(&models, &wanted, &at, state)? {
            self.n_previews += 1;
            self.beat(Beat::Shown { what: Shown::Preview(state.n_steps()), picture }, Some(state))?;
        }
        Ok(())
    }

    /// The product as `models` draw it, each picture with its prompt and seed, as one batch: files and pixels.
    fn draw_product(
        &mut self,
        models: &Models,
        wanted: &[(String, u64)],
        at: &Progress,
        state: &State,
    ) -> Result<Vec<(Drawn, RgbImage)>, Halt> {
        let product = &self.plan.recipe.product;
        let picture = |(prompt, seed): &(String, u64)| Picture {
            prompt: named(prompt, product),
            negative: String::new(),
            seed: *seed,
        };
        let pictures: Vec<Picture> = wanted.iter().map(picture).collect();
        let how = self.engine.how(self.input.spec.options.evaluation.steps as usize);
        let drawn = self.draw(models, &pictures, &how, at, Some(state))?;
        let files = wanted.iter().zip(&pictures).zip(drawn).map(|(((prompt, _), picture), pixels)| {
            let file = self.engine.encoded(prompt, picture, &how, &pixels, Format::Png)?;
            Ok((file, picture::of_pixels(pixels, (how.width, how.height))?))
        });
        files.collect()
    }

    /// Pixels of `pictures`, as one batch; the watch hears `at` after each step of the sampler.
    fn draw(
        &mut self,
        models: &Models,
        pictures: &[Picture],
        how: &Settings,
        at: &Progress,
        state: Option<&State>,
    ) -> Result<Vec<Vec<u8>>, Halt> {
        let mut halted = None;
        let drawn = sample::draw(models, pictures, how, &mut |_, _| {
            keep(self.beat(Beat::Progress(at.clone()), state), &mut halted)
        });
        let drawn = drawn.map_err(|error| match (error, state) {
            // The settings were checked: it is the picture that is not a number.
            (Error::Bad(words), Some(_)) => Fault::new(FaultCode::Diverged, words),
            (error, _) => fault(error),
        })?;
        match (halted, drawn) {
            (None, Some(drawn)) => Ok(drawn),
            (Some(halt), _) => Err(halt),
            (None, None) => Err(Fault::new(FaultCode::Internal, "a drawing stopped by itself").into()),
        }
    }

    fn at_step(&self, state: &State) -> Progress {
        let at = self.at(Phase::Training, state.n_steps() as usize, self.plan.recipe.n_steps as usize);
        Progress { loss: state.history().last().map(|taken| f64::from(taken.loss)), ..at }
    }

    fn at(&self, phase: Phase, step: usize, total: usize) -> Progress {
        Progress { step: step as u64, images: self.n_previews, ..Progress::begin(phase, total as u64) }
    }

    /// Tells the watcher and does what it answers. `state` is what there is to save, if anything.
    fn beat(&mut self, beat: Beat, state: Option<&State>) -> Result<(), Halt> {
        match (self.watch)(self.engine, beat) {
            Flow::Continue => Ok(()),
            Flow::Stop => Err(Halt::asked(Ending::Stopped)),
            Flow::Pause => Err(Halt::asked(Ending::Paused(self.checkpoint(state)?))),
            Flow::Checkpoint => {
                let Some((step, file)) = self.checkpoint(state)? else { return Ok(()) };
                match (self.watch)(self.engine, Beat::Checkpoint { step, file }) {
                    Flow::Continue | Flow::Checkpoint => Ok(()), // it has one of this very step
                    Flow::Stop => Err(Halt::asked(Ending::Stopped)),
                    Flow::Pause => Err(Halt::asked(Ending::Paused(self.checkpoint(state)?))),
                }
            }
        }
    }

    /// Steps done and the file that holds them; `None` before the first step.
    fn checkpoint(&self, state: Option<&State>) -> Result<Option<(u64, PathBuf)>, Fault> {
        let Some(state) = state.filter(|state| state.n_steps() > 0) else { return Ok(None) };
        let step = state.n_steps();
        let file = self.input.scratch.join(format!("checkpoint-{step}.safetensors"));
        let saved = state.save(&file, &self.plan.learned_with, &self.plan.recipe);
        saved.map_err(|error| unwritten(&error, &file, "the checkpoint"))?;
        Ok(Some((step, file)))
    }
}

/// Whether all was done; else why it was stopped, or what went wrong.
fn ended(halted: Option<Halt>, result: crate::ml::Result<bool>) -> Result<bool, Halt> {
    match halted {
        Some(halt) => Err(halt),
        None => Ok(result?),
    }
}

/// Goes on, or keeps why not and stops.
fn keep(told: Result<(), Halt>, halted: &mut Option<Halt>) -> ControlFlow<()> {
    match told {
        Ok(()) => ControlFlow::Continue(()),
        Err(halt) => {
            *halted = Some(halt);
            ControlFlow::Break(())
        }
    }
}

/// A file of ours that could not be written: the disk's fault.
fn unwritten(error: &Error, file: &Path, what: &str) -> Fault {
    Fault::new(FaultCode::Machine, without_path(error, file, what))
}

/// A picture for the report's page.
fn shot(pixels: &RgbImage, caption: &str) -> Result<Shot, Error> {
    Ok(Shot { webp: picture::thumbnail(pixels, SHOT_SIDE)?, caption: caption.to_owned() })
}
