//! One training: fetches the photos, has the device train, stores checkpoints, previews and the result.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{Span, warn};

use super::artifacts::Content;
use super::context::Worker;
use super::device::{Command, Device, TrainCommand, answer};
use super::lease::LeaseHandle;
use super::outcome::Outcome;
use super::progress::{EtaEstimator, phase_span};
use super::retry::{Refused, retry_while_leased};
use super::scratch::scratch_fault;
use crate::blobs::{self, Key, Name};
use crate::clock;
use crate::engine::{ClassImages, Ending, Flow, Image, Shown, TrainEvent, Trained};
use crate::job::{Checkpoint, Fault, FaultCode, Job, Object, Phase, Progress, TrainSpec};
use crate::report::{self, PhaseTimes};

impl Worker {
    /// Trains on the job's photos and stores the result.
    pub(super) async fn train(
        &self,
        device: &Device,
        bundle: &str,
        job: &Job,
        spec: &TrainSpec,
        lease: &Arc<LeaseHandle>,
    ) -> Outcome {
        match self.try_train(device, bundle, job, spec, lease).await {
            Ok(outcome) | Err(outcome) => outcome,
        }
    }

    async fn try_train(
        &self,
        device: &Device,
        bundle: &str,
        job: &Job,
        spec: &TrainSpec,
        lease: &Arc<LeaseHandle>,
    ) -> Result<Outcome, Outcome> {
        lease.set_progress(Progress::begin(Phase::Preparing, 0));
        let preparing = phase_span(Phase::Preparing, &Span::current());
        let scratch = self.scratch_of(job)?;
        let prepared = tokio::select! {
            biased;
            prepared = self.prepare(device, job, spec, lease, scratch.path()) => prepared?,
            () = self.drain.cancelled() => return Ok(Outcome::Paused),
        };
        let Prepared { photos, wanted, class_images, unreadable, resume } = prepared;

        drop(preparing);
        let (events, mut received) = mpsc::unbounded_channel();
        let storing = Arc::new(AtomicBool::new(false));
        let mut observer = TrainingObserver {
            lease: lease.clone(),
            drain: self.drain.clone(),
            events,
            storing: storing.clone(),
            checkpoint_every: self.settings.checkpoint_every,
            checkpointed: clock::now(),
            eta: EtaEstimator::default(),
            job: Span::current(),
            phase: Span::none(),
        };
        let (reply, answered) = oneshot::channel();
        device.send(Command::Train(TrainCommand {
            spec: spec.clone(),
            job: job.id,
            photos,
            class_images,
            resume: resume.clone(),
            scratch: scratch.path().to_owned(),
            observer: Box::new(move |event| observer.observe(event)),
            device_time: lease.device_time.clone(),
            reply,
        }));
        // The observer, and with it the sender of events, is dropped when the training has ended.
        let (mut n_images, mut times) = (0, PhaseTimes::default());
        while let Some(event) = received.recv().await {
            if let Event::Phase(phase, since) = event {
                times.enter(phase, since);
                continue;
            }
            let was_checkpoint = matches!(event, Event::Checkpoint { .. });
            self.store_event(job, lease, (&wanted, &unreadable), event, &mut n_images).await;
            if was_checkpoint {
                storing.store(false, Ordering::Release);
            }
        }
        let ending = answer(answered).await.map_err(|fault| match (fault.code, resume) {
            // The checkpoint was fetched and verified: it is the scratch directory that failed.
            (FaultCode::ArtifactMissing, Some(file)) if !file.exists() => {
                scratch_fault(&std::io::ErrorKind::NotFound.into())
            }
            _ => fault,
        });
        match ending? {
            Ending::Trained(mut trained) => {
                // Of this attempt only.
                trained.report.seconds = times.seconds(clock::now());
                self.store_result(bundle, job, lease, trained, n_images).await
            }
            Ending::Stopped if lease.is_canceled() => Ok(Outcome::Canceled),
            Ending::Stopped => Ok(Outcome::Lost),
            Ending::Paused(None) => Ok(Outcome::Paused),
            Ending::Paused(Some((step, file))) => {
                self.store_checkpoint(job, lease, step, &file).await?;
                Ok(Outcome::Paused)
            }
        }
    }

    fn scratch_of(&self, job: &Job) -> Result<tempfile::TempDir, Fault> {
        let made = tempfile::Builder::new().prefix(&format!("{}-", job.id)).tempdir_in(self.scratch.path());
        made.map_err(|error| scratch_fault(&error))
    }

