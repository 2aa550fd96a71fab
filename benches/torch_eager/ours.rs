//! Our side of a case: builds its inputs, then runs and times it.

use std::any::Any;
use std::time::Instant;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var};
use hypnos::ml;
use hypnos::ml::bundle::Part;
use hypnos::ml::diffusion::{self, Schedule};
use hypnos::ml::models::clip::ClipText;
use hypnos::ml::models::unet::Unet;
use hypnos::ml::models::vae::Vae;
use hypnos::ml::ops::{self, Activation, AdamW, AdamWConfig, Conv2dSpec};
use hypnos::ml::param::Param;
use hypnos::ml::perceptual::Perceptual;
use hypnos::ml::precision::Precision;
use hypnos::ml::train::{Batch, DiscriminatorTrainer, FrozenModels, Objective, Reconstruction, State};
use hypnos::ml::weights::Weights;
use serde_json::Value;

use super::cases::{Looks, Pass, Work};
use super::inputs::{SEED, config, normal, token_ids};

/// Where and in which numbers a case is computed.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub device: Device,
    /// Of what flows through operations and models; weights, statistics and gradients of weights are f32 throughout.
    pub dtype: DType,
}

/// A case whose inputs lie ready.
pub(super) struct Ready {
    device: Device,
    params: Vec<Param>,
    /// Done before each run, outside of the time.
    before: Box<dyn FnMut() -> Result<()>>,
    /// What is timed. It returns what a caller would keep, so that the time has no freeing of results in it.
    run: Box<dyn FnMut() -> Result<Box<dyn Any>>>,
}

impl Ready {
    pub(super) fn new(work: &Work, pass: Pass, on: &Place) -> ml::Result<Self> {
        match work {
            Work::Adamw { shapes, .. } => Ok(adamw(shapes, on)?),
            Work::Text { config, tokens } => text(config, *tokens, pass, on),
            Work::Unet { config, latents, .. } => unet(config, latents, pass, on),
            Work::VaeDecode { config, latents } => vae_decode(config, latents, pass, on),
            Work::Train { text, config, latents, checkpointing, perceptual, discriminator } => {
                train([text, config], latents, *checkpointing, perceptual.as_ref(), *discriminator, on)
            }
            op => Ok(operation(op, pass, on)?),
        }
    }

    /// Seconds of one run, the mean of `n`.
    pub(super) fn measure(&mut self, n: usize) -> ml::Result<f64> {
        let mut seconds = 0.0;
        for _ in 0..n {
            (self.before)()?;
            self.device.synchronize()?; // a GPU runs behind
            let start = Instant::now();
            let kept = (self.run)()?;
            self.device.synchronize()?;
            seconds += start.elapsed().as_secs_f64();
            drop(kept);
            for param in &self.params {
                param.take_grad();
            }
        }
        Ok(seconds / n as f64)
    }

    fn of(on: &Place, params: Vec<Param>, run: impl FnMut() -> Result<Box<dyn Any>> + 'static) -> Self {
        Self { device: on.device.clone(), params, before: Box::new(|| Ok(())), run: Box::new(run) }
    }
}

impl Place {
    /// Seeded normal numbers of the given standard deviation, f32.
    fn normal(&self, label: &str, dims: &[usize], std: f32) -> Result<Tensor> {
        normal(label, dims, std, &self.device)
    }

    /// The same in the dtype of the computation.
    fn input(&self, label: &str, dims: &[usize], std: f32) -> Result<Tensor> {
        self.normal(label, dims, std)?.to_dtype(self.dtype)
    }

    /// The gradient that comes from above: fixed, and different everywhere.
    fn upstream(&self, dims: &[usize]) -> Result<Tensor> {
        self.input("upstream", dims, 1.0)
    }

    /// Random weights of a model that computes in the dtype.
    fn weights(&self, trained: bool) -> Weights {
        let precision = if self.dtype == DType::BF16 { Precision::Bf16 } else { Precision::F32 };
        Weights::random(SEED, &self.device).computing_in(precision).trainable(trained)
    }

    /// Refuses what computes in f32 alone.
    fn wants_f32(&self, what: &str) -> Result<()> {
        match self.dtype {
            DType::F32 => Ok(()),
            other => candle_core::bail!("{what} computes in f32 alone, not in {}", other.as_str()),
        }
    }
}

type Apply = dyn Fn(&[Tensor], &[Param]) -> Result<Tensor>;

