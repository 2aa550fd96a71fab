//! Samplers: from unit noise to latents in a few calls of the model.
//!
//! Every sampler is one function, in the manner of k-diffusion: no scheduler object, no step state that outlives
//! the call. They do not know the UNet, guidance or prompts: `model` answers for all of that. Each image of a batch
//! goes its own way, so a picture alone is the picture in a batch. Coefficients are f64, tensors f32.
//!
//! Checked against diffusers 0.42.1, each with `XScheduler.from_config(pipeline.scheduler.config)`:
//! `scheduling_ddim.py`, `scheduling_pndm.py`, `scheduling_dpmsolver_multistep.py`, `scheduling_euler_discrete.py`,
//! `scheduling_euler_ancestral_discrete.py`. Symbols as in [`super::diffusion`]; σ is √((1 − ᾱ) / ᾱ) here.

mod kind;
mod plan;

use candle_core::{DType, Tensor};

pub use kind::Sampler;
pub use plan::Plan;

use super::diffusion::{Prediction, Schedule, Spacing};
use super::{Error, Interrupt, Result};

/// The model, guidance included: its answer (ε or v) for latents `[B, C, h, w]` at one timestep, same shape, f32.
/// The timestep is a whole number except for [`Sampler::Euler`] and [`Sampler::EulerAncestral`].
pub(crate) type Model<'a> = dyn FnMut(&Tensor, f64) -> candle_core::Result<Tensor> + 'a;

/// Fresh unit noise for one step, counted from 0, in the shape of the latents. Only `euler-a` asks, never at the end.
pub(crate) type StepNoise<'a> = dyn FnMut(usize) -> candle_core::Result<Tensor> + 'a;

/// Told (calls of the model done, calls in all) after each step; may stop the sampling.
pub(crate) type Observe<'a, B> = dyn FnMut(usize, usize) -> Result<(), Interrupt<B>> + 'a;

/// Latents for `noise`, in `steps` steps of `sampler`.
///
/// * `noise`: `[B, C, h, w]`, f32, unit normal; the sampler scales it itself
/// * `steps`: 1 to T; the model is called that often, by PNDM once more (from 2 steps on)
/// * `model`, `step_noise`, `observe`: see their types
///
/// `[B, C, h, w]`, f32, in the scale the VAE's `scaling_factor` undoes.
/// [`Error::Input`] if steps, shapes or dtypes are wrong.
pub fn sample<B>(
    sampler: Sampler,
    schedule: &Schedule,
    steps: usize,
    noise: &Tensor,
    model: &mut Model<'_>,
    step_noise: &mut StepNoise<'_>,
    observe: &mut Observe<'_, B>,
) -> Result<Tensor, Interrupt<B>> {
    let plan = Plan::new(sampler, schedule, steps)?;
    if noise.rank() != 4 || noise.dtype() != DType::F32 {
        let (dims, dtype) = (noise.dims(), noise.dtype());
        let what = format!("{sampler}: noise is {dims:?} {dtype:?}; [B, C, h, w] F32 is needed");
        return Err(Error::input(what).into());
    }
    let mut outside = Outside { sampler, model, step_noise, observe };
    let stride = schedule.n_timesteps() / steps;
    match sampler {
        Sampler::Ddim => ddim(schedule, &plan, stride, noise, &mut outside),
        Sampler::Pndm => plms(schedule, &plan, stride, noise, &mut outside),
        Sampler::Dpmpp2m | Sampler::Dpmpp2mKarras => dpmpp_2m(schedule, &plan, noise, &mut outside),
        Sampler::Euler => euler(schedule, &plan, noise, &mut outside),
        Sampler::EulerAncestral => euler_ancestral(schedule, &plan, noise, &mut outside),
    }
}

