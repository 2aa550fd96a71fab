//! The story of one training, from its row to its weights.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{Span, info_span, warn};

use super::device::{Device, Order, TrainOrder, reply};
use super::lease::Held;
use super::settle::{Content, Outcome, Refused, patiently};
use super::{Worker, scratch_fault};
use crate::blobs::{self, Key, Name};
use crate::clock;
use crate::engine::{Beat, ClassImages, Drawn, Ending, Flow, Shown, Trained};
use crate::job::{Checkpoint, Fault, FaultCode, Job, Object, Phase, Progress, TrainSpec};
use crate::report::{self, Times};

impl Worker {
    /// Photos to weights.
    pub(super) async fn train(
        &self,
        device: &Device,
        bundle: &str,
        job: &Job,
        spec: &TrainSpec,
        held: &Arc<Held>,
    ) -> Outcome {
        match self.try_train(device, bundle, job, spec, held).await {
            Ok(outcome) | Err(outcome) => outcome,
        }
    }

    async fn try_train(
        &self,
        device: &Device,
        bundle: &str,
        job: &Job,
        spec: &TrainSpec,
        held: &Arc<Held>,
    ) -> Result<Outcome, Outcome> {
        held.progress(Progress::begin(Phase::Preparing, 0));
        let preparing = phase_span(Phase::Preparing, &Span::current());
        let scratch = self.scratch_of(job)?;
        let prepared = tokio::select! {
            biased;
            prepared = self.prepare(device, job, spec, held, scratch.path()) => prepared?,
            () = self.drain.cancelled() => return Ok(Outcome::Paused),
        };
        let Prepared { photos, wanted, class_images, unreadable, resume } = prepared;

        drop(preparing);
        let (events, mut heard) = mpsc::unbounded_channel();
        let storing = Arc::new(AtomicBool::new(false));
        let mut watch = Watcher {
            held: held.clone(),
            drain: self.drain.clone(),
            events,
            storing: storing.clone(),
            checkpoint_every: self.settings.checkpoint_every,
            checkpointed: clock::now(),
            pace: Pace::default(),
            job: Span::current(),
            phase: Span::none(),
        };
        let (sender, answer) = oneshot::channel();
        device.send(Order::Train(TrainOrder {
            spec: spec.clone(),
            photos,
            class_images,
            resume: resume.clone(),
            scratch: scratch.path().to_owned(),
            watch: Box::new(move |beat| watch.hear(beat)),
            meter: held.meter.clone(),
            reply: sender,
        }));
        // The watcher, and with it the sender of events, goes when the training has ended.
        let (mut n_images, mut times) = (0, Times::default());
        while let Some(event) = heard.recv().await {
            if let Event::Phase(phase, since) = event {
                times.hear(phase, since);
                continue;
            }
            let was_checkpoint = matches!(event, Event::Checkpoint { .. });
            self.keep(job, held, (&wanted, &unreadable), event, &mut n_images).await;
            if was_checkpoint {
                storing.store(false, Ordering::Release);
            }
        }
        let ending = reply(answer).await.map_err(|fault| match (fault.code, resume) {
            // It was fetched whole: what is lost is not the checkpoint.
            (FaultCode::ArtifactMissing, Some(file)) if !file.exists() => {
                scratch_fault(&std::io::ErrorKind::NotFound.into())
            }
            _ => fault,
        });
        match ending? {
            Ending::Trained(mut trained) => {
                // Of this attempt: earlier ones took theirs.
                trained.report["seconds"] = times.seconds(clock::now());
                self.store_result(bundle, job, held, trained, n_images).await
            }
            Ending::Stopped if held.is_canceled() => Ok(Outcome::Canceled),
            Ending::Stopped => Ok(Outcome::Lost),
            Ending::Paused(None) => Ok(Outcome::Paused),
            Ending::Paused(Some((step, file))) => {
                self.store_checkpoint(job, held, step, &file).await?;
                Ok(Outcome::Paused)
            }
        }
    }

    fn scratch_of(&self, job: &Job) -> Result<tempfile::TempDir, Fault> {
        let made = tempfile::Builder::new().prefix(&format!("{}-", job.id)).tempdir_in(self.scratch.path());
        made.map_err(|error| scratch_fault(&error))
    }

    /// Fetches all that a training begins with.
    async fn prepare(
        &self,
        device: &Device,
        job: &Job,
        spec: &TrainSpec,
        held: &Held,
        scratch: &Path,
    ) -> Result<Prepared, Outcome> {
        let mut photos = Vec::new();
        for photo in &job.photos {
            photos.push(self.get(held, photo).await?.to_vec());
        }
        let resume = match &job.checkpoint {
            Some(checkpoint) => self.checkpoint(held, checkpoint, scratch).await?,
            None => None,
        };
        // Last of what can take long: from now on the device is kept free for this training.
        let wanted = device.class_images(spec).await?;
        let (class_images, unreadable) = self.class_images_had(job, held, &wanted).await?;
        Ok(Prepared { photos, wanted, class_images, unreadable, resume })
    }

