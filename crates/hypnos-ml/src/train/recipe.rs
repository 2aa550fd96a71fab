//! The recipe of a training: all that decides its result beside weights and pictures.

use serde::{Deserialize, Serialize};

use super::discriminator::DiscriminatorRecipe;
use super::losses::{Objective, Reconstruction};
use crate::ops::{AdamWConfig, MomentFormat};
use crate::product::Product;
use crate::views::ViewSettings;
use crate::{Error, Result};

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learner {
    /// Every weight of text encoder and UNet.
    Weights,
    /// The embedding of the product's token (Gal et al. 2022, arXiv 2208.01618); everything else is frozen.
    Embedding,
}

/// Where and when the perceptual loss counts, beside its weight.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerceptualRecipe {
    /// `s_p`: the last step at which it counts (eq. 6).
    pub until_step: u64,
    /// Timesteps from here on are passed over: their guess of the picture is a blur. `None` passes over none.
    pub timestep_max: Option<usize>,
    /// Side, in latents, of the random square that is decoded and looked at. `None`: all of it.
    pub crop: Option<usize>,
}

/// Prompts, with `{product}`, `{class}` and `{background}` open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Templates {
    /// Of a photo as it is.
    pub photo: String,
    /// Of a view, in two clauses (section 3.3): the foreground, then the background.
    pub view: String,
    /// Of a picture of the class.
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

impl Templates {
    /// The prompt for pictures of a class.
    pub fn of_class(&self, class_name: &str) -> String {
        self.class.replace("{class}", class_name)
    }
}

/// A training, complete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The words for the product.
    #[serde(flatten)]
    pub product: Product,
    /// What is trained.
    pub learner: Learner,
    /// Steps of the optimiser.
    pub n_steps: u64,
    /// Learning rate of AdamW, constant.
    pub lr: f64,
    /// How AdamW's moments of the trained weights are kept; the discriminator's are f32.
    #[serde(default, skip_serializing_if = "MomentFormat::is_f32")]
    // recipes of earlier builds do not have it
    pub adamw_moments: MomentFormat,
    /// The losses and their weights.
    pub objective: Objective,
    /// Where the perceptual loss counts.
    pub perceptual: PerceptualRecipe,
    /// How the discriminator is trained.
    #[serde(rename = "critic")] // as it is called in files
    pub discriminator: DiscriminatorRecipe,
    /// How views are made of the photos; `None` learns from the photos as they are.
    pub views: Option<ViewSettings>,
    /// The prompts.
    pub templates: Templates,
    /// Pictures of the class; 0 trains on the product alone.
    pub n_class_images: usize,
    /// Where all random numbers come from.
    pub seed: u64,
}

impl Recipe {
    /// Refuses what contradicts itself, naming the setting.
    pub fn check(&self) -> Result<()> {
        let s_p = self.perceptual.until_step;
        if self.n_steps == 0 {
            return Err(Error::setting("steps", "wanted 1 or more, got 0"));
        }
        if s_p > self.n_steps {
            let what = format!("wanted at most the {} steps of the training, got {s_p}", self.n_steps);
            return Err(Error::setting("s_p", what));
        }
        if let Reconstruction::InverseGaussian { sigma, exponent_max } = self.objective.reconstruction
            && !(sigma > 0.0 && exponent_max > 0.0 && exponent_max <= 80.0)
        {
            // e^88 is the end of f32
            let what = format!("wanted above 0 with exponents up to 80, got {sigma} and {exponent_max}");
            return Err(Error::setting("sigma", what));
        }
        if self.has_discriminator() && self.discriminator.batch == 0 {
            return Err(Error::setting("discriminator", "wanted a batch of 1 or more, got 0"));
        }
        Ok(())
    }

    /// The settings of AdamW for the trained weights.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig { lr: self.lr, moments: self.adamw_moments, ..AdamWConfig::default() }
    }

    /// Whether the latent discriminator takes part.
    pub fn has_discriminator(&self) -> bool {
        self.objective.weights.discriminator > 0.0
    }

    /// Whether the perceptual loss ever counts.
    pub fn has_perceptual(&self) -> bool {
        self.objective.weights.perceptual > 0.0 && self.perceptual.until_step > 0
    }

    /// The prompt for a photo as it is.
    pub fn photo_prompt(&self) -> String {
        self.filled(&self.templates.photo, "")
    }

    /// The prompt for a view with this background.
    pub fn view_prompt(&self, background: &str) -> String {
        self.filled(&self.templates.view, background)
    }

    /// The prompt for pictures of the class.
    pub fn class_prompt(&self) -> String {
        self.templates.of_class(&self.product.class_name)
    }

    fn filled(&self, template: &str, background: &str) -> String {
        self.product.named(template).replace("{background}", background)
    }

    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and texts")
    }
}
