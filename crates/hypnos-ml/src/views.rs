//! Views of photos with known foregrounds (HYPNOS, arXiv 2410.14265, section 3.3): the product on one plain colour, or
//! the unchanged photo, and in some views smaller and moved.
//!
//! A view is a pure function of photos, settings, seed and its number. All are squares of one size, 8 bits a channel,
//! so that what is learned from is exactly what a person can look at.

use image::imageops::{self, FilterType};
use image::{ImageBuffer, Luma, Rgb, Rgb32FImage, RgbImage};
use serde::{Deserialize, Serialize};

use super::{Error, Result, random};

/// Backgrounds of one colour: what the prompt calls it, and what it is in sRGB.
///
/// Assumption: twelve colours that everyone has one word for.
pub(crate) const PALETTE: [(&str, [u8; 3]); 12] = [
    ("red", [200, 40, 40]),
    ("orange", [235, 130, 40]),
    ("yellow", [240, 210, 60]),
    ("green", [60, 150, 70]),
    ("teal", [40, 150, 150]),
    ("blue", [50, 90, 190]),
    ("purple", [120, 60, 160]),
    ("pink", [240, 150, 180]),
    ("brown", [120, 80, 50]),
    ("black", [20, 20, 20]),
    ("white", [245, 245, 245]),
    ("grey", [128, 128, 128]),
];

/// From here on a pixel of a mask is foreground.
const FOREGROUND: f32 = 0.5;

/// Share of the side by which a foreground is thought larger before it is filled over: its shadow and its halo go too.
const HALO: f64 = 1.0 / 40.0;

type Mask = ImageBuffer<Luma<f32>, Vec<f32>>;

/// How views are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ViewSettings {
    /// Views in all; each step takes one.
    pub n: usize,
    /// Share of views with the product on one plain colour.
    pub monotone: f64,
    /// Share of views whose foreground is smaller and moved.
    pub resized: f64,
    /// The smallest scale of the foreground.
    pub scale_min: f64,
    /// Room left around the foreground, as a share of its longer side.
    pub margin: f64,
    /// The word for the backgrounds of the photos: `[W]`, a single token.
    pub background_token: String,
}

/// A photo cut to a square around its foreground.
#[derive(Clone, Debug)]
pub struct Cut {
    photo: RgbImage,
    mask: Mask,
    /// The photo with its foreground filled over.
    empty: Rgb32FImage,
}

impl Cut {
    /// The square around the foreground of a photo, with `margin` as a share of its longer side on each of its sides,
    /// brought to `side` pixels. It is as large as the photo has room for and never cuts the foreground; where the
    /// photo ends within it, its edge pixels are repeated.
    ///
    /// * `mask`: row by row, one number in 0..1 for each pixel of the photo
    ///
    /// [`Error::Input`] if the mask has another size or no foreground.
    pub fn new(photo: &RgbImage, mask: &[f32], side: usize, margin: f64) -> Result<Self> {
        let (width, height) = (photo.width() as usize, photo.height() as usize);
        if mask.len() != width * height {
            return Err(Error::input(format!(
                "mask: has {} pixels, its photo {}",
                mask.len(),
                width * height
            )));
        }
        let [left, top, right, bottom] =
            bounds(mask, width).ok_or_else(|| Error::input("mask: shows no foreground"))?;
        let longer = (right - left).max(bottom - top);
        let wished = ((longer as f64 * (1.0 + 2.0 * margin)).round() as usize).min(width.min(height));
        let cut = wished.max(longer) as i64;
        // Centred on the foreground, moved into the photo where it fits.
        let begin = |from: usize, to: usize, size: usize| {
            let centred = (from + to) as i64 / 2 - cut / 2;
            if cut <= size as i64 { centred.clamp(0, size as i64 - cut) } else { (size as i64 - cut) / 2 }
        };
        let (x0, y0) = (begin(left, right, width), begin(top, bottom, height));
        let square = RgbImage::from_fn(cut as u32, cut as u32, |x, y| {
            let at =
                |i: u32, begin: i64, size: usize| (i64::from(i) + begin).clamp(0, size as i64 - 1) as u32;
            *photo.get_pixel(at(x, x0, width), at(y, y0, height))
        });
        let mask = Mask::from_fn(cut as u32, cut as u32, |x, y| {
            let (x, y) = (i64::from(x) + x0, i64::from(y) + y0);
            let inside = (0..width as i64).contains(&x) && (0..height as i64).contains(&y);
            Luma([if inside { mask[y as usize * width + x as usize] } else { 0.0 }])
        });
        let side = side as u32;
        let square = imageops::resize(&square, side, side, FilterType::CatmullRom);
        let mask = imageops::resize(&mask, side, side, FilterType::Triangle);
        let empty = filled(&to_unit(&square), &mask);
        Ok(Self { photo: square, mask, empty })
    }
}