/// The shapes of the inputs and weights of one operation, and the operation on them.
struct Operation {
    inputs: Vec<Vec<usize>>,
    params: Vec<Vec<usize>>,
    apply: Box<Apply>,
}

impl Operation {
    fn new(
        inputs: &[&[usize]],
        params: &[&[usize]],
        apply: impl Fn(&[Tensor], &[Param]) -> Result<Tensor> + 'static,
    ) -> Self {
        let owned = |shapes: &[&[usize]]| shapes.iter().map(|shape| shape.to_vec()).collect();
        Self { inputs: owned(inputs), params: owned(params), apply: Box::new(apply) }
    }

    fn of(work: &Work) -> Result<Self> {
        Ok(match *work {
            Work::Conv2d { x, weight, stride, padding } => {
                let spec = Conv2dSpec::padded(stride, padding);
                Self::new(&[&x], &[&weight, &weight[..1]], move |x, w| {
                    ops::conv2d(&x[0], &w[0], w.get(1), spec)
                })
            }
            Work::Depthwise { x, weight, stride, padding } => {
                let spec = Conv2dSpec::padded(stride, padding);
                Self::new(&[&x], &[&weight, &weight[..1]], move |x, w| {
                    ops::depthwise_conv2d(&x[0], &w[0], w.get(1), spec)
                })
            }
            Work::Linear { ref x, weight, bias } => {
                let params: &[&[usize]] = &[&weight, &weight[..1]];
                let params = if bias { params } else { &params[..1] };
                Self::new(&[x], params, |x, w| ops::linear(&x[0], &w[0], w.get(1)))
            }
            Work::LayerNorm { ref x } => {
                let width = &x[x.len() - 1..];
                Self::new(&[x], &[width, width], |x, w| ops::layer_norm(&x[0], &w[0], &w[1], 1e-5))
            }
            Work::GroupNormSilu { x, groups } => Self::new(&[&x], &[&x[1..2], &x[1..2]], move |x, w| {
                ops::group_norm(&x[0], &w[0], &w[1], groups, 1e-5, true)
            }),
            Work::Attention { q, kv, heads } => {
                Self::new(&[&q, &kv, &kv], &[], move |x, _| ops::attention(&x[0], &x[1], &x[2], heads, false))
            }
            Work::Softmax { ref x } => Self::new(&[x], &[], |x, _| ops::softmax(&x[0])),
            Work::Geglu { ref x } => Self::new(&[x], &[], |x, _| ops::geglu(&x[0])),
            Work::Activation { ref x, kind } => {
                let kind = match kind {
                    "silu" => Activation::Silu,
                    "gelu" => Activation::Gelu,
                    "quick_gelu" => Activation::QuickGelu,
                    other => candle_core::bail!("no activation {other}"),
                };
                Self::new(&[x], &[], move |x, _| ops::activate(&x[0], kind))
            }
            Work::Upsample { x, size: [h, w] } => {
                Self::new(&[&x], &[], move |x, _| ops::upsample_nearest(&x[0], (h, w)))
            }
            Work::Embedding { ids, table } => {
                let ids = token_ids(ids, table[0]);
                Self::new(&[], &[&table], move |_, w| ops::embedding(&ids, &[1, ids.len()], &w[0]))
            }
            _ => candle_core::bail!("not a single operation: {work:?}"),
        })
    }
}

fn operation(work: &Work, pass: Pass, on: &Place) -> Result<Ready> {
    let Operation { inputs, params, apply } = Operation::of(work)?;
    let inputs = inputs.iter().enumerate().map(|(i, dims)| on.input(&format!("input {i}"), dims, 1.0));
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    let trained = pass == Pass::Backward;
    let params = params.iter().enumerate().map(|(i, dims)| {
        let fan_in: usize = dims[1..].iter().product();
        let value = on.normal(&format!("weight {i}"), dims, 1.0 / (fan_in as f32).sqrt())?;
        Param::new(format!("weight {i}"), value, trained)
    });
    let params = params.collect::<Result<Vec<_>>>()?;
    let weights = params.clone();
    if !trained {
        return Ok(Ready::of(on, params, move || Ok(Box::new(apply(&inputs, &weights)?))));
    }
    let upstream = on.upstream(apply(&inputs, &weights)?.dims())?;
    let variables = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    Ok(Ready::of(on, params, move || {
        let inputs: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        let grads = meet(&apply(&inputs, &weights)?, &upstream)?.backward()?;
        if let Some(missing) = variables.iter().position(|v| grads.get(v).is_none()) {
            candle_core::bail!("input {missing} got no gradient");
        }
        expect_grads(&weights)?;
        Ok(Box::new(grads))
    }))
}

