//! Training in the core: whole steps against PyTorch, and the invariants of a training.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use hypnos::ml::bundle::{Bundle, Part};
use hypnos::ml::diffusion::{self, Schedule};
use hypnos::ml::finetuned::FineTuned;
use hypnos::ml::models::clip::ClipText;
use hypnos::ml::models::unet::Unet;
use hypnos::ml::models::vae::Vae;
use hypnos::ml::ops::{AdamWConfig, MomentFormat};
use hypnos::ml::perceptual::Perceptual;
use hypnos::ml::precision::Precision;
use hypnos::ml::product::Product;
use hypnos::ml::sample::{self, ImageRequest, Models, SampleSettings};
use hypnos::ml::samplers::Sampler;
use hypnos::ml::tensorfile::TensorFile;
use hypnos::ml::train::losses::{self, Batch, FrozenModels, LossWeights, Objective, Reconstruction, losses};
use hypnos::ml::train::{
    DiscriminatorRecipe, DiscriminatorTrainer, Instance, Learner, PerceptualRecipe, Recipe, State, Templates,
    TrainingData, Trial, train, train_discriminator,
};
use hypnos::ml::weights::Weights;
use hypnos::ml::{Error, Interrupt, image_io, random};
use image::RgbImage;
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
    let schedule = scaled_linear();
    let adamw = AdamWConfig { lr: settings["lr"].as_f64().expect("lr"), ..AdamWConfig::default() };
    let mut state = State::new(text, unet, adamw, None).expect("a state");
    let frozen = FrozenModels { schedule: &schedule, vae: None, perceptual: None };
    let objective = Objective::dreambooth(settings["prior"].as_f64().expect("prior"));
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
            reference: None,
            crop: None,
        };
        let taken = state.step(frozen, &batch, &objective, None, None).expect("a step");
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

#[test]
fn one_step_of_hypnos_has_torch_s_losses_and_gradients() {
    hypnos_step(&Place::cpu());
}

pub(crate) fn hypnos_step(place: &Place) {
    check_hypnos_step(place, "hypnos_step", &scaled_linear());
}

#[test]
fn one_step_of_hypnos_on_a_model_that_predicts_v_has_torch_s_losses_and_gradients() {
    check_hypnos_step(&Place::cpu(), "hypnos_step_v", &scheduled("v_prediction"));
}

fn check_hypnos_step(place: &Place, name: &str, schedule: &Schedule) {
    let (golden, start, classifier) = (Golden::open(name), Golden::open("step"), Golden::open("perceptual"));
    let (configs, settings): (Value, Value) = (start.metadata("config"), golden.metadata("settings"));
    let text_weights = start.weights("text.", place).trainable(true);
    let unet_weights = start.weights("unet.", place).trainable(true);
    let text = ClipText::load(&text_weights, &config(&configs["text"])).expect("a text encoder");
    let unet = Unet::load(&unet_weights, &config(&configs["unet"])).expect("a UNet");
    let vae = Vae::load(&start.weights("vae.", place), &config(&configs["vae"])).expect("an autoencoder");
    let net = Perceptual::load(&classifier.weights("", place), &classifier.metadata("config"), &place.device);
    let net = net.expect("a classifier");
    let of_all = Golden::open("hypnos_step");
    let discriminator = crate::method::discriminator(&of_all, "discriminator", "discriminator.", place);
    let number = |name: &str| settings[name].as_f64().expect("a number");
    let objective = Objective {
        reconstruction: Reconstruction::InverseGaussian {
            sigma: number("sigma"),
            exponent_max: number("exponent_max"),
        },
        weights: config(&settings["weights"]),
        strides: config(&settings["strides"]),
    };
    let input = |name: &str| place.input(&golden.get(&format!("input.all.{name}")));
    let batch = Batch {
        latents: input("latents"),
        noise: input("noise"),
        t: golden.numbers("input.all.t").iter().map(|&t| t as usize).collect(),
        ids: golden.rows("input.all.ids"),
        reference: Some(input("reference")),
        crop: None,
    };
    let frozen = FrozenModels { schedule, vae: Some(&vae), perceptual: Some(&net) };
    let models = losses::LossModels { text: &text, unet: &unet, frozen, discriminator: Some(&discriminator) };
    let found = losses(&models, &batch, &objective).expect("losses");
    let (total, z0) = (&found.total, found.z0.as_ref().expect("latents"));
    for (name, tensor) in [
        ("predicted", &found.prediction),
        ("z0", z0),
        ("decoded", found.decoded.as_ref().expect("a picture")),
        ("loss.reconstruction", &found.reconstruction),
        ("loss.cut", &found.cut),
        ("loss.prior", found.prior.as_ref().expect("a loss")),
        ("loss.perceptual", found.perceptual.as_ref().expect("a loss")),
        ("loss.adversarial", found.adversarial.as_ref().expect("a loss")),
        ("total", total),
    ] {
        assert_close(name, tensor, &golden.get(&format!("output.all.{name}")), place.model_output);
    }
    total.backward().expect("a backward");
    golden.check_gradients("all", "text.", &text_weights, place);
    golden.check_gradients("all", "unet.", &unet_weights, place);
}

