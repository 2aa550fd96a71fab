//! The candle engine behind its trait: whole small trainings of the miniature, and images drawn with them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hypnos::engine::memory::{MemoryCheck, MemorySettings, Products, training_plan};
use hypnos::engine::{
    CandleEngine, DrawInput, Ending, Engine, EngineSettings, Flow, Image, ImageGenerator, Shown, TrainEvent,
    TrainInput,
};
use hypnos::job::{
    Evaluation, Fault, FaultCode, Format, JobId, Method, Phase, SampleSpec, TrainOptions, TrainSpec,
};
use hypnos::ml::bundle::{Bundle, Like, random};
use hypnos::ml::device::DeviceKind;
use hypnos::ml::image_io;
use hypnos::ml::precision::Precision;
use hypnos::report::{PhotoSize, Protocol, Report};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use uuid::Uuid;

use crate::provenance::{drawn_json, png_texts};

/// The job of every training here.
const JOB: JobId = JobId(Uuid::from_u128(7));

pub(crate) fn settings() -> EngineSettings {
    EngineSettings {
        bundle: PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/bundle"),
        device: "cpu".into(),
        precision: None,
        batch: 2,
        finetuned_bytes_max: 1 << 30,
        checkpointing: false,
        memory: None,
    }
}

fn engine() -> CandleEngine {
    CandleEngine::open(settings()).expect("an engine")
}

/// Three photos of one thing: a red square on grounds of their own.
fn photos() -> Vec<Vec<u8>> {
    let photo = |ground: [u8; 3]| {
        let inside = |i: usize| (24..72).contains(&(i % 96)) && (16..64).contains(&(i / 96));
        let pixels: Vec<u8> =
            (0..96 * 80).flat_map(|i| if inside(i) { [200, 30, 40] } else { ground }).collect();
        image_io::png(&pixels, (96, 80), &[]).expect("a PNG")
    };
    vec![photo([240, 240, 240]), photo([90, 140, 90]), photo([60, 70, 120])]
}

fn spec(steps: u32, class_images: u32) -> TrainSpec {
    let evaluation = Evaluation { enabled: false, images: 3, steps: 2, ..Evaluation::default() };
    let dreambooth = TrainOptions::of(Method::Dreambooth);
    let options = TrainOptions { steps, class_images, learning_rate: 1e-4, evaluation, ..dreambooth };
    TrainSpec::new("mug", options, 77).expect("a specification")
}

/// The bundle as it is downloaded: without `hypnos.json` and without what only this program has.
fn plain() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    crate::bundles::copy(&settings().bundle, dir.path());
    std::fs::remove_file(dir.path().join("hypnos.json")).expect("a file");
    for part in ["segmenter", "perceptual"] {
        std::fs::remove_dir_all(dir.path().join(part)).expect("a directory");
    }
    dir
}

#[test]
fn a_plain_directory_trains_with_defaults_as_far_as_its_parts_go() {
    let dir = plain();
    let bundle = dir.path().to_owned();
    let engine = CandleEngine::open(EngineSettings { bundle, ..settings() }).expect("an engine");
    let of = |method| TrainSpec::new("mug", TrainOptions::of(method), 77).expect("a specification");
    let card = &engine.model().card;
    let rare = card.rare_tokens.as_ref().expect("tokens");
    assert_eq!(rare[..3], ["sks", "ohwx", "olis"], "the vocabulary's own");
    assert!(rare.iter().all(|word| engine.model().words.split(' ').any(|other| other == word)));
    engine.check(&of(Method::Dreambooth), &photos()).expect("a rare token of the vocabulary");
    engine.check(&of(Method::TextualInversion), &photos()).expect("a rare token of the vocabulary");
    let fault = engine.check(&of(Method::Hypnos), &photos()).expect_err("no segmenter");
    assert_eq!(fault.code, FaultCode::Input);
    let wanted = "method: the model's segmenter/ is missing: no product is found in photos, so a training needs \
        views.enabled=false";
    assert_eq!(fault.message, wanted);
}