/// A view, and its negatives for the discriminator.
#[derive(Clone, Debug)]
pub struct View {
    /// The picture.
    pub pixels: RgbImage,
    /// Its colour, if its background has but one.
    pub colour: Option<&'static str>,
    /// The same background with nothing before it.
    pub removed: RgbImage,
    /// The same with the colours of the foreground negated.
    pub negated: RgbImage,
}

/// View `i` of `cuts`: they take turns. `cuts` has one at least.
pub fn view(cuts: &[Cut], settings: &ViewSettings, seed: u64, i: usize) -> View {
    let cut = &cuts[i % cuts.len()];
    let drawn = random::uniform(random::derive(seed, "views"), i as u64, 6);
    let yes = |drawn: f32, share: f64| f64::from(drawn) < share;
    let colour = yes(drawn[0], settings.monotone).then(|| PALETTE[(drawn[1] * 12.0) as usize]);
    let resized = yes(drawn[2], settings.resized);

    let background = match colour {
        Some((_, rgb)) => {
            let rgb = Rgb(rgb.map(|v| f32::from(v) / 255.0));
            Rgb32FImage::from_pixel(cut.photo.width(), cut.photo.height(), rgb)
        }
        None => cut.empty.clone(),
    };
    let (mut foreground, mut mask) = (to_unit(&cut.photo), cut.mask.clone());
    if resized {
        let scale = 1.0 - f64::from(drawn[3]) * (1.0 - settings.scale_min);
        (foreground, mask) = moved(&foreground, &mask, scale, [drawn[4], drawn[5]]);
    }
    let pixels = if colour.is_none() && !resized {
        cut.photo.clone() // as it is, to the bit
    } else {
        to_pixels(&over(&foreground, &mask, &background))
    };
    let mut negative = foreground;
    negative.pixels_mut().for_each(|pixel| pixel.0 = pixel.0.map(|v| 1.0 - v));
    View {
        pixels,
        colour: colour.map(|(name, _)| name),
        negated: to_pixels(&over(&negative, &mask, &background)),
        removed: to_pixels(&background),
    }
}

/// Left, top, right and bottom of the foreground, the last two beyond it.
fn bounds(mask: &[f32], width: usize) -> Option<[usize; 4]> {
    let mut found: Option<[usize; 4]> = None;
    for (i, _) in mask.iter().enumerate().filter(|(_, v)| **v >= FOREGROUND) {
        let (x, y) = (i % width, i / width);
        let [left, top, right, bottom] = found.unwrap_or([x, y, x + 1, y + 1]);
        found = Some([left.min(x), top.min(y), right.max(x + 1), bottom.max(y + 1)]);
    }
    found
}

/// `mask * foreground + (1 - mask) * background`.
fn over(foreground: &Rgb32FImage, mask: &Mask, background: &Rgb32FImage) -> Rgb32FImage {
    let mut out = background.clone();
    for ((out, front), mask) in out.pixels_mut().zip(foreground.pixels()).zip(mask.pixels()) {
        let m = mask.0[0].clamp(0.0, 1.0);
        for (out, front) in out.0.iter_mut().zip(front.0) {
            *out = m * front + (1.0 - m) * *out;
        }
    }
    out
}

