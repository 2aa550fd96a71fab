//! What must hold of every sampler; the numbers are tested in tests/it/samplers.rs.

use candle_core::Device;

use super::*;
use crate::diffusion::Config;
use crate::random;

pub(super) fn schedule(text: &str) -> Schedule {
    Schedule::new(&Config::parse(text).unwrap()).unwrap()
}

fn normal(stream: u64, b: usize) -> Tensor {
    Tensor::from_vec(random::normal(3, stream, b * 48), (b, 4, 3, 4), &Device::Cpu).unwrap()
}

/// Runs a sampler with a model that is sure the clean latents are `x_0` whatever it sees.
fn towards(
    sampler: Sampler,
    schedule: &Schedule,
    steps: usize,
    x_0: &Tensor,
    noise: &Tensor,
) -> Result<Tensor> {
    let b = x_0.dim(0)?;
    let mut model = |x: &Tensor, t: f64| {
        let t = vec![t.round() as usize; b];
        let eps = eps_of(schedule, x, x_0, t[0]);
        let answer = match schedule.prediction() {
            Prediction::Epsilon => eps,
            Prediction::V => eps.and_then(|eps| schedule.velocity(x_0, &eps, &t)),
        };
        answer.map_err(|err| candle_core::Error::Msg(err.to_string()))
    };
    let mut fresh = |step| Ok(normal(100 + step as u64, b));
    let mut go_on = |_, _| Ok::<_, Interrupt<()>>(());
    match sample(sampler, schedule, steps, noise, &mut model, &mut fresh, &mut go_on) {
        Ok(latents) => Ok(latents),
        Err(Interrupt::Failed(error)) => Err(error),
        Err(Interrupt::Stopped(())) => panic!("nobody stopped it"),
    }
}

