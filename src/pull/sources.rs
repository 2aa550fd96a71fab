//! Where the parts of a bundle are published: the table that is in the program, or one in a file of the same form.
//!
//! A table names the bundle (`name`, `kind`, `resolution`, `rare_tokens`), the `licences`, and its `parts`. A part names
//! those that it is of no use without (`needs`). Its files lie on a hub (`hub`, `revision`, `path`) or anywhere (`url`,
//! `revision`); `hub` and `revision` may be said once for a whole part. A part has a `licence`, a file may have another. `size`, `sha256` and `sha512` are compared
//! where they are given; `about_size` is shown where the size is not known. A part with `into` is converted: the tensors
//! that the network of `config` reads go to the directory `into`. Files of a part without it go into the bundle as they
//! are, to `to` or else under their own `path`, and those with a `dtype` only if it is asked for. A `url` holds no password; its
//! query, which may be a secret, is asked for, but neither shown nor recorded: another `revision` tells that it changed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use reqwest::Url;
use serde::Deserialize;
use serde_json::Value;

use super::Error;
use crate::ml::bundle::Capability;

/// The table for Stable Diffusion 1.5.
///
/// Its hashes are those that the publishers give (the first digits in the file names of PyTorch and of pytorch-fid, the
/// SHA-512 in CarveKit, the file in the package lpips 0.1.4) and that others publish of the same files. Of
/// `vit_small_patch16_224.dino` none was found. Files of the hub are compared with the hash that it announces as well.
pub(crate) const SD15: &str = include_str!("sd15.json");

/// Where the parts of a bundle are published.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sources {
    /// What people call the bundle.
    pub(crate) name: String,
    /// Its family.
    pub(crate) kind: String,
    /// Side of its images, in pixels.
    pub(crate) resolution: Option<usize>,
    /// Words of one token each that mean next to nothing.
    #[serde(default)]
    pub(crate) rare_tokens: Vec<String>,
    /// By their SPDX expressions.
    pub(crate) licences: BTreeMap<String, Licence>,
    pub(crate) parts: Vec<Part>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Licence {
    pub(crate) url: String,
    /// What one has to know before one reads it.
    #[serde(default)]
    pub(crate) note: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) about: String,
    /// Parts that it is of no use without.
    #[serde(default)]
    pub(crate) needs: Vec<String>,
    licence: String,
    hub: Option<String>,
    revision: Option<String>,
    /// The directory in the bundle that it is converted into.
    pub(crate) into: Option<String>,
    /// `config.json` of a part that is converted.
    #[serde(default)]
    pub(crate) config: Value,
    files: Vec<RawFile>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    hub: Option<String>,
    path: Option<String>,
    url: Option<String>,
    revision: Option<String>,
    to: Option<String>,
    dtype: Option<WeightType>,
    licence: Option<String>,
    size: Option<u64>,
    about_size: Option<u64>,
    sha256: Option<String>,
    sha512: Option<String>,
}

/// Type of the weights of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WeightType {
    F32,
    F16,
}

/// A published file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) place: Place,
    pub(crate) revision: String,
    /// Its path in the bundle, or among what a part is converted from.
    pub(crate) to: String,
    pub(crate) licence: String,
    /// In bytes.
    pub(crate) size: Option<u64>,
    /// About how large it is, where its size is not known to the byte.
    about_size: Option<u64>,
    pub(crate) sha256: Option<String>,
    pub(crate) sha512: Option<String>,
}

impl File {
    /// Its size, as far as it is known before it is fetched.
    pub(crate) fn expected_size(&self) -> Option<u64> {
        self.size.or(self.about_size)
    }
}

/// Where a file is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a repository, `OWNER/NAME`, of a hub.
    Hub { repository: String, path: String },
    /// Anywhere else.
    Url(String),
}

impl Place {
    /// For people, and in `hypnos.json`: without the query of a URL.
    pub(crate) fn source(&self) -> String {
        match self {
            Self::Hub { repository, path } => format!("{repository}/{path}"),
            Self::Url(url) => without_query(url).to_owned(),
        }
    }

    /// The last part of its path.
    pub(crate) fn file_name(&self) -> &str {
        let path = match self {
            Self::Hub { path, .. } => path,
            Self::Url(url) => without_query(url),
        };
        path.rsplit('/').next().unwrap_or(path)
    }
}

impl Part {
    /// Its files, the weights in this type.
    pub(crate) fn files(&self, dtype: WeightType) -> Vec<File> {
        let wanted = self.files.iter().filter(|raw| raw.dtype.is_none_or(|of| of == dtype)).enumerate();
        wanted.filter_map(|(i, raw)| self.file(i, raw).ok()).collect() // all were checked
    }

