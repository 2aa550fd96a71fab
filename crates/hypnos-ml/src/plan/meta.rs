//! A bundle's models without values, which dry runs go through.

use candle_core::DType;

use crate::Result;
use crate::bundle::{Bundle, Part};
use crate::dry_run::bytes_of;
use crate::models::clip::ClipText;
use crate::models::discriminator::{Config, Discriminator};
use crate::models::unet::Unet;
use crate::models::vae::Vae;
use crate::ops::MomentFormat;
use crate::param::Param;
use crate::precision::Precision;
use crate::train::Learner;
use crate::weights::Weights;

/// Text encoder, UNet and autoencoder.
pub(super) struct MetaModels {
    pub(super) text: Part<ClipText>,
    pub(super) unet: Part<Unet>,
    pub(super) vae: Part<Vae>,
    /// Channels of the latents.
    pub(super) channels: usize,
    /// Pixels per latent along one side.
    pub(super) factor: usize,
}

impl MetaModels {
    /// As they draw.
    pub(super) fn frozen(bundle: &Bundle, precision: Precision) -> Result<Self> {
        Self::of(bundle, precision, false)
    }

    /// As they train.
    pub(super) fn training(
        bundle: &Bundle,
        precision: Precision,
        learner: Learner,
        checkpointing: bool,
    ) -> Result<Self> {
        let mut models = Self::of(bundle, precision, learner == Learner::Weights)?;
        models.unet.model.checkpointing = checkpointing;
        if learner == Learner::Embedding {
            let shape = [1, models.text.model.width()];
            let row = Param::placeholder("embedding", &shape, DType::F32, true)?;
            models.text.model = models.text.model.with_embedding(0, row)?;
        }
        Ok(models)
    }

    fn of(bundle: &Bundle, precision: Precision, trainable: bool) -> Result<Self> {
        Ok(Self {
            text: bundle.meta_text_encoder(precision, trainable)?,
            unet: bundle.meta_unet(precision, trainable)?,
            vae: bundle.meta_vae(precision)?,
            channels: bundle.latent_channels(),
            factor: bundle.factor(),
        })
    }

    /// Bytes of text encoder and UNet.
    pub(super) fn drawing_bytes(&self) -> u64 {
        weight_bytes(&self.text) + weight_bytes(&self.unet)
    }

    /// Bytes of AdamW's moments of text encoder and UNet.
    pub(super) fn moment_bytes(&self, format: MomentFormat) -> u64 {
        let params = self.text.params.values().chain(self.unet.params.values());
        params.map(|param| format.bytes(param.dims().iter().product())).sum()
    }

    /// Those of them that are held in bf16: as many as the copy takes that models in training make of their weights.
    pub(super) fn rounded_bytes(&self) -> u64 {
        let params = self.text.params.values().chain(self.unet.params.values());
        params.filter(|param| param.value().dtype() == DType::BF16).map(bytes_of).sum()
    }

    /// Bytes of the autoencoder.
    pub(super) fn vae_bytes(&self) -> u64 {
        weight_bytes(&self.vae)
    }

    /// The latents of `b` pictures.
    pub(super) fn latent_dims(&self, b: usize, width: usize, height: usize) -> [usize; 4] {
        [b, self.channels, height / self.factor, width / self.factor]
    }
}

fn weight_bytes<M>(part: &Part<M>) -> u64 {
    part.params.values().map(bytes_of).sum()
}

/// The discriminator that a training uses with latents of this size, and the bytes of its weights.
pub(super) fn discriminator(channels: usize, side: usize, trainable: bool) -> Result<(Discriminator, u64)> {
    let weights = Weights::meta().trainable(trainable);
    let model = Discriminator::load(&weights, &Config::new(channels, side))?;
    Ok((model, weights.params().values().map(bytes_of).sum()))
}
