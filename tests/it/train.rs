//! Training in the core: against PyTorch over whole steps, and what a training may never do.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use hypnos::ml::adapted::{Adapted, Product};
use hypnos::ml::bundle::{Bundle, Part};
use hypnos::ml::diffusion::{self, Schedule};
use hypnos::ml::models::clip::ClipText;
use hypnos::ml::models::unet::Unet;
use hypnos::ml::models::vae::Moments;
use hypnos::ml::sample::{self, Models, Picture, Settings};
use hypnos::ml::samplers::Sampler;
use hypnos::ml::train::{Batch, Material, Recipe, State, noise_loss, train};
use hypnos::ml::weights::Weights;
use hypnos::ml::{Error, picture, random};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::golden::{Golden, OUTPUT, Place, assert_close};

fn config<T: DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).expect("a config")
}

fn part<M>(weights: Weights, load: impl FnOnce(&Weights) -> hypnos::ml::Result<M>) -> Part<M> {
    let weights = weights.trainable(true);
    Part { model: load(&weights).expect("a model"), params: weights.params() }
}

#[test]
fn three_steps_of_dreambooth_agree_with_torch() {
    dreambooth_loop(&Place::cpu());
}

pub(crate) fn dreambooth_loop(place: &Place) {
    let (golden, start) = (Golden::open("dreambooth_loop"), Golden::open("step"));
    let (configs, settings): (Value, Value) = (start.metadata("config"), golden.metadata("settings"));
    let text = part(start.weights("text.", place), |w| ClipText::load(w, &config(&configs["text"])));
    let unet = part(start.weights("unet.", place), |w| Unet::load(w, &config(&configs["unet"])));
    let schedule = diffusion::Config::parse(
        r#"{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}"#,
    );
    let schedule = schedule.and_then(|config| Schedule::new(&config)).expect("a schedule");
    let mut state = State::new(text, unet, settings["lr"].as_f64().expect("lr")).expect("a state");
    let t = golden.rows("input.loop.t");
    let (losses, norms) = (golden.numbers("output.loop.loss"), golden.numbers("output.loop.norm"));
    for step in 0..3 {
        let input =
            |name: &str| place.weight(&golden.get(&format!("input.loop.{name}")).get(step).expect("a step"));
        let batch = Batch {
            latents: input("latents"),
            noise: input("noise"),
            t: t[step].iter().map(|&t| t as usize).collect(),
            ids: golden.rows("input.loop.ids"),
            weights: vec![1.0, settings["prior"].as_f64().expect("prior")],
        };
        let taken = state.step(&schedule, &batch).expect("a step");
        for (what, actual, wanted) in
            [("loss", taken.loss, losses[step]), ("norm", taken.grad_norm, norms[step])]
        {
            let off = (f64::from(actual) - wanted).abs() / wanted;
            assert!(off <= OUTPUT, "step {step}: {what} {actual}, wanted {wanted}");
        }
    }
    let mut n_compared = 0;
    for (name, param) in state.params() {
        let theirs = name.replace("text_encoder.", "text.");
        if let Some(wanted) = golden.find(&format!("output.loop.after.{theirs}")) {
            assert_close(name, &param.value(), &wanted, OUTPUT);
            n_compared += 1;
        }
    }
    let unsteady: Vec<String> = golden.metadata("unsteady");
    assert_eq!(n_compared + unsteady.len(), state.params().len());
}

/// The miniature, photos that it drew itself, and a recipe.
struct Bench {
    bundle: Bundle,
    base: Models,
    material: Material,
    recipe: Recipe,
}