/// Denoising diffusion implicit models without fresh noise: Song et al. 2020 (arXiv 2010.02502), eq. 12 with σ = 0.
///
///   x_prev = √ᾱ_prev x̂_0 + √(1 − ᾱ_prev) ε̂
///
/// The previous timestep is t − T / steps whatever the spacing; below 0 it is the end of [`ending()`].
fn ddim<B>(
    schedule: &Schedule,
    plan: &Plan,
    stride: usize,
    noise: &Tensor,
    outside: &mut Outside<'_, '_, B>,
) -> Result<Tensor, Interrupt<B>> {
    let end = ending(schedule, true);
    let mut x = noise.clone();
    for (i, &t) in plan.timesteps.iter().enumerate() {
        let answer = outside.ask(&x, t)?;
        let t = t as usize;
        let (alpha, sigma) = parts(schedule.alpha_bar(t)?);
        let (alpha_prev, sigma_prev) = parts(before(schedule, t, stride, end)?);
        // x̂_0 and ε̂ as weights of (x, answer), put into eq. 12 at once.
        let (x_weight, answer_weight) = match schedule.prediction() {
            Prediction::Epsilon => (alpha_prev / alpha, sigma_prev - alpha_prev * sigma / alpha),
            Prediction::V => {
                (alpha_prev * alpha + sigma_prev * sigma, sigma_prev * alpha - alpha_prev * sigma)
            }
        };
        x = combine(&x, x_weight, &answer, answer_weight)?;
        outside.tell(i, plan)?;
    }
    Ok(x)
}

/// Pseudo linear multistep: Liu et al. 2022 (arXiv 2202.09778), eq. 9 and 12, without its Runge-Kutta start.
///
/// The first step is taken twice, the second time with the mean of the answers at both its ends (improved Euler);
/// then Adams-Bashforth of order 2, 3 and, from there on, 4, over the answers so far.
fn plms<B>(
    schedule: &Schedule,
    plan: &Plan,
    stride: usize,
    noise: &Tensor,
    outside: &mut Outside<'_, '_, B>,
) -> Result<Tensor, Interrupt<B>> {
    let end = ending(schedule, false);
    let mut x = noise.clone();
    let mut answers: Vec<Tensor> = Vec::new(); // oldest first, at most 4
    for (i, &t) in plan.timesteps.iter().enumerate() {
        let answer = outside.ask(&x, t)?;
        let t = t as usize;
        x = if i == 1 {
            let mean = combine(&answer, 0.5, &answers[0], 0.5)?;
            plms_transfer(schedule, noise, &mean, t + stride, schedule.alpha_bar(t)?)?
        } else {
            answers.drain(..answers.len().saturating_sub(3));
            answers.push(answer);
            plms_transfer(schedule, &x, &adams_bashforth(&answers)?, t, before(schedule, t, stride, end)?)?
        };
        outside.tell(i, plan)?;
    }
    Ok(x)
}

/// x from timestep t to ᾱ_prev along `answer`: Liu et al. 2022, eq. 9 (φ), in the reference's form.
fn plms_transfer(schedule: &Schedule, x: &Tensor, answer: &Tensor, t: usize, prev: f64) -> Result<Tensor> {
    let alpha_bar = schedule.alpha_bar(t)?;
    let (alpha, sigma) = parts(alpha_bar);
    let denominator = alpha_bar * (1.0 - prev).sqrt() + (alpha_bar * (1.0 - alpha_bar) * prev).sqrt();
    let (x_weight, eps_weight) = ((prev / alpha_bar).sqrt(), (alpha_bar - prev) / denominator);
    match schedule.prediction() {
        Prediction::Epsilon => combine(x, x_weight, answer, eps_weight),
        Prediction::V => combine(x, x_weight + eps_weight * sigma, answer, eps_weight * alpha),
    }
}

/// The next answer, extrapolated from the 1 to 4 last ones (oldest first): Liu et al. 2022, eq. 12.
fn adams_bashforth(answers: &[Tensor]) -> Result<Tensor> {
    let weights: &[f64] = match answers.len() {
        1 => &[1.0],
        2 => &[-0.5, 1.5],
        3 => &[5.0 / 12.0, -16.0 / 12.0, 23.0 / 12.0],
        _ => &[-9.0 / 24.0, 37.0 / 24.0, -59.0 / 24.0, 55.0 / 24.0],
    };
    let mut sum = (&answers[0] * weights[0])?;
    for (answer, weight) in answers.iter().zip(weights).skip(1) {
        sum = (sum + (answer * *weight)?)?;
    }
    Ok(sum)
}

