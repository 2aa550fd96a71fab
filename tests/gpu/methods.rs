//! A step of each method on a GPU, beside the CPU.

use hypnos::engine::{CandleEngine, EngineSettings, Flow, TrainEvent};
use hypnos::job::{Discriminator, Evaluation, Method, Phase, TrainOptions, TrainSpec, Views};
use hypnos::ml::precision::Precision;

use crate::engine::{Attempt, draw, settings};

/// A step of each method, and the picture drawn with what it trained, on `device` in f32 as on the CPU.
pub(crate) fn a_step_of_each_method(device: &str) {
    for method in [Method::Dreambooth, Method::TextualInversion, Method::Hypnos] {
        let spec = one_step(method);
        let f32 = Some(Precision::F32);
        let (ours, wanted) = (trained(&spec, device, f32), trained(&spec, "cpu", None));
        let (losses, wanted_losses) = (losses(&ours), losses(&wanted));
        assert!(
            !losses.is_empty() && losses.len() == wanted_losses.len(),
            "{method}: {} losses, on the CPU {}",
            losses.len(),
            wanted_losses.len()
        );
        for ((name, loss), (_, wanted)) in losses.iter().zip(&wanted_losses) {
            let off = (loss - wanted).abs() / wanted.abs().max(1e-3);
            assert!(off <= 1e-3, "{method}: {name} {loss}, on the CPU {wanted}");
        }
        let (ours, wanted) = (drawn(&spec, &ours, device, f32), drawn(&spec, &wanted, "cpu", None));
        let off = ours.iter().zip(&wanted).map(|(ours, wanted)| ours.abs_diff(*wanted)).max();
        assert!(
            ours.len() == wanted.len() && off.is_some_and(|off| off <= 2),
            "{method}: pixels are off by {off:?}"
        );
    }
}

/// A step of HYPNOS and a picture where nothing is asked for on `device`, which is bf16 there: near those of f32 on the CPU,
/// and said by report, picture and checkpoint.
pub(crate) fn a_step_in_bf16(device: &str) {
    let spec = one_step(Method::Hypnos);
    let (ours, wanted) = (trained(&spec, device, None), trained(&spec, "cpu", None));
    assert_eq!(ours.trained().1.precision.as_deref(), Some("bf16"));
    assert_eq!(wanted.trained().1.precision.as_deref(), Some("f32"));
    let (our_losses, wanted_losses) = (losses(&ours), losses(&wanted));
    assert!(!our_losses.is_empty() && our_losses.len() == wanted_losses.len(), "{our_losses:?}");
    for ((name, loss), (_, wanted)) in our_losses.iter().zip(&wanted_losses) {
        let off = (loss - wanted).abs() / wanted.abs().max(1e-2);
        eprintln!("{name}: {loss} in bf16, {wanted} in f32");
        assert!(off <= LOSS_BF16, "{name} {loss}, in f32 {wanted}");
    }
    // The same weights, so that the picture alone is compared.
    let (ours, wanted) = (drawn(&spec, &wanted, device, None), drawn(&spec, &wanted, "cpu", None));
    let sum: u64 = ours.iter().zip(&wanted).map(|(ours, wanted)| u64::from(ours.abs_diff(*wanted))).sum();
    let mean = sum as f64 / wanted.len() as f64;
    eprintln!("pixels are off by {mean} of 255 in the mean");
    assert!(ours.len() == wanted.len() && mean <= PIXELS_BF16, "pixels are off by {mean} in the mean");
}

/// A training that was begun in bf16 goes on in bf16, and in f32, which its report says.
pub(crate) fn a_training_changes_its_precision(device: &str) {
    let mut spec = one_step(Method::Dreambooth);
    spec.options.steps = 2;
    let after_one = |event: &TrainEvent| matches!(event, TrainEvent::Progress(at) if (at.phase, at.step) == (Phase::Training, 1));
    let paused = Attempt::on(engine(device, None), &spec, Vec::new(), None, |_, event| {
        if after_one(event) { Flow::Pause } else { Flow::Continue }
    });
    let (_, file) = paused.paused().expect("a checkpoint");
    let go_on = |precision| {
        let engine = engine(device, precision);
        Attempt::on(engine, &spec, Vec::new(), Some(&file), |_, _| Flow::Continue)
    };
    let said = |precision| {
        let attempt = go_on(Some(precision));
        let report = attempt.trained().1;
        let is_warned = |warning: &String| warning.ends_with("computed in bf16, then in f32");
        (report.precision.clone(), report.warnings.iter().any(is_warned))
    };
    assert_eq!(said(Precision::Bf16), (Some("bf16".to_owned()), false));
    assert_eq!(said(Precision::F32), (Some("bf16, f32".to_owned()), true));
}

/// How far bf16 may be from f32: losses of a step, and pixels of a picture after two steps in the mean.
const LOSS_BF16: f32 = 5e-2;
const PIXELS_BF16: f64 = 4.0;

/// One step with everything that belongs to the method, as short as may be.
fn one_step(method: Method) -> TrainSpec {
    let defaults = TrainOptions::of(method);
    let options = TrainOptions {
        steps: 1,
        class_images: 0, // drawing one takes longer than the step
        previews: Some(Vec::new()),
        views: Views { n: 2, ..defaults.views.clone() },
        discriminator: Discriminator { steps: 1, batch: 2, ..Discriminator::default() },
        evaluation: Evaluation { enabled: false, ..Evaluation::default() },
        ..defaults
    };
    TrainSpec::new("mug", options, 77).expect("a specification")
}

fn engine(device: &str, precision: Option<Precision>) -> CandleEngine {
    CandleEngine::open(EngineSettings { device: device.into(), precision, ..settings() }).expect("an engine")
}

fn trained(spec: &TrainSpec, device: &str, precision: Option<Precision>) -> Attempt {
    Attempt::on(engine(device, precision), spec, Vec::new(), None, |_, _| Flow::Continue)
}

/// The pixels of a picture after two steps.
fn drawn(train: &TrainSpec, attempt: &Attempt, device: &str, precision: Option<Precision>) -> Vec<u8> {
    let pictures = draw(&mut engine(device, precision), train, &attempt.weights(), |sample| sample.steps = 2);
    let picture = pictures.expect("no fault").expect("nobody stopped it").remove(0);
    image::load_from_memory(&picture.bytes).expect("a picture").to_rgb8().into_raw()
}

/// What the steps computed, by name.
fn losses(attempt: &Attempt) -> Vec<(&'static str, f32)> {
    let metrics = attempt.events.iter().filter_map(|event| match event {
        TrainEvent::Step { metrics, .. } => Some(metrics),
        _ => None,
    });
    metrics.flatten().copied().filter(|(_, value)| !value.is_nan()).collect()
}
