//! `--bundle`: a directory of models, the miniature, or a checkpoint in one file, which becomes a bundle in the user's
//! cache when it is first used.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::Args;
use tracing::info;

use super::models::import;
use super::output::print_note;
use crate::config::{self, Working};
use crate::ml::Result;
use crate::ml::bundle::{Import, ImportOptions, MINIATURE_NAME};

/// The models of a command.
#[derive(Clone, Debug, Args)]
pub(super) struct BundleArgs {
    /// Directory of the models, in the diffusers layout, or a checkpoint in one file
    #[arg(long, value_name = "PATH", default_value = MINIATURE_NAME, value_parser = config::bundle)]
    bundle: PathBuf,
    /// Bundle that has what a checkpoint in one file lacks: tokenizer, segmenter, perceptual, metrics
    #[arg(long, value_name = "DIR", value_parser = config::bundle)]
    with: Option<PathBuf>,
    #[arg(skip)]
    dir: OnceLock<PathBuf>,
}

impl BundleArgs {
    /// The directory of the models.
    pub(super) fn dir(&self) -> Result<PathBuf> {
        if let Some(dir) = self.dir.get() {
            return Ok(dir.clone());
        }
        let dir = directory(&self.bundle, self.with.as_deref())?;
        Ok(self.dir.get_or_init(|| dir).clone())
    }
}

/// The same settings with a directory as their bundle.
pub(super) fn opened(working: &Working) -> Result<Working> {
    let bundle = directory(&working.bundle, working.bundle_with.as_deref())?;
    Ok(Working { bundle, ..working.clone() })
}

/// The directory that is meant by a bundle's path.
fn directory(path: &Path, with: Option<&Path>) -> Result<PathBuf> {
    if !path.is_file() {
        return Ok(path.to_owned());
    }
    let options = ImportOptions { with: with.map(Path::to_owned), ..ImportOptions::default() };
    let import = Import::open(path, &options)?;
    let dir = import.place(&config::cache())?;
    let made = !dir.exists();
    if made {
        import.notes().iter().for_each(|note| say(note));
        if let Err(error) = import::write(&import, &dir)
            && !dir.is_dir()
        {
            return Err(error); // otherwise another was quicker
        }
    }
    let what = if made { "imported into" } else { "was imported into" };
    say(&format!("{} {what} {}", path.display(), dir.display()));
    Ok(dir)
}

/// One line in the log, or on the terminal of a command that has none.
fn say(line: &str) {
    if tracing::dispatcher::has_been_set() { info!("{line}") } else { print_note(line) }
}
