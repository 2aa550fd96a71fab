//! The directory of the bundle: which parts are in it, and how a part gets into it.
//!
//! A file appears under its own name when it is complete, and `hypnos.json` lists a part when all its files are there.

use std::collections::BTreeSet;
use std::fs::{self, File as DiskFile};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::local_file::LocalFile;
use super::sources::{File, Licence, Part, Place, Sources, without_query};
use super::{Error, hashes};
use crate::ml;
use crate::ml::bundle::{Fetched, Manifest, Origin, convert, model_index, read_manifest, write_json};

const MANIFEST: &str = "hypnos.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
const INDEX: &str = "model_index.json";

/// Paths that a part was about to take when a pull was killed.
const PLACES: &str = "places.json";

/// The directory of a bundle, and what its `hypnos.json` says.
pub(super) struct BundleDir {
    dir: PathBuf,
    manifest: Manifest,
}

/// A file that is ready to take its place.
struct Ready {
    /// In the bundle.
    path: String,
    /// Where it lies until then.
    at: PathBuf,
    origin: Origin,
}

impl BundleDir {
    /// Reads what is there. [`Error::Input`] if that is another bundle.
    pub(super) fn open(dir: &Path, sources: &Sources) -> Result<Self, Error> {
        let manifest =
            read_manifest(dir).map_err(|error| Error::Input(error.to_string()))?.unwrap_or_default();
        if !manifest.kind.is_empty() && manifest.kind != sources.kind {
            let what =
                format!("holds a bundle of the kind `{}`; --out names another directory", manifest.kind);
            return Err(Error::Input(format!("{}: {what}", dir.display())));
        }
        Ok(Self { dir: dir.to_owned(), manifest })
    }

    /// Licences that were accepted for what is there.
    pub(super) fn accepted(&self) -> &BTreeSet<String> {
        &self.manifest.accepted_licences
    }

    /// Whether a part is there as it is wanted, by the hashes of its files.
    pub(super) fn has(&self, part: &Part, files: &[File]) -> bool {
        let listed = |path: &str| {
            let origin = self.manifest.files.get(path)?;
            let found = hashes::sha256(&self.dir.join(path)).ok()?;
            (found == origin.sha256).then_some(origin)
        };
        let Some(into) = &part.into else {
            let as_wanted = |file: &File| {
                let fetched =
                    listed(&file.to).map(|o| (o.source.as_str(), o.revision.as_str(), o.sha256.as_str()));
                fetched.is_some_and(|fetched| is_of(fetched, file))
            };
            let has_index = !files.iter().any(|file| file.to == SCHEDULER) || listed(INDEX).is_some();
            return has_index && files.iter().all(as_wanted);
        };
        let config = fs::read(self.dir.join(into).join("config.json")).ok();
        let config = config.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        let Some(weights) = listed(&format!("{into}/model.safetensors")) else { return false };
        let sources = weights
            .converted_from
            .iter()
            .map(|f| (f.source.as_str(), f.revision.as_str(), f.sha256.as_str()));
        config.as_ref() == Some(&part.config)
            && weights.converted_from.len() == files.len()
            && sources.zip(files).all(|(fetched, file)| is_of(fetched, file))
    }

    /// The files of a part that are in their places with the hashes that are published for them. [`Error::Input`] if a
    /// place is taken by a file that no pull put there.
    pub(super) fn in_place(
        &self,
        part: &Part,
        files: &[File],
        staged: &Path,
    ) -> Result<Vec<Option<LocalFile>>, Error> {
        let begun: BTreeSet<String> = fs::read(staged.join(PLACES))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        let check = |path: &str| {
            if self.manifest.files.contains_key(path) || begun.contains(path) || !self.dir.join(path).exists()
            {
                return Ok(());
            }
            let what = "is there, and hypnos.json does not list it: move it away, or choose another --out";
            Err(Error::Input(format!("{}: {what}", self.dir.join(path).display())))
        };
        if let Some(into) = &part.into {
            check(&format!("{into}/config.json"))?;
            check(&format!("{into}/model.safetensors"))?;
            return Ok(vec![None; files.len()]);
        }
        let found = |file: &File| {
            let path = self.dir.join(&file.to);
            let sha256 = hashes::sha256(&path).ok().filter(|found| Some(found) == file.sha256.as_ref());
            let got = sha256.map(|sha256| LocalFile { path, sha256, commit: None });
            if got.is_none() {
                check(&file.to)?;
            }
            Ok(got)
        };
        files.iter().map(found).collect()
    }

    /// Puts a part into the bundle: `got` are its files, `staged` is where it may write until it is complete.
    pub(super) fn install(
        &mut self,
        sources: &Sources,
        part: &Part,
        got: &[(File, LocalFile)],
        staged: &Path,
    ) -> Result<(), Error> {
        let ready = match &part.into {
            Some(into) => converted(part, into, got, &staged.join("converted"))?,
            None => self.copied(got, staged)?,
        };
        let places: BTreeSet<&str> = ready.iter().map(|ready| ready.path.as_str()).collect();
        write_json(&staged.join(PLACES), &json!(places))?;
        for Ready { path, at, .. } in &ready {
            let to = self.dir.join(path);
            place(at, &to).map_err(|error| Error::io(&to, "cannot be put in its place", &error))?;
        }
        self.list(sources, part, got, ready)
    }

