//! Training: DreamBooth with prior preservation (Ruiz et al. 2023, arXiv 2208.12242) on text encoder and UNet.
//!
//! Step k draws photo, class image, timesteps and noise from counters of the recipe's seed, and nothing else is drawn:
//! a training that was saved at k and resumed is, byte for byte, one that never stopped. No files but those given, no
//! clock; who watches is told after each step and may look at the weights, not change them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::adapted::{self, Product, TEXT_ENCODER, UNET};
use super::bundle::{Bundle, Part};
use super::diffusion::Schedule;
use super::models::vae::Moments;
use super::models::{clip::ClipText, unet::Unet};
use super::ops::{AdamW, AdamWConfig};
use super::param::Param;
use super::sample::Models;
use super::tensorfile::{TensorFile, save_streaming};
use super::weights::Weights;
use super::{Error, Result, random};

/// What `format` says in the metadata of a checkpoint.
const FORMAT: &str = "hypnos checkpoint 1";

/// What is trained, and how: all that decides the result beside weights and pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The words for the product.
    #[serde(flatten)]
    pub product: Product,
    /// Steps of the optimiser.
    pub n_steps: u64,
    /// Learning rate, constant.
    pub lr: f64,
    /// What a class image's loss counts beside a photo's.
    pub prior_weight: f64,
    /// Class images; 0 trains on the photos alone.
    pub n_class_images: usize,
    /// Where all random numbers come from.
    pub seed: u64,
}

impl Recipe {
    /// The words for a photo.
    pub fn instance_prompt(&self) -> String {
        format!("a photo of {}", self.product.words())
    }

    /// The words for a class image.
    pub fn class_prompt(&self) -> String {
        class_prompt(&self.product.class_name)
    }

    fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and texts")
    }
}

/// The words for any thing of a class.
pub fn class_prompt(class_name: &str) -> String {
    format!("a photo of {class_name}")
}

/// What is learned from: each picture as the distribution of its latents, `[1, c, h, w]`, where the weights lie.
#[derive(Clone, Debug)]
pub struct Material {
    /// The photos, at least one.
    pub photos: Vec<Moments>,
    /// Pictures of the class; may be empty.
    pub class_images: Vec<Moments>,
}

/// What one step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Taken {
    /// The loss before the step.
    pub loss: f32,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f32,
}

