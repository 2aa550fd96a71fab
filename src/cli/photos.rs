//! Photos on this machine's disk.

use std::path::{Path, PathBuf};

use super::Stop;
use crate::photo::{self, Limits, Photo};

/// Shortest side of a photo here, where it may be meant for a small model.
const SIDE_MIN: u32 = 32;

/// The photos of a directory, by name.
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
