//! An engine that computes nothing but keeps every guarantee of a real one: its result depends on the job's seed and on
//! every step taken in order, its checkpoints can be resumed, and it calls the observer between two steps.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use hypnos::engine::{
    ClassImages, DrawInput, Ending, Engine, Flow, Image, ImageGenerator, Observer, Shown, TrainEvent,
    TrainInput, Trained,
};
use hypnos::job::{
    Fault, FaultCode, Format, HeldModel, ModelCard, ModelDrawing, ModelPart, Phase, Progress, Scheduler,
    TrainSpec,
};
use hypnos::report::{Gallery, Report};
use hypnos::worker::{Clock, MakeEngine};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A model with every part, whose vocabulary is of a few words.
fn scripted_model(name: &str, sha256: &str) -> HeldModel {
    let card = ModelCard {
        name: name.into(),
        sha256: sha256.into(),
        family: "scripted".into(),
        resolution: 64,
        parts: ModelPart::ALL.to_vec(),
        drawing: ModelDrawing { scheduler: Scheduler::Ddim, guidance: 7.5 },
        training: BTreeMap::new(),
        classes: None,
        rare_tokens: Some(["sks", "zwx"].map(str::to_owned).to_vec()),
    };
    HeldModel { card, words: "mug sks teapot zwx".into(), memory_bytes: None }
}

/// What an engine did, in order; shared by all that were made from one script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Did {
    /// Drew a class image.
    ClassImage(u64),
    /// Took a step of the training of this class name, for the job of this id.
    Step(String, u64, String),
    /// Drew a batch of pictures of a sample that began with this prompt, while a training was under way or not.
    Draw { prompt: String, during_training: bool },
}

/// What the engines of a test do, and how fast.
#[derive(Clone)]
pub(super) struct Script {
    /// What a step of a training or of a sampler waits for here.
    pause: Arc<dyn Fn() + Send + Sync>,
    /// The kind of device: each draws one picture in bytes of its own.
    pub(super) device: &'static str,
    /// The model that it says it holds.
    model: HeldModel,
    /// How long it takes by the device's own clock, which nothing else moves.
    pub(super) device_step: Duration,
    /// Pictures drawn at once.
    pub(super) batch: usize,
    pub(super) did: Arc<Mutex<Vec<Did>>>,
    /// When it did so, by the device's clock.
    when: Arc<Mutex<Vec<Duration>>>,
    now: Arc<Mutex<Duration>>,
    /// Whether the device is lost: no engine can be made, and none that there is computes anything.
    lost: Arc<Mutex<bool>>,
    held: Arc<(Mutex<Draws>, Condvar)>,
}

/// Whether draws may begin.
#[derive(Debug, Default)]
struct Draws {
    are_held: bool,
    /// One has come to its beginning and waits.
    waits: bool,
}

impl Script {
    /// Engines whose steps take this long.
    pub(super) fn new(step: Duration) -> Self {
        let pause = move || std::thread::sleep(step);
        Self {
            pause: Arc::new(pause),
            device: "",
            model: scripted_model("scripted", "5c21b7ed"),
            device_step: step,
            batch: 64,
            did: Arc::default(),
            when: Arc::default(),
            now: Arc::default(),
            lost: Arc::default(),
            held: Arc::default(),
        }
    }

    /// The same, but each step waits until `pause` returns.
    pub(super) fn paced(self, pause: impl Fn() + Send + Sync + 'static) -> Self {
        Self { pause: Arc::new(pause), ..self }
    }

    /// The same, drawing so many pictures at once.
    pub(super) fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    /// The same, on another kind of device.
    pub(super) fn on(self, device: &'static str) -> Self {
        Self { device, ..self }
    }

    /// The same, holding another model: its hash is its name.
    pub(super) fn holding(self, name: &str) -> Self {
        Self { model: scripted_model(name, name), ..self }
    }

    /// The same, with training options that suit its model.
    pub(super) fn suited(mut self, method: &str, options: Value) -> Self {
        self.model.card.training.insert(method.into(), options);
        self
    }

    /// The same, with a model of these optional parts only.
    pub(super) fn parts(mut self, parts: &[ModelPart]) -> Self {
        self.model.card.parts = parts.to_vec();
        self
    }

    /// The same, with steps that take so long by the device's clock.
    pub(super) fn device_step(self, device_step: Duration) -> Self {
        Self { device_step, ..self }
    }

