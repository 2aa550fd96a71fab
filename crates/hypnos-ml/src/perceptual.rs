//! The perceptual loss of HYPNOS (arXiv 2410.14265, eq. 5): how far two pictures are from each other in the features of
//! a classifier, EfficientNet-B1.

use candle_core::{Device, Tensor};
use serde::Deserialize;

use super::models::efficientnet::{Config as NetConfig, EfficientNet, WeightNames};
use super::weights::Weights;
use super::{Error, Result};

mod dry;

/// `perceptual/config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// The classifier.
    #[serde(flatten)]
    pub(crate) net: NetConfig,
    /// What it takes off each channel of a unit picture.
    #[serde(default = "imagenet_mean")]
    pub(crate) image_mean: [f64; 3],
    /// What it then divides by.
    #[serde(default = "imagenet_std")]
    pub(crate) image_std: [f64; 3],
    /// Whether it looks at pictures of half the size.
    ///
    /// Assumption: it does. It was made for 240 pixels, not for 512, and noise of single pixels is not what it is asked
    /// for.
    #[serde(default = "yes")]
    pub(crate) halve: bool,
}

fn imagenet_mean() -> [f64; 3] {
    [0.485, 0.456, 0.406]
}

fn imagenet_std() -> [f64; 3] {
    [0.229, 0.224, 0.225]
}

fn yes() -> bool {
    true
}

impl Config {
    /// Refuses what is no network.
    pub(crate) fn check(&self) -> Result<()> {
        self.net.check()?;
        if self.image_std.iter().all(|std| *std > 0.0) {
            return Ok(());
        }
        Err(Error::file(
            "config.json",
            format!("image_std is {:?}, wanted numbers above zero", self.image_std),
        ))
    }
}

/// A frozen classifier and how pictures come to it.
#[derive(Debug)]
pub struct Perceptual {
    net: EfficientNet,
    mean: Tensor,
    std: Tensor,
    halve: bool,
}

impl Perceptual {
    /// From weights named as timm names them.
    pub fn load(w: &Weights, config: &Config, device: &Device) -> Result<Self> {
        config.check()?;
        let channels = |values: [f64; 3]| {
            Tensor::new(values.map(|v| v as f32).as_slice(), device)?.reshape((1, 3, 1, 1))
        };
        Ok(Self {
            net: EfficientNet::load(w, &config.net, WeightNames::Timm)?,
            mean: channels(config.image_mean)?,
            std: channels(config.image_std)?,
            halve: config.halve,
        })
    }

    /// Features at strides 2, 4, 8, 16 and 32 of pictures `[B, 3, H, W]`, about signed; H and W even where it halves.
    /// Differentiable.
    pub fn features(&self, pictures: &Tensor) -> Result<Vec<Tensor>> {
        let mut x = ((pictures + 1.0)? * 0.5)?;
        if self.halve {
            let (b, c, h, w) = x.dims4()?;
            x = x.reshape((b, c, h / 2, 2, w / 2, 2))?.mean(5)?.mean(3)?;
        }
        let x = x.broadcast_sub(&self.mean)?.broadcast_div(&self.std)?;
        Ok(self.net.features(&x)?)
    }
}

/// The sum over strides of `weight * mean (a - b)^2`. A scalar; differentiable.
///
/// The paper gives an L2 loss over several activations with larger weights on shallow ones.
/// Assumption: each activation's mean, so that its weight does not depend on its size.
pub fn perceptual_loss(a: &[Tensor], b: &[Tensor], weights: &[f64]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for ((a, b), &weight) in a.iter().zip(b).zip(weights).filter(|(_, weight)| **weight > 0.0) {
        let term = ((a - b)?.sqr()?.mean_all()? * weight)?;
        sum = Some(match sum {
            Some(before) => (before + term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| Error::input("perceptual loss: every stride has the weight 0; wanted one above it"))
}