/// A training from its beginning.
fn input<'a>(
    spec: &'a TrainSpec,
    photos: &'a [Vec<u8>],
    class_images: Vec<Option<Vec<u8>>>,
    scratch: &'a Path,
) -> TrainInput<'a> {
    TrainInput { spec, job: Some(JOB), photos, class_images, resume: None, scratch, trace: None }
}

/// One attempt at a training, and what it left.
pub(crate) struct Attempt {
    result: Result<Ending, Fault>,
    pub(crate) events: Vec<TrainEvent>,
    scratch: TempDir,
}

impl Attempt {
    /// With a new engine, which has nothing from before.
    fn new(
        spec: &TrainSpec,
        class_images: Vec<Option<Vec<u8>>>,
        resume: Option<&Path>,
        flow: impl FnMut(&mut dyn ImageGenerator, &TrainEvent) -> Flow,
    ) -> Self {
        Self::on(engine(), spec, class_images, resume, flow)
    }

    pub(crate) fn on(
        mut engine: CandleEngine,
        spec: &TrainSpec,
        class_images: Vec<Option<Vec<u8>>>,
        resume: Option<&Path>,
        mut flow: impl FnMut(&mut dyn ImageGenerator, &TrainEvent) -> Flow,
    ) -> Self {
        let (photos, scratch) = (photos(), tempfile::tempdir().expect("a directory"));
        let mut events = Vec::new();
        let input = TrainInput { resume, ..input(spec, &photos, class_images, scratch.path()) };
        let result = engine.train(input, &mut |generator, event| {
            let flow = flow(generator, &event);
            events.push(event);
            flow
        });
        Self { result, events, scratch }
    }

    fn unbroken(spec: &TrainSpec) -> Self {
        Self::new(spec, Vec::new(), None, |_, _| Flow::Continue)
    }

    /// The weights' bytes, the report, the pictures.
    pub(crate) fn trained(&self) -> (Vec<u8>, &Report, &[Image]) {
        match &self.result {
            Ok(Ending::Trained(trained)) => {
                (std::fs::read(&trained.weights).expect("weights"), &trained.report, &trained.images)
            }
            other => panic!("not trained: {other:?}"),
        }
    }

    pub(crate) fn weights(&self) -> PathBuf {
        self.scratch.path().join("weights.safetensors")
    }

    pub(crate) fn paused(&self) -> Option<(u64, PathBuf)> {
        match &self.result {
            Ok(Ending::Paused(checkpoint)) => checkpoint.clone(),
            other => panic!("not paused: {other:?}"),
        }
    }

    pub(crate) fn fault(&self) -> &Fault {
        self.result.as_ref().expect_err("a fault")
    }

    fn class_images(&self) -> Vec<Option<Vec<u8>>> {
        let mut all = Vec::new();
        for event in &self.events {
            if let TrainEvent::ClassImage { index, png } = event {
                all.resize(all.len().max(index + 1), None);
                all[*index] = Some(png.clone());
            }
        }
        all
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.scratch.path()).expect("a directory");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }
}

fn is_at(event: &TrainEvent, wanted: (Phase, u64)) -> bool {
    matches!(event, TrainEvent::Progress(progress) if (progress.phase, progress.step) == wanted)
}

/// Answers `then` once, at the first event of that phase and step, and continues otherwise.
fn once(wanted: (Phase, u64), then: Flow) -> impl FnMut(&mut dyn ImageGenerator, &TrainEvent) -> Flow {
    let mut done = false;
    move |_, event| {
        if done || !is_at(event, wanted) {
            return Flow::Continue;
        }
        done = true;
        then
    }
}

/// Stands for the hash of a file, also of one that is gone: all that is asked of it is to tell files apart.
fn sha256(file: &Path) -> String {
    format!("{:x}", Sha256::digest(file.to_string_lossy().as_bytes()))
}

