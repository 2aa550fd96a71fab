//! The story of one sample, from its row to its pictures.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use serde_json::json;
use tokio::sync::oneshot;
use tracing::{Span, warn};

use super::Worker;
use super::cache::Pinned;
use super::device::{Device, DrawOrder, Order, reply};
use super::lease::Held;
use super::settle::{Outcome, patiently};
use super::train::phase_span;
use crate::blobs::Name;
use crate::engine::Drawn;
use crate::job::{
    Fault, FaultCode, Job, Kind, Object, Phase, Progress, SampleSpec, Spec, TrainSpec, WEIGHTS,
};
use crate::store::Claim;

impl Worker {
    /// Prompts to pictures. `left` hears how many of them no batch was begun for.
    pub(super) async fn sample(
        &self,
        device: &Device,
        claim: &Claim,
        spec: &SampleSpec,
        left: Arc<AtomicUsize>,
        held: &Arc<Held>,
    ) -> Outcome {
        match self.try_sample(device, claim, spec, left, held).await {
            Ok(outcome) | Err(outcome) => outcome,
        }
    }

    async fn try_sample(
        &self,
        device: &Device,
        claim: &Claim,
        spec: &SampleSpec,
        left: Arc<AtomicUsize>,
        held: &Arc<Held>,
    ) -> Result<Outcome, Outcome> {
        let job = &claim.job;
        held.progress(Progress::begin(Phase::Preparing, 0));
        let mut is_second_try = false;
        let (weights, drawn) = loop {
            let preparing = phase_span(Phase::Preparing, &Span::current());
            let prepared = tokio::select! {
                biased;
                prepared = self.weights(job, held) => prepared?,
                () = self.drain.cancelled() => return Ok(Outcome::Paused),
            };
            drop(preparing);
            let (train, weights, file) = prepared;
            let drawn = self.draw(device, claim, spec, left.clone(), held, train, &weights, &file).await;
            match drawn {
                // They were verified when they were fetched: more likely the local file is gone or spoiled since.
                Err(fault) if fault.code == FaultCode::ArtifactMissing && !is_second_try => {
                    warn!(
                        "the local copy of the weights cannot be used, and is fetched again: {}",
                        fault.message
                    );
                    file.discard();
                    is_second_try = true;
                }
                drawn => break (weights, drawn?),
            }
        };
        let Some(pictures) = drawn else {
            // Told to drain, it is begun anew elsewhere.
            let otherwise = if held.is_lost() { Outcome::Lost } else { Outcome::Paused };
            return Ok(if held.is_canceled() { Outcome::Canceled } else { otherwise });
        };

        let _storing = phase_span(Phase::Storing, &Span::current());
        let mut storing = Progress::begin(Phase::Storing, pictures.len() as u64);
        let mut objects = Vec::new();
        for (i, picture) in pictures.iter().enumerate() {
            held.progress(storing.clone());
            let name = Name::Image(i, picture.format);
            objects.push(self.put_picture(job, held, name, picture).await?);
            storing.step += 1;
            storing.images += 1;
        }
        held.progress(storing);
        Ok(Outcome::Done { result: json!({ "weights_sha256": weights.sha256 }), objects })
    }

    /// Has the device draw. `None` if the sample is not wanted any more, or not here.
    #[allow(clippy::too_many_arguments)]
    async fn draw(
        &self,
        device: &Device,
        claim: &Claim,
        spec: &SampleSpec,
        left: Arc<AtomicUsize>,
        held: &Arc<Held>,
        train: TrainSpec,
        weights: &Object,
        file: &Pinned,
    ) -> Result<Option<Vec<Drawn>>, Fault> {
        let _drawing = phase_span(Phase::Drawing, &Span::current()); // what it waits for the device included
        let (sender, answer) = oneshot::channel();
        let (watched, wanted, drain) = (held.clone(), held.clone(), self.drain.clone());
        device.send(Order::Draw(DrawOrder {
            spec: spec.clone(),
            train,
            weights: file.path().to_owned(),
            weights_sha256: weights.sha256.clone(),
            turn: claim.turn,
            weight: claim.weight,
            left,
            watch: Box::new(move |step, total| {
                let mut progress = Progress::begin(Phase::Drawing, total);
                progress.step = step;
                watched.progress(progress);
            }),
            is_wanted: Box::new(move || !(wanted.is_lost() || wanted.is_canceled() || drain.is_cancelled())),
            meter: held.meter.clone(),
            reply: sender,
        }));
        reply(answer).await
    }

    /// The training that the sample draws with, its weights, and where they lie, for as long as they are looked at.
    async fn weights(&self, job: &Job, held: &Held) -> Result<(TrainSpec, Object, Pinned), Outcome> {
        let (train, weights) = self.trained(job, held).await?;
        let file = patiently(held, || self.weights.file(&self.blobs, &weights)).await?;
        Ok((train, weights, file))
    }

    /// The training that the sample draws with, and its weights.
    async fn trained(&self, job: &Job, held: &Held) -> Result<(TrainSpec, Object), Outcome> {
        let gone = || Fault::new(FaultCode::ArtifactMissing, "the training it draws with was deleted");
        let parent = job.parent.ok_or_else(gone)?;
        let row =
            self.write(held, || self.store.find(job.tenant, parent, Kind::Train)).await?.ok_or_else(gone)?;
        let Ok(Spec::Train(train)) = row.spec() else { return Err(gone().into()) };
        let weights = self.write(held, || self.store.artifact(job.tenant, parent, WEIGHTS)).await?;
        Ok((*train, weights.ok_or_else(gone)?))
    }
}
