//! Specifications of jobs: an invalid one cannot be constructed.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::checks::{Invalid, SEED_MAX, check_seed, class_name, real, text, whole};
use super::model::{ModelCard, ModelPart, ModelRef, Warning};
use super::options::{Format, Scheduler, TrainOptions};

/// Fewest photos of a product.
pub const N_PHOTOS_MIN: usize = 3;
/// Most photos of a product.
pub const N_PHOTOS_MAX: usize = 5;
/// The placeholder for the product in a prompt.
pub const PRODUCT: &str = "{product}";

const N_PROMPTS_MAX: usize = 16;

/// The complete specification of a training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// What kind of thing the product is, such as `mug`.
    pub class_name: String,
    /// The model that is fine-tuned; none if any will do, as in rows of earlier builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelRef>,
    /// The optional parts of the model that it takes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<ModelPart>,
    /// How it is trained.
    pub options: TrainOptions,
    /// The options that were given, as long as the others depend on a model that no worker had registered:
    /// [`TrainSpec::resolved`] completes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_options: Option<Value>,
    /// The seed, asked for or drawn.
    pub seed: u64,
    /// What its sender was warned of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Warning>,
}

impl TrainSpec {
    /// A training with `options`, which takes `drawn_seed` if they name none.
    pub fn new(class_name: &str, options: TrainOptions, drawn_seed: u64) -> Result<Self, Invalid> {
        options.check()?;
        let seed = options.seed.unwrap_or(drawn_seed & SEED_MAX);
        let s_p = options.s_p.unwrap_or(options.steps * 5 / 8); // 500 of the paper's 800
        let options = TrainOptions { s_p: Some(s_p), ..options };
        let class_name = self::class_name(class_name)?;
        let (parts, warnings) = (Vec::new(), Vec::new());
        Ok(Self { class_name, model: None, parts, options, open_options: None, seed, warnings })
    }

    /// A training of the model `card`, with the options that suit it where `given` names none. A seed that is neither
    /// given nor suited is `drawn_seed`. Options that the model cannot be trained with are refused.
    pub fn of_model(
        card: &ModelCard,
        class_name: &str,
        given: &Value,
        drawn_seed: u64,
    ) -> Result<Self, Invalid> {
        let options = card.options(given)?;
        let spec = Self::new(class_name, options, drawn_seed)?;
        card.check(&spec.options)?;
        let warnings = card.metrics_warning(&spec.options).into_iter().collect();
        let parts = card.needed(&spec.options);
        Ok(Self { model: Some(card.reference()), parts, warnings, ..spec })
    }

    /// The specification for the model `card`, which a worker holds that claimed the job: options that were left open
    /// are what suits this model. None if none were.
    pub fn resolved(&self, card: &ModelCard) -> Result<Option<Self>, Invalid> {
        let Some(given) = &self.open_options else { return Ok(None) };
        Self::of_model(card, &self.class_name, given, self.seed).map(Some)
    }

    /// What a worker must hold to train it, the SHA-256 or the name of a model; none if any will do.
    pub fn needed_model(&self) -> Option<&str> {
        let model = self.model.as_ref()?;
        Some(model.sha256.as_deref().unwrap_or(&model.name))
    }
}

/// Pictures to draw with a finished training. Everything but the prompts has a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SampleSpec {
    /// What the pictures show; `{product}` stands for the product.
    #[schema(min_items = 1, max_items = 16, example = json!(["a photo of {product} on a wooden table"]))]
    pub prompts: Vec<String>,
    /// What they must not show.
    #[serde(default)]
    #[schema(max_length = 1000, default = "")]
    pub negative_prompt: String,
    /// Pictures for each prompt.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 8, default = 1)]
    pub n: u32,
    /// Seed of the first picture, drawn by the server if not given; each further one takes the next. Each picture
    /// is listed with its own seed, which reproduces it.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 9_007_199_254_740_991_i64)]
    pub seed: Option<u64>,
    /// Steps of the sampler.
    #[serde(default = "twenty_five")]
    #[schema(minimum = 1, maximum = 200, default = 25)]
    pub steps: u32,
    /// Weight of the prompt against the negative prompt; 1 switches guidance off. The model's own if not given: 7.5
    /// for Stable Diffusion 1.5.
    #[serde(default)]
    #[schema(minimum = 0.0, maximum = 30.0)]
    pub guidance: Option<f64>,
    /// The sampler; the model's own if not given, `dpmpp-2m` for Stable Diffusion 1.5.
    #[serde(default)]
    pub scheduler: Option<Scheduler>,
    /// Pixels, a multiple of 8; the model's own size if not given.
    #[serde(default)]
    #[schema(minimum = 64, maximum = 1024, multiple_of = 8)]
    pub width: Option<u32>,
    /// Pixels, a multiple of 8; the model's own size if not given.
    #[serde(default)]
    #[schema(minimum = 64, maximum = 1024, multiple_of = 8)]
    pub height: Option<u32>,
    /// What the pictures are written as.
    #[serde(default = "png")]
    #[schema(default = "png")]
    pub format: Format,
}

impl SampleSpec {
    /// Rejects values out of range, normalizes texts to NFC, and takes `drawn_seed` if none is named.
    pub fn complete(mut self, drawn_seed: u64) -> Result<Self, Invalid> {
        let n_prompts = self.prompts.len();
        if n_prompts == 0 || n_prompts > N_PROMPTS_MAX {
            let message = format!("wanted 1 to {N_PROMPTS_MAX} prompts, got {n_prompts}");
            return Err(Invalid::new("/prompts", message));
        }
        for (i, prompt) in self.prompts.iter_mut().enumerate() {
            *prompt = text(&format!("/prompts/{i}"), prompt, 1)?;
        }
        self.negative_prompt = text("/negative_prompt", &self.negative_prompt, 0)?;
        whole("/n", self.n, 1, 8)?;
        check_seed(self.seed)?;
        self.seed.get_or_insert(drawn_seed & SEED_MAX);
        whole("/steps", self.steps, 1, 200)?;
        if let Some(guidance) = self.guidance {
            real("/guidance", guidance, 0.0, 30.0)?;
        }
        for (pointer, side) in [("/width", self.width), ("/height", self.height)] {
            if let Some(side) = side {
                whole(pointer, side, 64, 1024)?;
                if side % 8 != 0 {
                    return Err(Invalid::new(pointer, format!("wanted a multiple of 8, got {side}")));
                }
            }
        }
        Ok(self)
    }

    /// All images in order: prompt and seed.
    pub fn pictures(&self) -> impl Iterator<Item = (&str, u64)> {
        let seed = self.seed.unwrap_or(0);
        let prompts = self.prompts.iter().flat_map(|prompt| (0..self.n).map(move |_| prompt.as_str()));
        prompts.enumerate().map(move |(i, prompt)| (prompt, (seed + i as u64) & SEED_MAX))
    }
}

fn one() -> u32 {
    1
}

fn twenty_five() -> u32 {
    25
}

fn png() -> Format {
    Format::Png
}