/// Foreground and mask made smaller and set down `at` shares of the room that this leaves.
fn moved(foreground: &Rgb32FImage, mask: &Mask, scale: f64, at: [f32; 2]) -> (Rgb32FImage, Mask) {
    let side = mask.width();
    let small = ((f64::from(side) * scale).round() as u32).clamp(1, side);
    let [x, y] = at.map(|share| i64::from((f64::from(share) * f64::from(side - small + 1)) as u32));
    let (mut front, mut place) = (Rgb32FImage::new(side, side), Mask::new(side, side));
    imageops::replace(&mut front, &imageops::resize(foreground, small, small, FilterType::CatmullRom), x, y);
    imageops::replace(&mut place, &imageops::resize(mask, small, small, FilterType::Triangle), x, y);
    (front, place)
}

/// The picture with its foreground filled over from what lies around it, ever more smoothly the further in.
fn filled(picture: &Rgb32FImage, mask: &Mask) -> Rgb32FImage {
    let reach = (f64::from(mask.width()) * HALO).ceil() as u32;
    let known = |x: u32, y: u32| {
        let around = |i: u32, end: u32| i.saturating_sub(reach)..(i + reach + 1).min(end);
        let mut near = around(y, mask.height()).flat_map(|y| around(x, mask.width()).map(move |x| (x, y)));
        near.all(|(x, y)| mask.get_pixel(x, y).0[0] < FOREGROUND / 5.0)
    };
    let weighted = ImageBuffer::from_fn(picture.width(), picture.height(), |x, y| {
        let [r, g, b] = picture.get_pixel(x, y).0;
        image::Rgba(if known(x, y) { [r, g, b, 1.0] } else { [0.0; 4] })
    });
    let whole = pulled(&weighted);
    Rgb32FImage::from_fn(whole.width(), whole.height(), |x, y| {
        let [r, g, b, _] = whole.get_pixel(x, y).0;
        Rgb([r, g, b])
    })
}

type Weighted = ImageBuffer<image::Rgba<f32>, Vec<f32>>;

/// Gives every pixel without weight the colour of a coarser picture, in which it has some (Gortler et al. 1996, "The
/// Lumigraph", section 3.5, with weights of 0 and 1). Pixels are premultiplied by their weights.
fn pulled(fine: &Weighted) -> Weighted {
    let (width, height) = fine.dimensions();
    if fine.pixels().all(|pixel| pixel.0[3] > 0.0) {
        return fine.clone();
    }
    if width == 1 && height == 1 {
        return Weighted::from_pixel(1, 1, image::Rgba([0.5, 0.5, 0.5, 1.0])); // nothing is known at all
    }
    let coarse = Weighted::from_fn(width.div_ceil(2), height.div_ceil(2), |x, y| {
        let mut sum = [0.0; 4];
        for (x, y) in [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(i, j)| (2 * x + i, 2 * y + j)) {
            if x < width && y < height {
                sum.iter_mut().zip(fine.get_pixel(x, y).0).for_each(|(sum, v)| *sum += v);
            }
        }
        let weight = if sum[3] > 0.0 { sum[3] } else { 1.0 };
        image::Rgba([sum[0] / weight, sum[1] / weight, sum[2] / weight, f32::from(sum[3] > 0.0)])
    });
    let smooth = imageops::resize(&pulled(&coarse), width, height, FilterType::Triangle);
    Weighted::from_fn(width, height, |x, y| {
        let own = fine.get_pixel(x, y);
        if own.0[3] > 0.0 { *own } else { *smooth.get_pixel(x, y) }
    })
}

fn to_unit(pixels: &RgbImage) -> Rgb32FImage {
    let values = pixels.as_raw().iter().map(|&v| f32::from(v) / 255.0).collect();
    ImageBuffer::from_raw(pixels.width(), pixels.height(), values).expect("as many values as before")
}

