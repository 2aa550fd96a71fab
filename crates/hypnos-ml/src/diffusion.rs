//! The noise schedule: how much of the signal is left in a latent at each timestep.
//!
//! Reads `scheduler_config.json`, computes ᾱ as the reference does, noises latents for training and converts
//! between what a model may predict (ε, v) and x_0. It does not sample (`samplers`) and weighs no loss.
//!
//! | here          | papers                         | reference              |
//! |---------------|--------------------------------|------------------------|
//! | `alpha_bar`   | ᾱ_t (DDPM), α_t (DDIM)         | `alphas_cumprod[t]`    |
//! | `alpha, sigma`| √ᾱ_t, √(1 − ᾱ_t)               | `alpha_t, sigma_t`     |
//! | `eps`, `v`    | ε, v = √ᾱ ε − √(1 − ᾱ) x_0     | `noise`, `velocity`    |
//!
//! Ho et al. 2020 (arXiv 2006.11239); v: Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
//! Ported: diffusers 0.42.1 `schedulers/scheduling_ddpm.py`.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use serde::Deserialize;
use serde_json::Value;

use super::{Error, Result};

/// More timesteps than any model was trained with; a larger number is a damaged file.
const TIMESTEPS_MAX: usize = 100_000;

/// What to say of a class with another kind of noise.
pub(crate) const WANTED_CLASSES: &str = "DDIMScheduler, PNDMScheduler or a relative";

/// What `scheduler_config.json` says. Read it with [`Config::parse()`], which also checks it.
///
/// Keys that are absent (or null) keep the defaults of the reference class. Where the reference classes differ
/// (`timestep_spacing`, `set_alpha_to_one`) the value stays `None` and each sampler takes the default of the class
/// it ports, which is what `XScheduler.from_config(pipeline.scheduler.config)` does.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The reference class that wrote the file; decides the defaults of the betas.
    #[serde(rename = "_class_name")]
    pub(crate) class_name: Option<String>,
    /// T, the number of timesteps the model was trained with. 1000 where absent.
    pub(crate) num_train_timesteps: Option<usize>,
    /// The first β. 0.0001 where absent (0.00085 for Heun, KDPM2 and some others).
    pub(crate) beta_start: Option<f64>,
    /// The last β. 0.02 where absent (0.012 for Heun, KDPM2 and some others).
    pub(crate) beta_end: Option<f64>,
    /// `linear` (where absent, but for LCM and TCD), `scaled_linear` or `squaredcos_cap_v2`.
    pub(crate) beta_schedule: Option<String>,
    /// The T betas themselves, instead of the three keys above.
    pub(crate) trained_betas: Option<Vec<f64>>,
    /// `epsilon` (where absent) or `v_prediction`.
    pub(crate) prediction_type: Option<String>,
    /// `leading`, `linspace` or `trailing`; where absent each sampler has its own.
    pub(crate) timestep_spacing: Option<String>,
    /// Added to the timesteps of `leading`. 0 where absent.
    pub(crate) steps_offset: Option<usize>,
    /// Whether the last step of DDIM and PNDM ends at ᾱ = 1 (true) or at ᾱ_0 (false).
    pub(crate) set_alpha_to_one: Option<bool>,
    /// Every other key: those of single samplers, and those nobody reads.
    #[serde(flatten)]
    pub(crate) rest: BTreeMap<String, Value>,
}

/// What the model predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise ε.
    Epsilon,
    /// The velocity v.
    V,
}

impl Prediction {
    /// What `prediction_type` says of it in a scheduler's file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::V => "v_prediction",
        }
    }
}

/// How timesteps are laid over the T trained ones: table 2 of Lin et al. 2023 (arXiv 2305.08891).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spacing {
    /// Multiples of T / steps, from 0 up, plus `steps_offset`.
    Leading,
    /// Evenly from 0 to T − 1, both included.
    Linspace,
    /// Evenly from T − 1 down, never reaching 0.
    Trailing,
}

impl Config {
    /// The configuration in a `scheduler_config.json`, checked.
    ///
    /// Takes `-Infinity`, `Infinity` and `NaN` as null: the reference writes them (`lambda_min_clipped`), although
    /// JSON has no such words. [`Error::Input`] names the key and the value.
    pub fn parse(text: &str) -> Result<Self> {
        let config = Self::read(text)?;
        config.check()?;
        Ok(config)
    }

    /// As [`Config::parse()`], without the check.
    pub(crate) fn read(text: &str) -> Result<Self> {
        serde_json::from_str(&without_infinities(text))
            .map_err(|err| Error::file("scheduler_config.json", format!("{err}")))
    }

