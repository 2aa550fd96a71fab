//! The single file of Stable Diffusion 1 and 2: every weight under its original name, and metadata as ModelSpec 1.0.1 has
//! them (<https://github.com/Stability-AI/ModelSpec>), which say how to draw with it and what to call the product.
//!
//! Departure: without the date, which nothing here knows.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

use super::fine_tune::{FineTune, PARTS};
use super::format::Precision;
use super::ldm_names::{LdmNames, Place};
use crate::Result;
use crate::bundle::Bundle;
use crate::diffusion::Prediction;
use crate::ops::Activation;
use crate::tensorfile::{save_streaming_hashed, torch_metadata};

/// Writes the file `out`.
pub(super) fn write(fine_tune: &FineTune<'_>, precision: Precision, out: &Path) -> Result<()> {
    let (text, unet, vae) = fine_tune.bundle.configs();
    let names = LdmNames::new(text, unet, vae);
    let mut shapes = BTreeMap::new();
    let mut sources: BTreeMap<String, BTreeMap<usize, (&str, &String)>> = BTreeMap::new();
    for part in PARTS {
        for (name, shape) in &fine_tune.parts[part].shapes {
            let Place { name: theirs, shape, row } = names.of(part, name, shape);
            shapes.insert(theirs.clone(), shape);
            sources.entry(theirs).or_default().insert(row, (part, name));
        }
    }
    let (metadata, hash) = (metadata(fine_tune)?, "modelspec.hash_sha256");
    save_streaming_hashed(out, &shapes, &metadata, hash, precision.dtype(), |theirs| {
        let tensors = sources[theirs].values().map(|(part, name)| fine_tune.tensor(part, name));
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&tensors, 0)?.reshape(shapes[theirs].as_slice())?)
    })
}

fn metadata(fine_tune: &FineTune<'_>) -> Result<BTreeMap<String, String>> {
    let (bundle, product) = (fine_tune.bundle, &fine_tune.product);
    let (side, words) = (bundle.resolution(), product.words());
    let prediction = match bundle.schedule().prediction() {
        Prediction::Epsilon => "epsilon",
        Prediction::V => "v",
    };
    let mut pairs = vec![
        ("modelspec.sai_model_spec", "1.0.1".to_owned()),
        ("modelspec.architecture", architecture(bundle).unwrap_or("latent-diffusion").to_owned()),
        ("modelspec.implementation", implementation(bundle).to_owned()),
        ("modelspec.title", fine_tune.title()),
        ("modelspec.resolution", format!("{side}x{side}")),
        ("modelspec.prediction_type", prediction.to_owned()),
        ("modelspec.trigger_phrase", words.clone()),
        ("modelspec.usage_hint", format!("Trigger words: {words}")),
        ("modelspec.tags", product.class_name.clone()),
        ("hypnos.class_name", product.class_name.clone()),
        ("hypnos.token", product.token.clone()),
        ("hypnos.bundle_sha256", bundle.hash()?.to_owned()),
    ];
    pairs.extend(fine_tune.licence().map(|licence| ("modelspec.license", licence)));
    // Said nowhere else in the file: the original code has it in a file of settings.
    pairs.push(("hypnos.scaling_factor", bundle.scaling_factor().to_string()));
    pairs.extend(fine_tune.learned.metadata().get("recipe").map(|recipe| ("hypnos.recipe", recipe.clone())));
    let mut all = torch_metadata();
    all.extend(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)));
    Ok(all)
}

/// What ModelSpec calls the architecture, if its sizes are built into other programs.
pub(super) fn architecture(bundle: &Bundle) -> Option<&'static str> {
    let (text, unet, vae) = bundle.configs();
    let deep = |channels: &[usize], first: usize| channels == [first, 2 * first, 4 * first, 4 * first];
    let known = deep(&unet.block_out_channels, 320)
        && (0..4).all(|level| unet.n_layers(level) == 2)
        && deep(&vae.block_out_channels, 128)
        && (bundle.scaling_factor() - 0.18215).abs() < 1e-6;
    let prediction = bundle.schedule().prediction();
    match (text.hidden_size, text.num_hidden_layers, text.vocab_size, prediction) {
        _ if !known => None,
        (768, 12, 49408, _) => Some("stable-diffusion-v1"),
        (1024, 23, 49408, Prediction::Epsilon) => Some("stable-diffusion-v2-512"),
        (1024, 23, 49408, Prediction::V) => Some("stable-diffusion-v2-768-v"),
        _ => None,
    }
}

/// Where the code is that has these names.
fn implementation(bundle: &Bundle) -> &'static str {
    let (text, ..) = bundle.configs();
    match text.hidden_act {
        Activation::Gelu => "https://github.com/Stability-AI/stablediffusion",
        _ => "https://github.com/CompVis/stable-diffusion",
    }
}
