//! A file that is there in part, and beside it a record of what it is a part of.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::fs::{self, OpenOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Error;
use super::hashes::Hashes;
use super::hub::Answer;
use super::local_file::LocalFile;
use super::sources::File;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// What a file is, in the words of the server that sends it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
struct Record {
    source: String,
    revision: String,
    etag: Option<String>,
    validator: Option<String>,
    /// SHA-256 that the hub announces.
    announced: Option<String>,
    commit: Option<String>,
    /// SHA-256 of the whole file, once that is there.
    sha256: Option<String>,
}

/// A file that grows.
pub(super) struct Partial {
    path: PathBuf,
    file: fs::File,
    n: u64,
    hashes: Hashes,
    record: Record,
    /// Whether its beginning was written by an earlier run.
    is_resumed: bool,
}

impl Partial {
    /// Opens what is there of a file, if that is of the same source and revision, or a new file.
    pub(super) async fn open(about: &File, path: &Path) -> Result<Self, Error> {
        let failed = |error: std::io::Error| unwritten(path, &error);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).await.map_err(failed)?;
        }
        let file =
            OpenOptions::new().read(true).append(true).create(true).open(path).await.map_err(failed)?;
        let fresh =
            Record { source: about.place.source(), revision: about.revision.clone(), ..Record::default() };
        let before = fs::read(record_path(path)).await.ok();
        let before = before.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
        let before = before.filter(|old| (&old.source, &old.revision) == (&fresh.source, &fresh.revision));
        let mut partial = Self {
            path: path.to_owned(),
            file,
            n: 0,
            hashes: Hashes::of(about),
            is_resumed: false,
            record: before.clone().unwrap_or(fresh),
        };
        if before.is_some() {
            partial.read().await?;
        }
        if partial.n == 0 {
            partial.begin_again(about).await?; // whatever was recorded of other bytes
        }
        Ok(partial)
    }

    /// Bytes that are there.
    pub(super) fn n(&self) -> u64 {
        self.n
    }

    /// Whether all of it is there.
    pub(super) fn is_whole(&self, about: &File) -> bool {
        self.n > 0 && (self.record.sha256.is_some() || Some(self.n) == about.size)
    }

    pub(super) fn validator(&self) -> Option<String> {
        self.record.validator.clone()
    }

    /// Whether what is there is the beginning of the file with this tag. Without tags the file's hash will tell, if
    /// there is one.
    pub(super) fn is_of(&self, etag: Option<&str>, about: &File) -> bool {
        match (self.record.etag.as_deref(), etag) {
            (Some(before), Some(now)) => before == now,
            _ => about.sha256.is_some() || about.sha512.is_some(),
        }
    }

    /// Throws away what is there, and then what was recorded of it: no byte may be left that the new record is silent on.
    pub(super) async fn begin_again(&mut self, about: &File) -> Result<(), Error> {
        self.file.set_len(0).await.map_err(|error| unwritten(&self.path, &error))?;
        self.file.sync_all().await.map_err(|error| unwritten(&self.path, &error))?;
        (self.n, self.hashes, self.is_resumed) = (0, Hashes::of(about), false);
        self.record = Record {
            source: std::mem::take(&mut self.record.source),
            revision: std::mem::take(&mut self.record.revision),
            ..Record::default()
        };
        self.write_record().await
    }

    /// Notes what the server says of the file.
    pub(super) async fn note(&mut self, answer: &Answer) -> Result<(), Error> {
        let noted = Record {
            etag: answer.etag.clone(),
            validator: answer.validator.clone(),
            announced: answer.sha256.clone(),
            commit: answer.commit.clone(),
            ..self.record.clone()
        };
        if noted == self.record {
            return Ok(());
        }
        self.record = noted;
        self.write_record().await
    }

    /// Appends bytes.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).await.map_err(|error| unwritten(&self.path, &error))?;
        self.hashes.update(bytes);
        self.n += bytes.len() as u64;
        Ok(())
    }

    /// The file, if it is what was wanted; none if it was begun by an earlier run and may be right when it is begun
    /// again. [`Error::Failed`] if it has another hash or size. It is gone then.
    pub(super) async fn finish(&mut self, about: &File) -> Result<Option<LocalFile>, Error> {
        self.file.flush().await.map_err(|error| unwritten(&self.path, &error))?;
        self.file.sync_all().await.map_err(|error| unwritten(&self.path, &error))?;
        let found = self.hashes.clone().finish();
        let mut wrong = found.differ_from(about);
        for (whose, hash) in [("the hub announces", &self.record.announced), ("had", &self.record.sha256)] {
            if let Some(hash) = hash.as_ref().filter(|hash| **hash != found.sha256) {
                wrong.get_or_insert(format!("has SHA-256 {}, but {whose} {hash}", found.sha256));
            }
        }
        match wrong {
            Some(_) if self.is_resumed => return Ok(None),
            Some(what) => {
                self.begin_again(about).await?;
                let what = format!("{}: {what}", about.place.source());
                return Err(Error::Failed(what));
            }
            None => {}
        }
        if self.record.sha256.as_ref() != Some(&found.sha256) {
            self.record.sha256 = Some(found.sha256.clone());
            self.write_record().await?;
        }
        Ok(Some(LocalFile {
            path: self.path.clone(),
            sha256: found.sha256,
            commit: self.record.commit.clone(),
        }))
    }

    /// Hashes what is there.
    async fn read(&mut self) -> Result<(), Error> {
        let mut buffer = vec![0; CHUNK];
        loop {
            match self.file.read(&mut buffer).await.map_err(|error| unwritten(&self.path, &error))? {
                0 => return Ok(()),
                n => {
                    self.hashes.update(&buffer[..n]);
                    (self.n, self.is_resumed) = (self.n + n as u64, true);
                }
            }
        }
    }

    async fn write_record(&self) -> Result<(), Error> {
        let path = record_path(&self.path);
        let text = serde_json::to_vec(&self.record).map_err(|e| Error::Failed(e.to_string()))?;
        fs::write(&path, text).await.map_err(|error| unwritten(&path, &error))
    }
}

/// Removes the record of a file whose bytes are about to be others.
pub(super) fn forget(path: &Path) -> Result<(), Error> {
    let record = record_path(path);
    match std::fs::remove_file(&record) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io(&record, "cannot be removed", &error))
        }
        _ => Ok(()),
    }
}

fn record_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

fn unwritten(path: &Path, error: &std::io::Error) -> Error {
    if error.kind() == ErrorKind::StorageFull {
        let what = "the disk is full; when there is space, the same command goes on where it stopped";
        return Error::Failed(format!("{}: {what}", path.display()));
    }
    Error::io(path, "cannot be written", error)
}