    /// What Stable Diffusion's pipeline makes of the settings: 1 for `steps_offset` and false for `clip_sample`, whatever
    /// they are, for old files say otherwise. One line for each that said otherwise.
    ///
    /// Departure: where the file does not say, the reference forgets its own 1 again when another scheduler is made from
    /// the pipeline's; here each sampler has it.
    pub(crate) fn adopt_pipeline(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(offset) = self.steps_offset.replace(1).filter(|offset| *offset != 1) {
            lines.push(format!("steps_offset is {offset}, and is taken as 1, as diffusers takes it"));
        }
        if self.rest.insert("clip_sample".into(), Value::Bool(false)) == Some(Value::Bool(true)) {
            lines.push(
                "clip_sample is true, and is taken as false, as diffusers takes it: latents are not clipped"
                    .into(),
            );
        }
        lines
    }

    /// Refuses, naming key and value, what would make this model's noise different from what we compute.
    pub(crate) fn check(&self) -> Result<()> {
        self.class_betas()?;
        self.prediction()?;
        self.spacing()?;
        let n = self.n_timesteps();
        if !(2..=TIMESTEPS_MAX).contains(&n) {
            return Err(refuse("num_train_timesteps", n, &format!("2 to {TIMESTEPS_MAX}")));
        }
        if self.steps_offset() >= n {
            return Err(refuse("steps_offset", self.steps_offset(), "less than num_train_timesteps"));
        }
        self.only("use_flow_sigmas", &[Value::Bool(false)])
            .map_err(|value| refuse("use_flow_sigmas", value, "false"))
    }

    /// T.
    pub(crate) fn n_timesteps(&self) -> usize {
        self.num_train_timesteps.unwrap_or(1000)
    }

    /// What is added to the timesteps of `leading`.
    pub fn steps_offset(&self) -> usize {
        self.steps_offset.unwrap_or(0)
    }

    /// What the model predicts; [`Error::Input`] for anything but ε and v.
    pub(crate) fn prediction(&self) -> Result<Prediction> {
        match self.prediction_type.as_deref() {
            None | Some("epsilon") => Ok(Prediction::Epsilon),
            Some("v_prediction") => Ok(Prediction::V),
            Some(other) => Err(refuse("prediction_type", format!("\"{other}\""), "epsilon or v_prediction")),
        }
    }

    /// The spacing the file asks for, `None` where it leaves that to the sampler.
    pub(crate) fn spacing(&self) -> Result<Option<Spacing>> {
        match self.timestep_spacing.as_deref() {
            None => Ok(None),
            Some("leading") => Ok(Some(Spacing::Leading)),
            Some("linspace") => Ok(Some(Spacing::Linspace)),
            Some("trailing") => Ok(Some(Spacing::Trailing)),
            Some(other) => {
                Err(refuse("timestep_spacing", format!("\"{other}\""), "leading, linspace or trailing"))
            }
        }
    }

    /// Whether a key outside the typed ones is there and true.
    pub(crate) fn is_set(&self, key: &str) -> bool {
        self.rest.get(key) == Some(&Value::Bool(true))
    }

    /// Passes where `key` is absent, null or one of `wanted`; otherwise gives what it is.
    pub(crate) fn only(&self, key: &str, wanted: &[Value]) -> Result<(), &Value> {
        match self.rest.get(key) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if wanted.contains(value) => Ok(()),
            Some(value) => Err(value),
        }
    }

    /// First and last β of the reference class, and how they are laid between; [`Error::Input`] for a class with another
    /// kind of noise.
    fn class_betas(&self) -> Result<(f64, f64, &'static str)> {
        let Some(class) = &self.class_name else { return Ok((0.0001, 0.02, "linear")) };
        betas_of(class).ok_or_else(|| refuse("_class_name", format!("\"{class}\""), WANTED_CLASSES))
    }

    /// Whether the noise of a reference class is of the kind that is computed here.
    pub(crate) fn knows_class(class: &str) -> bool {
        betas_of(class).is_some()
    }

    /// β_0 … β_{T−1} in f32, as `torch.linspace` and its square give them.
    fn betas(&self) -> Result<Vec<f32>> {
        let n = self.n_timesteps();
        let (start, end, schedule) = self.class_betas()?;
        let (start, end) = (self.beta_start.unwrap_or(start), self.beta_end.unwrap_or(end));
        if let Some(betas) = &self.trained_betas {
            if betas.len() != n {
                let came = format!("a list of {}", betas.len());
                return Err(refuse("trained_betas", came, &format!("num_train_timesteps = {n} numbers")));
            }
            return Ok(betas.iter().map(|&beta| beta as f32).collect());
        }
        match self.beta_schedule.as_deref().unwrap_or(schedule) {
            "linear" => Ok(linspace_f32(start, end, n)),
            "scaled_linear" => Ok(linspace_f32(start.sqrt(), end.sqrt(), n).iter().map(|x| x * x).collect()),
            "squaredcos_cap_v2" => Ok((0..n).map(|t| squared_cosine(t, n)).collect()),
            other => {
                let wanted = "linear, scaled_linear or squaredcos_cap_v2";
                Err(refuse("beta_schedule", format!("\"{other}\""), wanted))
            }
        }
    }
}

