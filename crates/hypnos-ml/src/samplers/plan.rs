//! Which timesteps and noise levels a sampler visits.
//!
//! Numbers are computed as the reference's numpy does: f64, with ᾱ, σ and log σ as f32 tables.

use super::kind::Sampler;
use crate::diffusion::{Schedule, Spacing};
use crate::{Error, Result};

/// ρ of Karras et al. 2022 (arXiv 2206.00364), eq. 5: how strongly steps crowd towards low noise.
const RHO: f64 = 7.0;

/// The places where the model is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The timestep of every call of the model, falling. Whole numbers, except where Euler's σ lies between two.
    pub timesteps: Vec<f64>,
    /// σ = √((1 − ᾱ) / ᾱ) of every call and, at the end, 0. Empty for DDIM and PNDM, which look ᾱ up.
    pub sigmas: Vec<f64>,
}

impl Plan {
    /// The plan of `steps` steps, 1 to T; PNDM calls the model once more if there are 2 or more.
    ///
    /// [`Error::Input`] if `steps` is out of range, or if a timestep falls where the model was never trained. Settings of
    /// the file that the sampler does not honour are passed over: [`Sampler::ignored_settings`] says which.
    pub fn new(sampler: Sampler, schedule: &Schedule, steps: usize) -> Result<Self> {
        let n = schedule.n_timesteps();
        if !(1..=n).contains(&steps) {
            return Err(Error::setting(
                sampler.name(),
                format!("{steps} steps; 1 to {n} are possible with this bundle"),
            ));
        }
        let plan = match sampler {
            Sampler::Ddim => Self { timesteps: ddim_timesteps(schedule, steps)?, sigmas: vec![] },
            Sampler::Pndm => Self { timesteps: plms_timesteps(schedule, steps)?, sigmas: vec![] },
            Sampler::Dpmpp2m | Sampler::Dpmpp2mKarras => dpmpp_plan(sampler, schedule, steps)?,
            Sampler::Euler | Sampler::EulerAncestral => euler_plan(sampler, schedule, steps)?,
        };
        let untrained = plan.timesteps.iter().find(|&&t| t < 0.0 || t > (n - 1) as f64);
        match untrained {
            Some(t) => Err(Error::setting(
                sampler.name(),
                format!(
                    "{steps} steps with this bundle's spacing and offset would need timestep {t}, and the \
                 schedule has 0 to {}; take fewer steps",
                    n - 1
                ),
            )),
            None => Ok(plan),
        }
    }
}

/// `DDIMScheduler.set_timesteps`; leading where the file leaves it open.
fn ddim_timesteps(schedule: &Schedule, steps: usize) -> Result<Vec<f64>> {
    let n = schedule.n_timesteps();
    let timesteps = match schedule.config().spacing()?.unwrap_or(Spacing::Leading) {
        Spacing::Leading => leading(n / steps, schedule.config().steps_offset(), steps),
        Spacing::Linspace => linspace(0.0, (n - 1) as f64, steps).map(f64::round_ties_even).collect(),
        Spacing::Trailing => return Ok(trailing(n, n, steps)),
    };
    Ok(timesteps.into_iter().rev().collect())
}

/// `PNDMScheduler.set_timesteps` with `skip_prk_steps`: DDIM's, the second one twice.
fn plms_timesteps(schedule: &Schedule, steps: usize) -> Result<Vec<f64>> {
    let mut timesteps = ddim_timesteps(schedule, steps)?;
    if let Some(&second) = timesteps.get(1) {
        timesteps.insert(1, second);
    }
    Ok(timesteps)
}

