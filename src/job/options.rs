//! Options of a training, each with its range and default.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::checks::{Invalid, check_seed, check_token, pointer, rate, real, text, whole};
use super::string_enum::string_enum;

/// Most steps of a training.
pub const STEPS_MAX: u32 = 10_000;

string_enum!(
    /// The method of a training: a set of defaults, each of which can be changed.
    Method {
        /// Views on plain colours, the inverse Gaussian, perceptual and adversarial losses (arXiv 2410.14265).
        Hypnos = "hypnos",
        /// Noise loss with prior preservation on UNet and text encoder (Ruiz et al. 2023, arXiv 2208.12242).
        Dreambooth = "dreambooth",
        /// One new embedding; nothing else learns (Gal et al. 2022, arXiv 2208.01618).
        TextualInversion = "textual_inversion",
    }
);

string_enum!(
    /// How far a predicted noise is from the true one.
    Reconstruction {
        /// The inverse of a Gaussian, steeper than a square where the error is large.
        InverseGaussian = "inverse_gaussian",
        /// The mean of squares.
        Mse = "mse",
    }
);

string_enum!(
    /// How AdamW's moments are kept.
    AdamwMoments {
        /// 8 bytes for each trained weight.
        Float32 = "f32",
        /// 2 bytes, in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861); smaller weights keep f32.
        Bits8 = "8bit",
    }
);

string_enum!(
    /// What a picture is written as. Each carries how it was drawn.
    Format {
        /// Lossless.
        Png = "png",
        /// Quality 90.
        Jpeg = "jpeg",
        /// Quality 90.
        Webp = "webp",
    }
);

impl Format {
    /// Its media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }

    /// The extension of its files.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpg",
            Self::Webp => "webp",
        }
    }
}

/// Weights of the losses in their sum. One that is 0 is not computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LossWeights {
    /// Of the reconstruction of the product. By default 1.0.
    #[schema(minimum = 0.0, maximum = 100.0)]
    pub reconstruction: f64,
    /// Of the prior preservation: what the class images count. By default 1; 0 for `textual_inversion`.
    #[schema(minimum = 0.0, maximum = 100.0)]
    pub prior: f64,
    /// Of the perceptual loss on the decoded picture. By default 0.003 for `hypnos`, 0 for the others.
    #[schema(minimum = 0.0, maximum = 100.0)]
    pub perceptual: f64,
    /// Of the latent discriminator. By default 0.5 for `hypnos`, 0 for the others.
    #[schema(minimum = 0.0, maximum = 100.0)]
    pub discriminator: f64,
}

impl Default for LossWeights {
    fn default() -> Self {
        Method::default().loss_weights()
    }
}

/// Views of the photos: the product on plain colours, or its photo as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Views {
    /// Whether views are made; without them the photos are learned from as they are. By default so for `hypnos` only.
    pub enabled: bool,
    /// Number of views. By default 64.
    #[schema(minimum = 1, maximum = 1000)]
    pub n: u32,
    /// Share of views with the product on one plain colour. By default 0.66.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub monotone: f64,
    /// Share of views in which the product is smaller and moved. By default 0.15.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub resized: f64,
    /// The smallest scale of the product. By default 0.6.
    #[schema(minimum = 0.1, maximum = 1.0)]
    pub scale_min: f64,
    /// Room left around the product, as a share of its longer side. By default 0.2.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub margin: f64,
}

impl Default for Views {
    fn default() -> Self {
        let enabled = Method::default() == Method::Hypnos;
        // Assumption: the paper gives the share of plain colours only.
        Self { enabled, n: 64, monotone: 0.66, resized: 0.15, scale_min: 0.6, margin: 0.2 }
    }
}

/// The latent discriminator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Discriminator {
    /// Its steps before the first one of the training. By default 600.
    #[schema(minimum = 0, maximum = 10_000)]
    pub steps: u32,
    /// Its learning rate. By default 1e-4.
    #[schema(exclusive_minimum = 0.0, maximum = 0.01)]
    pub learning_rate: f64,
    /// Real latents in each of its steps, and fake ones. By default 8.
    #[schema(minimum = 1, maximum = 64)]
    pub batch: u32,
}

