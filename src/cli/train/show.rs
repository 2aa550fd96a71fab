//! The progress of a training: bars on the terminal; images, checkpoints and the log on disk.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::time::Instant;

use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::out::{ClassImageCache, Out};
use crate::cli::error::CliError;
use crate::cli::output::progress_style;
use crate::engine::{Flow, TrainEvent};
use crate::job::{Phase, Progress};
use crate::report::{LossCurve, PhaseTimes, losses_svg};

const LOG: &str = "log.jsonl";

/// Receives the events of a training.
pub(super) struct Show<'a> {
    out: &'a Out,
    class_image_cache: &'a ClassImageCache,
    checkpoint_every: u64,
    stop: &'a CancellationToken,
    bar: ProgressBar,
    phase: Option<Phase>,
    times: PhaseTimes,
    log: Log,
    /// Steps at the last checkpoint.
    kept: u64,
    /// The write error that ends the training.
    failed: Option<CliError>,
}

impl<'a> Show<'a> {
    pub(super) fn new(
        out: &'a Out,
        class_image_cache: &'a ClassImageCache,
        checkpoint_every: u64,
        stop: &'a CancellationToken,
        bar: ProgressBar,
    ) -> Self {
        let template = "{prefix:16} {bar:32} {pos} of {len}, {elapsed} gone, {eta} left  {msg}";
        let bar = bar.with_style(progress_style(template));
        let log = Log { path: out.dir().join(LOG), file: None, last: Instant::now() };
        Self {
            out,
            class_image_cache,
            checkpoint_every,
            stop,
            bar,
            phase: None,
            times: PhaseTimes::default(),
            log,
            kept: 0,
            failed: None,
        }
    }

    /// Handles an event and says how the training continues.
    pub(super) fn observe(&mut self, event: TrainEvent) -> Flow {
        let step = match &event {
            TrainEvent::Progress(at) if at.phase == Phase::Training => Some(at.step),
            _ => None,
        };
        if let Err(stop) = self.take(event) {
            self.failed.get_or_insert(stop);
            return Flow::Stop;
        }
        if self.stop.is_cancelled() {
            return Flow::Pause;
        }
        match step {
            Some(step) if step >= self.kept + self.checkpoint_every => {
                self.kept = step;
                Flow::Checkpoint
            }
            _ => Flow::Continue,
        }
    }

    fn take(&mut self, event: TrainEvent) -> Result<(), CliError> {
        match event {
            TrainEvent::Progress(at) => {
                self.progress(&at)?;
                Ok(())
            }
            TrainEvent::ClassImage { index, png } => self.class_image_cache.keep(index, &png),
            TrainEvent::Step { step, metrics } => self.log.step(step, &metrics),
            TrainEvent::Shown { what, picture } => self.out.show(what, &picture),
            TrainEvent::Checkpoint { file, .. } => {
                self.log.flush()?;
                self.out.keep_checkpoint(&file)
            }
        }
    }

    fn progress(&mut self, at: &Progress) -> Result<(), CliError> {
        self.times.enter(at.phase, Instant::now());
        if self.phase != Some(at.phase) {
            self.phase = Some(at.phase);
            self.bar.reset();
            self.bar.set_prefix(at.phase.to_string());
            if at.phase == Phase::Training {
                self.kept = at.step;
                self.log.begin(at.step)?;
            }
        }
        self.bar.set_length(at.total);
        self.bar.set_position(at.step);
        self.bar.set_message(at.loss.map_or(String::new(), |loss| format!("loss {loss:.4}")));
        Ok(())
    }

    /// Ends the bars and draws the losses. Returns the duration of each phase, or the error that ended the training.
    pub(super) fn finish(mut self) -> Result<BTreeMap<Phase, f64>, CliError> {
        self.bar.finish_and_clear();
        self.log.flush()?;
        if let Some(stop) = self.failed {
            return Err(stop);
        }
        let steps = self.log.read()?;
        if !steps.is_empty() {
            self.out.write("losses.svg".as_ref(), losses_svg(&curve(&steps)).as_bytes())?;
        }
        Ok(self.times.seconds(Instant::now()))
    }
}

/// The losses of all steps in the log.
fn curve(lines: &[Value]) -> LossCurve {
    let steps = lines.iter().filter_map(|line| Some((line["step"].as_u64()?, line)));
    let values = |name: &str| steps.clone().map(|(_, line)| line[name].as_f64()).collect();
    LossCurve {
        step: steps.clone().map(|(step, _)| step).collect(),
        loss: values("loss"),
        grad_norm: values("grad_norm"),
        reconstruction: values("reconstruction"),
        prior: values("prior"),
        perceptual: values("perceptual"),
        adversarial: values("adversarial"),
        discriminator: values("critic"),
        cut: values("cut"),
    }
}

/// One line of JSON for each step.
struct Log {
    path: std::path::PathBuf,
    file: Option<File>,
    last: Instant,
}

impl Log {
    /// Opens the log after `step`: lines of later steps, which the checkpoint does not include, are removed.
    fn begin(&mut self, step: u64) -> Result<(), CliError> {
        let lines = self.read()?;
        let kept = lines.iter().filter(|line| line["step"].as_u64().is_some_and(|s| s <= step));
        let text = kept.fold(String::new(), |text, line| text + &line.to_string() + "\n");
        std::fs::write(&self.path, text).map_err(|error| self.failed(&error))?;
        let file = OpenOptions::new().append(true).open(&self.path).map_err(|error| self.failed(&error))?;
        (self.file, self.last) = (Some(file), Instant::now());
        Ok(())
    }

    fn step(&mut self, step: u64, metrics: &[(&str, f32)]) -> Result<(), CliError> {
        let seconds = self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        let columns = metrics.iter().map(|&(name, value)| {
            let value = f64::from(value);
            (name.to_owned(), if value.is_finite() { json!(value) } else { Value::Null })
        });
        let mut line = Map::from_iter([("step".to_owned(), json!(step))]);
        line.extend(columns);
        line.insert("seconds".into(), json!(seconds));
        let Some(file) = &mut self.file else { return Ok(()) };
        let written = writeln!(file, "{}", Value::Object(line));
        written.map_err(|error| self.failed(&error))
    }

    fn flush(&mut self) -> Result<(), CliError> {
        let synced = self.file.as_ref().map_or(Ok(()), File::sync_data);
        synced.map_err(|error| self.failed(&error))
    }

    /// All complete lines; the last one may be incomplete.
    fn read(&self) -> Result<Vec<Value>, CliError> {
        let file = match File::open(&self.path) {
            Ok(file) => BufReader::new(file),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.failed(&error)),
        };
        let lines = file.lines().collect::<Result<Vec<_>, _>>().map_err(|error| self.failed(&error))?;
        Ok(lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    fn failed(&self, error: &std::io::Error) -> CliError {
        CliError::Failed(format!("{}: {error}", self.path.display()))
    }
}
