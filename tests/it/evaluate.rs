//! Evaluation: scores computed from the metrics, trials during a training, and the commands `evaluate` and `compare`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device};
use hypnos::engine::{CandleEngine, Ending, Engine, EngineSettings, Flow, TrainEvent, TrainInput, Trained};
use hypnos::job::{Evaluation, Method, Phase, TrainOptions, TrainSpec};
use hypnos::ml::Interrupt;
use hypnos::ml::bundle::{Backbones, Bundle, Like, check, random, random_metrics};
use hypnos::ml::evaluate::{Evaluator, Generated, GeneratedSet};
use hypnos::ml::image_io;
use hypnos::ml::metrics;
use hypnos::report::{Protocol, Report};
use image::{Rgb, RgbImage};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A miniature of random weights, with what judges or without.
fn bundle(dir: &Path, with_metrics: bool) -> PathBuf {
    let out = dir.join("bundle");
    random(Like::Miniature, 3, DType::F32, &out, &mut |_, _| ()).expect("a bundle");
    if with_metrics {
        random_metrics(&out, 5).expect("networks");
    }
    out
}

/// A square of a colour that the seed decides, at a place that it decides, in front of a ground.
fn painted(seed: u32, ground: [u8; 3], size: (u32, u32)) -> RgbImage {
    let (left, top) = (4 + seed * 5 % 20, 4 + seed * 7 % 20);
    RgbImage::from_fn(size.0, size.1, |x, y| {
        let inside = (left..left + 28).contains(&x) && (top..top + 28).contains(&y);
        Rgb(if inside { [200, (seed * 37 % 256) as u8, 40] } else { ground })
    })
}

fn photos() -> Vec<RgbImage> {
    [[240, 240, 240], [90, 140, 90], [60, 70, 120]].map(|ground| painted(1, ground, (96, 80))).to_vec()
}

fn generated(seed: u32, prompt: &str) -> Generated {
    Generated { pixels: painted(seed, [10, 200, 30], (64, 64)), prompt: prompt.to_owned() }
}

/// An observer that never stops anything.
fn go_on() -> impl FnMut(usize, usize) -> Result<(), Interrupt<()>> {
    |_, _| Ok(())
}

/// A number of two pictures.
type Compare<'a> = &'a dyn Fn(&RgbImage, &RgbImage) -> hypnos::ml::Result<f64>;

fn near(a: Option<f64>, b: f64) {
    let a = a.expect("a value");
    assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{a}, wanted {b}");
}

