//! Reads, resizes and encodes pictures: PNG to pixels and tensors, pixels to PNG, JPEG and WebP.
//!
//! Input is trusted: the service has decoded untrusted uploads and encoded them again. How a picture was drawn is put
//! into its file by [`super::provenance`].

use std::io::Write;
use std::path::Path;

use candle_core::{Device, Tensor};
use image::imageops::{self, FilterType};
use image::{ImageBuffer, Luma, RgbImage};

use super::tensorfile::write_atomically;
use super::{Error, Result};

/// Quality of JPEG and WebP, of 100.
const QUALITY: u8 = 90;
/// Longest text of a PNG, in bytes, that goes into a chunk which every reader knows.
const PLAIN_TEXT_MAX: usize = 1024;

/// The largest square in the middle of a photo, resized to `side` pixels as `crop_to_fill` does.
pub fn center_square(photo: &RgbImage, side: usize) -> RgbImage {
    crop_to_fill(photo, side as u32, side as u32)
}

/// The largest part in the middle of a photo with the proportions of `width` to `height`, resized to that size. One of
/// that size already is taken pixel for pixel.
///
/// The filter is the bicubic of Catmull and Rom, widened when it shrinks so that nothing aliases: sharper than a
/// triangle, and it rings less than Lanczos at the hard edges of a product before a plain ground.
pub(crate) fn crop_to_fill(photo: &RgbImage, width: u32, height: u32) -> RgbImage {
    let (w, h) = photo.dimensions();
    let scaled =
        |side: u32, by: u32, over: u32| (u64::from(side) * u64::from(by) / u64::from(over.max(1))) as u32;
    let cut_w = w.min(scaled(h, width, height)).max(1);
    let cut_h = h.min(scaled(w, height, width)).max(1);
    let cut = imageops::crop_imm(photo, (w - cut_w) / 2, (h - cut_h) / 2, cut_w, cut_h).to_image();
    if (cut_w, cut_h) == (width, height) {
        return cut;
    }
    imageops::resize(&cut, width, height, FilterType::CatmullRom)
}

/// A picture for a page: WebP, its longer side at most `side` pixels.
pub fn thumbnail(pixels: &RgbImage, side: u32) -> Result<Vec<u8>> {
    let (width, height) = pixels.dimensions();
    let longer = width.max(height);
    let size = |v: u32| ((u64::from(v) * u64::from(side) / u64::from(longer.max(1))) as u32).max(1);
    let small = (longer > side).then(|| crop_to_fill(pixels, size(width), size(height)));
    let shown = small.as_ref().unwrap_or(pixels);
    webp(shown.as_raw(), (shown.width() as usize, shown.height() as usize))
}

/// A picture made smaller, if need be, so that neither side is longer than `side`.
pub fn shrink_to(picture: &RgbImage, side: u32) -> RgbImage {
    let (width, height) = picture.dimensions();
    let longer = width.max(height);
    if longer <= side {
        return picture.clone();
    }
    let fit = |length: u32| (f64::from(length) * f64::from(side) / f64::from(longer)).round().max(1.0) as u32;
    imageops::resize(picture, fit(width), fit(height), FilterType::Triangle)
}

/// The pixels of a PNG file. [`Error::Input`] if the bytes are not a PNG file.
pub fn read_png(png: &[u8]) -> Result<RgbImage> {
    let decoded = image::load_from_memory_with_format(png, image::ImageFormat::Png);
    Ok(decoded.map_err(|error| Error::input(format!("cannot be decoded: {error}")))?.into_rgb8())
}

/// A picture of pixels as [`super::sample::draw`] gives them: `height x width x 3` bytes. [`Error::Input`] if there are
/// more or fewer.
pub fn from_pixels(pixels: Vec<u8>, (width, height): (usize, usize)) -> Result<RgbImage> {
    let n = pixels.len();
    let whole =
        ImageBuffer::from_raw(width as u32, height as u32, pixels).filter(|_| n == width * height * 3);
    whole.ok_or_else(|| Error::input(format!("picture: wanted {width} x {height} pixels, got {n} bytes")))
}

