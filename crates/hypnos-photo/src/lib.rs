//! Decodes untrusted uploads; the only decoder of uploaded bytes.
//!
//! The content decides what a file is, never its name or its content type. Sizes are checked before anything is
//! allocated for them. Only the pixels are kept, upright, in sRGB, on white, encoded anew as PNG: metadata, trailing
//! data and further pictures are dropped. No I/O here; a refusal is one line that a client may read.

mod inspect;
mod jpeg;

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::{CompressionType, FilterType, PngDecoder, PngEncoder};
use image::codecs::webp::WebPDecoder;
use image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, ImageFormat, RgbImage};
use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

pub use inspect::{Inspection, Warning, duplicates};

/// The accepted formats, as clients are told.
pub const ACCEPTED: &str = "PNG, JPEG or WebP";

/// Maximum scans of a progressive JPEG: encoders write about ten, and each costs a pass over the whole picture.
const N_SCANS_MAX: usize = 64;
/// Largest inflated size of a PNG's chunks besides its picture.
const PNG_EXTRAS_BYTES_MAX: u64 = 16 << 20;
/// Larger colour profiles are ignored.
const ICC_BYTES_MAX: usize = 4 << 20;

/// Limits of a photo's size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Shortest side, in pixels.
    pub side_min: u32,
    /// Longest side, in pixels.
    pub side_max: u32,
    /// Pixels in all.
    pub pixels_max: u64,
    /// Longest side over shortest.
    pub aspect_max: f64,
    /// Memory for the decoded picture, in bytes. The peak is about twice that: the picture is rotated and encoded anew.
    pub bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { side_min: 256, side_max: 8192, pixels_max: 40_000_000, aspect_max: 4.0, bytes_max: 256 << 20 }
    }
}

/// A decoded photo: upright, sRGB, opaque, with nothing else of its file.
#[derive(Clone, Debug)]
pub struct Photo {
    /// PNG: RGB, eight bits per channel, no metadata.
    pub png: Vec<u8>,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// What was measured without a model.
    pub inspection: Inspection,
}

/// Why a file was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// A stable code that clients may rely on; the slug of a problem type.
    pub code: &'static str,
    /// The HTTP status: 415 for another type of file, 503 if no decoder was free in time, 422 for the rest.
    pub status: u16,
    /// What was sent and what is expected, in one line.
    pub message: String,
}

impl Refusal {
    /// A refusal with status 422.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, status: 422, message: message.into() }
    }

    /// The refusal of a file that cannot be read to the end of its picture.
    pub fn damaged() -> Self {
        Self::new("image-damaged", "the file is cut short or damaged: not all of its picture can be read")
    }
}

/// Decodes one uploaded file. Blocks for as long as decoding takes; the service bounds it in time.
///
/// Refusals: `image-empty`, `image-type-unsupported` (415), `image-too-large`, `image-too-small`, `image-aspect`,
/// `animated-not-supported`, `image-color-unsupported`, `image-too-complex`, `image-damaged`. A panic of the decoder
/// counts as a damaged file.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Photo, Refusal> {
    catch_unwind(AssertUnwindSafe(|| decode_image(bytes, limits))).unwrap_or_else(|_| {
        metrics::counter!("hypnos_photo_panics_total").increment(1);
        Err(Refusal::damaged())
    })
}

fn decode_image(bytes: &[u8], limits: &Limits) -> Result<Photo, Refusal> {
    if bytes.is_empty() {
        return Err(Refusal::new("image-empty", format!("the file is empty; wanted {ACCEPTED}")));
    }
    let mut decoder = open(bytes, limits)?;
    let damaged = |_| Refusal::damaged();
    let (width, height) = decoder.dimensions();
    limits.check_size(width, height)?;
    limits.check_memory(decoder.total_bytes())?;

    let orientation = decoder.orientation().map_err(damaged)?;
    let icc = decoder.icc_profile().ok().flatten();
    let mut image = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    image.apply_orientation(orientation);
    let pixels = to_srgb(image, icc.as_deref());

    let (width, height) = pixels.dimensions();
    Ok(Photo { png: to_png(&pixels)?, width, height, inspection: Inspection::of(&pixels) })
}