/// `DPMSolverMultistepScheduler.set_timesteps`; linspace where the file leaves it open.
fn dpmpp_plan(sampler: Sampler, schedule: &Schedule, steps: usize) -> Result<Plan> {
    let n = schedule.n_timesteps();
    let table = sigma_table(schedule);
    let (timesteps, mut sigmas) = if sampler == Sampler::Dpmpp2mKarras {
        let sigmas = karras(f64::from(table[n - 1]), f64::from(table[0]), steps);
        // The reference rounds, but cuts where the schedule is a cosine.
        let cosine = schedule.config().beta_schedule.as_deref() == Some("squaredcos_cap_v2");
        let whole = if cosine { f64::trunc } else { f64::round_ties_even };
        (sigmas.iter().map(|&sigma| whole(timestep_of(sigma, &table))).collect(), sigmas)
    } else {
        let timesteps: Vec<_> = match schedule.config().spacing()?.unwrap_or(Spacing::Linspace) {
            // One more than asked for and the last left out: it would have no noise to remove.
            Spacing::Leading => leading(n / (steps + 1), schedule.config().steps_offset(), steps + 1),
            Spacing::Linspace => linspace(0.0, (n - 1) as f64, steps + 1).map(f64::round_ties_even).collect(),
            Spacing::Trailing => trailing(n, n, steps).into_iter().rev().collect(),
        };
        let timesteps: Vec<_> = timesteps.into_iter().rev().take(steps).collect();
        let sigmas = timesteps.iter().map(|&t| sigma_at(t, &table)).collect();
        (timesteps, sigmas)
    };
    sigmas.push(0.0);
    let sigmas = rounded(sigmas);
    if let Some(i) = sigmas.windows(2).position(|pair| pair[0] <= pair[1]) {
        return Err(Error::setting(
            sampler.name(),
            format!(
                "{steps} steps are too many for this schedule, steps {} and {} fall on the same noise level",
                i + 1,
                i + 2
            ),
        ));
    }
    Ok(Plan { timesteps, sigmas })
}

/// `EulerDiscreteScheduler.set_timesteps`, and the ancestral one's; linspace where the file leaves it open.
fn euler_plan(sampler: Sampler, schedule: &Schedule, steps: usize) -> Result<Plan> {
    let n = schedule.n_timesteps();
    let table = sigma_table(schedule);
    let timesteps = match schedule.config().spacing()?.unwrap_or(Spacing::Linspace) {
        Spacing::Leading => leading(n / steps, schedule.config().steps_offset(), steps),
        // Not rounded: the model is asked between two timesteps. Only cut to f32, as the reference has it.
        Spacing::Linspace => rounded(linspace(0.0, (n - 1) as f64, steps).collect()),
        Spacing::Trailing => trailing(n, n, steps).into_iter().rev().collect(),
    };
    let mut timesteps: Vec<_> = timesteps.into_iter().rev().collect();
    let mut sigmas: Vec<_> = timesteps.iter().map(|&t| sigma_at(t, &table)).collect();
    if sampler == Sampler::Euler && schedule.config().is_set("use_karras_sigmas") {
        sigmas = karras(sigmas[0], sigmas[steps - 1], steps);
        timesteps = rounded(sigmas.iter().map(|&sigma| timestep_of(sigma, &table)).collect());
    }
    sigmas.push(0.0);
    Ok(Plan { timesteps, sigmas: rounded(sigmas) })
}

/// 0, stride, 2 stride, …, each with the offset added.
fn leading(stride: usize, offset: usize, count: usize) -> Vec<f64> {
    (0..count).map(|i| (i * stride + offset) as f64).collect()
}

/// `count` numbers from `start` to `end`, both included; `start` alone if only one is wanted.
fn linspace(start: f64, end: f64, count: usize) -> impl DoubleEndedIterator<Item = f64> {
    let step = if count > 1 { (end - start) / (count - 1) as f64 } else { 0.0 };
    (0..count).map(move |i| if i > 0 && i == count - 1 { end } else { i as f64 * step + start })
}

/// Falling: `top` − 1, then down by n / steps, rounded.
///
/// Departure: for some counts (61 of 1000, 103, …) the reference's `arange` overshoots to one more entry, −1, which
/// then wraps to the noisiest timestep; here there are always `count`.
fn trailing(top: usize, n: usize, count: usize) -> Vec<f64> {
    let (top, ratio) = (top as f64, n as f64 / count as f64);
    let step = (top - ratio) - top; // arange's own rounding
    (0..count).map(|i| (top + i as f64 * step).round_ties_even() - 1.0).collect()
}

