//! Dry runs of what a training and a sample do over and over: a training step, a step of the discriminator, a step of a
//! sampler, a picture through the autoencoder or through the segmenter.

use super::meta::MetaModels;
use crate::Result;
use crate::dry_run::{DryTensor, Meter, backward};
use crate::models::discriminator::Discriminator;
use crate::models::efficientnet::WeightNames;
use crate::models::tracer;
use crate::perceptual;

/// What a dry run counted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    /// Most bytes at once, weights aside.
    pub(super) bytes: u64,
    /// Floating point operations.
    pub(super) arithmetic: super::Arithmetic,
}

impl Counted {
    fn of(meter: &Meter) -> Self {
        Self { bytes: meter.peak(), arithmetic: super::Arithmetic::of(meter) }
    }
}

/// A training step, as `crate::train::losses::losses` computes it and candle goes back through it.
pub(super) struct Step<'a> {
    pub(super) models: &'a MetaModels,
    /// Pictures: the product's, and one of its class if there are any.
    pub(super) b: usize,
    pub(super) side: usize,
    /// The network of the perceptual loss, where the step computes it, and the side in latents that it looks at.
    pub(super) perceptual: Option<(&'a perceptual::Config, usize)>,
    pub(super) discriminator: Option<&'a Discriminator>,
}

impl Step<'_> {
    /// The peak includes the gradients of the weights.
    pub(super) fn count(&self, on_gpu: bool) -> Result<Counted> {
        let meter = &Meter::new(on_gpu);
        let dims = self.models.latent_dims(self.b, self.side, self.side);
        // The batch: latents, noise, the two mixed, and what is to be found.
        let _batch = [(); 3].map(|()| DryTensor::constant(meter, &dims));
        let noisy = DryTensor::constant(meter, &dims);
        let text = self.models.text.model.dry(meter, self.b);
        let prediction = self.models.unet.model.dry(&noisy, &text)?;
        drop(text);
        let target = DryTensor::constant(meter, &dims);
        let square = |row: &DryTensor| row.plus(&target.narrow(0, 1)).sqr();
        // The inverse Gaussian goes through a handful of values; DreamBooth's squares through fewer.
        let row = prediction.narrow(0, 1);
        let mut total = square(&row).affine().affine().times(&row.detach()).affine().mean_all();
        if self.b > 1 {
            total = total.plus(&square(&row).mean_all());
        }
        let z0 = row.affine().plus(&noisy.narrow(0, 1).affine());
        if let Some((net, side)) = self.perceptual {
            let reference = DryTensor::constant(meter, &[1, 3, self.side, self.side]);
            let edge = side * self.models.factor;
            let cropped = z0.narrow(2, side).narrow(3, side).contiguous();
            let reference = reference.narrow(2, edge).narrow(3, edge).contiguous();
            let picture = self.models.vae.model.decode_dry(&cropped, self.models.unet.model.checkpointing)?;
            let (seen, wanted) = (net.dry(&picture)?, net.dry(&reference)?);
            for (a, b) in seen.iter().zip(&wanted) {
                total = total.plus(&a.plus(b).sqr().mean_all());
            }
        }
        if let Some(discriminator) = self.discriminator {
            total = total.plus(&discriminator.dry(&z0)?.affine().sqr().mean_all());
        }
        backward(&total)?;
        Ok(Counted::of(meter))
    }
}

/// A step of the discriminator on so many latents, real and fake together.
pub(super) fn discriminator_step(model: &Discriminator, dims: &[usize], on_gpu: bool) -> Result<Counted> {
    let meter = &Meter::new(on_gpu);
    let scores = model.dry(&DryTensor::constant(meter, dims))?;
    let half = scores.dims()[0] / 2;
    let part = || scores.narrow(0, half.max(1)).affine().sqr().mean_all();
    backward(&part().plus(&part()))?;
    Ok(Counted::of(meter))
}

/// A call of the UNet for `b` pictures with guidance, as a sampler makes it: both prompts as one batch.
pub(super) fn sampler_step(
    models: &MetaModels,
    b: usize,
    (width, height): (usize, usize),
    on_gpu: bool,
) -> Result<Counted> {
    let meter = &Meter::new(on_gpu);
    let text = models.text.model.dry(meter, 2 * b);
    // The sampler's own: the latents, the noise that they began with, the last answers.
    let own = [(); 4].map(|()| DryTensor::constant(meter, &models.latent_dims(b, width, height)));
    let answer = models.unet.model.dry(&DryTensor::cat(&[&own[0], &own[0]], 0), &text)?;
    let _guided = answer.affine().plus(&answer);
    Ok(Counted::of(meter))
}

/// One picture out of its latents, to pixels.
pub(super) fn decoding(
    models: &MetaModels,
    (width, height): (usize, usize),
    on_gpu: bool,
) -> Result<Counted> {
    let meter = &Meter::new(on_gpu);
    let latents = DryTensor::constant(meter, &models.latent_dims(1, width, height));
    let picture = models.vae.model.decode_dry(&latents, false)?;
    let _pixels = picture.affine().affine().affine().plus(&picture);
    Ok(Counted::of(meter))
}

/// One picture to the distribution of its latents.
pub(super) fn encoding(models: &MetaModels, side: usize, on_gpu: bool) -> Result<Counted> {
    let meter = &Meter::new(on_gpu);
    models.vae.model.encode_dry(&DryTensor::constant(meter, &[1, 3, side, side]))?;
    Ok(Counted::of(meter))
}

/// One photo through the segmenter's encoder. What comes behind it works on a sixteenth of the pixels and less, with the
/// five features that are held here.
pub(super) fn segmenting(config: &tracer::Config, on_gpu: bool) -> Result<Counted> {
    let meter = &Meter::new(on_gpu);
    let photo = DryTensor::constant(meter, &[1, 3, config.input_size, config.input_size]);
    config.encoder().dry(&photo, WeightNames::Lukemelas)?;
    Ok(Counted::of(meter))
}