/// The noise in `x`, all of it at timestep `t`, if its clean latents are `x_0`.
fn eps_of(schedule: &Schedule, x: &Tensor, x_0: &Tensor, t: usize) -> Result<Tensor> {
    let alpha_bar = schedule.alpha_bar(t)?;
    let (alpha, sigma) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
    Ok(((x * (1.0 / sigma))? - (x_0 * (alpha / sigma))?)?)
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    let diff = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    diff.max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn names_survive_the_way_out_and_in_and_an_unknown_one_lists_them() {
    for sampler in Sampler::ALL {
        assert_eq!(sampler.to_string().parse::<Sampler>().unwrap(), sampler);
    }
    let words = "heun".parse::<Sampler>().unwrap_err().to_string();
    assert_eq!(
        words,
        "unknown sampler \"heun\"; wanted one of ddim, pndm, dpmpp-2m, dpmpp-2m-karras, euler, euler-a"
    );
}

/// Samplers that end at σ = 0 must return what the model is sure of; PNDM's extrapolation over-shoots, so it is
/// only near. Leading spacing, because its timesteps are whole for Euler too.
#[test]
fn every_sampler_arrives_where_the_model_points() {
    for prediction in ["epsilon", "v_prediction"] {
        let schedule = schedule(&format!(
            r#"{{"prediction_type": "{prediction}", "timestep_spacing": "leading", "set_alpha_to_one": true}}"#
        ));
        let (x_0, noise) = (normal(0, 2), normal(1, 2));
        for sampler in Sampler::ALL {
            let got = towards(sampler, &schedule, 25, &x_0, &noise).unwrap();
            let limit = if sampler == Sampler::Pndm { 0.05 } else { 1e-3 };
            let off = worst(&got, &x_0);
            assert!(off < limit, "{sampler} {prediction} is off by {off}");
        }
    }
}

#[test]
fn a_picture_alone_is_the_picture_in_the_batch() {
    let schedule = schedule("{}");
    let noise = normal(1, 3);
    let mut model = |x: &Tensor, t: f64| (x * 0.7)?.affine(1.0, (t / 100.0).sin())?.tanh();
    for sampler in Sampler::ALL {
        let mut run = |noise: &Tensor, row: Option<usize>| {
            let mut fresh = |step| match row {
                Some(i) => normal(10 + step as u64, 3).narrow(0, i, 1),
                None => Ok(normal(10 + step as u64, 3)),
            };
            let mut go_on = |_, _| Ok::<_, Interrupt<()>>(());
            sample(sampler, &schedule, 5, noise, &mut model, &mut fresh, &mut go_on).unwrap()
        };
        let batch = run(&noise, None);
        let alone = run(&noise.narrow(0, 1, 1).unwrap(), Some(1));
        assert!(worst(&alone, &batch.narrow(0, 1, 1).unwrap()) == 0.0, "{sampler}");
    }
}

#[test]
fn the_observer_counts_the_models_calls_and_may_stop() {
    let schedule = schedule("{}");
    for (sampler, total) in [(Sampler::Ddim, 4), (Sampler::Pndm, 5), (Sampler::EulerAncestral, 4)] {
        for stop_after in [2, usize::MAX] {
            let (mut calls, mut seen) = (0, Vec::new());
            let mut model = |x: &Tensor, _| {
                calls += 1;
                Ok(x.clone())
            };
            let mut observe = |done, all| {
                seen.push((done, all));
                if done == stop_after { Err(Interrupt::Stopped(())) } else { Ok(()) }
            };
            let mut fresh = |step| Ok(normal(step as u64, 1));
            let got = sample(sampler, &schedule, 4, &normal(9, 1), &mut model, &mut fresh, &mut observe);
            let done = total.min(stop_after);
            match got {
                Ok(_) => assert_ne!(stop_after, 2, "{sampler}"),
                Err(Interrupt::Stopped(())) => assert_eq!(stop_after, 2, "{sampler}"),
                Err(Interrupt::Failed(error)) => panic!("{sampler}: {error}"),
            }
            assert_eq!(seen, (1..=done).map(|i| (i, total)).collect::<Vec<_>>(), "{sampler}");
            assert_eq!(calls, done, "{sampler}");
        }
    }
}

#[test]
fn only_the_ancestral_sampler_asks_for_noise_and_not_at_the_end() {
    let schedule = schedule("{}");
    for sampler in Sampler::ALL {
        let mut asked = Vec::new();
        let mut fresh = |step| {
            asked.push(step);
            Ok(normal(step as u64, 1))
        };
        let mut go_on = |_, _| Ok::<_, Interrupt<()>>(());
        let mut model = |x: &Tensor, _| Ok(x.clone());
        sample(sampler, &schedule, 3, &normal(9, 1), &mut model, &mut fresh, &mut go_on).unwrap();
        assert_eq!(asked, if sampler == Sampler::EulerAncestral { vec![0, 1] } else { vec![] });
    }
}

fn refusal(sampler: Sampler, text: &str, steps: usize, noise: &Tensor, answer: &Tensor) -> String {
    let mut model = |_: &Tensor, _| Ok(answer.clone());
    let mut fresh = |_| Ok(answer.clone());
    let mut go_on = |_, _| Ok::<_, Interrupt<()>>(());
    match sample(sampler, &schedule(text), steps, noise, &mut model, &mut fresh, &mut go_on) {
        Err(Interrupt::Failed(error)) => error.to_string(),
        other => panic!("{sampler} {text} {steps} gave {other:?}"),
    }
}

#[test]
fn impossible_requests_are_refused_in_words() {
    let (one, two) = (normal(0, 1), normal(0, 2));
    for sampler in Sampler::ALL {
        let say = |text, steps, noise, answer| refusal(sampler, text, steps, noise, answer);
        assert_eq!(
            say("{}", 0, &one, &one),
            format!("{sampler}: 0 steps; 1 to 1000 are possible with this bundle")
        );
        assert!(say("{}", 1001, &one, &one).contains("1001 steps; 1 to 1000"));
        assert!(
            say("{}", 2, &one, &two).contains("answer is [2, 4, 3, 4] F32; the latents are [1, 4, 3, 4]")
        );
        assert!(say("{}", 2, &one.squeeze(0).unwrap(), &one).contains("noise is [4, 3, 4] F32"));
    }
}

#[test]
fn steps_that_leave_the_schedule_or_stand_still_are_refused() {
    let one = normal(0, 1);
    let offset = r#"{"timestep_spacing": "leading", "steps_offset": 1}"#;
    for sampler in [Sampler::Ddim, Sampler::Pndm] {
        assert!(refusal(sampler, offset, 1000, &one, &one).contains("timestep 1000"));
    }
    assert!(refusal(Sampler::Dpmpp2m, offset, 1000, &one, &one).contains("fall on the same noise level"));
    assert!(refusal(Sampler::Dpmpp2m, "{}", 1000, &one, &one).contains("fall on the same noise level"));
}

#[test]
fn what_the_file_asks_of_a_sampler_that_does_not_do_it_is_said_and_passed_over() {
    let text = r#"{"solver_order": 3, "skip_prk_steps": false, "interpolation_type": "log_linear",
        "algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min", "thresholding": true}"#;
    assert_eq!(
        Sampler::ignored_settings(&Config::parse(text).unwrap()),
        [
            r#"algorithm_type is "sde-dpmsolver++", and is taken as "dpmsolver++" by dpmpp-2m, dpmpp-2m-karras"#,
            r#"final_sigmas_type is "sigma_min", and is taken as "zero" by dpmpp-2m, dpmpp-2m-karras, euler"#,
            r#"interpolation_type is "log_linear", and is taken as "linear" by euler"#,
            "skip_prk_steps is false, and is taken as true by pndm",
            "solver_order is 3, and is taken as 2 by dpmpp-2m, dpmpp-2m-karras",
            "thresholding is true, and is taken as false by ddim, dpmpp-2m, dpmpp-2m-karras",
        ]
    );
    let (x_0, noise) = (normal(0, 1), normal(9, 1));
    for sampler in Sampler::ALL {
        let [plain, asked] =
            ["{}", text].map(|text| towards(sampler, &schedule(text), 3, &x_0, &noise).unwrap());
        assert!(worst(&plain, &asked) == 0.0, "{sampler} draws as if nothing had been asked");
    }
    assert_eq!(
        Sampler::ignored_settings(&Config::parse(r#"{"solver_order": 2, "sigma_min": null}"#).unwrap()),
        [""; 0]
    );
}

#[test]
fn each_class_of_ours_has_its_sampler_and_others_have_none() {
    assert_eq!(Sampler::of_class("EulerAncestralDiscreteScheduler"), Some(Sampler::EulerAncestral));
    assert_eq!(Sampler::of_class("DPMSolverMultistepScheduler"), Some(Sampler::Dpmpp2m));
    assert_eq!(Sampler::of_class("LCMScheduler"), None);
}