#[test]
fn the_gradient_of_an_embedding_is_torch_s() {
    let place = &Place::cpu();
    let (golden, start) = (Golden::open("hypnos_step"), Golden::open("step"));
    let configs: Value = start.metadata("config");
    let text =
        ClipText::load(&start.weights("text.", place), &config(&configs["text"])).expect("a text encoder");
    let unet = Unet::load(&start.weights("unet.", place), &config(&configs["unet"])).expect("a UNet");
    let row = crate::golden::trained("embedding.x", &golden.get("output.embedding.row"));
    let text = text.with_embedding(17, row.clone()).expect("an embedding");
    let schedule = scaled_linear();
    let input = |name: &str| golden.get(&format!("input.all.{name}")).narrow(0, 0, 1).expect("the first row");
    let batch = Batch {
        latents: input("latents"),
        noise: input("noise"),
        t: vec![golden.numbers("input.all.t")[0] as usize],
        ids: golden.rows("input.all.ids")[..1].to_vec(),
        reference: None,
        crop: None,
    };
    let frozen = FrozenModels { schedule: &schedule, vae: None, perceptual: None };
    let models = losses::LossModels { text: &text, unet: &unet, frozen, discriminator: None };
    let found = losses(&models, &batch, &Objective::dreambooth(0.0)).expect("losses");
    assert_close("loss", &found.total, &golden.get("output.embedding.total"), OUTPUT);
    found.total.backward().expect("a backward");
    let grad = row.grad().expect("a gradient");
    assert_close("embedding", &grad, &golden.get("grad.embedding.row"), crate::golden::GRADIENT);
}

fn scaled_linear() -> Schedule {
    scheduled("epsilon")
}

fn scheduled(prediction: &str) -> Schedule {
    let config = serde_json::json!({
        "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "prediction_type": prediction,
    });
    let config = diffusion::Config::parse(&config.to_string());
    config.and_then(|config| Schedule::new(&config)).expect("a schedule")
}

/// The miniature, photos that it drew itself, and a recipe.
struct Bench {
    bundle: Bundle,
    base: Models,
    data: TrainingData,
    recipe: Recipe,
}

