//! Memory that was counted beside memory that was taken, by whole commands in processes of their own; what is refused
//! because it does not fit; and the tables of docs/memory.md and of the README.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use candle_core::{DType, Device};
use hypnos::engine::memory::{FEWEST_PHOTOS, MemorySettings, PHOTOS, Products, sample_plan, training_plan};
use hypnos::job::{Method, TrainOptions, TrainSpec};
use hypnos::ml::bundle::{Bundle, part_shapes};
use hypnos::ml::device::DeviceKind;
use hypnos::ml::models::unet::{self, Unet};
use hypnos::ml::models::vae::{self, Vae};
use hypnos::ml::plan::{Phase, SampleSizes};
use hypnos::ml::precision::Precision;
use hypnos::ml::weights::{Weights, save};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bundles::copy;
use crate::cli_train::{demo_photos, hypnos, refused, succeeds};

/// How far the count may be from what was taken.
const OFF_MOST: f64 = 0.15;

fn miniature() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("bundles/miniature")
}

fn parsed<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("a config")
}

fn write_json(file: &Path, value: &Value) {
    fs::create_dir_all(file.parent().expect("a directory")).expect("a directory");
    fs::write(file, value.to_string()).expect("a file");
}

fn read_json(file: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(file).expect("a file")).expect("JSON")
}

/// The miniature with random weights in the place of its UNet and autoencoder: four levels at 256 pixels, a third of SD
/// 1.5's widths, 78 million weights.
fn mid_size() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    copy(&miniature(), dir.path());
    let unet_file = dir.path().join("unet/config.json");
    let mut config = read_json(&unet_file);
    for (key, value) in [
        ("block_out_channels", json!([96, 192, 384, 384])),
        ("down_block_types", down_blocks()),
        ("up_block_types", up_blocks()),
        ("layers_per_block", json!(2)),
        ("attention_head_dim", json!(8)),
        ("sample_size", json!(32)),
    ] {
        config[key] = value;
    }
    write_json(&unet_file, &config);
    let random = Weights::random(1, &Device::Cpu);
    Unet::load(&random, &parsed::<unet::Config>(config)).expect("a UNet");
    write_weights(&dir.path().join("unet/diffusion_pytorch_model.safetensors"), &random);
    let vae_file = dir.path().join("vae/config.json");
    let mut config = read_json(&vae_file);
    config["block_out_channels"] = json!([64, 96, 128, 192]);
    config["norm_num_groups"] = json!(32);
    write_json(&vae_file, &config);
    let random = Weights::random(2, &Device::Cpu);
    Vae::load(&random, &parsed::<vae::Config>(config)).expect("an autoencoder");
    write_weights(&dir.path().join("vae/diffusion_pytorch_model.safetensors"), &random);
    let mut manifest = read_json(&dir.path().join("hypnos.json"));
    manifest["files"] = json!({});
    manifest["resolution"] = json!(256);
    write_json(&dir.path().join("hypnos.json"), &manifest);
    dir
}

fn write_weights(file: &Path, weights: &Weights) {
    let tensors = weights.params().into_iter().map(|(name, param)| (name, param.value()));
    save(file, &tensors.collect(), &BTreeMap::new(), DType::F32).expect("weights");
}

fn down_blocks() -> Value {
    json!(["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"])
}

fn up_blocks() -> Value {
    json!(["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"])
}

/// Runs a command to its end; the most memory that it had.
fn peak_of(command: &mut Command) -> u64 {
    let mut child = command.spawn().expect("the program starts");
    let (status, mut peak) = (format!("/proc/{}/status", child.id()), 0);
    while child.try_wait().expect("a state").is_none() {
        // The mark only rises: what is missed of it is what rose in the last moment.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) << 10);
        sleep(Duration::from_millis(5));
    }
    let out = child.wait_with_output().expect("an end");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    peak
}

/// As little of every phase as goes: steps by all four losses, with pictures scored before the last one.
const OPTIONS: &str = r#"{"steps": 2, "s_p": 2, "class_images": 1, "views": {"n": 2}, "learning_rate": 1e-5,
    "discriminator": {"steps": 1, "batch": 2}, "previews": [], "loss_weights": {"perceptual": 0.003},
    "perceptual": {"timestep_max": null}, "evaluation": {"images": 1, "steps": 1, "trials": [1], "trial_images": 2,
    "class_images": 0, "prompts": ["a photo of {product}"]}}"#;

