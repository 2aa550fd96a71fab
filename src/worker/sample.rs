//! The story of one sample, from its row to its pictures.

use std::sync::Arc;

use serde_json::json;
use tokio::sync::oneshot;
use tracing::Span;

use super::Worker;
use super::device::{Device, DrawOrder, Order, reply};
use super::lease::Held;
use super::settle::{Outcome, patiently};
use super::train::phase_span;
use crate::blobs::Name;
use crate::engine::Flow;
use crate::job::{
    Fault, FaultCode, Job, Kind, Object, Phase, Progress, SampleSpec, Spec, TrainSpec, WEIGHTS,
};

impl Worker {
    /// Prompts to pictures.
    pub(super) async fn sample(
        &self,
        device: &Device,
        job: &Job,
        spec: &SampleSpec,
        held: &Arc<Held>,
    ) -> Outcome {
        match self.try_sample(device, job, spec, held).await {
            Ok(outcome) | Err(outcome) => outcome,
        }
    }

    async fn try_sample(
        &self,
        device: &Device,
        job: &Job,
        spec: &SampleSpec,
        held: &Arc<Held>,
    ) -> Result<Outcome, Outcome> {
        held.progress(Progress::begin(Phase::Preparing, 0));
        let preparing = phase_span(Phase::Preparing, &Span::current());
        let (train, weights) = self.trained(job, held).await?;
        let file = patiently(held, || self.weights.file(&self.blobs, &weights)).await?;

        drop(preparing);
        let drawing = phase_span(Phase::Drawing, &Span::current()); // what it waits for the device included
        let (sender, answer) = oneshot::channel();
        let watched = held.clone();
        device.send(Order::Draw(DrawOrder {
            spec: spec.clone(),
            train,
            weights: file,
            weights_sha256: weights.sha256.clone(),
            watch: Box::new(move |step, total| {
                let mut progress = Progress::begin(Phase::Drawing, total);
                progress.step = step;
                watched.progress(progress);
                if watched.is_lost() || watched.is_canceled() { Flow::Stop } else { Flow::Continue }
            }),
            reply: sender,
        }));
        let Some(pictures) = reply(answer).await? else {
            return Ok(if held.is_canceled() { Outcome::Canceled } else { Outcome::Lost });
        };

        drop(drawing);
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
