//! One training from photos to weights: prepare, draw what is missing of the class, take steps, draw the result.
//!
//! Between two calls of the watch lies at most one step of training, one step of a sampler, or one picture through the
//! autoencoder. What the watch does meanwhile changes nothing: all random numbers come from the job's seed.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::candle::{CandleEngine, fault, named, without_path};
use super::{Beat, ClassImages, Drawn, Ending, Engine, Flow, TrainInput, Trained, Watch};
use crate::job::{Fault, FaultCode, Format, Phase, Progress, SEED_MAX, TrainSpec};
use crate::ml::adapted::Product;
use crate::ml::models::vae::Moments;
use crate::ml::picture::{self, Photo};
use crate::ml::sample::{self, Models, Picture, Settings};
use crate::ml::train::{Material, Recipe, State, Taken, train as take_steps};
use crate::ml::{Error, random};

/// Steps of a class image's sampler: a quick one, for there are many of them.
pub(super) const CLASS_IMAGE_STEPS: usize = 25;

/// Class images drawn at once. Part of what a seed means: the size of a batch orders sums.
const CLASS_IMAGE_BATCH: usize = 4;

/// What is drawn with a finished model, round and round until there are enough.
///
/// Assumption: places where shops show things, from plain to unlike any photo.
const SCENES: [&str; 8] = [
    "a photo of {product}",
    "a photo of {product} on a wooden table",
    "a photo of {product} on the beach",
    "a photo of {product} on white marble",
    "a photo of {product} in the snow",
    "a photo of {product} in the grass",
    "a photo of {product}, blue background",
    "a painting of {product}",
];

/// Points of a curve in the report.
const CURVE_POINTS: usize = 500;

/// Why a training ends before its time.
enum Halt {
    /// The watcher asked for it.
    Asked(Ending),
    /// It cannot go on.
    Fault(Fault),
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
    match (Run { engine, input, watch, plan, n_previews: 0 }).finish() {
        Ok(trained) => Ok(Ending::Trained(trained)),
        Err(Halt::Asked(ending)) => Ok(ending),
        Err(Halt::Fault(fault)) => Err(fault),
    }
}

/// All that is decided before anything is computed.
struct Plan {
    recipe: Recipe,
    class_images: ClassImages,
    /// Steps after which a preview is drawn.
    preview_steps: BTreeSet<u64>,
    preview_seed: u64,
    evaluation_seed: u64,
    warnings: Vec<String>,
}

impl Plan {
    fn new(engine: &CandleEngine, spec: &TrainSpec) -> Result<Self, Fault> {
        let tokenizer = &engine.base.tokenizer;
        let product = Product { token: token(engine, spec)?, class_name: spec.class_name.clone() };
        for steps in [CLASS_IMAGE_STEPS, spec.options.evaluation.steps as usize] {
            let checked = engine.how(steps).check(&engine.base);
            checked.map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
        }
        let class_images = engine.class_images(spec);
        let n_steps = u64::from(spec.options.steps);
        let recipe = Recipe {
            product,
            n_steps,
            lr: spec.options.learning_rate,
            prior_weight: spec.options.loss_weights.prior,
            n_class_images: class_images.seeds.len(),
            seed: spec.seed,
        };
        let mut warnings = Vec::new();
        let (n_tokens, room) = (tokenizer.count(&recipe.instance_prompt()), tokenizer.length() - 2);
        if n_tokens > room {
            warnings.push(format!(
                "class_name: its end is not seen; prompts hold {room} tokens, this has {n_tokens}"
            ));
        }
        if class_images.seeds.is_empty() {
            warnings
                .push("no class images: every thing of the class may come to look like the product".into());
        }
        // Assumption: three looks on the way are enough to see whether it is worth waiting.
        let previews = [1, 2, 3].map(|quarter| n_steps * quarter / 4);
        let previews = previews.into_iter().filter(|&step| step > 0 && spec.options.evaluation.enabled);
        let seed = |label: &str| random::derive(spec.seed, label) & SEED_MAX;
        Ok(Self {
            recipe,
            class_images,
            preview_steps: previews.collect(),
            preview_seed: seed("preview"),
            evaluation_seed: seed("evaluation"),
            warnings,
        })
    }
}

/// The word for the product: what the client names, or the bundle's first rare token.
fn token(engine: &CandleEngine, spec: &TrainSpec) -> Result<String, Fault> {
    let asked = spec.options.instance_token.as_ref();
    let Some(token) = asked.or_else(|| engine.bundle.manifest().rare_tokens.first()) else {
        let message = "instance_token: this model names no rare token of its own; one is needed";
        return Err(Fault::new(FaultCode::Input, message));
    };
    let tokenizer = &engine.base.tokenizer;
    if tokenizer.is_single_token(token) {
        return Ok(token.clone());
    }
    let n = tokenizer.count(token);
    let message = format!("instance_token: wanted one token of the model's vocabulary, \"{token}\" is {n}");
    Err(Fault::new(FaultCode::Input, message))
}