/// What a training with `weights` draws for a prompt.
pub(crate) fn draw(
    generator: &mut dyn ImageGenerator,
    train: &TrainSpec,
    weights: &Path,
    change: impl FnOnce(&mut SampleSpec),
) -> Result<Option<Vec<Image>>, Fault> {
    let spec = r#"{"prompts": ["a photo of {product}"], "steps": 3, "seed": 5}"#;
    let mut spec: SampleSpec = serde_json::from_str(spec).expect("a specification");
    change(&mut spec);
    let weights_sha256 = &sha256(weights);
    let input = DrawInput { spec: &spec, train, weights, weights_sha256, job: Some(JOB) };
    draw_all(generator, &input, &mut |_, _| Flow::Continue)
}

/// All pictures of a sample, batch by batch.
fn draw_all(
    generator: &mut dyn ImageGenerator,
    input: &DrawInput<'_>,
    watch: &mut dyn FnMut(u64, u64) -> Flow,
) -> Result<Option<Vec<Image>>, Fault> {
    let (n_pictures, mut drawn) = (input.spec.pictures().count(), Vec::new());
    while drawn.len() < n_pictures {
        let batch = drawn.len()..n_pictures.min(drawn.len() + generator.batch());
        match generator.draw(input, batch, watch)? {
            Some(pictures) => drawn.extend(pictures),
            None => return Ok(None),
        }
    }
    Ok(Some(drawn))
}

#[test]
fn a_training_paused_at_any_step_and_resumed_gives_the_same_bytes_as_an_unbroken_one() {
    let mut spec = spec(4, 2);
    spec.options.evaluation.enabled = true;
    let unbroken = Attempt::unbroken(&spec);
    let again = Attempt::unbroken(&spec);
    assert!(unbroken.trained() == again.trained(), "the same input gave another result");
    for (phase, step, wanted) in [(Phase::Training, 1, 1), (Phase::Training, 3, 3), (Phase::Drawing, 2, 4)] {
        let first = Attempt::new(&spec, Vec::new(), None, once((phase, step), Flow::Pause));
        let (done, file) = first.paused().expect("something to save");
        assert_eq!(done, wanted);
        let second = Attempt::new(&spec, first.class_images(), Some(&file), |_, _| Flow::Continue);
        assert!(second.trained() == unbroken.trained(), "paused at {phase} {step}: another result");
    }
}

#[test]
fn a_checkpoint_during_a_training_is_the_one_that_a_pause_would_write() {
    let spec = spec(3, 0);
    let kept = Attempt::new(&spec, Vec::new(), None, once((Phase::Training, 2), Flow::Checkpoint));
    let paused = Attempt::new(&spec, Vec::new(), None, once((Phase::Training, 2), Flow::Pause));
    let file = kept.events.iter().find_map(|event| match event {
        TrainEvent::Checkpoint { step: 2, file } => Some(file.clone()),
        _ => None,
    });
    let bytes = |file: PathBuf| std::fs::read(file).expect("a checkpoint");
    assert!(bytes(file.expect("reported")) == bytes(paused.paused().expect("saved").1));
    kept.trained();
}

#[test]
fn before_the_first_step_there_is_nothing_to_save() {
    let spec = spec(2, 1);
    for at in [(Phase::Preparing, 1), (Phase::ClassImages, 0), (Phase::Training, 0)] {
        let paused = Attempt::new(&spec, Vec::new(), None, once(at, Flow::Pause));
        assert_eq!(paused.paused(), None);
        assert!(paused.files().is_empty());
    }
    let asked = Attempt::new(&spec, Vec::new(), None, once((Phase::Training, 0), Flow::Checkpoint));
    assert!(!asked.events.iter().any(|event| matches!(event, TrainEvent::Checkpoint { .. })));
    asked.trained();
}