impl Bench {
    fn new() -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/bundle");
        let bundle = Bundle::open(&dir).expect("a bundle");
        let base = Models::load(&bundle, &Device::Cpu, Precision::F32).expect("models");
        let encode = |colour: &str, seed| {
            let picture = image_io::signed(&painted(colour, seed)).expect("a picture");
            base.vae.encode(&picture).expect("moments")
        };
        let recipe = Recipe {
            product: Product { token: "sks".into(), class_name: "mug".into(), with_class: true },
            learner: Learner::Weights,
            n_steps: 4,
            lr: 1e-4,
            adamw_moments: MomentFormat::F32,
            objective: Objective::dreambooth(1.0),
            perceptual: PerceptualRecipe { until_step: 0, timestep_max: None, crop: None },
            discriminator: DiscriminatorRecipe { n_steps: 0, lr: 1e-3, batch: 2 },
            views: None,
            templates: Templates::default(),
            n_class_images: 2,
            seed: 11,
        };
        let instance = |colour: &str, seed| {
            let moments = encode(colour, seed);
            Instance { moments, prompt: recipe.photo_prompt(), pixels: painted(colour, seed) }
        };
        let instances = vec![instance("red", 1), instance("green", 2), instance("red", 3)];
        let class_images = vec![encode("grey", 4), encode("blue", 5)];
        let negatives = vec![encode("green", 6), encode("blue", 7)];
        Self { bundle, base, data: TrainingData { instances, class_images, negatives }, recipe }
    }

    /// The same learning by all four losses of HYPNOS, with a classifier of random weights.
    fn hypnos() -> Self {
        let mut bench = Self::new();
        let objective = &mut bench.recipe.objective;
        objective.reconstruction = Reconstruction::InverseGaussian { sigma: 1.382, exponent_max: 20.0 };
        objective.weights =
            LossWeights { reconstruction: 1.0, prior: 1.0, perceptual: 0.01, discriminator: 0.5 };
        objective.strides = [1.0, 0.5, 0.25, 0.125, 0.0625];
        bench.recipe.perceptual.until_step = 3;
        bench.recipe.discriminator.n_steps = 2;
        bench
    }

    fn state(&self, checkpointing: bool) -> State {
        let mut state = self.state_in(Precision::F32);
        state.set_checkpointing(checkpointing);
        state
    }

    fn state_in(&self, precision: Precision) -> State {
        let unet = self.bundle.unet(&Device::Cpu, precision, true).expect("a UNet");
        let text = self.bundle.text_encoder(&Device::Cpu, precision, true).expect("a text encoder");
        State::new(text, unet, self.recipe.adamw(), self.discriminator()).expect("a state")
    }

    fn discriminator(&self) -> Option<DiscriminatorTrainer> {
        let trainer =
            || DiscriminatorTrainer::new(4, 16, self.recipe.discriminator.lr, self.recipe.seed, &Device::Cpu);
        self.recipe.has_discriminator().then(|| trainer().expect("a discriminator"))
    }

    fn perceptual(&self) -> Option<Perceptual> {
        let config = r#"{"width_coefficient": 0.25, "depth_coefficient": 0.5}"#;
        let config = serde_json::from_str(config).expect("a config");
        let net = || Perceptual::load(&Weights::random(3, &Device::Cpu), &config, &Device::Cpu);
        self.recipe.has_perceptual().then(|| net().expect("a classifier"))
    }

    /// Takes the recipe's steps, or stops after `n`: whether it took all.
    fn run(&self, state: &mut State, n: u64) -> hypnos::ml::Result<bool> {
        train_discriminator(state, &self.data, &self.recipe, &self.base, &mut |_| Ok(()))?;
        let perceptual = self.perceptual();
        let observe =
            &mut |state: &State| if state.n_steps() >= n { Err(Interrupt::Stopped(())) } else { Ok(()) };
        match train(state, &self.data, &self.recipe, &self.base, perceptual.as_ref(), None, observe) {
            Ok(()) => Ok(true),
            Err(Interrupt::Stopped(())) => Ok(false),
            Err(Interrupt::Failed(error)) => Err(error),
        }
    }

    fn hash(&self) -> &str {
        self.bundle.hash().expect("a hash")
    }
}

/// A picture of 64 x 64: a coloured ground with a darker square at a place of the seed's.
fn painted(colour: &str, seed: u64) -> RgbImage {
    let ground: [u8; 3] = match colour {
        "red" => [229, 51, 51],
        "green" => [51, 217, 64],
        "blue" => [38, 64, 229],
        _ => [140, 140, 140],
    };
    let (left, top) = (random::below(seed, 0, 0, 32) as u32, random::below(seed, 0, 1, 32) as u32);
    RgbImage::from_fn(64, 64, |x, y| {
        let inside = (left..left + 32).contains(&x) && (top..top + 32).contains(&y);
        image::Rgb(if inside { ground.map(|v| 190 - v / 2) } else { ground })
    })
}

fn values(state: &State) -> BTreeMap<&String, Vec<u32>> {
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect();
    let flat = |t: Tensor| t.flatten_all().and_then(|t| t.to_vec1()).expect("values");
    state.params().iter().map(|(name, param)| (name, bits(flat(param.value())))).collect()
}