/// First and last β of a reference class, and how they are laid between; none for a class with another kind of noise.
fn betas_of(class: &str) -> Option<(f64, f64, &'static str)> {
    match class.strip_suffix("Scheduler").unwrap_or(class) {
        "DDIM"
        | "DDIMParallel"
        | "DDPM"
        | "DDPMParallel"
        | "PNDM"
        | "DPMSolverMultistep"
        | "DPMSolverSinglestep"
        | "DEISMultistep"
        | "UniPCMultistep"
        | "SASolver"
        | "LMSDiscrete"
        | "EulerDiscrete"
        | "EulerAncestralDiscrete" => Some((0.0001, 0.02, "linear")),
        "HeunDiscrete" | "KDPM2Discrete" | "KDPM2AncestralDiscrete" | "DPMSolverSDE" => {
            Some((0.00085, 0.012, "linear"))
        }
        "LCM" | "TCD" => Some((0.00085, 0.012, "scaled_linear")),
        _ => None,
    }
}

/// ᾱ of every timestep, and what the model trained on them predicts.
#[derive(Clone, Debug)]
pub struct Schedule {
    alphas_cumprod: Vec<f32>,
    prediction: Prediction,
    config: Config,
}

impl Schedule {
    /// The schedule a configuration describes.
    ///
    /// Precision is the reference's: β in f32, 1 − β in f32, their running product in f64 rounded to f32 at each
    /// step (what `torch.cumprod` does on a CPU). All that is derived from ᾱ here is computed in f64.
    ///
    /// [`Error::Input`] if the configuration is refused or some ᾱ_t does not lie strictly between 0 and 1.
    pub fn new(config: &Config) -> Result<Self> {
        config.check()?;
        let mut product = 1.0_f64;
        let mut alphas_cumprod = Vec::with_capacity(config.n_timesteps());
        for (t, beta) in config.betas()?.into_iter().enumerate() {
            product *= f64::from(1.0 - beta);
            let alpha_bar = product as f32;
            if !(beta > 0.0 && beta < 1.0 && alpha_bar > 0.0 && alpha_bar < 1.0) {
                return Err(Error::file(
                    "scheduler_config.json",
                    format!(
                        "beta is {beta} at timestep {t} and leaves {alpha_bar} of the signal; \
                     both have to lie between 0 and 1"
                    ),
                ));
            }
            alphas_cumprod.push(alpha_bar);
        }
        Ok(Self { alphas_cumprod, prediction: config.prediction()?, config: config.clone() })
    }

    /// T.
    pub(crate) fn n_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// ᾱ_0 … ᾱ_{T−1}, falling, as the reference has them to the last bit.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// What the model predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// The configuration this schedule was made from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// ᾱ_t. [`Error::Input`] where t ≥ T.
    pub(crate) fn alpha_bar(&self, t: usize) -> Result<f64> {
        let n = self.n_timesteps();
        let value = self.alphas_cumprod.get(t).copied().map(f64::from);
        value.ok_or_else(|| {
            Error::input(format!("timestep {t} is outside the schedule, which has 0 to {}", n - 1))
        })
    }

    /// x_t: the latents with the noise of timestep t over them.
    ///
    ///   x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε                                                Ho et al. 2020, eq. 4
    ///
    /// * `x_0`, `eps`: `[B, …]`, equal shapes
    /// * `t`: one timestep for each of the B images, 0 … T − 1
    ///
    /// Like everything below: computed and returned in f32, differentiable in both tensors, [`Error::Input`] if the
    /// shapes differ, `t` is not one per image or a timestep lies outside.
    pub fn q_sample(&self, x_0: &Tensor, eps: &Tensor, t: &[usize]) -> Result<Tensor> {
        self.mix(("x_0", x_0), ("eps", eps), t, |alpha, sigma| (alpha, sigma))
    }

    /// v = √ᾱ_t ε − √(1 − ᾱ_t) x_0. Shapes, dtype and errors as for [`Self::q_sample()`].
    pub(crate) fn velocity(&self, x_0: &Tensor, eps: &Tensor, t: &[usize]) -> Result<Tensor> {
        self.mix(("x_0", x_0), ("eps", eps), t, |alpha, sigma| (-sigma, alpha))
    }