/// σ_t = √((1 − ᾱ_t) / ᾱ_t) in f32.
fn sigma_table(schedule: &Schedule) -> Vec<f32> {
    schedule.alphas_cumprod().iter().map(|alpha_bar| ((1.0 - alpha_bar) / alpha_bar).sqrt()).collect()
}

/// σ at a timestep that may lie between two, linearly; the last one's beyond the end.
fn sigma_at(t: f64, table: &[f32]) -> f64 {
    let low = t as usize;
    match (table.get(low), table.get(low + 1)) {
        (Some(&a), Some(&b)) => (f64::from(b) - f64::from(a)) * (t - low as f64) + f64::from(a),
        _ => f64::from(table[table.len() - 1]),
    }
}

/// The timestep, possibly between two, whose log σ this is; inverse of the table, held within it.
fn timestep_of(sigma: f64, table: &[f32]) -> f64 {
    let log_sigma = sigma.max(1e-10).ln();
    let at_or_below = table.partition_point(|s| f64::from(s.ln()) <= log_sigma);
    let low = at_or_below.saturating_sub(1).min(table.len() - 2);
    let (log_low, log_high) = (table[low].ln(), table[low + 1].ln());
    let w = (f64::from(log_low) - log_sigma) / f64::from(log_low - log_high);
    let w = w.clamp(0.0, 1.0);
    (1.0 - w) * low as f64 + w * (low + 1) as f64
}

/// σ falling from `max` to `min`, evenly in σ^(1/ρ): Karras et al. 2022 (arXiv 2206.00364), eq. 5.
fn karras(max: f64, min: f64, count: usize) -> Vec<f64> {
    let (max, min) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
    linspace(0.0, 1.0, count).map(|ramp| (max + ramp * (min - max)).powf(RHO)).collect()
}

/// Cut to f32, as the reference stores them.
fn rounded(numbers: Vec<f64>) -> Vec<f64> {
    numbers.into_iter().map(|x| f64::from(x as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::schedule;
    use super::*;

    const SPACINGS: [&str; 4] = [
        "{}",
        r#"{"timestep_spacing": "leading", "steps_offset": 1}"#,
        r#"{"timestep_spacing": "linspace"}"#,
        r#"{"timestep_spacing": "trailing"}"#,
    ];

    #[test]
    fn timesteps_and_sigmas_fall_for_every_sampler_spacing_and_count() {
        for text in SPACINGS {
            let schedule = schedule(text);
            for sampler in Sampler::ALL {
                for steps in [1, 2, 3, 4, 7, 20, 50, 61, 103, 201, 333] {
                    let plan = Plan::new(sampler, &schedule, steps).unwrap();
                    let extra = usize::from(sampler == Sampler::Pndm && steps > 1);
                    let place = format!("{sampler} {text} {steps}");
                    assert_eq!(plan.timesteps.len(), steps + extra, "{place}");
                    assert!(plan.timesteps.windows(2).all(|t| t[0] >= t[1]), "{place}: {:?}", plan.timesteps);
                    assert!(plan.sigmas.windows(2).all(|s| s[0] > s[1]), "{place}: {:?}", plan.sigmas);
                }
            }
        }
    }

    #[test]
    fn a_sigma_of_the_table_is_found_at_its_own_timestep() {
        let table = sigma_table(&schedule("{}"));
        for t in [0, 1, 400, 998, 999] {
            let found = timestep_of(f64::from(table[t]), &table);
            assert!((found - t as f64).abs() < 1e-3, "{found} for {t}");
            assert!((sigma_at(t as f64, &table) - f64::from(table[t])).abs() < 1e-12);
        }
        assert!(timestep_of(0.0, &table).abs() < 1e-12);
        assert!((timestep_of(1e9, &table) - 999.0).abs() < 1e-12);
    }

    #[test]
    fn karras_runs_between_its_ends_and_crowds_low_noise() {
        let sigmas = karras(80.0, 0.002, 18);
        assert!((sigmas[0] - 80.0).abs() < 1e-9 && (sigmas[17] - 0.002).abs() < 1e-12);
        assert!(sigmas[0] - sigmas[1] > 100.0 * (sigmas[16] - sigmas[17]));
    }
}