#[test]
fn a_training_that_is_stopped_ends_within_a_step_and_writes_nothing() {
    let spec = spec(3, 0);
    let stopped = Attempt::new(&spec, Vec::new(), None, once((Phase::Training, 2), Flow::Stop));
    assert!(matches!(stopped.result, Ok(Ending::Stopped)));
    assert!(is_at(stopped.events.last().expect("an event"), (Phase::Training, 2)));
    assert!(stopped.files().is_empty());
}

#[test]
fn class_images_of_an_earlier_training_give_the_same_training_as_new_ones() {
    let spec = spec(2, 6);
    let drawn = Attempt::unbroken(&spec);
    let images = drawn.class_images();
    assert_eq!(images.iter().flatten().count(), 6);
    let found = Attempt::new(&spec, images.clone(), None, |_, _| Flow::Continue);
    assert_eq!(found.class_images(), []);
    assert!(found.trained() == drawn.trained());
    // A batch of which some were kept is drawn whole, so that the rest come out as they would have.
    let some = images.iter().enumerate().map(|(i, png)| png.clone().filter(|_| i != 1 && i != 5)).collect();
    let partly = Attempt::new(&spec, some, None, |_, _| Flow::Continue);
    let (redrawn, wanted) = (partly.class_images(), &images);
    assert!(redrawn[1] == wanted[1] && redrawn[5] == wanted[5] && redrawn.iter().flatten().count() == 2);
    assert!(partly.trained() == drawn.trained());
}

#[test]
fn trainings_with_the_same_settings_share_class_images() {
    let engine = engine();
    let of = |spec: &TrainSpec| engine.class_images(spec);
    let (small, large) = (of(&spec(1, 3)), of(&spec(9, 5)));
    assert_eq!((small.seeds.len(), &small.settings), (3, &large.settings));
    assert_eq!(small.seeds, large.seeds[..3]);
    assert_eq!(small.settings.len(), 64);
    let mut other = spec(1, 3);
    other.class_name = "chair".into();
    assert_ne!(of(&other).settings, small.settings);
    other.options.loss_weights.prior = 0.0;
    assert!(of(&other).seeds.is_empty(), "they would count nothing");
}

#[test]
fn drawing_between_the_steps_does_not_change_the_training() {
    let (earlier, mut spec) = (Attempt::unbroken(&spec(1, 0)), spec(4, 1));
    spec.options.evaluation.enabled = true;
    let alone = Attempt::unbroken(&spec);
    let mut served = Vec::new();
    let busy = Attempt::new(&spec, Vec::new(), None, |generator, event| {
        if matches!(event, TrainEvent::Shown { what: Shown::Preview(_), .. })
            || is_at(event, (Phase::Training, 1))
        {
            served.push(draw(generator, &earlier_spec(), &earlier.weights(), |_| ()).expect("pictures"));
        }
        Flow::Continue
    });
    assert!(served.len() >= 4, "{} samples were drawn on the way", served.len());
    assert!(served.windows(2).all(|pair| pair[0] == pair[1]), "the training changed a sample");
    assert!(busy.trained() == alone.trained());
}

fn earlier_spec() -> TrainSpec {
    spec(1, 0)
}

