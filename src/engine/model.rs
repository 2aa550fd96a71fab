//! Describes an opened bundle as the model that a worker registers.

use super::base::Base;
use crate::job::{HeldModel, ModelCard, ModelDrawing, ModelPart, Scheduler};
use crate::ml::bundle::{Bundle, Capability};
use crate::ml::samplers::Sampler;
use crate::ml::{Result, device};

/// The model of an engine.
pub(super) fn held_model(base: &Base) -> Result<HeldModel> {
    let manifest = base.bundle.manifest();
    let drawing = manifest.drawing;
    let card = ModelCard {
        name: base.bundle.name(),
        sha256: base.hash().to_owned(),
        family: manifest.kind.clone(),
        resolution: base.bundle.resolution() as u32,
        parts: ModelPart::ALL.iter().copied().filter(|part| has(&base.bundle, *part)).collect(),
        drawing: ModelDrawing { scheduler: scheduler(drawing.scheduler), guidance: drawing.guidance },
        training: manifest.training.clone(),
        classes: manifest.classes.clone(),
        rare_tokens: Some(base.bundle.rare_tokens(&base.shared.tokenizer)),
    };
    let words = base.shared.tokenizer.whole_words().join(" ");
    Ok(HeldModel { card, words, memory_bytes: device::total_bytes(base.device())? })
}

fn has(bundle: &Bundle, part: ModelPart) -> bool {
    match part {
        ModelPart::Segmenter => bundle.can(Capability::Segmentation),
        ModelPart::Perceptual => bundle.can(Capability::PerceptualLoss),
        ModelPart::Metrics => bundle.can(Capability::Dino) && bundle.can(Capability::Clip),
    }
}

/// The core's sampler for a client's scheduler.
pub(super) fn sampler(scheduler: Scheduler) -> Sampler {
    match scheduler {
        Scheduler::Ddim => Sampler::Ddim,
        Scheduler::Pndm => Sampler::Pndm,
        Scheduler::Dpmpp2m => Sampler::Dpmpp2m,
        Scheduler::Dpmpp2mKarras => Sampler::Dpmpp2mKarras,
        Scheduler::Euler => Sampler::Euler,
        Scheduler::EulerA => Sampler::EulerAncestral,
    }
}

/// The reverse of [`sampler`].
fn scheduler(sampler: Sampler) -> Scheduler {
    match sampler {
        Sampler::Ddim => Scheduler::Ddim,
        Sampler::Pndm => Scheduler::Pndm,
        Sampler::Dpmpp2m => Scheduler::Dpmpp2m,
        Sampler::Dpmpp2mKarras => Scheduler::Dpmpp2mKarras,
        Sampler::Euler => Scheduler::Euler,
        Sampler::EulerAncestral => Scheduler::EulerA,
    }
}