/// DPM-Solver++(2M): Lu et al. 2022 (arXiv 2211.01095), algorithm 2, in data prediction.
///
///   x ← (σ'/σ) x − α' (e^{−h} − 1) D,   D = (1 + 1/2r) x̂_0 − 1/2r x̂_0 of the step before,   e^{−h} = s'/s
///
/// with s = σ/α (the plan's sigma) and h, r from its logarithm. First order at the first step and at the last,
/// which goes to s' = 0 and so to x̂_0 itself.
fn dpmpp_2m<B>(
    schedule: &Schedule,
    plan: &Plan,
    noise: &Tensor,
    outside: &mut Outside<'_, '_, B>,
) -> Result<Tensor, Interrupt<B>> {
    let mut x = noise.clone();
    let mut before: Option<(Tensor, f64)> = None; // x̂_0 of the step before, and its h
    for (i, (&t, pair)) in plan.timesteps.iter().zip(plan.sigmas.windows(2)).enumerate() {
        let (s, s_next) = (pair[0], pair[1]);
        let (alpha, sigma) = of_ratio(s);
        let (alpha_next, sigma_next) = of_ratio(s_next);
        let answer = outside.ask(&x, t)?;
        let x_0 = match schedule.prediction() {
            Prediction::Epsilon => combine(&x, 1.0 / alpha, &answer, -sigma / alpha)?,
            Prediction::V => combine(&x, alpha, &answer, -sigma)?,
        };
        let h = (s / s_next).ln();
        let d = match before {
            Some((x_0_before, h_before)) if s_next > 0.0 => {
                let half_inverse_r = 0.5 * h / h_before;
                combine(&x_0, 1.0 + half_inverse_r, &x_0_before, -half_inverse_r)?
            }
            _ => x_0.clone(),
        };
        x = combine(&x, sigma_next / sigma, &d, alpha_next * (1.0 - s_next / s))?;
        before = Some((x_0, h));
        outside.tell(i, plan)?;
    }
    Ok(x)
}

/// Euler's method for the probability flow: Karras et al. 2022 (arXiv 2206.00364), algorithm 2 without churn.
///
/// x here is the paper's, with variance 1 + σ²; the model sees it scaled to variance 1.
fn euler<B>(
    schedule: &Schedule,
    plan: &Plan,
    noise: &Tensor,
    outside: &mut Outside<'_, '_, B>,
) -> Result<Tensor, Interrupt<B>> {
    let mut x = (noise * euler_start(schedule, plan)?)?;
    for (i, (&t, pair)) in plan.timesteps.iter().zip(plan.sigmas.windows(2)).enumerate() {
        let slope = outside.slope(schedule.prediction(), &x, pair[0], t)?;
        x = combine(&x, 1.0, &slope, pair[1] - pair[0])?;
        outside.tell(i, plan)?;
    }
    Ok(x)
}

/// Ancestral sampling with Euler steps, as k-diffusion's `sample_euler_ancestral`: each step goes further down than
/// asked and comes back up with fresh noise, so that the variance is that of DDPM (Ho et al. 2020) between both ends.
fn euler_ancestral<B>(
    schedule: &Schedule,
    plan: &Plan,
    noise: &Tensor,
    outside: &mut Outside<'_, '_, B>,
) -> Result<Tensor, Interrupt<B>> {
    let mut x = (noise * euler_start(schedule, plan)?)?;
    for (i, (&t, pair)) in plan.timesteps.iter().zip(plan.sigmas.windows(2)).enumerate() {
        let (sigma, sigma_next) = (pair[0], pair[1]);
        let up_squared = sigma_next.powi(2) * (sigma.powi(2) - sigma_next.powi(2)) / sigma.powi(2);
        let down = (sigma_next.powi(2) - up_squared).sqrt();
        let slope = outside.slope(schedule.prediction(), &x, sigma, t)?;
        x = combine(&x, 1.0, &slope, down - sigma)?;
        if sigma_next > 0.0 {
            x = combine(&x, 1.0, &outside.fresh(i, &x)?, up_squared.sqrt())?;
        }
        outside.tell(i, plan)?;
    }
    Ok(x)
}