#[test]
fn a_training_reports_each_step_its_previews_and_its_inputs() {
    let mut spec = spec(8, 0);
    spec.options.evaluation.enabled = true;
    let attempt = Attempt::unbroken(&spec);
    let mut step_seen = 0;
    let mut last_phase = Phase::Preparing;
    for event in &attempt.events {
        let TrainEvent::Progress(progress) = event else { continue };
        let order = |phase| Phase::ALL.iter().position(|&one| one == phase);
        assert!(order(last_phase) <= order(progress.phase), "{} after {last_phase}", progress.phase);
        last_phase = progress.phase;
        if progress.phase == Phase::Training {
            assert!(progress.step <= step_seen + 1 && progress.total == 8);
            assert_eq!(progress.loss.is_some(), progress.step > 0);
            step_seen = progress.step;
        }
    }
    assert_eq!((step_seen, last_phase), (8, Phase::Evaluating));
    let previews = attempt.events.iter().filter_map(|event| match event {
        TrainEvent::Shown { what: Shown::Preview(_), picture } => Some(picture),
        _ => None,
    });
    let previews: Vec<&Image> = previews.collect();
    assert_eq!(previews.len(), 3);
    let (_, report, images) = attempt.trained();
    previews.into_iter().chain(images).for_each(assert_names_the_job);
    assert_eq!(images.len(), 3);
    assert!(images.iter().all(|image| image.prompt.contains("{product}") && image.format == Format::Png));
    assert_eq!(report.prompts.instance[0], "a photo of sks mug");
    assert_eq!(report.bundle.sha256, engine().model().card.sha256);
    assert_eq!(report.photos[0], PhotoSize { width: 96, height: 80 });
    assert_eq!(report.curve.step, (1..=8).collect::<Vec<u64>>());
    assert!(report.curve.loss[7].expect("a loss") > 0.0);
    let protocols: Vec<_> = report.images.iter().map(|image| image.protocol.expect("a protocol")).collect();
    assert_eq!(protocols, [Protocol::PromptInvariant, Protocol::PromptInvariant, Protocol::PromptVarying]);
    let varying = report.evaluation.as_ref().and_then(|scores| scores.prompt_varying.as_ref());
    assert!(varying.is_some_and(|scores| scores.ssim.value.is_some()), "{report:#?}");
    assert!(report.warnings[0].contains("no class images"));
}

#[test]
fn a_trained_model_draws_its_product_in_every_format_and_in_every_engine() {
    let (spec, base) = (spec(4, 0), spec(1, 0));
    let (attempt, untrained) = (Attempt::unbroken(&spec), Attempt::unbroken(&base));
    let weights = attempt.weights();
    let mut engine = engine();
    let draw_as = |engine: &mut CandleEngine, weights: &Path, format, width| {
        let drawn = draw(engine, &spec, weights, |spec| {
            (spec.format, spec.width) = (format, width);
        });
        drawn.expect("no fault").expect("nobody stopped it").remove(0)
    };
    for (format, kind) in [
        (Format::Png, image::ImageFormat::Png),
        (Format::Jpeg, image::ImageFormat::Jpeg),
        (Format::Webp, image::ImageFormat::WebP),
    ] {
        let drawn = draw_as(&mut engine, &weights, format, Some(72));
        let decoded = image::load_from_memory_with_format(&drawn.bytes, kind).expect("a picture");
        assert_eq!((decoded.width(), decoded.height()), (72, 64));
        assert_eq!((drawn.width, drawn.height, drawn.seed), (72, 64, 5));
        assert_eq!(drawn.prompt, "a photo of {product}");
        let said = drawn_json(&drawn.bytes, format);
        assert_eq!(said["prompt"], "a photo of sks mug");
        assert_eq!(
            (&said["job"], &said["weights_sha256"]),
            (&JOB.to_string().into(), &sha256(&weights).into())
        );
    }
    let here = draw_as(&mut engine, &weights, Format::Png, None);
    assert_eq!(here, draw_as(&mut self::engine(), &weights, Format::Png, None));
    let other = draw_as(&mut engine, &untrained.weights(), Format::Png, None);
    assert_ne!(here.bytes, other.bytes);
    let (here, other) = (png_texts(&here.bytes), png_texts(&other.bytes));
    for keyword in ["parameters", "hypnos", "XML:com.adobe.xmp"] {
        assert_ne!(here[keyword], other[keyword], "two products of one base model");
    }
    let last = format!("Model hash: {}, Model: miniature-{JOB}", &sha256(&weights)[..10]);
    assert!(here["parameters"].ends_with(&last), "{here:?}");
}

/// What the picture of a training says: its job, and no hash of weights that have no file yet.
fn assert_names_the_job(picture: &Image) {
    let said: Value = serde_json::from_str(&png_texts(&picture.bytes)["hypnos"]).expect("JSON");
    assert_eq!((&said["job"], said.get("weights_sha256")), (&JOB.to_string().into(), None));
    let parameters = &png_texts(&picture.bytes)["parameters"];
    assert!(parameters.contains(&format!("-{JOB}")) && !parameters.contains("Model hash"), "{parameters}");
}