/// The decoder for the format of `bytes`, its allocations bounded, with nothing decoded yet.
fn open<'a>(bytes: &'a [u8], limits: &Limits) -> Result<Box<dyn ImageDecoder + 'a>, Refusal> {
    let damaged = |_| Refusal::damaged();
    let mut decoder_limits = image::Limits::no_limits();
    decoder_limits.max_image_width = Some(limits.side_max);
    decoder_limits.max_image_height = Some(limits.side_max);
    decoder_limits.max_alloc = Some(limits.bytes_max);

    match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => {
            if let Some((width, height)) = png_size(bytes) {
                limits.check_size(width, height)?;
            }
            decoder_limits.max_alloc = Some(PNG_EXTRAS_BYTES_MAX);
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), decoder_limits).map_err(damaged)?;
            if decoder.is_apng().map_err(damaged)? {
                return Err(animation_refusal());
            }
            Ok(Box::new(decoder))
        }
        Ok(ImageFormat::Jpeg) => {
            let info = jpeg::read_info(bytes).ok_or_else(Refusal::damaged)?;
            limits.check_size(u32::from(info.width), u32::from(info.height))?;
            if info.n_components > 3 {
                let message =
                    "the JPEG is in CMYK, which has no right colours on a screen; wanted RGB or grey";
                return Err(Refusal::new("image-color-unsupported", message));
            }
            if info.n_scans > N_SCANS_MAX {
                let message = format!("the JPEG has {} scans; wanted at most {N_SCANS_MAX}", info.n_scans);
                return Err(Refusal::new("image-too-complex", message));
            }
            // The decoder keeps the coefficients of a progressive picture, two bytes each, besides its pixels.
            let per_sample = if info.progressive { 3 } else { 1 };
            let samples = u64::from(info.width) * u64::from(info.height) * u64::from(info.n_components);
            limits.check_memory(samples * per_sample)?;
            let mut decoder = JpegDecoder::new(Cursor::new(bytes)).map_err(damaged)?;
            decoder.set_limits(decoder_limits).map_err(damaged)?;
            if decoder.dimensions() != (u32::from(info.width), u32::from(info.height)) {
                return Err(Refusal::damaged());
            }
            Ok(Box::new(decoder))
        }
        Ok(ImageFormat::WebP) => {
            // The container has its length; the decoder would accept a truncated file.
            let claimed = bytes.get(4..8).and_then(|le| le.try_into().ok()).map(u32::from_le_bytes);
            if claimed.is_none_or(|size| size as usize + 8 > bytes.len()) {
                return Err(Refusal::damaged());
            }
            let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(damaged)?;
            if decoder.has_animation() {
                return Err(animation_refusal());
            }
            let (width, height) = decoder.dimensions();
            limits.check_size(width, height)?;
            decoder.set_limits(decoder_limits).map_err(damaged)?;
            Ok(Box::new(decoder))
        }
        _ => {
            let found = infer::get(bytes).map_or("an unknown type", |kind| kind.mime_type());
            let message = format!("the file is {found}; wanted {ACCEPTED}");
            Err(Refusal { status: 415, ..Refusal::new("image-type-unsupported", message) })
        }
    }
}

fn animation_refusal() -> Refusal {
    Refusal::new("animated-not-supported", "the file is an animation; wanted a single picture")
}

/// Width and height in the first chunk of a PNG, in pixels, unchecked; none if it is too short.
pub fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let side = |at| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    Some((side(16)?, side(20)?))
}

impl Limits {
    fn check_size(&self, width: u32, height: u32) -> Result<(), Refusal> {
        let (short, long) = (width.min(height), width.max(height));
        let n_pixels = u64::from(width) * u64::from(height);
        if long > self.side_max || n_pixels > self.pixels_max {
            let (side, mega) = (self.side_max, self.pixels_max / 1_000_000);
            let message = format!(
                "the picture is {width} x {height} pixels; wanted at most {side} a side and {mega} million in all"
            );
            return Err(Refusal::new("image-too-large", message));
        }
        if short < self.side_min {
            let message =
                format!("the picture is {width} x {height} pixels; wanted at least {} a side", self.side_min);
            return Err(Refusal::new("image-too-small", message));
        }
        if f64::from(long) > f64::from(short) * self.aspect_max {
            let message = format!(
                "the picture is {width} x {height} pixels; wanted one side at most {} times the other",
                self.aspect_max
            );
            return Err(Refusal::new("image-aspect", message));
        }
        Ok(())
    }

