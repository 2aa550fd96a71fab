//! An engine that computes nothing but keeps every promise of a real one: its result depends on the job's seed and on
//! every step taken in order, its checkpoints are good to go on from, and it hears the watch between two steps.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hypnos::engine::{
    Artist, Beat, ClassImages, DrawInput, Drawn, Ending, Engine, Flow, Shown, TrainInput, Trained, Watch,
};
use hypnos::job::{Fault, FaultCode, Format, Phase, Progress, TrainSpec};
use hypnos::report::Gallery;
use hypnos::worker::MakeEngine;
use serde_json::json;
use sha2::{Digest, Sha256};

/// What an engine did, in order; shared by all that were made from one script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Did {
    /// Drew a class image.
    ClassImage(u64),
    /// Took a step of the training of this class name.
    Step(String, u64),
    /// Drew the pictures of a sample, while a training was under way or not.
    Draw { during_training: bool },
}

/// How the engines of a test go about it.
#[derive(Clone, Debug)]
pub(super) struct Script {
    pub(super) step: Duration,
    /// The kind of device: each draws one picture in bytes of its own.
    pub(super) device: &'static str,
    pub(super) did: Arc<Mutex<Vec<Did>>>,
}

impl Script {
    /// Engines whose steps take this long.
    pub(super) fn new(step: Duration) -> Self {
        Self { step, device: "", did: Arc::default() }
    }

    /// Makes engines that follow it. What they do on purpose to trainings of some class names:
    /// `diverges`, `panics`, `machine` (a fault of the machine, every time) and `input`.
    pub(super) fn engine(&self) -> MakeEngine {
        let script = self.clone();
        Box::new(move || Ok(Box::new(Scripted { script: script.clone(), training: false })))
    }

    pub(super) fn steps(&self, class_name: &str) -> Vec<u64> {
        let did = self.did.lock().unwrap();
        let steps = did.iter().filter_map(|did| match did {
            Did::Step(name, step) if name == class_name => Some(*step),
            _ => None,
        });
        steps.collect()
    }

    fn did(&self, what: Did) {
        self.did.lock().unwrap().push(what);
    }
}

struct Scripted {
    script: Script,
    training: bool,
}

/// State after a step: a chain, so that no step can be left out, doubled or taken out of order without it showing.
fn next(state: [u8; 32], seed: u64, step: u64) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(state);
    hash.update(seed.to_le_bytes());
    hash.update(step.to_le_bytes());
    hash.finalize().into()
}

/// The weights that a training of `steps` steps must end with.
pub(super) fn expected_weights(seed: u64, steps: u64) -> Vec<u8> {
    (0..steps).fold([0; 32], |state, step| next(state, seed, step)).to_vec()
}