#[test]
fn every_score_is_computed_from_the_metrics_values() {
    let dir = tempfile::tempdir().expect("a directory");
    let place = bundle(dir.path(), true);
    assert_eq!(check(&place).errors, []);
    let bundle = Bundle::open(&place).expect("a bundle");
    let nets = Backbones::load(&bundle, &Device::Cpu).expect("networks");
    let evaluator = Evaluator::new(&bundle, &Device::Cpu, photos()).expect("an evaluator");
    let invariant = [generated(1, "a photo of {product}"), generated(2, "a photo of {product}")];
    let varying = [generated(3, "{product} on a beach"), generated(4, "a drawing of {product}")];
    let class_images = [painted(8, [0, 0, 0], (64, 64))];
    let drawn = GeneratedSet {
        class_name: "mug",
        invariant: &invariant,
        varying: &varying,
        class_images: &class_images,
    };
    let mut calls = Vec::new();
    let found = evaluator.evaluate(&drawn, &mut |done, total| {
        calls.push((done, total));
        Ok::<_, Interrupt<()>>(())
    });
    let found = found.expect("numbers");
    let n = calls.len();
    assert!(calls.iter().enumerate().all(|(i, call)| *call == (i + 1, n)), "{calls:?}");

    let pixels = |all: &[Generated]| -> Vec<RgbImage> { all.iter().map(|one| one.pixels.clone()).collect() };
    let (dino, clip) = (&nets.dino.as_ref().expect("DINO").model, &nets.clip.as_ref().expect("CLIP").model);
    let (inception, lpips) =
        (&nets.inception.as_ref().expect("Inception").model, &nets.lpips.as_ref().expect("LPIPS").model);
    for (protocol, pictures, prompts) in [
        (&found.prompt_invariant, &invariant, ["a photo of mug", "a photo of mug"]),
        (&found.prompt_varying, &varying, ["mug on a beach", "a drawing of mug"]),
    ] {
        let protocol = protocol.as_ref().expect("a protocol");
        let (shown, real) = (pixels(pictures), photos());
        let see = |pictures: &[RgbImage]| dino.features(pictures).expect("features");
        near(protocol.dino.value, metrics::mean_pairwise_cosine(&see(&shown), &see(&real)).expect("a mean"));
        let see = |pictures: &[RgbImage]| clip.images(pictures).expect("features");
        near(
            protocol.clip_i.value,
            metrics::mean_pairwise_cosine(&see(&shown), &see(&real)).expect("a mean"),
        );
        let texts = clip.texts(&prompts).expect("features");
        near(protocol.clip_t.value, metrics::mean_paired_cosine(&see(&shown), &texts).expect("a mean"));
        let see = |pictures: &[RgbImage]| inception.features(pictures).expect("features");
        let (ours, theirs) = (see(&shown), see(&real));
        near(protocol.fid_64.value, metrics::frechet(&ours.pool64, &theirs.pool64).expect("a distance"));
        near(
            protocol.fid_2048.value,
            metrics::frechet(&ours.pool2048, &theirs.pool2048).expect("a distance"),
        );
        let pairs = || {
            shown
                .iter()
                .flat_map(|one| real.iter().map(move |photo| (one, image_io::center_square(photo, 64))))
        };
        let mean = |compare: Compare<'_>| {
            pairs().map(|(one, photo)| compare(one, &photo).expect("a number")).sum::<f64>() / 6.0
        };
        near(protocol.ssim.value, mean(&metrics::ssim));
        near(protocol.psnr.value, mean(&metrics::psnr));
        near(protocol.lpips.value, mean(&|a, b| lpips.distance(a, b)));
        assert_eq!([protocol.dino.n, protocol.clip_t.n, protocol.ssim.n, protocol.fid_64.n], [6, 2, 6, 2]);
        assert!(protocol.dino.note.as_deref().is_some_and(|note| note == "indicative: 2 pictures"));
        let note = protocol.fid_64.note.as_deref().expect("a word");
        assert!(note.starts_with("indicative: 2 pictures and 3 photos for "), "{note}");
        assert_eq!(protocol.dino.backbone.as_ref().map(|b| b.sha256.len()), Some(64));
    }
    let see = |pictures: &[RgbImage]| dino.features(pictures).expect("features");
    near(found.real.dino.value, metrics::mean_self_cosine(&see(&photos())).expect("a mean"));
    near(
        found.pres.value,
        metrics::mean_pairwise_cosine(&see(&class_images), &see(&photos())).expect("a mean"),
    );
    near(found.div.value, lpips.distance(&invariant[0].pixels, &invariant[1].pixels).expect("a distance"));
    assert_eq!((found.real.dino.n, found.pres.n, found.div.n, found.pictures.len()), (3, 3, 1, 4));
    let own: Vec<f64> = found.pictures[..2].iter().map(|one| one.dino.expect("a value")).collect();
    near(found.prompt_invariant.expect("a protocol").dino.value, f64::midpoint(own[0], own[1]));
}

#[test]
fn without_networks_only_pixels_are_compared_and_each_score_says_what_is_missing() {
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = Bundle::open(&bundle(dir.path(), false)).expect("a bundle");
    let evaluator = Evaluator::new(&bundle, &Device::Cpu, photos()).expect("an evaluator");
    assert!(!evaluator.can_score_trials() && !evaluator.can_score_class());
    let invariant = [generated(1, "a photo of {product}")];
    let drawn = GeneratedSet { class_name: "mug", invariant: &invariant, varying: &[], class_images: &[] };
    let found = json!(evaluator.evaluate(&drawn, &mut go_on()).expect("numbers"));
    let numbers = &found["prompt_invariant"];
    assert!(numbers["ssim"]["value"].is_number() && numbers["psnr"]["value"].is_number());
    for (metric, part) in [
        ("dino", "dino"),
        ("clip_i", "clip"),
        ("clip_t", "clip"),
        ("fid_64", "inception"),
        ("lpips", "lpips"),
    ] {
        assert_eq!(numbers[metric]["value"], Value::Null);
        assert_eq!(numbers[metric]["note"], format!("these models have no metrics/{part}"), "{metric}");
    }
    assert_eq!(found["prompt_varying"], Value::Null);
}

