//! The autoencoder in a dry run: the layers and the life of every value as in its `encode` and `decode`.

use candle_core::Result;

use super::{Attention, Decoder, Encoder, MidBlock, Vae};
use crate::dry_run::{DryTensor, checkpoint};
use crate::nn::to_tokens_dry;
use crate::ops::dry as ops;

impl Vae {
    /// [`Vae::encode`] of pictures `[B, 3, H, W]`, up to both moments side by side.
    pub(crate) fn encode_dry(&self, pictures: &DryTensor) -> Result<DryTensor> {
        let x = self.encoder.dry(&pictures.to_dtype(self.precision.dtype()))?;
        let x = match &self.quant_conv {
            Some(conv) => conv.dry(&x)?,
            None => x,
        };
        Ok(x.to_dtype(pictures.dtype()))
    }

    /// [`Vae::decode_with`] of latents `[B, c, h, w]`.
    pub(crate) fn decode_dry(&self, latents: &DryTensor, checkpointing: bool) -> Result<DryTensor> {
        let mut x = latents.affine().to_dtype(self.precision.dtype());
        if let Some(conv) = &self.post_quant_conv {
            x = conv.dry(&x)?;
        }
        Ok(self.decoder.dry(&x, checkpointing)?.to_dtype(latents.dtype()))
    }
}

impl Encoder {
    fn dry(&self, pictures: &DryTensor) -> Result<DryTensor> {
        let mut x = self.conv_in.dry(pictures)?;
        for block in &self.down_blocks {
            for resnet in &block.resnets {
                x = resnet.dry(&x, None)?;
            }
            if let Some(conv) = &block.downsampler {
                x = conv.dry(&x)?;
            }
        }
        x = self.mid_block.dry(&x, false)?;
        self.conv_out.dry(&self.conv_norm_out.dry(&x))
    }
}

impl Decoder {
    fn dry(&self, latents: &DryTensor, checkpointing: bool) -> Result<DryTensor> {
        let mut x = self.mid_block.dry(&self.conv_in.dry(latents)?, checkpointing)?;
        for block in &self.up_blocks {
            for resnet in &block.resnets {
                let resnet = resnet.clone();
                x = run(&x, checkpointing, move |x| resnet.dry(x, None))?;
            }
            if let Some(conv) = &block.upsampler {
                let conv = conv.clone();
                x = run(&x, checkpointing, move |x| {
                    let [h, w] = [2, 3].map(|axis| x.dims()[axis]);
                    conv.dry(&ops::upsample_nearest(x, (2 * h, 2 * w)))
                })?;
            }
        }
        let (norm, conv) = (self.conv_norm_out.clone(), self.conv_out.clone());
        run(&x, checkpointing, move |x| conv.dry(&norm.dry(x)))
    }
}

fn run(
    x: &DryTensor,
    checkpointing: bool,
    block: impl Fn(&DryTensor) -> Result<DryTensor> + 'static,
) -> Result<DryTensor> {
    if checkpointing { checkpoint(&[x], move |inputs| block(&inputs[0])) } else { block(x) }
}

impl MidBlock {
    fn dry(&self, x: &DryTensor, checkpointing: bool) -> Result<DryTensor> {
        let [first, second] = self.resnets.clone();
        let mut x = run(x, checkpointing, move |x| first.dry(x, None))?;
        if let Some(attention) = self.attention.clone() {
            x = run(&x, checkpointing, move |x| Ok(attention.dry(x)))?;
        }
        run(&x, checkpointing, move |x| second.dry(x, None))
    }
}

impl Attention {
    fn dry(&self, x: &DryTensor) -> DryTensor {
        let tokens = to_tokens_dry(&self.group_norm.dry(x));
        let (q, k, v) = (self.to_q.dry(&tokens), self.to_k.dry(&tokens), self.to_v.dry(&tokens));
        self.to_out.dry_to_picture(x, &ops::attention(&q, &k, &v, 1))
    }
}
