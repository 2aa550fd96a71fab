//! Training: HYPNOS (arXiv 2410.14265), and DreamBooth and Textual Inversion as other settings of the same.
//!
//! Step k draws picture, class image, timesteps and noise from counters of the recipe's seed, and nothing else is
//! drawn: a training that was saved at k and resumed is, byte for byte, one that never stopped. No files but those
//! given, no clock; an observer is called after each step and may read the weights, not change them.

mod data;
pub mod discriminator;
pub mod losses;
mod recipe;
mod state;
mod trace;
mod trial;

pub use data::{Instance, TrainingData};
pub use discriminator::{DiscriminatorRecipe, DiscriminatorTrainer};
pub use losses::{Batch, FrozenModels, LossModels, LossWeights, Losses, Objective, Reconstruction, losses};
pub use recipe::{Learner, PerceptualRecipe, Recipe, Templates};
pub use state::{Column, State, StepMetrics};
pub use trace::Trace;
pub use trial::Trial;

use super::perceptual::Perceptual;
use super::sample::Shared;
use super::{Error, Interrupt, Result};

/// Takes the next step of `state`, number `state.n_steps() + 1`.
///
/// `shared` is the bundle's. [`Error::Diverged`] where a loss or gradient is not
/// finite; the weights are then as the step before left them.
pub fn step(
    state: &mut State,
    data: &TrainingData,
    recipe: &Recipe,
    shared: &Shared,
    perceptual: Option<&Perceptual>,
    trace: Option<&Trace>,
) -> Result<StepMetrics> {
    let step = state.n_steps();
    // 1. Draw a picture of the product, one of its class, their timesteps and noise; and what the discriminator sees.
    let batch = data::draw(data, recipe, shared, step)?;
    let shown =
        recipe.has_discriminator().then(|| data::discriminator_latents(data, recipe, shared, "critic", step));
    // 2. Diffuse, predict, compare; clip and step; then the discriminator's own step.
    let frozen = FrozenModels { schedule: &shared.schedule, vae: Some(&shared.vae), perceptual };
    let trace = trace.filter(|trace| trace.wants(step + 1)).map(|trace| (trace, recipe));
    state.step(frozen, &batch, &recipe.objective, shown.transpose()?, trace)
}

/// Takes the steps that `recipe` wants and `state` has not taken yet, each as [`step`] does. `observe` is called after
/// each and may stop.
pub fn train<B>(
    state: &mut State,
    data: &TrainingData,
    recipe: &Recipe,
    shared: &Shared,
    perceptual: Option<&Perceptual>,
    trace: Option<&Trace>,
    observe: &mut dyn FnMut(&State) -> Result<(), Interrupt<B>>,
) -> Result<(), Interrupt<B>> {
    while state.n_steps() < recipe.n_steps {
        step(state, data, recipe, shared, perceptual, trace)?;
        observe(state)?;
    }
    Ok(())
}

/// Takes the discriminator's steps before the first one of the diffusion model (section 3.4). It has none of the
/// diffusion model's guesses to look at yet.
///
/// `observe` gets the steps done and may stop. Does nothing where no discriminator takes part or steps of the
/// diffusion model were taken already.
pub fn train_discriminator<B>(
    state: &mut State,
    data: &TrainingData,
    recipe: &Recipe,
    shared: &Shared,
    observe: &mut dyn FnMut(u64) -> Result<(), Interrupt<B>>,
) -> Result<(), Interrupt<B>> {
    if state.n_steps() > 0 {
        return Ok(());
    }
    let Some(discriminator) = state.discriminator_mut() else { return Ok(()) };
    for step in 0..recipe.discriminator.n_steps {
        let (real, fake) = data::discriminator_latents(data, recipe, shared, "critic before", step)?;
        if !discriminator.step(&real, &fake)?.is_finite() {
            let what = "discriminator: its loss is no longer a finite number; try a lower learning rate";
            return Err(Error::NotFinite(what.into()).into());
        }
        observe(step + 1)?;
    }
    Ok(())
}