    /// Files that are published as they are wanted, and `model_index.json`, which names no safety checker: none is
    /// fetched.
    fn copied(&self, got: &[(File, LocalFile)], staged: &Path) -> Result<Vec<Ready>, Error> {
        let mut ready: Vec<Ready> = got.iter().map(|(file, got)| self.as_fetched(file, got)).collect();
        if let Some(scheduler) = ready.iter().find(|ready| ready.path == SCHEDULER) {
            let config: Value = fs::read(&scheduler.at)
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok())
                .unwrap_or_default();
            let index = model_index(config["_class_name"].as_str().unwrap_or("DDIMScheduler"));
            ready.push(written(staged, INDEX, &index)?);
        }
        Ok(ready)
    }

    fn as_fetched(&self, file: &File, got: &LocalFile) -> Ready {
        let Fetched { source, revision, sha256 } = fetched(file, got);
        let before = self.manifest.files.get(&file.to).filter(|before| before.sha256 == sha256);
        let origin =
            Origin { source, revision, sha256, licence: file.licence.clone(), converted_from: Vec::new() };
        // What was in its place already is of the commit that it was fetched from.
        let origin = before.filter(|_| got.commit.is_none()).cloned().unwrap_or(origin);
        Ready { path: file.to.clone(), at: got.path.clone(), origin }
    }

    /// Writes `hypnos.json` with this part.
    fn list(
        &mut self,
        sources: &Sources,
        part: &Part,
        got: &[(File, LocalFile)],
        ready: Vec<Ready>,
    ) -> Result<(), Error> {
        let mut manifest = self.manifest.clone();
        manifest.files.extend(ready.into_iter().map(|ready| (ready.path, ready.origin)));
        manifest.accepted_licences.extend(got.iter().map(|(file, _)| file.licence.clone()));
        if manifest.rare_tokens.is_empty() {
            manifest.rare_tokens.clone_from(&sources.rare_tokens);
        }
        if part.into.is_none() {
            (manifest.name, manifest.kind) = (sources.name.clone(), sources.kind.clone());
            manifest.resolution = sources.resolution;
        }
        let value = serde_json::to_value(&manifest).map_err(|error| Error::Failed(error.to_string()))?;
        write_json(&self.dir.join(MANIFEST), &value)?;
        self.manifest = manifest;
        Ok(())
    }
}

/// The licences of these files, with what is said of them; once each.
pub(super) fn licences<'a>(
    sources: &'a Sources,
    files: impl Iterator<Item = &'a File>,
) -> Vec<(&'a str, &'a Licence)> {
    let names: BTreeSet<&str> = files.map(|file| file.licence.as_str()).collect();
    names.into_iter().filter_map(|name| Some((name, sources.licences.get(name)?))).collect()
}

/// Whether what was fetched is the file at the revision that is asked for.
fn is_of((source, revision, sha256): (&str, &str, &str), file: &File) -> bool {
    let asked = revision.split('@').next().unwrap_or_default();
    // The first builds with `models pull` recorded the query of a URL as well.
    let is_same = match &file.place {
        Place::Url(_) => without_query(source) == file.place.source(),
        Place::Hub { .. } => source == file.place.source(),
    };
    is_same && asked == file.revision && file.sha256.as_ref().is_none_or(|wanted| wanted == sha256)
}

fn fetched(file: &File, got: &LocalFile) -> Fetched {
    let commit = got.commit.as_ref().filter(|commit| **commit != file.revision);
    Fetched {
        source: file.place.source(),
        revision: commit
            .map_or_else(|| file.revision.clone(), |commit| format!("{}@{commit}", file.revision)),
        sha256: got.sha256.clone(),
    }
}

/// A part that is converted: its config, and its weights out of all that was fetched for it.
fn converted(part: &Part, into: &str, got: &[(File, LocalFile)], made: &Path) -> Result<Vec<Ready>, Error> {
    let files: Vec<PathBuf> = got.iter().map(|(_, got)| got.path.clone()).collect();
    convert(made, into, &part.config, &files).map_err(|error| {
        // People know the files by their sources, not by where they lie on their way.
        let named = |error: ml::Error, (file, got): &(File, LocalFile)| {
            error.renamed(&got.path, Path::new(&file.place.source()))
        };
        got.iter().fold(error, named)
    })?;
    let path = format!("{into}/model.safetensors");
    let at = made.join(&path);
    let from: Vec<Fetched> = got.iter().map(|(file, got)| fetched(file, got)).collect();
    let joined =
        |what: fn(&Fetched) -> &str, between: &str| from.iter().map(what).collect::<Vec<_>>().join(between);
    let licences: BTreeSet<&str> = got.iter().map(|(file, _)| file.licence.as_str()).collect();
    let origin = Origin {
        source: format!("converted by hypnos from {}", joined(|f| &f.source, " and ")),
        revision: joined(|f| &f.revision, " and "),
        sha256: hashes::sha256(&at)?,
        licence: licences.into_iter().collect::<Vec<_>>().join(" AND "),
        converted_from: from,
    };
    Ok(vec![Ready { path, at, origin }, written(made, &format!("{into}/config.json"), &part.config)?])
}

/// A file of our own.
fn written(dir: &Path, path: &str, value: &Value) -> Result<Ready, Error> {
    let at = dir.join(path);
    write_json(&at, value)?;
    let origin = Origin {
        source: "written by hypnos".into(),
        revision: env!("CARGO_PKG_VERSION").into(),
        sha256: hashes::sha256(&at)?,
        licence: env!("CARGO_PKG_LICENSE").into(),
        converted_from: Vec::new(),
    };
    Ok(Ready { path: path.to_owned(), at, origin })
}

/// Gives a file its name, so that it has it after a power cut.
fn place(at: &Path, to: &Path) -> std::io::Result<()> {
    let parent = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    fs::rename(at, to)?;
    DiskFile::open(parent)?.sync_all()
}
