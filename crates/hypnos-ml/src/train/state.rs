//! The state of a training: weights, optimisers, history and trials; one step on a batch; checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};

use super::discriminator::DiscriminatorTrainer;
use super::losses::{Batch, FrozenModels, LossModels, Objective, losses};
use super::recipe::Recipe;
use super::trace::{StepRecord, Trace};
use super::trial::{self, Trial};
use crate::bundle::{Bundle, Part};
use crate::finetuned::{self, EMBEDDING, TEXT_ENCODER, UNET};
use crate::models::{clip::ClipText, unet::Unet};
use crate::ops::{AdamW, AdamWConfig};
use crate::param::Param;
use crate::precision::Precision;
use crate::product::Product;
use crate::sample::{Models, Shared};
use crate::tensorfile::{TensorFile, save_streaming};
use crate::weights::{self, Weights};
use crate::{Error, Result};

/// What `format` says in the metadata of a checkpoint.
const FORMAT: &str = "hypnos checkpoint 2";

/// Where in its metadata the precisions are that its steps were taken in, the first one first, with commas between them;
/// none is f32.
const PRECISIONS: &str = "precision";

/// Where in a checkpoint the discriminator's tensors lie.
const DISCRIMINATOR: &str = "discriminator";

/// Where in a checkpoint the weights of the best trial lie, their own file, and what all trials found.
const BEST: &str = "best";
const BEST_FILE: &str = "best.safetensors";
const TRIALS: [&str; 3] = ["trials.step", "trials.likeness", "trials.adherence"];

/// The metrics of one step. Losses are unweighted; one that the step did not compute is not a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepMetrics {
    /// The weighted sum before the step (eq. 1).
    pub loss: f32,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f32,
    /// Eq. 2.
    pub reconstruction: f32,
    /// Eq. 4.
    pub prior: f32,
    /// Eq. 5.
    pub perceptual: f32,
    /// Eq. 7.
    pub adversarial: f32,
    /// The discriminator's own loss, before its step.
    pub discriminator: f32,
    /// Share of the reconstruction's elements whose exponent was cut.
    pub cut: f32,
}

