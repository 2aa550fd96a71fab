//! VGG-16's convolutions (Simonyan and Zisserman 2015, arXiv 1409.1556): pictures to features at the end of each of
//! five stages.
//!
//! Ports torchvision's `vgg16().features`, as lpips 0.1.4 cuts it in `pretrained_networks.py`.

use candle_core::{Result, Tensor};

use crate::nn::{Conv2d, max_pool2d};
use crate::ops::Conv2dSpec;
use crate::weights::Weights;

/// Channels of the five stages.
pub(crate) const CHANNELS: [usize; 5] = [64, 128, 256, 512, 512];

/// Places of each stage's convolutions in torchvision's list.
const STAGES: [&[usize]; 5] = [&[0, 2], &[5, 7], &[10, 12, 14], &[17, 19, 21], &[24, 26, 28]];

/// The smallest side that leaves a pixel for every stage.
pub(crate) const SIDE_MIN: usize = 16;

/// The convolutions.
#[derive(Debug)]
pub(crate) struct Vgg16 {
    stages: Vec<Vec<Conv2d>>,
}

impl Vgg16 {
    /// From weights named `0`, `2`, `5` to `28`; every number of channels is divided by `divisor`.
    pub(crate) fn load(w: &Weights, divisor: usize) -> crate::Result<Self> {
        let mut n_in = 3;
        let stages = STAGES.iter().zip(CHANNELS).map(|(places, n_out)| {
            let n_out = n_out / divisor;
            let convs = places.iter().map(|place| {
                let conv = Conv2d::load(&w.pp(place), n_in, n_out, 3, Conv2dSpec::padded(1, 1));
                n_in = n_out;
                conv
            });
            convs.collect()
        });
        Ok(Self { stages: stages.collect::<crate::Result<_>>()? })
    }

    /// Pictures `[B, 3, H, W]` of at least [`SIDE_MIN`] to five features `[B, C, h, w]`. Differentiable.
    pub(crate) fn features(&self, pictures: &Tensor) -> Result<Vec<Tensor>> {
        let mut features: Vec<Tensor> = Vec::with_capacity(self.stages.len());
        for convs in &self.stages {
            let mut x = match features.last() {
                Some(before) => max_pool2d(before, 2, 2, 0)?,
                None => pictures.clone(),
            };
            for conv in convs {
                x = conv.forward(&x)?.relu()?;
            }
            features.push(x);
        }
        Ok(features)
    }
}
