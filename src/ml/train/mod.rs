//! Training: HYPNOS (arXiv 2410.14265), and DreamBooth and Textual Inversion as other settings of the same.
//!
//! Step k draws picture, class image, timesteps and noise from counters of the recipe's seed, and nothing else is drawn:
//! a training that was saved at k and resumed is, byte for byte, one that never stopped. No files but those given, no
//! clock; who watches is told after each step and may look at the weights, not change them.

pub mod critic;
pub mod losses;
mod recipe;
mod state;
mod trace;

use std::ops::ControlFlow;

use candle_core::Tensor;
use image::RgbImage;

pub use critic::{Critic, CriticRecipe};
pub use losses::{Around, Batch, Chain, LossWeights, Losses, Objective, Reconstruction, losses};
pub use recipe::{Learner, PerceptualRecipe, Recipe, Templates};
pub use state::{Column, State, Taken};
pub use trace::Trace;

use super::models::vae::Moments;
use super::perceptual::Perceptual;
use super::sample::Models;
use super::{Error, Result, picture, random};

/// A picture of the product, ready to be learned from.
#[derive(Clone, Debug)]
pub struct Instance {
    /// The distribution of its latents, `[1, c, h, w]`, where the weights lie.
    pub moments: Moments,
    /// The words for it.
    pub prompt: String,
    /// What was encoded.
    pub pixels: RgbImage,
}

/// What is learned from.
#[derive(Clone, Debug, Default)]
pub struct Material {
    /// Pictures of the product, at least one.
    pub instances: Vec<Instance>,
    /// Pictures of its class; may be empty.
    pub class_images: Vec<Moments>,
    /// Instances spoiled so that the discriminator must not take them for the product; may be empty.
    pub spoiled: Vec<Moments>,
}