/// A picture in grey with a coarse map laid over it: from transparent at the map's minimum to red at its maximum.
pub fn overlay_heatmap(picture: &RgbImage, map: &[Vec<f32>]) -> RgbImage {
    let (least, most) =
        map.iter().flatten().fold((f32::MAX, f32::MIN), |(least, most), &v| (least.min(v), most.max(v)));
    let span = if most > least { most - least } else { 1.0 };
    let (h, w) = (map.len() as u32, map.first().map_or(0, Vec::len) as u32);
    let heat: ImageBuffer<Luma<f32>, Vec<f32>> =
        ImageBuffer::from_fn(w, h, |x, y| Luma([(map[y as usize][x as usize] - least) / span]));
    let heat = imageops::resize(&heat, picture.width(), picture.height(), FilterType::Triangle);
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let [r, g, b] = picture.get_pixel(x, y).0.map(f32::from);
        let grey = 0.299 * r + 0.587 * g + 0.114 * b;
        let m = 0.7 * heat.get_pixel(x, y).0[0].clamp(0.0, 1.0);
        image::Rgb([255.0, 60.0, 0.0].map(|over| (m * over + (1.0 - m) * grey).round() as u8))
    })
}

/// Pixels as a model sees them: `[1, 3, H, W]`, signed, on the CPU.
pub fn signed(pixels: &RgbImage) -> Result<Tensor> {
    let (width, height) = (pixels.width() as usize, pixels.height() as usize);
    let signed: Vec<f32> = pixels.as_raw().iter().map(|&v| f32::from(v) / 127.5 - 1.0).collect();
    let interleaved = Tensor::from_vec(signed, (1, height, width, 3), &Device::Cpu)?;
    Ok(interleaved.permute((0, 3, 1, 2))?.contiguous()?)
}

/// A PNG file of RGB pixels.
///
/// * `pixels`: `height x width x 3` bytes, row by row; so for the other formats
/// * `texts`: keywords (Latin-1, at most 79 characters) and their texts, which the file carries in tEXt chunks where
///   they are short and ASCII, in iTXt chunks otherwise
pub fn png(pixels: &[u8], size: (usize, usize), texts: &[(&str, String)]) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let written = write_png(&mut file, pixels, size, texts);
    written.map_err(|error| Error::input(format!("PNG: cannot be encoded: {error}")))?;
    Ok(file)
}

/// A JPEG file of RGB pixels, quality 90.
pub fn jpeg(pixels: &[u8], (width, height): (usize, usize)) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut file, QUALITY);
    let written = encoder.encode(pixels, width as u32, height as u32, image::ExtendedColorType::Rgb8);
    written.map_err(|error| Error::input(format!("JPEG: cannot be encoded: {error}")))?;
    Ok(file)
}

/// A WebP file of RGB pixels, lossy, quality 90.
pub fn webp(pixels: &[u8], (width, height): (usize, usize)) -> Result<Vec<u8>> {
    let encoder = webp::Encoder::from_rgb(pixels, width as u32, height as u32);
    let file = encoder.encode_simple(false, f32::from(QUALITY));
    Ok(file.map_err(|error| Error::input(format!("WebP: cannot be encoded: {error:?}")))?.to_vec())
}

/// Writes RGB pixels as a PNG, whole or not at all; see [`png()`].
pub fn save_png(path: &Path, pixels: &[u8], size: (usize, usize), texts: &[(&str, String)]) -> Result<()> {
    write_atomically(path, |out| match write_png(out, pixels, size, texts) {
        Err(png::EncodingError::IoError(error)) => Err(Error::io(path, "cannot be written", error)),
        written => {
            written.map_err(|error| Error::file_from(path, format!("cannot be written: {error}"), error))
        }
    })
}

fn write_png(
    mut out: impl Write,
    pixels: &[u8],
    (width, height): (usize, usize),
    texts: &[(&str, String)],
) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(&mut out, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in texts {
        // tEXt is Latin-1 by the standard and UTF-8 to ComfyUI; ASCII is both.
        if text.is_ascii() && text.len() <= PLAIN_TEXT_MAX {
            encoder.add_text_chunk((*keyword).to_string(), text.clone())?;
        } else {
            encoder.add_itxt_chunk((*keyword).to_string(), text.clone())?;
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(out.flush()?)
}