impl Default for Discriminator {
    fn default() -> Self {
        Self { steps: 600, learning_rate: 1e-4, batch: 8 } // Assumption: the paper gives the steps only
    }
}

/// The perceptual loss, beside its weight and `s_p`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Perceptual {
    /// Weights of the activations at strides 2, 4, 8, 16 and 32. By default [1.0, 0.5, 0.25, 0.125, 0.0625].
    #[schema(min_items = 5, max_items = 5)]
    pub strides: [f64; 5],
    /// Timesteps from here on are skipped, which saves their cost. By default none.
    #[schema(minimum = 1, maximum = 1000)]
    pub timestep_max: Option<u32>,
    /// Side, in latents, of a random square that is compared instead of the whole picture.
    #[schema(minimum = 4, maximum = 128)]
    pub crop: Option<u32>,
}

impl Default for Perceptual {
    fn default() -> Self {
        // Assumption: the paper says that shallow activations weigh more, not how much.
        Self { strides: [1.0, 0.5, 0.25, 0.125, 0.0625], timestep_max: None, crop: None }
    }
}

/// Prompts of the training; `{product}`, `{background}` and `{class}` stand for their words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Templates {
    /// Of a photo, where no views are made. By default `a photo of {product}`.
    #[schema(min_length = 1, max_length = 200)]
    pub photo: String,
    /// Of a view. By default `a photo of {product}, {background} background`.
    #[schema(min_length = 1, max_length = 200)]
    pub view: String,
    /// Of a class image. By default `a photo of {class}`.
    #[schema(min_length = 1, max_length = 200)]
    pub class: String,
}

impl Default for Templates {
    fn default() -> Self {
        Self {
            photo: "a photo of {product}".into(),
            view: "a photo of {product}, {background} background".into(),
            class: "a photo of {class}".into(),
        }
    }
}

/// How the finished model is evaluated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluation {
    /// Whether it is evaluated. By default true.
    pub enabled: bool,
    /// Pictures of the finished model. Half of them, rounded up, show one standard prompt; each of the others has a
    /// prompt of its own. By default 4.
    #[schema(minimum = 1, maximum = 64)]
    pub images: u32,
    /// Sampler steps of each. By default 25.
    #[schema(minimum = 1, maximum = 200)]
    pub steps: u32,
    /// Prompts of these others, in turn; `{product}` stands for the product. By default drawn from lists of image
    /// types, backgrounds and styles.
    #[schema(min_items = 1, max_items = 64, example = json!(["{product} on a beach at sunset"]))]
    pub prompts: Option<Vec<String>>,
    /// Pictures of the class that the finished model draws to measure whether other objects of the class still look
    /// different from the product. They are not kept, and not drawn where the bundle has no network to score them
    /// with. By default 2.
    #[schema(minimum = 0, maximum = 64)]
    pub class_images: u32,
    /// Steps after which a few pictures are scored, each at most `steps`; of these the best is served. By default at
    /// half, at three quarters and at the end; empty, or where the bundle has no networks to score with, the last step
    /// is served.
    #[schema(max_items = 10)]
    pub trials: Option<Vec<u32>>,
    /// Pictures that are scored each time. By default 4.
    #[schema(minimum = 2, maximum = 64)]
    pub trial_images: u32,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self {
            enabled: true,
            images: 4,
            steps: 25,
            prompts: None,
            class_images: 2,
            trials: None,
            trial_images: 4,
        }
    }
}

