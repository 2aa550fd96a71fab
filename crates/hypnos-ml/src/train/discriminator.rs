//! Trains the latent discriminator: beside the diffusion model, one step for each of its steps.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::models::discriminator::{Config, Discriminator};
use crate::ops::{AdamW, AdamWConfig};
use crate::param::Param;
use crate::weights::Weights;
use crate::{Result, random};

/// How the discriminator is trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiscriminatorRecipe {
    /// Steps before the diffusion model takes its first (section 3.4).
    pub n_steps: u64,
    /// Learning rate.
    pub lr: f64,
    /// Real latents in a step, and fake ones.
    pub batch: usize,
}

/// A discriminator, its optimiser, and its weights by name.
pub struct DiscriminatorTrainer {
    model: Discriminator,
    config: Config,
    /// By the names of [`Discriminator::load`].
    pub(super) params: BTreeMap<String, Param>,
    pub(super) optimiser: AdamW,
    device: Device,
}

impl DiscriminatorTrainer {
    /// Untrained, for latents `[.., c, side, side]`; its weights are drawn from `seed`.
    pub fn new(latent_channels: usize, side: usize, lr: f64, seed: u64, device: &Device) -> Result<Self> {
        let weights = Weights::random(random::derive(seed, "discriminator"), device).trainable(true);
        Self::of(&weights, Config::new(latent_channels, side), lr, device)
    }

    /// With these weights, which must be trainable.
    pub(crate) fn of(weights: &Weights, config: Config, lr: f64, device: &Device) -> Result<Self> {
        let model = Discriminator::load(weights, &config)?;
        let params = weights.params();
        let optimiser = AdamW::new(params.values().cloned(), AdamWConfig { lr, ..AdamWConfig::default() })?;
        Ok(Self { model, config, params, optimiser, device: device.clone() })
    }

    /// One step towards telling `real` latents `[B, c, h, w]` from `fake` ones, by least squares with 1 for real. Gives
    /// the loss before it. The weights stay as they are where it is not finite.
    pub(crate) fn step(&mut self, real: &Tensor, fake: &Tensor) -> Result<f32> {
        let n_real = real.dim(0)?;
        let scores = self.model.forward(&Tensor::cat(&[real, fake], 0)?.detach())?;
        let missed = (scores.narrow(0, 0, n_real)? - 1.0)?.sqr()?.mean_all()?;
        let fooled = scores.narrow(0, n_real, fake.dim(0)?)?.sqr()?.mean_all()?;
        let loss = (missed + fooled)?;
        let value = loss.to_dtype(DType::F32)?.to_scalar::<f32>()?;
        if value.is_finite() {
            loss.backward()?;
            self.optimiser.step()?;
        }
        Ok(value)
    }

    /// The discriminator as it is now, frozen: gradients go through it and none stay in it. It shares the weights.
    pub fn frozen(&self) -> Result<Discriminator> {
        let values = self.params.iter().map(|(name, param)| (name.clone(), param.value()));
        Discriminator::load(&Weights::from_tensors(values.collect(), &self.device), &self.config)
    }
}