    fn file(&self, i: usize, raw: &RawFile) -> Result<File, String> {
        let place = self.place(raw)?;
        let revision =
            raw.revision.as_ref().or(self.revision.as_ref()).filter(|revision| !revision.is_empty());
        let revision = revision.ok_or("revision: is missing")?.clone();
        let to = match (&self.into, &raw.to, &place) {
            (Some(_), None, _) => format!("{i}-{}", place.file_name()),
            (Some(_), Some(_), _) => return Err("to: a part that is converted has `into` instead".into()),
            (None, Some(to), _) | (None, None, Place::Hub { path: to, .. }) => to.clone(),
            (None, None, Place::Url(_)) => return Err("to: is missing".into()),
        };
        within(&to).map_err(|what| format!("to: {what}"))?;
        check_hash("sha256", raw.sha256.as_ref(), 64)?;
        check_hash("sha512", raw.sha512.as_ref(), 128)?;
        Ok(File {
            place,
            revision,
            to,
            licence: raw.licence.as_ref().unwrap_or(&self.licence).clone(),
            size: raw.size,
            about_size: raw.about_size,
            sha256: raw.sha256.clone(),
            sha512: raw.sha512.clone(),
        })
    }

    fn place(&self, raw: &RawFile) -> Result<Place, String> {
        match (&raw.url, raw.hub.as_ref().or(self.hub.as_ref()), &raw.path) {
            (Some(url), _, None) if raw.hub.is_none() => {
                // The URL itself is not shown: it may hold a secret.
                let parsed = Url::parse(url).map_err(|e| format!("url: is not a URL: {e}"))?;
                if !matches!(parsed.scheme(), "http" | "https") {
                    return Err(format!(
                        "url: has the scheme `{}`; http or https is wanted",
                        parsed.scheme()
                    ));
                }
                if !parsed.username().is_empty() || parsed.password().is_some() {
                    return Err(
                        "url: has a user or a password in it, which would be shown and recorded".into()
                    );
                }
                Ok(Place::Url(url.clone()))
            }
            (None, Some(repository), Some(path)) => {
                let names: Vec<&str> = repository.split('/').collect();
                if names.len() != 2 || !names.iter().all(|name| is_plain(name)) {
                    return Err(format!("hub: `{repository}`; OWNER/NAME is wanted"));
                }
                within(path).map_err(|what| format!("path: {what}"))?;
                Ok(Place::Hub { repository: repository.clone(), path: path.clone() })
            }
            _ => Err("wants either `url`, or `hub` and `path`".into()),
        }
    }

    fn check(&self, licences: &BTreeMap<String, Licence>) -> Result<(), String> {
        if !is_plain(&self.name) {
            return Err(format!("name: `{}`; letters, digits, `-` and `_` are wanted", self.name));
        }
        match &self.into {
            Some(into) if Capability::of_part(into).is_none() => {
                return Err(format!("into: `{into}`; one of {} is wanted", Capability::parts().join(", ")));
            }
            Some(_) if !self.config.is_object() => return Err("config: is missing".into()),
            None if !self.config.is_null() => return Err("config: is for a part with `into`".into()),
            _ => {}
        }
        for (i, raw) in self.files.iter().enumerate() {
            let file = self.file(i, raw).map_err(|what| format!("files[{i}].{what}"))?;
            if !licences.contains_key(&file.licence) {
                return Err(format!("files[{i}].licence: `{}` is not among `licences`", file.licence));
            }
        }
        for dtype in [WeightType::F32, WeightType::F16] {
            let files = self.files(dtype);
            let places: BTreeSet<&str> = files.iter().map(|file| file.to.as_str()).collect();
            if files.is_empty() || places.len() < files.len() {
                let what = if files.is_empty() { "there is none" } else { "two have the same place" };
                return Err(format!("files: {what} for weights in {dtype:?}"));
            }
        }
        Ok(())
    }
}

impl Sources {
    /// Reads a table. [`Error::Input`] says where in it something is wrong; `name` is that of the table.
    pub(crate) fn parse(text: &str, name: &Path) -> Result<Self, Error> {
        let bad = |what: String| Error::Input(format!("{}: {what}", name.display()));
        let mut json = serde_json::Deserializer::from_str(text);
        let sources: Self = serde_path_to_error::deserialize(&mut json).map_err(|e| bad(e.to_string()))?;
        sources.check().map_err(bad)?;
        Ok(sources)
    }

    fn check(&self) -> Result<(), String> {
        let (mut names, mut places) = (BTreeSet::new(), BTreeSet::new());
        for (i, part) in self.parts.iter().enumerate() {
            part.check(&self.licences).map_err(|what| format!("parts[{i}].{what}"))?;
            if !names.insert(&part.name) || !part.into.as_ref().is_none_or(|into| places.insert(into)) {
                return Err(format!("parts[{i}]: there is another of its name, or with its `into`"));
            }
        }
        for (i, part) in self.parts.iter().enumerate() {
            if let Some(unknown) = part.needs.iter().find(|need| !names.contains(need)) {
                return Err(format!("parts[{i}].needs: there is no part `{unknown}`"));
            }
        }
        if self.parts.is_empty() { Err("parts: there is none".into()) } else { Ok(()) }
    }
}