impl Evaluation {
    fn check(&self, steps: u32) -> Result<(), Invalid> {
        whole("/evaluation/images", self.images, 1, 64)?;
        whole("/evaluation/steps", self.steps, 1, 200)?;
        whole("/evaluation/class_images", self.class_images, 0, 64)?;
        whole("/evaluation/trial_images", self.trial_images, 2, 64)?;
        if let Some(prompts) = &self.prompts {
            whole("/evaluation/prompts", prompts.len(), 1, 64)?;
            for (i, prompt) in prompts.iter().enumerate() {
                text(&format!("/evaluation/prompts/{i}"), prompt, 1)?;
            }
        }
        let trials = self.trials.as_deref().unwrap_or_default();
        whole("/evaluation/trials", trials.len(), 0, 10)?;
        for (i, &step) in trials.iter().enumerate() {
            whole(&format!("/evaluation/trials/{i}"), step, 1, steps)?;
        }
        Ok(())
    }
}

/// How a model is trained. What is left out is the model's own for the method, as `GET /v1/models` lists it, and where
/// the model has none, the default said here, which suits Stable Diffusion 1.5. An unknown name is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// The method.
    #[schema(default = "hypnos")]
    pub method: Method,
    /// Steps of the optimiser. By default 800; 3000 for `textual_inversion`.
    #[schema(minimum = 1, maximum = 10_000)]
    pub steps: u32,
    /// Learning rate of AdamW, constant. By default 2e-6; 5e-4 for `textual_inversion`.
    #[schema(exclusive_minimum = 0.0, maximum = 0.01)]
    pub learning_rate: f64,
    /// How AdamW's two moments of each trained weight are kept while the training runs: `8bit` takes 5.9 GB less for
    /// Stable Diffusion 1.5. By default `f32`.
    pub adamw_moments: AdamwMoments,
    /// Seed of all random numbers. Drawn by the server if not given, and shown in the job.
    #[schema(minimum = 0, maximum = 9_007_199_254_740_991_i64)]
    pub seed: Option<u64>,
    /// The word for this one product: one token of the model's vocabulary that means next to nothing. The model's own
    /// choice if not given.
    #[schema(min_length = 1, max_length = 16, pattern = "^[a-z0-9]+$")]
    pub instance_token: Option<String>,
    /// The word for the backgrounds of the photos, another such token. The model's own choice if not given.
    #[schema(min_length = 1, max_length = 16, pattern = "^[a-z0-9]+$")]
    pub background_token: Option<String>,
    /// Pictures of the class, drawn by the untrained model, for the prior preservation; 0 for none. By default 200.
    #[schema(minimum = 0, maximum = 1000)]
    pub class_images: u32,
    /// The loss on the product's noise. By default `inverse_gaussian` for `hypnos`, `mse` for the others.
    pub reconstruction: Reconstruction,
    /// Width of the inverse Gaussian: the larger, the flatter. At 1.382 it lies closest to the square. By default
    /// 1.382.
    #[schema(minimum = 0.1, maximum = 100.0)]
    pub sigma: f64,
    /// Largest exponent of the inverse Gaussian; what lies beyond it is not learned from. By default 20.0.
    #[schema(minimum = 1.0, maximum = 80.0)]
    pub exponent_max: f64,
    /// The last step at which the perceptual loss counts, at most `steps`. By default five eighths of them.
    #[schema(minimum = 0, maximum = 10_000)]
    pub s_p: Option<u32>,
    /// Weights of the losses.
    pub loss_weights: LossWeights,
    /// Views of the photos.
    pub views: Views,
    /// The latent discriminator.
    pub discriminator: Discriminator,
    /// The perceptual loss.
    pub perceptual: Perceptual,
    /// Prompts of the training.
    pub templates: Templates,
    /// Steps after which a picture is drawn for people to look at, each at most `steps`. By default at each quarter.
    #[schema(max_items = 100)]
    pub previews: Option<Vec<u32>>,
    /// How the finished model is evaluated.
    pub evaluation: Evaluation,
    /// Of a tenant's waiting jobs, those with a larger priority start first.
    #[schema(minimum = -100, maximum = 100, default = 0)]
    pub priority: i32,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self::of(Method::default())
    }
}

#[allow(clippy::derivable_impls)] // the macro makes the enum
impl Default for Method {
    fn default() -> Self {
        Self::Hypnos
    }
}

