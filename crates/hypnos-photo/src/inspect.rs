//! Measures photos without a model: brightness, contrast, sharpness, and a hash to find duplicates.

use std::fmt;

use image::RgbImage;
use image::imageops::{FilterType, resize, thumbnail};
use serde::{Deserialize, Serialize};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Longest side of the measured picture, so that sharpness means the same for every camera.
const SIDE: u32 = 512;
/// Side of the tiles; the sharpest one counts, since a plain background says nothing about focus.
const TILE: usize = 64;
/// Assumption: thresholds set by eye, for warnings only.
const DARK: f64 = 0.12;
const UNIFORM: f64 = 0.02;
const BLURRY: f64 = 20.0;
/// Duplicates differ in at most this many of 256 bits, and in brightness by less than that.
const BITS_APART: u32 = 12;
const BRIGHTNESS_APART: f64 = 0.04;

/// A warning about a photo that is still accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Warning {
    /// Almost black.
    Dark,
    /// One colour: nothing can be seen.
    Uniform,
    /// Nothing in it is sharp.
    Blurry,
}

impl Warning {
    /// The string of the value, as in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dark => "dark",
            Self::Uniform => "uniform",
            Self::Blurry => "blurry",
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

// Not derived: the derive leaves out what the values mean.
impl PartialSchema for Warning {
    fn schema() -> RefOr<Schema> {
        let description = "A warning about a photo that is still accepted.\n\
            - `dark`: Almost black.\n\
            - `uniform`: One colour: nothing can be seen.\n\
            - `blurry`: Nothing in it is sharp.";
        ObjectBuilder::new()
            .schema_type(Type::String)
            .enum_values(Some([Self::Dark, Self::Uniform, Self::Blurry].map(Self::as_str)))
            .description(Some(description))
            .into()
    }
}

impl ToSchema for Warning {}

/// What was measured of a photo.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Inspection {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Mean luminance, 0 black to 1 white.
    pub brightness: f64,
    /// Standard deviation of the luminance, 0 to 0.5.
    pub contrast: f64,
    /// Variance of the Laplacian in the sharpest part; below 20 nothing is in focus.
    pub sharpness: f64,
    /// Warnings.
    pub warnings: Vec<Warning>,
    /// 256 bits in hexadecimal, nearly the same for nearly the same picture.
    pub hash: String,
}

impl Inspection {
    pub(crate) fn of(pixels: &RgbImage) -> Self {
        let (width, height) = pixels.dimensions();
        let longest = width.max(height);
        let fit = |side: u32| (u64::from(side) * u64::from(SIDE) / u64::from(longest)).max(1) as u32;
        let shrunk = (longest > SIDE).then(|| thumbnail(pixels, fit(width), fit(height)));
        let small = shrunk.as_ref().unwrap_or(pixels);
        let luma = |picture: &RgbImage| picture.pixels().copied().map(luminance).collect::<Vec<_>>();
        let seen = luma(small);
        let (mean, deviation) = moments(&seen);
        let (brightness, contrast) = (mean / 255.0, deviation / 255.0);
        let sharpness = sharpness(&seen, small.width() as usize, small.height() as usize);

        let mut warnings = Vec::new();
        if brightness < DARK {
            warnings.push(Warning::Dark);
        }
        if contrast < UNIFORM {
            warnings.push(Warning::Uniform);
        }
        if sharpness < BLURRY {
            warnings.push(Warning::Blurry);
        }
        let hash = hash(&luma(&resize(small, 17, 16, FilterType::Triangle)));
        Self { width, height, brightness, contrast, sharpness, warnings, hash }
    }
}

/// Pairs of indices of photos that show the same picture, however resized or compressed. For warnings only: two colours
/// of one product may look alike too.
pub fn duplicates(inspections: &[Inspection]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for (j, b) in inspections.iter().enumerate() {
        for (i, a) in inspections[..j].iter().enumerate() {
            let near = (a.brightness - b.brightness).abs() < BRIGHTNESS_APART;
            if near && bits_apart(&a.hash, &b.hash) <= BITS_APART {
                pairs.push((i, j));
            }
        }
    }
    pairs
}

fn luminance(pixel: image::Rgb<u8>) -> f64 {
    let [r, g, b] = pixel.0.map(f64::from);
    0.2126 * r + 0.7152 * g + 0.0722 * b
}

/// Mean and standard deviation.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

/// The largest variance of the Laplacian over the tiles.
fn sharpness(luma: &[f64], width: usize, height: usize) -> f64 {
    let at = |x: usize, y: usize| luma[y * width + x];
    let mut sharpest = 0.0_f64;
    for top in (1..height.saturating_sub(1)).step_by(TILE) {
        for left in (1..width.saturating_sub(1)).step_by(TILE) {
            let mut edges = Vec::with_capacity(TILE * TILE);
            for y in top..(top + TILE).min(height - 1) {
                for x in left..(left + TILE).min(width - 1) {
                    let around = at(x - 1, y) + at(x + 1, y) + at(x, y - 1) + at(x, y + 1);
                    edges.push(around - 4.0 * at(x, y));
                }
            }
            sharpest = sharpest.max(moments(&edges).1.powi(2));
        }
    }
    sharpest
}

/// One bit for each of 16 x 16 pixels: whether the next one to the right is clearly brighter. Takes 17 x 16 luminances.
fn hash(luma: &[f64]) -> String {
    let bits = luma.chunks(17).flat_map(|row| row.windows(2).map(|pair| pair[1] > pair[0] + 2.0));
    let bits: Vec<_> = bits.collect();
    let nibble = |four: &[bool]| four.iter().fold(0, |value, &bit| value * 2 + u32::from(bit));
    bits.chunks(4).map(|four| char::from_digit(nibble(four), 16).expect("four bits")).collect()
}

fn bits_apart(a: &str, b: &str) -> u32 {
    let digit = |c: char| c.to_digit(16).unwrap_or(0);
    a.chars().zip(b.chars()).map(|(a, b)| (digit(a) ^ digit(b)).count_ones()).sum()
}