    /// Makes engines that follow it. What they do on purpose to trainings of some class names: `diverges`, `panics`,
    /// `machine` (a fault of the machine, every time), `input`, `loses` (the device is lost, and stays so) and `breaks`
    /// (the same with a panic).
    pub(super) fn engine(&self) -> MakeEngine {
        let script = self.clone();
        Box::new(move || {
            script.is_well()?;
            Ok(Box::new(Scripted { script: script.clone(), training: false }))
        })
    }

    /// The device's own clock.
    pub(super) fn clock(&self) -> Clock {
        let now = self.now.clone();
        Clock::new(move || *now.lock().unwrap())
    }

    /// Makes the device lost, or available again.
    pub(super) fn lose_device(&self, lost: bool) {
        *self.lost.lock().unwrap() = lost;
    }

    /// From now on a draw waits before it reads the weights.
    pub(super) fn hold_draws(&self) {
        self.held.0.lock().unwrap().are_held = true;
    }

    /// Whether a draw waits.
    pub(super) fn is_drawing(&self) -> bool {
        self.held.0.lock().unwrap().waits
    }

    pub(super) fn let_draw(&self) {
        self.held.0.lock().unwrap().are_held = false;
        self.held.1.notify_all();
    }

    fn wait_to_draw(&self) {
        let mut draws = self.held.0.lock().unwrap();
        draws.waits = true;
        let mut draws = self.held.1.wait_while(draws, |draws| draws.are_held).unwrap();
        draws.waits = false;
    }

    /// What was done, each with when by the device's clock.
    pub(super) fn history(&self) -> Vec<(Duration, Did)> {
        let (when, did) = (self.when.lock().unwrap(), self.did.lock().unwrap());
        when.iter().copied().zip(did.iter().cloned()).collect()
    }

    /// Batches that were drawn of samples whose prompt begins so.
    pub(super) fn draws(&self, begins: &str) -> usize {
        let did = self.did.lock().unwrap();
        did.iter().filter(|did| matches!(did, Did::Draw { prompt, .. } if prompt.starts_with(begins))).count()
    }

    fn is_well(&self) -> Result<(), Fault> {
        let lost = || Fault::device_lost("an illegal memory access was encountered");
        if *self.lost.lock().unwrap() { Err(lost()) } else { Ok(()) }
    }

    /// One step of anything.
    fn takes_a_step(&self) -> Result<(), Fault> {
        (self.pause)();
        *self.now.lock().unwrap() += self.device_step;
        self.is_well()
    }

    pub(super) fn steps(&self, class_name: &str) -> Vec<u64> {
        let did = self.did.lock().unwrap();
        let steps = did.iter().filter_map(|did| match did {
            Did::Step(name, step, _) if name == class_name => Some(*step),
            _ => None,
        });
        steps.collect()
    }

