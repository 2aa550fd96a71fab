//! Models and samplers against candle-transformers, the stock Stable Diffusion in Rust: a second opinion beside
//! diffusers, on the same weights. Forward only, because its layer norms and softmax have no backward and cut gradients
//! silently.
//!
//! Where it differs from diffusers, and so from ours, the comparison goes around the difference:
//!
//! * text encoder: `stable_diffusion::clip` has SD 1.5's sizes alone and takes one prompt at a time; `clip::text_model`
//!   is the same network for any size and batch, with quick GELU alone.
//! * UNet: one timestep for the whole batch, and the tanh approximation of GELU in the feed-forwards.
//! * autoencoder: one picture at a time, since candle 0.11.1 multiplies transposed batches wrongly on a CPU
//!   (huggingface/candle#3744); the encoder gives samples in place of means and variances; no scaling factor.
//! * samplers: DDIM and Euler ancestral are the two that both have; the noise of the latter has no seed.
//!
//! [`OUTPUT`] bounds what f32 may do: an element is a sum of up to some thousand products, each rounded to 6e-8, in
//! another order on each side, which leaves about 1e-6 after a layer and 1e-5 after all of them.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use ::candle_transformers::models::clip::text_model;
use ::candle_transformers::models::stable_diffusion::{
    clip as sd_clip,
    ddim::DDIMSchedulerConfig,
    euler_ancestral_discrete::EulerAncestralDiscreteSchedulerConfig,
    schedulers::{PredictionType, Scheduler, SchedulerConfig, TimestepSpacing},
    unet_2d::{BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig},
    vae::{AutoEncoderKL, AutoEncoderKLConfig},
};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use hypnos::ml::Interrupt;
use hypnos::ml::bundle::Bundle;
use hypnos::ml::diffusion::{Config, Schedule};
use hypnos::ml::models::clip::{self, ClipText};
use hypnos::ml::param::Param;
use hypnos::ml::precision::Precision;
use hypnos::ml::random;
use hypnos::ml::samplers::{Plan, Sampler, sample};
use hypnos::ml::weights::Weights;
use serde_json::{Value, json};

use crate::golden::{OUTPUT, assert_close};

/// The whole UNet: the tanh approximation is off by up to 4.8e-4 at gates between 1 and 4, and the feed-forwards that
/// it gates are a part of a trunk that is larger.
const WITH_ANOTHER_GELU: f64 = 1e-3;

fn miniature() -> Bundle {
    Bundle::open(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("bundles/miniature")).expect("a bundle")
}

fn config(bundle: &Bundle, part: &str) -> Value {
    let text = std::fs::read_to_string(bundle.dir().join(part).join("config.json")).expect("a config");
    serde_json::from_str(&text).expect("JSON")
}

fn size(config: &Value, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("{key} is {}", config[key])) as usize
}

fn sizes(config: &Value, key: &str) -> Vec<usize> {
    let each = config[key].as_array().unwrap_or_else(|| panic!("{key} is {}", config[key]));
    each.iter().map(|size| size.as_u64().expect("a size") as usize).collect()
}

fn normal(label: &str, dims: &[usize]) -> Tensor {
    let values = random::normal(random::derive(11, label), 0, dims.iter().product());
    Tensor::from_vec(values, dims, &Device::Cpu).expect("a tensor")
}

fn tensors(params: &BTreeMap<String, Param>) -> HashMap<String, Tensor> {
    params.iter().map(|(name, param)| (name.clone(), param.value())).collect()
}

/// The weights as candle-transformers takes them: names as ours, which are those of the files; the projections around a
/// transformer as kernels of one pixel.
fn stock(tensors: &HashMap<String, Tensor>) -> VarBuilder<'static> {
    let shaped = tensors.iter().map(|(name, value)| {
        let kernel = name.ends_with("proj_in.weight") || name.ends_with("proj_out.weight");
        let value = if kernel { value.reshape(((), value.dims()[1], 1, 1)) } else { Ok(value.clone()) };
        (name.clone(), value.expect("a kernel"))
    });
    VarBuilder::from_tensors(shaped.collect(), DType::F32, &Device::Cpu)
}

