//! The losses of HYPNOS (arXiv 2410.14265, section 3.4) and their sum. Equation numbers are the paper's.
//!
//! DreamBooth's are the same ones with other settings: squares in place of the inverse Gaussian, and no weight on the
//! two that look at the denoised latents.
//!
//! A UNet that answers with the velocity instead of the noise (Salimans and Ho 2022, arXiv 2202.00512, appendix D; Stable
//! Diffusion 2 for 768 pixels) has
//!
//!   v = √ᾱ_t ε − √(1 − ᾱ_t) z_0      as the target of eq. 2 and eq. 4, in the place of ε, and
//!   ẑ_0 = √ᾱ_t z_t − √(1 − ᾱ_t) v̂     as the latents of eq. 5 and eq. 7.
//!
//! The target is that of diffusers' `train_dreambooth.py` where `prediction_type` is `v_prediction`.
//! Departure: the paper knows ε only.

use std::f64::consts::PI;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::diffusion::Schedule;
use crate::models::clip::ClipText;
use crate::models::discriminator::Discriminator;
use crate::models::unet::Unet;
use crate::models::vae::Vae;
use crate::perceptual::{Perceptual, perceptual_loss};
use crate::{Error, Result};

/// The reconstruction loss: how far the predicted noise is from the true one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reconstruction {
    /// The mean of squares.
    Mse,
    /// Eq. 2, the inverse of a Gaussian: steeper than a square where the error is large.
    InverseGaussian {
        /// Its width. At 1.382 it lies closest to the square on errors up to 1 (eq. 3).
        sigma: f64,
        /// Largest exponent; an element beyond it counts as much as one at it and is not learned from.
        exponent_max: f64,
    },
}

impl Reconstruction {
    /// The mean over all elements, and the share of elements whose exponent was cut. Both scalars; the first is
    /// differentiable.
    fn loss(self, prediction: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let square = (prediction - target)?.sqr()?;
        match self {
            Self::Mse => Ok((square.mean_all()?, Tensor::zeros((), DType::F32, square.device())?)),
            Self::InverseGaussian { sigma, exponent_max } => {
                let exponent = (square / (2.0 * sigma * sigma))?;
                let cut = exponent.detach().gt(exponent_max)?.to_dtype(DType::F32)?.mean_all()?;
                let grown = (exponent.minimum(exponent_max)?.exp()? - 1.0)?.mean_all()?;
                Ok(((grown * (sigma * (2.0 * PI).sqrt()))?, cut))
            }
        }
    }
}

/// The weight of each loss in the sum (eq. 1).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossWeights {
    /// Of the reconstruction (eq. 2).
    pub reconstruction: f64,
    /// Of the prior preservation (eq. 4).
    pub prior: f64,
    /// Of the perceptual loss (eq. 5).
    pub perceptual: f64,
    /// Of the latent discriminator's loss (eq. 7).
    pub discriminator: f64,
}

/// The objective of a step: its losses and their weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// The reconstruction loss.
    pub reconstruction: Reconstruction,
    /// Weights of the losses; a loss without weight is not computed.
    pub weights: LossWeights,
    /// Weights of the perceptual loss's strides 2, 4, 8, 16 and 32.
    pub strides: [f64; 5],
}

impl Objective {
    /// DreamBooth's (Ruiz et al. 2023, arXiv 2208.12242, eq. 2).
    pub fn dreambooth(prior: f64) -> Self {
        Self {
            reconstruction: Reconstruction::Mse,
            weights: LossWeights { reconstruction: 1.0, prior, perceptual: 0.0, discriminator: 0.0 },
            strides: [0.0; 5],
        }
    }
}

/// The batch of a step: latents, noise, timesteps and prompts of one picture of the product and, if any, one of its
/// class.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `[B, c, h, w]`, in the UNet's scale; B is 1 or 2.
    pub latents: Tensor,
    /// `[B, c, h, w]`, unit normal.
    pub noise: Tensor,
    /// Timesteps, `0..T`.
    pub t: Vec<usize>,
    /// Token ids of the prompts.
    pub ids: Vec<Vec<u32>>,
    /// The product's picture as it was before the autoencoder, `[1, 3, H, W]`, signed; what the perceptual loss looks
    /// at. Without it there is no such loss.
    pub reference: Option<Tensor>,
    /// The rectangle that the perceptual loss looks at in latents, if not at all of them: top, left, side.
    pub crop: Option<(usize, usize, usize)>,
}