/// A model that trains nothing would look fast.
fn expect_grads(params: &[Param]) -> Result<()> {
    match params.iter().find(|param| param.grad().is_none()) {
        Some(param) => candle_core::bail!("{} got no gradient", param.name()),
        None => Ok(()),
    }
}

/// A scalar whose gradient in `y` is `upstream`, as PyTorch's `y.backward(upstream)` has it.
fn meet(y: &Tensor, upstream: &Tensor) -> Result<Tensor> {
    y.apply_op1(Upstream(upstream.clone()))
}

/// Computes nothing, so that a case is not charged for a loss that a model has only once.
struct Upstream(Tensor);

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, x: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let scalar = Shape::from(());
        Ok((x.device().zeros_impl(&scalar, DType::F32)?, scalar))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

fn adamw(shapes: &[[usize; 2]], on: &Place) -> Result<Ready> {
    on.wants_f32("AdamW")?;
    let tensor = |what: &str, i: usize| on.normal(&format!("{what} {i}"), &shapes[i], 0.02);
    let params = (0..shapes.len()).map(|i| Param::new(format!("weight {i}"), tensor("weight", i)?, true));
    let params = params.collect::<Result<Vec<_>>>()?;
    let grads = (0..shapes.len()).map(|i| tensor("gradient", i)).collect::<Result<Vec<_>>>()?;
    let mut optimiser = AdamW::new(params.clone(), AdamWConfig::default())?;
    let weights = params.clone();
    Ok(Ready {
        device: on.device.clone(),
        params,
        before: Box::new(move || weights.iter().zip(&grads).try_for_each(|(w, grad)| give_grad(w, grad))),
        run: Box::new(move || Ok(Box::new(optimiser.step()?))),
    })
}

/// Gives a weight this gradient the only way there is: through a graph.
fn give_grad(param: &Param, grad: &Tensor) -> Result<()> {
    let n_rows = param.dims()[0];
    let ids: Vec<u32> = (0..n_rows as u32).collect();
    meet(&ops::embedding(&ids, &[n_rows], param)?, grad)?.backward()?;
    Ok(())
}

/// All weights of a model that was just loaded.
fn params_of(weights: &Weights) -> Vec<Param> {
    weights.params().into_values().collect()
}

fn text(json: &Value, n_tokens: usize, pass: Pass, on: &Place) -> ml::Result<Ready> {
    let trained = pass == Pass::Backward;
    let weights = on.weights(trained);
    let config = config::<hypnos::ml::models::clip::Config>(json)?;
    let model = ClipText::load(&weights, &config)?;
    let ids = [token_ids(n_tokens, config.vocab_size)];
    let params = params_of(&weights);
    if !trained {
        return Ok(Ready::of(on, params, move || Ok(Box::new(model.forward(&ids)?))));
    }
    // Hidden states are f32 in every precision.
    let upstream = on.normal("upstream", &[1, n_tokens, config.hidden_size], 1.0)?;
    let weights = params.clone();
    Ok(Ready::of(on, params, move || {
        let grads = meet(&model.forward(&ids)?, &upstream)?.backward()?;
        expect_grads(&weights)?;
        Ok(Box::new(grads))
    }))
}

fn unet(json: &Value, latents: &[usize; 4], pass: Pass, on: &Place) -> ml::Result<Ready> {
    let weights = on.weights(pass != Pass::Forward);
    let config = config::<hypnos::ml::models::unet::Config>(json)?;
    let model = Unet::load(&weights, &config)?;
    let (x, noise) = (on.input("latents", latents, 1.0)?, on.input("noise", latents, 1.0)?);
    let text = on.input("text", &[latents[0], 77, config.cross_attention_dim], 1.0)?;
    let t = vec![500.0; latents[0]];
    let params = params_of(&weights);
    if pass == Pass::Forward {
        return Ok(Ready::of(on, params, move || Ok(Box::new(model.forward(&x, &t, &text)?))));
    }
    let stepping = (pass == Pass::Step).then(|| AdamW::new(params.clone(), AdamWConfig::default()));
    let (mut optimiser, weights) = (stepping.transpose()?, params.clone());
    Ok(Ready::of(on, params, move || {
        let loss = (model.forward(&x, &t, &text)? - &noise)?.sqr()?.mean_all()?;
        let grads = loss.backward()?;
        expect_grads(&weights)?;
        if let Some(optimiser) = &mut optimiser {
            optimiser.step()?;
        }
        Ok(Box::new(grads))
    }))
}