    /// The class images that earlier trainings drew, and the rows of those that the store no longer has whole: these are
    /// drawn again.
    async fn class_images_had(
        &self,
        job: &Job,
        held: &Held,
        wanted: &ClassImages,
    ) -> Result<(Vec<Option<Vec<u8>>>, HashMap<u64, Object>), Outcome> {
        let (mut had, mut unreadable) = (Vec::new(), HashMap::new());
        if wanted.seeds.is_empty() {
            return Ok((had, unreadable));
        }
        let rows = self.write(held, || self.store.class_images(job.tenant, &wanted.settings)).await?;
        let mut rows: HashMap<u64, Object> = rows.into_iter().collect();
        for seed in &wanted.seeds {
            let Some(object) = rows.remove(seed) else {
                had.push(None);
                continue;
            };
            match patiently(held, || self.blobs.get(&object)).await {
                Ok(bytes) => had.push(Some(bytes.to_vec())),
                Err(Refused::Error(blobs::Error::Missing | blobs::Error::Damaged)) => {
                    had.push(None);
                    unreadable.insert(*seed, object);
                }
                Err(refused) => return Err(refused.into()),
            }
        }
        Ok((had, unreadable))
    }

    /// The file of the checkpoint to go on from; none if the store no longer has it whole: then from the beginning.
    async fn checkpoint(
        &self,
        held: &Held,
        checkpoint: &Checkpoint,
        scratch: &Path,
    ) -> Result<Option<PathBuf>, Outcome> {
        let file = scratch.join("resume.safetensors");
        let fetched = patiently(held, || self.blobs.get_to_file(&checkpoint.object, &file)).await;
        match fetched {
            Ok(()) => Ok(Some(file)),
            Err(Refused::Error(error @ (blobs::Error::Missing | blobs::Error::Damaged))) => {
                warn!("the checkpoint of step {} cannot be used: {error}", checkpoint.step);
                Ok(None)
            }
            Err(refused) => Err(refused.into()),
        }
    }

    /// Keeps what a training reports on its way. None of it is worth failing for.
    async fn keep(
        &self,
        job: &Job,
        held: &Held,
        (wanted, unreadable): (&ClassImages, &HashMap<u64, Object>),
        event: Event,
        n_images: &mut u64,
    ) {
        match event {
            Event::Phase(..) => {} // the times are the caller's
            Event::ClassImage { index, png } => {
                let Some(&seed) = wanted.seeds.get(index) else { return };
                let key = Key::class_image(job.tenant, &wanted.settings, seed, held.lease);
                let (settings, old) = (&wanted.settings, unreadable.get(&seed));
                let kept = async {
                    let object = patiently(held, || self.blobs.put(&key, png.clone())).await?;
                    let add = || self.store.add_class_image(job.tenant, settings, seed, &object, old);
                    if self.write(held, add).await? != object.key {
                        // Another training was first, and its row stays. Nobody else writes or names this key.
                        patiently(held, || self.blobs.delete(&key)).await?;
                    }
                    Ok::<(), Outcome>(())
                };
                if let Err(outcome) = kept.await {
                    warn!("a class image is not kept for later trainings: {}", outcome.why());
                }
            }
            Event::Shown { what, picture } => {
                let name = match what {
                    Shown::Mask(n) => Name::Mask(n, picture.format),
                    Shown::View(n) => Name::View(n, picture.format),
                    Shown::Attention(n) => Name::Attention(n, picture.format),
                    Shown::Preview(step) => Name::Preview(step, picture.format),
                };
                let kept = async {
                    let object = self.put_picture(job, held, name, &picture).await?;
                    self.write(held, || self.store.add_artifact(held.lease, &object)).await?;
                    Ok::<(), Outcome>(())
                };
                match kept.await {
                    Ok(()) => *n_images += u64::from(matches!(what, Shown::Preview(_))),
                    Err(outcome) => warn!("{name} is not kept: {}", outcome.why()),
                }
                held.images(*n_images);
            }
            Event::Checkpoint { step, file } => {
                if let Err(outcome) = self.store_checkpoint(job, held, step, &file).await {
                    warn!("the checkpoint of step {step} is not stored: {}", outcome.why());
                }
            }
        }
    }

    /// Bytes first, then the row; the file goes either way.
    async fn store_checkpoint(&self, job: &Job, held: &Held, step: u64, file: &Path) -> Result<(), Outcome> {
        let name = Name::Checkpoint(step);
        let object = self.put(job, held, name, Content::File(file), json!({ "step": step })).await;
        if let Err(error) = std::fs::remove_file(file) {
            warn!("a checkpoint's file stays in scratch: {error}");
        }
        Ok(self.commit(held, &Checkpoint { step, object: object? }).await?)
    }