/// Takes the steps that `recipe` wants and `state` has not taken yet.
///
/// `models` are the bundle's: tokenizer, autoencoder and schedule. `observe` hears of each step and may stop; gives
/// whether all steps were taken. [`Error::Diverged`] where a loss or gradient is not finite; the weights are then as
/// the step before left them.
pub fn train(
    state: &mut State,
    material: &Material,
    recipe: &Recipe,
    models: &Models,
    observe: &mut dyn FnMut(&State) -> ControlFlow<()>,
) -> Result<bool> {
    // 1. What never changes: the words.
    let photo_ids = models.tokenizer.encode(&recipe.instance_prompt());
    let class_ids = models.tokenizer.encode(&recipe.class_prompt());
    while state.n_steps() < recipe.n_steps {
        // 2. Draw a photo, a class image, their timesteps and noise.
        let batch = draw(material, recipe, models, [&photo_ids, &class_ids], state.n_steps())?;
        // 3. Diffuse, predict, compare; clip and step.
        state.step(&models.schedule, &batch)?;
        // 4. Tell.
        if observe(state).is_break() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The batch of step `step`, counted from 0: a pure function of its arguments.
fn draw(
    material: &Material,
    recipe: &Recipe,
    models: &Models,
    ids: [&Vec<u32>; 2],
    step: u64,
) -> Result<Batch> {
    let seed = |label: &str| random::derive(recipe.seed, label);
    let one_of = |images: &[Moments], label: &str| {
        let drawn = (!images.is_empty()).then(|| dealt(seed(label), step, images.len()));
        drawn.map(|i| images[i].clone())
    };
    let photo = one_of(&material.photos, "photo").ok_or_else(|| Error::bad("training: no photos"))?;
    let mut rows = vec![photo];
    rows.extend(one_of(&material.class_images, "class image"));
    let b = rows.len();

    let join = |part: fn(&Moments) -> &Tensor| Tensor::cat(&rows.iter().map(part).collect::<Vec<_>>(), 0);
    let moments = Moments { mean: join(|row| &row.mean)?, logvar: join(|row| &row.logvar)? };
    let dims = moments.mean.dims().to_vec(); // [B, c, h, w]
    let normal = |label: &str| {
        let values = random::normal(seed(label), step, dims.iter().product());
        Tensor::from_vec(values, dims.as_slice(), &models.device)
    };
    let n_timesteps = models.schedule.n_timesteps();
    Ok(Batch {
        latents: models.vae.latents(&moments, &normal("latents")?)?.detach(),
        noise: normal("noise")?,
        t: (0..b as u64).map(|i| random::below(seed("timestep"), step, i, n_timesteps)).collect(),
        ids: ids[..b].iter().map(|&ids| ids.clone()).collect(),
        weights: vec![1.0, recipe.prior_weight][..b].to_vec(),
    })
}

/// Which of `n` things step `step` takes. All come once, shuffled anew each round, before any comes again: with three
/// photos and few steps, chance alone would favour one of them.
fn dealt(seed: u64, step: u64, n: usize) -> usize {
    let (round, place) = (step / n as u64, (step % n as u64) as usize);
    let mut order: Vec<usize> = (0..n).collect();
    for i in 0..=place {
        order.swap(i, i + random::below(seed, round, i as u64, n - i));
    }
    order[place]
}

/// A training at some step: weights, moments, and what each step so far found.
pub struct State {
    text: ClipText,
    unet: Unet,
    /// Every weight, by its name in our files.
    params: BTreeMap<String, Param>,
    optimiser: AdamW,
    history: Vec<Taken>,
}

impl State {
    /// Before the first step, of trainable models.
    pub fn new(text: Part<ClipText>, unet: Part<Unet>, lr: f64) -> Result<Self> {
        let named = |part: &str, params: BTreeMap<String, Param>| {
            let part = part.to_owned();
            params.into_iter().map(move |(name, param)| (format!("{part}.{name}"), param))
        };
        let params: BTreeMap<_, _> =
            named(TEXT_ENCODER, text.params).chain(named(UNET, unet.params)).collect();
        let optimiser = AdamW::new(params.values().cloned(), AdamWConfig { lr, ..AdamWConfig::default() })?;
        Ok(Self { text: text.model, unet: unet.model, params, optimiser, history: Vec::new() })
    }

    /// Steps taken.
    pub fn n_steps(&self) -> u64 {
        self.history.len() as u64
    }

    /// What each step found, the first one first.
    pub fn history(&self) -> &[Taken] {
        &self.history
    }

    /// Every weight, by its name in our files: `text_encoder.…` and `unet.…`.
    pub fn params(&self) -> &BTreeMap<String, Param> {
        &self.params
    }

    /// One step on `batch`. [`Error::Diverged`], changing no weight, where loss or gradient is not finite.
    pub fn step(&mut self, schedule: &Schedule, batch: &Batch) -> Result<Taken> {
        let diverged = Error::Diverged(self.n_steps() + 1);
        let loss = noise_loss(&self.text, &self.unet, schedule, batch)?;
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            return Err(diverged);
        }
        loss.backward()?;
        let norm = self.optimiser.grad_norm()?;
        if !norm.is_finite() {
            return Err(diverged);
        }
        self.optimiser.step_clipped(norm)?;
        let taken = Taken { loss: value, grad_norm: norm as f32 };
        self.history.push(taken);
        Ok(taken)
    }

    /// The models as they are now, frozen, with the rest of `base`: they draw without recording a graph and without a
    /// copy of the weights, and so do not outlast the next step.
    pub fn frozen(&self, bundle: &Bundle, base: &Models) -> Result<Models> {
        let values = self.params.iter().map(|(name, param)| (name.clone(), param.value()));
        let weights = Weights::from_tensors(values.collect(), &base.device);
        let text = bundle.text_encoder_of(&weights.pp(TEXT_ENCODER))?;
        Ok(base.with(text, bundle.unet_of(&weights.pp(UNET))?))
    }

    /// Writes the weights alone, as [`adapted::Adapted::load`] reads them. The bytes depend on weights, bundle and
    /// recipe only.
    pub fn save_weights(&self, path: &Path, bundle: &str, recipe: &Recipe) -> Result<()> {
        let shapes = self.params.iter().map(|(name, param)| (name.clone(), param.dims())).collect();
        let metadata = adapted::metadata(adapted::FORMAT, bundle, &recipe.json());
        save_streaming(path, &shapes, &metadata, DType::F32, |name| Ok(self.params[name].value()))
    }

    /// Writes all that [`State::resume`] needs, tensor by tensor. `bundle` is the bundle's hash.
    pub fn save(&self, path: &Path, bundle: &str, recipe: &Recipe) -> Result<()> {
        let metadata = adapted::metadata(FORMAT, bundle, &recipe.json());
        save_streaming(path, &self.shapes(self.history.len()), &metadata, DType::F32, |name| {
            let weight = |name: &str| &self.params[name];
            Ok(match name.split_once('.') {
                Some(("m", name)) => self.optimiser.moments(weight(name).name())?.0,
                Some(("v", name)) => self.optimiser.moments(weight(name).name())?.1,
                Some(("history", "loss")) => self.column(|taken| taken.loss)?,
                Some(("history", _)) => self.column(|taken| taken.grad_norm)?,
                _ => weight(name).value(),
            })
        })
    }

    /// Goes on from a file by [`State::save`]. [`Error::Bad`] if it is of another bundle, another recipe or other
    /// models; the state is then of no use.
    pub fn resume(&mut self, path: &Path, bundle: &str, recipe: &Recipe) -> Result<()> {
        let file = TensorFile::open(path)?;
        let bad = |what: String| Error::Bad(format!("{}: {what}", path.display()));
        adapted::check(file.metadata(), FORMAT, bundle).map_err(bad)?;
        let theirs = file.metadata().get("recipe").map_or("null", String::as_str);
        if let Some(what) = difference(theirs, &recipe.json()) {
            return Err(bad(format!("was made with other settings: {what}")));
        }
        let n_steps = file.shape("history.loss").and_then(|shape| shape.first().copied()).unwrap_or(0);
        let shapes = self.shapes(n_steps);
        let fits = |(name, shape): (&String, &Vec<usize>)| file.shape(name) == Some(shape);
        if file.names().count() != shapes.len() || !shapes.iter().all(fits) {
            return Err(bad("holds other tensors than these models have".into()));
        }
        let read = |name: &str| {
            Tensor::from_vec(file.read(name)?, shapes[name].as_slice(), &Device::Cpu).map_err(Error::from)
        };
        for (name, param) in &self.params {
            param.set(&read(name)?)?;
        }
        let names: BTreeMap<&str, &String> = self.params.iter().map(|(name, p)| (p.name(), name)).collect();
        self.optimiser.restore(n_steps as u64, |own| {
            let moment = |kind: &str| read(&format!("{kind}.{}", names[own]));
            let both = moment("m").and_then(|m| Ok((m, moment("v")?)));
            both.map_err(candle_core::Error::wrap)
        })?;
        let (losses, norms) = (file.read("history.loss")?, file.read("history.grad_norm")?);
        let taken = losses.into_iter().zip(norms).map(|(loss, grad_norm)| Taken { loss, grad_norm });
        self.history = taken.collect();
        Ok(())
    }

    /// Names and shapes in a checkpoint after `n_steps` steps.
    fn shapes(&self, n_steps: usize) -> BTreeMap<String, Vec<usize>> {
        let history = ["history.loss", "history.grad_norm"].map(|name| (name.to_owned(), vec![n_steps]));
        let weights = self.params.iter().flat_map(|(name, param)| {
            [name.clone(), format!("m.{name}"), format!("v.{name}")].map(|name| (name, param.dims()))
        });
        weights.chain(history).collect()
    }

    fn column(&self, of: fn(&Taken) -> f32) -> Result<Tensor> {
        let values: Vec<f32> = self.history.iter().map(of).collect();
        Ok(Tensor::from_vec(values, self.history.len(), &Device::Cpu)?)
    }
}

/// The first setting in which two recipes differ.
fn difference(theirs: &str, ours: &str) -> Option<String> {
    if theirs == ours {
        return None;
    }
    let settings = |json: &str| serde_json::from_str::<Map<String, Value>>(json).unwrap_or_default();
    let (theirs, ours) = (settings(theirs), settings(ours));
    let other = ours.iter().find(|(key, value)| theirs.get(*key) != Some(value));
    Some(other.map_or("more than there are here".into(), |(key, value)| {
        format!("{key} is {} there and {value} here", theirs.get(key).unwrap_or(&Value::Null))
    }))
}

/// Images under noise, and the words for them. One row each.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `[B, c, h, w]`, in the UNet's scale.
    pub latents: Tensor,
    /// `[B, c, h, w]`, unit normal.
    pub noise: Tensor,
    /// Timesteps, `0..T`.
    pub t: Vec<usize>,
    /// Token ids of the prompts.
    pub ids: Vec<Vec<u32>>,
    /// What each image's loss counts: 1 for an instance image, the prior's weight for a class image.
    pub weights: Vec<f64>,
}