fn ids_tensor(ids: &[Vec<u32>]) -> Tensor {
    Tensor::new(ids.to_vec(), &Device::Cpu).expect("ids")
}

#[test]
fn the_miniature_s_text_encoder_agrees_with_candle_transformers() {
    let bundle = miniature();
    let json = config(&bundle, "text_encoder");
    let theirs = text_model::ClipTextConfig {
        vocab_size: size(&json, "vocab_size"),
        embed_dim: size(&json, "hidden_size"),
        activation: text_model::Activation::QuickGelu,
        intermediate_size: size(&json, "intermediate_size"),
        max_position_embeddings: size(&json, "max_position_embeddings"),
        pad_with: None,
        num_hidden_layers: size(&json, "num_hidden_layers"),
        num_attention_heads: size(&json, "num_attention_heads"),
        projection_dim: size(&json, "projection_dim"),
    };
    let ours = bundle.text_encoder(&Device::Cpu, Precision::F32, false).expect("a text encoder");
    let theirs =
        text_model::ClipTextTransformer::new(stock(&tensors(&ours.params)).pp("text_model"), &theirs);
    let tokenizer = bundle.tokenizer().expect("a tokenizer");
    let ids = ["a photo of a red mug on the beach", ""].map(|prompt| tokenizer.encode(prompt));
    let wanted = theirs.and_then(|model| model.forward_with_mask(&ids_tensor(&ids), usize::MAX));
    let states = ours.model.forward(&ids).expect("hidden states");
    assert_close("text encoder", &states, &wanted.expect("hidden states"), OUTPUT);
}

/// At SD 1.5's own size, with random weights.
#[test]
fn the_text_encoder_of_sd_1_5_agrees_with_candle_transformers() {
    let config: clip::Config = serde_json::from_value(json!({
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }))
    .expect("a configuration");
    let weights = Weights::random(11, &Device::Cpu);
    let ours = ClipText::load(&weights, &config).expect("a text encoder");
    let theirs =
        sd_clip::ClipTextTransformer::new(stock(&tensors(&weights.params())), &sd_clip::Config::v1_5());
    let ids = [(0..77).map(|i| random::below(11, 0, i, 49408) as u32).collect::<Vec<u32>>()];
    let wanted = theirs.and_then(|model| model.forward_with_mask(&ids_tensor(&ids), usize::MAX));
    let states = ours.forward(&ids).expect("hidden states");
    assert_close("text encoder", &states, &wanted.expect("hidden states"), OUTPUT);
}

#[test]
fn the_unet_agrees_with_candle_transformers() {
    let bundle = miniature();
    let all = tensors(&bundle.unet(&Device::Cpu, Precision::F32, false).expect("a UNet").params);
    unet("UNet", &bundle, &all, WITH_ANOTHER_GELU);
    // Feed-forwards that give their bias alone: all the rest, without the GELU that differs.
    let silenced = all.into_iter().map(|(name, value)| {
        let silent = name.ends_with("ff.net.2.weight");
        let value = if silent { value.zeros_like().expect("zeros") } else { value };
        (name, value)
    });
    unet("UNet without feed-forwards", &bundle, &silenced.collect(), OUTPUT);
}

fn unet(what: &str, bundle: &Bundle, tensors: &HashMap<String, Tensor>, tolerance: f64) {
    let json = config(bundle, "unet");
    let kinds = json["down_block_types"].as_array().expect("kinds").iter();
    let blocks = kinds.zip(sizes(&json, "block_out_channels")).map(|(kind, out_channels)| BlockConfig {
        out_channels,
        use_cross_attn: (kind == "CrossAttnDownBlock2D").then_some(1),
        attention_head_dim: size(&json, "attention_head_dim"), // the number of heads, as in diffusers
    });
    let theirs = UNet2DConditionModelConfig {
        blocks: blocks.collect(),
        layers_per_block: size(&json, "layers_per_block"),
        norm_num_groups: size(&json, "norm_num_groups"),
        cross_attention_dim: size(&json, "cross_attention_dim"),
        ..Default::default()
    };
    let ours = bundle.unet_of(&Weights::from_tensors(tensors.clone(), &Device::Cpu)).expect("a UNet");
    let theirs = UNet2DConditionModel::new(stock(tensors), 4, 4, false, theirs).expect("a UNet");
    let text = normal("text", &[2, 77, size(&json, "cross_attention_dim")]);
    let x = normal("latents", &[2, 4, 16, 16]);
    for t in [1.0, 981.0] {
        let noise = ours.forward(&x, &[t, t], &text).expect("a prediction");
        let wanted = theirs.forward(&x, t, &text).expect("a prediction");
        assert_close(&format!("{what} at {t}"), &noise, &wanted, tolerance);
    }
}

