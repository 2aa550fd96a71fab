//! Translates a client's options into the recipe of a training.

use crate::job::{
    AdamwMoments, Fault, FaultCode, LossWeights as LossWeightOptions, Method,
    Reconstruction as ReconstructionOption, TrainOptions, TrainSpec,
};
use crate::ml::bundle::{Bundle, Capability};
use crate::ml::ops::MomentFormat;
use crate::ml::product::Product;
use crate::ml::tokenizer::Tokenizer;
use crate::ml::train::{
    DiscriminatorRecipe, Learner, LossWeights, Objective, PerceptualRecipe, Recipe, Reconstruction, Templates,
};
use crate::ml::views::ViewSettings;

/// The recipe of a training with so many class images. [`FaultCode::Input`] where words and model do not fit.
pub(super) fn recipe(
    bundle: &Bundle,
    tokenizer: &Tokenizer,
    spec: &TrainSpec,
    n_class_images: usize,
) -> Result<Recipe, Fault> {
    check_class_name(&spec.class_name)?;
    let options = &spec.options.clone().with_rare_tokens(&bundle.rare_tokens(tokenizer));
    let embedding = options.method == Method::TextualInversion;
    let token = single_token(tokenizer, "instance_token", options.instance_token.as_ref())?;
    let views = options.views.enabled.then(|| views(tokenizer, options)).transpose()?;
    let recipe = Recipe {
        product: Product { token, class_name: spec.class_name.clone(), with_class: !embedding },
        learner: if embedding { Learner::Embedding } else { Learner::Weights },
        n_steps: u64::from(options.steps),
        lr: options.learning_rate,
        adamw_moments: moment_format(options.adamw_moments),
        objective: objective(options),
        perceptual: PerceptualRecipe {
            until_step: u64::from(options.s_p.unwrap_or(0)),
            timestep_max: options.perceptual.timestep_max.map(|t| t as usize),
            crop: options.perceptual.crop.map(|side| side as usize),
        },
        discriminator: DiscriminatorRecipe {
            n_steps: u64::from(options.discriminator.steps),
            lr: options.discriminator.learning_rate,
            batch: options.discriminator.batch as usize,
        },
        views,
        templates: templates(spec),
        n_class_images,
        seed: spec.seed,
    };
    recipe.check().map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
    if let Some(capability) = missing_part(bundle, options) {
        let message = format!("method: the model's {}/ {}", capability.part(), capability.missing());
        return Err(Fault::new(FaultCode::Input, message));
    }
    Ok(recipe)
}

/// What a training with these options needs and the bundle lacks; the first, if there are several.
pub fn missing_part(bundle: &Bundle, options: &TrainOptions) -> Option<Capability> {
    let wanted = [
        (options.views.enabled, Capability::Segmentation),
        (options.uses_perceptual(), Capability::PerceptualLoss),
    ];
    let mut missing = wanted.into_iter().filter(|(wanted, part)| *wanted && !bundle.can(*part));
    missing.next().map(|(_, part)| part)
}

/// How views are made.
fn views(tokenizer: &Tokenizer, options: &TrainOptions) -> Result<ViewSettings, Fault> {
    let background_token = single_token(tokenizer, "background_token", options.background_token.as_ref())?;
    let views = &options.views;
    Ok(ViewSettings {
        n: views.n as usize,
        monotone: views.monotone,
        resized: views.resized,
        scale_min: views.scale_min,
        margin: views.margin,
        background_token,
    })
}

pub(super) fn moment_format(option: AdamwMoments) -> MomentFormat {
    match option {
        AdamwMoments::Float32 => MomentFormat::F32,
        AdamwMoments::Bits8 => MomentFormat::Bits8,
    }
}

/// What a step is to lower.
fn objective(options: &TrainOptions) -> Objective {
    let LossWeightOptions { reconstruction, prior, perceptual, discriminator } = options.loss_weights;
    Objective {
        reconstruction: match options.reconstruction {
            ReconstructionOption::Mse => Reconstruction::Mse,
            ReconstructionOption::InverseGaussian => {
                Reconstruction::InverseGaussian { sigma: options.sigma, exponent_max: options.exponent_max }
            }
        },
        weights: LossWeights { reconstruction, prior, perceptual, discriminator },
        strides: options.perceptual.strides,
    }
}

/// Refuses a class name in which there is nothing to read.
fn check_class_name(name: &str) -> Result<(), Fault> {
    if name.chars().any(char::is_alphanumeric) {
        return Ok(());
    }
    Err(Fault::new(FaultCode::Input, format!("class_name: wanted words, \"{name}\" has no letter")))
}

/// The prompts that a training is asked to use.
pub(super) fn templates(spec: &TrainSpec) -> Templates {
    let asked = &spec.options.templates;
    Templates { photo: asked.photo.clone(), view: asked.view.clone(), class: asked.class.clone() }
}

/// A word of one token.
fn single_token(tokenizer: &Tokenizer, option: &str, word: Option<&String>) -> Result<String, Fault> {
    let Some(token) = word else {
        let message = format!("{option}: this model has no rare token of its own for it; one is needed");
        return Err(Fault::new(FaultCode::Input, message));
    };
    if tokenizer.is_single_token(token) {
        return Ok(token.clone());
    }
    let n = tokenizer.count(token);
    let message = format!("{option}: wanted one token of the model's vocabulary, \"{token}\" is {n}");
    Err(Fault::new(FaultCode::Input, message))
}
