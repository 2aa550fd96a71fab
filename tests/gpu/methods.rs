//! A step of each method on a GPU, beside the CPU.

use hypnos::engine::{CandleEngine, EngineSettings, Flow, Image, TrainEvent};
use hypnos::job::{Discriminator, Evaluation, Method, TrainOptions, TrainSpec, Views};

use crate::engine::{Attempt, settings};

/// A step of each method, and the picture drawn with what it trained, on `device` as on the CPU.
pub(crate) fn a_step_of_each_method(device: &str) {
    for method in [Method::Dreambooth, Method::TextualInversion, Method::Hypnos] {
        let (ours, wanted) = (one_step(method, device), one_step(method, "cpu"));
        let (losses, wanted_losses) = (losses(&ours), losses(&wanted));
        assert!(!losses.is_empty() && losses.len() == wanted_losses.len());
        for ((name, loss), (_, wanted)) in losses.iter().zip(&wanted_losses) {
            let off = (loss - wanted).abs() / wanted.abs().max(1e-3);
            assert!(off <= 1e-3, "{method}: {name} {loss}, on the CPU {wanted}");
        }
        let (pictures, wanted) = (ours.trained().2, wanted.trained().2);
        assert!(!pictures.is_empty() && pictures.len() == wanted.len());
        for (picture, wanted) in pictures.iter().zip(wanted) {
            let pairs = pixels(picture).into_iter().zip(pixels(wanted));
            let off = pairs.map(|(ours, wanted)| ours.abs_diff(wanted)).max();
            assert!(off <= Some(2), "{method}: pixels are off by {off:?}");
        }
    }
}

/// One step with everything that belongs to the method, as short as may be, and one picture.
fn one_step(method: Method, device: &str) -> Attempt {
    let defaults = TrainOptions::of(method);
    let options = TrainOptions {
        steps: 1,
        class_images: u32::from(method != Method::TextualInversion),
        previews: Some(Vec::new()),
        views: Views { n: 2, ..defaults.views.clone() },
        discriminator: Discriminator { steps: 1, batch: 2, ..Discriminator::default() },
        evaluation: Evaluation { enabled: false, images: 1, steps: 2, ..Evaluation::default() },
        ..defaults
    };
    let spec = TrainSpec::new("mug", options, 77).expect("a specification");
    let settings = EngineSettings { device: device.into(), ..settings() };
    Attempt::on(CandleEngine::open(settings).expect("an engine"), &spec, Vec::new(), None, |_, _| {
        Flow::Continue
    })
}

/// What the steps computed, by name.
fn losses(attempt: &Attempt) -> Vec<(&'static str, f32)> {
    let metrics = attempt.events.iter().filter_map(|event| match event {
        TrainEvent::Step { metrics, .. } => Some(metrics),
        _ => None,
    });
    metrics.flatten().copied().filter(|(_, value)| !value.is_nan()).collect()
}

fn pixels(image: &Image) -> Vec<u8> {
    image::load_from_memory(&image.bytes).expect("a picture").to_rgb8().into_raw()
}