#[test]
fn frozen_models_draw_what_the_saved_weights_draw_and_follow_each_step() {
    let bench = Bench::new();
    let (dir, mut state) = (tempfile::tempdir().expect("a directory"), bench.state(false));
    let settings =
        SampleSettings { sampler: Sampler::Dpmpp2m, steps: 4, guidance: 3.0, width: 64, height: 64 };
    let pictures = [ImageRequest { prompt: "a photo of sks mug".into(), negative: String::new(), seed: 5 }];
    let draw = |models: &Models| {
        let go_on = &mut |_, _| Ok::<_, Interrupt<()>>(());
        sample::draw(models, &pictures, &settings, go_on).expect("pixels")
    };
    let view = state.frozen(&bench.bundle, &bench.base).expect("a view");
    assert_eq!(draw(&view), draw(&bench.base), "nothing is trained yet");
    bench.run(&mut state, 3).expect("steps");
    let file = dir.path().join("weights.safetensors");
    state.save_weights(&file, bench.hash(), &bench.recipe).expect("a file");
    let saved = FineTuned::load(&file, &bench.bundle, &bench.base).expect("models");
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
fn a_resumed_training_equals_an_uninterrupted_one_byte_for_byte() {
    goes_on_as_if_never_stopped(&Bench::new());
}

#[test]
fn a_resumed_training_with_all_losses_equals_an_uninterrupted_one() {
    let bench = Bench::hypnos();
    goes_on_as_if_never_stopped(&bench);
    let mut state = bench.state(false);
    bench.run(&mut state, 4).expect("steps");
    let computed = |of: fn(&hypnos::ml::train::StepMetrics) -> f32| -> Vec<bool> {
        state.history().iter().map(|metrics| of(metrics).is_finite()).collect()
    };
    assert_eq!(computed(|metrics| metrics.perceptual), [true, true, true, false], "s_p is 3");
    assert_eq!(computed(|metrics| metrics.adversarial), [true; 4]);
    assert_eq!(computed(|metrics| metrics.discriminator), [true; 4]);
    assert_eq!(computed(|metrics| metrics.prior), [true; 4]);
}

#[test]
fn a_resumed_training_with_moments_in_8_bits_equals_an_uninterrupted_one() {
    let mut bench = Bench::new();
    bench.recipe.adamw_moments = MomentFormat::Bits8;
    goes_on_as_if_never_stopped(&bench);
}

fn goes_on_as_if_never_stopped(bench: &Bench) {
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
    let bits = |state: &State| -> Vec<_> {
        let columns = hypnos::ml::train::StepMetrics::COLUMNS;
        state.history().iter().map(|taken| columns.map(|(_, of)| of(taken).to_bits())).collect()
    };
    assert_eq!(bits(&unbroken), bits(&resumed));
    assert!(bench.run(&mut resumed, 9).expect("nothing left to do"));
}

#[test]
fn the_best_scored_step_is_served_and_survives_a_checkpoint() {
    the_best_is_served(false);
}

#[test]
fn a_best_scored_step_kept_in_a_file_is_served_too() {
    the_best_is_served(true);
}

fn the_best_is_served(in_a_file: bool) {
    let bench = Bench::new();
    let dir = tempfile::tempdir().expect("a directory");
    let begin = |scratch: &str| {
        let (mut state, scratch) = (bench.state(false), dir.path().join(scratch));
        if in_a_file {
            std::fs::create_dir(&scratch).expect("a directory");
            state.keep_best_in(&scratch);
        }
        state
    };
    let bytes = |save: &dyn Fn(&Path) -> hypnos::ml::Result<()>| {
        let file = dir.path().join("file");
        save(&file).expect("a file");
        std::fs::read(&file).expect("bytes")
    };
    let served = |state: &State| bytes(&|file| state.save_weights(file, bench.hash(), &bench.recipe));
    let last = |state: &State| bytes(&|file| state.save_last_weights(file, bench.hash(), &bench.recipe));
    let whole = |state: &State| bytes(&|file| state.save(file, bench.hash(), &bench.recipe));
    let (good, poor, best) = (Trial::new(2, 0.8, 0.9), Trial::new(3, 0.9, 0.1), Trial::new(4, 0.9, 0.9));

    let mut state = begin("first");
    bench.run(&mut state, 2).expect("steps");
    let at_two = last(&state);
    assert_eq!((state.served_step(), served(&state) == at_two), (2, true), "nothing was tried yet");
    state.add_trial(good);
    let just_tried = whole(&state);
    bench.run(&mut state, 3).expect("steps");
    state.add_trial(poor);
    assert_eq!(state.served_step(), 2);
    assert!(served(&state) == at_two && last(&state) != at_two);
    let drawn = |models: Models| {
        let ids = [models.tokenizer.encode("a photo of sks mug")];
        models.text.forward(&ids).and_then(|x| x.flatten_all()?.to_vec1::<f32>()).expect("hidden states")
    };
    let (of_best, of_last) =
        (state.served(&bench.bundle, &bench.base), state.frozen(&bench.bundle, &bench.base));
    assert_ne!(drawn(of_best.expect("models")), drawn(of_last.expect("models")));

    // From a checkpoint of the trial's own step and from one after it, everything goes on alike.
    let after = whole(&state);
    for (checkpoint, tried) in [(&just_tried, vec![good]), (&after, vec![good, poor])] {
        let file = dir.path().join("checkpoint");
        std::fs::write(&file, checkpoint).expect("a file");
        let mut resumed = begin(if tried.len() == 1 { "second" } else { "third" });
        resumed.resume(&file, bench.hash(), &bench.recipe).expect("a state");
        assert_eq!(resumed.trials(), tried);
        assert!(whole(&resumed) == *checkpoint && served(&resumed) == at_two);
        if tried.len() == 1 {
            bench.run(&mut resumed, 3).expect("steps");
            resumed.add_trial(poor);
        }
        assert!(whole(&resumed) == after);
    }
    bench.run(&mut state, 4).expect("steps");
    assert!(served(&state) == at_two);
    assert_eq!(dir.path().join("first/best.safetensors").exists(), in_a_file);
    state.add_trial(best);
    assert_eq!(state.served_step(), 4);
    assert!(served(&state) == last(&state));
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
    let narrow = Recipe { adamw_moments: MomentFormat::Bits8, ..bench.recipe.clone() };
    let mut refused = |file: &Path, bundle: &str, recipe: &Recipe, wanted: &str| {
        let words = state.resume(file, bundle, recipe).expect_err("refused").to_string();
        assert!(words.contains(wanted) && !words.contains('\n'), "{words}");
    };
    refused(&file, "0123456789abcdef", &bench.recipe, "was trained from another bundle");
    refused(&file, bench.hash(), &other, "lr is 0.0001 there and 0.0002 here");
    refused(&file, bench.hash(), &narrow, "adamw_moments is not set there and \"8bit\" here");
    refused(&weights, bench.hash(), &bench.recipe, "is of format \"hypnos weights 1\"");
    let words = FineTuned::load(&file, &bench.bundle, &bench.base).expect_err("refused").to_string();
    assert!(words.contains("is of format \"hypnos checkpoint 2\""), "{words}");
}

#[test]
fn a_checkpoint_goes_on_in_any_precision_and_says_in_which_it_was_made() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("a checkpoint");
    let saved = |state: &State| {
        state.save(&file, bench.hash(), &bench.recipe).expect("a file");
        TensorFile::open(&file).expect("a file").metadata().get("precision").cloned()
    };
    let resumed = |precision| {
        let mut state = bench.state_in(precision);
        state.resume(&file, bench.hash(), &bench.recipe).expect("goes on");
        state
    };
    let names = |state: &State| Precision::names(state.precisions());
    // Files of f32 are those of the builds that had nothing else.
    assert_eq!(saved(&bench.state_in(Precision::F32)), None);
    assert_eq!(names(&resumed(Precision::F32)), "f32");
    let changed = resumed(Precision::Bf16);
    assert_eq!(names(&changed), "f32, bf16");
    assert_eq!(saved(&changed).as_deref(), Some("f32, bf16"));
    assert_eq!(names(&resumed(Precision::Bf16)), "f32, bf16");
    assert_eq!(names(&resumed(Precision::F32)), "f32, bf16, f32");
    assert_eq!(saved(&bench.state_in(Precision::Bf16)).as_deref(), Some("bf16"));
    let (before, after) = (bench.state_in(Precision::Bf16), resumed(Precision::F32));
    assert!(values(&before) == values(&after), "what learns is f32");
}

