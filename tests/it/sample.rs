//! Image generation against diffusers, from the tokens to the pixels, and through the command `hypnos sample`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{Device, Tensor};
use hypnos::ml::Interrupt;
use hypnos::ml::bundle::Bundle;
use hypnos::ml::precision::Precision;
use hypnos::ml::sample::{ImageRequest, Models, SampleSettings, decode, initial_noise, latents};
use hypnos::ml::samplers::{self, Sampler};

use crate::golden::{Golden, OUTPUT, assert_close};
use crate::provenance::png_texts;

fn miniature() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/bundle")
}

fn models() -> Models {
    Models::load(&Bundle::open(&miniature()).expect("a bundle"), &Device::Cpu, Precision::F32)
        .expect("models")
}

fn settings(sampler: Sampler, steps: usize) -> SampleSettings {
    SampleSettings { sampler, steps, guidance: 7.5, width: 64, height: 64 }
}

/// An observer that never stops anything.
fn go_on() -> impl FnMut(usize, usize) -> Result<(), Interrupt<()>> {
    |_, _| Ok(())
}

/// Sampled pixels may differ by this much where a batch changes the order of sums.
const PIXEL: i16 = 1;

#[test]
fn every_sampler_draws_what_diffusers_draws() {
    let (golden, models) = (Golden::open("pictures"), models());
    let (prompts, negatives): (Vec<String>, Vec<String>) =
        (golden.metadata("prompts"), golden.metadata("negatives"));
    let pictures: Vec<ImageRequest> = (prompts.into_iter().zip(negatives))
        .map(|(prompt, negative)| ImageRequest { prompt, negative, seed: 0 })
        .collect();
    let noise = golden.get("input.noise");
    for (name, sampler) in [
        ("ddim", Sampler::Ddim),
        ("pndm", Sampler::Pndm),
        ("dpmpp_2m", Sampler::Dpmpp2m),
        ("dpmpp_2m_karras", Sampler::Dpmpp2mKarras),
        ("euler", Sampler::Euler),
    ] {
        let drawn =
            latents(&models, &pictures, &settings(sampler, 20), &noise, &mut go_on()).expect("latents");
        assert_close(name, &drawn, &golden.get(&format!("output.{name}.latents")), OUTPUT);
        if name == "ddim" {
            let picture = models.vae.decode(&drawn).expect("a picture");
            assert_close("picture", &picture, &golden.get("output.ddim.image"), OUTPUT);
        }
    }
}

#[test]
fn euler_ancestral_with_the_reference_s_noise_draws_what_diffusers_draws() {
    let (golden, models) = (Golden::open("pictures"), models());
    let encode = |key: &str| -> Tensor {
        let texts: Vec<String> = golden.metadata(key);
        let ids: Vec<Vec<u32>> = texts.iter().map(|text| models.tokenizer.encode(text)).collect();
        models.text.forward(&ids).expect("hidden states")
    };
    let (without, with) = (encode("negatives"), encode("prompts"));
    let mut predict = |x: &Tensor, t: f64| {
        let without = models.unet.forward(x, &[t, t], &without)?;
        let with = models.unet.forward(x, &[t, t], &with)?;
        &without + ((with - &without)? * 7.5)?
    };
    let draws = golden.get("input.draws");
    let mut step_noise = |step: usize| draws.get(step);
    let drawn = samplers::sample(
        Sampler::EulerAncestral,
        &models.schedule,
        20,
        &golden.get("input.noise"),
        &mut predict,
        &mut step_noise,
        &mut go_on(),
    );
    let drawn = drawn.expect("latents");
    assert_close("euler_a", &drawn, &golden.get("output.euler_a.latents"), OUTPUT);
}

#[test]
fn a_picture_is_the_same_alone_and_in_a_batch() {
    let models = models();
    let picture =
        |seed| ImageRequest { prompt: "a photo of a blue bottle".into(), negative: String::new(), seed };
    let draw = |pictures: &[ImageRequest]| {
        let settings = settings(Sampler::EulerAncestral, 6);
        let noise = initial_noise(pictures, settings.latent_dims(&models)).expect("noise");
        let drawn = latents(&models, pictures, &settings, &noise, &mut go_on()).expect("latents");
        decode(&models, &drawn).expect("pixels")
    };
    let together = draw(&[picture(3), picture(4), picture(5)]);
    assert_ne!(together[0], together[1]);
    let alone = draw(&[picture(4)]);
    let most = together[1].iter().zip(&alone[0]).map(|(a, b)| (i16::from(*a) - i16::from(*b)).abs()).max();
    assert!(most.expect("pixels") <= PIXEL, "off by {most:?}");
}

#[test]
fn sampling_can_be_stopped_between_steps() {
    let models = models();
    let pictures = [ImageRequest { prompt: "a mug".into(), negative: String::new(), seed: 1 }];
    let settings = settings(Sampler::Ddim, 5);
    let noise = initial_noise(&pictures, settings.latent_dims(&models)).expect("noise");
    let mut n_seen = 0;
    let drawn = latents(&models, &pictures, &settings, &noise, &mut |step, of| {
        assert_eq!(of, 5);
        n_seen = step;
        if step == 2 { Err(Interrupt::Stopped(())) } else { Ok(()) }
    });
    assert!(matches!(drawn, Err(Interrupt::Stopped(()))), "{drawn:?}");
    assert_eq!(n_seen, 2);
}