/// What is counted for a command, and what it takes.
fn counted_and_taken(bundle: &Path, checkpointing: bool) -> (u64, u64) {
    let (dir, bundle) = (tempfile::tempdir().expect("a directory"), bundle.to_string_lossy().into_owned());
    let mut plan =
        hypnos(&["models", "plan", "--json", "--no-time", "--photos", "4", "--photo-size", "0.1024"]);
    plan.args(["--bundle", &bundle, "--options", OPTIONS]);
    if checkpointing {
        plan.arg("--gradient-checkpointing");
    }
    let planned: Value = serde_json::from_str(&succeeds(&mut plan)).expect("JSON");
    let counted = planned["training"]["fit"]["wanted"].as_u64().expect("bytes");
    let mut train = hypnos(&["train", "--class-name", "mug", "--bundle", &bundle, "--ignore-memory"]);
    train.arg("--photos").arg(demo_photos()).arg("--out").arg(dir.path().join("out"));
    let Value::Object(options) = serde_json::from_str(OPTIONS).expect("options") else { panic!("an object") };
    for (key, value) in &options {
        train.arg("--set").arg(format!("{key}={value}"));
    }
    if checkpointing {
        train.arg("--gradient-checkpointing");
    }
    (counted, peak_of(&mut train))
}

#[track_caller]
fn assert_agree(what: &str, (counted, taken): (u64, u64)) {
    let off = counted as f64 / taken as f64 - 1.0;
    let mb = |bytes: u64| bytes as f64 / 1e6;
    eprintln!(
        "{what}: counted {:.1} MB, taken {:.1} MB, off by {:.1} %",
        mb(counted),
        mb(taken),
        100.0 * off
    );
    assert!(off.abs() <= OFF_MOST, "{what}: counted {:.1} MB, taken {:.1} MB", mb(counted), mb(taken));
}

/// Trainings of a bundle, with blocks kept and computed again.
fn assert_trainings_agree(bundle: &Path) {
    let [kept, again] = [false, true].map(|checkpointing| counted_and_taken(bundle, checkpointing));
    assert_agree("kept", kept);
    assert_agree("computed again", again);
    assert!(again.1 < kept.1, "it takes less: {again:?}, {kept:?}");
}

/// Samples of a bundle, of so many pictures at once.
fn assert_samples_agree(bundle: &Path, batches: &[usize]) {
    for batch in batches {
        let (dir, batch) = (tempfile::tempdir().expect("a directory"), batch.to_string());
        let mut plan = hypnos(&["models", "plan", "--json", "--no-time", "--batch", &batch]);
        let planned = succeeds(plan.arg("--bundle").arg(bundle));
        let planned: Value = serde_json::from_str(&planned).expect("JSON");
        let counted = planned["sample"]["fit"]["wanted"].as_u64().expect("bytes");
        let mut sample =
            hypnos(&["sample", "--prompt", "a mug", "--steps", "1", "-n", &batch, "--batch", &batch]);
        sample.arg("--bundle").arg(bundle).arg("--out").arg(dir.path());
        assert_agree(&format!("{batch} at once"), (counted, peak_of(&mut sample)));
    }
}

#[test]
fn a_training_of_the_miniature_takes_what_was_counted() {
    assert_trainings_agree(&miniature());
}

#[test]
fn a_sample_of_the_miniature_takes_what_was_counted() {
    assert_samples_agree(&miniature(), &[1, 4]);
}

#[test]
#[ignore = "takes minutes; run it by `cargo nextest run --release --run-ignored only mid_size`"]
fn trainings_and_samples_of_a_mid_size_model_take_what_was_counted() {
    let bundle = mid_size();
    assert_samples_agree(bundle.path(), &[1, 4]);
    assert_trainings_agree(bundle.path());
}

