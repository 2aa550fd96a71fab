//! The models against diffusers and transformers: outputs, and the gradient of every trained weight.

use std::path::Path;

use candle_core::{Device, Result, Tensor, Var};
use hypnos::ml::bundle::Bundle;
use hypnos::ml::diffusion::{self, Schedule};
use hypnos::ml::models::clip::{self, ClipText};
use hypnos::ml::models::unet::{self, Unet};
use hypnos::ml::models::vae::{self, Vae};
use hypnos::ml::ops::{AdamW, AdamWConfig};
use hypnos::ml::precision::Precision;
use hypnos::ml::random;
use hypnos::ml::train::losses::{self, Batch, FrozenModels, Objective, losses};
use hypnos::ml::weights::Weights;
use serde_json::{Value, json};

use crate::golden::{Golden, OUTPUT, Place, assert_close, variable};

fn config<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).expect("a configuration")
}

fn mse(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    (a - b)?.sqr()?.mean_all()
}

#[test]
fn the_text_encoder_agrees_with_transformers() {
    text_encoder(&Place::cpu());
}

pub(crate) fn text_encoder(place: &Place) {
    for (name, cases) in [("clip", &["b1", "b3", "short"][..]), ("clip_gelu", &["b1", "b3"][..])] {
        let golden = Golden::open(name);
        for case in cases {
            let weights = golden.weights("", place).trainable(true);
            let model =
                ClipText::load(&weights, &golden.metadata::<clip::Config>("config")).expect("a model");
            let y = model.forward(&golden.rows(&format!("input.{case}.ids"))).expect("hidden states");
            let wanted = golden.get(&format!("output.{case}.last_hidden_state"));
            assert_close(&format!("{name} {case}"), &y, &wanted, place.model_output);
            let target = place.weight(&golden.get(&format!("input.{case}.target"))); // as f32 as hidden states
            mse(&y, &target).expect("a loss").backward().expect("a backward");
            golden.check_gradients(case, "", &weights, place);
        }
    }
}

#[test]
fn the_unet_agrees_with_diffusers() {
    unet(&Place::cpu());
}

pub(crate) fn unet(place: &Place) {
    for name in ["unet_sd15", "unet_list", "unet_odd"] {
        for (case, checkpointing, strided) in
            [("b1", false, false), ("b3", false, false), ("b3", true, false), ("b3", false, true)]
        {
            check_unet(place, name, case, true, checkpointing, strided);
        }
    }
    // One that is frozen, as for an embedding that learns, gives latents and text the same gradients.
    for trainable in [true, false] {
        for checkpointing in [false, true] {
            check_unet(place, "unet_sd2", "b2", trainable, checkpointing, false);
        }
    }
}

fn check_unet(place: &Place, name: &str, case: &str, trainable: bool, checkpointing: bool, strided: bool) {
    let golden = Golden::open(name);
    let weights = golden.weights("", place).trainable(trainable);
    let mut model = Unet::load(&weights, &golden.metadata::<unet::Config>("config")).expect("a model");
    model.checkpointing = checkpointing;
    let input = |name: &str| place.input(&golden.get(&format!("input.{case}.{name}")));
    let (x, text) = (variable(&input("latents")), variable(&input("text")));
    let turned = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    let (latents, states) = if strided {
        (turned(&x).expect("other strides"), turned(&text).expect("other strides"))
    } else {
        (x.as_tensor().clone(), text.as_tensor().clone())
    };
    assert_eq!(latents.is_contiguous(), !strided);
    let y =
        model.forward(&latents, &golden.numbers(&format!("input.{case}.t")), &states).expect("a prediction");
    let wanted = golden.get(&format!("output.{case}.noise"));
    assert_close(&format!("{name} {case}"), &y, &wanted, place.model_output);
    let grads = mse(&y, &input("noise")).and_then(|loss| loss.backward()).expect("a backward");
    if trainable {
        golden.check_gradients(case, "", &weights, place);
    }
    for (key, variable) in [("latents", &x), ("text", &text)] {
        let wanted = golden.find(&format!("grad.{case}.input.{key}")).expect("the input's gradient");
        let grad = grads.get(variable).expect("a gradient");
        place.check_gradient(&format!("{name} {case} {key}"), grad, &wanted);
    }
}

#[test]
fn the_autoencoder_agrees_with_diffusers() {
    autoencoder(&Place::cpu());
}

