//! AlexNet's convolutions in the form of Krizhevsky 2014, arXiv 1404.5997: pictures to features behind each of five
//! ReLUs.
//!
//! Ports torchvision's `alexnet().features`, as lpips 0.1.4 cuts it in `pretrained_networks.py`.

use candle_core::{Result, Tensor};

use crate::nn::{Conv2d, max_pool2d};
use crate::ops::Conv2dSpec;
use crate::weights::Weights;

/// Channels of the five convolutions.
pub(crate) const CHANNELS: [usize; 5] = [64, 192, 384, 256, 256];

/// Place in torchvision's list, kernel, stride, padding, and whether a max-pool comes before.
const LAYERS: [(usize, usize, usize, usize, bool); 5] =
    [(0, 11, 4, 2, false), (3, 5, 1, 2, true), (6, 3, 1, 1, true), (8, 3, 1, 1, false), (10, 3, 1, 1, false)];

/// The smallest side that leaves a pixel for every layer.
pub(crate) const SIDE_MIN: usize = 31;

/// The convolutions.
#[derive(Debug)]
pub(crate) struct AlexNet {
    convs: Vec<(Conv2d, bool)>,
}

impl AlexNet {
    /// From weights named `0`, `3`, `6`, `8` and `10`; every number of channels is divided by `divisor`.
    pub(crate) fn load(w: &Weights, divisor: usize) -> crate::Result<Self> {
        let mut n_in = 3;
        let convs = LAYERS.iter().zip(CHANNELS).map(|(&(place, kernel, stride, padding, pool), n_out)| {
            let (n_out, spec) = (n_out / divisor, Conv2dSpec::padded(stride, padding));
            let conv = Conv2d::load(&w.pp(place), n_in, n_out, kernel, spec)?;
            n_in = n_out;
            Ok((conv, pool))
        });
        Ok(Self { convs: convs.collect::<crate::Result<_>>()? })
    }

    /// Pictures `[B, 3, H, W]` of at least [`SIDE_MIN`] to five features `[B, C, h, w]`. Differentiable.
    pub(crate) fn features(&self, pictures: &Tensor) -> Result<Vec<Tensor>> {
        let mut features: Vec<Tensor> = Vec::with_capacity(self.convs.len());
        for (conv, pool) in &self.convs {
            let x = features.last().unwrap_or(pictures);
            let y = if *pool { conv.forward(&max_pool2d(x, 3, 2, 0)?)? } else { conv.forward(x)? };
            features.push(y.relu()?);
        }
        Ok(features)
    }
}