impl Method {
    fn loss_weights(self) -> LossWeights {
        let (prior, perceptual, discriminator) = match self {
            Self::Hypnos => (1.0, 0.003, 0.5),
            Self::Dreambooth => (1.0, 0.0, 0.0),
            Self::TextualInversion => (0.0, 0.0, 0.0),
        };
        LossWeights { reconstruction: 1.0, prior, perceptual, discriminator }
    }
}

impl TrainOptions {
    /// The defaults of a method.
    pub fn of(method: Method) -> Self {
        // Assumption: the paper names no learning rate of its own; for the embedding it is diffusers' example's.
        let (steps, learning_rate) = match method {
            Method::Hypnos | Method::Dreambooth => (800, 2e-6),
            Method::TextualInversion => (3000, 5e-4),
        };
        let hypnos = method == Method::Hypnos;
        Self {
            method,
            steps,
            learning_rate,
            adamw_moments: AdamwMoments::Float32,
            seed: None,
            instance_token: None,
            background_token: None,
            class_images: 200,
            reconstruction: if hypnos { Reconstruction::InverseGaussian } else { Reconstruction::Mse },
            sigma: 1.382,
            exponent_max: 20.0, // Assumption: far above what a trained model's errors reach, far below the end of f32
            s_p: None,
            loss_weights: method.loss_weights(),
            views: Views { enabled: hypnos, ..Views::default() },
            discriminator: Discriminator::default(),
            perceptual: Perceptual::default(),
            templates: Templates::default(),
            previews: None,
            evaluation: Evaluation::default(),
            priority: 0,
        }
    }

    /// Options from a JSON object that names some of them; all others take the defaults of its method. Rejects what is no
    /// option or no value of it, by its JSON pointer.
    pub fn given(some: &Value) -> Result<Self, Invalid> {
        Self::suited(&BTreeMap::new(), some)
    }

    /// The same, where `suited` has by method what a model takes in place of the defaults.
    pub fn suited(suited: &BTreeMap<String, Value>, given: &Value) -> Result<Self, Invalid> {
        let method = given.get("method").map_or(Ok(Method::default()), Method::deserialize);
        let method = method.map_err(|error| Invalid::new("/method", error.to_string()))?;
        let mut whole = serde_json::to_value(Self::of(method)).expect("options are JSON");
        let suited = suited.get(method.as_str());
        suited
            .into_iter()
            .chain([given])
            .filter(|some| some.is_object())
            .for_each(|some| merge_json(&mut whole, some));
        serde_path_to_error::deserialize(whole)
            .map_err(|error| Invalid::new(pointer(error.path()), error.inner().to_string()))
    }

    /// The same with tokens of `rare`, which are words of one token each, where none are given: the first that is free
    /// for the product, the next for the backgrounds, if it makes views.
    #[must_use]
    pub fn with_rare_tokens(self, rare: &[String]) -> Self {
        let free = |taken: &Option<String>| rare.iter().find(|word| Some(*word) != taken.as_ref()).cloned();
        let instance_token = self.instance_token.clone().or_else(|| free(&self.background_token));
        let background_token = match &self.background_token {
            None if self.views.enabled => free(&instance_token),
            given => given.clone(),
        };
        Self { instance_token, background_token, ..self }
    }

    /// Whether any step has the perceptual loss.
    pub fn uses_perceptual(&self) -> bool {
        self.loss_weights.perceptual > 0.0 && self.s_p != Some(0)
    }

    /// The tokens that a training needs, each with its JSON pointer; `None` for one that is not chosen yet.
    pub fn tokens(&self) -> Vec<(&'static str, Option<&str>)> {
        let mut all = vec![("/instance_token", self.instance_token.as_deref())];
        if self.views.enabled {
            all.push(("/background_token", self.background_token.as_deref()));
        }
        all
    }

