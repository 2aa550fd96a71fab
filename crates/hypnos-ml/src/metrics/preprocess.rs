//! Preprocessing of pictures for the backbones: the resizes and crops of the libraries that the references use, bit by
//! bit where they work on bytes.
//!
//! A backbone's number depends on which of them it was made with more than on anything else that two programs do
//! differently (Parmar et al. 2022, arXiv 2104.11222).

use candle_core::{Device, Tensor};
use image::RgbImage;

use crate::{Error, Result};

/// Means of ImageNet's channels, of unit pictures.
pub(crate) const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
/// Their standard deviations.
pub(crate) const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];

/// Whose integers a resize of bytes computes with, and where a crop goes whose middle falls on half a pixel. The
/// filters are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// Pillow behind torchvision's transforms: weights of 22 bits (`Resample.c`); to the even pixel.
    Pillow,
    /// torch behind transformers' processors: weights of 16 bits, the point as far left as they allow
    /// (`UpSampleKernel.cpp`); to the lower pixel.
    Torch,
}

/// A photo with its shorter side brought to `resize` and the other in proportion, rounded down, and the square of
/// `crop` pixels in the middle of that, `crop` at most `resize`: torchvision's `Resize` and `CenterCrop`, transformers'
/// `shortest_edge` and `center_crop`.
///
/// The filter is the bicubic with a = -0.5, widened where it shrinks, along the rows first, rounded to bytes, then
/// along the columns. Only what the square shows is computed.
pub fn resize_and_center_crop(photo: &RgbImage, resize: usize, crop: usize, library: Library) -> RgbImage {
    let (w, h) = (photo.width() as usize, photo.height() as usize);
    let long = |short: usize, long: usize| (resize as f64 * long as f64 / short as f64) as usize;
    let (width, height) = if w <= h { (resize, long(w, h)) } else { (long(h, w), resize) };
    let columns = Taps::center(w, width, crop, library);
    let rows = Taps::center(h, height, crop, library);
    // 1. Every row to the columns of the square.
    let mut narrow = Vec::with_capacity(h * crop * 3);
    for row in photo.as_raw().chunks_exact(w * 3) {
        narrow.extend((0..crop).flat_map(|x| columns.pixel(x, |i| &row[i * 3..][..3])));
    }
    // 2. Those to its rows.
    let mut square = Vec::with_capacity(crop * crop * 3);
    for y in 0..crop {
        square.extend((0..crop).flat_map(|x| rows.pixel(y, |i| &narrow[(i * crop + x) * 3..][..3])));
    }
    RgbImage::from_raw(crop as u32, crop as u32, square).expect("three bytes a pixel")
}

/// The weights of a resize along one axis, as whole numbers.
struct Taps {
    /// For each output the first input, and the weights from there on.
    outputs: Vec<(usize, Vec<i32>)>,
    precision: u32,
}

impl Taps {
    /// For the `n` outputs in the middle of `n_out`, from `n_in` inputs.
    fn center(n_in: usize, n_out: usize, n: usize, library: Library) -> Self {
        let scale = n_in as f64 / n_out as f64;
        let wide = scale.max(1.0);
        let support = 2.0 * wide;
        let weights = |i: usize| {
            let center = (i as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(n_in);
            let weights: Vec<f64> = (first..end).map(|j| cubic((j as f64 - center + 0.5) / wide)).collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(move |w| if sum == 0.0 { w } else { w / sum }))
        };
        let half = n_out.saturating_sub(n) as f64 / 2.0;
        let (precision, start) = match library {
            Library::Pillow => (22, half.round_ties_even() as usize),
            Library::Torch => {
                let largest = (0..n_out).flat_map(|i| weights(i).1).fold(0.0, f64::max);
                let full = |bits: &u32| (0.5 + largest * f64::from(2 << bits)) as i32 >= 1 << 15;
                ((0..22).find(full).unwrap_or(22), half as usize)
            }
        };
        let whole = |w: f64| (w * f64::from(1 << precision) + 0.5_f64.copysign(w)) as i32;
        let outputs = (start..start + n).map(|i| {
            let (first, weights) = weights(i);
            (first, weights.map(whole).collect())
        });
        Self { outputs: outputs.collect(), precision }
    }

    fn pixel<'a>(&self, i: usize, at: impl Fn(usize) -> &'a [u8]) -> [u8; 3] {
        let (first, weights) = &self.outputs[i];
        let mut sums = [1_i32 << (self.precision - 1); 3];
        for (j, weight) in weights.iter().enumerate() {
            let pixel = at(first + j);
            sums.iter_mut().zip(pixel).for_each(|(sum, &v)| *sum += i32::from(v) * weight);
        }
        sums.map(|sum| (sum >> self.precision).clamp(0, 255) as u8)
    }
}

/// Keys 1981, with a = -0.5.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// A square photo as a network takes it: `[1, 3, S, S]`, `(unit - mean) / std` channel by channel, on the CPU.
pub(crate) fn normalised(photo: &RgbImage, mean: [f64; 3], std: [f64; 3]) -> Result<Tensor> {
    let (mean, std) = (mean.map(|v| v as f32), std.map(|v| v as f32));
    let values = photo.as_raw().iter().enumerate();
    let values = values.map(|(i, &v)| (f32::from(v) / 255.0 - mean[i % 3]) / std[i % 3]).collect();
    channels_first(values, (photo.width() as usize, photo.height() as usize))
}

/// A photo at `side` by `side`, signed, `[1, 3, side, side]`, on the CPU: torch's `interpolate` with `bilinear`,
/// `align_corners=False` and no antialiasing, in f32, its proportions not kept.
pub fn stretch(photo: &RgbImage, side: usize) -> Result<Tensor> {
    let (w, h) = (photo.width() as usize, photo.height() as usize);
    if w == 0 || h == 0 {
        return Err(Error::input("picture: has no pixels"));
    }
    let places = |n_in: usize| -> Vec<(usize, usize, f32)> {
        let scale = n_in as f32 / side as f32;
        let place = |i: usize| {
            let at = (scale * (i as f32 + 0.5) - 0.5).max(0.0);
            let low = (at as usize).min(n_in - 1);
            (low, (low + 1).min(n_in - 1), (at - low as f32).clamp(0.0, 1.0))
        };
        (0..side).map(place).collect()
    };
    let (columns, rows) = (places(w), places(h));
    let unit = |x: usize, y: usize, c: usize| f32::from(photo.as_raw()[(y * w + x) * 3 + c]) / 255.0;
    let mut values = Vec::with_capacity(side * side * 3);
    for &(top, bottom, down) in &rows {
        for &(left, right, along) in &columns {
            for c in 0..3 {
                let line = |y| unit(left, y, c) * (1.0 - along) + unit(right, y, c) * along;
                values.push(2.0 * (line(top) * (1.0 - down) + line(bottom) * down) - 1.0);
            }
        }
    }
    channels_first(values, (side, side))
}

/// `[1, 3, H, W]` from rows of pixels.
fn channels_first(values: Vec<f32>, (width, height): (usize, usize)) -> Result<Tensor> {
    let pixels = Tensor::from_vec(values, (1, height, width, 3), &Device::Cpu)?;
    Ok(pixels.permute((0, 3, 1, 2))?.contiguous()?)
}