/// `init_noise_sigma` of both Euler schedulers: how far unit noise is scaled up to begin with.
fn euler_start(schedule: &Schedule, plan: &Plan) -> Result<f64> {
    let sigma_max = plan.sigmas[0];
    Ok(match schedule.config().spacing()? {
        Some(Spacing::Leading) => (sigma_max.powi(2) + 1.0).sqrt(),
        Some(Spacing::Linspace | Spacing::Trailing) | None => sigma_max,
    })
}

/// ᾱ where the last step of DDIM and PNDM ends. `one_by_default` is what the class says if the file does not.
fn ending(schedule: &Schedule, one_by_default: bool) -> f64 {
    let one = schedule.config().set_alpha_to_one.unwrap_or(one_by_default);
    if one { 1.0 } else { f64::from(schedule.alphas_cumprod()[0]) }
}

/// ᾱ one stride below t, or `end` where that is below 0.
fn before(schedule: &Schedule, t: usize, stride: usize, end: f64) -> Result<f64> {
    t.checked_sub(stride).map_or(Ok(end), |t| schedule.alpha_bar(t))
}

/// √ᾱ and √(1 − ᾱ).
fn parts(alpha_bar: f64) -> (f64, f64) {
    (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt())
}

/// √ᾱ and √(1 − ᾱ) of their ratio s = √((1 − ᾱ) / ᾱ).
fn of_ratio(s: f64) -> (f64, f64) {
    let alpha = 1.0 / (s * s + 1.0).sqrt();
    (alpha, s * alpha)
}

/// `a_weight` a + `b_weight` b.
fn combine(a: &Tensor, a_weight: f64, b: &Tensor, b_weight: f64) -> Result<Tensor> {
    Ok(((a * a_weight)? + (b * b_weight)?)?)
}

/// The caller's three functions, with what comes back from them checked.
struct Outside<'a, 'f, B> {
    sampler: Sampler,
    model: &'a mut Model<'f>,
    step_noise: &'a mut StepNoise<'f>,
    observe: &'a mut Observe<'f, B>,
}

impl<B> Outside<'_, '_, B> {
    /// The model's answer.
    fn ask(&mut self, x: &Tensor, t: f64) -> Result<Tensor> {
        let answer = (self.model)(x, t)?;
        self.fits("the model's answer", &answer, x)?;
        Ok(answer)
    }

    /// dx/dσ at σ, from the model's answer to x scaled to variance 1: Karras et al. 2022, algorithm 2, line 7.
    fn slope(&mut self, prediction: Prediction, x: &Tensor, sigma: f64, t: f64) -> Result<Tensor> {
        let scale = 1.0 / (sigma * sigma + 1.0).sqrt();
        let answer = self.ask(&(x * scale)?, t)?;
        match prediction {
            Prediction::Epsilon => Ok(answer),
            Prediction::V => combine(x, sigma * scale * scale, &answer, scale),
        }
    }

    /// Fresh noise for step `i`.
    fn fresh(&mut self, i: usize, x: &Tensor) -> Result<Tensor> {
        let noise = (self.step_noise)(i)?;
        self.fits("the noise of a step", &noise, x)?;
        Ok(noise)
    }

    /// Says that step `i` of `plan` is done.
    fn tell(&mut self, i: usize, plan: &Plan) -> Result<(), Interrupt<B>> {
        (self.observe)(i + 1, plan.timesteps.len())
    }

    fn fits(&self, what: &str, came: &Tensor, x: &Tensor) -> Result<()> {
        if came.dims() == x.dims() && came.dtype() == DType::F32 {
            return Ok(());
        }
        let (came_dims, came_dtype, dims) = (came.dims(), came.dtype(), x.dims());
        let sampler = self.sampler;
        Err(Error::input(format!(
            "{sampler}: {what} is {came_dims:?} {came_dtype:?}; the latents are {dims:?} F32"
        )))
    }
}

#[cfg(test)]
mod tests;
