//! Segmentation: photos to masks of the product, and whether a mask is usable.
//!
//! The picture comes to TRACER as in CarveKit's `TracerUniversalB7` (4.1.2): resized without keeping its proportions,
//! by a triangle filter that widens when it shrinks, and normalised as ImageNet's. Departure: the mask goes back to the
//! photo's size as numbers, not as bytes.

use candle_core::{Device, Tensor};
use image::imageops::{self, FilterType};
use image::{ImageBuffer, Luma, Rgb32FImage, RgbImage};
use serde::Serialize;

use super::models::tracer::Tracer;
use super::{Error, Result};

const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// From here on a pixel is foreground.
const FOREGROUND: f32 = 0.5;

// Assumption: the thresholds below, set by looking at masks.

/// Parts smaller than this share of the largest one are specks and go.
const SPECK: f64 = 0.05;
/// Parts from this share of the largest one on are things of their own.
const THING: f64 = 0.2;
/// Holes smaller than this share of the foreground are filled; the inside of a handle is larger.
const HOLE: f64 = 0.005;
/// Share of the photo that a product covers at least, and at most.
const AREA: std::ops::RangeInclusive<f64> = 0.01..=0.95;
/// Below this share a product is small.
const SMALL: f64 = 0.05;
/// Share of a side from which on the product touches it.
const TOUCH: f64 = 0.02;
/// Mean of `|2 p - 1|` below which the outline is a guess.
const CERTAIN: f64 = 0.8;

/// How much of each pixel is foreground.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    width: usize,
    height: usize,
    values: Vec<f32>,
}

/// Statistics of a mask, by which it is accepted or refused.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MaskStats {
    /// Share of the photo that is foreground.
    pub area: f64,
    /// Sides of the photo that the product touches.
    pub touches: Vec<&'static str>,
    /// Separate objects that were found.
    pub things: usize,
    /// Mean of `|2 p - 1|`: 1 where every pixel is certain.
    pub confidence: f64,
}

/// Where the product is in a photo.
pub fn segment(tracer: &Tracer, photo: &RgbImage, device: &Device) -> Result<Mask> {
    let side = tracer.input_size();
    let map = tracer.forward(&prepared(photo, side)?.to_device(device)?)?;
    let map = ImageBuffer::from_raw(side as u32, side as u32, map.flatten_all()?.to_vec1::<f32>()?);
    let map: ImageBuffer<Luma<f32>, Vec<f32>> =
        map.ok_or_else(|| Error::input("segmenter: its map has another size"))?;
    let (width, height) = photo.dimensions();
    let values = imageops::resize(&map, width, height, FilterType::Triangle).into_raw();
    Ok(Mask { width: width as usize, height: height as usize, values })
}

/// The photo as TRACER takes it: `[1, 3, side, side]`, normalised, on the CPU.
pub fn prepared(photo: &RgbImage, side: usize) -> Result<Tensor> {
    let unit = photo.as_raw().iter().map(|&v| f32::from(v) / 255.0).collect();
    let unit: Option<Rgb32FImage> = ImageBuffer::from_raw(photo.width(), photo.height(), unit);
    let unit = unit.ok_or_else(|| Error::input("photo: has no pixels"))?;
    let small = imageops::resize(&unit, side as u32, side as u32, FilterType::Triangle);
    let values: Vec<f32> =
        small.as_raw().iter().enumerate().map(|(i, v)| (v - MEAN[i % 3]) / STD[i % 3]).collect();
    Ok(Tensor::from_vec(values, (1, side, side, 3), &Device::Cpu)?.permute((0, 3, 1, 2))?.contiguous()?)
}

impl Mask {
    /// Row by row, in 0..1.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// White where the foreground is.
    pub fn picture(&self) -> RgbImage {
        let grey = |v: &f32| [(v.clamp(0.0, 1.0) * 255.0).round() as u8; 3];
        let pixels = self.values.iter().flat_map(grey).collect();
        ImageBuffer::from_raw(self.width as u32, self.height as u32, pixels).expect("three bytes a pixel")
    }

    /// The foreground of `photo` on middle grey.
    pub fn cut_out(&self, photo: &RgbImage) -> RgbImage {
        RgbImage::from_fn(photo.width(), photo.height(), |x, y| {
            let m = self.values[y as usize * self.width + x as usize].clamp(0.0, 1.0);
            image::Rgb(photo.get_pixel(x, y).0.map(|v| (m * f32::from(v) + (1.0 - m) * 128.0).round() as u8))
        })
    }