#[test]
fn an_image_equal_to_a_photo_has_no_psnr_and_otherwise_perfect_scores() {
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = Bundle::open(&bundle(dir.path(), true)).expect("a bundle");
    let photo = painted(1, [1, 2, 3], (64, 64));
    let evaluator = Evaluator::new(&bundle, &Device::Cpu, vec![photo.clone()]).expect("an evaluator");
    let invariant = [Generated { pixels: photo, prompt: "{product}".into() }];
    let drawn = GeneratedSet { class_name: "mug", invariant: &invariant, varying: &[], class_images: &[] };
    let found = evaluator.evaluate(&drawn, &mut go_on()).expect("numbers");
    let numbers = found.prompt_invariant.expect("a protocol");
    near(numbers.ssim.value, 1.0);
    near(numbers.dino.value, 1.0);
    assert!(numbers.lpips.value.expect("a value").abs() < 1e-6);
    assert_eq!(numbers.psnr.value, None);
    assert!(numbers.psnr.note.expect("a word").contains("infinite"));
    assert_eq!(numbers.fid_64.note.as_deref(), Some("needs 2 pictures and 2 photos at least"));
    assert_eq!(found.real.dino.note.as_deref(), Some("needs 2 photos at least"));
}

#[test]
fn an_evaluation_can_be_stopped_after_any_call() {
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = Bundle::open(&bundle(dir.path(), true)).expect("a bundle");
    let evaluator = Evaluator::new(&bundle, &Device::Cpu, photos()).expect("an evaluator");
    let invariant = [generated(1, "{product}"), generated(2, "{product}")];
    let drawn = GeneratedSet { class_name: "mug", invariant: &invariant, varying: &[], class_images: &[] };
    for stop in [1, 5, 13] {
        let mut n_calls = 0;
        let stopped = evaluator.evaluate(&drawn, &mut |done, _| {
            n_calls += 1;
            if done == stop { Err(Interrupt::Stopped(())) } else { Ok(()) }
        });
        assert!(matches!(stopped, Err(Interrupt::Stopped(()))), "{stopped:?}");
        assert_eq!(n_calls, stop);
    }
    assert!(Evaluator::new(&bundle, &Device::Cpu, Vec::new()).is_err());
}

/// A short training that is tried out twice and judged.
fn spec() -> TrainSpec {
    let evaluation = Evaluation {
        images: 3,
        steps: 2,
        class_images: 1,
        trials: Some(vec![2, 4]),
        trial_images: 2,
        ..Evaluation::default()
    };
    let dreambooth = TrainOptions::of(Method::Dreambooth);
    let options = TrainOptions {
        steps: 5,
        class_images: 0,
        learning_rate: 1e-3,
        previews: Some(Vec::new()),
        evaluation,
        ..dreambooth
    };
    TrainSpec::new("mug", options, 77).expect("a specification")
}

struct Attempt {
    ending: Ending,
    scratch: TempDir,
}