pub(crate) fn autoencoder(place: &Place) {
    let old = Golden::open("vae_old_names").weights("", place);
    for (name, weights, cases) in [
        ("vae", None, &["b1", "b2", "uneven"][..]),
        ("vae8", None, &["b1", "b2"][..]),
        ("vae", Some(old), &["b2"][..]),
    ] {
        let golden = Golden::open(name);
        let weights = weights.unwrap_or_else(|| golden.weights("", place));
        let config = golden.metadata::<vae::Config>("config");
        let model = Vae::load(&weights, &config).expect("a model");
        for case in cases {
            check_vae(place, &golden, &model, case);
        }
        let n_grads = weights.params().values().filter(|param| param.grad().is_some()).count();
        assert_eq!(n_grads, 0, "frozen weights get no gradient");
    }
}

fn check_vae(place: &Place, golden: &Golden, model: &Vae, case: &str) {
    let input = |name: &str| place.input(&golden.get(&format!("input.{case}.{name}")));
    let output = |name: &str| golden.get(&format!("output.{case}.{name}"));
    let moments = model.encode(&input("image")).expect("moments");
    assert_close(&format!("{case} mean"), &moments.mean, &output("mean"), place.model_output);
    assert_close(&format!("{case} logvar"), &moments.logvar, &output("logvar"), place.model_output);
    // The reference decodes unscaled latents; ours are the UNet's.
    let z = variable(&input("z"));
    let picture = (z.as_tensor() * model.scaling_factor()).and_then(|z| model.decode(&z)).expect("a picture");
    assert_close(&format!("{case} picture"), &picture, &output("image"), place.model_output);
    let loss = (picture * input("w")).and_then(|y| y.sum_all()).expect("a sum");
    let grads = loss.backward().expect("a backward");
    let wanted = golden.get(&format!("grad.{case}.input.z"));
    place.check_gradient(&format!("{case} z"), grads.get(&z).expect("a gradient"), &wanted);
}

/// Text encoder, UNet and frozen autoencoder of one small Stable Diffusion.
struct Pipeline<'a> {
    place: &'a Place,
    golden: Golden,
    text_weights: Weights,
    unet_weights: Weights,
    text: ClipText,
    unet: Unet,
    vae: Vae,
    schedule: Schedule,
}

impl<'a> Pipeline<'a> {
    /// For a UNet that predicts noise, or velocity: the models of one golden, with another's inputs and one setting.
    fn load(place: &'a Place, prediction: &str) -> Self {
        let start = Golden::open("step");
        let golden = Golden::open(if prediction == "epsilon" { "step" } else { "step_v" });
        let (configs, of_case): (Value, Value) = (start.metadata("config"), golden.metadata("config"));
        let text_weights = start.weights("text.", place).trainable(true);
        let unet_weights = start.weights("unet.", place).trainable(true);
        let text = ClipText::load(&text_weights, &config(&of_case["text"])).expect("a text encoder");
        let unet = Unet::load(&unet_weights, &config(&configs["unet"])).expect("a UNet");
        let vae = Vae::load(&start.weights("vae.", place), &config(&configs["vae"])).expect("an autoencoder");
        let schedule = json!({
            "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "clip_sample": false, "set_alpha_to_one": false, "steps_offset": 1, "prediction_type": prediction,
        });
        let schedule = diffusion::Config::parse(&schedule.to_string());
        let schedule = schedule.and_then(|config| Schedule::new(&config)).expect("a schedule");
        Self { place, golden, text_weights, unet_weights, text, unet, vae, schedule }
    }

    /// Loss a: noise loss of the instance and of the class image. Loss b: a + a tenth of the decoded picture's.
    fn loss(&self, with_picture: bool) -> hypnos::ml::Result<Tensor> {
        let input = |name: &str| self.place.input(&self.golden.get(&format!("input.all.{name}")));
        let t: Vec<usize> = self.golden.numbers("input.all.t").iter().map(|&t| t as usize).collect();
        let ids = self.golden.rows("input.all.ids");
        let (latents, noise) = (input("latents"), input("noise"));
        if !with_picture {
            let batch = Batch { latents, noise, t, ids, reference: None, crop: None };
            let frozen = FrozenModels { schedule: &self.schedule, vae: None, perceptual: None };
            let models =
                losses::LossModels { text: &self.text, unet: &self.unet, frozen, discriminator: None };
            return Ok(losses(&models, &batch, &Objective::dreambooth(1.0))?.total);
        }
        let noisy = self.schedule.q_sample(&latents, &noise, &t)?;
        assert_close("noisy", &noisy, &self.golden.get("output.all.noisy"), OUTPUT);
        let answer = self.unet.forward(&noisy, &[t[0] as f64, t[1] as f64], &self.text.forward(&ids)?)?;
        assert_close("predicted", &answer, &self.golden.get("output.all.predicted"), OUTPUT);
        let target = self.schedule.target(&latents, &noise, &t)?;
        let part = |i: usize| mse(&answer.narrow(0, i, 1)?, &target.narrow(0, i, 1)?);
        let z0 = self.schedule.x_0(&noisy.narrow(0, 0, 1)?, &answer.narrow(0, 0, 1)?, &t[..1])?;
        let picture = self.vae.decode(&z0)?;
        assert_close("picture", &picture, &self.golden.get("output.all.image"), OUTPUT);
        Ok(((part(0)? + part(1)?)? + (mse(&picture, &input("target"))? * 0.1)?)?)
    }
}

