//! The hashes of a file, and whether it is the one that is wanted.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256, Sha512};

use super::Error;
use super::sources::File;
use crate::ml::bundle::hash_file;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// The hashes of what was seen of a file.
#[derive(Clone)]
pub(super) struct Hashes {
    n: u64,
    sha256: Sha256,
    /// Only where it is asked for: it takes as long as the rest.
    sha512: Option<Sha512>,
    head: Vec<u8>,
}

/// The hashes of a whole file, in lower-case hexadecimal.
pub(super) struct Found {
    n: u64,
    pub(super) sha256: String,
    sha512: Option<String>,
    is_pointer: bool,
}

impl Hashes {
    /// For the file that is wanted.
    pub(super) fn of(wanted: &File) -> Self {
        let sha512 = wanted.sha512.as_ref().map(|_| Sha512::new());
        Self { n: 0, sha256: Sha256::new(), sha512, head: Vec::new() }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        let missing = 32_usize.saturating_sub(self.head.len());
        self.head.extend(bytes.iter().take(missing));
        self.n += bytes.len() as u64;
        self.sha256.update(bytes);
        if let Some(sha512) = &mut self.sha512 {
            sha512.update(bytes);
        }
    }

    pub(super) fn finish(self) -> Found {
        Found {
            n: self.n,
            sha256: format!("{:x}", self.sha256.finalize()),
            sha512: self.sha512.map(|sha512| format!("{:x}", sha512.finalize())),
            is_pointer: self.head.starts_with(b"version https://git-lfs"),
        }
    }
}

impl Found {
    /// What is wrong with the file, if it is not the one that is wanted.
    pub(super) fn differ_from(&self, wanted: &File) -> Option<String> {
        if self.is_pointer {
            return Some(
                "is a git-lfs pointer, not the file it points to (`git lfs pull` fetches that)".into(),
            );
        }
        if let Some(size) = wanted.size.filter(|size| *size != self.n) {
            return Some(format!("has {} bytes; {size} are wanted", self.n));
        }
        let sha256 = Some(&self.sha256);
        let hashes = [("SHA-256", sha256, &wanted.sha256), ("SHA-512", self.sha512.as_ref(), &wanted.sha512)];
        hashes.into_iter().find_map(|(name, found, wanted)| match (found, wanted) {
            (Some(found), Some(wanted)) if found != wanted => {
                Some(format!("has {name} {found}; {wanted} is wanted"))
            }
            _ => None,
        })
    }
}

/// Hashes a file on the disk for the one that is wanted; `each` gets every piece of it.
pub(super) fn of_file(
    path: &Path,
    wanted: &File,
    mut each: impl FnMut(&[u8]) -> Result<(), Error>,
) -> Result<Found, Error> {
    let unreadable = |error: std::io::Error| Error::io(path, "cannot be read", &error);
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    let mut hashes = Hashes::of(wanted);
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer).map_err(unreadable)? {
            0 => return Ok(hashes.finish()),
            n => {
                hashes.update(&buffer[..n]);
                each(&buffer[..n])?;
            }
        }
    }
}

/// SHA-256 of a file on the disk, in lower-case hexadecimal.
pub(super) fn sha256(path: &Path) -> Result<String, Error> {
    hash_file(path).map_err(|error| Error::Failed(error.to_string()))
}