#[test]
fn a_sample_s_images_come_in_order_and_are_the_same_alone_and_in_a_batch() {
    let attempt = Attempt::unbroken(&spec(1, 0));
    let mut engine = engine();
    let mut draw = |prompts: &[&str], n, seed| {
        let drawn = draw(&mut engine, &earlier_spec(), &attempt.weights(), |spec| {
            spec.prompts = prompts.iter().map(ToString::to_string).collect();
            (spec.n, spec.seed) = (n, Some(seed));
        });
        drawn.expect("no fault").expect("nobody stopped it")
    };
    let all = draw(&["a photo of {product}", "a painting of {product}"], 2, 40);
    let said: Vec<_> = all.iter().map(|drawn| (drawn.prompt.as_str(), drawn.seed)).collect();
    let (photo, painting) = ("a photo of {product}", "a painting of {product}");
    assert_eq!(said, [(photo, 40), (photo, 41), (painting, 42), (painting, 43)]);
    let pixels =
        |drawn: &Image| image::load_from_memory(&drawn.bytes).expect("a picture").into_rgb8().into_raw();
    let (alone, together) = (pixels(&draw(&[painting], 1, 43)[0]), pixels(&all[3]));
    assert!(alone.iter().zip(&together).all(|(a, b)| a.abs_diff(*b) <= 1));
    assert_ne!(pixels(&all[2]), together);
}

#[test]
fn a_sample_reports_its_steps_and_can_be_stopped() {
    let attempt = Attempt::unbroken(&spec(1, 0));
    let spec = r#"{"prompts": ["{product}"], "steps": 4, "seed": 5, "n": 3}"#;
    let spec: SampleSpec = serde_json::from_str(spec).expect("a specification");
    let (train, weights) = (earlier_spec(), attempt.weights());
    let input = DrawInput { spec: &spec, train: &train, weights: &weights, weights_sha256: "one", job: None };
    let mut seen = Vec::new();
    let mut engine = engine();
    let drawn = draw_all(&mut engine, &input, &mut |done, total| {
        assert_eq!(total, 4, "steps of one batch");
        seen.push(done);
        Flow::Continue
    });
    assert_eq!(drawn.expect("no fault").expect("nobody stopped it").len(), 3);
    let (first, second) = seen.split_at(seen.iter().rposition(|step| *step == 1).expect("a first step"));
    assert!([first, second].iter().all(|steps| steps.is_sorted() && steps.first() == Some(&1)), "{seen:?}");
    let mut n_calls = 0;
    let stopped = engine.draw(&input, 0..2, &mut |_, _| {
        n_calls += 1;
        Flow::Stop
    });
    assert_eq!((stopped.expect("no fault"), n_calls), (None, 1));
}

#[test]
fn loaded_models_are_cached_within_the_memory_limit() {
    let (one, other) = (Attempt::unbroken(&spec(1, 0)), Attempt::unbroken(&spec(2, 0)));
    for (bytes_max, stays) in [(1 << 30, true), (0, false)] {
        let mut engine = CandleEngine::open(EngineSettings { finetuned_bytes_max: bytes_max, ..settings() })
            .expect("an engine");
        let copy = one.scratch.path().join("copy");
        std::fs::copy(one.weights(), &copy).expect("a copy");
        draw(&mut engine, &earlier_spec(), &copy, |_| ()).expect("pictures");
        draw(&mut engine, &earlier_spec(), &other.weights(), |_| ()).expect("pictures");
        std::fs::remove_file(&copy).expect("it was there");
        let again = draw(&mut engine, &earlier_spec(), &copy, |_| ());
        assert_eq!(again.is_ok(), stays);
        if let Err(fault) = again {
            assert_eq!(fault.code, FaultCode::ArtifactMissing);
            assert!(!fault.message.contains(&copy.display().to_string()), "{fault}");
        }
    }
}