#[test]
fn the_autoencoder_agrees_with_candle_transformers() {
    let bundle = miniature();
    let json = config(&bundle, "vae");
    let theirs = |tensors: &HashMap<String, Tensor>| {
        let config = AutoEncoderKLConfig {
            block_out_channels: sizes(&json, "block_out_channels"),
            layers_per_block: size(&json, "layers_per_block"),
            latent_channels: size(&json, "latent_channels"),
            norm_num_groups: size(&json, "norm_num_groups"),
            use_quant_conv: true,
            use_post_quant_conv: true,
        };
        AutoEncoderKL::new(stock(tensors), 3, 3, config).expect("an autoencoder")
    };
    let part = bundle.vae(&Device::Cpu, Precision::F32, false).expect("an autoencoder");
    let (ours, all) = (part.model, tensors(&part.params));

    let latents = normal("latents", &[1, 4, 16, 16]);
    let wanted = (&latents / ours.scaling_factor()).and_then(|z| theirs(&all).decode(&z));
    let picture = ours.decode(&latents).expect("a picture");
    assert_close("picture", &picture, &wanted.expect("a picture"), OUTPUT);

    let picture = (normal("picture", &[1, 3, 128, 128]) * 0.5).expect("a picture");
    let moments = ours.encode(&picture).expect("moments");
    for (what, first, value) in [("mean", 0, &moments.mean), ("log variance", 4, &moments.logvar)] {
        let wanted = theirs(&giving_rows(&all, first).expect("weights")).encode(&picture);
        let wanted = wanted.and_then(|distribution| distribution.sample()?.clamp(-30.0, 20.0)); // as diffusers does
        assert_close(what, value, &wanted.expect("latents"), OUTPUT);
    }
}

/// The weights of an autoencoder that gives four channels of its moments, from `first` on, as a mean without variance,
/// so that any sample is those channels: the other rows of the last convolution say -100 for the log variance.
fn giving_rows(tensors: &HashMap<String, Tensor>, first: usize) -> Result<HashMap<String, Tensor>> {
    let mut tensors = tensors.clone();
    for (name, rest) in [("quant_conv.weight", 0.0), ("quant_conv.bias", -100.0)] {
        let rows = tensors[name].narrow(0, first, 4)?;
        let others = (rows.zeros_like()? + rest)?;
        tensors.insert(name.to_owned(), Tensor::cat(&[rows, others], 0)?);
    }
    Ok(tensors)
}

fn schedule(prediction: &str, spacing: &str) -> Schedule {
    let text = json!({
        "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "clip_sample": false, "set_alpha_to_one": false, "steps_offset": 1,
        "prediction_type": prediction, "timestep_spacing": spacing,
    });
    Config::parse(&text.to_string()).and_then(|config| Schedule::new(&config)).expect("a schedule")
}

/// In place of a UNet: any answer of order 1 that depends on all it is given.
fn answer(x: &Tensor, t: f64) -> Result<Tensor> {
    (x * 0.7)?.affine(1.0, (t / 100.0).sin())?.tanh()
}

/// Latents by our sampler and by theirs. Neither draws noise on the way.
fn both(
    sampler: Sampler,
    schedule: &Schedule,
    steps: usize,
    theirs: &mut dyn Scheduler,
) -> Result<(Tensor, Tensor)> {
    let noise = normal("noise", &[2, 4, 8, 8]);
    let mut none = |_: usize| -> Result<Tensor> { candle_core::bail!("noise was asked for") };
    let mut go_on = |_, _| Ok::<_, Interrupt<()>>(());
    let ours = sample(sampler, schedule, steps, &noise, &mut answer, &mut none, &mut go_on);
    let mut x = (noise * theirs.init_noise_sigma())?;
    for t in theirs.timesteps().to_vec() {
        let seen = theirs.scale_model_input(x.clone(), t)?;
        x = theirs.step(&answer(&seen, t as f64)?, t, &x)?;
    }
    Ok((ours.expect("latents"), x))
}

