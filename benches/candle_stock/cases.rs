//! What is measured: Stable Diffusion 1.5's models in both implementations, with the same weights and inputs.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::stable_diffusion::clip as stock_clip;
use candle_transformers::models::stable_diffusion::unet_2d::{
    UNet2DConditionModel, UNet2DConditionModelConfig,
};
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use hypnos::ml::models::clip::{self, ClipText};
use hypnos::ml::models::unet::{self, Unet};
use hypnos::ml::models::vae::{self, Vae};
use hypnos::ml::param::Param;
use hypnos::ml::weights::Weights;
use hypnos::ml::{Error, Result};

use super::inputs::{SEED, TEXT, UNET, VAE, config, json, normal, token_ids};
use super::sides::{Pair, Trained};

/// One row of the table.
pub(super) struct Case {
    pub(super) name: &'static str,
    /// Memory that both sides take together at their peak, GiB, roughly.
    pub(super) gib: f64,
    pub(super) build: fn(Pass) -> Result<Pair>,
    pub(super) pass: Pass,
}

/// How far a case goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// The output, with frozen weights.
    Forward,
    /// The output, then the gradients of its mean squared distance from noise.
    Backward,
}

pub(super) fn all() -> Vec<Case> {
    vec![
        case("text-encoder/fwd", 1.5, Pass::Forward, text_encoder),
        case("text-encoder/fwd+bwd", 3.0, Pass::Backward, text_encoder),
        case("unet-32-b2/fwd", 6.0, Pass::Forward, |pass| unet([2, 4, 32, 32], pass)),
        case("unet-64-b2/fwd", 9.0, Pass::Forward, |pass| unet([2, 4, 64, 64], pass)),
        case("unet-32-b1/fwd+bwd", 18.0, Pass::Backward, |pass| unet([1, 4, 32, 32], pass)),
        case("vae-decode-32/fwd", 4.0, Pass::Forward, vae_decode),
        case("vae-decode-32/fwd+bwd", 10.0, Pass::Backward, vae_decode),
    ]
}

fn case(name: &'static str, gib: f64, pass: Pass, build: fn(Pass) -> Result<Pair>) -> Case {
    Case { name, gib, build, pass }
}

/// The text encoder on one prompt.
fn text_encoder(pass: Pass) -> Result<Pair> {
    let sizes: clip::Config = config(&json(TEXT))?;
    let weights = Weights::random(SEED, &Device::Cpu).trainable(pass == Pass::Backward);
    let ours = ClipText::load(&weights, &sizes)?;
    let (builder, trained) = share(&weights.params(), pass)?;
    let stock = stock_clip::ClipTextTransformer::new(builder, &stock_clip::Config::v1_5())?;
    let ids = token_ids(77, sizes.vocab_size);
    let ids_tensor = Tensor::from_vec(ids.clone(), (1, 77), &Device::Cpu)?;
    let ids = [ids];
    let stock = move || stock.forward_with_mask(&ids_tensor, usize::MAX);
    Pair::new(pass, move || ours.forward(&ids), stock, trained)
}

/// The UNet on latents of this shape.
fn unet(latents: [usize; 4], pass: Pass) -> Result<Pair> {
    let sizes: unet::Config = config(&json(UNET))?;
    let weights = Weights::random(SEED, &Device::Cpu).trainable(pass == Pass::Backward);
    let ours = Unet::load(&weights, &sizes)?;
    let (builder, trained) = share(&weights.params(), pass)?;
    // Its default is SD 1.5's but for the width of the text.
    let stock = UNet2DConditionModelConfig { cross_attention_dim: 768, ..Default::default() };
    let stock = UNet2DConditionModel::new(builder, 4, 4, false, stock)?;
    let (x, text) = (noise("latents", &latents)?, noise("text", &[latents[0], 77, 768])?);
    let (same_x, same_text, t) = (x.clone(), text.clone(), vec![500.0; latents[0]]);
    let stock = move || stock.forward(&same_x, 500.0, &same_text);
    Pair::new(pass, move || ours.forward(&x, &t, &text), stock, trained)
}

/// The autoencoder's decoder: its weights are frozen, and a backward goes to the latents.
fn vae_decode(pass: Pass) -> Result<Pair> {
    let sizes: vae::Config = config(&json(VAE))?;
    let weights = Weights::random(SEED, &Device::Cpu);
    let ours = Vae::load(&weights, &sizes)?;
    let (builder, _) = share(&weights.params(), Pass::Forward)?;
    let stock = AutoEncoderKLConfig {
        block_out_channels: vec![128, 256, 512, 512],
        layers_per_block: 2,
        latent_channels: 4,
        norm_num_groups: 32,
        use_quant_conv: true,
        use_post_quant_conv: true,
    };
    let stock = AutoEncoderKL::new(builder, 3, 3, stock)?;
    let latents = noise("latents", &[1, 4, 32, 32])?;
    let vars = (Var::from_tensor(&latents)?, Var::from_tensor(&latents)?);
    let trained = (Trained::Vars(vec![vars.0.clone()]), Trained::Vars(vec![vars.1.clone()]));
    // Inputs that are no variables keep a forward from recording its graph.
    let input = |var: Var| if pass == Pass::Forward { latents.clone() } else { var.into_inner() };
    let (our_input, stock_input) = (input(vars.0), input(vars.1));
    let stock = move || stock.decode(&(&stock_input / 0.18215)?);
    Pair::new(pass, move || ours.decode(&our_input), stock, trained)
}

/// Our weights as candle-transformers takes them, and what of both sides may get a gradient: all weights in a backward,
/// theirs being copies as variables; in a forward the two share them.
fn share(params: &BTreeMap<String, Param>, pass: Pass) -> Result<(VarBuilder<'static>, (Trained, Trained))> {
    let shaped = |name: &str, value: Tensor| {
        // The projections around a transformer are matrices here and kernels of one pixel there.
        let kernel = name.ends_with("proj_in.weight") || name.ends_with("proj_out.weight");
        if kernel { value.reshape(((), value.dims()[1], 1, 1)) } else { Ok(value) }
    };
    let mut tensors = HashMap::new();
    for (name, param) in params {
        tensors.insert(name.clone(), shaped(name, param.value())?);
    }
    if pass == Pass::Forward {
        let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        return Ok((builder, (Trained::Params(Vec::new()), Trained::Vars(Vec::new()))));
    }
    let map = VarMap::new();
    let mut all = map.data().lock().map_err(|_| Error::input("the map of variables is poisoned"))?;
    for (name, tensor) in tensors {
        all.insert(name, Var::from_tensor(&tensor)?);
    }
    drop(all);
    let trained = (Trained::Params(params.values().cloned().collect()), Trained::Vars(map.all_vars()));
    Ok((VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu), trained))
}

fn noise(label: &str, dims: &[usize]) -> candle_core::Result<Tensor> {
    normal(label, dims, 1.0, &Device::Cpu)
}
