//! `scheduler/scheduler_config.json`: the noise schedule, and which of its settings are not followed.

use std::path::Path;

use super::configs::{at, read_index};
use super::files::{bad, read_text};
use super::manifest::Drawing;
use crate::Result;
use crate::diffusion::{Config, Schedule, WANTED_CLASSES};
use crate::samplers::Sampler;

/// The schedule of the bundle in `dir`, whose pictures are drawn as `drawing` says by default, and one line for each
/// setting that asks for what is not done. None of them keeps a bundle from drawing: what would make its noise another is an
/// error, and names the file.
pub(super) fn read_schedule(dir: &Path, drawing: Drawing) -> Result<(Schedule, Vec<String>)> {
    let path = dir.join("scheduler/scheduler_config.json");
    let mut config = Config::read(&read_text(&path)?).map_err(|e| at(&path, e))?;
    // The reference makes the class that the index names from the file, whatever class that says.
    if let Some(class) = read_index(dir)?.and_then(|index| Some(index["scheduler"][1].as_str()?.to_owned())) {
        if !Config::knows_class(&class) {
            let what = format!("scheduler is \"{class}\"; this program supports {WANTED_CLASSES}");
            return Err(bad(&dir.join("model_index.json"), what));
        }
        config.class_name = Some(class);
    }
    let mut lines = config.adopt_pipeline();
    let schedule = Schedule::new(&config).map_err(|e| at(&path, e))?;
    if let Some(class) = config.class_name.as_deref().filter(|class| Sampler::of_class(class).is_none()) {
        let own = drawing.scheduler;
        lines.push(format!(
            "the class {class} is not among the samplers; {own} is used where none is asked for"
        ));
    }
    lines.extend(Sampler::ignored_settings(&config));
    Ok((schedule, lines.into_iter().map(|line| format!("{}: {line}", path.display())).collect()))
}
