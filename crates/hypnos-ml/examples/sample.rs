//! Draws an image from a bundle, or from what `train.rs` made of it, with the core as a library:
//!
//! ```sh
//! cargo run --release -p hypnos-ml --example sample -- bundles/miniature "a photo of {product}" mug.png mug.safetensors
//! ```

use std::error::Error;
use std::path::Path;

use hypnos_ml::bundle::Bundle;
use hypnos_ml::finetuned::FineTuned;
use hypnos_ml::precision::Precision;
use hypnos_ml::sample::{ImageRequest, Models, SampleSettings, draw};
use hypnos_ml::{Error as CoreError, device, image_io};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [bundle, prompt, out, weights @ ..] = &args[..] else {
        return Err("wanted: BUNDLE PROMPT OUT.png [WEIGHTS.safetensors]".into());
    };
    let bundle = Bundle::open(Path::new(bundle))?;
    let mut models = Models::load(&bundle, &device::open("cpu")?, Precision::F32)?;
    let mut prompt = prompt.clone();
    if let [weights] = weights {
        let finetuned = FineTuned::load(Path::new(weights), &bundle, &models)?;
        prompt = finetuned.product.named(&prompt);
        models = finetuned.models;
    }
    let (side, drawing) = (bundle.resolution(), bundle.manifest().drawing);
    let settings = SampleSettings {
        sampler: drawing.scheduler,
        steps: 25,
        guidance: drawing.guidance,
        width: side,
        height: side,
    };
    let request = ImageRequest { prompt, negative: String::new(), seed: 7 };
    let images = draw(&models, &[request], &settings, &mut |step, n_steps| {
        eprint!("\rstep {step} of {n_steps}");
        Ok(())
    });
    let images = images.map_err(CoreError::from)?;
    eprintln!();
    image_io::save_png(Path::new(out), &images[0], (side, side), &[])?;
    Ok(())
}