/// The frozen models and the schedule that a loss needs.
#[derive(Clone, Copy, Debug)]
pub struct FrozenModels<'a> {
    /// The noise schedule.
    pub schedule: &'a Schedule,
    /// The perceptual loss goes through its decoder.
    pub vae: Option<&'a Vae>,
    /// The network of the perceptual loss.
    pub perceptual: Option<&'a Perceptual>,
}

/// The models that the losses go through.
#[derive(Clone, Copy, Debug)]
pub struct LossModels<'a> {
    /// Learns.
    pub text: &'a ClipText,
    /// Learns.
    pub unet: &'a Unet,
    /// Frozen.
    pub frozen: FrozenModels<'a>,
    /// Frozen, as it was before the step.
    pub discriminator: Option<&'a Discriminator>,
}

/// The losses of a batch, and what was computed on the way. Scalars are unweighted and carry their graphs.
#[derive(Debug)]
pub struct Losses {
    /// The sum by the weights.
    pub total: Tensor,
    /// Of the product's picture.
    pub reconstruction: Tensor,
    /// Share of its elements whose exponent was cut.
    pub cut: Tensor,
    /// Of the picture of the class.
    pub prior: Option<Tensor>,
    /// Of the decoded picture.
    pub perceptual: Option<Tensor>,
    /// Of the denoised latents.
    pub adversarial: Option<Tensor>,
    /// The UNet's answers, `[B, c, h, w]`.
    pub prediction: Tensor,
    /// The product's latents as the answer implies them, `[1, c, h, w]`, where a loss wanted them.
    pub z0: Option<Tensor>,
    /// They, or the crop of them, decoded: `[1, 3, H, W]`, about signed.
    pub decoded: Option<Tensor>,
}

/// Computes the losses of `batch` by `objective`. Differentiable in every trained weight of `models`.
///
/// [`Error::Input`] if the batch does not fit together, or a loss has weight and no model.
pub fn losses(models: &LossModels, batch: &Batch, objective: &Objective) -> Result<Losses> {
    let (b, ..) = batch.latents.dims4()?;
    if batch.t.len() != b || batch.ids.len() != b || b == 0 || b > 2 {
        let (n_t, n_ids) = (batch.t.len(), batch.ids.len());
        return Err(Error::input(format!(
            "losses: {b} pictures, {n_t} timesteps, {n_ids} prompts; wanted 1 or 2 of each"
        )));
    }
    let (weights, FrozenModels { schedule, vae, perceptual: classifier }) =
        (&objective.weights, models.frozen);
    // 1. Noise over both pictures, and the model's answer to it, as one batch.
    let noisy = schedule.q_sample(&batch.latents, &batch.noise, &batch.t)?;
    let target = schedule.target(&batch.latents, &batch.noise, &batch.t)?;
    let t: Vec<f64> = batch.t.iter().map(|&t| t as f64).collect();
    let prediction = models.unet.forward(&noisy, &t, &models.text.forward(&batch.ids)?)?;
    let of = |x: &Tensor, row: usize| x.narrow(0, row, 1);

    // 2. Eq. 2 for the product, eq. 4 for its class.
    let (reconstruction, cut) = objective.reconstruction.loss(&of(&prediction, 0)?, &of(&target, 0)?)?;
    let mut total = (&reconstruction * weights.reconstruction)?;
    let mut prior = None;
    if b == 2 {
        let loss = (of(&prediction, 1)? - of(&target, 1)?)?.sqr()?.mean_all()?;
        total = (total + (&loss * weights.prior)?)?;
        prior = Some(loss);
    }

    // 3. What the answer says the product's latents are.
    let reference = batch.reference.as_ref().filter(|_| weights.perceptual > 0.0);
    let denoised = reference.is_some() || weights.discriminator > 0.0;
    let z0 = || schedule.x_0(&of(&noisy, 0)?, &of(&prediction, 0)?, &batch.t[..1]);
    let z0 = denoised.then(z0).transpose()?;

    // 4. Eq. 5: they, decoded, against the picture.
    let (mut perceptual, mut decoded) = (None, None);
    if let (Some(z0), Some(reference)) = (&z0, reference) {
        let (Some(vae), Some(net)) = (vae, classifier) else {
            return Err(Error::input("losses: the perceptual loss has weight, and there is no model for it"));
        };
        let (z0, reference) = cropped(z0, reference, batch.crop, vae.factor())?;
        let picture = vae.decode_with(&z0, models.unet.checkpointing)?;
        let loss = perceptual_loss(&net.features(&picture)?, &net.features(&reference)?, &objective.strides)?;
        total = (total + (&loss * weights.perceptual)?)?;
        (perceptual, decoded) = (Some(loss), Some(picture));
    }

    // 5. Eq. 7: they, as they are, before the discriminator.
    let mut adversarial = None;
    if let Some(z0) = z0.as_ref().filter(|_| weights.discriminator > 0.0) {
        let Some(discriminator) = models.discriminator else {
            return Err(Error::input(
                "losses: the discriminator's loss has weight, and there is no discriminator",
            ));
        };
        let loss = (1.0 - discriminator.forward(z0)?)?.sqr()?.mean_all()?;
        total = (total + (&loss * weights.discriminator)?)?;
        adversarial = Some(loss);
    }
    Ok(Losses { total, reconstruction, cut, prior, perceptual, adversarial, prediction, z0, decoded })
}

