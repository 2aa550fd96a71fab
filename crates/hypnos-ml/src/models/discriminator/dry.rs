//! The discriminator in a dry run: the layers and the life of every value as in its `forward`.

use candle_core::Result;

use super::{Discriminator, Layer};
use crate::dry_run::{DryTensor, sigmoid};
use crate::nn::to_tokens_dry;
use crate::ops::dry as ops;

impl Discriminator {
    /// [`Discriminator::forward`] of latents `[B, c, h, w]`.
    pub(crate) fn dry(&self, latents: &DryTensor) -> Result<DryTensor> {
        let mut x = self.tokens_dry(latents)?;
        for layer in &self.layers {
            x = layer.dry(&x);
        }
        let class = self.norm.dry(&x.narrow(1, 1));
        Ok(sigmoid(&self.head.dry(&class).reshape(&[x.dims()[0]])))
    }

    fn tokens_dry(&self, latents: &DryTensor) -> Result<DryTensor> {
        let (meter, b) = (latents.meter(), latents.dims()[0]);
        let mut x = latents.clone();
        for (conv, norm) in &self.stem {
            x = norm.dry(&conv.dry(&x)?);
        }
        let class = ops::embedding(meter, &[b, 1], &self.class_embedding);
        let x = DryTensor::cat(&[&class, &to_tokens_dry(&x)], 1);
        let places = ops::embedding(meter, &[b, x.dims()[1]], &self.position_embedding);
        Ok(x.plus(&places))
    }
}

impl Layer {
    fn dry(&self, x: &DryTensor) -> DryTensor {
        let hidden = self.norm1.dry(x);
        let (q, k, v) = (self.q_proj.dry(&hidden), self.k_proj.dry(&hidden), self.v_proj.dry(&hidden));
        let x = x.plus(&self.out_proj.dry(&ops::attention(&q, &k, &v, self.n_heads)));
        let hidden = self.linear1.dry(&self.norm2.dry(&x));
        x.plus(&self.linear2.dry(&ops::activate(&hidden)))
    }
}
