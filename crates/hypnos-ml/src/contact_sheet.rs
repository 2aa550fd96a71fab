//! A contact sheet: groups of pictures in rows, one group below the other.

use image::{Rgb, RgbImage, imageops};

use super::{Error, Result, image_io};

/// Between two pictures; between two groups twice that.
const GAP: u32 = 8;

/// Lays encoded pictures out, each brought to `side` pixels, `columns` in a row, on white. [`Error::Input`] if one
/// cannot be decoded.
pub fn contact_sheet(groups: &[Vec<Vec<u8>>], columns: usize, side: u32) -> Result<RgbImage> {
    let rows = |n: usize| n.div_ceil(columns) as u32;
    let height: u32 = groups.iter().map(|group| rows(group.len()) * (side + GAP) + GAP).sum();
    let mut sheet = RgbImage::from_pixel(columns as u32 * (side + GAP) + GAP, height, Rgb([255; 3]));
    let mut top = GAP;
    for group in groups {
        for (i, file) in group.iter().enumerate() {
            let read =
                image::load_from_memory(file).map_err(|error| Error::input(format!("a picture: {error}")))?;
            let tile = image_io::crop_to_fill(&read.to_rgb8(), side, side);
            let (x, y) = ((i % columns) as u32, (i / columns) as u32);
            let (left, down) = (GAP + x * (side + GAP), top + y * (side + GAP));
            imageops::replace(&mut sheet, &tile, left.into(), down.into());
        }
        top += rows(group.len()) * (side + GAP) + GAP;
    }
    Ok(sheet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_stand_below_one_another_and_what_is_no_picture_is_said() {
        let tile = |red| image_io::png(&[red, 0, 0].repeat(16 * 16), (16, 16), &[]).unwrap();
        let sheet = contact_sheet(&[vec![tile(1); 4], vec![tile(2); 7]], 4, 32).unwrap();
        assert_eq!(sheet.dimensions(), (4 * 40 + 8, 40 + 8 + 2 * 40 + 8));
        let at = |x: u32, y: u32| sheet.get_pixel(x, y)[0];
        assert_eq!([at(10, 10), at(10, 60), at(90, 100), at(140, 100), at(2, 2)], [1, 2, 2, 255, 255]);
        assert!(contact_sheet(&[vec![b"no".to_vec()]], 4, 32).is_err());
    }
}
