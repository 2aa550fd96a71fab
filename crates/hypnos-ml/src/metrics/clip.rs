//! CLIP (Radford et al. 2021, arXiv 2103.00020): whether two pictures, or a picture and a text, mean the same.
//!
//! The network is transformers' `CLIPModel`, and the preprocessing that of its `CLIPImageProcessor` (5.23.0, on
//! tensors): shorter side to the network's size by torch's bicubic, the middle, OpenAI's statistics.

use candle_core::Device;
use image::RgbImage;
use serde::Deserialize;

use super::features::{BATCH, Features, look};
use super::preprocess::{Library, normalised, resize_and_center_crop};
use crate::models::clip::{self, PairConfig};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;
use crate::{Error, Result};

/// Means of the channels, of unit pictures.
const MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Their standard deviations.
const STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// `metrics/clip/config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Both encoders; the middle `image_size` pixels are looked at.
    #[serde(flatten)]
    pub net: PairConfig,
    /// The shorter side after the first resize; by default `image_size`.
    pub(crate) resize: Option<usize>,
}

impl Config {
    /// Refuses what is no network.
    pub(crate) fn check(&self) -> Result<()> {
        self.net.check()?;
        let (resize, crop) = (self.resize(), self.net.vision_config.image_size);
        if (crop..=8192).contains(&resize) {
            return Ok(());
        }
        Err(Error::file(
            "config.json",
            format!("resize is {resize}, wanted {crop}, which is image_size, to 8192"),
        ))
    }

    /// What the field calls it: `CLIP ViT-B/32`.
    pub(crate) fn name(&self) -> String {
        let vision = &self.net.vision_config;
        let size = match (vision.hidden_size, vision.num_hidden_layers) {
            (768, 12) => "B".into(),
            (1024, 24) => "L".into(),
            (width, layers) => format!("{layers}x{width}"),
        };
        format!("CLIP ViT-{size}/{}", vision.patch_size)
    }

    fn resize(&self) -> usize {
        self.resize.unwrap_or(self.net.vision_config.image_size)
    }
}

/// Both encoders, and how pictures and texts come to them.
#[derive(Debug)]
pub struct Clip {
    net: clip::Clip,
    tokenizer: Tokenizer,
    config: Config,
    device: Device,
}

impl Clip {
    /// From weights as [`clip::Clip::load`] names them. [`Error::Input`] too if the tokenizer is not the one it was
    /// learned with, by its size.
    pub fn load(w: &Weights, config: &Config, tokenizer: Tokenizer, device: &Device) -> Result<Self> {
        config.check()?;
        let text = &config.net.text_config;
        let (found, wanted) =
            ((tokenizer.vocab_size(), tokenizer.length()), (text.vocab_size, text.max_position_embeddings));
        if found != wanted {
            return Err(Error::input(format!(
                "metrics/clip: the bundle's tokenizer has {} tokens and texts of {}, but its text encoder \
                 reads {} and {}",
                found.0, found.1, wanted.0, wanted.1
            )));
        }
        let net = clip::Clip::load(w, &config.net)?;
        Ok(Self { net, tokenizer, config: config.clone(), device: device.clone() })
    }

    /// Where each picture of any size lies in the shared space, `projection_dim` numbers of length one.
    /// [`Error::Input`] if one is not finite.
    pub fn images(&self, pictures: &[RgbImage]) -> Result<Features> {
        let (resize, crop) = (self.config.resize(), self.config.net.vision_config.image_size);
        let prepare = |picture: &RgbImage| {
            normalised(&resize_and_center_crop(picture, resize, crop, Library::Torch), MEAN, STD)
        };
        let [features] =
            look("CLIP", pictures, &self.device, prepare, |batch| Ok([self.net.pictures(batch)?]))?;
        Ok(of_length_one(features))
    }

    /// The same of texts; what is beyond the encoder's 77 tokens is cut off.
    pub fn texts(&self, texts: &[&str]) -> Result<Features> {
        let mut values = Vec::with_capacity(texts.len());
        for (i, batch) in texts.chunks(BATCH).enumerate() {
            let ids: Vec<Vec<u32>> = batch.iter().map(|text| self.tokenizer.encode(text)).collect();
            let rows = self.net.texts(&ids, self.tokenizer.end())?;
            values.extend(Features::read("CLIP's texts", i * BATCH, &rows)?);
        }
        Ok(of_length_one(Features { values }))
    }
}

/// A row of zeros has no direction and stays as it is.
fn of_length_one(mut features: Features) -> Features {
    for row in &mut features.values {
        let length = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        if length > 0.0 {
            row.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
        }
    }
    features
}
