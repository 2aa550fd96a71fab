//! Similarity of two pictures of one size, pixel by pixel: SSIM and PSNR. In f64, on bytes.

use image::RgbImage;

use crate::{Error, Result};

/// Pixels on each side of the middle of SSIM's window.
const RADIUS: usize = 5;
/// Standard deviation of its weights.
const SIGMA: f64 = 1.5;
const K1: f64 = 0.01;
const K2: f64 = 0.03;
/// Span of the values.
const RANGE: f64 = 255.0;

/// Structural similarity (Wang et al. 2004, eq. 13, and the mean of eq. 17), -1..1, 1 for equal pictures.
///
/// With the paper's settings: windows of 11 by 11 pixels weighted by a Gaussian of 1.5, those that lie inside the
/// picture; `K1` 0.01, `K2` 0.03, range 255, moments over n. The mean of the three channels. Equal to scikit-image's
/// `structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255,
/// channel_axis=-1)`. torchmetrics 1.9 gives another number: it mirrors the picture at its edges and counts the windows
/// there too.
///
/// [`Error::Input`] if the sizes differ or a side is below 11.
pub fn ssim(a: &RgbImage, b: &RgbImage) -> Result<f64> {
    let (w, h) = same_size("SSIM", a, b)?;
    if w.min(h) <= 2 * RADIUS {
        return Err(Error::input(format!("SSIM: pictures of {w} x {h}; wanted at least 11 pixels a side")));
    }
    let mut sum = 0.0;
    for channel in 0..3 {
        let plane = |photo: &RgbImage| {
            photo.as_raw().iter().skip(channel).step_by(3).map(|&v| f64::from(v)).collect()
        };
        let (a, b): (Vec<f64>, Vec<f64>) = (plane(a), plane(b));
        let times = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).collect::<Vec<f64>>();
        let blurred = |plane: &[f64]| blurred(plane, w, h);
        let (mean_a, mean_b) = (blurred(&a), blurred(&b));
        let (aa, bb, ab) = (blurred(&times(&a, &a)), blurred(&times(&b, &b)), blurred(&times(&a, &b)));
        let (c1, c2) = ((K1 * RANGE).powi(2), (K2 * RANGE).powi(2));
        let similarity = |i: usize| {
            let (x, y) = (mean_a[i], mean_b[i]);
            let (var_x, var_y, covariance) = (aa[i] - x * x, bb[i] - y * y, ab[i] - x * y);
            (2.0 * x * y + c1) * (2.0 * covariance + c2) / ((x * x + y * y + c1) * (var_x + var_y + c2))
        };
        sum += (0..mean_a.len()).map(similarity).sum::<f64>() / mean_a.len() as f64;
    }
    Ok(sum / 3.0)
}

/// Peak signal-to-noise ratio in decibels, `10 log10(255^2 / mean squared error)` over all three channels; infinite for
/// equal pictures. Equal to scikit-image's `peak_signal_noise_ratio(a, b, data_range=255)`.
///
/// [`Error::Input`] if the sizes differ.
pub fn psnr(a: &RgbImage, b: &RgbImage) -> Result<f64> {
    same_size("PSNR", a, b)?;
    let squares = a.as_raw().iter().zip(b.as_raw()).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
    let error = squares.sum::<f64>() / a.as_raw().len() as f64;
    Ok(10.0 * (RANGE * RANGE / error).log10())
}

fn same_size(of: &str, a: &RgbImage, b: &RgbImage) -> Result<(usize, usize)> {
    let ((w, h), (other_w, other_h)) = (a.dimensions(), b.dimensions());
    if (w, h) != (other_w, other_h) {
        return Err(Error::input(format!(
            "{of}: pictures of {w} x {h} and of {other_w} x {other_h}; wanted two of one size"
        )));
    }
    if w == 0 || h == 0 {
        return Err(Error::input(format!("{of}: the pictures have no pixels")));
    }
    Ok((w as usize, h as usize))
}

/// The weighted means of all windows inside a plane of `w x h`, row by row.
fn blurred(plane: &[f64], w: usize, h: usize) -> Vec<f64> {
    let weight = |i: usize| (-0.5 * ((i as f64 - RADIUS as f64) / SIGMA).powi(2)).exp();
    let weights: Vec<f64> = (0..=2 * RADIUS).map(weight).collect();
    let total: f64 = weights.iter().sum();
    let (inner_w, inner_h) = (w - 2 * RADIUS, h - 2 * RADIUS);
    let mean = |at: &dyn Fn(usize) -> f64| {
        weights.iter().enumerate().map(|(i, weight)| weight * at(i)).sum::<f64>() / total
    };
    let narrow: Vec<f64> =
        (0..h * inner_w).map(|i| mean(&|tap| plane[i / inner_w * w + i % inner_w + tap])).collect();
    (0..inner_h * inner_w).map(|i| mean(&|tap| narrow[i + tap * inner_w])).collect()
}
