//! DINO (Caron et al. 2021, arXiv 2104.14294): whether two pictures show the same thing, not just things of one class.
//!
//! The network is that of DINO's own repository, with its norms' eps of 1e-6, and the preprocessing that of its
//! `eval_knn.py`: shorter side to 256 by Pillow's bicubic, the middle 224 pixels, ImageNet's statistics.

use candle_core::Device;
use image::RgbImage;
use serde::Deserialize;

use super::features::{Features, look};
use super::preprocess::{IMAGENET_MEAN, IMAGENET_STD, Library, normalised, resize_and_center_crop};
use crate::models::vit::{self, Vit};
use crate::weights::Weights;
use crate::{Error, Result};

/// `metrics/dino/config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// The network; the middle `image_size` pixels are looked at.
    #[serde(flatten)]
    pub(crate) net: vit::Config,
    /// The shorter side after the first resize; by default eight sevenths of `image_size`.
    pub resize: Option<usize>,
}

impl Config {
    /// Refuses what is no network.
    pub(crate) fn check(&self) -> Result<()> {
        self.net.check()?;
        let (resize, crop) = (self.resize(), self.net.image_size);
        if (crop..=8192).contains(&resize) {
            return Ok(());
        }
        Err(Error::file(
            "config.json",
            format!("resize is {resize}, wanted {crop}, which is image_size, to 8192"),
        ))
    }

    /// What the field calls it: `DINO ViT-S/16`.
    pub(crate) fn name(&self) -> String {
        let vit::Config { hidden_size, num_hidden_layers, patch_size, .. } = self.net;
        let size = match (hidden_size, num_hidden_layers) {
            (192, 12) => "Ti".into(),
            (384, 12) => "S".into(),
            (768, 12) => "B".into(),
            (width, layers) => format!("{layers}x{width}"),
        };
        format!("DINO ViT-{size}/{patch_size}")
    }

    fn resize(&self) -> usize {
        self.resize.unwrap_or(self.net.image_size * 8 / 7)
    }
}

/// The network and how pictures come to it.
#[derive(Debug)]
pub struct Dino {
    net: Vit,
    config: Config,
    device: Device,
}

impl Dino {
    /// From weights as `Vit::load` names them.
    pub fn load(w: &Weights, config: &Config, device: &Device) -> Result<Self> {
        config.check()?;
        Ok(Self { net: Vit::load(w, &config.net)?, config: config.clone(), device: device.clone() })
    }

    /// The class token of each picture of any size, `hidden_size` numbers. [`Error::Input`] if one is not finite.
    pub fn features(&self, pictures: &[RgbImage]) -> Result<Features> {
        let (resize, crop) = (self.config.resize(), self.config.net.image_size);
        let prepare = |picture: &RgbImage| {
            normalised(
                &resize_and_center_crop(picture, resize, crop, Library::Pillow),
                IMAGENET_MEAN,
                IMAGENET_STD,
            )
        };
        let [features] =
            look("DINO", pictures, &self.device, prepare, |batch| Ok([self.net.forward(batch)?]))?;
        Ok(features)
    }
}