/// A URL without what follows its path.
pub(super) fn without_query(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or(url)
}

/// A name that is one component of a path or a URL as it is.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(plain)
}

/// Refuses a path that leaves its directory, or hides in it.
fn within(path: &str) -> Result<(), String> {
    let plain =
        |c: Component<'_>| matches!(c, Component::Normal(name) if !name.to_string_lossy().starts_with('.'));
    if !path.is_empty() && !path.ends_with('/') && Path::new(path).components().all(plain) {
        return Ok(());
    }
    Err(format!("`{path}` is no path within a directory"))
}

fn check_hash(name: &str, hash: Option<&String>, length: usize) -> Result<(), String> {
    let is_hex =
        |hash: &String| hash.len() == length && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match hash {
        Some(hash) if !is_hex(hash) => {
            Err(format!("{name}: `{hash}`; {length} lower-case hexadecimal digits are wanted"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_in_the_program_is_sound() {
        let sources = Sources::parse(SD15, Path::new("sd15.json")).unwrap();
        let names: Vec<&str> = sources.parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(
            names,
            ["tokenizer", "base", "segmenter", "perceptual", "dino", "clip", "inception", "lpips"]
        );
        let bytes = |dtype| sources.parts[1].files(dtype).iter().filter_map(|file| file.size).sum::<u64>();
        assert_eq!(bytes(WeightType::F32) / 1_000_000, 4265);
        assert_eq!(bytes(WeightType::F16) / 1_000_000, 2132);
        for part in &sources.parts {
            for file in part.files(WeightType::F32) {
                let commit =
                    file.revision.len() == 40 && file.revision.bytes().all(|b| b.is_ascii_hexdigit());
                assert!(commit || matches!(file.place, Place::Url(_)), "{file:?}: is not pinned");
            }
        }
    }

    #[test]
    fn a_table_that_cannot_be_meant_is_refused_where_it_is_wrong() {
        let table = |file: &str| {
            format!(
                r#"{{"name": "n", "kind": "k", "licences": {{"MIT": {{"url": "u"}}}}, "parts": [{{"name": "base",
                "about": "a", "licence": "MIT", "files": [{file}]}}]}}"#
            )
        };
        for (file, wanted) in [
            (
                r#"{"hub": "a/b", "path": "c", "revision": "r", "to": "../c"}"#,
                "parts[0].files[0].to: `../c` is no path",
            ),
            (r#"{"hub": "a/b", "path": "/c", "revision": "r"}"#, "parts[0].files[0].path: `/c` is no path"),
            (r#"{"hub": "a/b/c", "path": "c", "revision": "r"}"#, "hub: `a/b/c`; OWNER/NAME is wanted"),
            (r#"{"hub": "a/b", "path": "c"}"#, "files[0].revision: is missing"),
            (
                r#"{"url": "ftp://a/b", "revision": "r", "to": "b"}"#,
                "files[0].url: has the scheme `ftp`; http or https is wanted",
            ),
            (
                r#"{"url": "https://me:hunter2@a/b", "revision": "r", "to": "b"}"#,
                "files[0].url: has a user or a password",
            ),
            (
                r#"{"url": "https://hunter2@a/b", "revision": "r", "to": "b"}"#,
                "files[0].url: has a user or a password",
            ),
            (
                r#"{"url": "https://me:hunter2@a:x/b", "revision": "r", "to": "b"}"#,
                "files[0].url: is not a URL: invalid port number",
            ),
            (
                r#"{"hub": "a/b", "path": "c", "revision": "r", "sha256": "12"}"#,
                "sha256: `12`; 64 lower-case",
            ),
            (
                r#"{"hub": "a/b", "path": "c", "revision": "r", "licence": "GPL"}"#,
                "licence: `GPL` is not among",
            ),
            (r#"{"hub": "a/b", "path": "c", "revision": "r", "sha": "1"}"#, "unknown field `sha`"),
        ] {
            let error = Sources::parse(&table(file), Path::new("t.json")).unwrap_err().to_string();
            assert!(error.starts_with("t.json: ") && error.contains(wanted), "{error}\nwanted {wanted}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let needy = table(r#"{"hub": "a/b", "path": "c", "revision": "r"}"#)
            .replace(r#""about""#, r#""needs": ["voice"], "about""#);
        let error = Sources::parse(&needy, Path::new("t.json")).unwrap_err().to_string();
        assert_eq!(error, "t.json: parts[0].needs: there is no part `voice`");
    }
}