/// The configs of Stable Diffusion 1.5 for pictures of `side` pixels, `widened` times as wide, and no weights.
fn sd15(side: usize, widened: usize) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let wide = |channels: [usize; 4]| channels.map(|n| n * widened);
    let unet = json!({
        "attention_head_dim": 8, "block_out_channels": wide([320, 640, 1280, 1280]), "cross_attention_dim": 768,
        "down_block_types": down_blocks(), "up_block_types": up_blocks(), "sample_size": 64,
    });
    let text = json!({
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12,
    });
    let vae = json!({
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
    });
    write_json(&dir.path().join("unet/config.json"), &unet);
    write_json(&dir.path().join("text_encoder/config.json"), &text);
    write_json(&dir.path().join("vae/config.json"), &vae);
    write_json(&dir.path().join("hypnos.json"), &json!({ "name": "sd15", "resolution": side }));
    let scheduler = "scheduler/scheduler_config.json";
    fs::create_dir_all(dir.path().join("scheduler")).expect("a directory");
    fs::copy(miniature().join(scheduler), dir.path().join(scheduler)).expect("a copy");
    dir
}

/// Adds what HYPNOS learns and is judged with, in the sizes that `models pull sd15` fetches: configs, and files of weights
/// that are holes.
fn add_teachers(dir: &Path) {
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/pull/sd15.json");
    let sources = read_json(&sources);
    for part in sources["parts"].as_array().expect("parts") {
        let Some(place) = part["into"].as_str() else { continue };
        write_json(&dir.join(place).join("config.json"), &part["config"]);
        let shapes = part_shapes(dir, place).expect("a network");
        let n: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
        let head =
            json!({ "weights": { "dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n] } }).to_string();
        let file = dir.join(place).join("model.safetensors");
        fs::write(&file, [&(head.len() as u64).to_le_bytes(), head.as_bytes()].concat()).expect("a file");
        let whole = 8 + head.len() as u64 + 4 * n as u64;
        fs::File::options().write(true).open(&file).and_then(|file| file.set_len(whole)).expect("a hole");
    }
}

/// The block of a page that a comment of this name begins.
fn documented(page: &str, name: &str) -> Vec<String> {
    let text = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(page);
    let text = fs::read_to_string(text).expect("the page");
    let from = text.find(&format!("<!-- {name} -->")).unwrap_or_else(|| panic!("{page}: no {name}"));
    let rest = &text[from..];
    let to = rest.find("<!-- end -->").expect("its end");
    rest[..to].lines().skip(1).map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// The page's table of that name as it should be, if rows do not agree: words to the letter, numbers to 0.15.
fn disagreement(page: &str, name: &str, counted: &[String]) -> Option<String> {
    let documented = documented(page, name);
    let cells = |row: &str| row.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let agree = |a: &str, b: &str| match (a.parse::<f64>(), b.parse::<f64>()) {
        (Ok(a), Ok(b)) => (a - b).abs() < 0.15,
        _ => a == b,
    };
    let rows_agree = |a: &String, b: &String| {
        let (a, b) = (cells(a), cells(b));
        a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| agree(a, b))
    };
    let same =
        documented.len() == counted.len() && documented.iter().zip(counted).all(|(a, b)| rows_agree(a, b));
    (!same).then(|| format!("{page} wants\n<!-- {name} -->\n{}\n", counted.join("\n")))
}

const PAGE: &str = "docs/memory.md";

const METHODS: [Method; 3] = [Method::Hypnos, Method::Dreambooth, Method::TextualInversion];

fn options_of(method: Method) -> TrainOptions {
    TrainSpec::new("mug", TrainOptions::of(method), 1).expect("a training").options
}

/// Those of an engine that names no precision, on the card a GPU from Ampere on.
fn settings(checkpointing: bool, kind: DeviceKind) -> MemorySettings {
    let precision = if kind == DeviceKind::Cuda { Precision::Bf16 } else { Precision::F32 };
    MemorySettings { batch: 4, checkpointing, precision, products: Products::Never, photos: PHOTOS }
}

/// Bundles of Stable Diffusion 1.5's sizes by their pixels, and the directories that they lie in.
fn real_sizes() -> [(usize, Bundle, TempDir); 2] {
    [512, 256].map(|side| {
        let dir = sd15(side, 1);
        add_teachers(dir.path());
        (side, Bundle::open(dir.path()).expect("a bundle"), dir)
    })
}

/// Graphics cards, in GB.
const CARDS: [f64; 5] = [8.0, 11.5, 16.0, 24.0, 80.0];

/// Whether so many bytes fit a card. A driver and its context leave a twentieth less.
fn fits(bytes: u64, card: f64) -> bool {
    (bytes as f64) < card * 1e9 * 0.95
}

/// The head of a table of cards.
fn cards_head(first: &str) -> Vec<String> {
    let cards = CARDS.map(|gb| format!(" {gb} GB |")).concat();
    vec![format!("| {first} |{cards}"), format!("|---|{}", "---|".repeat(CARDS.len()))]
}

#[test]
fn the_page_on_memory_says_what_is_counted_for_stable_diffusion_1_5() {
    let bundles = real_sizes();
    let peak = |bundle: &Bundle, method, checkpointing, kind| {
        let plan = training_plan(bundle, &options_of(method), &settings(checkpointing, kind), kind);
        plan.expect("a plan").peak(kind).bytes
    };
    let mut rows = vec![
        "| training | pixels | without | with `--gradient-checkpointing` |".to_owned(),
        "|---|--:|--:|--:|".to_owned(),
    ];
    for (side, bundle, _) in &bundles {
        for method in METHODS {
            let [kept, again] = [false, true].map(|again| gib(peak(bundle, method, again, DeviceKind::Cpu)));
            rows.push(format!("| `{method}` | {side} | {kept:.1} | {again:.1} |"));
        }
    }
    let mut wrong = Vec::from_iter(disagreement(PAGE, "trainings", &rows));

    let sample = |bundle: &Bundle, side, batch, kind| {
        let sizes = SampleSizes { batch, width: side, height: side };
        sample_plan(bundle, &sizes, &settings(false, kind), kind).expect("a plan").peak(kind).bytes
    };
    let mut rows = vec!["| sample | pixels | GiB |".to_owned(), "|---|--:|--:|".to_owned()];
    for (side, bundle, _) in &bundles {
        for batch in [1, 4] {
            let bytes = gib(sample(bundle, *side, batch, DeviceKind::Cpu));
            rows.push(format!("| {batch} at once | {side} | {bytes:.1} |"));
        }
    }
    wrong.extend(disagreement(PAGE, "samples", &rows));

    let mut rows = cards_head("on a card of");
    let verdicts = |kept: u64, again: Option<u64>| {
        let verdict = |card: f64| match again {
            _ if fits(kept, card) => " yes |",
            Some(again) if fits(again, card) => " with `--gradient-checkpointing` |",
            _ => " no |",
        };
        CARDS.map(verdict).concat()
    };
    let gpu = DeviceKind::Cuda;
    for (side, bundle, _) in &bundles {
        for method in METHODS {
            let [kept, again] = [false, true].map(|again| peak(bundle, method, again, gpu));
            rows.push(format!("| `{method}`, {side} px |{}", verdicts(kept, Some(again))));
        }
        for batch in [1, 4] {
            let bytes = sample(bundle, *side, batch, gpu);
            rows.push(format!("| sample, {batch} at once, {side} px |{}", verdicts(bytes, None)));
        }
    }
    wrong.extend(disagreement(PAGE, "cards", &rows));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Flags of a worker, those that cost least first, and what they set: gradient checkpointing, the share of samples.
const WORKERS: [(&str, bool, f64); 4] = [
    ("no flags", false, 0.5),
    ("`--gradient-checkpointing`", true, 0.5),
    ("`--sample-share 0`", false, 0.0),
    ("`--gradient-checkpointing --sample-share 0`", true, 0.0),
];

#[test]
fn the_page_on_memory_and_the_readme_say_what_a_worker_needs() {
    let gpu = DeviceKind::Cuda;
    let workers = WORKERS.map(|(_, checkpointing, share)| MemorySettings {
        products: Products::of_worker(share),
        ..settings(checkpointing, gpu)
    });
    let names = WORKERS.map(|(name, ..)| format!(" {name} |")).concat();
    let mut peaks = vec![format!("| GiB on the card, with |{names}"), format!("|---|{}", "--:|".repeat(4))];
    let mut cards = cards_head("a worker on a card of");
    for (side, bundle, _dir) in &real_sizes() {
        let training = |method, settings: &MemorySettings| {
            let plan = training_plan(bundle, &options_of(method), settings, gpu);
            plan.expect("a plan").peak(gpu).bytes
        };
        let sample = |batch, settings: &MemorySettings| {
            let sizes = SampleSizes { batch, width: *side, height: *side };
            sample_plan(bundle, &sizes, settings, gpu).expect("a plan").peak(gpu).bytes
        };
        // It does not start where these do not fit.
        let starting = workers.map(|settings| {
            let smallest = MemorySettings { photos: FEWEST_PHOTOS, ..settings };
            sample(1, &settings).max(training(Method::TextualInversion, &smallest))
        });
        let mut rows = METHODS
            .map(|method| {
                (format!("`{method}`, {side} px"), workers.map(|settings| training(method, &settings)))
            })
            .to_vec();
        rows.push((format!("sample, 4 at once, {side} px"), workers.map(|settings| sample(4, &settings))));
        for (what, counted) in rows {
            let numbers = counted.map(|bytes| format!(" {:.1} |", gib(bytes))).concat();
            peaks.push(format!("| {what} |{numbers}"));
            let flags = CARDS.map(|card| {
                match (0..workers.len()).find(|&i| fits(counted[i].max(starting[i]), card)) {
                    Some(0) => " yes |".to_owned(),
                    Some(i) => format!(" {} |", WORKERS[i].0),
                    None => " no |".to_owned(),
                }
            });
            cards.push(format!("| {what} |{}", flags.concat()));
        }
    }
    let readme: Vec<String> = cards.iter().filter(|row| !row.contains("256 px")).cloned().collect();
    let wrong = [
        disagreement(PAGE, "workers", &peaks),
        disagreement(PAGE, "worker cards", &cards),
        disagreement("README.md", "worker cards", &readme),
    ];
    let wrong: Vec<String> = wrong.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_aim_of_22_gb_for_a_whole_training_at_256_pixels_holds() {
    let dir = sd15(256, 1);
    add_teachers(dir.path());
    let (bundle, cpu) = (Bundle::open(dir.path()).expect("a bundle"), DeviceKind::Cpu);
    let plan = training_plan(&bundle, &options_of(Method::Hypnos), &settings(true, cpu), cpu);
    let peak = plan.expect("a plan").peak(cpu);
    assert!(peak.bytes < 22_000_000_000, "{peak:?}");
}

#[test]
fn in_bf16_activations_take_half_and_weights_that_are_trained_a_copy() {
    let dir = sd15(512, 1);
    let bundle = Bundle::open(dir.path()).expect("a bundle");
    let (gpu, side) = (DeviceKind::Cuda, 512);
    let [f32, tf32, bf16] = Precision::ALL.map(|precision| {
        let settings = MemorySettings { precision, ..settings(false, gpu) };
        let sizes = SampleSizes { batch: 1, width: side, height: side };
        let sample = sample_plan(&bundle, &sizes, &settings, gpu).expect("a plan");
        let training =
            training_plan(&bundle, &options_of(Method::Dreambooth), &settings, gpu).expect("a plan");
        let bytes = |name: &str, phase: Phase| {
            let item = training.needs.items.iter().find(|item| item.name == name);
            item.map_or(0, |item| item.at(phase)) as f64
        };
        let trained = bytes("weights that are trained", Phase::Training);
        let copy = bytes("weights that are trained, in bf16", Phase::Training);
        let activations = bytes("forward and backward", Phase::Training);
        let moments = bytes("AdamW's moments", Phase::Training);
        (sample.fine_tuned as f64, trained, copy, activations, moments)
    });
    assert_eq!(f32, tf32, "TF32 is a rounding of factors, in memory they are f32");
    let near = |ours: f64, wanted: f64| (ours / wanted - 1.0).abs() < 0.05;
    let (frozen, trained, copy, activations, moments) = bf16;
    // 983 million weights, of which 42 million are embeddings and vectors.
    assert!(near(frozen, 0.52 * f32.0), "{frozen} of {}", f32.0);
    assert!(near(copy, 0.48 * trained), "{copy} of {trained}");
    assert!((activations / f32.3 - 0.5).abs() < 0.1, "{activations} of {}", f32.3);
    assert_eq!((trained, moments, f32.2), (f32.1, f32.4, 0.0));
}

#[test]
fn what_cannot_fit_is_refused_in_one_line_before_a_weight_is_read() {
    let dir = sd15(512, 16); // 200 billion weights, of which there are none
    let bundle = dir.path().to_string_lossy().into_owned();
    let out = hypnos(&["models", "plan", "--no-time", "--bundle", &bundle]).output().expect("it starts");
    let words = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(2), "{words}");
    assert!(words.contains("it does not fit") && words.contains("with --gradient-checkpointing"), "{words}");

    let scratch = tempfile::tempdir().expect("a directory");
    let data = scratch.path().join("data").to_string_lossy().into_owned();
    let line = refused(&mut hypnos(&["work", "--bundle", &bundle, "--data", &data]), 2);
    assert!(line.contains("a sample (1 at once, 512 x 512 pixels): wanted"), "{line}");
    assert!(line.contains(" GiB of memory, free ") && line.contains("--ignore-memory"), "{line}");

    let train = |more: &[&str]| {
        let mut command =
            hypnos(&["train", "--bundle", &bundle, "--class-name", "mug", "--method", "dreambooth"]);
        command.arg("--photos").arg(demo_photos()).arg("--out").arg(scratch.path().join("out")).args(more);
        command
    };
    let line = refused(&mut train(&[]), 2);
    assert!(line.contains("wanted") && line.contains("free"), "{line}");
    let compare = |more: &[&str]| {
        let mut command = hypnos(&["compare", "--bundle", &bundle, "--recipes", "dreambooth", "--subjects"]);
        command.arg(format!("{}=mug", demo_photos().display()));
        command.arg("--out").arg(scratch.path().join("compared")).args(more);
        command
    };
    // Both commands take the flags that a plan advises, and the former name of one of them.
    let advised: BTreeSet<&str> = words
        .split_whitespace()
        .filter(|word| word.starts_with("--"))
        .map(|flag| flag.trim_end_matches(':'))
        .collect();
    assert_eq!(advised, BTreeSet::from(["--batch", "--gradient-checkpointing"]), "{words}");
    for flag in advised.into_iter().chain(["--checkpointing"]) {
        let more: &[&str] = if flag == "--batch" { &[flag, "1"] } else { &[flag] };
        for mut command in [train(more), compare(more)] {
            let line = refused(&mut command, 2);
            assert!(line.contains(" GiB of memory, free "), "{flag}: {line}");
        }
    }
    let line = refused(&mut train(&["--ignore-memory"]), 2);
    assert!(line.contains("tokenizer/vocab.json"), "it went on to what is missing: {line}");
    assert!(!scratch.path().join("out").exists(), "nothing was written");
}

#[test]
fn a_plan_shows_what_is_taken_by_phase_and_refuses_odd_options_in_one_line() {
    let miniature = miniature().to_string_lossy().into_owned();
    let words = succeeds(&mut hypnos(&["models", "plan", "--bundle", &miniature]));
    for wanted in
        ["AdamW's moments", "gradients", "segmenter", "evaluating", "it fits", "TFLOP, about", "GFLOP/s"]
    {
        assert!(words.contains(wanted), "{wanted}: {words}");
    }
    let plan = |more: &[&str]| refused(hypnos(&["models", "plan", "--bundle", &miniature]).args(more), 2);
    assert!(
        plan(&["--options", "{"]).starts_with("--options: wanted a JSON object"),
        "{}",
        plan(&["--options", "{"])
    );
    let line = plan(&["--options", r#"{"steps": 0}"#]);
    assert!(line.starts_with("--options steps: "), "{line}");
    let line = plan(&["--width", "100"]);
    assert!(line.starts_with("--width: wanted a multiple of 8"), "{line}");
}