impl Bench {
    fn new() -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("bundles/miniature");
        let bundle = Bundle::open(&dir).expect("a bundle");
        let base = Models::load(&bundle, &Device::Cpu).expect("models");
        let encode = |colour: &str, seed| base.vae.encode(&painted(colour, seed)).expect("moments");
        let photos = vec![encode("red", 1), encode("green", 2), encode("red", 3)];
        let material = Material { photos, class_images: vec![encode("grey", 4), encode("blue", 5)] };
        let product = Product { token: "sks".into(), class_name: "mug".into() };
        let recipe = Recipe { product, n_steps: 4, lr: 1e-4, prior_weight: 1.0, n_class_images: 2, seed: 11 };
        Self { bundle, base, material, recipe }
    }

    fn state(&self, checkpointing: bool) -> State {
        let mut unet = self.bundle.unet(&Device::Cpu, true).expect("a UNet");
        unet.model.checkpointing = checkpointing;
        let text = self.bundle.text_encoder(&Device::Cpu, true).expect("a text encoder");
        State::new(text, unet, self.recipe.lr).expect("a state")
    }

    /// Takes the recipe's steps, or stops after `n`.
    fn run(&self, state: &mut State, n: u64) -> hypnos::ml::Result<bool> {
        train(state, &self.material, &self.recipe, &self.base, &mut |state| {
            if state.n_steps() >= n { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    }

    fn hash(&self) -> &str {
        self.bundle.hash().expect("a hash")
    }
}

/// A signed picture `[1, 3, 64, 64]`: a coloured ground with a darker square at a place of the seed's.
fn painted(colour: &str, seed: u64) -> Tensor {
    let ground: [f32; 3] = match colour {
        "red" => [0.8, -0.6, -0.6],
        "green" => [-0.6, 0.7, -0.5],
        "blue" => [-0.7, -0.5, 0.8],
        _ => [0.1, 0.1, 0.1],
    };
    let (left, top) = (random::below(seed, 0, 0, 32), random::below(seed, 0, 1, 32));
    let value = |i: usize| {
        let (channel, y, x) = (i / 4096, i / 64 % 64, i % 64);
        let inside = (left..left + 32).contains(&x) && (top..top + 32).contains(&y);
        if inside { -0.5 * ground[channel] } else { ground[channel] }
    };
    Tensor::from_vec((0..3 * 4096).map(value).collect(), (1, 3, 64, 64), &Device::Cpu).expect("a picture")
}

fn values(state: &State) -> BTreeMap<&String, Vec<u32>> {
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect();
    let flat = |t: Tensor| t.flatten_all().and_then(|t| t.to_vec1()).expect("values");
    state.params().iter().map(|(name, param)| (name, bits(flat(param.value())))).collect()
}

#[test]
fn a_frozen_view_draws_what_the_saved_weights_draw_and_follows_each_step() {
    let bench = Bench::new();
    let (dir, mut state) = (tempfile::tempdir().expect("a directory"), bench.state(false));
    let settings = Settings { sampler: Sampler::Dpmpp2m, steps: 4, guidance: 3.0, width: 64, height: 64 };
    let pictures = [Picture { prompt: "a photo of sks mug".into(), negative: String::new(), seed: 5 }];
    let draw = |models: &Models| {
        let drawn = sample::draw(models, &pictures, &settings, &mut |_, _| ControlFlow::Continue(()));
        drawn.expect("pixels").expect("nobody stopped it")
    };
    let view = state.frozen(&bench.bundle, &bench.base).expect("a view");
    assert_eq!(draw(&view), draw(&bench.base), "nothing is trained yet");
    bench.run(&mut state, 3).expect("steps");
    let file = dir.path().join("weights.safetensors");
    state.save_weights(&file, bench.hash(), &bench.recipe).expect("a file");
    let saved = Adapted::load(&file, &bench.bundle, &bench.base).expect("models");
    assert_eq!(saved.product, bench.recipe.product);
    let drawn = draw(&saved.models);
    assert_ne!(drawn, draw(&bench.base));
    assert_eq!(drawn, draw(&view), "the view shares the weights, so it has seen the steps");
    // It records no graph, so it costs no memory beyond the picture's own.
    let text = view.text.forward(&[bench.base.tokenizer.encode("a mug")]).expect("hidden states");
    let x = Tensor::zeros((1, 4, 16, 16), candle_core::DType::F32, &Device::Cpu).expect("zeros");
    assert!(!text.track_op() && !view.unet.forward(&x, &[9.0], &text).expect("an answer").track_op());
}

#[test]
fn a_resumed_state_goes_on_as_if_never_stopped_and_its_file_has_the_same_bytes() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().expect("a directory");
    let save = |state: &State, name: &str| {
        let file = dir.path().join(name);
        state.save(&file, bench.hash(), &bench.recipe).expect("a file");
        (std::fs::read(&file).expect("bytes"), file)
    };
    let mut unbroken = bench.state(false);
    assert!(!bench.run(&mut unbroken, 2).expect("steps"), "it was stopped");
    let (halfway, file) = save(&unbroken, "halfway");
    bench.run(&mut unbroken, 4).expect("steps");
    let mut resumed = bench.state(false);
    resumed.resume(&file, bench.hash(), &bench.recipe).expect("a state");
    assert_eq!(resumed.n_steps(), 2);
    assert_eq!(save(&resumed, "again").0, halfway);
    bench.run(&mut resumed, 4).expect("steps");
    assert_eq!(save(&unbroken, "a").0, save(&resumed, "b").0);
    assert_eq!(unbroken.history(), resumed.history());
    assert!(bench.run(&mut resumed, 9).expect("nothing left to do"));
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused_in_one_line() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().expect("a directory");
    let (file, weights) = (dir.path().join("checkpoint"), dir.path().join("weights"));
    let mut state = bench.state(false);
    bench.run(&mut state, 1).expect("a step");
    state.save(&file, bench.hash(), &bench.recipe).expect("a file");
    state.save_weights(&weights, bench.hash(), &bench.recipe).expect("a file");
    let other = Recipe { lr: 2e-4, ..bench.recipe.clone() };
    let mut refused = |file: &Path, bundle: &str, recipe: &Recipe, wanted: &str| {
        let words = state.resume(file, bundle, recipe).expect_err("refused").to_string();
        assert!(words.contains(wanted) && !words.contains('\n'), "{words}");
    };
    refused(&file, "0123456789abcdef", &bench.recipe, "was trained from another bundle");
    refused(&file, bench.hash(), &other, "lr is 0.0001 there and 0.0002 here");
    refused(&weights, bench.hash(), &bench.recipe, "is of format \"hypnos weights 1\"");
    let words = Adapted::load(&file, &bench.bundle, &bench.base).expect_err("refused").to_string();
    assert!(words.contains("is of format \"hypnos checkpoint 1\""), "{words}");
}

#[test]
fn a_loss_that_is_not_a_number_changes_no_weight() {
    let mut bench = Bench::new();
    bench.run(&mut bench.state(false), 1).expect("sound material");
    let mean = (&bench.material.photos[0].mean * f64::NAN).expect("not numbers");
    let broken = Moments { mean, logvar: bench.material.photos[0].logvar.clone() };
    bench.material.photos = vec![broken];
    let mut state = bench.state(false);
    let before =
        values(&state).into_iter().map(|(name, bits)| (name.clone(), bits)).collect::<BTreeMap<_, _>>();
    let error = bench.run(&mut state, 4).expect_err("diverged");
    assert!(matches!(error, Error::Diverged(1)), "{error}");
    assert_eq!(state.n_steps(), 0);
    assert!(values(&state).into_iter().all(|(name, bits)| before[name] == bits));
}

#[test]
fn computing_blocks_again_changes_no_bit() {
    let bench = Bench::new();
    let (mut kept, mut again) = (bench.state(false), bench.state(true));
    bench.run(&mut kept, 2).expect("steps");
    bench.run(&mut again, 2).expect("steps");
    assert_eq!(kept.history(), again.history());
    assert_eq!(values(&kept), values(&again));
}

#[test]
fn without_class_images_only_the_photos_count() {
    let mut bench = Bench::new();
    let mut with = bench.state(false);
    bench.run(&mut with, 1).expect("a step");
    bench.material.class_images.clear();
    let mut without = bench.state(false);
    bench.run(&mut without, 1).expect("a step");
    assert!(without.history()[0].loss < with.history()[0].loss, "one loss less in the sum");
    bench.material.photos.clear();
    let error = bench.run(&mut without, 4).expect_err("nothing to learn from").to_string();
    assert!(error.contains("no photos"), "{error}");
}

/// The photos' loss at noise that no step of the training drew.
fn loss_of(bench: &Bench, models: &Models) -> f64 {
    let losses = (0..8_u64).map(|i| {
        let photo = &bench.material.photos[i as usize % 3];
        let noise = random::normal(99, i, 4 * 16 * 16);
        let batch = Batch {
            latents: (&photo.mean * models.vae.scaling_factor()).expect("latents"),
            noise: Tensor::from_vec(noise, (1, 4, 16, 16), &Device::Cpu).expect("noise"),
            t: vec![60 + 120 * i as usize],
            ids: vec![models.tokenizer.encode(&bench.recipe.instance_prompt())],
            weights: vec![1.0],
        };
        let loss = noise_loss(&models.text, &models.unet, &models.schedule, &batch).expect("a loss");
        f64::from(loss.to_scalar::<f32>().expect("a number"))
    });
    losses.sum::<f64>() / 8.0
}

#[test]
fn fifty_steps_lower_the_loss_on_the_photos() {
    let mut bench = Bench::new();
    bench.recipe.n_steps = 50;
    let mut state = bench.state(false);
    let before = loss_of(&bench, &bench.base);
    assert!(bench.run(&mut state, 99).expect("steps"));
    let after = loss_of(&bench, &state.frozen(&bench.bundle, &bench.base).expect("a view"));
    assert!(after < 0.8 * before, "{before} before, {after} after");
}

#[test]
fn a_photo_is_cut_to_its_middle_and_brought_to_size() {
    // 96 x 48: a black, a white and a grey third; the middle square holds the white one between halves of the others.
    let pixels: Vec<u8> = (0..48 * 96).flat_map(|i| [[0, 255, 128][i % 96 / 32]; 3]).collect();
    let png = picture::png(&pixels, (96, 48), &[]).expect("a PNG");
    let row = |side: usize| -> Vec<f32> {
        let photo = picture::Photo::decode(&png, side).expect("a photo");
        assert_eq!((photo.tensor.dims(), photo.width, photo.height), (&[1, 3, side, side][..], 96, 48));
        let row = photo.tensor.flatten_to(2).and_then(|rows| rows.get(side / 2)?.to_vec1());
        row.expect("a row of the red channel")
    };
    let exact = row(48);
    assert!(exact[..8].iter().all(|&v| v == -1.0) && exact[8..40].iter().all(|&v| v == 1.0));
    assert!(exact[40..].iter().all(|&v| (v - 128.0 / 127.5 + 1.0).abs() < 1e-6));
    let half = row(24);
    assert!(half[..3].iter().all(|&v| v < -0.9) && half[6..18].iter().all(|&v| v > 0.9));
    let mean: f32 = half.iter().sum::<f32>() / 24.0;
    assert!((mean - exact.iter().sum::<f32>() / 48.0).abs() < 0.02, "shrinking keeps the brightness: {mean}");
    assert!(picture::Photo::decode(b"no picture", 8).is_err());
}
