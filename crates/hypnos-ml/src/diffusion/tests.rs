//! What must hold of the schedule whatever the numbers; the numbers are tested in tests/it/samplers.rs.

use candle_core::{Device, Var};

use super::*;
use crate::random;

const SD15: &str = r#"{"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "steps_offset": 1, "trained_betas": null}"#;

fn schedule(text: &str) -> Result<Schedule> {
    Schedule::new(&Config::parse(text)?)
}

fn draw(stream: u64, shape: &[usize]) -> Tensor {
    Tensor::from_vec(random::normal(1, stream, shape.iter().product()), shape, &Device::Cpu).unwrap()
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    let diff = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    diff.max(0).unwrap().to_scalar().unwrap()
}

fn refusal(text: &str) -> String {
    match schedule(text) {
        Err(error) => error.to_string(),
        other => panic!("{text} gave {other:?}"),
    }
}

#[test]
fn the_schedule_of_sd15_has_the_known_ends() {
    let schedule = schedule(SD15).unwrap();
    assert_eq!(schedule.n_timesteps(), 1000);
    assert!((schedule.alpha_bar(0).unwrap() - 0.999_15).abs() < 1e-7);
    assert!((schedule.alpha_bar(999).unwrap() - 0.004_660_095).abs() < 1e-8);
    assert!(schedule.alphas_cumprod().windows(2).all(|pair| pair[0] > pair[1]));
    assert!(schedule.alpha_bar(1000).is_err());
}

#[test]
fn noising_and_going_back_gives_the_latents_with_every_prediction() {
    let schedule = schedule(SD15).unwrap();
    let (x_0, eps) = (draw(0, &[3, 4, 5, 6]), draw(1, &[3, 4, 5, 6]));
    let t = [0, 400, 999];
    let x_t = schedule.q_sample(&x_0, &eps, &t).unwrap();
    let v = schedule.velocity(&x_0, &eps, &t).unwrap();
    assert!(worst(&schedule.x_0_from_v(&x_t, &v, &t).unwrap(), &x_0) < 2e-6);
    assert!(worst(&schedule.x_0_from_eps(&x_t, &eps, &t).unwrap(), &x_0) < 2e-5);
}

