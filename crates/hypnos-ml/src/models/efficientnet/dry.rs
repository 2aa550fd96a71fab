//! EfficientNet in a dry run, from its sizes alone: folding the norms into the convolutions of a network without weights
//! would take the memory that is to be counted.

use candle_core::{DType, Result};

use super::{Config, STAGES, STEM, Size, TAPS, WeightNames};
use crate::dry_run::{DryTensor, sigmoid};
use crate::ops::{Conv2dSpec, dry as ops};
use crate::param::Param;

impl Config {
    /// [`super::EfficientNet::features`] of pictures `[B, 3, H, W]`.
    pub(crate) fn dry(&self, pictures: &DryTensor, names: WeightNames) -> Result<Vec<DryTensor>> {
        let mut size = Size { padding: self.padding, side: self.image_size.unwrap_or(0) };
        let mut n_in = self.round(STEM);
        let mut x = ops::activate(&conv(pictures, n_in, 3, size.pass(3, 2))?);
        let mut features = Vec::with_capacity(TAPS.len());
        for (i, stage) in STAGES.iter().enumerate() {
            for j in 0..self.repeats(stage.repeats) {
                let (n_out, stride) = (self.round(stage.channels), if j == 0 { stage.stride } else { 1 });
                let depthwise = size.pass(stage.kernel, stride);
                let is_residual = stride == 1 && n_in == n_out && (j > 0 || names == WeightNames::Timm);
                let sizes = BlockSizes { n_in, n_out, expansion: stage.expansion, kernel: stage.kernel };
                let y = sizes.dry(&x, depthwise)?;
                x = if is_residual { y.plus(&x) } else { y };
                n_in = n_out;
            }
            if TAPS.contains(&i) {
                features.push(x.clone());
            }
        }
        Ok(features)
    }
}

/// Sizes of an inverted residual.
struct BlockSizes {
    n_in: usize,
    n_out: usize,
    expansion: usize,
    kernel: usize,
}

impl BlockSizes {
    fn dry(&self, input: &DryTensor, depthwise: Conv2dSpec) -> Result<DryTensor> {
        let (wide, pointwise) = (self.n_in * self.expansion, Conv2dSpec::padded(1, 0));
        let x = match self.expansion {
            1 => input.clone(),
            _ => ops::activate(&conv(input, wide, 1, pointwise)?),
        };
        let x = ops::activate(&ops::depthwise_conv2d(&x, self.kernel, depthwise));
        let [b, c, h, w] = [0, 1, 2, 3].map(|axis| x.dims()[axis]);
        let narrow = (self.n_in / 4).max(1);
        let squeezed = x.reshape(&[b, c, h * w]).mean(2);
        let squeezed = ops::activate(&ops::linear(&squeezed, &frozen(&[narrow, c])?, None));
        let weights = sigmoid(&ops::linear(&squeezed, &frozen(&[c, narrow])?, None));
        conv(&x.broadcast_times(&weights.reshape(&[b, c, 1, 1])), self.n_out, 1, pointwise)
    }
}

fn conv(x: &DryTensor, n_out: usize, kernel: usize, spec: Conv2dSpec) -> Result<DryTensor> {
    ops::conv2d(x, &frozen(&[n_out, x.dims()[1], kernel, kernel])?, None, spec)
}

fn frozen(shape: &[usize]) -> Result<Param> {
    Param::placeholder("", shape, DType::F32, false)
}
