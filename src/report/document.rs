//! The content of a training's report, as `report.json` and the HTTP API have it.
//!
//! Reports are kept as they were written, so an earlier build's report must stay readable: unknown fields are
//! ignored, and each field that the first builds did not write is an `Option` or has a default.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::scores::{PictureScores, Protocol, Scores};
use crate::job::{Method, Phase, TrainOptions};
use crate::ml::segment::MaskStats;
use crate::ml::train::Trial;

/// How a training's result was made, and its evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// The method.
    pub method: Method,
    /// All options of the training, by the names that the version of the report has for them.
    // Not typed: `TrainOptions` refuses names that it does not know, and options may be renamed or dropped.
    #[schema(value_type = TrainOptions)]
    pub options: Value,
    /// What kind of thing the product is, such as `mug`.
    pub class_name: String,
    /// The word for the product in prompts.
    pub instance_token: String,
    /// The word for the backgrounds of the photos in prompts; null where no views were made.
    pub background_token: Option<String>,
    /// The models that were fine-tuned.
    pub bundle: BundleId,
    /// The prompts, with all words in place.
    pub prompts: Prompts,
    /// The seeds that the random numbers were derived from.
    pub seeds: Seeds,
    /// The class images of the prior preservation.
    pub class_images: ClassImageSet,
    /// The size of each photo, in order.
    pub photos: Vec<PhotoSize>,
    /// The quality of each photo's mask, in order; empty where no views were made.
    #[serde(default)]
    pub masks: Vec<MaskQuality>,
    /// Side of the squares that the model learns from and draws, in pixels.
    #[schema(minimum = 1)]
    pub resolution: u64,
    /// Optimiser steps taken.
    pub steps: u64,
    /// The step whose weights are served, counted from 1. Absent in reports of builds that did not score steps; there
    /// it is the last one.
    pub served_step: Option<u64>,
    /// The steps that were scored to choose the served one, in order.
    #[serde(default)]
    pub trials: Vec<TrialScores>,
    /// The losses over the steps.
    pub curve: LossCurve,
    /// The pictures drawn with the served weights, the prompt-invariant ones first.
    pub images: Vec<ReportImage>,
    /// The scores of those pictures; null where nothing was evaluated.
    pub evaluation: Option<Scores>,
    /// The version of the program that trained.
    #[serde(rename = "hypnos")]
    pub version: Option<String>,
    /// What the models computed in: `f32`, `tf32` or `bf16`; several with commas between them, the first one first, if the
    /// training was resumed in another. Absent in reports of builds that computed in f32 alone.
    // Not typed: a later build may know others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// What may limit the quality of the result, one sentence each.
    pub warnings: Vec<String>,
    /// Seconds that each phase took, to the millisecond. Of the last attempt only, without storing the result; phases
    /// that were not entered are absent.
    #[serde(default)]
    pub seconds: BTreeMap<Phase, f64>,
}

impl Report {
    /// The text of `report.json`: indented, the keys of each object in alphabetical order, no line break at the end.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(&serde_json::to_value(self)?) // a `Value` sorts its keys
    }
}

/// Identifies a bundle of models.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BundleId {
    /// Its name.
    pub name: String,
    /// SHA-256 of the bundle, in lower-case hexadecimal.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    pub sha256: String,
}

/// The prompts of a training.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Prompts {
    /// Of the product's pictures that were learned from: each one once, sorted.
    pub instance: Vec<String>,
    /// Of the class images; null where there were none.
    pub class: Option<String>,
    /// Of the previews.
    pub preview: String,
}

/// The seeds of a training.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Seeds {
    /// Of the training.
    pub training: u64,
    /// Of each preview.
    pub preview: u64,
    /// Of the first picture of the evaluation; the others count up from it.
    pub evaluation: Option<u64>,
    /// Of the first picture of each trial; the others count up from it.
    pub trial: Option<u64>,
}

/// The class images of a training.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClassImageSet {
    /// SHA-256 of all settings that they depend on besides their seeds, in lower-case hexadecimal.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    pub settings_sha256: String,
    /// The seed of each.
    pub seeds: Vec<u64>,
}

