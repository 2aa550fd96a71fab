//! Models that workers hold: what each can do, and the training options that suit it.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::checks::Invalid;
use super::options::{Scheduler, TrainOptions};
use super::string_enum::string_enum;

string_enum!(
    /// Parts of a model that only some uses need.
    ModelPart {
        /// Finds the product in photos: needed to make views.
        Segmenter = "segmenter",
        /// Compares decoded pictures: needed by the perceptual loss.
        Perceptual = "perceptual",
        /// Scores pictures: needed to evaluate a training and to serve its best step.
        Metrics = "metrics",
    }
);

impl ModelPart {
    /// What the database has for it; a set of parts is a sum.
    fn bit(self) -> i64 {
        match self {
            Self::Segmenter => 1,
            Self::Perceptual => 2,
            Self::Metrics => 4,
        }
    }

    /// A set of parts as the database has it.
    pub fn mask(parts: &[Self]) -> i64 {
        Self::ALL.iter().filter(|part| parts.contains(part)).map(|part| part.bit()).sum()
    }

    /// The reverse of [`ModelPart::mask`].
    pub fn of_mask(mask: i64) -> Vec<Self> {
        Self::ALL.iter().copied().filter(|part| mask & part.bit() != 0).collect()
    }
}

/// A model as a worker registers it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// What people call it.
    pub name: String,
    /// SHA-256 of its files, in lower-case hexadecimal.
    pub sha256: String,
    /// Its family, such as `sd15`.
    pub family: String,
    /// Side of the pictures that it draws by default, in pixels.
    pub resolution: u32,
    /// The optional parts that it has.
    pub parts: Vec<ModelPart>,
    /// How it draws where a request does not say.
    pub drawing: ModelDrawing,
    /// For each method, the training options that suit it where they differ from the method's defaults.
    pub training: BTreeMap<String, Value>,
    /// The classes that it knows; none if its vocabulary decides.
    pub classes: Option<Vec<String>>,
    /// Words of one token each that mean next to nothing, in the order in which trainings take them. None if a worker of
    /// an earlier version registered the model: a worker decides then.
    #[serde(default)]
    pub rare_tokens: Option<Vec<String>>,
}

/// A model that a worker holds on a device.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldModel {
    /// What it can do.
    pub card: ModelCard,
    /// The words that are one token each of its vocabulary, lower-case, with spaces between them.
    pub words: String,
    /// Memory of the device in bytes; none if it is the machine's.
    pub memory_bytes: Option<u64>,
}

impl HeldModel {
    /// The warning about a class name that this model does not know.
    pub fn class_warning(&self, class_name: &str) -> Option<Warning> {
        let words: HashSet<&str> = self.words.split(' ').collect();
        self.card.class_warning(class_name, |word| words.contains(word))
    }
}

/// How a model draws where a request does not say.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelDrawing {
    /// The way from noise to picture.
    pub scheduler: Scheduler,
    /// Weight of the prompt against the negative prompt.
    pub guidance: f64,
}

/// The model of a training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelRef {
    /// What people call it.
    pub name: String,
    /// SHA-256 of its files; null until a worker that holds it was seen.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    pub sha256: Option<String>,
}

string_enum!(
    /// Why an accepted job may not give what its sender expects. New codes may be added.
    WarningCode {
        /// No running worker holds the model that the job needs, with all parts that it takes: it waits until one does.
        NoWorker = "no-worker",
        /// No worker had registered the model: options that were left out are decided when one claims the job.
        OptionsOpen = "options-open",
        /// The model does not know the class: class images and prompts may show something else.
        ClassUnknown = "class-unknown",
        /// The model has no part that scores pictures: there are no scores, and the last step is served.
        NoMetrics = "no-metrics",
    }
);

string_enum!(
    /// What a queued job waits for.
    WaitingFor {
        /// Its turn: running workers hold the model that it needs, with all parts that it takes.
        Turn = "turn",
        /// A worker that holds the model that it needs, with all parts that it takes: none is running.
        Worker = "worker",
    }
);

/// A warning about an accepted job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Warning {
    /// Which kind.
    pub code: WarningCode,
    /// One line for a person.
    pub message: String,
}