    /// The mask without specks and pinholes, its soft edge kept, and what was found in it.
    pub fn cleaned(mut self) -> (Self, MaskStats) {
        let confidence = self.values.iter().map(|v| f64::from((2.0 * v - 1.0).abs())).sum::<f64>()
            / self.values.len() as f64;
        // 1. Specks leave, with the soft edge around them.
        let parts = self.components(|v| v >= FOREGROUND);
        let largest = parts.iter().map(Vec::len).max().unwrap_or(0) as f64;
        let mut keep = vec![false; self.values.len()];
        for part in parts.iter().filter(|part| part.len() as f64 >= SPECK * largest) {
            part.iter().for_each(|&i| keep[i] = true);
        }
        let near = self.widened(&keep, 1 + self.width.max(self.height) / 64);
        self.values.iter_mut().zip(&keep).zip(&near).for_each(|((v, keep), near)| {
            if !keep && (!near || *v >= FOREGROUND) {
                *v = 0.0;
            }
        });
        // 2. Pinholes close.
        let n_foreground = keep.iter().filter(|keep| **keep).count();
        let at_edge = |i: usize| {
            let (x, y) = (i % self.width, i / self.width);
            x == 0 || y == 0 || x + 1 == self.width || y + 1 == self.height
        };
        let holes = self.components(|v| v < FOREGROUND);
        let small = |hole: &&Vec<usize>| {
            (hole.len() as f64) < HOLE * n_foreground as f64 && !hole.iter().any(|&i| at_edge(i))
        };
        for &i in holes.iter().filter(small).flatten() {
            self.values[i] = 1.0;
        }
        let stats = MaskStats {
            area: n_foreground as f64 / self.values.len() as f64,
            touches: self.touches(),
            things: parts.iter().filter(|part| part.len() as f64 >= THING * largest).count(),
            confidence,
        };
        (self, stats)
    }

    /// Sides of which the foreground covers more than a trace.
    fn touches(&self) -> Vec<&'static str> {
        let (w, h) = (self.width, self.height);
        let share = |indices: &mut dyn Iterator<Item = usize>, n: usize| {
            indices.filter(|&i| self.values[i] >= FOREGROUND).count() as f64 / n as f64
        };
        let sides = [
            ("left", share(&mut (0..h).map(|y| y * w), h)),
            ("right", share(&mut (0..h).map(|y| y * w + w - 1), h)),
            ("top", share(&mut (0..w), w)),
            ("bottom", share(&mut (0..w).map(|x| (h - 1) * w + x), w)),
        ];
        sides.into_iter().filter(|(_, share)| *share > TOUCH).map(|(side, _)| side).collect()
    }

    /// The connected parts, four neighbours to a pixel, of those that `belongs` is true of.
    fn components(&self, belongs: impl Fn(f32) -> bool) -> Vec<Vec<usize>> {
        let mut seen: Vec<bool> = self.values.iter().map(|&v| !belongs(v)).collect();
        let mut parts = Vec::new();
        for start in 0..seen.len() {
            if seen[start] {
                continue;
            }
            seen[start] = true;
            let (mut part, mut next) = (vec![start], 0);
            while let Some(&i) = part.get(next) {
                next += 1;
                let (x, y) = (i % self.width, i / self.width);
                let neighbours = [
                    (x > 0).then(|| i - 1),
                    (x + 1 < self.width).then(|| i + 1),
                    (y > 0).then(|| i - self.width),
                    (y + 1 < self.height).then(|| i + self.width),
                ];
                for j in neighbours.into_iter().flatten() {
                    if !seen[j] {
                        seen[j] = true;
                        part.push(j);
                    }
                }
            }
            parts.push(part);
        }
        parts
    }

    /// What lies within `reach` pixels along each axis of what is set.
    fn widened(&self, set: &[bool], reach: usize) -> Vec<bool> {
        let along = |set: &[bool], step: usize, n: usize, place: &dyn Fn(usize) -> usize| {
            let mut wide = vec![false; set.len()];
            for (i, _) in set.iter().enumerate().filter(|(_, set)| **set) {
                let at = place(i);
                for k in at.saturating_sub(reach)..(at + reach + 1).min(n) {
                    wide[i + k * step - at * step] = true;
                }
            }
            wide
        };
        let rows = along(set, 1, self.width, &|i| i % self.width);
        along(&rows, self.width, self.height, &|i| i / self.width)
    }
}

