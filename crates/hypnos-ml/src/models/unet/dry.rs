//! The UNet in a dry run: the layers and the life of every value as in its `forward`.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Result, bail};

use super::{Attention, Block, DownBlock, Level, MidBlock, Projection, Transformer, Unet, UpBlock};
use crate::dry_run::{DryTensor, checkpoint};
use crate::nn::{Resnet, ResnetConfig};
use crate::ops::dry as ops;
use crate::precision::Precision;

/// What every block of one forward gets.
struct Run {
    time: DryTensor,
    text: DryTensor,
    /// [`super::Shared::keys_values`]. Its `times` are too few to count.
    keys_values: KeysValues,
    checkpointing: bool,
}

type KeysValues = HashMap<String, [DryTensor; 2]>;

impl Unet {
    /// [`Unet::forward`] of latents `[B, c, h, w]` and text `[B, L, D]`.
    pub(crate) fn dry(&self, x: &DryTensor, text: &DryTensor) -> Result<DryTensor> {
        let (given, dtype) = (x.dtype(), self.precision.dtype());
        let text = if text.is_tracked() { text.clone() } else { text.to_dtype(dtype) };
        let time = ResnetConfig::shared_time_dry(self.time_dry(x).to_dtype(dtype));
        let keys_values = self.keys_values_dry(&text);
        let run = Run { time, text, keys_values, checkpointing: self.checkpointing };
        let mut x = self.conv_in.dry(&x.to_dtype(dtype))?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.dry(&x, &run, &mut skips)?;
        }
        x = self.mid_block.dry(&x, &run)?;
        for block in &self.up_blocks {
            x = block.dry(&x, &run, &mut skips)?;
        }
        Ok(self.conv_out.dry(&self.conv_norm_out.dry(&x))?.to_dtype(given))
    }

    fn keys_values_dry(&self, text: &DryTensor) -> KeysValues {
        let learns = |one: &Attention| one.to_k.is_trainable() || one.to_v.is_trainable();
        let is_joined = text.meter().on_gpu() && self.precision == Precision::Bf16;
        if !is_joined || text.is_tracked() || self.attentions_to_text().any(learns) {
            return HashMap::new();
        }
        let of = |one: &Attention| (one.to_k.name().to_owned(), [one.to_k.dry(text), one.to_v.dry(text)]);
        self.attentions_to_text().map(of).collect()
    }

    fn time_dry(&self, x: &DryTensor) -> DryTensor {
        let sines = DryTensor::constant(x.meter(), &[x.dims()[0], self.config.block_out_channels[0]]);
        self.time_embedding.1.dry(&ops::activate(&self.time_embedding.0.dry(&sines)))
    }
}

impl Run {
    fn resnet(&self, resnet: &Arc<Resnet>, x: &DryTensor) -> Result<DryTensor> {
        if !self.checkpointing {
            return resnet.dry(x, Some(&self.time));
        }
        let resnet = Arc::clone(resnet);
        checkpoint(&[x, &self.time], move |inputs| resnet.dry(&inputs[0], Some(&inputs[1])))
    }

    fn transformer(&self, transformer: &Arc<Transformer>, x: &DryTensor) -> Result<DryTensor> {
        if !self.checkpointing || !self.keys_values.is_empty() {
            return Ok(transformer.dry(x, &self.text, &self.keys_values));
        }
        let transformer = Arc::clone(transformer);
        checkpoint(&[x, &self.text], move |inputs| {
            Ok(transformer.dry(&inputs[0], &inputs[1], &HashMap::new()))
        })
    }
}

impl Level {
    fn dry_one(&self, j: usize, x: &DryTensor, run: &Run) -> Result<DryTensor> {
        let x = run.resnet(&self.resnets[j], x)?;
        match self.attentions.get(j) {
            Some(transformer) => run.transformer(transformer, &x),
            None => Ok(x),
        }
    }
}

impl DownBlock {
    fn dry(&self, x: &DryTensor, run: &Run, skips: &mut Vec<DryTensor>) -> Result<DryTensor> {
        let mut x = x.clone();
        for j in 0..self.level.resnets.len() {
            x = self.level.dry_one(j, &x, run)?;
            skips.push(x.clone());
        }
        if let Some(conv) = &self.downsampler {
            x = conv.dry(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

impl UpBlock {
    fn dry(&self, x: &DryTensor, run: &Run, skips: &mut Vec<DryTensor>) -> Result<DryTensor> {
        let mut x = x.clone();
        for j in 0..self.level.resnets.len() {
            let Some(skip) = skips.pop() else { bail!("unet: the way up is longer than the way down") };
            x = self.level.dry_one(j, &ops::concat(&x, &skip), run)?;
        }
        match (&self.upsampler, skips.last()) {
            (Some(conv), Some(next)) => {
                conv.dry(&ops::upsample_nearest(&x, (next.dims()[2], next.dims()[3])))
            }
            _ => Ok(x),
        }
    }
}

impl MidBlock {
    fn dry(&self, x: &DryTensor, run: &Run) -> Result<DryTensor> {
        let x = run.resnet(&self.resnets[0], x)?;
        run.resnet(&self.resnets[1], &run.transformer(&self.attention, &x)?)
    }
}

impl Transformer {
    fn dry(&self, x: &DryTensor, text: &DryTensor, keys_values: &KeysValues) -> DryTensor {
        let text = text.to_dtype(x.dtype());
        let mut tokens = self.proj_in.to_tokens_dry(&self.norm.dry(x));
        for block in &self.transformer_blocks {
            tokens = block.dry(&tokens, &text, keys_values);
        }
        self.proj_out.to_picture_dry(x, &tokens)
    }
}

impl Projection {
    fn to_tokens_dry(&self, x: &DryTensor) -> DryTensor {
        ops::picture_to_tokens(x, &self.weight, Some(&self.bias))
    }

    fn to_picture_dry(&self, residual: &DryTensor, tokens: &DryTensor) -> DryTensor {
        ops::tokens_to_picture(residual, tokens, &self.weight, Some(&self.bias))
    }
}

impl Block {
    fn dry(&self, x: &DryTensor, text: &DryTensor, keys_values: &KeysValues) -> DryTensor {
        let normed = self.norm1.dry(x);
        let x = self.attn1.dry_plus(x, &normed, &normed, None);
        let known = keys_values.get(self.attn2.to_k.name());
        let x = self.attn2.dry_plus(&x, &self.norm2.dry(&x), text, known);
        let hidden = ops::geglu(&self.ff.0.dry(&self.norm3.dry(&x)));
        self.ff.1.dry_plus(&x, &hidden)
    }
}

impl Attention {
    fn dry_plus(
        &self,
        residual: &DryTensor,
        x: &DryTensor,
        source: &DryTensor,
        known: Option<&[DryTensor; 2]>,
    ) -> DryTensor {
        let (q, [k, v]) = match known {
            Some(known) => (self.to_q.dry(x), known.clone()),
            None => (self.to_q.dry(x), [self.to_k.dry(source), self.to_v.dry(source)]),
        };
        let attended = ops::attention(&q, &k, &v, self.n_heads);
        drop((q, k, v));
        self.to_out.dry_plus(residual, &attended)
    }
}
