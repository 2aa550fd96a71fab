//! PNG files that say how they were made.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::{Error, Result};

/// Writes RGB pixels as a PNG, whole or not at all.
///
/// * `pixels`: `height x width x 3` bytes, row by row
/// * `texts`: keywords (Latin-1, at most 79 characters) and their texts, which the file carries in iTXt chunks
pub fn save_png(
    path: &Path,
    pixels: &[u8],
    (width, height): (usize, usize),
    texts: &[(&str, String)],
) -> Result<()> {
    let failed =
        |error: &dyn std::fmt::Display| Error::bad(format!("{}: cannot be written: {error}", path.display()));
    let part = path.with_extension("png.part");
    let file = File::create(&part).map_err(|error| failed(&error))?;
    let written = encode(BufWriter::new(file), pixels, (width, height), texts);
    let written = written
        .map_err(|error| failed(&error))
        .and_then(|()| std::fs::rename(&part, path).map_err(|error| failed(&error)));
    if written.is_err() {
        let _ = std::fs::remove_file(&part); // it is of no use to anyone
    }
    written
}

fn encode(
    mut out: impl Write,
    pixels: &[u8],
    (width, height): (usize, usize),
    texts: &[(&str, String)],
) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(&mut out, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in texts {
        encoder.add_itxt_chunk((*keyword).to_string(), text.clone())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(out.flush()?)
}
