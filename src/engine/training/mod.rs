//! One training from photos to weights: find the product in its photos, draw the missing class images, train the
//! discriminator, take steps, score a few of them, draw and evaluate the best.
//!
//! Between two calls of the observer lies at most one step of training, one step of a sampler, or one image through the
//! autoencoder. What the observer does meanwhile changes nothing: all random numbers come from the job's seed.

mod class_images;
mod evaluation;
mod plan;
mod prepare;
mod recipe;
mod report;
mod session;
mod sizes;

use std::sync::Arc;

use image::RgbImage;

pub(super) use plan::class_images;
pub use recipe::missing_part;
pub(super) use sizes::sizes;

use super::api::{Ending, ImageGenerator, Observer, Shown, TrainEvent, TrainInput, Trained};
use super::base::Base;
use super::faults::unreadable;
use crate::job::{Fault, Phase, TrainSpec};
use crate::ml::perceptual::Perceptual;
use crate::ml::train::{self, DiscriminatorTrainer, Learner, State, StepMetrics, Trace, TrainingData};
use crate::ml::{Interrupt, image_io};
use evaluation::CheckpointScorer;
use plan::Plan;
use session::{Halt, Session};

/// Trains. [`super::Engine::train`] says what goes in and what comes out.
pub(super) fn train(
    base: &Arc<Base>,
    generator: &mut dyn ImageGenerator,
    input: TrainInput<'_>,
    observe: &mut Observer<'_>,
) -> Result<Ending, Fault> {
    match trained(Session::new(base, generator, input, observe)?) {
        Ok(trained) => Ok(Ending::Trained(trained)),
        Err(Halt::Requested(ending)) => Ok(*ending),
        Err(Halt::Fault(fault)) => Err(fault),
    }
}

/// Refuses what [`train()`] would refuse before it computes anything.
pub(super) fn check(base: &Base, spec: &TrainSpec) -> Result<(), Fault> {
    Plan::new(base, spec).map(|_| ())
}

fn trained(mut session: Session<'_, '_>) -> Result<Trained, Halt> {
    let photos = prepare::photos(&mut session)?;
    let mut data = prepare::instances(&mut session, &photos)?;
    data.class_images = class_images::class_images(&mut session)?;
    let perceptual = perceptual(&session)?;
    let mut state = start(&mut session)?;
    train_discriminator(&mut session, &mut state, &data)?;
    let scorer = take_steps(&mut session, &mut state, &photos, &data, perceptual.as_ref())?;
    show_attention(&mut session, &state, &data)?;
    let evaluation = evaluation::evaluate(&mut session, scorer, &state, &photos)?;
    let weights = session.saved("weights.safetensors", &state, State::save_weights)?;
    let last = (state.served_step() != state.n_steps())
        .then(|| session.saved("weights-last.safetensors", &state, State::save_last_weights));
    let report = Box::new(session.report(&state, &photos, &data, &evaluation));
    Ok(Trained {
        weights,
        last: last.transpose()?,
        images: evaluation.images,
        report,
        gallery: session.gallery,
    })
}

/// The network of the perceptual loss, where the recipe wants it.
fn perceptual(session: &Session<'_, '_>) -> Result<Option<Perceptual>, Halt> {
    let (base, wanted) = (&session.base, session.plan.recipe.has_perceptual());
    Ok(wanted.then(|| base.bundle.perceptual(base.device())).transpose()?)
}

