//! The contact sheet: photos above, pictures below.

use std::path::Path;

use image::{RgbImage, imageops};

use super::Drawn;
use crate::cli::Stop;
use crate::ml::picture;

const COLUMNS: usize = 4;
/// Side of a picture on the sheet, in pixels.
const SIDE: u32 = 256;
/// Between two pictures; between photos and pictures three times that.
const GAP: u32 = 8;

/// Writes the sheet as PNG.
pub(super) fn write(path: &Path, drawn: &Drawn) -> Result<(), Stop> {
    let tiles = |files: &[Vec<u8>]| files.iter().map(|file| tile(file)).collect::<Result<Vec<_>, _>>();
    let sheet = laid(&tiles(&drawn.photos)?, &tiles(&drawn.pictures)?);
    let size = (sheet.width() as usize, sheet.height() as usize);
    Ok(picture::save_png(path, sheet.as_raw(), size, &[])?)
}

fn tile(file: &[u8]) -> Result<RgbImage, Stop> {
    let read = image::load_from_memory(file).map_err(|error| Stop::Failed(format!("a picture: {error}")))?;
    Ok(picture::fitted(&read.to_rgb8(), SIDE, SIDE))
}

fn laid(photos: &[RgbImage], pictures: &[RgbImage]) -> RgbImage {
    let rows = |n: usize| n.div_ceil(COLUMNS) as u32;
    let height = |n: usize| rows(n) * (SIDE + GAP) + GAP;
    let below = height(photos.len()) + GAP;
    let width = COLUMNS as u32 * (SIDE + GAP) + GAP;
    let mut sheet = RgbImage::from_pixel(width, below + height(pictures.len()), image::Rgb([255; 3]));
    for (tiles, top) in [(photos, 0), (pictures, below)] {
        for (i, tile) in tiles.iter().enumerate() {
            let (x, y) = ((i % COLUMNS) as u32, (i / COLUMNS) as u32);
            let at = |n: u32| i64::from(GAP + n * (SIDE + GAP));
            imageops::replace(&mut sheet, tile, at(x), i64::from(top) + at(y));
        }
    }
    sheet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn photos_stand_above_pictures() {
        let tile = |colour| RgbImage::from_pixel(SIDE, SIDE, image::Rgb([colour, 0, 0]));
        let sheet = laid(&vec![tile(1); 4], &vec![tile(2); 7]);
        assert_eq!(sheet.dimensions(), (4 * 264 + 8, 3 * 264 + 24));
        let at = |x: u32, y: u32| sheet.get_pixel(x, y)[0];
        assert_eq!([at(10, 10), at(10, 300), at(10, 560), at(800, 560), at(1000, 560)], [1, 2, 2, 255, 255].map(|v| v));
    }
}