#[test]
fn a_huge_learning_rate_ends_as_diverged_and_leaves_no_file() {
    let mut spec = spec(5, 0);
    spec.options.learning_rate = 1e30;
    let attempt = Attempt::unbroken(&spec);
    let fault = attempt.fault();
    assert_eq!((fault.code, fault.retryable), (FaultCode::Diverged, false));
    assert!(fault.message.contains("at step 2"), "{fault}");
    assert!(attempt.files().is_empty());
}

#[test]
fn an_invalid_specification_is_refused_in_one_line_before_anything_is_computed() {
    let refused = |change: fn(&mut TrainSpec), wanted: &str| {
        let mut spec = spec(1, 0);
        change(&mut spec);
        let attempt = Attempt::unbroken(&spec);
        let fault = attempt.fault();
        assert_eq!(fault.code, FaultCode::Input);
        assert!(fault.message.contains(wanted) && !fault.message.contains('\n'), "{fault}");
        assert!(attempt.events.is_empty());
    };
    refused(|spec| spec.options.instance_token = Some("unbelievable9".into()), "wanted one token");
    refused(|spec| spec.options.evaluation.steps = 4000, "steps: wanted 1 to 1000, got 4000");
    let attempt = Attempt::unbroken(&spec(1, 0));
    let odd = draw(&mut engine(), &earlier_spec(), &attempt.weights(), |spec| spec.width = Some(66));
    let fault = odd.expect_err("refused");
    assert_eq!(fault.code, FaultCode::Input);
    assert_eq!(fault.message, "width: wanted a multiple of 4 above zero, got 66");
}

#[test]
fn weights_and_checkpoints_of_another_bundle_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = dir.path().join("bundle");
    random(Like::Miniature, 3, candle_core::DType::F32, &bundle, &mut |_, _| ()).expect("a bundle");
    let mut stranger = CandleEngine::open(EngineSettings { bundle, ..settings() }).expect("an engine");
    let spec = spec(2, 0);
    let trained = Attempt::unbroken(&spec);
    let paused = Attempt::new(&spec, Vec::new(), None, once((Phase::Training, 1), Flow::Pause));
    let checkpoint = paused.paused().expect("a checkpoint").1;
    let drawn = draw(&mut stranger, &spec, &trained.weights(), |_| ()).expect_err("refused");
    let (photos, scratch) = (photos(), dir.path().join("scratch"));
    let input = TrainInput { resume: Some(&checkpoint), ..input(&spec, &photos, Vec::new(), &scratch) };
    let resumed = stranger.train(input, &mut |_, _| Flow::Continue).expect_err("refused");
    for (fault, what) in [(drawn, "the weights"), (resumed, "the checkpoint")] {
        assert_eq!(fault.code, FaultCode::ArtifactMissing);
        let wanted = format!("{what}: was trained from another bundle");
        assert!(fault.message.starts_with(&wanted), "{fault}");
    }
}

#[test]
fn a_photo_that_cannot_be_decoded_is_a_fault_of_the_input() {
    let spec = spec(1, 0);
    let scratch = tempfile::tempdir().expect("a directory");
    let photos = [photos().remove(0), b"not a picture".to_vec()];
    let input = input(&spec, &photos, Vec::new(), scratch.path());
    let fault = engine().train(input, &mut |_, _| Flow::Continue).expect_err("refused");
    assert_eq!(fault.code, FaultCode::Input);
    assert!(fault.message.starts_with("photo 2: "), "{fault}");
}

static OBTAINABLE: AtomicU64 = AtomicU64::new(0);
static CAPACITY: AtomicU64 = AtomicU64::new(0);

#[allow(clippy::unnecessary_wraps)] // as the setting wants it
fn obtainable() -> Option<u64> {
    Some(OBTAINABLE.load(Ordering::Relaxed))
}

