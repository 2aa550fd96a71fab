//! A step of each method on a GPU, beside the CPU.

use hypnos::engine::{CandleEngine, EngineSettings, Flow, TrainEvent};
use hypnos::job::{Discriminator, Evaluation, Method, TrainOptions, TrainSpec, Views};

use crate::engine::{Attempt, draw, settings};

/// A step of each method, and the picture drawn with what it trained, on `device` as on the CPU.
pub(crate) fn a_step_of_each_method(device: &str) {
    for method in [Method::Dreambooth, Method::TextualInversion, Method::Hypnos] {
        let spec = one_step(method);
        let (ours, wanted) = (trained(&spec, device), trained(&spec, "cpu"));
        let (losses, wanted_losses) = (losses(&ours), losses(&wanted));
        assert!(!losses.is_empty() && losses.len() == wanted_losses.len());
        for ((name, loss), (_, wanted)) in losses.iter().zip(&wanted_losses) {
            let off = (loss - wanted).abs() / wanted.abs().max(1e-3);
            assert!(off <= 1e-3, "{method}: {name} {loss}, on the CPU {wanted}");
        }
        let (ours, wanted) = (drawn(&spec, &ours, device), drawn(&spec, &wanted, "cpu"));
        let off = ours.iter().zip(&wanted).map(|(ours, wanted)| ours.abs_diff(*wanted)).max();
        assert!(
            ours.len() == wanted.len() && off.is_some_and(|off| off <= 2),
            "{method}: pixels are off by {off:?}"
        );
    }
}

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

fn engine(device: &str) -> CandleEngine {
    CandleEngine::open(EngineSettings { device: device.into(), ..settings() }).expect("an engine")
}

fn trained(spec: &TrainSpec, device: &str) -> Attempt {
    Attempt::on(engine(device), spec, Vec::new(), None, |_, _| Flow::Continue)
}

/// The pixels of a picture after two steps.
fn drawn(train: &TrainSpec, attempt: &Attempt, device: &str) -> Vec<u8> {
    let pictures = draw(&mut engine(device), train, &attempt.weights(), |sample| sample.steps = 2);
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