/// A training under way.
struct Run<'a, 'w> {
    engine: &'a mut CandleEngine,
    input: TrainInput<'a>,
    watch: &'a mut Watch<'w>,
    plan: Plan,
    n_previews: u64,
}

impl Run<'_, '_> {
    fn finish(mut self) -> Result<Trained, Halt> {
        let photos = self.photos()?;
        let material = Material { photos: self.encode_photos(&photos)?, class_images: self.class_images()? };
        let mut state = self.state()?;
        self.take_steps(&mut state, &material)?;
        let images = self.evaluate(&state)?;
        let weights = self.input.scratch.join("weights.safetensors");
        let saved = state.save_weights(&weights, self.engine.bundle(), &self.plan.recipe);
        saved.map_err(|error| unwritten(&error, &weights, "the weights"))?;
        let report = self.report(&state, &photos, &images);
        Ok(Trained { weights, images, report })
    }

    fn photos(&mut self) -> Result<Vec<Photo>, Halt> {
        let side = self.engine.bundle.resolution();
        let mut photos = Vec::new();
        for (i, png) in self.input.photos.iter().enumerate() {
            let photo = Photo::decode(png, side)
                .map_err(|error| Fault::new(FaultCode::Input, format!("photo {}: {error}", i + 1)))?;
            if (photo.width.min(photo.height) as usize) < side {
                let (width, height) = (photo.width, photo.height);
                self.plan.warnings.push(format!(
                    "photo {}: has {width} x {height} pixels and was enlarged to the model's {side} x {side}",
                    i + 1
                ));
            }
            photos.push(photo);
        }
        if photos.is_empty() {
            return Err(Fault::new(FaultCode::Input, "photos: wanted at least one, got none").into());
        }
        Ok(photos)
    }

    fn encode_photos(&mut self, photos: &[Photo]) -> Result<Vec<Moments>, Halt> {
        let mut encoded = Vec::with_capacity(photos.len());
        for photo in photos {
            self.beat(Beat::Progress(self.at(Phase::Preparing, encoded.len(), photos.len())), None)?;
            encoded.push(self.encode(photo)?);
        }
        Ok(encoded)
    }

    fn encode(&self, photo: &Photo) -> Result<Moments, Halt> {
        let base = &self.engine.base;
        Ok(base.vae.encode(&photo.tensor.to_device(&base.device)?)?)
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
                let photo = Photo::decode(&png, self.engine.bundle.resolution()).map_err(|error| {
                    let message = format!("class image {}: {error}", encoded.len() + 1);
                    Fault::new(FaultCode::ArtifactMissing, message)
                })?;
                encoded.push(self.encode(&photo)?);
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
        let mut unet = bundle.unet(device, true)?;
        unet.model.checkpointing = self.engine.settings.checkpointing;
        let mut state = State::new(bundle.text_encoder(device, true)?, unet, self.plan.recipe.lr)?;
        if let Some(file) = self.input.resume {
            state.resume(file, self.engine.bundle(), &self.plan.recipe).map_err(|error| match error {
                Error::Bad(_) => {
                    Fault::new(FaultCode::ArtifactMissing, without_path(&error, file, "the checkpoint"))
                }
                other => fault(other),
            })?;
        }
        self.n_previews = self.plan.preview_steps.range(..=state.n_steps()).count() as u64;
        Ok(state)
    }

    fn take_steps(&mut self, state: &mut State, material: &Material) -> Result<(), Halt> {
        self.beat(Beat::Progress(self.at_step(state)), Some(state))?;
        let (recipe, base) = (self.plan.recipe.clone(), Arc::clone(&self.engine.base));
        let mut halted = None;
        let taken = take_steps(state, material, &recipe, &base, &mut |state| {
            keep(self.after_step(state), &mut halted)
        });
        match halted {
            Some(halt) => Err(halt),
            None => Ok(taken.map(|_| ())?),
        }
    }

    fn after_step(&mut self, state: &State) -> Result<(), Halt> {
        let at = self.at_step(state);
        self.beat(Beat::Progress(at.clone()), Some(state))?;
        if !self.plan.preview_steps.contains(&state.n_steps()) {
            return Ok(());
        }
        let wanted = [(SCENES[0], self.plan.preview_seed)];
        for preview in self.draw_product(state, &wanted, &at)? {
            self.n_previews += 1;
            self.beat(Beat::Preview(preview), Some(state))?;
        }
        Ok(())
    }

