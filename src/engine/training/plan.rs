//! What a training decides before it computes anything: recipe, steps with previews and trials, seeds, warnings.

use std::collections::BTreeSet;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::recipe::{recipe, templates};
use crate::engine::api::ClassImages;
use crate::engine::base::Base;
use crate::engine::faults::fault;
use crate::job::{Fault, FaultCode, SEED_MAX, TrainOptions, TrainSpec};
use crate::ml::precision::Precision;
use crate::ml::random;
use crate::ml::tokenizer::Tokenizer;
use crate::ml::train::{Learner, Recipe};
use crate::report::MaskQuality;

/// Steps of a class image's sampler: a quick one, for there are many of them.
pub(super) const CLASS_IMAGE_STEPS: usize = 25;

/// All that is decided before anything is computed, and what is noted on the way.
pub(super) struct Plan {
    pub(super) recipe: Recipe,
    pub(super) class_images: ClassImages,
    /// Steps after which a preview is drawn.
    pub(super) preview_steps: BTreeSet<u64>,
    /// Steps after which a few images are scored.
    pub(super) trial_steps: BTreeSet<u64>,
    pub(super) preview_seed: u64,
    pub(super) evaluation_seed: u64,
    pub(super) trial_seed: u64,
    pub(super) warnings: Vec<String>,
    /// The quality of each photo's mask.
    pub(super) masks: Vec<MaskQuality>,
    /// Hash of all models that are learned with.
    pub(super) learned_with: String,
}

impl Plan {
    pub(super) fn new(base: &Base, spec: &TrainSpec) -> Result<Self, Fault> {
        for steps in [CLASS_IMAGE_STEPS, spec.options.evaluation.steps as usize] {
            let checked = base.drawing(steps).check(&base.shared);
            checked.map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
        }
        let class_images = class_images(base, spec);
        let tokenizer = &base.shared.tokenizer;
        let recipe = recipe(&base.bundle, tokenizer, spec, class_images.seeds.len())?;
        let warnings = warnings(&recipe, tokenizer);
        let learned_with = base.bundle.learning_hash().map_err(fault)?;
        let seed = |label: &str| random::derive(spec.seed, label) & SEED_MAX;
        Ok(Self {
            recipe,
            class_images,
            preview_steps: preview_steps(&spec.options),
            trial_steps: trial_steps(&spec.options),
            preview_seed: seed("preview"),
            evaluation_seed: seed("evaluation"),
            trial_seed: seed("trial"),
            warnings,
            masks: Vec::new(),
            learned_with,
        })
    }
}

/// The class images that a training of `spec` wants.
pub(in crate::engine) fn class_images(base: &Base, spec: &TrainSpec) -> ClassImages {
    let drawing = base.drawing(CLASS_IMAGE_STEPS);
    let mut decides = json!({
        "bundle": base.hash(), "prompt": templates(spec).of_class(&spec.class_name), "negative": "",
        "sampler": drawing.sampler.name(), "steps": drawing.steps, "guidance": drawing.guidance,
        "width": drawing.width, "height": drawing.height,
    });
    if base.shared.precision != Precision::F32 {
        decides["precision"] = json!(base.shared.precision);
    }
    let settings = format!("{:x}", Sha256::digest(decides.to_string()));
    // Seeds of no training's own, so that the next one finds these images drawn.
    ClassImages { settings, seeds: (0..u64::from(n_class_images(&spec.options))).collect() }
}

/// How many those are.
pub(super) fn n_class_images(options: &TrainOptions) -> u32 {
    if options.loss_weights.prior > 0.0 { options.class_images } else { 0 }
}

/// Steps after which a preview is drawn.
pub(super) fn preview_steps(options: &TrainOptions) -> BTreeSet<u64> {
    // Assumption: three looks on the way are enough to see whether it is worth waiting.
    let quarters = || [1, 2, 3].map(|quarter| options.steps * quarter / 4).to_vec();
    steps_of(options, options.previews.clone().unwrap_or_else(quarters))
}

/// Steps after which a few images are scored.
pub(super) fn trial_steps(options: &TrainOptions) -> BTreeSet<u64> {
    // Assumption: a model that learned too much is past its best somewhere in the second half.
    let halves = || vec![options.steps / 2, options.steps * 3 / 4, options.steps];
    steps_of(options, options.evaluation.trials.clone().unwrap_or_else(halves))
}

/// Those at which anything can be drawn.
fn steps_of(options: &TrainOptions, steps: Vec<u32>) -> BTreeSet<u64> {
    let drawn = steps.into_iter().filter(|&step| step > 0 && options.evaluation.enabled);
    drawn.map(u64::from).collect()
}

/// What may surprise whoever asked for this.
fn warnings(recipe: &Recipe, tokenizer: &Tokenizer) -> Vec<String> {
    let mut warnings = Vec::new();
    let prompt =
        recipe.views.as_ref().map_or_else(|| recipe.photo_prompt(), |_| recipe.view_prompt("purple"));
    let (n_tokens, room) = (tokenizer.count(&prompt), tokenizer.length() - 2);
    if n_tokens > room {
        warnings.push(format!(
            "class_name: its end is ignored; prompts have room for {room} tokens, this has {n_tokens}"
        ));
    }
    if recipe.n_class_images == 0 && recipe.learner == Learner::Weights {
        warnings.push("no class images: every object of the class may come to look like the product".into());
    }
    warnings
}