#[allow(clippy::unnecessary_wraps)] // as the setting wants it
fn capacity() -> Option<u64> {
    Some(CAPACITY.load(Ordering::Relaxed))
}

#[test]
fn a_training_that_is_counted_not_to_fit_is_refused_before_it_begins() {
    let gpu = std::sync::Arc::default();
    let memory = MemoryCheck { obtainable, capacity, gpu, sharers: 1, products: Products::BesideTrainings };
    let open = || CandleEngine::open(EngineSettings { memory: Some(memory.clone()), ..settings() });
    let bundle = Bundle::open(&settings().bundle).expect("a bundle");
    let spec = spec(2, 2);
    let limits = MemorySettings {
        batch: 2,
        checkpointing: false,
        precision: Precision::F32,
        products: Products::BesideTrainings,
        photos: (3, 96 * 80),
    };
    let plan = training_plan(&bundle, &spec.options, &limits, DeviceKind::Cpu).expect("a plan");
    let wanted = plan.peak(DeviceKind::Cpu).bytes;

    OBTAINABLE.store(8 << 20, Ordering::Relaxed);
    let refusal = open().err().expect("nothing fits").to_string();
    assert!(refusal.starts_with("a sample (1 at once, 64 x 64 pixels): wanted "), "{refusal}");
    assert!(
        refusal.contains("free 0.0 GiB") && refusal.ends_with("--ignore-memory starts anyway"),
        "{refusal}"
    );

    OBTAINABLE.store(wanted, Ordering::Relaxed);
    CAPACITY.store(wanted - 1, Ordering::Relaxed);
    let (mut engine, scratch) = (open().expect("an engine"), tempfile::tempdir().expect("a directory"));
    let mut train = |bytes: u64| {
        OBTAINABLE.store(bytes, Ordering::Relaxed);
        let photos = photos();
        let input = input(&spec, &photos, vec![None; 2], scratch.path());
        engine.train(input, &mut |_, _| Flow::Stop)
    };
    let fault = train(wanted - 1).expect_err("it does not fit");
    assert_eq!(fault.code, FaultCode::Input);
    assert!(
        fault.message.starts_with("a training (dreambooth, 64 x 64 pixels): wanted "),
        "{}",
        fault.message
    );
    assert!(fault.message.contains("--gradient-checkpointing"), "{}", fault.message);
    assert!(matches!(train(wanted), Ok(Ending::Stopped)), "it fits, and stops when it is told to");

    CAPACITY.store(wanted, Ordering::Relaxed);
    let fault = train(wanted - 1).expect_err("it does not fit now");
    assert_eq!((fault.code, fault.retryable), (FaultCode::Machine, true), "an idle machine has room for it");

    // The photos that there are count before it begins, not the most that there may be.
    OBTAINABLE.store(wanted, Ordering::Relaxed);
    engine.check(&spec, &photos()).expect("three small photos fit");
    let all = vec![photos().remove(0); 5];
    let fault = engine.check(&spec, &all).expect_err("five do not");
    assert!(fault.message.contains(": wanted "), "{}", fault.message);
}

#[test]
fn an_engine_whose_own_models_were_let_go_for_a_training_reads_them_again() {
    let (mut engine, spec, photos) = (engine(), spec(2, 2), photos());
    let mut trained = || {
        let (scratch, mut drawn) = (tempfile::tempdir().expect("a directory"), Vec::new());
        let input = input(&spec, &photos, vec![None; 2], scratch.path());
        let ending = engine.train(input, &mut |_, event| {
            if let TrainEvent::ClassImage { png, .. } = event {
                drawn.push(png);
            }
            Flow::Continue
        });
        let Ok(Ending::Trained(trained)) = ending else { panic!("{ending:?}") };
        (drawn, std::fs::read(trained.weights).expect("weights"))
    };
    let (first, second) = (trained(), trained());
    assert_eq!(first.0.len(), 2);
    assert!(first == second, "class images and weights are the same");
}