/// A picture of its own for every prompt and seed: a colour.
fn picture(prompt: &str, seed: u64, format: Format) -> Drawn {
    let hash = Sha256::digest(format!("{prompt} from seed {seed}"));
    let pixels = image::RgbImage::from_pixel(64, 64, image::Rgb([hash[0], hash[1], hash[2]]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    let written = match format {
        Format::Png => image::ImageFormat::Png,
        Format::Jpeg => image::ImageFormat::Jpeg,
        Format::Webp => image::ImageFormat::WebP,
    };
    pixels.write_to(&mut bytes, written).unwrap();
    Drawn { bytes: bytes.into_inner(), format, width: 64, height: 64, prompt: prompt.into(), seed }
}

impl Artist for Scripted {
    fn draw(
        &mut self,
        input: &DrawInput<'_>,
        watch: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Drawn>>, Fault> {
        let weights = std::fs::read(input.weights).expect("the worker fetched the weights");
        assert_eq!(weights.len(), 32, "whole");
        for step in 1..=u64::from(input.spec.steps) {
            std::thread::sleep(self.script.step);
            if watch(step, u64::from(input.spec.steps)) != Flow::Continue {
                return Ok(None);
            }
        }
        self.script.did(Did::Draw { during_training: self.training });
        Ok(Some(
            input.spec.pictures().map(|(prompt, seed)| picture(prompt, seed, input.spec.format)).collect(),
        ))
    }
}

impl Engine for Scripted {
    fn bundle(&self) -> &'static str {
        "5c21b7ed"
    }

    fn class_images(&self, spec: &TrainSpec) -> ClassImages {
        let seeds = (0..u64::from(spec.options.class_images)).collect();
        ClassImages { settings: format!("{:x}", Sha256::digest(&spec.class_name)), seeds }
    }

    fn train(&mut self, input: TrainInput<'_>, watch: &mut Watch<'_>) -> Result<Ending, Fault> {
        self.training = true;
        let ending = train(self, input, watch);
        self.training = false;
        ending
    }
}

fn train(engine: &mut Scripted, input: TrainInput<'_>, watch: &mut Watch<'_>) -> Result<Ending, Fault> {
    assert!(input.photos.len() >= 3, "the worker fetched the photos");
    let (spec, script) = (input.spec, engine.script.clone());
    for (seed, had) in input.class_images.iter().enumerate() {
        if had.is_none() {
            std::thread::sleep(script.step);
            script.did(Did::ClassImage(seed as u64));
            let png = picture(&format!("class{}", script.device), seed as u64, Format::Png).bytes;
            if watch(engine, Beat::ClassImage { index: seed, png }) != Flow::Continue {
                return Ok(Ending::Stopped);
            }
        }
    }
    let (mut step, mut state) = match input.resume {
        Some(file) => {
            let bytes = std::fs::read(file).expect("the worker fetched the checkpoint");
            let (step, state) = bytes.split_first_chunk().expect("a step");
            (u64::from_le_bytes(*step), state.try_into().expect("a state"))
        }
        None => (0, [0; 32]),
    };
    let save = |step: u64, state: [u8; 32]| -> PathBuf {
        let file = input.scratch.join(format!("checkpoint-{step}"));
        std::fs::write(&file, [&step.to_le_bytes()[..], &state].concat()).expect("scratch is there");
        file
    };
    let total = u64::from(spec.options.steps);
    while step < total {
        std::thread::sleep(script.step);
        match spec.class_name.as_str() {
            "panics" if step == 3 => panic!("as the script says"),
            "diverges" if step == 3 => {
                return Err(Fault::new(FaultCode::Diverged, "the loss is NaN at step 3"));
            }
            "machine" if step == 3 => return Err(Fault::new(FaultCode::Machine, "out of memory")),
            "input" if step == 3 => return Err(Fault::new(FaultCode::Input, "no product can be seen")),
            _ => {}
        }
        state = next(state, spec.seed, step);
        script.did(Did::Step(spec.class_name.clone(), step));
        step += 1;
        let progress =
            Progress { step, loss: Some(1.0 / step as f64), ..Progress::begin(Phase::Training, total) };
        match watch(engine, Beat::Progress(progress)) {
            Flow::Continue => {}
            Flow::Checkpoint => {
                watch(engine, Beat::Checkpoint { step, file: save(step, state) });
            }
            Flow::Pause => return Ok(Ending::Paused(Some((step, save(step, state))))),
            Flow::Stop => return Ok(Ending::Stopped),
        }
        if step == total / 2 {
            let picture = picture("a preview", spec.seed, Format::Png);
            watch(engine, Beat::Shown { what: Shown::Preview(step), picture });
        }
    }
    let weights = input.scratch.join("weights");
    std::fs::write(&weights, state).expect("scratch is there");
    let images = vec![picture("a photo of {product}", spec.seed, Format::Png)];
    let (report, gallery) = (json!({ "steps": total, "class_name": spec.class_name }), Gallery::default());
    Ok(Ending::Trained(Trained { weights, last: None, images, report, gallery }))
}