#[test]
fn a_loss_that_is_not_a_number_changes_no_weight() {
    let mut bench = Bench::new();
    bench.run(&mut bench.state(false), 1).expect("sound data");
    let photo = &mut bench.data.instances[0].moments;
    photo.mean = (&photo.mean * f64::NAN).expect("not numbers");
    bench.data.instances.truncate(1);
    let mut state = bench.state(false);
    let before =
        values(&state).into_iter().map(|(name, bits)| (name.clone(), bits)).collect::<BTreeMap<_, _>>();
    let error = bench.run(&mut state, 4).expect_err("diverged");
    assert!(matches!(error, Error::Diverged { step: 1 }), "{error}");
    assert_eq!(state.n_steps(), 0);
    assert!(values(&state).into_iter().all(|(name, bits)| before[name] == bits));
}

#[test]
fn gradient_checkpointing_takes_the_same_steps() {
    let bench = Bench::new();
    let (mut kept, mut again) = (bench.state(false), bench.state(true));
    bench.run(&mut kept, 3).expect("steps");
    bench.run(&mut again, 3).expect("steps");
    // Gradients that meet are added in another order, so the last bits differ.
    let near = |a: f32, b: f32| (a - b).abs() <= 1e-5 * b;
    for (one, other) in kept.history().iter().zip(again.history()) {
        assert!(near(one.loss, other.loss) && near(one.grad_norm, other.grad_norm), "{one:?}, {other:?}");
    }
}