/// `hypnos sample` with a prompt, few steps and whatever else is given.
fn hypnos_sample(out: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
    let (out, miniature) = (out.to_str().expect("Unicode").to_string(), miniature());
    let usual = [
        ("--bundle", miniature.to_str().expect("Unicode")),
        ("--prompt", "a photo of a red mug"),
        ("--steps", "3"),
        ("--guidance", "2"),
        ("--out", &out),
    ];
    command.arg("sample");
    for (option, value) in usual.into_iter().filter(|(option, _)| !more.contains(option)) {
        command.args([option, value]);
    }
    command.args(more).output().expect("the program runs")
}

#[test]
fn a_picture_carries_its_parameters_and_its_latents_can_be_kept() {
    let out = tempfile::tempdir().expect("a directory");
    let kept = out.path().join("kept.safetensors");
    let kept_text = kept.to_str().expect("a path in Unicode");
    let run =
        hypnos_sample(out.path(), &["--seed", "41", "-n", "2", "--batch", "1", "--save-latents", kept_text]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let file = std::fs::read(out.path().join("42.png")).expect("the second picture");
    let reader = png::Decoder::new(std::io::Cursor::new(&file)).read_info().expect("a PNG");
    assert_eq!((reader.info().width, reader.info().height), (64, 64));
    let texts = png_texts(&file);
    let all: serde_json::Value = serde_json::from_str(&texts["hypnos"]).expect("JSON");
    assert_eq!((all["seed"].as_u64(), all["steps"].as_u64()), (Some(42), Some(3)));
    assert_eq!(all["prompt"], "a photo of a red mug");
    assert!(all.get("weights_sha256").is_none() && all.get("job").is_none(), "{all}");
    let model = &all["bundle_sha256"].as_str().expect("a hash")[..10];
    assert!(
        texts["parameters"].contains(&format!("Seed: 42, Size: 64x64, Model hash: {model}")),
        "{texts:?}"
    );
    let latents = candle_core::safetensors::load(&kept, &Device::Cpu).expect("latents");
    assert_eq!(latents["latents"].dims(), [2, 4, 16, 16]);
}

#[test]
fn given_noise_replaces_the_seeds() {
    let out = tempfile::tempdir().expect("a directory");
    let noise = out.path().join("noise.safetensors");
    let pictures = [ImageRequest { prompt: String::new(), negative: String::new(), seed: 7 }];
    let drawn = initial_noise(&pictures, [4, 16, 16]).expect("noise");
    candle_core::safetensors::save(&[("latents".to_string(), drawn)].into(), &noise).expect("a file");
    let by_seed = hypnos_sample(&out.path().join("a"), &["--seed", "7"]);
    let noise = noise.to_str().expect("a path in Unicode");
    let by_file = hypnos_sample(&out.path().join("b"), &["--seed", "1", "--latents", noise]);
    assert!(by_seed.status.success() && by_file.status.success());
    let pixels = |name: &str| {
        let file = std::fs::File::open(out.path().join(name)).expect("a picture");
        let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().expect("a PNG");
        let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
        reader.next_frame(&mut pixels).expect("pixels");
        pixels
    };
    assert_eq!(pixels("a/7.png"), pixels("b/1.png"));
}

#[test]
fn invalid_requests_end_with_one_line_and_exit_code_2() {
    let out = tempfile::tempdir().expect("a directory");
    let broken = out.path().join("broken.safetensors");
    std::fs::write(&broken, b"not tensors").expect("a file");
    let broken = broken.to_str().expect("a path in Unicode");
    for (more, wanted) in [
        (&["--steps", "0"][..], "steps: wanted 1 to 1000, got 0"),
        (&["--steps", "1001"], "steps: wanted 1 to 1000, got 1001"),
        (&["--width", "63"], "width: wanted a multiple of 4 above zero, got 63"),
        (&["--height", "0"], "height: wanted a multiple of 4 above zero, got 0"),
        (&["--guidance", "NaN"], "guidance: wanted a number from 0 on, got NaN"),
        (&["-n", "0"], "-n and --batch: wanted at least 1"),
        (&["--scheduler", "ddpm"], "ddim, pndm, dpmpp-2m, dpmpp-2m-karras, euler, euler-a"),
        (&["--device", "tpu"], "wanted cpu, cuda or cuda:N"),
        (&["--bundle", "/nowhere"], "/nowhere"),
        (&["--latents", broken], "broken.safetensors"),
        (&["--latents", "/nowhere.safetensors"], "/nowhere.safetensors"),
    ] {
        let run = hypnos_sample(&out.path().join("never"), more);
        let words = String::from_utf8_lossy(&run.stderr).into_owned();
        assert_eq!(run.status.code(), Some(2), "{more:?}: {words}");
        assert!(words.contains(wanted) && !words.contains("panicked"), "{more:?}: {words}");
    }
    assert!(!out.path().join("never").exists(), "nothing was begun");
}
