//! One sample: fetches the training's weights, has the device draw, stores the images.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use serde_json::json;
use tokio::sync::oneshot;
use tracing::{Span, warn};

use super::cache::Pinned;
use super::context::Worker;
use super::device::{Command, Device, DrawCommand, answer};
use super::lease::LeaseHandle;
use super::outcome::Outcome;
use super::progress::phase_span;
use super::retry::retry_while_leased;
use crate::blobs::Name;
use crate::engine::Image;
use crate::job::{
    Fault, FaultCode, Job, Kind, Object, Phase, Progress, SampleSpec, Spec, TrainSpec, WEIGHTS,
};
use crate::store::Claim;

impl Worker {
    /// Draws a sample. `left` is set to the number of images that no batch was begun for.
    pub(super) async fn sample(
        &self,
        device: &Device,
        claim: &Claim,
        spec: &SampleSpec,
        left: Arc<AtomicUsize>,
        lease: &Arc<LeaseHandle>,
    ) -> Outcome {
        match self.try_sample(device, claim, spec, left, lease).await {
            Ok(outcome) | Err(outcome) => outcome,
        }
    }

    async fn try_sample(
        &self,
        device: &Device,
        claim: &Claim,
        spec: &SampleSpec,
        left: Arc<AtomicUsize>,
        lease: &Arc<LeaseHandle>,
    ) -> Result<Outcome, Outcome> {
        let job = &claim.job;
        lease.set_progress(Progress::begin(Phase::Preparing, 0));
        let mut is_second_try = false;
        let (weights, drawn) = loop {
            let preparing = phase_span(Phase::Preparing, &Span::current());
            let prepared = tokio::select! {
                biased;
                prepared = self.weights(job, lease) => prepared?,
                () = self.drain.cancelled() => return Ok(Outcome::Paused),
            };
            drop(preparing);
            let (train, weights, file) = prepared;
            let drawn = self.draw(device, claim, spec, left.clone(), lease, train, &weights, &file).await;
            match drawn {
                // The weights were verified when they were fetched: the local file is probably gone or damaged since.
                Err(fault) if fault.code == FaultCode::ArtifactMissing && !is_second_try => {
                    warn!(fault = fault.message, "cached weights unusable; fetching them again");
                    file.discard();
                    is_second_try = true;
                }
                drawn => break (weights, drawn?),
            }
        };
        let Some(images) = drawn else {
            // Interrupted by shutdown, it begins again elsewhere.
            let otherwise = if lease.is_lost() { Outcome::Lost } else { Outcome::Paused };
            return Ok(if lease.is_canceled() { Outcome::Canceled } else { otherwise });
        };

        let _storing = phase_span(Phase::Storing, &Span::current());
        let mut storing = Progress::begin(Phase::Storing, images.len() as u64);
        let mut objects = Vec::new();
        for (i, image) in images.iter().enumerate() {
            lease.set_progress(storing.clone());
            let name = Name::Image(i, image.format);
            objects.push(self.put_image(job, lease, name, image).await?);
            storing.step += 1;
            storing.images += 1;
        }
        lease.set_progress(storing);
        Ok(Outcome::Done { result: json!({ "weights_sha256": weights.sha256 }), objects })
    }

    /// Has the device draw. `None` if the sample is no longer wanted, or not on this worker.
    #[allow(clippy::too_many_arguments)]
    async fn draw(
        &self,
        device: &Device,
        claim: &Claim,
        spec: &SampleSpec,
        left: Arc<AtomicUsize>,
        lease: &Arc<LeaseHandle>,
        train: TrainSpec,
        weights: &Object,
        file: &Pinned,
    ) -> Result<Option<Vec<Image>>, Fault> {
        let _drawing = phase_span(Phase::Drawing, &Span::current()); // includes the wait for the device
        let (reply, answered) = oneshot::channel();
        let (watched, wanted, drain) = (lease.clone(), lease.clone(), self.drain.clone());
        device.send(Command::Draw(DrawCommand {
            spec: spec.clone(),
            train,
            weights: file.path().to_owned(),
            weights_sha256: weights.sha256.clone(),
            train_job: claim.job.parent,
            turn: claim.turn,
            weight: claim.weight,
            left,
            on_step: Box::new(move |step, total| {
                let mut progress = Progress::begin(Phase::Drawing, total);
                progress.step = step;
                watched.set_progress(progress);
            }),
            is_wanted: Box::new(move || !(wanted.is_lost() || wanted.is_canceled() || drain.is_cancelled())),
            device_time: lease.device_time.clone(),
            reply,
        }));
        answer(answered).await
    }

    /// The sample's training, its weights, and their pinned local file.
    async fn weights(&self, job: &Job, lease: &LeaseHandle) -> Result<(TrainSpec, Object, Pinned), Outcome> {
        let (train, weights) = self.trained(job, lease).await?;
        let file = retry_while_leased(lease, || self.weights.file(&self.blobs, &weights)).await?;
        Ok((train, weights, file))
    }

    /// The sample's training and its weights.
    async fn trained(&self, job: &Job, lease: &LeaseHandle) -> Result<(TrainSpec, Object), Outcome> {
        let gone = || Fault::new(FaultCode::ArtifactMissing, "the training it draws with was deleted");
        let parent = job.parent.ok_or_else(gone)?;
        let row =
            self.write(lease, || self.store.find(job.tenant, parent, Kind::Train)).await?.ok_or_else(gone)?;
        let Ok(Spec::Train(train)) = row.spec() else { return Err(gone().into()) };
        let weights = self.write(lease, || self.store.artifact(job.tenant, parent, WEIGHTS)).await?;
        Ok((*train, weights.ok_or_else(gone)?))
    }
}