/// The state that the steps begin at: the bundle's weights, or the checkpoint.
fn start(session: &mut Session<'_, '_>) -> Result<State, Halt> {
    let (base, plan) = (&session.base, &session.plan);
    let (bundle, device, recipe) = (&base.bundle, base.device(), &plan.recipe);
    let discriminator = || {
        let side = bundle.resolution() / bundle.factor();
        DiscriminatorTrainer::new(
            bundle.latent_channels(),
            side,
            recipe.discriminator.lr,
            recipe.seed,
            device,
        )
    };
    let discriminator = recipe.has_discriminator().then(discriminator).transpose()?;
    let mut state = match recipe.learner {
        Learner::Weights => {
            base.let_go();
            let precision = base.shared.precision;
            let text = bundle.text_encoder(device, precision, true)?;
            let unet = bundle.unet(device, precision, true)?;
            State::new(text, unet, recipe.adamw(), discriminator)?
        }
        Learner::Embedding => {
            State::of_embedding(&*base.models()?, &recipe.product, recipe.adamw(), discriminator)?
        }
    };
    state.set_checkpointing(base.checkpointing);
    state.keep_best_in(session.input.scratch);
    if let Some(file) = session.input.resume {
        let resumed = state.resume(file, &plan.learned_with, recipe);
        resumed.map_err(|error| unreadable(error, file, "the checkpoint"))?;
        if state.precisions().len() > 1 {
            let names: Vec<&str> = state.precisions().iter().map(|precision| precision.name()).collect();
            let warning = format!("resumed in another precision: computed in {}", names.join(", then in "));
            session.plan.warnings.push(warning);
        }
    }
    session.count_previews(&state);
    Ok(state)
}

/// The discriminator's steps before the first one of the training.
fn train_discriminator(
    session: &mut Session<'_, '_>,
    state: &mut State,
    data: &TrainingData,
) -> Result<(), Halt> {
    let (recipe, base) = (session.plan.recipe.clone(), Arc::clone(&session.base));
    let total = recipe.discriminator.n_steps as usize;
    train::train_discriminator(state, data, &recipe, &base.shared, &mut |step| {
        let at = session.at(Phase::Discriminating, step as usize, total);
        session.progress(at, None).map_err(Interrupt::Stopped)
    })?;
    Ok(())
}

/// The training loop. Gives what the steps were scored with, if any were.
fn take_steps(
    session: &mut Session<'_, '_>,
    state: &mut State,
    photos: &[RgbImage],
    data: &TrainingData,
    perceptual: Option<&Perceptual>,
) -> Result<Option<CheckpointScorer>, Halt> {
    session.progress(session.at_step(state), Some(state))?;
    let (recipe, base) = (session.plan.recipe.clone(), Arc::clone(&session.base));
    let trace = session.input.trace.map(|input| Trace { dir: input.dir.clone(), steps: input.steps.clone() });
    let mut scorer = None;
    loop {
        if evaluation::is_due(session, state) {
            evaluation::score_step(session, &mut scorer, state, photos)?;
        }
        if state.n_steps() >= recipe.n_steps {
            return Ok(scorer);
        }
        let metrics = train::step(state, data, &recipe, &base.shared, perceptual, trace.as_ref());
        let metrics = metrics.map_err(|error| session.unwritten(error))?;
        report_step(session, state, &metrics)?;
    }
}

/// Tells the observer what a step found, and draws a preview where one is due.
fn report_step(session: &mut Session<'_, '_>, state: &State, metrics: &StepMetrics) -> Result<(), Halt> {
    let metrics = StepMetrics::COLUMNS.iter().map(|&(name, of)| (name, of(metrics))).collect();
    session.tell(TrainEvent::Step { step: state.n_steps(), metrics }, None)?;
    session.progress(session.at_step(state), Some(state))?;
    if session.plan.preview_steps.contains(&state.n_steps()) {
        session.preview(state)?;
    }
    Ok(())
}

/// Shows where the discriminator looks in the first view of each photo (fig. 3b).
fn show_attention(session: &mut Session<'_, '_>, state: &State, data: &TrainingData) -> Result<(), Halt> {
    let Some(trainer) = state.discriminator() else { return Ok(()) };
    let discriminator = trainer.frozen()?;
    let scale = session.base.shared.vae.scaling_factor();
    for (i, instance) in data.instances.iter().take(session.input.photos.len()).enumerate() {
        let heads = discriminator.attention(&(&instance.moments.mean * scale)?)?; // [1, N, h, w]
        let map = heads.mean(1)?.squeeze(0)?.to_vec2::<f32>()?;
        let (seed, overlaid) = (session.plan.recipe.seed, image_io::overlay_heatmap(&instance.pixels, &map));
        session.show(Shown::Attention(i), &overlaid, &instance.prompt, seed)?;
    }
    Ok(())
}
