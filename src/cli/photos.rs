//! Photos from the local disk, decoded like uploads.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::error::{CliError, unusable};
use super::output::print_warning;
use crate::job::{N_PHOTOS_MAX, N_PHOTOS_MIN};
use crate::photo::{self, Limits, Photo};

/// Minimum side of a photo, smaller than for uploads since it may be for a small model.
const SIDE_MIN: u32 = 32;

/// The 3 to 5 photos of one product as PNG, sorted by file name.
pub(super) fn of_product(dir: &Path) -> Result<Vec<Vec<u8>>, CliError> {
    Ok(pngs(dir, N_PHOTOS_MIN..=N_PHOTOS_MAX)?.into_iter().map(|(_, png)| png).collect())
}

/// All photos of a directory as PNG, with their paths, sorted by name; their number must be in `n`.
pub(super) fn pngs(dir: &Path, n: RangeInclusive<usize>) -> Result<Vec<(PathBuf, Vec<u8>)>, CliError> {
    let files = of_directory(dir)?;
    if !n.contains(&files.len()) {
        let wanted = match (n.start(), n.end()) {
            (least, &usize::MAX) => format!("at least {least}"),
            (least, most) => format!("{least} to {most}"),
        };
        let (dir, accepted) = (dir.display(), photo::ACCEPTED);
        return Err(CliError::Input(format!(
            "{dir}: wanted {wanted} photos ({accepted}), got {}",
            files.len()
        )));
    }
    let decoded = files.into_iter().map(|file| Ok((decoded(&file)?, file)));
    let decoded = decoded.collect::<Result<Vec<_>, CliError>>()?;
    for (photo, file) in &decoded {
        for warning in &photo.inspection.warnings {
            print_warning(&format!("{}: is {warning}", file.display()));
        }
    }
    Ok(decoded.into_iter().map(|(photo, file)| (file, photo.png)).collect())
}

/// The files of a directory that should be photos, sorted by name.
pub(super) fn of_directory(dir: &Path) -> Result<Vec<PathBuf>, CliError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|error| unread(dir, &error))? {
        let path = entry.map_err(|error| unread(dir, &error))?.path();
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        if extension.is_some_and(|e| ["png", "jpg", "jpeg", "webp"].contains(&e.as_str())) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Decodes a photo like an upload.
pub(super) fn decoded(file: &Path) -> Result<Photo, CliError> {
    let bytes = std::fs::read(file).map_err(|error| unread(file, &error))?;
    let limits = Limits { side_min: SIDE_MIN, ..Limits::default() };
    photo::decode(&bytes, &limits)
        .map_err(|refusal| CliError::Input(format!("{}: {refusal}", file.display())))
}

fn unread(path: &Path, error: &std::io::Error) -> CliError {
    CliError::Input(unusable(path, "cannot be read", error))
}
