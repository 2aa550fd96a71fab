//! What the options of a training mean for the memory, the files and the arithmetic that it takes.

use super::class_images::CLASS_IMAGE_BATCH;
use super::evaluation::TRIAL_BATCH;
use super::plan::{CLASS_IMAGE_STEPS, n_class_images, preview_steps, trial_steps};
use super::recipe::moment_format;
use crate::engine::memory::MemorySettings;
use crate::job::{Method, TrainOptions};
use crate::ml::plan::{EvaluationSizes, PerceptualSizes, TrainingSizes};
use crate::ml::train::Learner;

/// The sizes of a training.
pub(in crate::engine) fn sizes(options: &TrainOptions, settings: &MemorySettings) -> TrainingSizes {
    let (weights, until_step) = (&options.loss_weights, u64::from(options.s_p.unwrap_or(0)));
    let evaluation = &options.evaluation;
    TrainingSizes {
        learner: match options.method {
            Method::TextualInversion => Learner::Embedding,
            Method::Hypnos | Method::Dreambooth => Learner::Weights,
        },
        adamw_moments: moment_format(options.adamw_moments),
        n_steps: options.steps.into(),
        n_photos: settings.photos.0,
        photo_pixels: settings.photos.1,
        n_class_images: n_class_images(options) as usize,
        n_views: options.views.enabled.then_some(options.views.n as usize),
        perceptual: options
            .uses_perceptual()
            .then(|| PerceptualSizes { until_step, crop: options.perceptual.crop.map(|side| side as usize) }),
        discriminator: (weights.discriminator > 0.0)
            .then(|| (options.discriminator.steps.into(), 2 * options.discriminator.batch as usize)),
        evaluation: evaluation.enabled.then(|| EvaluationSizes {
            n_images: evaluation.images as usize,
            n_class_images: evaluation.class_images as usize,
            batch: settings.batch,
            steps: evaluation.steps as usize,
            trials: trial_steps(options).into_iter().collect(),
            n_trial_images: evaluation.trial_images as usize,
            trial_batch: TRIAL_BATCH,
        }),
        n_previews: preview_steps(options).len(),
        class_image_steps: CLASS_IMAGE_STEPS,
        class_image_batch: CLASS_IMAGE_BATCH,
        checkpointing: settings.checkpointing,
        precision: settings.precision,
    }
}