/// The same rectangle of latents and picture.
fn cropped(
    z0: &Tensor,
    reference: &Tensor,
    crop: Option<(usize, usize, usize)>,
    factor: usize,
) -> Result<(Tensor, Tensor)> {
    let Some((top, left, side)) = crop else { return Ok((z0.clone(), reference.clone())) };
    let cut =
        |x: &Tensor, f: usize| x.narrow(2, top * f, side * f)?.narrow(3, left * f, side * f)?.contiguous();
    Ok((cut(z0, 1)?, cut(reference, factor)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inverse_gaussian(x: f64, sigma: f64) -> f64 {
        let loss = Reconstruction::InverseGaussian { sigma, exponent_max: 20.0 };
        let at = |x: f64| Tensor::from_vec(vec![x], 1, &candle_core::Device::Cpu);
        let loss = loss.loss(&at(x).expect("a number"), &at(0.0).expect("a number")).expect("a loss").0;
        loss.to_scalar().expect("a number")
    }

    /// Eq. 3 by Simpson's rule on 64 intervals of (0, 1), its minimum by golden section.
    #[test]
    fn the_sigma_closest_to_the_square_is_the_papers() {
        let apart = |sigma: f64| {
            let n = 64;
            let point = |i: usize| {
                let x = i as f64 / f64::from(n);
                let weight = if i == 0 || i == n as usize { 1.0 } else { f64::from(2 + 2 * (i as u32 % 2)) };
                weight * (x * x - inverse_gaussian(x, sigma)).powi(2)
            };
            (0..=n as usize).map(point).sum::<f64>() / f64::from(3 * n)
        };
        let ratio = 5f64.sqrt().mul_add(0.5, -0.5);
        let (mut low, mut high) = (0.8, 3.0);
        while high - low > 1e-5 {
            let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
            if apart(a) < apart(b) { high = b } else { low = a }
        }
        assert!((low - 1.382).abs() < 5e-4, "the minimum is at {low}");
    }

    #[test]
    fn an_exponent_beyond_the_largest_is_cut_and_teaches_nothing() {
        let x = candle_core::Var::new(&[0.5_f32, 9.0], &candle_core::Device::Cpu).expect("a variable");
        let zero = x.as_tensor().zeros_like().expect("zeros");
        let loss = Reconstruction::InverseGaussian { sigma: 1.0, exponent_max: 20.0 };
        let (value, cut) = loss.loss(&x, &zero).expect("a loss");
        assert!((cut.to_scalar::<f32>().expect("a number") - 0.5).abs() < 1e-6);
        let grad = value.backward().expect("a backward").get(&x).expect("a gradient").to_vec1::<f32>();
        let grad = grad.expect("numbers");
        assert!(grad[0] > 0.0 && grad[1] == 0.0, "{grad:?}");
    }
}