fn to_pixels(picture: &Rgb32FImage) -> RgbImage {
    let values = picture.as_raw().iter().map(|v| (v.clamp(0.0, 1.0) * 255.0).round() as u8).collect();
    ImageBuffer::from_raw(picture.width(), picture.height(), values).expect("as many values as before")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A photo of 80 x 60 with a yellow disc on a ground that is blue at the left and green at the right.
    fn disc(centre: (i64, i64), radius: i64) -> (RgbImage, Vec<f32>) {
        let inside = |x: u32, y: u32| {
            let (dx, dy) = (i64::from(x) - centre.0, i64::from(y) - centre.1);
            dx * dx + dy * dy <= radius * radius
        };
        let photo = RgbImage::from_fn(80, 60, |x, y| {
            if inside(x, y) { Rgb([230, 210, 20]) } else { Rgb([0, (x * 3) as u8, 240 - (x * 3) as u8]) }
        });
        let mask = (0..80 * 60).map(|i| f32::from(inside(i % 80, i / 80))).collect();
        (photo, mask)
    }

    fn settings(monotone: f64, resized: f64) -> ViewSettings {
        let background_token = "zwx".into();
        ViewSettings { n: 8, monotone, resized, scale_min: 0.6, margin: 0.2, background_token }
    }

    fn yellow(pixels: &RgbImage) -> usize {
        pixels.pixels().filter(|p| p.0[0] > 180 && p.0[2] < 90).count()
    }

    #[test]
    fn a_cut_has_the_whole_foreground_and_a_margin_and_stays_in_the_photo() {
        for (centre, radius) in [((40, 30), 10), ((12, 12), 10), ((68, 48), 10), ((40, 30), 25)] {
            let (photo, mask) = disc(centre, radius);
            let cut = Cut::new(&photo, &mask, 64, 0.2).expect("a cut");
            let share = cut.mask.pixels().filter(|m| m.0[0] > 0.5).count() as f64 / 4096.0;
            let side = (2.0 * radius as f64 + 1.0) * 1.4;
            let wanted = std::f64::consts::PI * (radius * radius) as f64 / side.min(60.0).powi(2);
            assert!((share / wanted - 1.0).abs() < 0.1, "{centre:?}: {share} of the cut, wanted {wanted}");
            let [left, top, right, bottom] = bounds(cut.mask.as_raw(), 64).expect("a foreground");
            assert!(left > 0 && top > 0 && right < 64 && bottom < 64, "{centre:?} is cut");
        }
    }

    #[test]
    fn a_foreground_wider_than_the_photo_is_high_is_not_cut_and_the_edge_goes_on() {
        let photo = RgbImage::from_fn(100, 20, |x, y| {
            if (10..90).contains(&x) && (5..15).contains(&y) { Rgb([200, 0, 0]) } else { Rgb([0, 0, 200]) }
        });
        let mask: Vec<f32> = photo.pixels().map(|p| f32::from(p.0[0] > 100)).collect();
        let cut = Cut::new(&photo, &mask, 80, 0.2).expect("a cut");
        let [left, _, right, _] = bounds(cut.mask.as_raw(), 80).expect("a foreground");
        assert!(left <= 1 && right >= 79, "{left}..{right}");
        assert_eq!(cut.photo.get_pixel(40, 2).0, [0, 0, 200], "the edge is repeated");
    }

    #[test]
    fn a_photo_as_it_is_stays_so_to_the_bit() {
        let (photo, mask) = disc((40, 30), 12);
        let cuts = [Cut::new(&photo, &mask, 64, 0.2).expect("a cut")];
        let view = view(&cuts, &settings(0.0, 0.0), 1, 3);
        assert_eq!((view.colour, &view.pixels), (None, &cuts[0].photo));
    }

    #[test]
    fn a_monotone_view_has_its_colour_around_the_product_and_nothing_else_when_it_is_removed() {
        let (photo, mask) = disc((40, 30), 12);
        let cuts = [Cut::new(&photo, &mask, 64, 0.2).expect("a cut")];
        let view = view(&cuts, &settings(1.0, 0.0), 1, 0);
        let (_, rgb) = PALETTE.into_iter().find(|(name, _)| Some(*name) == view.colour).expect("a colour");
        assert_eq!(view.pixels.get_pixel(0, 0).0, rgb);
        assert_eq!(view.pixels.get_pixel(32, 32).0, [230, 210, 20]);
        assert_eq!(view.negated.get_pixel(32, 32).0, [25, 45, 235]);
        assert!(view.removed.pixels().all(|p| p.0 == rgb));
    }

    #[test]
    fn a_removed_product_leaves_the_ground_that_was_around_it() {
        let (photo, mask) = disc((40, 30), 12);
        let cuts = [Cut::new(&photo, &mask, 64, 0.5).expect("a cut")];
        let view = view(&cuts, &settings(0.0, 0.0), 1, 0);
        assert_eq!(yellow(&view.removed), 0);
        let (left, right) = (view.removed.get_pixel(22, 32).0, view.removed.get_pixel(42, 32).0);
        assert!(
            left[2] > right[2] && left[1] < right[1],
            "{left:?} {right:?}: blue at the left, green at the right"
        );
    }

    #[test]
    fn a_resized_view_has_a_smaller_product_and_all_of_it() {
        let (photo, mask) = disc((40, 30), 12);
        let cuts = [Cut::new(&photo, &mask, 64, 0.2).expect("a cut")];
        let whole = yellow(&view(&cuts, &settings(0.0, 0.0), 1, 0).pixels) as f64;
        let mut places = std::collections::BTreeSet::new();
        for i in 0..12 {
            let view = view(&cuts, &settings(0.0, 1.0), 1, i);
            let share = yellow(&view.pixels) as f64 / whole;
            assert!((0.3..1.05).contains(&share), "view {i}: {share} of the product");
            let flags: Vec<f32> = view.pixels.pixels().map(|p| f32::from(p.0[0] > 180)).collect();
            places.insert(bounds(&flags, 64).expect("a product"));
        }
        assert!(places.len() > 8, "{places:?}");
    }

    #[test]
    fn views_take_turns_and_keep_to_their_shares_and_their_seed() {
        let cuts = [30, 40, 50].map(|x| {
            let (photo, mask) = disc((x, 30), 12);
            Cut::new(&photo, &mask, 32, 0.2).expect("a cut")
        });
        let settings = settings(0.66, 0.15);
        let views: Vec<View> = (0..300).map(|i| view(&cuts, &settings, 5, i)).collect();
        let monotone = views.iter().filter(|view| view.colour.is_some()).count();
        assert!((170..226).contains(&monotone), "{monotone} of 300");
        let shown = |view: &View| cuts.iter().position(|cut| cut.photo == view.pixels);
        let unchanged: Vec<_> = (0..).zip(&views).filter_map(|(i, view)| Some((i, shown(view)?))).collect();
        assert!(unchanged.len() > 60, "{} of 300", unchanged.len());
        assert!(unchanged.iter().all(|(i, photo)| i % 3 == *photo), "{unchanged:?}");
        assert_eq!(view(&cuts, &settings, 5, 17).pixels, views[17].pixels);
        let other = (0..300).filter(|&i| view(&cuts, &settings, 6, i).pixels != views[i].pixels).count();
        assert!(other > 150, "{other} of 300 differ by seed");
    }

    #[test]
    fn an_empty_mask_and_one_of_another_size_are_refused() {
        let (photo, mask) = disc((40, 30), 12);
        let words = |mask: &[f32]| Cut::new(&photo, mask, 32, 0.2).expect_err("a refusal").to_string();
        assert_eq!(words(&vec![0.0; 4800]), "mask: shows no foreground");
        assert_eq!(words(&mask[1..]), "mask: has 4799 pixels, its photo 4800");
    }
}
