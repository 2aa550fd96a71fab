//! Temporary storage of uploaded bytes: in memory while they are few, then in a file without a name, so that nothing
//! stays when the process ends.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};

use super::idempotency::RequestHash;
use super::problem::{Kind, Problem};

/// Largest size in memory; the file is written in chunks of this size.
const BUFFER_BYTES: usize = 256 << 10;

/// A writer of bytes.
pub(super) struct Spool {
    dir: PathBuf,
    file: Option<File>,
    buffer: BytesMut,
    bytes: u64,
}

/// Bytes that were written completely.
#[derive(Debug)]
pub(super) struct Spooled {
    file: Option<File>,
    in_memory: Bytes,
    bytes: u64,
}

impl Spool {
    /// An empty one, whose file will be in `dir`.
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), file: None, buffer: BytesMut::new(), bytes: 0 }
    }

    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), Problem> {
        self.bytes += bytes.len() as u64;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES { self.flush().await } else { Ok(()) }
    }

    /// Writes the buffer to the file.
    async fn flush(&mut self) -> Result<(), Problem> {
        let (dir, file, mut buffer) = (self.dir.clone(), self.file.take(), std::mem::take(&mut self.buffer));
        let work = move || {
            let mut file = match file {
                Some(file) => file,
                None => open(&dir)?,
            };
            file.write_all(&buffer)?;
            buffer.clear();
            Ok((file, buffer))
        };
        let (file, buffer) = blocking(work).await?;
        (self.file, self.buffer) = (Some(file), buffer);
        Ok(())
    }

    pub(super) async fn finish(mut self) -> Result<Spooled, Problem> {
        if self.file.is_some() && !self.buffer.is_empty() {
            self.flush().await?;
        }
        Ok(Spooled { file: self.file, in_memory: self.buffer.freeze(), bytes: self.bytes })
    }
}

impl Spooled {
    /// Number of bytes.
    pub(super) fn len(&self) -> u64 {
        self.bytes
    }

    /// Adds the bytes to a request's hash.
    pub(super) async fn hash_into(&self, mut request: RequestHash) -> Result<RequestHash, Problem> {
        let Some(file) = &self.file else {
            request.add(&self.in_memory);
            return Ok(request);
        };
        let (file, bytes) = (file.try_clone().map_err(|error| storage_problem(&error))?, self.bytes);
        let work = move || {
            let mut file = &file;
            file.rewind()?;
            request.add_from(bytes, file)?;
            Ok(request)
        };
        blocking(work).await
    }

    /// Reads all bytes into memory.
    pub(super) async fn read(&self) -> Result<Bytes, Problem> {
        let Some(file) = &self.file else { return Ok(self.in_memory.clone()) };
        let file = file.try_clone().map_err(|error| storage_problem(&error))?;
        let bytes = self.bytes as usize;
        let work = move || {
            let (mut file, mut whole) = (&file, Vec::with_capacity(bytes));
            file.rewind()?;
            file.read_to_end(&mut whole)?;
            Ok(Bytes::from(whole))
        };
        blocking(work).await
    }
}

/// Creates a file without a name; its directory is created again if it was removed.
fn open(dir: &Path) -> std::io::Result<File> {
    match tempfile::tempfile_in(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(dir)?;
            tempfile::tempfile_in(dir)
        }
        opened => opened,
    }
}

/// Runs file operations on a thread for blocking work.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Problem> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|error| Problem::internal(&error))?;
    done.map_err(|error| storage_problem(&error))
}

fn storage_problem(error: &std::io::Error) -> Problem {
    tracing::error!(%error, "cannot write an upload to the scratch directory");
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Problem::new(Kind::StorageFull, "the server's disk is full")
        }
        _ => Problem::internal_already_logged(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_written_is_read_and_no_file_has_a_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let gone = dir.path().join("made/anew");
        for bytes in [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, 3 * BUFFER_BYTES + 7] {
            let content: Vec<u8> = (0..bytes).map(|n| (n * 7 % 251) as u8).collect();
            let mut spool = Spool::new(&gone);
            for chunk in content.chunks(10_000) {
                spool.write(chunk).await.expect("room");
            }
            let spooled = spool.finish().await.expect("room");
            assert_eq!(spooled.len(), bytes as u64);
            for _ in 0..2 {
                assert!(spooled.read().await.expect("a file") == content, "{bytes} bytes");
            }
        }
        assert_eq!(std::fs::read_dir(&gone).expect("a directory").count(), 0);
    }
}