fn timesteps(theirs: &dyn Scheduler) -> Vec<f64> {
    theirs.timesteps().iter().map(|&t| t as f64).collect()
}

/// Theirs has the noise schedule in f64, ours and diffusers in f32: after a thousand factors the two are up to 1000 x
/// 6e-8 apart.
#[test]
fn ddim_and_its_noise_agree_with_candle_transformers() {
    for (prediction, prediction_type) in
        [("epsilon", PredictionType::Epsilon), ("v_prediction", PredictionType::VPrediction)]
    {
        for (spacing, timestep_spacing, steps) in [
            ("leading", TimestepSpacing::Leading, 20),
            ("leading", TimestepSpacing::Leading, 30),
            ("trailing", TimestepSpacing::Trailing, 20), // for other divisors of 1000 theirs is not diffusers'
        ] {
            let schedule = schedule(prediction, spacing);
            let config = DDIMSchedulerConfig { prediction_type, timestep_spacing, ..Default::default() };
            let mut theirs = config.build(steps).expect("a scheduler");
            let plan = Plan::new(Sampler::Ddim, &schedule, steps).expect("a plan");
            assert_eq!(plan.timesteps, timesteps(theirs.as_ref()), "{spacing} {steps}");
            let (ours, wanted) = both(Sampler::Ddim, &schedule, steps, theirs.as_mut()).expect("latents");
            assert_close(&format!("{prediction} {spacing} {steps}"), &ours, &wanted, OUTPUT);
        }
    }
    let schedule = schedule("epsilon", "leading");
    let theirs = DDIMSchedulerConfig::default().build(20).expect("a scheduler");
    let (clean, noise) = (normal("clean", &[1, 4, 8, 8]), normal("noise", &[1, 4, 8, 8]));
    for t in [0, 1, 500, 999] {
        let ours = schedule.q_sample(&clean, &noise, &[t]).expect("latents");
        let wanted = theirs.add_noise(&clean, noise.clone(), t).expect("latents");
        assert_close(&format!("noise at {t}"), &ours, &wanted, OUTPUT);
    }
}

/// One step ends at no noise and so draws none: compared whole. Of more steps, the timesteps and the noise levels.
#[test]
fn euler_ancestral_agrees_with_candle_transformers_up_to_its_noise() {
    for (spacing, timestep_spacing) in
        [("leading", TimestepSpacing::Leading), ("trailing", TimestepSpacing::Trailing)]
    {
        let schedule = schedule("epsilon", spacing);
        let config = EulerAncestralDiscreteSchedulerConfig { timestep_spacing, ..Default::default() };
        let build = |steps| config.build(steps).expect("a scheduler");
        let (ours, wanted) = both(Sampler::EulerAncestral, &schedule, 1, build(1).as_mut()).expect("latents");
        assert_close(&format!("one step, {spacing}"), &ours, &wanted, OUTPUT);

        let (plan, theirs) = (Plan::new(Sampler::EulerAncestral, &schedule, 20), build(20));
        let plan = plan.expect("a plan");
        assert_eq!(plan.timesteps, timesteps(theirs.as_ref()), "{spacing}");
        let one = Tensor::ones(1, DType::F32, &Device::Cpu).expect("a number");
        let scales = theirs.timesteps().iter().map(|&t| theirs.scale_model_input(one.clone(), t));
        let scales = scales.collect::<Result<Vec<_>>>().and_then(|scales| Tensor::cat(&scales, 0));
        let ours: Vec<f32> = plan.sigmas[..20].iter().map(|sigma| (1.0 / sigma.hypot(1.0)) as f32).collect();
        let ours = Tensor::new(ours, &Device::Cpu).expect("numbers");
        assert_close(&format!("noise levels, {spacing}"), &ours, &scales.expect("numbers"), OUTPUT);
    }
}
