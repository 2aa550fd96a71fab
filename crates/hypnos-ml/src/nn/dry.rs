//! The layers in a dry run: what allocates, keeps and frees as their `forward` does.

use candle_core::Result;

use super::{Conv2d, GroupNorm, LayerNorm, Linear, Resnet, ResnetConfig};
use crate::dry_run::DryTensor;
use crate::ops::Activation;
use crate::ops::dry as ops;

impl Linear {
    pub(crate) fn dry(&self, x: &DryTensor) -> DryTensor {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }

    pub(crate) fn dry_to_picture(&self, residual: &DryTensor, x: &DryTensor) -> DryTensor {
        ops::tokens_to_picture(residual, x, &self.weight, self.bias.as_ref())
    }

    pub(crate) fn dry_plus(&self, residual: &DryTensor, x: &DryTensor) -> DryTensor {
        ops::linear_plus(residual, x, &self.weight, self.bias.as_ref())
    }
}

impl Conv2d {
    pub(crate) fn dry(&self, x: &DryTensor) -> Result<DryTensor> {
        ops::conv2d(x, &self.weight, self.bias.as_ref(), self.spec)
    }

    fn dry_plus(&self, residual: &DryTensor, x: &DryTensor) -> Result<DryTensor> {
        ops::conv2d_plus(residual, x, &self.weight, self.bias.as_ref(), self.spec)
    }
}

impl LayerNorm {
    pub(crate) fn dry(&self, x: &DryTensor) -> DryTensor {
        ops::layer_norm(x, &self.weight, &self.bias)
    }
}

impl GroupNorm {
    pub(crate) fn dry(&self, x: &DryTensor) -> DryTensor {
        self.dry_shifted(x, None)
    }

    fn dry_shifted(&self, x: &DryTensor, shift: Option<&DryTensor>) -> DryTensor {
        let y = match shift {
            Some(shift) => ops::group_norm_shifted(x, shift, &self.weight, &self.bias),
            None => ops::group_norm(x, &self.weight, &self.bias),
        };
        match self.activation {
            Some(activation) if activation != Activation::Silu => ops::activate(&y),
            _ => y,
        }
    }
}

impl Resnet {
    pub(crate) fn dry(&self, x: &DryTensor, time: Option<&DryTensor>) -> Result<DryTensor> {
        let mut hidden = self.conv1.dry(&self.norm1.dry(x))?;
        let mut shift = None;
        if let (Some(project), Some(time)) = (&self.time_emb_proj, time) {
            if x.meter().on_gpu() {
                shift = Some(project.dry(time));
            } else {
                let time = project.dry(&ops::activate(time));
                let [b, n] = [0, 1].map(|axis| time.dims()[axis]);
                hidden = hidden.broadcast_plus(&time.reshape(&[b, n, 1, 1]));
            }
        }
        let normed = self.norm2.dry_shifted(&hidden, shift.as_ref());
        if x.meter().on_gpu() {
            let residual = self.conv_shortcut.as_ref().map(|shortcut| shortcut.dry(x)).transpose()?;
            return self.conv2.dry_plus(residual.as_ref().unwrap_or(x), &normed);
        }
        let hidden = self.conv2.dry(&normed)?;
        drop(normed);
        Ok(match &self.conv_shortcut {
            Some(shortcut) => shortcut.dry(x)?.plus(&hidden),
            None => x.plus(&hidden),
        })
    }
}

impl ResnetConfig {
    /// [`ResnetConfig::shared_time`].
    pub(crate) fn shared_time_dry(time: DryTensor) -> DryTensor {
        if time.meter().on_gpu() { ops::activate(&time) } else { time }
    }
}

/// [`crate::ops::to_tokens`].
pub(crate) fn to_tokens_dry(x: &DryTensor) -> DryTensor {
    let [b, c, h, w] = [0, 1, 2, 3].map(|axis| x.dims()[axis]);
    x.reshape(&[b, c, h * w]).transpose(1, 2).contiguous()
}