    /// Pictures of the finished model, for people to look at.
    fn evaluate(&mut self, state: &State) -> Result<Vec<Drawn>, Halt> {
        let evaluation = &self.input.spec.options.evaluation;
        if !evaluation.enabled {
            return Ok(Vec::new());
        }
        let n = evaluation.images as usize;
        let seed = |i: usize| (self.plan.evaluation_seed + i as u64) & SEED_MAX;
        let wanted: Vec<_> =
            SCENES.into_iter().cycle().take(n).enumerate().map(|(i, s)| (s, seed(i))).collect();
        let mut images = Vec::with_capacity(n);
        for batch in wanted.chunks(self.engine.settings.batch) {
            let at = self.at(Phase::Drawing, images.len(), n);
            images.extend(self.draw_product(state, batch, &at)?);
        }
        Ok(images)
    }

    /// The product as the model draws it now, each picture with its scene and seed, as one batch.
    fn draw_product(
        &mut self,
        state: &State,
        wanted: &[(&str, u64)],
        at: &Progress,
    ) -> Result<Vec<Drawn>, Halt> {
        let product = &self.plan.recipe.product;
        let picture = |&(scene, seed): &(&str, u64)| Picture {
            prompt: named(scene, product),
            negative: String::new(),
            seed,
        };
        let pictures: Vec<Picture> = wanted.iter().map(picture).collect();
        let models = state.frozen(&self.engine.bundle, &self.engine.base)?;
        let how = self.engine.how(self.input.spec.options.evaluation.steps as usize);
        let drawn = self.draw(&models, &pictures, &how, at, Some(state))?;
        let files = wanted.iter().zip(&pictures).zip(drawn).map(|((&(scene, _), picture), pixels)| {
            self.engine.encoded(scene, picture, &how, &pixels, Format::Png)
        });
        Ok(files.collect::<Result<_, _>>()?)
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
            Flow::Stop => Err(Halt::Asked(Ending::Stopped)),
            Flow::Pause => Err(Halt::Asked(Ending::Paused(self.checkpoint(state)?))),
            Flow::Checkpoint => {
                let Some((step, file)) = self.checkpoint(state)? else { return Ok(()) };
                match (self.watch)(self.engine, Beat::Checkpoint { step, file }) {
                    Flow::Continue | Flow::Checkpoint => Ok(()), // it has one of this very step
                    Flow::Stop => Err(Halt::Asked(Ending::Stopped)),
                    Flow::Pause => Err(Halt::Asked(Ending::Paused(self.checkpoint(state)?))),
                }
            }
        }
    }

    /// Steps done and the file that holds them; `None` before the first step.
    fn checkpoint(&self, state: Option<&State>) -> Result<Option<(u64, PathBuf)>, Fault> {
        let Some(state) = state.filter(|state| state.n_steps() > 0) else { return Ok(None) };
        let step = state.n_steps();
        let file = self.input.scratch.join(format!("checkpoint-{step}.safetensors"));
        let saved = state.save(&file, self.engine.bundle(), &self.plan.recipe);
        saved.map_err(|error| unwritten(&error, &file, "the checkpoint"))?;
        Ok(Some((step, file)))
    }

    fn report(&self, state: &State, photos: &[Photo], images: &[Drawn]) -> Value {
        let (plan, recipe) = (&self.plan, &self.plan.recipe);
        let images: Vec<Value> = (images.iter())
            .map(|image| json!({"prompt": named(&image.prompt, &recipe.product), "seed": image.seed}))
            .collect();
        json!({
            "method": self.input.spec.options.method,
            "options": self.input.spec.options,
            "class_name": recipe.product.class_name,
            "instance_token": recipe.product.token,
            "bundle": {"name": self.engine.bundle.manifest().name, "sha256": self.engine.bundle()},
            "prompts": {
                "instance": recipe.instance_prompt(),
                "class": (recipe.n_class_images > 0).then(|| recipe.class_prompt()),
                "preview": named(SCENES[0], &recipe.product),
            },
            "seeds": {"training": recipe.seed, "preview": plan.preview_seed},
            "class_images": {"settings_sha256": plan.class_images.settings, "seeds": plan.class_images.seeds},
            "photos": photos.iter().map(|photo| json!({"width": photo.width, "height": photo.height})).collect::<Vec<_>>(),
            "resolution": self.engine.bundle.resolution(),
            "steps": state.n_steps(),
            "curve": curve(state.history()),
            "images": images,
            "warnings": plan.warnings,
        })
    }
}

/// Losses and gradient norms, each point the mean of equally many steps and named by the last of them.
fn curve(history: &[Taken]) -> Value {
    let points = history.chunks(history.len().div_ceil(CURVE_POINTS).max(1));
    let mean = |points: &[Taken], of: fn(&Taken) -> f32| {
        points.iter().map(|taken| f64::from(of(taken))).sum::<f64>() / points.len() as f64
    };
    let mut last = 0;
    let steps: Vec<usize> = (points.clone())
        .map(|point| {
            last += point.len();
            last
        })
        .collect();
    json!({
        "step": steps,
        "loss": points.clone().map(|point| mean(point, |taken| taken.loss)).collect::<Vec<_>>(),
        "grad_norm": points.map(|point| mean(point, |taken| taken.grad_norm)).collect::<Vec<_>>(),
    })
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