    async fn store_result(
        &self,
        bundle: &str,
        job: &Job,
        held: &Held,
        trained: Trained,
        n_previews: u64,
    ) -> Result<Outcome, Outcome> {
        let _storing = phase_span(Phase::Storing, &Span::current());
        let mut storing = Progress::begin(Phase::Storing, trained.images.len() as u64 + 3);
        storing.images = n_previews;
        held.progress(storing.clone());
        let mut objects = Vec::new();
        for (i, picture) in trained.images.iter().enumerate() {
            let name = Name::Image(i, picture.format);
            objects.push(self.put_picture(job, held, name, picture).await?);
            storing.step += 1;
            storing.images += 1;
            held.progress(storing.clone());
        }
        let meta = json!({ "bundle_sha256": bundle });
        let weights = self.put(job, held, Name::Weights, Content::File(&trained.weights), meta).await?;
        let result = json!({ "bundle_sha256": bundle, "weights_sha256": weights.sha256 });
        objects.push(weights);
        if let Some(last) = &trained.last {
            let meta = json!({ "bundle_sha256": bundle });
            objects.push(self.put(job, held, Name::LastWeights, Content::File(last), meta).await?);
        }
        let written = serde_json::to_vec_pretty(&trained.report).map_err(|error| {
            Fault::new(FaultCode::Internal, format!("the report cannot be written: {error}"))
        })?;
        let written = Content::Bytes(written.into());
        objects.push(self.put(job, held, Name::Report, written, Value::Null).await?);
        let page = Content::Bytes(report::page(&trained.report, &trained.gallery).into());
        objects.push(self.put(job, held, Name::Page, page, Value::Null).await?);
        Ok(Outcome::Done { result, objects })
    }
}

/// What a training begins with.
struct Prepared {
    photos: Vec<Vec<u8>>,
    wanted: ClassImages,
    class_images: Vec<Option<Vec<u8>>>,
    /// The rows of class images that the store no longer has whole.
    unreadable: HashMap<u64, Object>,
    resume: Option<PathBuf>,
}

/// What the job's task does while the device goes on.
enum Event {
    /// A phase began.
    Phase(Phase, Instant),
    ClassImage {
        index: usize,
        png: Vec<u8>,
    },
    Shown {
        what: Shown,
        picture: Drawn,
    },
    Checkpoint {
        step: u64,
        file: PathBuf,
    },
}

/// Hears a training's beats, on the device's thread, and decides how it goes on.
struct Watcher {
    held: Arc<Held>,
    drain: CancellationToken,
    events: mpsc::UnboundedSender<Event>,
    /// Whether a checkpoint is on its way to the store: then there is no other.
    storing: Arc<AtomicBool>,
    checkpoint_every: std::time::Duration,
    checkpointed: Instant,
    pace: Pace,
    job: Span,
    /// Of the phase at hand; it ends when the next one begins.
    phase: Span,
}

impl Watcher {
    fn hear(&mut self, beat: Beat) -> Flow {
        let mut may_checkpoint = false;
        match beat {
            Beat::Progress(mut progress) => {
                may_checkpoint = progress.phase == Phase::Training && progress.step > 0;
                if self.pace.began.is_none_or(|(phase, ..)| phase != progress.phase) {
                    self.phase = phase_span(progress.phase, &self.job);
                    self.send(Event::Phase(progress.phase, clock::now()));
                }
                progress.eta_seconds = self.pace.eta(&progress);
                self.held.progress(progress);
            }
            Beat::ClassImage { index, png } => self.send(Event::ClassImage { index, png }),
            Beat::Taken { .. } => {} // the report has them all
            Beat::Shown { what, picture } => self.send(Event::Shown { what, picture }),
            Beat::Checkpoint { step, file } => {
                self.storing.store(true, Ordering::Release);
                self.send(Event::Checkpoint { step, file });
            }
        }
        if self.held.is_lost() || self.held.is_canceled() {
            return Flow::Stop;
        }
        if self.drain.is_cancelled() {
            return Flow::Pause;
        }
        let due = clock::since(self.checkpointed) >= self.checkpoint_every;
        if may_checkpoint && due && !self.storing.load(Ordering::Acquire) {
            self.checkpointed = clock::now();
            return Flow::Checkpoint;
        }
        Flow::Continue
    }

    fn send(&self, event: Event) {
        let _ = self.events.send(event); // the job's task is gone only if the process is ending
    }
}

/// A phase of a job, for traces: it takes as long as this lives.
pub(super) fn phase_span(phase: Phase, job: &Span) -> Span {
    info_span!(parent: job, "phase", phase = %phase)
}

/// How fast the phase at hand goes, and so when it ends.
#[derive(Debug, Default)]
struct Pace {
    /// The phase, when its first step was heard of, and which that was.
    began: Option<(Phase, Instant, u64)>,
}

impl Pace {
    /// Seconds to the end of the phase, from its steps so far.
    fn eta(&mut self, progress: &Progress) -> Option<f64> {
        match self.began {
            Some((phase, began, first)) if phase == progress.phase && progress.step > first => {
                let each = clock::since(began).as_secs_f64() / (progress.step - first) as f64;
                Some(each * progress.total.saturating_sub(progress.step) as f64)
            }
            Some((phase, ..)) if phase == progress.phase => None,
            _ => {
                self.began = Some((progress.phase, clock::now(), progress.step));
                None
            }
        }
    }
}