impl Warning {
    /// A warning.
    pub fn new(code: WarningCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl ModelCard {
    /// Its name and hash.
    pub fn reference(&self) -> ModelRef {
        ModelRef { name: self.name.clone(), sha256: Some(self.sha256.clone()) }
    }

    /// Whether it has a part.
    pub fn has(&self, part: ModelPart) -> bool {
        self.parts.contains(&part)
    }

    /// Complete options from a JSON object with some: the others are what suits this model for their method, or else
    /// the method's defaults. Tokens are rare ones of its vocabulary, as far as it has any.
    pub fn options(&self, given: &Value) -> Result<TrainOptions, Invalid> {
        Ok(TrainOptions::suited(&self.training, given)?
            .with_rare_tokens(self.rare_tokens.as_deref().unwrap_or_default()))
    }

    /// Refuses options that need a part or a rare token which this model lacks.
    pub fn check(&self, options: &TrainOptions) -> Result<(), Invalid> {
        let Self { name, .. } = self;
        if let Some((part, pointer, without)) = self.lacking(options).into_iter().next() {
            let method = options.method;
            let message = format!(
                "{method} needs a model with a {part}, and {name:?} has none; {without} trains without it"
            );
            return Err(Invalid::new(pointer, message));
        }
        match options.tokens().into_iter().find(|(_, token)| token.is_none()) {
            Some((pointer, _)) if self.rare_tokens.is_some() => {
                let message = format!(
                    "is needed: the model {name:?} has no rare token left; name a word that is one token of it"
                );
                Err(Invalid::new(pointer, message))
            }
            _ => Ok(()),
        }
    }

    /// Refuses tokens that are no words of this model. `vocabulary` says whether a word is one token of it.
    pub fn check_tokens(
        &self,
        options: &TrainOptions,
        vocabulary: impl Fn(&str) -> bool,
    ) -> Result<(), Invalid> {
        for (pointer, token) in options.tokens() {
            if let Some(token) = token.filter(|token| !vocabulary(token)) {
                let message =
                    format!("{token:?} is not one token of the vocabulary of the model {:?}", self.name);
                return Err(Invalid::new(pointer, message));
            }
        }
        Ok(())
    }

    /// The parts that a worker must have to train with options as this model would: those that they need, and what
    /// scores pictures if there is any.
    pub fn needed(&self, options: &TrainOptions) -> Vec<ModelPart> {
        let scored = options.evaluation.enabled && self.has(ModelPart::Metrics);
        let parts = wanted(options).into_iter().map(|(part, ..)| part);
        parts.chain(scored.then_some(ModelPart::Metrics)).collect()
    }

    /// The parts that options need and this model lacks: each with the JSON pointer of the option, and the setting
    /// that does without.
    pub fn lacking(&self, options: &TrainOptions) -> Vec<(ModelPart, &'static str, &'static str)> {
        wanted(options).into_iter().filter(|(part, ..)| !self.has(*part)).collect()
    }

    /// The warning of a training that cannot be scored.
    pub fn metrics_warning(&self, options: &TrainOptions) -> Option<Warning> {
        let unscored = options.evaluation.enabled && !self.has(ModelPart::Metrics);
        unscored.then(|| {
            let message =
                format!("the model {:?} has no metrics: no scores, and the last step is served", self.name);
            Warning::new(WarningCode::NoMetrics, message)
        })
    }

    /// The warning about a class name that this model does not know. `vocabulary` says whether a lower-case word is
    /// one token of it.
    pub fn class_warning(&self, class_name: &str, vocabulary: impl Fn(&str) -> bool) -> Option<Warning> {
        let name = class_name.to_lowercase();
        let known = match &self.classes {
            Some(classes) => classes.iter().any(|class| class.to_lowercase() == name),
            None => {
                name.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).all(vocabulary)
            }
        };
        (!known).then(|| {
            let message = format!("the model {:?} does not know the class {class_name:?}", self.name);
            Warning::new(WarningCode::ClassUnknown, message)
        })
    }
}

/// The parts that options need: each with the JSON pointer of the option, and the setting that does without.
fn wanted(options: &TrainOptions) -> Vec<(ModelPart, &'static str, &'static str)> {
    let segmenter = (ModelPart::Segmenter, "/views/enabled", "views.enabled=false");
    let perceptual = (ModelPart::Perceptual, "/loss_weights/perceptual", "loss_weights.perceptual=0");
    let segmenter = options.views.enabled.then_some(segmenter);
    let perceptual = options.uses_perceptual().then_some(perceptual);
    segmenter.into_iter().chain(perceptual).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::job::Method;

    fn card() -> ModelCard {
        ModelCard {
            name: "small".into(),
            sha256: "0".repeat(64),
            family: "miniature".into(),
            resolution: 128,
            parts: vec![ModelPart::Segmenter],
            drawing: ModelDrawing { scheduler: Scheduler::EulerA, guidance: 4.0 },
            training: [("hypnos".into(), json!({ "steps": 300, "views": { "n": 32 } }))].into(),
            classes: None,
            rare_tokens: Some(["sks", "ohwx", "olis"].map(str::to_owned).to_vec()),
        }
    }

    #[test]
    fn tokens_that_are_left_out_are_two_rare_ones_of_the_model() {
        let tokens = |given: Value| {
            let options = card().options(&given).expect("options");
            (options.instance_token.unwrap_or_default(), options.background_token.unwrap_or_default())
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(tokens(json!({})), pair("sks", "ohwx"));
        assert_eq!(tokens(json!({ "instance_token": "ohwx" })), pair("ohwx", "sks"));
        assert_eq!(tokens(json!({ "background_token": "sks" })), pair("ohwx", "sks"));
        assert_eq!(tokens(json!({ "method": "dreambooth" })), pair("sks", ""), "no views, no backgrounds");
        let none = ModelCard { rare_tokens: Some(Vec::new()), parts: ModelPart::ALL.to_vec(), ..card() };
        let checked =
            |given: Value| none.check(&none.options(&given).expect("options")).map_err(|e| e.pointer);
        assert_eq!(checked(json!({})), Err("/instance_token".into()));
        assert_eq!(checked(json!({ "instance_token": "a" })), Err("/background_token".into()));
        assert_eq!(checked(json!({ "instance_token": "a", "background_token": "b" })), Ok(()));
        let unknown = ModelCard { rare_tokens: None, ..none.clone() };
        assert_eq!(unknown.check(&unknown.options(&json!({})).expect("options")), Ok(()), "a worker decides");
        let same = json!({ "instance_token": "a", "background_token": "a" });
        let same = card().options(&same).expect("options");
        assert_eq!(same.check().expect_err("the same").pointer, "/background_token");
        let of_two = json!({ "instance_token": "sks", "background_token": "gizmo" });
        let of_two = card().options(&of_two).expect("options");
        let invalid = card().check_tokens(&of_two, |word| word == "sks").expect_err("no word of it");
        assert_eq!(invalid.pointer, "/background_token");
    }

    #[test]
    fn what_is_given_comes_before_what_suits_and_that_before_the_defaults() {
        let options = card().options(&json!({ "views": { "margin": 0.5 } })).expect("options");
        assert_eq!((options.steps, options.views.n, options.views.margin), (300, 32, 0.5));
        assert_eq!(options.discriminator, TrainOptions::default().discriminator);
        let other = card().options(&json!({ "method": "dreambooth", "steps": 7 })).expect("options");
        assert_eq!((other.method, other.steps, other.views.n), (Method::Dreambooth, 7, 64));
        let null = card().options(&Value::Null).expect("no options are an empty object");
        assert_eq!(null.steps, 300);
    }

    #[test]
    fn options_that_need_a_missing_part_are_refused_with_what_goes_without() {
        let invalid = card().check(&TrainOptions::default()).expect_err("no perceptual part");
        assert_eq!(invalid.pointer, "/loss_weights/perceptual");
        assert!(invalid.message.contains("loss_weights.perceptual=0"), "{}", invalid.message);
        let dreambooth = card().options(&json!({ "method": "dreambooth" })).expect("options");
        assert_eq!(card().check(&dreambooth), Ok(()));
        let without_segmenter = ModelCard { parts: vec![ModelPart::Perceptual], ..card() };
        let invalid = without_segmenter.check(&TrainOptions::default()).expect_err("no segmenter");
        assert_eq!(invalid.pointer, "/views/enabled");
    }

    #[test]
    fn a_set_of_parts_is_a_sum_of_powers_of_two() {
        use ModelPart::{Metrics, Perceptual, Segmenter};
        assert_eq!([Segmenter, Perceptual, Metrics].map(|part| ModelPart::mask(&[part])), [1, 2, 4]);
        assert_eq!((ModelPart::mask(&[]), ModelPart::mask(&[Metrics, Segmenter])), (0, 1 + 4));
        for mask in 0..8 {
            assert_eq!(ModelPart::mask(&ModelPart::of_mask(mask)), mask);
        }
    }

    #[test]
    fn a_training_needs_the_parts_that_its_options_use_and_metrics_if_there_are_any() {
        let full = ModelCard { parts: ModelPart::ALL.to_vec(), ..card() };
        let needed = |card: &ModelCard, given: Value| card.needed(&card.options(&given).expect("options"));
        assert_eq!(needed(&full, json!({})), ModelPart::ALL);
        assert_eq!(needed(&full, json!({ "method": "dreambooth" })), [ModelPart::Metrics]);
        assert_eq!(needed(&card(), json!({ "method": "dreambooth" })), []);
        let never_looked_at = needed(&full, json!({ "s_p": 0 }));
        assert_eq!(never_looked_at, [ModelPart::Segmenter, ModelPart::Metrics], "no step has the loss");
        let unscored = json!({ "method": "dreambooth", "evaluation": { "enabled": false } });
        assert_eq!(needed(&full, unscored), []);
    }

    #[test]
    fn a_class_is_known_by_the_list_or_by_every_word_of_it() {
        let words = |word: &str| ["coffee", "mug"].contains(&word);
        assert_eq!(card().class_warning("Coffee-Mug", words), None);
        let warning = card().class_warning("coffee backpack", words).expect("a warning");
        assert_eq!(warning.code, WarningCode::ClassUnknown);
        let listed = ModelCard { classes: Some(vec!["Mug".into()]), ..card() };
        assert_eq!(listed.class_warning("mug", |_| false), None);
        assert!(listed.class_warning("coffee", words).is_some());
    }
}
