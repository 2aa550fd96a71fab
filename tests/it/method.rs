//! The method's own networks against the references' packages: values, and gradients where they pass through.

use candle_core::{Tensor, Var};
use hypnos::ml::models::discriminator::{self, Discriminator};
use hypnos::ml::models::efficientnet::{EfficientNet, WeightNames};
use hypnos::ml::models::tracer::{self, Tracer};
use hypnos::ml::perceptual::{self, Perceptual, perceptual_loss};
use hypnos::ml::segment;
use image::RgbImage;
use serde_json::{Value, json};

use crate::golden::{Golden, Place, assert_close, variable};

#[test]
fn the_discriminator_agrees_with_torch() {
    discriminator_golden(&Place::cpu());
}

pub(crate) fn discriminator_golden(place: &Place) {
    let golden = Golden::open("discriminator");
    let config = sizes(&golden, "config");
    let weights = golden.weights("", place).trainable(true);
    let model = Discriminator::load(&weights, &config).expect("a discriminator");
    let latents = place.input(&golden.get("input.all.latents"));
    let scores = model.forward(&latents).expect("scores");
    assert_close("scores", &scores, &golden.get("output.all.scores"), place.model_output);
    let attention = model.attention(&latents).expect("attention");
    assert_close("attention", &attention, &golden.get("output.all.attention"), place.model_output);

    let part = |from: usize, n: usize| scores.narrow(0, from, n).expect("scores");
    let d = ((part(0, 2) - 1.0).and_then(|s| s.sqr()?.mean_all()).expect("real")
        + part(2, 3).sqr().and_then(|s| s.mean_all()).expect("fake"))
    .expect("a loss");
    assert_close("loss d", &d, &golden.get("output.all.d"), place.model_output);
    d.backward().expect("a backward");
    golden.check_gradients("all", "", &weights, place);

    let frozen = Discriminator::load(&golden.weights("", place), &config).expect("a discriminator");
    let latents = Var::from_tensor(&latents).expect("a variable");
    let score = frozen.forward(latents.as_tensor()).expect("scores").narrow(0, 4, 1).expect("the last");
    let g = (1.0 - score).and_then(|s| s.sqr()?.mean_all()).expect("a loss");
    assert_close("loss g", &g, &golden.get("output.all.g"), place.model_output);
    let grads = g.backward().expect("a backward");
    let grad = grads.get(&latents).expect("a gradient");
    place.check_gradient("latents", grad, &golden.get("grad.all.latents"));
}

fn sizes(golden: &Golden, key: &str) -> discriminator::Config {
    let config: Value = golden.metadata(key);
    let size = |name: &str| config[name].as_u64().expect("a size") as usize;
    discriminator::Config {
        latent_channels: size("channels"),
        latent_side: size("side"),
        width: size("width"),
        n_heads: size("heads"),
        n_layers: size("layers"),
        n_groups: size("groups"),
    }
}

/// A frozen discriminator of a golden: the metadata of its sizes, and where its weights lie.
pub(crate) fn discriminator(golden: &Golden, key: &str, prefix: &str, place: &Place) -> Discriminator {
    Discriminator::load(&golden.weights(prefix, place), &sizes(golden, key)).expect("a discriminator")
}

#[test]
fn the_perceptual_loss_agrees_with_timm() {
    perceptual_golden(&Place::cpu());
}

pub(crate) fn perceptual_golden(place: &Place) {
    let golden = Golden::open("perceptual");
    let config: perceptual::Config = golden.metadata("config");
    let net = Perceptual::load(&golden.weights("", place), &config, &place.device).expect("a network");
    let x = variable(&place.input(&golden.get("input.all.x")));
    let found = net.features(&x).expect("features");
    for (i, feature) in found.iter().enumerate() {
        let wanted = golden.get(&format!("output.all.feature.{i}"));
        assert_close(&format!("feature {i}"), feature, &wanted, place.model_output);
    }
    let other = net.features(&place.input(&golden.get("input.all.y"))).expect("features");
    let strides: Vec<f64> = golden.metadata("strides");
    let loss = perceptual_loss(&found, &other, &strides).expect("a loss");
    assert_close("loss", &loss, &golden.get("output.all.loss"), place.model_output);
    let grads = loss.backward().expect("a backward");
    place.check_gradient("picture", grads.get(&x).expect("a gradient"), &golden.get("grad.all.x"));
}

#[test]
fn the_segmenter_agrees_with_carvekit_from_the_photo_on() {
    tracer_golden(&Place::cpu());
}

pub(crate) fn tracer_golden(place: &Place) {
    let golden = Golden::open("tracer");
    let config: tracer::Config = golden.metadata("config");
    let photo = golden.get("input.all.photo");
    let (h, w, _) = photo.dims3().expect("a photo");
    let bytes = photo.flatten_all().and_then(|p| p.to_vec1::<u8>()).expect("bytes");
    let photo = RgbImage::from_raw(w as u32, h as u32, bytes).expect("a photo");
    let prepared = segment::prepared(&photo, config.input_size).expect("a picture");
    assert_close("prepared", &prepared, &golden.get("output.all.prepared"), 1e-4);

    // The network on the reference's own input, so that its tolerance is its own.
    let input = place.input(&golden.get("output.all.prepared"));
    let encoder = golden.weights("encoder.", place);
    let whole: Value = golden.metadata("config");
    let encoder_config = json!({
        "width_coefficient": whole["width_coefficient"], "depth_coefficient": whole["depth_coefficient"],
        "image_size": whole["image_size"], "padding": "static-same", "batch_norm_eps": 1e-3,
    });
    let encoder_config = serde_json::from_value(encoder_config).expect("a config");
    let encoder = EfficientNet::load(&encoder, &encoder_config, WeightNames::Lukemelas).expect("an encoder");
    for (i, feature) in encoder.features(&input).expect("features").iter().enumerate().skip(1) {
        let wanted = golden.get(&format!("output.all.feature.{i}"));
        assert_close(&format!("feature {i}"), feature, &wanted, place.model_output);
    }
    let tracer = Tracer::load(&golden.weights("", place), &config).expect("a segmenter");
    let map: Tensor = tracer.forward(&input).expect("a map");
    assert_close("map", &map, &golden.get("output.all.map"), place.model_output);
}