/// A metric of a step: its name and its value.
pub type Column = (&'static str, fn(&StepMetrics) -> f32);

impl StepMetrics {
    /// Each metric: its name in checkpoints, logs and reports, and its value.
    pub const COLUMNS: [Column; 8] = [
        ("loss", |step| step.loss),
        ("grad_norm", |step| step.grad_norm),
        ("reconstruction", |step| step.reconstruction),
        ("prior", |step| step.prior),
        ("perceptual", |step| step.perceptual),
        ("adversarial", |step| step.adversarial),
        ("critic", |step| step.discriminator),
        ("cut", |step| step.cut),
    ];

    fn of(row: [f32; 8]) -> Self {
        let [loss, grad_norm, reconstruction, prior, perceptual, adversarial, discriminator, cut] = row;
        Self { loss, grad_norm, reconstruction, prior, perceptual, adversarial, discriminator, cut }
    }
}

/// A training at some step: weights, moments, the metrics of each step so far, and the best trial's weights.
pub struct State {
    text: ClipText,
    unet: Unet,
    /// As [`State::precisions`] gives them.
    precisions: Vec<Precision>,
    /// Every trained weight, by its name in our files.
    params: BTreeMap<String, Param>,
    optimiser: AdamW,
    discriminator: Option<DiscriminatorTrainer>,
    history: Vec<StepMetrics>,
    trials: Vec<Trial>,
    /// The weights of the best trial, where steps were taken since; else they are the weights themselves.
    best: Option<Best>,
    /// Where those are kept in a file.
    scratch: Option<PathBuf>,
}

/// The weights of the best trial, away from those that learn.
enum Best {
    /// On the CPU.
    Memory(BTreeMap<String, Tensor>),
    /// As large as everything that learns: memory is scarcer than disk.
    File(TensorFile),
}

impl State {
    /// Before the first step, of trainable models.
    pub fn new(
        text: Part<ClipText>,
        unet: Part<Unet>,
        adamw: AdamWConfig,
        discriminator: Option<DiscriminatorTrainer>,
    ) -> Result<Self> {
        let named = |part: &str, params: BTreeMap<String, Param>| {
            let part = part.to_owned();
            params.into_iter().map(move |(name, param)| (format!("{part}.{name}"), param))
        };
        let params = named(TEXT_ENCODER, text.params).chain(named(UNET, unet.params)).collect();
        Self::of(text.model, unet.model, params, adamw, discriminator)
    }

    /// Before the first step of one that learns an embedding only: that of the product's token, which begins as the
    /// mean of its class's words. All else is `base`'s, frozen.
    ///
    /// Assumption: the paper of Textual Inversion begins with one word; a class may have several.
    pub fn of_embedding(
        base: &Models,
        product: &Product,
        adamw: AdamWConfig,
        discriminator: Option<DiscriminatorTrainer>,
    ) -> Result<Self> {
        let (token, meaning) = (&product.token, base.tokenizer.words(&product.class_name));
        let id = base.tokenizer.id(token);
        let id =
            id.ok_or_else(|| Error::input(format!("\"{token}\": wanted one token of the vocabulary")))?;
        if meaning.is_empty() {
            return Err(Error::setting("class_name", "has no words to begin with"));
        }
        let row = Param::new(format!("{EMBEDDING}.{token}"), base.text.mean_embedding(&meaning)?, true)?;
        let params = BTreeMap::from([(row.name().to_owned(), row.clone())]);
        Self::of(base.text.with_embedding(id, row)?, base.unet.clone(), params, adamw, discriminator)
    }

    fn of(
        text: ClipText,
        unet: Unet,
        params: BTreeMap<String, Param>,
        adamw: AdamWConfig,
        discriminator: Option<DiscriminatorTrainer>,
    ) -> Result<Self> {
        let optimiser = AdamW::new(params.values().cloned(), adamw)?;
        Ok(Self {
            precisions: vec![unet.precision()],
            text,
            unet,
            params,
            optimiser,
            discriminator,
            history: Vec::new(),
            trials: Vec::new(),
            best: None,
            scratch: None,
        })
    }

    /// Keeps the best trial's weights in a file of this directory instead of in memory, from the next one on.
    pub fn keep_best_in(&mut self, scratch: &Path) {
        self.scratch = Some(scratch.to_owned());
    }

    /// Computes blocks again in the backward instead of keeping them: less memory for a third more time.
    pub fn set_checkpointing(&mut self, checkpointing: bool) {
        self.unet.checkpointing = checkpointing;
    }

    /// Steps taken.
    pub fn n_steps(&self) -> u64 {
        self.history.len() as u64
    }

    /// The metrics of each step, the first one first.
    pub fn history(&self) -> &[StepMetrics] {
        &self.history
    }

    /// The precisions in which its steps were taken, the first one first, without repetitions in a row: more than one if it
    /// was resumed in another.
    pub fn precisions(&self) -> &[Precision] {
        &self.precisions
    }

    /// Every trained weight, by its name in our files: `text_encoder.…` and `unet.…`.
    pub fn params(&self) -> &BTreeMap<String, Param> {
        &self.params
    }

    /// The discriminator, where one takes part.
    pub fn discriminator(&self) -> Option<&DiscriminatorTrainer> {
        self.discriminator.as_ref()
    }

    pub(super) fn discriminator_mut(&mut self) -> Option<&mut DiscriminatorTrainer> {
        self.discriminator.as_mut()
    }

    /// One step on `batch`; then one of the discriminator on `shown`, real latents and fake ones, to which it adds this
    /// step's guess. [`Error::Diverged`], changing no weight of the diffusion model, where loss or gradient is not
    /// finite.
    pub fn step(
        &mut self,
        frozen: FrozenModels<'_>,
        batch: &Batch,
        objective: &Objective,
        shown: Option<(Tensor, Tensor)>,
        trace: Option<(&Trace, &Recipe)>,
    ) -> Result<StepMetrics> {
        let step = self.n_steps() + 1;
        let diverged = || Error::Diverged { step };
        let discriminator = self.discriminator.as_ref().map(DiscriminatorTrainer::frozen).transpose()?;
        let (text, unet) = (&self.text, &self.unet);
        let models = LossModels { text, unet, frozen, discriminator: discriminator.as_ref() };
        let losses = losses(&models, batch, objective)?;
        let value = losses.total.to_scalar::<f32>()?;
        if !value.is_finite() {
            return Err(diverged());
        }
        losses.total.backward()?;
        let norm = self.optimiser.grad_norm()?;
        if !norm.is_finite() {
            return Err(diverged());
        }
        if let Some((trace, recipe)) = trace {
            trace.write(&StepRecord {
                step,
                recipe,
                batch,
                losses: &losses,
                grad_norm: norm,
                params: &self.params,
                discriminator: self.discriminator.as_ref().map(|discriminator| &discriminator.params),
            })?;
        }
        self.keep_best()?;
        self.optimiser.step_clipped(norm)?;
        // Assumption: the discriminator sees the guess that was judged, not one of the weights after the step.
        let discriminator = match (&mut self.discriminator, shown, &losses.z0) {
            (Some(discriminator), Some((real, fake)), Some(z0)) => {
                discriminator.step(&real, &Tensor::cat(&[&fake, &z0.detach()], 0)?)?
            }
            _ => f32::NAN,
        };
        if self.discriminator.is_some() && !discriminator.is_finite() {
            return Err(diverged());
        }
        let number = |tensor: &Tensor| tensor.to_scalar::<f32>();
        let term = |tensor: &Option<Tensor>| tensor.as_ref().map_or(Ok(f32::NAN), number);
        let metrics = StepMetrics {
            loss: value,
            grad_norm: norm as f32,
            reconstruction: number(&losses.reconstruction)?,
            prior: term(&losses.prior)?,
            perceptual: term(&losses.perceptual)?,
            adversarial: term(&losses.adversarial)?,
            discriminator,
            cut: number(&losses.cut)?,
        };
        self.history.push(metrics);
        Ok(metrics)
    }

    /// Every trial so far, in order.
    pub fn trials(&self) -> &[Trial] {
        &self.trials
    }

    /// Adds the trial of the weights as they are now, once for each step. From the first trial on, the best one's
    /// weights are served.
    pub fn add_trial(&mut self, trial: Trial) {
        self.trials.push(trial);
        if self.served_step() == self.n_steps() {
            self.best = None;
        }
    }

    /// The step whose weights are served.
    pub fn served_step(&self) -> u64 {
        trial::best(&self.trials).map_or(self.n_steps(), |trial| trial.step)
    }

    /// Copies the weights away, if they are the best that was tried, before a step changes them.
    fn keep_best(&mut self) -> Result<()> {
        if self.trials.is_empty() || self.served_step() != self.n_steps() {
            return Ok(());
        }
        let copy = |name: &str| Ok(self.params[name].value().copy()?.to_device(&Device::Cpu)?);
        self.best = Some(self.kept(copy)?);
        Ok(())
    }

    /// `value` of each weight, away from those that learn.
    fn kept(&self, value: impl Fn(&str) -> Result<Tensor>) -> Result<Best> {
        let Some(scratch) = &self.scratch else {
            let values = self.params.keys().map(|name| Ok((name.clone(), value(name)?)));
            return Ok(Best::Memory(values.collect::<Result<_>>()?));
        };
        let file = scratch.join(BEST_FILE);
        save_streaming(&file, &self.weight_shapes(), &BTreeMap::new(), DType::F32, value)?;
        Ok(Best::File(TensorFile::open(&file)?))
    }

    fn weight_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.params.iter().map(|(name, param)| (name.clone(), param.dims())).collect()
    }

    /// The models as they are now, frozen: they draw without recording a graph and without a copy of the f32 weights, and
    /// so do not outlast the next step.
    pub fn frozen(&self, bundle: &Bundle, shared: &Shared) -> Result<Models> {
        let values = self.params.iter().map(|(name, param)| (name.clone(), param.value()));
        self.models(Weights::from_tensors(values.collect(), &shared.device), bundle, shared)
    }

    /// The models that are served, frozen, as [`State::frozen`] gives those of now.
    pub fn served(&self, bundle: &Bundle, shared: &Shared) -> Result<Models> {
        let weights = match &self.best {
            None => return self.frozen(bundle, shared),
            Some(Best::File(file)) => Weights::open(file.path(), &shared.device)?,
            Some(Best::Memory(best)) => {
                let values = best.iter().map(|(name, value)| (name.clone(), value.clone()));
                Weights::from_tensors(values.collect(), &shared.device)
            }
        };
        self.models(weights, bundle, shared)
    }

    fn models(&self, learned: Weights, bundle: &Bundle, shared: &Shared) -> Result<Models> {
        // Beside an embedding that learns, everything is the bundle's.
        let base = || {
            let mut unet = self.unet.clone();
            unet.checkpointing = false;
            Ok((self.text.clone(), unet))
        };
        finetuned::models(learned, self.params.keys(), bundle, shared, base)
    }

    /// Writes the weights that are served, and nothing else, as [`finetuned::FineTuned::load`] reads them. The bytes
    /// depend on weights, bundle and recipe only.
    pub fn save_weights(&self, path: &Path, bundle: &str, recipe: &Recipe) -> Result<()> {
        if self.best.is_none() {
            return self.save_last_weights(path, bundle, recipe);
        }
        self.write_weights(path, bundle, recipe, |name| self.best_weight(name))
    }

    /// Writes the weights of the last step, whichever are served.
    pub fn save_last_weights(&self, path: &Path, bundle: &str, recipe: &Recipe) -> Result<()> {
        self.write_weights(path, bundle, recipe, |name| Ok(self.params[name].value()))
    }

    fn write_weights(
        &self,
        path: &Path,
        bundle: &str,
        recipe: &Recipe,
        value: impl Fn(&str) -> Result<Tensor>,
    ) -> Result<()> {
        let metadata = finetuned::metadata(finetuned::FORMAT, bundle, &recipe.json());
        save_streaming(path, &self.weight_shapes(), &metadata, DType::F32, value)
    }

    /// Writes all that [`State::resume`] needs, tensor by tensor. `bundle` is the hash of all models that took part.
    pub fn save(&self, path: &Path, bundle: &str, recipe: &Recipe) -> Result<()> {
        let mut metadata = finetuned::metadata(FORMAT, bundle, &recipe.json());
        if self.precisions != [Precision::F32] {
            metadata.insert(PRECISIONS.into(), Precision::names(&self.precisions));
        }
        let learning = self.learning();
        let shapes = self.shapes(self.history.len(), self.trials.len(), self.best.is_some());
        save_streaming(path, &shapes, &metadata, DType::F32, |name| {
            let moments = |name: &str| {
                let (param, optimiser) = &learning[name];
                optimiser.moments(param.name())
            };
            Ok(match name.split_once('.') {
                Some(("m", name)) => moments(name)?.0,
                Some(("v", name)) => moments(name)?.1,
                Some(("history", column)) => self.column(column)?,
                Some(("trials", column)) => self.trial_column(column)?,
                Some((BEST, name)) if self.best.is_some() => self.best_weight(name)?,
                _ => learning[name].0.value(),
            })
        })
    }

    /// Goes on from a file by [`State::save`]. [`Error::File`] if it is of another bundle, another recipe or other models;
    /// the state is then of no use.
    ///
    /// In the precision that the file was written in, the steps are those of a training that was never interrupted. In
    /// another one it goes on as well, for what learns is f32 in all of them: a worker may come back with another
    /// `--precision`, or another device. [`State::precisions`] then says so.
    pub fn resume(&mut self, path: &Path, bundle: &str, recipe: &Recipe) -> Result<()> {
        let file = TensorFile::open(path)?;
        let bad = |what: String| Error::file(path, what);
        finetuned::check(file.metadata(), FORMAT, bundle).map_err(bad)?;
        let begun = file.metadata().get(PRECISIONS).map_or(Precision::F32.name(), String::as_str);
        let mut precisions: Vec<Precision> = begun
            .split(", ")
            .map(str::parse)
            .collect::<Result<_>>()
            .map_err(|error| bad(error.to_string()))?;
        if precisions.last() != self.precisions.last() {
            precisions.append(&mut self.precisions);
        }
        self.precisions = precisions;
        let theirs = file.metadata().get("recipe").map_or("null", String::as_str);
        if let Some(what) = difference(theirs, &recipe.json()) {
            return Err(bad(format!("was made with other settings: {what}")));
        }
        let n_steps = file.shape("history.loss").and_then(|shape| shape.first().copied()).unwrap_or(0);
        let n_trials = file.shape(TRIALS[0]).and_then(|shape| shape.first().copied()).unwrap_or(0);
        let has_best = file.names().any(|name| name.starts_with(BEST) && name[BEST.len()..].starts_with('.'));
        let shapes = self.shapes(n_steps, n_trials, has_best);
        let fits = |(name, shape): (&String, &Vec<usize>)| file.shape(name) == Some(shape);
        if file.names().count() != shapes.len() || !shapes.iter().all(fits) {
            return Err(bad("holds other tensors than these models have".into()));
        }
        let read = |name: &str| {
            Tensor::from_vec(file.read(name)?, shapes[name].as_slice(), &Device::Cpu).map_err(Error::from)
        };
        for (name, (param, _)) in self.learning() {
            param.set(&read(&name)?)?;
        }
        restore(&mut self.optimiser, &self.params, "", n_steps as u64, &read)?;
        if let Some(discriminator) = &mut self.discriminator {
            let n_steps = recipe.discriminator.n_steps + n_steps as u64;
            let (optimiser, params) = (&mut discriminator.optimiser, &discriminator.params);
            restore(optimiser, params, &format!("{DISCRIMINATOR}."), n_steps, &read)?;
        }
        let mut rows = vec![[0.0; 8]; n_steps];
        for (i, (column, _)) in StepMetrics::COLUMNS.iter().enumerate() {
            let values = file.read(&format!("history.{column}"))?;
            rows.iter_mut().zip(values).for_each(|(row, value)| row[i] = value);
        }
        self.history = rows.into_iter().map(StepMetrics::of).collect();
        let [steps, likeness, adherence] = TRIALS.map(|column| match n_trials {
            0 => Ok(Vec::new()),
            _ => file.read(column),
        });
        let shares = likeness?.into_iter().zip(adherence?);
        self.trials = (steps?.into_iter().zip(shares))
            .map(|(step, (likeness, adherence))| Trial { step: step as u64, likeness, adherence })
            .collect();
        let best = has_best.then(|| self.kept(|name| read(&format!("{BEST}.{name}"))));
        self.best = best.transpose()?;
        Ok(())
    }

    /// All that learns, by its name in a checkpoint, and by which optimiser.
    fn learning(&self) -> BTreeMap<String, (&Param, &AdamW)> {
        let own = self.params.iter().map(|(name, param)| (name.clone(), (param, &self.optimiser)));
        let discriminator = self.discriminator.iter().flat_map(|one| {
            let params = one.params.iter();
            params.map(|(name, param)| (format!("{DISCRIMINATOR}.{name}"), (param, &one.optimiser)))
        });
        own.chain(discriminator).collect()
    }

    /// Names and shapes in a checkpoint after `n_steps` steps and `n_trials` trials, with a best one before or not.
    fn shapes(&self, n_steps: usize, n_trials: usize, has_best: bool) -> BTreeMap<String, Vec<usize>> {
        let history =
            StepMetrics::COLUMNS.iter().map(|(column, _)| (format!("history.{column}"), vec![n_steps]));
        let trials = TRIALS.map(|column| (column.to_owned(), vec![n_trials]));
        let trials = trials.into_iter().filter(|_| n_trials > 0);
        let best = self.params.iter().filter(|_| has_best);
        let best = best.map(|(name, param)| (format!("{BEST}.{name}"), param.dims()));
        let learning = self.learning();
        let weights = learning.iter().flat_map(|(name, (param, _))| {
            [name.clone(), format!("m.{name}"), format!("v.{name}")].map(|name| (name, param.dims()))
        });
        weights.chain(history).chain(trials).chain(best).collect()
    }

    fn column(&self, name: &str) -> Result<Tensor> {
        let column = StepMetrics::COLUMNS.iter().find(|(column, _)| *column == name).map(|(_, of)| *of);
        let of = column.ok_or_else(|| Error::input(format!("history: no column {name}")))?;
        let values: Vec<f32> = self.history.iter().map(of).collect();
        Ok(Tensor::from_vec(values, self.history.len(), &Device::Cpu)?)
    }

    fn trial_column(&self, name: &str) -> Result<Tensor> {
        let of = |trial: &Trial| match name {
            "step" => trial.step as f32, // far below 2^24
            "likeness" => trial.likeness,
            _ => trial.adherence,
        };
        let values: Vec<f32> = self.trials.iter().map(of).collect();
        Ok(Tensor::from_vec(values, self.trials.len(), &Device::Cpu)?)
    }

    fn best_weight(&self, name: &str) -> Result<Tensor> {
        let none = || Error::input(format!("best: no weight {name}"));
        let shape = self.params.get(name).map(Param::dims).ok_or_else(none)?;
        match &self.best {
            Some(Best::File(file)) => weights::read(file, name, &shape),
            Some(Best::Memory(best)) => best.get(name).cloned().ok_or_else(none),
            None => Err(none()),
        }
    }
}