#[test]
fn target_and_x_0_follow_the_prediction_type() {
    let (x_0, eps) = (draw(0, &[2, 4, 3, 3]), draw(1, &[2, 4, 3, 3]));
    let t = [700, 20];
    for (key, want_eps) in [("epsilon", true), ("v_prediction", false)] {
        let schedule = schedule(&format!(r#"{{"prediction_type": "{key}"}}"#)).unwrap();
        let x_t = schedule.q_sample(&x_0, &eps, &t).unwrap();
        let target = schedule.target(&x_0, &eps, &t).unwrap();
        assert_eq!(worst(&target, &eps) == 0.0, want_eps, "{key}");
        assert!(worst(&schedule.x_0(&x_t, &target, &t).unwrap(), &x_0) < 5e-6, "{key}");
    }
}

#[test]
fn an_image_alone_is_noised_as_in_a_batch() {
    let schedule = schedule(SD15).unwrap();
    let (x_0, eps) = (draw(0, &[3, 4, 2, 2]), draw(1, &[3, 4, 2, 2]));
    let t = [7, 500, 999];
    let batch = schedule.q_sample(&x_0, &eps, &t).unwrap();
    for (i, &t) in t.iter().enumerate() {
        let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
        let alone = schedule.q_sample(&row(&x_0), &row(&eps), &[t]).unwrap();
        assert!(worst(&alone, &row(&batch)) == 0.0);
    }
}

#[test]
fn x_0_passes_the_gradient_on_to_the_models_answer() {
    let schedule = schedule(SD15).unwrap();
    let answer = Var::from_tensor(&draw(1, &[2, 4, 2, 2])).unwrap();
    let x_0 = schedule.x_0(&draw(0, &[2, 4, 2, 2]), &answer, &[10, 900]).unwrap();
    let grads = x_0.sum_all().unwrap().backward().unwrap();
    let grad = grads.get(&answer).unwrap().flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
    for (row, t) in grad.iter().zip([10, 900]) {
        let alpha_bar = schedule.alpha_bar(t).unwrap();
        let want = -((1.0 - alpha_bar) / alpha_bar).sqrt() as f32;
        assert!(row.iter().all(|g| (g - want).abs() < 1e-5 * want.abs()), "{row:?} {want}");
    }
}

#[test]
fn half_precision_latents_are_noised_in_f32() {
    let schedule = schedule(SD15).unwrap();
    let x_0 = draw(0, &[1, 4, 2, 2]).to_dtype(DType::BF16).unwrap();
    assert_eq!(schedule.q_sample(&x_0, &x_0, &[3]).unwrap().dtype(), DType::F32);
}

#[test]
fn shapes_and_timesteps_that_do_not_fit_are_told_apart_in_words() {
    let schedule = schedule(SD15).unwrap();
    let (two, one) = (draw(0, &[2, 4, 2, 2]), draw(1, &[1, 4, 2, 2]));
    let words = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(words(schedule.q_sample(&two, &one, &[1, 2])).contains("eps [1, 4, 2, 2]"));
    assert!(words(schedule.q_sample(&two, &two, &[1])).contains("1 timesteps"));
    assert!(words(schedule.q_sample(&two, &two, &[1, 1000])).contains("timestep 1000 is outside"));
}

#[test]
fn an_empty_file_has_the_defaults_of_the_reference() {
    let schedule = schedule("{}").unwrap();
    assert_eq!((schedule.n_timesteps(), schedule.prediction()), (1000, Prediction::Epsilon));
    assert!((schedule.alpha_bar(0).unwrap() - 0.9999).abs() < 1e-7);
    assert!((schedule.alpha_bar(999).unwrap() - 4.035_83e-5).abs() < 1e-9);
    assert_eq!(schedule.config().spacing().unwrap(), None);
}

#[test]
fn trained_betas_replace_the_formula() {
    let schedule = schedule(r#"{"num_train_timesteps": 3, "trained_betas": [0.5, 0.5, 0.5]}"#).unwrap();
    assert_eq!(schedule.alphas_cumprod(), [0.5, 0.25, 0.125]);
}

#[test]
fn the_infinity_the_reference_writes_is_read() {
    let text = r#"{"lambda_min_clipped": -Infinity, "note": "to \"-Infinity\" and NaN", "beta_end": 0.012}"#;
    let config = Config::parse(text).unwrap();
    assert_eq!(config.rest["lambda_min_clipped"], Value::Null);
    assert_eq!(config.rest["note"], "to \"-Infinity\" and NaN");
    assert_eq!(config.beta_end, Some(0.012));
}

#[test]
fn what_cannot_be_honoured_is_refused_by_key_and_value() {
    for (text, wants) in [
        (r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#, "_class_name is \"FlowMatchEuler"),
        (
            r#"{"prediction_type": "sample"}"#,
            "prediction_type is \"sample\"; this program supports epsilon or v_prediction",
        ),
        (r#"{"beta_schedule": "sigmoid"}"#, "beta_schedule is \"sigmoid\""),
        (r#"{"timestep_spacing": "odd"}"#, "timestep_spacing is \"odd\""),
        (r#"{"use_flow_sigmas": true}"#, "use_flow_sigmas is true"),
        (r#"{"num_train_timesteps": 1}"#, "num_train_timesteps is 1"),
        (r#"{"num_train_timesteps": 99999999999}"#, "num_train_timesteps is 99999999999"),
        (r#"{"steps_offset": 1000}"#, "steps_offset is 1000"),
        (r#"{"trained_betas": [0.1]}"#, "trained_betas is a list of 1"),
        (r#"{"num_train_timesteps": 2, "beta_end": 1.5}"#, "beta is 1.5 at timestep 1"),
        (r#"{"beta_end": 0.99}"#, "leaves 0 of the signal"),
        (r#"{"beta_start": 0}"#, "beta is 0 at timestep 0"),
        (r#"{"beta_start": -0.1, "beta_schedule": "scaled_linear"}"#, "beta is NaN"),
        (r#"{"beta_start": "small"}"#, "scheduler_config.json: "),
        ("", "scheduler_config.json: "),
    ] {
        let words = refusal(text);
        assert!(words.contains(wants) && !words.contains('\n'), "{text} gave: {words}");
    }
}

#[test]
fn a_pipeline_has_an_offset_of_one_and_does_not_clip() {
    for (text, wanted) in [
        (r#"{"steps_offset": 1, "clip_sample": false}"#, &[][..]),
        ("{}", &[]),
        (r#"{"steps_offset": 0}"#, &["steps_offset is 0, and is taken as 1, as diffusers takes it"]),
        (
            r#"{"clip_sample": true}"#,
            &["clip_sample is true, and is taken as false, as diffusers takes it: latents are not clipped"],
        ),
    ] {
        let mut config = Config::read(text).unwrap();
        assert_eq!(config.adopt_pipeline(), wanted, "{text}");
        assert_eq!((config.steps_offset(), &config.rest["clip_sample"]), (1, &Value::Bool(false)), "{text}");
    }
}

#[test]
fn a_class_gives_the_betas_that_its_file_leaves_out() {
    let lcm = schedule(r#"{"_class_name": "LCMScheduler"}"#).unwrap();
    let written = schedule(SD15).unwrap();
    assert_eq!(lcm.alphas_cumprod(), written.alphas_cumprod());
}
