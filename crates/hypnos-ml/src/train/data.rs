//! Training data, and the batch that each step draws from it.

use candle_core::Tensor;
use image::RgbImage;

use super::losses::Batch;
use super::recipe::Recipe;
use crate::models::vae::Moments;
use crate::sample::Shared;
use crate::{Error, Result, image_io, random};

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
pub struct TrainingData {
    /// Pictures of the product, at least one.
    pub instances: Vec<Instance>,
    /// Pictures of its class; may be empty.
    pub class_images: Vec<Moments>,
    /// Altered instances that the discriminator must not take for the product; may be empty.
    pub negatives: Vec<Moments>,
}

/// The batch of step `step`, counted from 0: a pure function of its arguments.
pub(super) fn draw(data: &TrainingData, recipe: &Recipe, shared: &Shared, step: u64) -> Result<Batch> {
    let seed = |label: &str| random::derive(recipe.seed, label);
    let n_instances = data.instances.len();
    if n_instances == 0 {
        return Err(Error::input("training: no photos"));
    }
    let instance = &data.instances[dealt(seed("photo"), step, n_instances)];
    let mut moments = vec![&instance.moments];
    let mut prompts = vec![instance.prompt.clone()];
    if !data.class_images.is_empty() {
        moments.push(&data.class_images[dealt(seed("class image"), step, data.class_images.len())]);
        prompts.push(recipe.class_prompt());
    }
    let dims = stacked(&moments)?.mean.dims().to_vec(); // [B, c, h, w]
    let n_timesteps = shared.schedule.n_timesteps();
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
        latents: latents_of(&moments, shared, seed("latents"), step)?,
        noise: normal(seed("noise"), step, &dims, shared)?,
        t,
        ids: prompts.iter().map(|prompt| shared.tokenizer.encode(prompt)).collect(),
        reference: looked_at
            .then(|| image_io::signed(&instance.pixels)?.to_device(&shared.device).map_err(Error::from))
            .transpose()?,
        crop,
    })
}

/// Latents for the discriminator, as many real ones as fake. Real are pictures of the product, fake are by turns
/// pictures of the class and altered ones of the product.
pub(super) fn discriminator_latents(
    data: &TrainingData,
    recipe: &Recipe,
    shared: &Shared,
    label: &str,
    step: u64,
) -> Result<(Tensor, Tensor)> {
    let (seed, n) = (random::derive(recipe.seed, label), recipe.discriminator.batch);
    let picked =
        |kind: &str, i: usize, from: usize| random::below(random::derive(seed, kind), step, i as u64, from);
    let real: Vec<&Moments> =
        (0..n).map(|i| &data.instances[picked("real", i, data.instances.len())].moments).collect();
    let (classes, negatives) = (&data.class_images, &data.negatives);
    let fake = (0..n).map(|i| {
        let from =
            if negatives.is_empty() || i % 3 == 0 && !classes.is_empty() { classes } else { negatives };
        from.get(picked("fake", i, from.len()))
    });
    let fake: Option<Vec<&Moments>> = fake.collect();
    let fake = fake.ok_or_else(|| {
        Error::input("discriminator: nothing to tell the product from; wanted class images or views")
    })?;
    Ok((
        latents_of(&real, shared, random::derive(seed, "real latents"), step)?,
        latents_of(&fake, shared, random::derive(seed, "fake latents"), step)?,
    ))
}

/// Latents of these pictures, in the UNet's scale, drawn from their distributions.
fn latents_of(moments: &[&Moments], shared: &Shared, seed: u64, step: u64) -> Result<Tensor> {
    let moments = stacked(moments)?;
    let noise = normal(seed, step, moments.mean.dims(), shared)?;
    Ok(shared.vae.latents(&moments, &noise)?.detach())
}

fn stacked(moments: &[&Moments]) -> Result<Moments> {
    let join = |part: fn(&Moments) -> &Tensor| {
        Tensor::cat(&moments.iter().map(|moments| part(moments)).collect::<Vec<_>>(), 0)
    };
    Ok(Moments { mean: join(|moments| &moments.mean)?, logvar: join(|moments| &moments.logvar)? })
}

fn normal(seed: u64, step: u64, dims: &[usize], shared: &Shared) -> Result<Tensor> {
    Ok(Tensor::from_vec(random::normal(seed, step, dims.iter().product()), dims, &shared.device)?)
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