#[test]
fn without_class_images_only_the_photos_count() {
    let mut bench = Bench::new();
    let mut with = bench.state(false);
    bench.run(&mut with, 1).expect("a step");
    bench.data.class_images.clear();
    let mut without = bench.state(false);
    bench.run(&mut without, 1).expect("a step");
    assert!(without.history()[0].loss < with.history()[0].loss, "one loss less in the sum");
    bench.data.instances.clear();
    let error = bench.run(&mut without, 4).expect_err("nothing to learn from").to_string();
    assert!(error.contains("no photos"), "{error}");
}

/// The photos' loss at noise that no step of the training drew.
fn loss_of(bench: &Bench, models: &Models) -> f64 {
    let losses = (0..8_u64).map(|i| {
        let photo = &bench.data.instances[i as usize % 3].moments;
        let noise = random::normal(99, i, 4 * 16 * 16);
        let batch = Batch {
            latents: (&photo.mean * models.vae.scaling_factor()).expect("latents"),
            noise: Tensor::from_vec(noise, (1, 4, 16, 16), &Device::Cpu).expect("noise"),
            t: vec![60 + 120 * i as usize],
            ids: vec![models.tokenizer.encode(&bench.recipe.photo_prompt())],
            reference: None,
            crop: None,
        };
        let frozen = FrozenModels { schedule: &models.schedule, vae: None, perceptual: None };
        let models =
            losses::LossModels { text: &models.text, unet: &models.unet, frozen, discriminator: None };
        let found = losses(&models, &batch, &Objective::dreambooth(1.0)).expect("losses");
        f64::from(found.total.to_scalar::<f32>().expect("a number"))
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
    let png = image_io::png(&pixels, (96, 48), &[]).expect("a PNG");
    let row = |side: usize| -> Vec<f32> {
        let photo = image_io::center_square(&image_io::read_png(&png).expect("a photo"), side);
        assert_eq!(photo.dimensions(), (side as u32, side as u32));
        let row = image_io::signed(&photo)
            .expect("a tensor")
            .flatten_to(2)
            .and_then(|rows| rows.get(side / 2)?.to_vec1());
        row.expect("a row of the red channel")
    };
    let exact = row(48);
    let near = |part: &[f32], wanted: f32| part.iter().all(|&v| (v - wanted).abs() < 1e-6);
    assert!(near(&exact[..8], -1.0) && near(&exact[8..40], 1.0) && near(&exact[40..], 128.0 / 127.5 - 1.0));
    let half = row(24);
    assert!(half[..3].iter().all(|&v| v < -0.9) && half[6..18].iter().all(|&v| v > 0.9));
    let mean: f32 = half.iter().sum::<f32>() / 24.0;
    assert!((mean - exact.iter().sum::<f32>() / 48.0).abs() < 0.02, "shrinking keeps the brightness: {mean}");
    assert!(image_io::read_png(b"no picture").is_err());
}