#[test]
fn the_whole_step_has_the_reference_s_gradients() {
    whole_step(&Place::cpu());
}

pub(crate) fn whole_step(place: &Place) {
    let losses = [("a", false), ("b", true)];
    for (prediction, (case, with_picture)) in
        ["epsilon", "v_prediction"].into_iter().flat_map(|p| losses.map(|l| (p, l)))
    {
        let pipeline = Pipeline::load(place, prediction);
        let loss = pipeline.loss(with_picture).expect("a loss");
        let value = f64::from(loss.to_scalar::<f32>().expect("a number"));
        let wanted = pipeline.golden.scalar(&format!("output.all.{case}"));
        assert!(
            (value - wanted).abs() <= OUTPUT * wanted,
            "loss {case} of {prediction}: {value}, wanted {wanted}"
        );
        loss.backward().expect("a backward");
        pipeline.golden.check_gradients(&format!("all.{case}"), "text.", &pipeline.text_weights, place);
        pipeline.golden.check_gradients(&format!("all.{case}"), "unet.", &pipeline.unet_weights, place);
    }
}

#[test]
fn two_optimiser_steps_of_the_whole_chain_agree_with_torch() {
    optimiser_steps(&Place::cpu());
}

pub(crate) fn optimiser_steps(place: &Place) {
    let pipeline = Pipeline::load(place, "epsilon");
    let params =
        pipeline.text_weights.params().into_iter().map(|(name, param)| (format!("text.{name}"), param));
    let unet =
        pipeline.unet_weights.params().into_iter().map(|(name, param)| (format!("unet.{name}"), param));
    let params: Vec<_> = params.chain(unet).collect();
    let config = AdamWConfig { lr: 1e-3, ..AdamWConfig::default() };
    let mut adamw = AdamW::new(params.iter().map(|(_, param)| param.clone()), config).expect("an optimiser");
    let mut n_compared = 0;
    for step in [1, 2] {
        pipeline.loss(false).expect("a loss").backward().expect("a backward");
        let norm = adamw.step().expect("a step");
        let wanted = pipeline.golden.scalar(&format!("output.all.norm.{step}"));
        assert!((norm - wanted).abs() <= OUTPUT * wanted, "step {step}: norm {norm}, wanted {wanted}");
        for (name, param) in &params {
            if let Some(wanted) = pipeline.golden.find(&format!("output.all.after.{step}.{name}")) {
                assert_close(name, &param.value(), &wanted, OUTPUT);
                n_compared += 1;
            }
        }
    }
    assert_eq!(n_compared, 20);
}

#[test]
fn a_decoder_that_is_computed_again_has_the_same_value_and_gradient_to_the_bit() {
    let vae = Bundle::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle")).expect("a bundle");
    let vae = vae.vae(&Device::Cpu, Precision::F32, false).expect("an autoencoder").model;
    let noise = random::normal(1, 0, 4 * 6 * 8);
    let latents = Var::from_vec(noise, (1, 4, 6, 8), &Device::Cpu).expect("latents");
    let bits = |x: &Tensor| {
        let values = x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values");
        values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let [kept, again] = [false, true].map(|checkpointing| {
        let picture = vae.decode_with(&latents, checkpointing).expect("a picture");
        let loss = picture.sqr().and_then(|x| x.sum_all()).expect("a loss");
        let gradients = loss.backward().expect("gradients");
        (bits(&picture), bits(gradients.get(&latents).expect("a gradient")))
    });
    assert!(kept == again);
}
