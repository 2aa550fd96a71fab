//! Metrics: a backbone that turns pictures into features, with its own preprocessing, and a pure distance on features.
//!
//! | metric | features | distance | range, better |
//! |---|---|---|---|
//! | DINO | [`dino`] of generated and real pictures | [`mean_pairwise_cosine`] | -1..1, higher |
//! | PRES | [`dino`] of class pictures and real ones | [`mean_pairwise_cosine`] | -1..1, lower |
//! | CLIP-I | [`clip`] of generated and real pictures | [`mean_pairwise_cosine`] | -1..1, higher |
//! | CLIP-T | [`clip`] of pictures and of their prompts | [`mean_paired_cosine`] | -1..1, higher |
//! | FID | [`inception`] of generated and real pictures | [`frechet()`] | 0.., lower |
//! | LPIPS | [`lpips`], pair by pair | its own | 0.., lower |
//! | DIV | [`lpips`] among the pictures of one prompt | their mean | 0.., higher |
//! | SSIM, PSNR | none | [`ssim`], [`psnr`], pair by pair | -1..1 and 0.., higher |
//!
//! DINO, CLIP-I, CLIP-T, PRES and DIV are those of DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, sections 4.2 and 4.3).

pub mod clip;
pub mod dino;
pub mod inception;
pub mod lpips;
pub mod preprocess;

mod cosine;
mod frechet;
mod pixelwise;

use candle_core::{Device, Tensor};
use image::RgbImage;

use super::bundle::Bundle;
use super::{Error, Result};

pub use clip::Clip;
pub use cosine::{mean_paired_cosine, mean_pairwise_cosine, mean_self_cosine};
pub use dino::Dino;
pub use frechet::frechet;
pub use inception::{Inception, InceptionFeatures};
pub use lpips::Lpips;
pub use pixelwise::{psnr, ssim};

/// Pictures that go through a network together.
const BATCH: usize = 8;

/// What a backbone sees in pictures.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// One row a picture or text, all of one width.
    pub values: Vec<Vec<f32>>,
}

impl Features {
    /// Rows `[n, D]` of a network, the first being picture `first`. [`Error::Bad`] if one is not finite.
    fn read(of: &str, first: usize, rows: &Tensor) -> Result<Vec<Vec<f32>>> {
        let rows: Vec<Vec<f32>> = rows.to_device(&Device::Cpu)?.to_vec2()?;
        match rows.iter().position(|row| row.iter().any(|v| !v.is_finite())) {
            None => Ok(rows),
            Some(i) => Err(Error::bad(format!(
                "{of}: the features of number {} are not finite; wanted numbers, so the weights or the picture are broken",
                first + i + 1
            ))),
        }
    }

    /// Their width. [`Error::Bad`] unless there are at least `n` rows of one width, all finite.
    fn width(&self, of: &str, n: usize) -> Result<usize> {
        let found = self.values.len();
        if found < n {
            return Err(Error::bad(format!("{of}: wanted at least {n}, got {found}")));
        }
        let width = self.values.first().map_or(0, Vec::len);
        if let Some(row) = self.values.iter().find(|row| row.len() != width || row.is_empty()) {
            return Err(Error::bad(format!("{of}: features of {width} and of {} numbers", row.len())));
        }
        match self.values.iter().position(|row| row.iter().any(|v| !v.is_finite())) {
            None => Ok(width),
            Some(i) => Err(Error::bad(format!("{of}: the features of number {} are not finite", i + 1))),
        }
    }
}

/// The width of both. [`Error::Bad`] as [`Features::width`] says, and if they differ.
fn shared_width(of: &str, a: (&Features, usize), b: (&Features, usize)) -> Result<usize> {
    let (wide, other) = (a.0.width(of, a.1)?, b.0.width(of, b.1)?);
    if wide == other {
        return Ok(wide);
    }
    Err(Error::bad(format!(
        "{of}: features of {wide} and of {other} numbers; both must come from one backbone"
    )))
}

/// Pictures through a network in batches: `prepare` makes `[1, 3, S, S]` of each, on the CPU, `run` gives rows `[B, D]`, one
/// tensor for each kind of features. One [`Features`] of each kind.
fn look<const N: usize>(
    of: &str,
    pictures: &[RgbImage],
    device: &Device,
    prepare: impl Fn(&RgbImage) -> Result<Tensor>,
    run: impl Fn(&Tensor) -> Result<[Tensor; N]>,
) -> Result<[Features; N]> {
    let mut found = [const { Vec::new() }; N];
    for (i, batch) in pictures.chunks(BATCH).enumerate() {
        let prepared = batch.iter().enumerate().map(|(j, picture)| match picture.dimensions() {
            (0, _) | (_, 0) => Err(Error::bad(format!("{of}: picture {} has no pixels", i * BATCH + j + 1))),
            _ => prepare(picture),
        });
        let prepared = Tensor::cat(&prepared.collect::<Result<Vec<_>>>()?, 0)?.to_device(device)?;
        for (found, rows) in found.iter_mut().zip(run(&prepared)?) {
            found.extend(Features::read(of, i * BATCH, &rows)?);
        }
    }
    Ok(found.map(|values| Features { values }))
}

/// A backbone of a bundle, and what a report says of it.
#[derive(Debug)]
pub struct Backbone<M> {
    /// The network with its preprocessing.
    pub model: M,
    /// What the field calls it, such as `DINO ViT-S/16`.
    pub name: String,
    /// SHA-256 of its weight file, in lower-case hexadecimal.
    pub sha256: String,
}

/// The backbones that a bundle has.
#[derive(Debug)]
pub struct Backbones {
    /// For DINO and PRES.
    pub dino: Option<Backbone<Dino>>,
    /// For CLIP-I and CLIP-T.
    pub clip: Option<Backbone<Clip>>,
    /// For FID.
    pub inception: Option<Backbone<Inception>>,
    /// For LPIPS and DIV.
    pub lpips: Option<Backbone<Lpips>>,
}

impl Backbones {
    /// Those in `metrics/{dino,clip,inception,lpips}/` of the bundle, each a `config.json` and weights; one that is not there
    /// is `None`. [`Error::Bad`] names the file that cannot be used.
    pub fn load(bundle: &Bundle, device: &Device) -> Result<Self> {
        Ok(Self {
            dino: bundle.backbone("dino", device, dino::Config::check, dino::Config::name, |w, config| {
                Dino::load(w, config, device)
            })?,
            clip: bundle.backbone("clip", device, clip::Config::check, clip::Config::name, |w, config| {
                Clip::load(w, config, bundle.tokenizer()?, device)
            })?,
            inception: bundle.backbone(
                "inception",
                device,
                inception::Config::check,
                inception::Config::name,
                |w, config| Inception::load(w, config, device),
            )?,
            lpips: bundle.backbone(
                "lpips",
                device,
                lpips::Config::check,
                lpips::Config::name,
                |w, config| Lpips::load(w, config, device),
            )?,
        })
    }
}
