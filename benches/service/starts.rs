//! How soon a job starts: on an idle worker whose engine does nothing, trainings are submitted one after the other.
//! Counted are milliseconds from the row's creation to its claim, by the database's clock.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, anyhow};
use hypnos::engine::{
    ClassImages, DrawInput, Ending, Engine, Flow, Image, ImageGenerator, Observer, TrainInput,
};
use hypnos::health::Health;
use hypnos::job::{
    Fault, FaultCode, HeldModel, Kind, ModelCard, ModelDrawing, ModelPart, Scheduler, TrainSpec,
};
use hypnos::worker;
use tokio_util::sync::CancellationToken;

use super::Service;
use super::quantiles::quantiles;

/// Submits `n` trainings to an idle worker.
pub(super) async fn starts(service: &Service, n: usize) -> Result<()> {
    let drain = CancellationToken::new();
    let settings = worker::Settings {
        database: service.database.clone(),
        lease: Duration::from_mins(1),
        heartbeat: Duration::from_secs(2),
        deadline: Duration::from_mins(10),
        poll: Duration::from_secs(1),
        checkpoint_every: Duration::from_mins(5),
        scratch: service.scratch.clone(),
        weights_bytes_max: 1 << 20,
        sample_share: 0.5,
        backoff: Duration::from_secs(5),
        drain: Duration::from_mins(1),
        host: "bench".into(),
        clock: worker::Clock::default(),
    };
    let make: worker::MakeEngine = Box::new(|| Ok(Box::new(Idle(no_model()))));
    let engines = vec![("idle".to_owned(), make)];
    let (store, blobs, stop) = (service.store.clone(), service.blobs.clone(), drain.clone());
    let work = async move { worker::run(settings, store, blobs, engines, &Health::default(), stop).await };
    let work = tokio::spawn(work);
    // First what was put there to be looked at; then one after the other.
    let mut waited: Vec<f64> = Vec::new();
    for i in 0..=n {
        let id = service.submit().await?;
        let job = loop {
            let found = service.store.find(service.tenant, id, Kind::Train).await?;
            match found {
                Some(job) if job.state.is_terminal() => break job,
                _ => tokio::time::sleep(Duration::from_millis(if i == 0 { 50 } else { 2 })).await,
            }
        };
        if let (Some(started), true) = (job.started_ms, i > 0) {
            waited.push((started - job.created_ms) as f64);
        }
    }
    drain.cancel();
    work.await?.map_err(|fault| anyhow!(fault.message))?;
    if !waited.is_empty() {
        let [median, p99, largest] = quantiles(&waited, [0.5, 0.99, 1.0]);
        println!(
            "enqueue to start, ms, of {}: median {median:.0}, p99 {p99:.0}, largest {largest:.0}",
            waited.len()
        );
    }
    Ok(())
}

/// A model that nothing is trained with.
fn no_model() -> HeldModel {
    let card = ModelCard {
        name: "none".into(),
        sha256: "none".into(),
        family: "none".into(),
        resolution: 64,
        parts: ModelPart::ALL.to_vec(),
        drawing: ModelDrawing { scheduler: Scheduler::Ddim, guidance: 7.5 },
        training: BTreeMap::new(),
        classes: None,
        rare_tokens: Some(["sks", "zwx"].map(str::to_owned).to_vec()),
    };
    HeldModel { card, words: "sks zwx".into(), memory_bytes: None }
}

/// An engine that refuses every training at once: what is measured is the way to it.
struct Idle(HeldModel);

impl ImageGenerator for Idle {
    fn batch(&self) -> usize {
        1
    }

    fn draw(
        &mut self,
        _: &DrawInput<'_>,
        _: std::ops::Range<usize>,
        _: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Image>>, Fault> {
        Ok(None)
    }

    fn probe(&mut self) -> Result<(), Fault> {
        Ok(())
    }
}

impl Engine for Idle {
    fn model(&self) -> &HeldModel {
        &self.0
    }

    fn class_images(&self, _: &TrainSpec) -> ClassImages {
        ClassImages { settings: "none".into(), seeds: Vec::new() }
    }

    fn train(&mut self, _: TrainInput<'_>, _: &mut Observer<'_>) -> Result<Ending, Fault> {
        Err(Fault::new(FaultCode::Input, "nothing is trained here"))
    }
}