    /// Fetches everything that a training begins with.
    async fn prepare(
        &self,
        device: &Device,
        job: &Job,
        spec: &TrainSpec,
        lease: &LeaseHandle,
        scratch: &Path,
    ) -> Result<Prepared, Outcome> {
        let mut photos = Vec::new();
        for photo in &job.photos {
            photos.push(self.get(lease, photo).await?.to_vec());
        }
        let resume = match &job.checkpoint {
            Some(checkpoint) => self.fetch_checkpoint(lease, checkpoint, scratch).await?,
            None => None,
        };
        // Last of what may take long: from now on the device expects this training and holds samples back.
        let wanted = device.class_images(spec).await?;
        let (class_images, unreadable) = self.stored_class_images(job, lease, &wanted).await?;
        Ok(Prepared { photos, wanted, class_images, unreadable, resume })
    }

    /// The class images of earlier trainings, and the rows of those that the object store has lost or damaged: these
    /// are drawn again.
    async fn stored_class_images(
        &self,
        job: &Job,
        lease: &LeaseHandle,
        wanted: &ClassImages,
    ) -> Result<(Vec<Option<Vec<u8>>>, HashMap<u64, Object>), Outcome> {
        let (mut had, mut unreadable) = (Vec::new(), HashMap::new());
        if wanted.seeds.is_empty() {
            return Ok((had, unreadable));
        }
        let rows = self.write(lease, || self.store.class_images(job.tenant, &wanted.settings)).await?;
        let mut rows: HashMap<u64, Object> = rows.into_iter().collect();
        for seed in &wanted.seeds {
            let Some(object) = rows.remove(seed) else {
                had.push(None);
                continue;
            };
            match retry_while_leased(lease, || self.blobs.get(&object)).await {
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

    /// The file of the checkpoint to resume from; none if the object store has lost or damaged it: then the training
    /// starts again.
    async fn fetch_checkpoint(
        &self,
        lease: &LeaseHandle,
        checkpoint: &Checkpoint,
        scratch: &Path,
    ) -> Result<Option<PathBuf>, Outcome> {
        let file = scratch.join("resume.safetensors");
        let fetched = retry_while_leased(lease, || self.blobs.get_to_file(&checkpoint.object, &file)).await;
        match fetched {
            Ok(()) => Ok(Some(file)),
            Err(Refused::Error(error @ (blobs::Error::Missing | blobs::Error::Damaged))) => {
                warn!(step = checkpoint.step, %error, "checkpoint unusable; starting from the beginning");
                Ok(None)
            }
            Err(refused) => Err(refused.into()),
        }
    }

    /// Stores what a training reports on its way. A failure is logged and does not fail the training.
    async fn store_event(
        &self,
        job: &Job,
        lease: &LeaseHandle,
        (wanted, unreadable): (&ClassImages, &HashMap<u64, Object>),
        event: Event,
        n_images: &mut u64,
    ) {
        match event {
            Event::Phase(..) => {} // the caller measures the phases
            Event::ClassImage { index, png } => {
                let Some(&seed) = wanted.seeds.get(index) else { return };
                let key = Key::class_image(job.tenant, &wanted.settings, seed, lease.lease);
                let (settings, old) = (&wanted.settings, unreadable.get(&seed));
                let kept = async {
                    let object = retry_while_leased(lease, || self.blobs.put(&key, png.clone())).await?;
                    let add = || self.store.add_class_image(job.tenant, settings, seed, &object, old);
                    if self.write(lease, add).await? != object.key {
                        // Another training was first, and its row stays. No other process writes or names this key.
                        retry_while_leased(lease, || self.blobs.delete(&key)).await?;
                    }
                    Ok::<(), Outcome>(())
                };
                if let Err(outcome) = kept.await {
                    warn!(seed, reason = outcome.reason(), "class image not stored");
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
                    let object = self.put_image(job, lease, name, &picture).await?;
                    self.write(lease, || self.store.add_artifact(lease.lease, &object)).await?;
                    Ok::<(), Outcome>(())
                };
                match kept.await {
                    Ok(()) => *n_images += u64::from(matches!(what, Shown::Preview(_))),
                    Err(outcome) => warn!(%name, reason = outcome.reason(), "image not stored"),
                }
                lease.set_images(*n_images);
            }
            Event::Checkpoint { step, file } => {
                if let Err(outcome) = self.store_checkpoint(job, lease, step, &file).await {
                    warn!(step, reason = outcome.reason(), "checkpoint not stored");
                }
            }
        }
    }

    /// Stores a checkpoint: first the object, then the row. Removes the local file in any case.
    async fn store_checkpoint(
        &self,
        job: &Job,
        lease: &LeaseHandle,
        step: u64,
        file: &Path,
    ) -> Result<(), Outcome> {
        let name = Name::Checkpoint(step);
        let object = self.put(job, lease, name, Content::File(file), json!({ "step": step })).await;
        if let Err(error) = std::fs::remove_file(file) {
            warn!(step, %error, "local checkpoint file not removed");
        }
        Ok(self.commit_checkpoint(lease, &Checkpoint { step, object: object? }).await?)
    }

    async fn store_result(
        &self,
        bundle: &str,
        job: &Job,
        lease: &LeaseHandle,
        trained: Trained,
        n_previews: u64,
    ) -> Result<Outcome, Outcome> {
        let _storing = phase_span(Phase::Storing, &Span::current());
        let mut storing = Progress::begin(Phase::Storing, trained.images.len() as u64 + 3);
        storing.images = n_previews;
        lease.set_progress(storing.clone());
        let mut objects = Vec::new();
        for (i, image) in trained.images.iter().enumerate() {
            let name = Name::Image(i, image.format);
            objects.push(self.put_image(job, lease, name, image).await?);
            storing.step += 1;
            storing.images += 1;
            lease.set_progress(storing.clone());
        }
        let meta = json!({ "bundle_sha256": bundle });
        let weights = self.put(job, lease, Name::Weights, Content::File(&trained.weights), meta).await?;
        let result = json!({ "bundle_sha256": bundle, "weights_sha256": weights.sha256 });
        objects.push(weights);
        if let Some(last) = &trained.last {
            let meta = json!({ "bundle_sha256": bundle });
            objects.push(self.put(job, lease, Name::LastWeights, Content::File(last), meta).await?);
        }
        let written = trained.report.to_json().map_err(|error| {
            Fault::new(FaultCode::Internal, format!("the report cannot be written: {error}"))
        })?;
        let written = Content::Bytes(written.into());
        objects.push(self.put(job, lease, Name::Report, written, Value::Null).await?);
        let page = Content::Bytes(report::page(&trained.report, &trained.gallery).into());
        objects.push(self.put(job, lease, Name::Page, page, Value::Null).await?);
        Ok(Outcome::Done { result, objects })
    }
}

/// Everything that a training begins with.
struct Prepared {
    photos: Vec<Vec<u8>>,
    wanted: ClassImages,
    class_images: Vec<Option<Vec<u8>>>,
    /// Rows of class images that the object store has lost or damaged, by seed.
    unreadable: HashMap<u64, Object>,
    resume: Option<PathBuf>,
}

/// What the job's task handles while the device works.
enum Event {
    /// A phase began.
    Phase(Phase, Instant),
    ClassImage {
        index: usize,
        png: Vec<u8>,
    },
    Shown {
        what: Shown,
        picture: Image,
    },
    Checkpoint {
        step: u64,
        file: PathBuf,
    },
}

/// Receives the events of a training, on the device's thread, and decides how it continues.
struct TrainingObserver {
    lease: Arc<LeaseHandle>,
    drain: CancellationToken,
    events: mpsc::UnboundedSender<Event>,
    /// Whether a checkpoint is being stored: no other is taken meanwhile.
    storing: Arc<AtomicBool>,
    checkpoint_every: std::time::Duration,
    checkpointed: Instant,
    eta: EtaEstimator,
    job: Span,
    /// Span of the current phase; it ends when the next one begins.
    phase: Span,
}

impl TrainingObserver {
    fn observe(&mut self, event: TrainEvent) -> Flow {
        let mut may_checkpoint = false;
        match event {
            TrainEvent::Progress(mut progress) => {
                may_checkpoint = progress.phase == Phase::Training && progress.step > 0;
                if !self.eta.is_in(progress.phase) {
                    self.phase = phase_span(progress.phase, &self.job);
                    self.send(Event::Phase(progress.phase, clock::now()));
                }
                progress.eta_seconds = self.eta.eta(&progress);
                self.lease.set_progress(progress);
            }
            TrainEvent::ClassImage { index, png } => self.send(Event::ClassImage { index, png }),
            TrainEvent::Step { .. } => {} // the report has all steps
            TrainEvent::Shown { what, picture } => self.send(Event::Shown { what, picture }),
            TrainEvent::Checkpoint { step, file } => {
                self.storing.store(true, Ordering::Release);
                self.send(Event::Checkpoint { step, file });
            }
        }
        if self.lease.is_lost() || self.lease.is_canceled() {
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