impl Attempt {
    fn new(bundle: &Path, resume: Option<&Path>, mut flow: impl FnMut(&TrainEvent) -> Flow) -> Self {
        let settings = EngineSettings {
            bundle: bundle.to_owned(),
            device: "cpu".into(),
            precision: None,
            batch: 2,
            finetuned_bytes_max: 0,
            checkpointing: false,
            memory: None,
        };
        let png = |photo: &RgbImage| image_io::png(photo.as_raw(), (96, 80), &[]).expect("a PNG");
        let (photos, scratch) =
            (photos().iter().map(png).collect::<Vec<_>>(), tempfile::tempdir().expect("a directory"));
        let spec = spec();
        let input = TrainInput {
            spec: &spec,
            job: None,
            photos: &photos,
            class_images: Vec::new(),
            resume,
            scratch: scratch.path(),
            trace: None,
        };
        let mut engine = CandleEngine::open(settings).expect("an engine");
        let ending = engine.train(input, &mut |_, event| flow(&event)).expect("no fault");
        Self { ending, scratch }
    }

    fn trained(&self) -> &Trained {
        let Ending::Trained(trained) = &self.ending else { panic!("not trained: {:?}", self.ending) };
        trained
    }

    fn file(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.scratch.path().join(name)).ok()
    }
}

#[test]
fn the_best_scored_step_is_served_also_after_a_pause_at_any_step() {
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = bundle(dir.path(), true);
    let unbroken = Attempt::new(&bundle, None, |_| Flow::Continue);
    let report = &unbroken.trained().report;
    let (mut best, mut score) = (0, -1.0);
    for trial in &report.trials {
        if trial.score >= score {
            (best, score) = (trial.step, trial.score);
        }
    }
    assert_eq!(report.trials.iter().map(|trial| trial.step).collect::<Vec<_>>(), [2, 4]);
    assert!(score > 0.0 && report.served_step == Some(best), "{report:#?}");
    assert_eq!(unbroken.trained().last, Some(unbroken.scratch.path().join("weights-last.safetensors")));
    assert_ne!(unbroken.file("weights.safetensors"), unbroken.file("weights-last.safetensors"));

    // Pauses within a trial, after both, while the result is drawn, and while it is judged.
    for (phase, step, nth) in [
        (Phase::Training, 2, 3),
        (Phase::Training, 3, 1),
        (Phase::Training, 4, 2),
        (Phase::Drawing, 2, 1),
        (Phase::Evaluating, 4, 1),
    ] {
        let mut n_seen = 0;
        let first = Attempt::new(&bundle, None, |event| match event {
            TrainEvent::Progress(at) if (at.phase, at.step) == (phase, step) => {
                n_seen += 1;
                if n_seen == nth { Flow::Pause } else { Flow::Continue }
            }
            _ => Flow::Continue,
        });
        let Ending::Paused(Some((_, checkpoint))) = &first.ending else { panic!("{:?}", first.ending) };
        let second = Attempt::new(&bundle, Some(checkpoint), |_| Flow::Continue);
        for name in ["weights.safetensors", "weights-last.safetensors"] {
            assert!(second.file(name) == unbroken.file(name), "{phase} {step}: other {name}");
        }
        let (ours, theirs) = (second.trained(), unbroken.trained());
        assert!(ours.images == theirs.images && ours.gallery == theirs.gallery, "{phase} {step}");
        assert_eq!(ours.report, theirs.report, "{phase} {step}");
    }
}

#[test]
fn a_training_is_evaluated_by_both_protocols_and_its_report_shows_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let attempt = Attempt::new(&bundle(dir.path(), true), None, |_| Flow::Continue);
    let Trained { report, images, gallery, .. } = attempt.trained();
    assert_eq!((images.len(), gallery.pictures.len(), gallery.photos.len()), (3, 3, 3));
    let protocols: Vec<_> = report.images.iter().map(|image| image.protocol.expect("a protocol")).collect();
    assert_eq!(protocols, [Protocol::PromptInvariant, Protocol::PromptInvariant, Protocol::PromptVarying]);
    assert_eq!(report.images[0].prompt, "a photo of sks mug");
    assert!(report.images[2].fidelity.is_some_and(|scores| scores.clip_t.is_some()), "{report:#?}");
    let scores = report.evaluation.as_ref().expect("an evaluation");
    for protocol in [Protocol::PromptInvariant, Protocol::PromptVarying] {
        let dino = &scores.protocol(protocol).expect("scores").dino;
        assert!(dino.value.is_some(), "{report:#?}");
    }
    assert!(scores.pres.value.is_some() && scores.real.dino.value.is_some());
    let page = hypnos::report::page(report, gallery);
    assert_eq!(page.matches("data:image/webp;base64,").count(), 3 + 3);
    assert!(page.contains("a photo of sks mug") && page.contains("Which step is served"));
}