    fn check_memory(&self, bytes: u64) -> Result<(), Refusal> {
        if bytes <= self.bytes_max {
            return Ok(());
        }
        let message = format!(
            "the picture takes {} MiB in memory; wanted at most {}: fewer pixels, or 8 bits instead of 16",
            bytes >> 20,
            self.bytes_max >> 20
        );
        Err(Refusal::new("image-too-large", message))
    }
}

/// The picture in sRGB, eight bits, composited on white.
///
/// Assumption: a profile that cannot be read, or that is for another kind of pixels, counts as sRGB, as in browsers.
fn to_srgb(image: DynamicImage, icc: Option<&[u8]>) -> RgbImage {
    let profile = icc.filter(|icc| icc.len() <= ICC_BYTES_MAX);
    let profile = profile.and_then(|icc| ColorProfile::new_from_slice(icc).ok());
    let kind = (image.color().has_color(), image.color().has_alpha());
    match (profile, kind) {
        (Some(profile), (true, false)) if profile.color_space == DataColorSpace::Rgb => {
            let mut pixels = image.into_rgb8();
            convert_in_place(&profile, Layout::Rgb, &mut pixels);
            pixels
        }
        (Some(profile), (true, true)) if profile.color_space == DataColorSpace::Rgb => {
            let mut pixels = image.into_rgba8();
            convert_in_place(&profile, Layout::Rgba, &mut pixels);
            on_white(DynamicImage::ImageRgba8(pixels))
        }
        (Some(profile), (false, _)) if profile.color_space == DataColorSpace::Gray => {
            on_white(grey_to_srgb(&profile, image))
        }
        _ => on_white(image),
    }
}

/// Converts 8-bit pixels to sRGB in place, in chunks.
fn convert_in_place(profile: &ColorProfile, layout: Layout, pixels: &mut [u8]) {
    let srgb = ColorProfile::new_srgb();
    let Ok(transform) = profile.create_transform_8bit(layout, &srgb, layout, TransformOptions::default())
    else {
        return;
    };
    let n_channels = if layout == Layout::Rgb { 3 } else { 4 };
    let mut before = Vec::new();
    for run in pixels.chunks_mut(4096 * n_channels) {
        before.clear();
        before.extend_from_slice(run);
        if transform.transform(&before, run).is_err() {
            run.copy_from_slice(&before);
        }
    }
}

/// Converts grey pixels to sRGB with a table of all levels.
fn grey_to_srgb(profile: &ColorProfile, image: DynamicImage) -> DynamicImage {
    let levels: Vec<u8> = (0..=255).collect();
    let mut table = vec![0; 3 * 256];
    let srgb = ColorProfile::new_srgb();
    let done = profile
        .create_transform_8bit(Layout::Gray, &srgb, Layout::Rgb, TransformOptions::default())
        .and_then(|transform| transform.transform(&levels, &mut table));
    if done.is_err() {
        return image;
    }
    let mut pixels = image.into_rgba8();
    for pixel in pixels.pixels_mut() {
        let at = 3 * usize::from(pixel.0[0]);
        pixel.0[..3].copy_from_slice(&table[at..at + 3]);
    }
    DynamicImage::ImageRgba8(pixels)
}

fn on_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let pixels = image.into_rgba8();
    let (width, height) = pixels.dimensions();
    let over = |pixel: &image::Rgba<u8>| {
        let alpha = u32::from(pixel.0[3]);
        let blend = |c: u8| ((u32::from(c) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
        [blend(pixel.0[0]), blend(pixel.0[1]), blend(pixel.0[2])]
    };
    let raw = pixels.pixels().flat_map(over).collect();
    RgbImage::from_raw(width, height, raw).expect("three bytes for each pixel")
}

fn to_png(pixels: &RgbImage) -> Result<Vec<u8>, Refusal> {
    // One allocation, of which only what is written takes memory: a vector that grows holds both its halves for a moment.
    let mut png = Vec::with_capacity(pixels.as_raw().len());
    // Choosing a filter for each row would take twice as long and save one per cent.
    PngEncoder::new_with_quality(&mut png, CompressionType::Fast, FilterType::Up)
        .write_image(pixels, pixels.width(), pixels.height(), ExtendedColorType::Rgb8)
        .map_err(|_| Refusal::damaged())?;
    Ok(png)
}