/// Puts an optimiser's saved moments back. `params` are its weights by name; in the file they lie under `prefix`.
fn restore(
    optimiser: &mut AdamW,
    params: &BTreeMap<String, Param>,
    prefix: &str,
    n_steps: u64,
    read: &dyn Fn(&str) -> Result<Tensor>,
) -> Result<()> {
    let names: BTreeMap<&str, &String> = params.iter().map(|(name, p)| (p.name(), name)).collect();
    optimiser.restore(n_steps, |own| {
        let moment = |kind: &str| read(&format!("{kind}.{prefix}{}", names[own]));
        let both = moment("m").and_then(|m| Ok((m, moment("v")?)));
        both.map_err(candle_core::Error::wrap)
    })?;
    Ok(())
}

/// The first setting in which two recipes differ. Either may have some that the other leaves out.
fn difference(theirs: &str, ours: &str) -> Option<String> {
    if theirs == ours {
        return None;
    }
    let settings = |json: &str| serde_json::from_str::<Map<String, Value>>(json).unwrap_or_default();
    let (theirs, ours) = (settings(theirs), settings(ours));
    let other = ours.keys().chain(theirs.keys()).find(|key| theirs.get(*key) != ours.get(*key));
    Some(other.map_or("the same ones, written otherwise".into(), |key| {
        let value = |of: &Map<String, Value>| of.get(key).map_or("not set".into(), Value::to_string);
        format!("{key} is {} there and {} here", value(&theirs), value(&ours))
    }))
}

#[cfg(test)]
mod tests {
    use super::difference;

    #[test]
    fn a_setting_that_only_one_of_two_recipes_has_is_named() {
        let (less, more) = (r#"{"lr":0.1,"seed":5}"#, r#"{"lr":0.1,"adamw_moments":"8bit","seed":5}"#);
        let words = |theirs, ours| difference(theirs, ours).unwrap_or_default();
        assert_eq!(words(more, less), "adamw_moments is \"8bit\" there and not set here");
        assert_eq!(words(less, more), "adamw_moments is not set there and \"8bit\" here");
        assert_eq!(words(less, r#"{"lr":0.2,"seed":5}"#), "lr is 0.1 there and 0.2 here");
        assert_eq!(words(less, r#"{"seed":5,"lr":0.1}"#), "the same ones, written otherwise");
        assert_eq!(difference(more, more), None);
    }
}
