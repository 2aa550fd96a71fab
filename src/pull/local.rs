//! Files that are on this machine already, under the names that their sources give them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use super::local_file::LocalFile;
use super::sources::{File, Place};
use super::{Error, Listener, hashes, partial};

/// Copies a file from one of these directories to `path`, from its first byte on, compared with its hashes on the way.
/// [`Error::Input`] if none of them has it, or what they have is something else; [`Error::Failed`] if it is stopped.
pub(super) fn copy(
    from: &[PathBuf],
    file: &File,
    path: &Path,
    listener: &dyn Listener,
    stop: &CancellationToken,
) -> Result<LocalFile, Error> {
    partial::forget(path)?;
    let candidates = from.iter().flat_map(|dir| names(file).into_iter().map(|name| dir.join(name)));
    let mut wrong = None;
    for candidate in candidates.filter(|candidate| candidate.is_file()) {
        match copy_one(&candidate, file, path, listener, stop)? {
            Ok(sha256) => return Ok(LocalFile { path: path.to_owned(), sha256, commit: None }),
            Err(what) => wrong = Some(format!("{}: {what}", candidate.display())),
        }
    }
    Err(Error::Input(wrong.unwrap_or_else(|| {
        let dirs: Vec<String> = from.iter().map(|dir| dir.display().to_string()).collect();
        format!("--from {}: has no {}", dirs.join(" "), names(file).last().map_or("", String::as_str))
    })))
}

/// What a file may be called in such a directory: as in the hub's own cache, in a directory of the repository with its
/// owner's or without, or as it is.
fn names(file: &File) -> Vec<String> {
    match &file.place {
        Place::Hub { repository, path } => {
            let (_, name) = repository.split_once('/').unwrap_or_default();
            let cached = format!("models--{}/snapshots/{}", repository.replace('/', "--"), file.revision);
            let below = [cached.as_str(), repository, name].map(|dir| format!("{dir}/{path}"));
            below.into_iter().chain([path.clone()]).collect()
        }
        Place::Url(_) => vec![file.place.file_name().to_owned()],
    }
}

/// Copies the candidate and gives its SHA-256; what is wrong with it, if it is another file.
fn copy_one(
    candidate: &Path,
    file: &File,
    path: &Path,
    listener: &dyn Listener,
    stop: &CancellationToken,
) -> Result<Result<String, String>, Error> {
    let unwritten = |error: std::io::Error| Error::io(path, "cannot be written", &error);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(unwritten)?;
    }
    let mut n = 0;
    let mut out = fs::File::create(path).map_err(unwritten)?;
    let found = hashes::of_file(candidate, file, |bytes| {
        if stop.is_cancelled() {
            return Err(Error::Failed(format!("{}: stopped", candidate.display())));
        }
        n += bytes.len() as i64;
        listener.moved(bytes.len() as i64);
        out.write_all(bytes).map_err(unwritten)
    })?;
    if let Some(what) = found.differ_from(file) {
        listener.moved(-n);
        return Ok(Err(what));
    }
    out.sync_all().map_err(unwritten)?;
    Ok(Ok(found.sha256))
}