    /// What the model should have answered at x_t: ε or v, as it predicts. As [`Self::q_sample()`]; ε in f32.
    pub fn target(&self, x_0: &Tensor, eps: &Tensor, t: &[usize]) -> Result<Tensor> {
        match self.prediction {
            Prediction::Epsilon => self.mix(("x_0", x_0), ("eps", eps), t, |_, _| (0.0, 1.0)),
            Prediction::V => self.velocity(x_0, eps, t),
        }
    }

    /// x_0 as the model's answer at x_t implies it. As [`Self::q_sample()`].
    pub fn x_0(&self, x_t: &Tensor, answer: &Tensor, t: &[usize]) -> Result<Tensor> {
        match self.prediction {
            Prediction::Epsilon => self.x_0_from_eps(x_t, answer, t),
            Prediction::V => self.x_0_from_v(x_t, answer, t),
        }
    }

    /// x_0 = (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t. As [`Self::q_sample()`]; errors in ε grow by √((1 − ᾱ_t) / ᾱ_t).
    pub(crate) fn x_0_from_eps(&self, x_t: &Tensor, eps: &Tensor, t: &[usize]) -> Result<Tensor> {
        self.mix(("x_t", x_t), ("eps", eps), t, |alpha, sigma| (1.0 / alpha, -sigma / alpha))
    }

    /// x_0 = √ᾱ_t x_t − √(1 − ᾱ_t) v. As [`Self::q_sample()`].
    pub(crate) fn x_0_from_v(&self, x_t: &Tensor, v: &Tensor, t: &[usize]) -> Result<Tensor> {
        self.mix(("x_t", x_t), ("v", v), t, |alpha, sigma| (alpha, -sigma))
    }

    /// c_a(t) a + c_b(t) b with the two weights of each image's own timestep; the tensors come with their names.
    fn mix(
        &self,
        (a_name, a): (&str, &Tensor),
        (b_name, b): (&str, &Tensor),
        t: &[usize],
        weights: impl Fn(f64, f64) -> (f64, f64),
    ) -> Result<Tensor> {
        if a.dims() != b.dims() || a.dims().first() != Some(&t.len()) {
            return Err(Error::input(format!(
                "diffusion: {a_name} is {:?}, {b_name} {:?} and there are {} timesteps; equal shapes and one \
                 timestep for each image are needed",
                a.dims(),
                b.dims(),
                t.len()
            )));
        }
        let mut column = vec![1; a.rank()]; // [B, 1, …]
        column[0] = t.len();
        let (mut a_weights, mut b_weights) = (Vec::with_capacity(t.len()), Vec::with_capacity(t.len()));
        for &t in t {
            let alpha_bar = self.alpha_bar(t)?;
            let (a_weight, b_weight) = weights(alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
            a_weights.push(a_weight as f32);
            b_weights.push(b_weight as f32);
        }
        let scale = |x: &Tensor, weights| {
            x.to_dtype(DType::F32)?.broadcast_mul(&Tensor::from_vec(weights, column.as_slice(), x.device())?)
        };
        Ok((scale(a, a_weights)? + scale(b, b_weights)?)?)
    }
}

fn refuse(key: &str, came: impl std::fmt::Display, wanted: &str) -> Error {
    Error::file("scheduler_config.json", format!("{key} is {came}; this program supports {wanted}"))
}

/// `torch.linspace` in f32, to the last bit: from both ends towards the middle, with fused multiply-add.
fn linspace_f32(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (n - 1) as f32;
    let from_start = |i: usize| step.mul_add(i as f32, start);
    let from_end = |i: usize| (-step).mul_add((n - 1 - i) as f32, end);
    (0..n).map(|i| if i < n / 2 { from_start(i) } else { from_end(i) }).collect()
}

/// β_t of Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17, capped at 0.999.
fn squared_cosine(t: usize, n: usize) -> f32 {
    let alpha_bar = |i: usize| {
        let u = i as f64 / n as f64;
        ((u + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2)
    };
    (1.0 - alpha_bar(t + 1) / alpha_bar(t)).min(0.999) as f32
}

/// The text with Python's three words for numbers JSON cannot say replaced by null; strings are left alone.
fn without_infinities(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_string = false;
    for piece in text.split_inclusive('"') {
        if in_string {
            out.push_str(piece);
        } else {
            out.push_str(
                &piece.replace("-Infinity", "null").replace("Infinity", "null").replace("NaN", "null"),
            );
        }
        if let Some(before) = piece.strip_suffix('"') {
            let n_backslashes = before.len() - before.trim_end_matches('\\').len();
            in_string = !in_string || n_backslashes % 2 == 1; // an escaped quote ends nothing
        }
    }
    out
}

#[cfg(test)]
mod tests;
