//! Fine-tunes a bundle on photos by DreamBooth, with the core as a library:
//!
//! ```sh
//! cargo run --release -p hypnos-ml --example train -- bundles/miniature mug mug.safetensors examples/photos/*.jpg
//! ```

use std::error::Error;
use std::fs;
use std::path::Path;

use hypnos_ml::bundle::Bundle;
use hypnos_ml::ops::MomentFormat;
use hypnos_ml::precision::Precision;
use hypnos_ml::product::Product;
use hypnos_ml::sample::Models;
use hypnos_ml::train::{
    DiscriminatorRecipe, Instance, Learner, Objective, PerceptualRecipe, Recipe, State, Templates,
    TrainingData, step,
};
use hypnos_ml::{device, image_io};

/// What suits the miniature. Stable Diffusion wants 2e-6 and some 800 steps.
const LEARNING_RATE: f64 = 1e-4;
const STEPS: u64 = 40;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [bundle, class_name, out, photos @ ..] = &args[..] else {
        return Err("wanted: BUNDLE CLASS OUT.safetensors PHOTO...".into());
    };
    // 1. The models: frozen ones to encode with, and trainable ones of the same weights.
    let device = device::open("cpu")?;
    let bundle = Bundle::open(Path::new(bundle))?;
    let models = Models::load(&bundle, &device, Precision::F32)?;
    let (text, unet) =
        (bundle.text_encoder(&device, Precision::F32, true)?, bundle.unet(&device, Precision::F32, true)?);
    let token = bundle.rare_tokens(&models.tokenizer).first().ok_or("the bundle has no rare token")?.clone();
    // 2. What is learned, and how.
    let recipe = Recipe {
        product: Product { token, class_name: class_name.clone(), with_class: true },
        learner: Learner::Weights,
        n_steps: STEPS,
        lr: LEARNING_RATE,
        adamw_moments: MomentFormat::F32,
        objective: Objective::dreambooth(0.0),
        perceptual: PerceptualRecipe { until_step: 0, timestep_max: None, crop: None },
        discriminator: DiscriminatorRecipe { n_steps: 0, lr: 0.0, batch: 0 },
        views: None,
        templates: Templates::default(),
        n_class_images: 0,
        seed: 7,
    };
    recipe.check()?;
    let mut data = TrainingData::default();
    for photo in photos {
        let pixels = image_io::center_square(
            &image::load_from_memory(&fs::read(photo)?)?.to_rgb8(),
            bundle.resolution(),
        );
        let moments = models.vae.encode(&image_io::signed(&pixels)?)?;
        data.instances.push(Instance { moments, prompt: recipe.photo_prompt(), pixels });
    }
    // 3. The steps.
    let mut state = State::new(text, unet, recipe.adamw(), None)?;
    while state.n_steps() < recipe.n_steps {
        let metrics = step(&mut state, &data, &recipe, &models, None, None)?;
        eprintln!("step {}: loss {:.4}", state.n_steps(), metrics.loss);
    }
    state.save_weights(Path::new(out), bundle.hash()?, &recipe)?;
    Ok(())
}