#[test]
fn broken_metric_networks_cost_the_scores_and_not_the_training() {
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = bundle(dir.path(), true);
    std::fs::write(bundle.join("metrics/clip/config.json"), "{").expect("a file");
    let attempt = Attempt::new(&bundle, None, |_| Flow::Continue);
    let report = &attempt.trained().report;
    assert_eq!((&report.evaluation, report.served_step), (&None, Some(5)));
    assert_eq!(attempt.trained().images.len(), 3);
    let warnings = report.warnings.join("\n");
    assert!(warnings.contains("not evaluated: the models/metrics/clip/config.json"), "{warnings}");
    assert!(!warnings.contains(&bundle.display().to_string()), "{warnings}");
}

/// Photos or pictures as files.
fn written(dir: &Path, name: &str, pictures: &[RgbImage]) -> String {
    let dir = dir.join(name);
    std::fs::create_dir(&dir).expect("a directory");
    for (i, picture) in pictures.iter().enumerate() {
        let size = (picture.width() as usize, picture.height() as usize);
        image_io::save_png(&dir.join(format!("{i}.png")), picture.as_raw(), size, &[]).expect("a picture");
    }
    dir.to_str().expect("Unicode").to_owned()
}

fn hypnos(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hypnos")).args(args).output().expect("the program runs")
}

fn said(run: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&run.stdout), text(&run.stderr))
}

#[test]
fn the_evaluate_command_scores_images_of_any_origin() {
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = bundle(dir.path(), true);
    let bundle = bundle.to_str().expect("Unicode");
    let photos = written(dir.path(), "photos", &photos());
    // Pictures of different sizes, a JPEG among them.
    let pictures =
        written(dir.path(), "pictures", &[painted(1, [9, 9, 9], (64, 64)), painted(2, [9, 9, 9], (80, 48))]);
    let jpeg = image_io::jpeg(painted(3, [9, 9, 9], (72, 72)).as_raw(), (72, 72)).expect("a JPEG");
    std::fs::write(Path::new(&pictures).join("2.jpg"), jpeg).expect("a file");
    let prompts = dir.path().join("prompts.txt");
    std::fs::write(&prompts, "{product} on a beach\na photo of {product}\n\na photo of {product}\n")
        .expect("a file");
    let prompts = prompts.to_str().expect("Unicode");
    let args =
        ["evaluate", "--bundle", bundle, "--photos", &photos, "--generated", &pictures, "--prompts", prompts];
    let with = |more: &[&str]| hypnos(&[&args[..], more].concat());

    let run = with(&["--class-name", "mug", "--json"]);
    let (out, err) = said(&run);
    assert!(run.status.success(), "{err}");
    let found: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(found["prompt_invariant"]["n_pictures"], 2);
    assert_eq!(found["prompt_varying"]["n_pictures"], 1);
    let names: Vec<_> =
        found["pictures"].as_array().expect("pictures").iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["1.png", "2.jpg", "0.png"]);
    assert!(found["prompt_varying"]["lpips"]["value"].is_number());
    let (table, _) = said(&with(&["--class-name", "mug"]));
    let line = table.lines().find(|line| line.starts_with("| SSIM")).expect("a row");
    let ssim = found["prompt_invariant"]["ssim"]["value"].as_f64().expect("a number");
    assert!(line.contains(&format!("{ssim:.4}")), "{table}");
    assert!(table.contains("every generated picture with every photo"), "{table}");

    let refused = |run: Output, wanted: &str| {
        let (_, err) = said(&run);
        assert_eq!(run.status.code(), Some(2), "{err}");
        assert!(err.contains(wanted) && !err.contains("panicked"), "{err}");
    };
    std::fs::write(dir.path().join("few.txt"), "{product}\n").expect("a file");
    let few = dir.path().join("few.txt");
    let few = few.to_str().expect("Unicode");
    let empty = written(dir.path(), "empty", &[]);
    let torn = written(dir.path(), "torn", &[painted(1, [9, 9, 9], (64, 64))]);
    let whole = std::fs::read(Path::new(&torn).join("0.png")).expect("a picture");
    std::fs::write(Path::new(&torn).join("0.png"), &whole[..whole.len() / 2]).expect("a file");
    let swap = |flag: &str, value: &str| {
        let at = args.iter().position(|arg| *arg == flag).expect("a flag");
        let mut args = args.to_vec();
        args[at + 1] = value;
        hypnos(&[&args[..], &["--class-name", "mug"]].concat())
    };
    refused(swap("--prompts", few), "wanted 3 prompts, one for each picture of");
    refused(swap("--photos", &empty), "wanted at least 1 photos");
    refused(swap("--generated", &torn), "0.png");
    refused(swap("--bundle", "/nowhere"), "/nowhere");
    refused(with(&[]), "--class-name");
    refused(hypnos(&args[..5]), "--generated");
}