/// The size of a photo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhotoSize {
    /// Pixels, upright.
    #[schema(minimum = 1)]
    pub width: u32,
    /// Pixels, upright.
    #[schema(minimum = 1)]
    pub height: u32,
}

/// The quality of a mask that separates the product from its background.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MaskQuality {
    /// Share of the photo that is foreground, 0 to 1.
    pub area: f64,
    /// Sides of the photo that the foreground touches: `left`, `right`, `top`, `bottom`.
    pub touches: Vec<String>,
    /// Separate objects in the foreground.
    pub things: u64,
    /// Mean of `|2 p - 1|` over all pixels, where `p` is a pixel's probability of being foreground: 1 where every
    /// pixel is certain.
    pub confidence: f64,
}

impl From<&MaskStats> for MaskQuality {
    fn from(stats: &MaskStats) -> Self {
        Self {
            area: stats.area,
            touches: stats.touches.iter().map(|&side| side.to_owned()).collect(),
            things: stats.things as u64,
            confidence: stats.confidence,
        }
    }
}

/// The scores of one step, by which the served step is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TrialScores {
    /// The step, counted from 1.
    pub step: u64,
    /// Similarity to the photos, as a share of the photos' similarity among themselves.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub likeness: f64,
    /// Adherence to prompts, as a share of the untrained model's.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub adherence: f64,
    /// The harmonic mean of both. The step with the highest score is served; of equals, the latest.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub score: f64,
}

impl From<&Trial> for TrialScores {
    fn from(trial: &Trial) -> Self {
        Self {
            step: trial.step,
            likeness: trial.likeness.into(),
            adherence: trial.adherence.into(),
            score: trial.score().into(),
        }
    }
}

/// The losses over the steps, at most 500 points. Each point is the mean over an equal number of steps, the last over
/// what remains. All lists have one entry for each point; null where no step of the point computed the value. Losses
/// are unweighted but for `loss`. Equations are those of arXiv 2410.14265.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LossCurve {
    /// The last step of each point, counted from 1.
    pub step: Vec<u64>,
    /// The weighted sum of the losses (eq. 1).
    pub loss: Vec<Option<f64>>,
    /// Euclidean norm of all gradients together, before clipping.
    pub grad_norm: Vec<Option<f64>>,
    /// The reconstruction loss (eq. 2).
    pub reconstruction: Vec<Option<f64>>,
    /// The prior preservation loss (eq. 4).
    pub prior: Vec<Option<f64>>,
    /// The perceptual loss (eq. 5).
    pub perceptual: Vec<Option<f64>>,
    /// The adversarial loss (eq. 7).
    pub adversarial: Vec<Option<f64>>,
    /// The discriminator's own loss.
    #[serde(rename = "critic")]
    pub discriminator: Vec<Option<f64>>,
    /// Share of the reconstruction's elements whose exponent was cut, 0 to 1.
    pub cut: Vec<Option<f64>>,
}

