//! Builds the report of a finished training.

use std::collections::BTreeMap;

use image::RgbImage;
use serde_json::json;

use super::evaluation::EvaluationOutput;
use super::session::Session;
use crate::ml::precision::Precision;
use crate::ml::train::{State, StepMetrics, TrainingData};
use crate::report::{BundleId, ClassImageSet, LossCurve, PhotoSize, Prompts, Report, Seeds, TrialScores};

/// Most points of a curve.
const CURVE_POINTS: usize = 500;

impl Session<'_, '_> {
    /// The report, but for the seconds of each phase.
    pub(super) fn report(
        &self,
        state: &State,
        photos: &[RgbImage],
        material: &TrainingData,
        output: &EvaluationOutput,
    ) -> Report {
        let (plan, recipe) = (&self.plan, &self.plan.recipe);
        Report {
            method: self.input.spec.options.method,
            options: json!(self.input.spec.options),
            class_name: recipe.product.class_name.clone(),
            instance_token: recipe.product.token.clone(),
            background_token: recipe.views.as_ref().map(|views| views.background_token.clone()),
            bundle: BundleId {
                name: self.base.bundle.manifest().name.clone(),
                sha256: self.base.hash().to_owned(),
            },
            prompts: Prompts {
                instance: instance_prompts(material),
                class: (recipe.n_class_images > 0).then(|| recipe.class_prompt()),
                preview: recipe.photo_prompt(),
            },
            seeds: Seeds {
                training: recipe.seed,
                preview: plan.preview_seed,
                evaluation: Some(plan.evaluation_seed),
                trial: Some(plan.trial_seed),
            },
            class_images: ClassImageSet {
                settings_sha256: plan.class_images.settings.clone(),
                seeds: plan.class_images.seeds.clone(),
            },
            photos: (photos.iter())
                .map(|photo| PhotoSize { width: photo.width(), height: photo.height() })
                .collect(),
            masks: plan.masks.clone(),
            resolution: self.base.bundle.resolution() as u64,
            steps: state.n_steps(),
            served_step: Some(state.served_step()),
            trials: state.trials().iter().map(TrialScores::from).collect(),
            curve: curve(state.history()),
            images: output.said.clone(),
            evaluation: output.evaluation.clone(),
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            precision: Some(Precision::names(state.precisions())),
            warnings: plan.warnings.clone(),
            seconds: BTreeMap::new(), // the engine has no clock
        }
    }
}

/// The prompts of the product's pictures, sorted, each once.
fn instance_prompts(material: &TrainingData) -> Vec<String> {
    let mut prompts: Vec<String> = material.instances.iter().map(|one| one.prompt.clone()).collect();
    prompts.sort_unstable();
    prompts.dedup();
    prompts
}

/// At most [`CURVE_POINTS`] points, each the mean of equally many steps (the last of what remains) and named by its
/// last step; null where no step of the point computed the value.
fn curve(history: &[StepMetrics]) -> LossCurve {
    let points = history.chunks(history.len().div_ceil(CURVE_POINTS).max(1));
    let mean = |point: &[StepMetrics], of: fn(&StepMetrics) -> f32| {
        let values: Vec<f64> =
            point.iter().map(|step| f64::from(of(step))).filter(|value| value.is_finite()).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let means = |of: fn(&StepMetrics) -> f32| points.clone().map(|point| mean(point, of)).collect();
    let last_step = |last: &mut u64, point: &[StepMetrics]| {
        *last += point.len() as u64;
        Some(*last)
    };
    LossCurve {
        step: points.clone().scan(0, last_step).collect(),
        loss: means(|step| step.loss),
        grad_norm: means(|step| step.grad_norm),
        reconstruction: means(|step| step.reconstruction),
        prior: means(|step| step.prior),
        perceptual: means(|step| step.perceptual),
        adversarial: means(|step| step.adversarial),
        discriminator: means(|step| step.discriminator),
        cut: means(|step| step.cut),
    }
}
