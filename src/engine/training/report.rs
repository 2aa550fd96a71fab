//! What is told of a training when it is done.

use image::RgbImage;
use serde_json::{Value, json};

use super::evaluation::EvaluationOutput;
use super::session::Session;
use crate::ml::train::{State, StepMetrics, TrainingData};

/// Points of a curve.
const CURVE_POINTS: usize = 500;

impl Session<'_, '_> {
    pub(super) fn report(
        &self,
        state: &State,
        photos: &[RgbImage],
        material: &TrainingData,
        judged: &EvaluationOutput,
    ) -> Value {
        let (plan, recipe) = (&self.plan, &self.plan.recipe);
        let mut instance_prompts: Vec<&str> =
            material.instances.iter().map(|one| one.prompt.as_str()).collect();
        instance_prompts.sort_unstable();
        instance_prompts.dedup();
        let trials: Vec<Value> = (state.trials().iter())
            .map(|trial| {
                json!({"step": trial.step, "likeness": trial.likeness, "adherence": trial.adherence, "score": trial.score()})
            })
            .collect();
        json!({
            "method": self.input.spec.options.method,
            "options": self.input.spec.options,
            "class_name": recipe.product.class_name,
            "instance_token": recipe.product.token,
            "background_token": recipe.views.as_ref().map(|views| &views.background_token),
            "bundle": {"name": self.base.bundle.manifest().name, "sha256": self.base.hash()},
            "prompts": {
                "instance": instance_prompts,
                "class": (recipe.n_class_images > 0).then(|| recipe.class_prompt()),
                "preview": recipe.photo_prompt(),
            },
            "seeds": {
                "training": recipe.seed,
                "preview": plan.preview_seed,
                "evaluation": plan.evaluation_seed,
                "trial": plan.trial_seed,
            },
            "class_images": {"settings_sha256": plan.class_images.settings, "seeds": plan.class_images.seeds},
            "photos": photos.iter().map(|photo| json!({"width": photo.width(), "height": photo.height()})).collect::<Vec<_>>(),
            "masks": plan.masks,
            "resolution": self.base.bundle.resolution(),
            "steps": state.n_steps(),
            "served_step": state.served_step(),
            "trials": trials,
            "curve": curve(state.history()),
            "images": judged.said,
            "evaluation": judged.evaluation,
            "hypnos": env!("CARGO_PKG_VERSION"),
            "warnings": plan.warnings,
        })
    }
}

/// Every number of the steps, each point the mean of equally many of them, named by the last; null where none of them
/// has it.
fn curve(history: &[StepMetrics]) -> Value {
    let points = history.chunks(history.len().div_ceil(CURVE_POINTS).max(1));
    let mean = |points: &[StepMetrics], of: fn(&StepMetrics) -> f32| {
        let values: Vec<f64> =
            points.iter().map(|taken| f64::from(of(taken))).filter(|v| v.is_finite()).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let mut last = 0;
    let steps: Vec<usize> = (points.clone())
        .map(|point| {
            last += point.len();
            last
        })
        .collect();
    let column =
        |of: fn(&StepMetrics) -> f32| -> Value { points.clone().map(|point| mean(point, of)).collect() };
    let columns = StepMetrics::COLUMNS.iter().map(|&(name, of)| (name.to_owned(), column(of)));
    Value::Object(std::iter::once(("step".to_owned(), json!(steps))).chain(columns).collect())
}
