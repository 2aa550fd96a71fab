//! Photos on this machine's disk, read as an upload would be.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::{Stop, warn};
use crate::job::{N_PHOTOS_MAX, N_PHOTOS_MIN};
use crate::photo::{self, Limits, Photo};

/// Shortest side of a photo here, where it may be meant for a small model.
const SIDE_MIN: u32 = 32;

/// The photos of one product as PNG, by the names of their files: 3 to 5.
pub(super) fn of_product(dir: &Path) -> Result<Vec<Vec<u8>>, Stop> {
    Ok(pngs(dir, N_PHOTOS_MIN..=N_PHOTOS_MAX)?.into_iter().map(|(_, png)| png).collect())
}

/// Every picture of a directory as PNG, with its file, by their names; as many as `n` says.
pub(super) fn pngs(dir: &Path, n: RangeInclusive<usize>) -> Result<Vec<(PathBuf, Vec<u8>)>, Stop> {
    let files = of_directory(dir)?;
    if !n.contains(&files.len()) {
        let wanted = match (n.start(), n.end()) {
            (least, &usize::MAX) => format!("at least {least}"),
            (least, most) => format!("{least} to {most}"),
        };
        let (dir, accepted) = (dir.display(), photo::ACCEPTED);
        return Err(Stop::Input(format!("{dir}: wanted {wanted} photos ({accepted}), got {}", files.len())));
    }
    let decoded = files.into_iter().map(|file| Ok((decoded(&file)?, file)));
    let decoded = decoded.collect::<Result<Vec<_>, Stop>>()?;
    for (photo, file) in &decoded {
        for warning in &photo.inspection.warnings {
            warn(&format!("{}: is {warning}", file.display()));
        }
    }
    Ok(decoded.into_iter().map(|(photo, file)| (file, photo.png)).collect())
}

/// The files of a directory that should be photos, by their names.
pub(super) fn of_directory(dir: &Path) -> Result<Vec<PathBuf>, Stop> {
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

/// A photo as an upload would be kept.
pub(super) fn decoded(file: &Path) -> Result<Photo, Stop> {
    let bytes = std::fs::read(file).map_err(|error| unread(file, &error))?;
    let limits = Limits { side_min: SIDE_MIN, ..Limits::default() };
    photo::decode(&bytes, &limits).map_err(|refusal| Stop::Input(format!("{}: {refusal}", file.display())))
}

fn unread(path: &Path, error: &std::io::Error) -> Stop {
    Stop::Input(format!("{}: cannot be read: {error}", path.display()))
}