/// An instance and a class image through text encoder and UNet, both trained, and what `looks` and `discriminator` add.
fn train(
    [text, unet]: [&Value; 2],
    latents: &[usize; 4],
    checkpointing: bool,
    looks: Option<&Looks>,
    discriminator: bool,
    on: &Place,
) -> ml::Result<Ready> {
    // 1. What learns.
    let text_config = config::<hypnos::ml::models::clip::Config>(text)?;
    let text_weights = on.weights(true);
    let text = Part { model: ClipText::load(&text_weights, &text_config)?, params: text_weights.params() };
    let unet_weights = on.weights(true);
    let model = Unet::load(&unet_weights, &config(unet)?)?;
    let mut unet = Part { model, params: unet_weights.params() };
    unet.model.checkpointing = checkpointing;
    let [_, channels, side, _] = *latents;
    let trainer = discriminator
        .then(|| DiscriminatorTrainer::new(channels, side, 1e-4, SEED, &on.device))
        .transpose()?;
    let mut state = State::new(text, unet, AdamWConfig::default(), trainer)?;

    // 2. The frozen models.
    let schedule = Schedule::new(&diffusion::Config::parse(SCHEDULE)?)?;
    let load = |looks: &Looks| -> ml::Result<(Vae, Perceptual)> {
        let vae = Vae::load(&on.weights(false), &config(&looks.vae)?)?;
        let weights = Weights::random(SEED, &on.device); // it computes in f32 whatever the models do
        Ok((vae, Perceptual::load(&weights, &config(&looks.classifier)?, &on.device)?))
    };
    let looks = looks.map(load).transpose()?;

    // 3. What is looked at.
    let reference = |factor| on.normal("reference", &[1, 3, side * factor, side * factor], 0.5);
    let batch = Batch {
        latents: on.normal("latents", latents, 1.0)?,
        noise: on.normal("noise", latents, 1.0)?,
        t: vec![321, 810],
        ids: (0..2).map(|_| token_ids(77, text_config.vocab_size)).collect(),
        reference: looks.as_ref().map(|(vae, _)| reference(vae.factor())).transpose()?,
        crop: None,
    };
    let shown = || on.normal("shown", &[8, channels, side, side], 1.0);
    let shown = discriminator.then(|| Ok::<_, candle_core::Error>((shown()?, shown()?))).transpose()?;
    let mut objective = Objective::dreambooth(1.0);
    if looks.is_some() || discriminator {
        objective.reconstruction = Reconstruction::InverseGaussian { sigma: 1.382, exponent_max: 20.0 };
        objective.weights.perceptual = if looks.is_some() { 0.003 } else { 0.0 };
        objective.weights.discriminator = if discriminator { 0.5 } else { 0.0 };
        objective.strides = [1.0, 0.5, 0.25, 0.125, 0.0625];
    }
    Ok(Ready::of(on, Vec::new(), move || {
        let (vae, perceptual) = looks.as_ref().map(|(vae, net)| (vae, net)).unzip();
        let frozen = FrozenModels { schedule: &schedule, vae, perceptual };
        let taken = state.step(frozen, &batch, &objective, shown.clone(), None);
        Ok(Box::new(taken.map_err(candle_core::Error::wrap)?))
    }))
}

/// The noise schedule of Stable Diffusion 1.5.
const SCHEDULE: &str = r#"{
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1
}"#;

/// Weights frozen, gradient to the latents, as a loss on pictures needs it.
fn vae_decode(json: &Value, latents: &[usize; 4], pass: Pass, on: &Place) -> ml::Result<Ready> {
    let weights = on.weights(false);
    let model = Vae::load(&weights, &config(json)?)?;
    let (latents, params) = (on.input("latents", latents, 1.0)?, params_of(&weights));
    if pass == Pass::Forward {
        return Ok(Ready::of(on, params, move || Ok(Box::new(model.decode(&latents)?))));
    }
    let upstream = on.upstream(model.decode(&latents)?.dims())?;
    let latents = Var::from_tensor(&latents)?;
    Ok(Ready::of(on, params, move || {
        let grads = meet(&model.decode(&latents)?, &upstream)?.backward()?;
        if grads.get(&latents).is_none() {
            candle_core::bail!("the latents got no gradient");
        }
        Ok(Box::new(grads))
    }))
}