#[test]
fn the_compare_command_resumes_without_repeating_trainings() {
    let dir = tempfile::tempdir().expect("a directory");
    let bundle = bundle(dir.path(), true);
    let photos = written(dir.path(), "mug-1", &photos());
    let out = dir.path().join("out");
    let (bundle, out_text) = (bundle.to_str().expect("Unicode"), out.to_str().expect("Unicode"));
    let common = ["compare", "--bundle", bundle, "--subjects", &photos, "--out", out_text, "--images", "3"];
    let set = ["--set", "steps=2", "--set", "class_images=0", "--set", "evaluation.steps=2"];
    let compare = |recipes: &str| hypnos(&[&common[..], &set, &["--recipes", recipes]].concat());

    let run = compare("dreambooth@1e-6,textual_inversion");
    let (text, err) = said(&run);
    assert!(run.status.success(), "{err}");
    for wanted in
        ["Table 1: prompt-invariant", "Table 2: prompt-varying", "dreambooth@1e-6", "DINO ↑", "LPIPS ↓"]
    {
        assert!(text.contains(wanted), "{text}");
    }
    let rows =
        text.lines().filter(|line| line.starts_with("| dreambooth") || line.starts_with("| textual")).count();
    assert_eq!(rows, 4, "{text}");
    let cell = out.join("mug-1/dreambooth@1e-6");
    let written = std::fs::read_to_string(cell.join("report.json")).expect("a report");
    let report: Report = serde_json::from_str(&written).expect("a report");
    assert_eq!(serde_json::from_str::<Value>(&written).expect("JSON"), json!(report));
    assert_eq!((report.class_name.as_str(), &report.options["learning_rate"]), ("mug", &json!(1e-6)));
    assert!(report.seconds.get(&Phase::Training).is_some_and(|&seconds| seconds > 0.0), "{report:#?}");
    let page = std::fs::read_to_string(cell.join("report.html")).expect("a page");
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("time, training"));
    let all = std::fs::read_to_string(out.join("comparison.html")).expect("a page");
    assert_eq!(all.matches("data:image/webp").count(), 2 * 3);

    // What is there stays as it is; the new method alone is trained.
    let written = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).expect("a file");
    let before = written(&cell.join("weights.safetensors"));
    let run = compare("dreambooth@1e-6,dreambooth-no-prior@2e-6");
    let (text, err) = said(&run);
    assert!(run.status.success(), "{err}");
    assert!(text.contains("dreambooth-no-prior@2e-6"), "{text}");
    assert_eq!(written(&cell.join("weights.safetensors")), before);

    for (recipes, wanted) in [("hypnoz", "is not a method"), ("dreambooth-no-hands", "omits an unknown part")]
    {
        let run = compare(recipes);
        let (_, err) = said(&run);
        assert_eq!(run.status.code(), Some(2), "{err}");
        assert!(err.contains("--recipes") && err.contains(wanted), "{err}");
    }
}
