//! The noise schedule and the samplers against diffusers' schedulers, with a formula in place of the UNet.

use candle_core::Tensor;
use hypnos::ml::Interrupt;
use hypnos::ml::diffusion::{Config, Schedule};
use hypnos::ml::samplers::{Plan, Sampler, sample};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;

use crate::golden::{Golden, OUTPUT, assert_close};

const SCHEDULES: [&str; 4] = ["sd15", "sd15_v", "ddim", "sd2"];

/// The stand-in for the UNet: d tanh(a x + sin(t / 100 + b)), once without and once with the prompt.
#[derive(Deserialize)]
struct Formula {
    abd: HashMap<String, [f64; 3]>,
}

impl Formula {
    fn answer(&self, which: &str, x: &Tensor, t: f64) -> candle_core::Result<Tensor> {
        let [a, b, d] = self.abd[which];
        x.affine(a, (t / 100.0 + b).sin())?.tanh()? * d
    }

    fn guided(&self, guidance: f64, x: &Tensor, t: f64) -> candle_core::Result<Tensor> {
        let (uncond, cond) = (self.answer("uncond", x, t)?, self.answer("cond", x, t)?);
        &uncond + ((cond - &uncond)? * guidance)?
    }
}

fn schedule(config: &Value) -> Schedule {
    let config = Config::parse(&config.to_string()).expect("a configuration we can run");
    Schedule::new(&config).expect("a schedule")
}

/// The name of a case of the goldens, `<schedule>.<sampler>`.
fn case(schedule: &str, sampler: Sampler) -> String {
    format!("{schedule}.{}", sampler.to_string().replace('-', "_"))
}

/// The latents after every call of the model, with the goldens' formula, guidance and noise.
fn walk(golden: &Golden, sampler: Sampler, schedule: &Schedule, steps: usize) -> Vec<Tensor> {
    let formula: Formula = golden.metadata("model");
    let guidance: f64 = golden.metadata("guidance");
    let draws = golden.get("input.draws");
    let scale = match sampler {
        Sampler::Euler | Sampler::EulerAncestral => {
            let sigmas = Plan::new(sampler, schedule, steps).expect("a plan").sigmas;
            sigmas.iter().map(|sigma| (sigma * sigma + 1.0).sqrt()).collect()
        }
        _ => vec![1.0; steps + 2],
    };
    let mut seen = Vec::new();
    let mut model = |x: &Tensor, t: f64| {
        seen.push((x * scale[seen.len()])?);
        formula.guided(guidance, x, t)
    };
    let mut fresh = |step| draws.get(step);
    let mut go_on = |_, _| Ok::<_, Interrupt<()>>(());
    let noise = golden.get("input.noise");
    let last = sample(sampler, schedule, steps, &noise, &mut model, &mut fresh, &mut go_on);
    seen.push(last.expect("latents"));
    seen.split_off(1)
}

#[test]
fn every_sampler_calls_the_model_at_the_timesteps_and_noise_levels_of_the_reference() {
    let golden = Golden::open("samplers");
    for name in SCHEDULES {
        let schedule = schedule(&golden.metadata(&format!("schedule.{name}")));
        for sampler in Sampler::ALL {
            for steps in [1, 2, 4, 7, 20, 25, 30, 50] {
                let case = case(name, sampler);
                let plan = Plan::new(sampler, &schedule, steps).expect("a plan");
                assert_eq!(
                    plan.timesteps,
                    golden.numbers(&format!("output.{case}.timesteps.{steps}")),
                    "{case} {steps}"
                );
                let sigmas = golden.find(&format!("output.{case}.sigmas.{steps}"));
                assert_eq!(plan.sigmas.is_empty(), sigmas.is_none(), "{case} {steps}");
                if let Some(sigmas) = sigmas {
                    let ours = Tensor::new(plan.sigmas, sigmas.device()).expect("a vector");
                    assert_close(&format!("{case} sigmas {steps}"), &ours, &sigmas, 1e-6);
                }
            }
        }
    }
}

#[test]
fn every_sampler_visits_the_latents_of_the_reference() {
    let golden = Golden::open("samplers");
    let after: HashMap<String, Vec<usize>> = golden.metadata("after");
    let mut n_compared = 0;
    for name in SCHEDULES {
        let schedule = schedule(&golden.metadata(&format!("schedule.{name}")));
        for sampler in Sampler::ALL {
            let case = case(name, sampler);
            for steps in [1, 2, 4, 7, 20] {
                let ours = walk(&golden, sampler, &schedule, steps);
                let wanted = golden.get(&format!("output.{case}.latents.{steps}"));
                let calls = if steps == 20 { after[&case].clone() } else { vec![ours.len()] };
                assert_eq!(calls.last(), Some(&ours.len()), "{case} {steps}: calls of the model");
                for (row, &call) in calls.iter().enumerate() {
                    let what = format!("{case}, {steps} steps, after call {call}");
                    assert_close(&what, &ours[call - 1], &wanted.get(row).expect("a row"), OUTPUT);
                    n_compared += 1;
                }
            }
        }
    }
    assert_eq!(n_compared, SCHEDULES.len() * 6 * (4 + 5));
}

#[test]
fn every_beta_schedule_equals_the_reference_bit_for_bit() {
    let golden = Golden::open("noising");
    for name in ["linear", "linear_sd", "scaled_linear", "squaredcos_cap_v2"] {
        let schedule = schedule(&golden.metadata(&format!("betas.{name}")));
        let wanted = golden.get(&format!("output.{name}.alphas_cumprod")).to_vec1::<f32>().expect("a vector");
        assert_eq!(schedule.alphas_cumprod(), wanted, "{name}");
    }
}

#[test]
fn images_are_noised_each_at_its_own_timestep_as_by_the_reference() {
    let golden = Golden::open("noising");
    let t: Vec<usize> = golden.numbers("input.t").iter().map(|&t| t as usize).collect();
    let (x_0, eps) = (golden.get("input.x0"), golden.get("input.noise"));
    for name in ["linear", "linear_sd", "scaled_linear", "squaredcos_cap_v2"] {
        let mut config: Value = golden.metadata(&format!("betas.{name}"));
        config["prediction_type"] = json!("v_prediction");
        let schedule = schedule(&config);
        let noisy = schedule.q_sample(&x_0, &eps, &t).expect("latents");
        let target = schedule.target(&x_0, &eps, &t).expect("latents");
        assert_close(name, &noisy, &golden.get(&format!("output.{name}.noisy")), 1e-6);
        assert_close(name, &target, &golden.get(&format!("output.{name}.velocity")), 1e-6);
    }
}