/// The noise loss with prior preservation (eq. 2): the sum over images of
/// `weight * mean (prediction - target)^2`.
///
/// The target is the noise, or the velocity where the schedule predicts that. Instance and class images go through
/// text encoder and UNet as one batch. A scalar, differentiable in every trained weight of both.
pub fn noise_loss(text: &ClipText, unet: &Unet, schedule: &Schedule, batch: &Batch) -> Result<Tensor> {
    let (b, ..) = batch.latents.dims4()?;
    if batch.t.len() != b || batch.ids.len() != b || batch.weights.len() != b || b == 0 {
        return Err(Error::bad(format!(
            "noise loss: {b} images, {} timesteps, {} prompts, {} weights",
            batch.t.len(),
            batch.ids.len(),
            batch.weights.len()
        )));
    }
    let noisy = schedule.q_sample(&batch.latents, &batch.noise, &batch.t)?;
    let target = schedule.target(&batch.latents, &batch.noise, &batch.t)?;
    let t: Vec<f64> = batch.t.iter().map(|&t| t as f64).collect();
    let prediction = unet.forward(&noisy, &t, &text.forward(&batch.ids)?)?;
    let each = (prediction - target)?.sqr()?.flatten_from(1)?.mean(1)?; // [B]
    let weights: Vec<f32> = batch.weights.iter().map(|&weight| weight as f32).collect();
    Ok((each * Tensor::from_vec(weights, b, batch.latents.device())?)?.sum_all()?)
}

#[cfg(test)]
mod tests {
    use super::dealt;

    #[test]
    fn every_photo_comes_once_before_any_comes_again() {
        let mut orders = std::collections::BTreeSet::new();
        for round in 0..20 {
            let order: Vec<usize> = (0..5).map(|i| dealt(7, round * 5 + i, 5)).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
            orders.insert(order);
        }
        assert!(orders.len() > 10, "{} orders in 20 rounds", orders.len());
    }
}