/// A picture drawn with the served weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReportImage {
    /// The prompt as the model read it.
    pub prompt: String,
    /// The seed that draws it again.
    pub seed: u64,
    /// The protocol of the evaluation that it belongs to.
    pub protocol: Option<Protocol>,
    /// Its own scores; null where nothing was evaluated.
    pub fidelity: Option<PictureScores>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A report of the first build that scored steps, shortened: a hypnos training of four steps on one photo.
    const REPORT: &str = r#"{
        "background_token": "olis",
        "bundle": { "name": "miniature", "sha256": "00" },
        "class_images": { "seeds": [0, 1], "settings_sha256": "01" },
        "class_name": "mug",
        "curve": {
            "adversarial": [null, 0.5], "critic": [null, 0.25], "cut": [0.0, 0.0], "grad_norm": [1.5, 1.25],
            "loss": [2.5, 2.0], "perceptual": [null, null], "prior": [0.5, 0.5], "reconstruction": [2.0, 1.5],
            "step": [2, 4]
        },
        "evaluation": {
            "div": {
                "backbone": null, "better": "higher", "n": 0, "note": "no two pictures of one prompt", "of": "pairs",
                "range": [0.0, null], "value": null
            },
            "n_photos": 1, "pairing": "every picture with every photo",
            "pictures": [{ "clip_i": null, "clip_t": 0.25, "dino": 0.75 }],
            "pres": {
                "backbone": { "name": "dino_vits16", "sha256": "02" }, "better": "lower", "n": 2, "note": null,
                "of": "pairs", "range": [-1.0, 1.0], "value": 0.5
            },
            "prompt_invariant": null, "prompt_varying": null,
            "real": {
                "clip_i": {
                    "backbone": null, "better": "higher", "n": 0, "note": "needs 2 photos at least", "of": "pairs",
                    "range": [-1.0, 1.0], "value": null
                },
                "dino": {
                    "backbone": null, "better": "higher", "n": 0, "note": "needs 2 photos at least", "of": "pairs",
                    "range": [-1.0, 1.0], "value": null
                }
            }
        },
        "hypnos": "0.1.0",
        "images": [{
            "fidelity": { "clip_i": null, "clip_t": 0.25, "dino": 0.75 }, "prompt": "a photo of sks mug",
            "protocol": "prompt_invariant", "seed": 9
        }],
        "instance_token": "sks",
        "masks": [{ "area": 0.25, "confidence": 0.875, "things": 1, "touches": ["left"] }],
        "method": "hypnos",
        "options": { "seed": null, "steps": 4 },
        "photos": [{ "height": 80, "width": 96 }],
        "prompts": {
            "class": "a photo of mug", "instance": ["a photo of sks mug, olis background"],
            "preview": "a photo of sks mug"
        },
        "resolution": 64,
        "seconds": { "class_images": 1.5, "training": 2.125 },
        "seeds": { "evaluation": 3, "preview": 2, "trial": 4, "training": 1 },
        "served_step": 2,
        "steps": 4,
        "trials": [{ "adherence": 0.5, "likeness": 0.5, "score": 0.5, "step": 2 }],
        "warnings": ["no class images"]
    }"#;

    fn value(text: &str) -> Value {
        serde_json::from_str(text).expect("JSON")
    }

    #[test]
    fn a_report_is_written_with_the_keys_the_nulls_and_the_order_of_earlier_builds() {
        let report: Report = serde_json::from_str(REPORT).expect("a report");
        let sorted = serde_json::to_string_pretty(&value(REPORT)).expect("JSON");
        assert_eq!(report.to_json().expect("JSON"), sorted);
    }

    #[test]
    fn a_report_from_before_steps_were_scored_and_one_of_a_later_build_can_be_read() {
        let mut old = value(REPORT);
        let fields = old.as_object_mut().expect("an object");
        for added_since in ["evaluation", "hypnos", "masks", "seconds", "served_step", "trials"] {
            fields.remove(added_since).expect("a field");
        }
        fields["seeds"] = json!({ "preview": 2, "training": 1 });
        fields["images"] = json!([{ "prompt": "a photo of sks mug", "seed": 9 }]);
        fields["options"]["an_option_that_was_dropped"] = json!(1);
        let report: Report = serde_json::from_value(old).expect("a report");
        assert_eq!((report.served_step, report.steps, report.evaluation), (None, 4, None));
        assert_eq!(report.precision, None);
        assert_eq!((report.images[0].protocol, report.seeds.trial), (None, None));
        assert!(report.trials.is_empty() && report.seconds.is_empty() && report.masks.is_empty());
        assert_eq!(report.options["an_option_that_was_dropped"], 1);

        let mut later = value(REPORT);
        later["a_field_of_a_later_build"] = json!({ "a": 1 });
        later["bundle"]["another"] = json!([]);
        let report: Report = serde_json::from_value(later).expect("a report");
        assert_eq!(report, serde_json::from_str(REPORT).expect("a report"));
    }
}