    fn did(&self, what: Did) {
        let mut when = self.when.lock().unwrap();
        when.push(*self.now.lock().unwrap());
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
fn picture(prompt: &str, seed: u64, format: Format) -> Image {
    let hash = Sha256::digest(format!("{prompt} from seed {seed}"));
    let pixels = image::RgbImage::from_pixel(64, 64, image::Rgb([hash[0], hash[1], hash[2]]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    let written = match format {
        Format::Png => image::ImageFormat::Png,
        Format::Jpeg => image::ImageFormat::Jpeg,
        Format::Webp => image::ImageFormat::WebP,
    };
    pixels.write_to(&mut bytes, written).unwrap();
    Image { bytes: bytes.into_inner(), format, width: 64, height: 64, prompt: prompt.into(), seed }
}

impl ImageGenerator for Scripted {
    fn batch(&self) -> usize {
        self.script.batch
    }

    fn draw(
        &mut self,
        input: &DrawInput<'_>,
        pictures: Range<usize>,
        watch: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Image>>, Fault> {
        self.script.wait_to_draw();
        let missing = |_| Fault::new(FaultCode::ArtifactMissing, "the weights cannot be read");
        let weights = std::fs::read(input.weights).map_err(missing)?;
        assert_eq!(weights.len(), 32, "whole");
        assert!(!pictures.is_empty() && pictures.len() <= self.script.batch, "{pictures:?}");
        assert!(input.job.is_some(), "the worker names the training's job");
        let prompt = input.spec.prompts[0].clone();
        assert!(!prompt.starts_with("panics"), "as the script says");
        for step in 1..=u64::from(input.spec.steps) {
            self.script.takes_a_step()?;
            if watch(step, u64::from(input.spec.steps)) != Flow::Continue {
                return Ok(None);
            }
        }
        self.script.did(Did::Draw { prompt, during_training: self.training });
        let all = input.spec.pictures().skip(pictures.start).take(pictures.len());
        Ok(Some(all.map(|(prompt, seed)| picture(prompt, seed, input.spec.format)).collect()))
    }

    fn probe(&mut self) -> Result<(), Fault> {
        self.script.is_well()
    }
}

impl Engine for Scripted {
    fn model(&self) -> &HeldModel {
        &self.script.model
    }

    fn class_images(&self, spec: &TrainSpec) -> ClassImages {
        let seeds = (0..u64::from(spec.options.class_images)).collect();
        ClassImages { settings: format!("{:x}", Sha256::digest(&spec.class_name)), seeds }
    }

    fn train(&mut self, input: TrainInput<'_>, watch: &mut Observer<'_>) -> Result<Ending, Fault> {
        self.training = true;
        let ending = train(self, input, watch);
        self.training = false;
        ending
    }
}

fn train(engine: &mut Scripted, input: TrainInput<'_>, watch: &mut Observer<'_>) -> Result<Ending, Fault> {
    assert!(input.photos.len() >= 3, "the worker fetched the photos");
    let (spec, script) = (input.spec, engine.script.clone());
    for (seed, had) in input.class_images.iter().enumerate() {
        if had.is_none() {
            script.takes_a_step()?;
            script.did(Did::ClassImage(seed as u64));
            let png = picture(&format!("class{}", script.device), seed as u64, Format::Png).bytes;
            if watch(engine, TrainEvent::ClassImage { index: seed, png }) != Flow::Continue {
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
    let save = |step: u64, state: [u8; 32]| -> Result<PathBuf, Fault> {
        let file = input.scratch.join(format!("checkpoint-{step}"));
        let written = std::fs::write(&file, [&step.to_le_bytes()[..], &state].concat());
        written.map_err(|_| Fault::new(FaultCode::Machine, "the checkpoint cannot be written"))?;
        Ok(file)
    };
    let job = input.job.expect("the worker names the job").to_string();
    let total = u64::from(spec.options.steps);
    while step < total {
        script.takes_a_step()?;
        match spec.class_name.as_str() {
            "panics" if step == 3 => panic!("as the script says"),
            "breaks" if step == 3 => {
                script.lose_device(true);
                panic!("as the script says");
            }
            "diverges" if step == 3 => {
                return Err(Fault::new(FaultCode::Diverged, "the loss is NaN at step 3"));
            }
            "machine" if step == 3 => return Err(Fault::new(FaultCode::Machine, "out of memory")),
            "loses" if step == 3 => {
                script.lose_device(true);
                return script.is_well().map(|()| Ending::Stopped);
            }
            "input" if step == 3 => return Err(Fault::new(FaultCode::Input, "no product can be seen")),
            _ => {}
        }
        state = next(state, spec.seed, step);
        script.did(Did::Step(spec.class_name.clone(), step, job.clone()));
        step += 1;
        let progress =
            Progress { step, loss: Some(1.0 / step as f64), ..Progress::begin(Phase::Training, total) };
        match watch(engine, TrainEvent::Progress(progress)) {
            Flow::Continue => {}
            Flow::Checkpoint => {
                watch(engine, TrainEvent::Checkpoint { step, file: save(step, state)? });
            }
            Flow::Pause => return Ok(Ending::Paused(Some((step, save(step, state)?)))),
            Flow::Stop => return Ok(Ending::Stopped),
        }
        if step == total / 2 {
            let picture = picture("a preview", spec.seed, Format::Png);
            watch(engine, TrainEvent::Shown { what: Shown::Preview(step), picture });
        }
    }
    let weights = input.scratch.join("weights");
    std::fs::write(&weights, state).expect("scratch is there");
    let images = vec![picture("a photo of {product}", spec.seed, Format::Png)];
    let report = Report { steps: total, class_name: spec.class_name.clone(), ..Report::default() };
    let report = Box::new(report);
    Ok(Ending::Trained(Trained { weights, last: None, images, report, gallery: Gallery::default() }))
}