impl MaskStats {
    /// Why the photo cannot be used, if it cannot.
    pub fn refusal(&self) -> Option<String> {
        let percent = self.area * 100.0;
        if self.area < *AREA.start() {
            return Some(format!(
                "no product was found in it (foreground: {percent:.1} %); show it larger, on a plain background"
            ));
        }
        if self.area > *AREA.end() {
            return Some(format!(
                "no background was found in it (foreground: {percent:.1} %); leave room around the product"
            ));
        }
        None
    }

    /// What is odd about it, in words.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.touches.is_empty() {
            let sides = self.touches.join(" and ");
            warnings.push(format!("the product touches the {sides} edge; what is cut off cannot be learned"));
        }
        if self.things > 1 {
            warnings.push(format!(
                "{} separate objects were found; all of them are taken for the product",
                self.things
            ));
        }
        if self.confidence < CERTAIN {
            warnings.push("the outline of the product is uncertain; look at its mask".into());
        }
        if self.area < SMALL {
            warnings.push(format!("the product is small ({:.1} % of the photo)", self.area * 100.0));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mask of 40 x 30 drawn by a rule.
    fn drawn(rule: impl Fn(i32, i32) -> f32) -> Mask {
        Mask { width: 40, height: 30, values: (0..1200).map(|i| rule(i % 40, i / 40)).collect() }
    }

    fn disc(cx: i32, cy: i32, radius: i32) -> impl Fn(i32, i32) -> bool {
        move |x, y| (x - cx).pow(2) + (y - cy).pow(2) <= radius * radius
    }

    #[test]
    fn a_plain_product_is_accepted_without_a_word() {
        let product = disc(20, 15, 8);
        let mask = drawn(|x, y| f32::from(product(x, y)));
        let (clean, stats) = mask.clone().cleaned();
        assert_eq!((clean, stats.things, &stats.touches[..]), (mask, 1, &[][..]));
        assert_eq!((stats.refusal(), stats.warnings()), (None, vec![]));
    }

    #[test]
    fn specks_leave_and_pinholes_close_but_a_handle_stays_open() {
        let (product, handle) = (disc(20, 15, 10), disc(24, 15, 3));
        let mask = drawn(|x, y| match (x, y) {
            (2, 2) => 1.0,
            (15, 15) => 0.0,
            _ if handle(x, y) => 0.0,
            _ => f32::from(product(x, y)),
        });
        let (clean, stats) = mask.cleaned();
        let at = |x: usize, y: usize| clean.values()[y * 40 + x];
        assert_eq!((at(2, 2), at(15, 15), at(24, 15), at(20, 8)), (0.0, 1.0, 0.0, 1.0));
        assert_eq!(stats.things, 1);
    }

    #[test]
    fn a_soft_edge_is_kept_around_the_product_and_nowhere_else() {
        let (product, halo) = (disc(20, 15, 8), disc(20, 15, 9));
        let mask = drawn(|x, y| {
            if product(x, y) {
                1.0
            } else if halo(x, y) || x > 36 {
                0.3
            } else {
                0.0
            }
        });
        let (clean, _) = mask.cleaned();
        assert_eq!((clean.values()[15 * 40 + 29], clean.values()[15 * 40 + 38]), (0.3, 0.0));
    }

    #[test]
    fn two_products_are_told_of() {
        let (one, other) = (disc(10, 15, 6), disc(30, 15, 5));
        let (_, stats) = drawn(|x, y| f32::from(one(x, y) || other(x, y))).cleaned();
        assert_eq!(stats.things, 2);
        assert!(stats.warnings()[0].starts_with("2 separate objects"), "{:?}", stats.warnings());
    }

    #[test]
    fn a_product_that_leaves_the_photo_is_told_of_by_side() {
        let product = disc(0, 15, 10);
        let (_, stats) = drawn(|x, y| f32::from(product(x, y))).cleaned();
        assert_eq!(stats.touches, ["left"]);
        assert!(stats.warnings()[0].contains("touches the left edge"));
    }

    #[test]
    fn an_empty_photo_and_a_full_one_are_refused() {
        let refusal = |v: f32| drawn(|_, _| v).cleaned().1.refusal().expect("a refusal");
        assert!(refusal(0.0).starts_with("no product was found"), "{}", refusal(0.0));
        assert!(refusal(1.0).starts_with("no background was found"), "{}", refusal(1.0));
    }

    #[test]
    fn an_uncertain_outline_is_told_of() {
        let product = disc(20, 15, 9);
        let (_, stats) = drawn(|x, y| if product(x, y) { 0.6 } else { 0.3 }).cleaned();
        assert!((stats.confidence - 0.35).abs() < 0.05, "{}", stats.confidence);
        assert!(stats.warnings().iter().any(|w| w.contains("uncertain")));
    }
}