    /// Rejects options out of range, by their JSON pointers.
    pub fn check(&self) -> Result<(), Invalid> {
        whole("/steps", self.steps, 1, STEPS_MAX)?;
        rate("/learning_rate", self.learning_rate)?;
        check_seed(self.seed)?;
        check_token("/instance_token", self.instance_token.as_ref())?;
        check_token("/background_token", self.background_token.as_ref())?;
        if let Some(token) = self.instance_token.as_ref().filter(|_| self.views.enabled)
            && self.background_token.as_ref() == Some(token)
        {
            let message = format!("is {token:?}, the same as instance_token; wanted another");
            return Err(Invalid::new("/background_token", message));
        }
        whole("/class_images", self.class_images, 0, 1000)?;
        real("/sigma", self.sigma, 0.1, 100.0)?;
        real("/exponent_max", self.exponent_max, 1.0, 80.0)?;
        whole("/s_p", self.s_p.unwrap_or(0), 0, self.steps)?;
        let weights = &self.loss_weights;
        real("/loss_weights/reconstruction", weights.reconstruction, 0.0, 100.0)?;
        real("/loss_weights/prior", weights.prior, 0.0, 100.0)?;
        real("/loss_weights/perceptual", weights.perceptual, 0.0, 100.0)?;
        real("/loss_weights/discriminator", weights.discriminator, 0.0, 100.0)?;
        whole("/views/n", self.views.n, 1, 1000)?;
        real("/views/monotone", self.views.monotone, 0.0, 1.0)?;
        real("/views/resized", self.views.resized, 0.0, 1.0)?;
        real("/views/scale_min", self.views.scale_min, 0.1, 1.0)?;
        real("/views/margin", self.views.margin, 0.0, 1.0)?;
        whole("/discriminator/steps", self.discriminator.steps, 0, 10_000)?;
        rate("/discriminator/learning_rate", self.discriminator.learning_rate)?;
        whole("/discriminator/batch", self.discriminator.batch, 1, 64)?;
        for (i, &weight) in self.perceptual.strides.iter().enumerate() {
            real(&format!("/perceptual/strides/{i}"), weight, 0.0, 100.0)?;
        }
        whole("/perceptual/timestep_max", self.perceptual.timestep_max.unwrap_or(1), 1, 1000)?;
        whole("/perceptual/crop", self.perceptual.crop.unwrap_or(4), 4, 128)?;
        let Templates { photo, view, class } = &self.templates;
        for (name, template, holds) in
            [("photo", photo, "{product}"), ("view", view, "{product}"), ("class", class, "{class}")]
        {
            let pointer = format!("/templates/{name}");
            text(&pointer, template, 1)?;
            if template.chars().count() > 200 || !template.contains(holds) {
                let message = format!("wanted at most 200 characters with {holds} among them");
                return Err(Invalid::new(pointer, message));
            }
        }
        let previews = self.previews.as_deref().unwrap_or_default();
        whole("/previews", previews.len(), 0, 100)?;
        for (i, &step) in previews.iter().enumerate() {
            whole(&format!("/previews/{i}"), step, 1, self.steps)?;
        }
        self.evaluation.check(self.steps)?;
        whole("/priority", self.priority, -100, 100)
    }
}

/// Replaces values of `whole` by those of `some`, object by object.
pub fn merge_json(whole: &mut Value, some: &Value) {
    match (whole, some) {
        (Value::Object(whole), Value::Object(some)) => {
            for (name, value) in some {
                merge_json(whole.entry(name).or_insert(Value::Null), value);
            }
        }
        (whole, some) => *whole = some.clone(),
    }
}

string_enum!(
    /// Samplers.
    Scheduler {
        /// Song et al. 2021.
        Ddim = "ddim",
        /// Liu et al. 2022.
        Pndm = "pndm",
        /// Lu et al. 2022, second order, multistep.
        Dpmpp2m = "dpmpp-2m",
        /// The same on the noise levels of Karras et al. 2022.
        Dpmpp2mKarras = "dpmpp-2m-karras",
        /// Karras et al. 2022, algorithm 2 without churn.
        Euler = "euler",
        /// With fresh noise at each step.
        EulerA = "euler-a",
    }
);
