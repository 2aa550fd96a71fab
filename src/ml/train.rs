//! The loss that a step of training lowers. The loop around it comes with the method.

use candle_core::Tensor;

use super::diffusion::Schedule;
use super::models::{clip::ClipText, unet::Unet};
use super::{Error, Result};

/// Images under noise, and the words for them. One row each.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `[B, c, h, w]`, in the UNet's scale.
    pub latents: Tensor,
    /// `[B, c, h, w]`, unit normal.
    pub noise: Tensor,
    /// Timesteps, `0..T`.
    pub t: Vec<usize>,
    /// Token ids of the prompts.
    pub ids: Vec<Vec<u32>>,
    /// What each image's loss counts: 1 for an instance image, the prior's weight for a class image.
    pub weights: Vec<f64>,
}

/// The noise loss with prior preservation (Ruiz et al. 2023, arXiv 2208.12242, eq. 2): the sum over images of
/// `weight * mean (prediction - target)^2`.
///
/// The target is the noise, or the velocity where the schedule predicts that. Instance and class images go through
/// text encoder and UNet as one batch. A scalar, differentiable in every trained weight of both.
pub fn noise_loss(text: &ClipText, unet: &Unet, schedule: &Schedule, batch: &Batch) -> Result<Tensor> {
    let (b, ..) = batch.latents.dims4()?;
    if batch.t.len() != b || batch.ids.len() != b || batch.weights.len() != b || b == 0 {
        return Err(Error::bad(format!(
            "noise loss: {b} images, {} timesteps, {} prompts, {} weights",
            batch.t.len(),
            batch.ids.len(),
            batch.weights.len()
        )));
    }
    let noisy = schedule.q_sample(&batch.latents, &batch.noise, &batch.t)?;
    let target = schedule.target(&batch.latents, &batch.noise, &batch.t)?;
    let t: Vec<f64> = batch.t.iter().map(|&t| t as f64).collect();
    let prediction = unet.forward(&noisy, &t, &text.forward(&batch.ids)?)?;
    let each = (prediction - target)?.sqr()?.flatten_from(1)?.mean(1)?; // [B]
    let weights: Vec<f32> = batch.weights.iter().map(|&weight| weight as f32).collect();
    Ok((each * Tensor::from_vec(weights, b, batch.latents.device())?)?.sum_all()?)
}
