//! Translates a client's options into the recipe of a training.

use crate::job::{
    Fault, FaultCode, LossWeights as LossWeightOptions, Method, Reconstruction as ReconstructionOption,
    TrainOptions, TrainSpec,
};
use crate::ml::bundle::{Bundle, Capability};
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
    let options = &spec.options;
    let embedding = options.method == Method::TextualInversion;
    let own = bundle.rare_tokens(tokenizer);
    let token = single_token(tokenizer, "instance_token", options.instance_token.as_ref(), own.first())?;
    let views = options.views.enabled.then(|| views(tokenizer, options, &own, &token)).transpose()?;
    let recipe = Recipe {
        product: Product { token, class_name: spec.class_name.clone(), with_class: !embedding },
        learner: if embedding { Learner::Embedding } else { Learner::Weights },
        n_steps: u64::from(options.steps),
        lr: options.learning_rate,
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
    for (wanted, capability) in [
        (recipe.views.is_some(), Capability::Segmentation),
        (recipe.has_perceptual(), Capability::PerceptualLoss),
    ] {
        if wanted && !bundle.can(capability) {
            let message = format!("method: the model's {}/ {}", capability.part(), capability.missing());
            return Err(Fault::new(FaultCode::Input, message));
        }
    }
    Ok(recipe)
}

/// How views are made, with a background token other than the product's `token`. `own` are the bundle's rare tokens.
fn views(
    tokenizer: &Tokenizer,
    options: &TrainOptions,
    own: &[String],
    token: &str,
) -> Result<ViewSettings, Fault> {
    let rest = own.iter().find(|own| *own != token);
    let background_token =
        single_token(tokenizer, "background_token", options.background_token.as_ref(), rest)?;
    if background_token == token {
        let message = format!("background_token: is \"{token}\", the same as instance_token; wanted another");
        return Err(Fault::new(FaultCode::Input, message));
    }
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

/// A word of one token: what the client names, or the bundle's own.
fn single_token(
    tokenizer: &Tokenizer,
    option: &str,
    asked: Option<&String>,
    own: Option<&String>,
) -> Result<String, Fault> {
    let Some(token) = asked.or(own) else {
        let message = format!("{option}: this model names no rare token of its own for it; one is needed");
        return Err(Fault::new(FaultCode::Input, message));
    };
    if tokenizer.is_single_token(token) {
        return Ok(token.clone());
    }
    let n = tokenizer.count(token);
    let message = format!("{option}: wanted one token of the model's vocabulary, \"{token}\" is {n}");
    Err(Fault::new(FaultCode::Input, message))
}