/// Takes the steps that `recipe` wants and `state` has not taken yet.
///
/// `models` are the bundle's: tokenizer, autoencoder and schedule. `observe` hears of each step and may stop; gives whether all steps were taken. [`Error::Diverged`] where a loss or
/// gradient is not finite; the weights are then as the step before left them.
pub fn train(
    state: &mut State,
    material: &Material,
    recipe: &Recipe,
    models: &Models,
    perceptual: Option<&Perceptual>,
    trace: Option<&Trace>,
    observe: &mut dyn FnMut(&State) -> ControlFlow<()>,
) -> Result<bool> {
    let around = Around { schedule: &models.schedule, vae: Some(&models.vae), perceptual };
    while state.n_steps() < recipe.n_steps {
        let step = state.n_steps();
        // 1. Draw a picture of the product, one of its class, their timesteps and noise; and what the discriminator sees.
        let batch = draw(material, recipe, models, step)?;
        let shown = recipe.has_critic().then(|| drawn_for_critic(material, recipe, models, "critic", step));
        // 2. Diffuse, predict, compare; clip and step; then the discriminator's own step.
        let trace = trace.filter(|trace| trace.wants(step + 1)).map(|trace| (trace, recipe));
        state.step(around, &batch, &recipe.objective, shown.transpose()?, trace)?;
        // 3. Tell.
        if observe(state).is_break() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Takes the discriminator's steps before the first one of the diffusion model (section 3.4). It has none of the
/// diffusion model's guesses to look at yet.
///
/// `observe` hears of steps done and may stop; gives whether all were taken. Does nothing where no discriminator takes
/// part or steps of the diffusion model were taken already.
pub fn train_critic(
    state: &mut State,
    material: &Material,
    recipe: &Recipe,
    models: &Models,
    observe: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<bool> {
    if state.n_steps() > 0 {
        return Ok(true);
    }
    let Some(critic) = state.critic_mut() else { return Ok(true) };
    for step in 0..recipe.critic.n_steps {
        let (real, fake) = drawn_for_critic(material, recipe, models, "critic before", step)?;
        if !critic.step(&real, &fake)?.is_finite() {
            return Err(Error::bad(
                "discriminator: its loss is no longer a number; try a lower learning rate",
            ));
        }
        if observe(step + 1).is_break() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The batch of step `step`, counted from 0: a pure function of its arguments.
fn draw(material: &Material, recipe: &Recipe, models: &Models, step: u64) -> Result<Batch> {
    let seed = |label: &str| random::derive(recipe.seed, label);
    let n_instances = material.instances.len();
    if n_instances == 0 {
        return Err(Error::bad("training: no photos"));
    }
    let instance = &material.instances[dealt(seed("photo"), step, n_instances)];
    let mut moments = vec![&instance.moments];
    let mut prompts = vec![instance.prompt.clone()];
    if !material.class_images.is_empty() {
        moments.push(&material.class_images[dealt(seed("class image"), step, material.class_images.len())]);
        prompts.push(recipe.class_prompt());
    }
    let dims = stacked(&moments)?.mean.dims().to_vec(); // [B, c, h, w]
    let n_timesteps = models.schedule.n_timesteps();
    let t: Vec<usize> =
        (0..prompts.len() as u64).map(|i| random::below(seed("timestep"), step, i, n_timesteps)).collect();

    // Eq. 6, and the settings that spare what is dear.
    let perceptual = &recipe.perceptual;
    let looked_at = recipe.has_perceptual()
        && step < perceptual.until_step
        && perceptual.timestep_max.is_none_or(|max| t[0] < max);
    let crop = perceptual.crop.filter(|&side| side < dims[2].min(dims[3])).map(|side| {
        let place = |i: u64, room: usize| random::below(seed("crop"), step, i, room - side + 1);
        (place(0, dims[2]), place(1, dims[3]), side)
    });
    Ok(Batch {
        latents: latents_of(&moments, models, seed("latents"), step)?,
        noise: normal(seed("noise"), step, &dims, models)?,
        t,
        ids: prompts.iter().map(|prompt| models.tokenizer.encode(prompt)).collect(),
        reference: looked_at
            .then(|| picture::signed(&instance.pixels)?.to_device(&models.device).map_err(Error::from))
            .transpose()?,
        crop,
    })
}

/// Latents for the discriminator, as many real ones as fake. Real are pictures of the product, fake are by turns pictures of the
/// class and spoiled ones of the product.
fn drawn_for_critic(
    material: &Material,
    recipe: &Recipe,
    models: &Models,
    label: &str,
    step: u64,
) -> Result<(Tensor, Tensor)> {
    let (seed, n) = (random::derive(recipe.seed, label), recipe.critic.batch);
    let picked =
        |kind: &str, i: usize, from: usize| random::below(random::derive(seed, kind), step, i as u64, from);
    let real: Vec<&Moments> =
        (0..n).map(|i| &material.instances[picked("real", i, material.instances.len())].moments).collect();
    let (classes, spoiled) = (&material.class_images, &material.spoiled);
    let fake = (0..n).map(|i| {
        let from = if spoiled.is_empty() || i % 3 == 0 && !classes.is_empty() { classes } else { spoiled };
        from.get(picked("fake", i, from.len()))
    });
    let fake: Option<Vec<&Moments>> = fake.collect();
    let fake = fake.ok_or_else(|| {
        Error::bad("discriminator: nothing to tell the product from; wanted class images or views")
    })?;
    Ok((
        latents_of(&real, models, random::derive(seed, "real latents"), step)?,
        latents_of(&fake, models, random::derive(seed, "fake latents"), step)?,
    ))
}

/// Latents of these pictures, in the UNet's scale, drawn from their distributions.
fn latents_of(moments: &[&Moments], models: &Models, seed: u64, step: u64) -> Result<Tensor> {
    let moments = stacked(moments)?;
    let noise = normal(seed, step, moments.mean.dims(), models)?;
    Ok(models.vae.latents(&moments, &noise)?.detach())
}

fn stacked(moments: &[&Moments]) -> Result<Moments> {
    let join = |part: fn(&Moments) -> &Tensor| {
        Tensor::cat(&moments.iter().map(|moments| part(moments)).collect::<Vec<_>>(), 0)
    };
    Ok(Moments { mean: join(|moments| &moments.mean)?, logvar: join(|moments| &moments.logvar)? })
}

fn normal(seed: u64, step: u64, dims: &[usize], models: &Models) -> Result<Tensor> {
    Ok(Tensor::from_vec(random::normal(seed, step, dims.iter().product()), dims, &models.device)?)
}

/// Which of `n` things step `step` takes. All come once, shuffled anew each round, before any comes again: with three
/// photos and few steps, chance alone would favour one of them.
fn dealt(seed: u64, step: u64, n: usize) -> usize {
    let (round, place) = (step / n as u64, (step % n as u64) as usize);
    let mut order: Vec<usize> = (0..n).collect();
    for i in 0..=place {
        order.swap(i, i + random::below(seed, round, i as u64, n - i));
    }
    order[place]
}

#[cfg(test)]
mod tests {
    use super::dealt;

    #[test]
    fn every_photo_comes_once_before_any_comes_again() {
        let mut orders = std::collections::BTreeSet::new();
        for round in 0..20 {
            let order: Vec<usize> = (0..5).map(|i| dealt(7, round * 5 + i, 5)).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
            orders.insert(order);
        }
        assert!(orders.len() > 10, "{} orders in 20 rounds", orders.len());
    }
}
