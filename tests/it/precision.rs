//! What models compute in: what a CPU refuses, what weights are held in, and what a picture says of it.

use candle_core::{DType, Device};
use hypnos::ml::bundle::Bundle;
use hypnos::ml::device::{compute_capability, open_in};
use hypnos::ml::precision::Precision;
use hypnos::ml::provenance::Provenance;
use hypnos::ml::sample::{ImageRequest, SampleSettings};
use hypnos::ml::samplers::Sampler;
use hypnos::ml::weights::Weights;
use serde_json::Value;

use crate::cli_train::{bundle, demo_photos, hypnos, refused, scratch, text};

#[test]
fn a_cpu_computes_in_f32_and_every_command_refuses_another_precision_in_one_line() {
    let opened = |asked| open_in("cpu", asked).map(|(_, precision)| precision).ok();
    assert_eq!([opened(None), opened(Some(Precision::F32))], [Some(Precision::F32); 2]);
    assert_eq!([opened(Some(Precision::Tf32)), opened(Some(Precision::Bf16))], [None; 2]);
    assert_eq!(compute_capability(&Device::Cpu).unwrap(), None);

    let (dir, bundle, photos) = (scratch(), bundle(), demo_photos());
    let (out, bundle, photos) = (dir.path().join("out"), text(&bundle), text(&photos));
    let (out, data) = (text(&out), dir.path().join("data"));
    let subject = format!("{photos}=mug");
    for words in [
        &["sample", "--prompt", "a mug", "--out", out][..],
        &["train", "--photos", photos, "--class-name", "mug", "--out", out],
        &["compare", "--recipes", "dreambooth", "--subjects", &subject, "--out", out],
        &["evaluate", "--photos", photos, "--model", "weights.safetensors"],
        &["models", "plan"],
        &["work", "--data", text(&data)],
    ] {
        let mut command = hypnos(words);
        let line = refused(command.args(["--bundle", bundle, "--precision", "bf16"]), 2);
        assert!(line.ends_with("precision: wanted f32 on a CPU, got bf16"), "{words:?}: {line}");
    }
    assert!(!dir.path().join("out").exists(), "nothing was written");
    let mut unknown = hypnos(&["sample", "--prompt", "a mug", "--out", out, "--precision", "f16"]);
    let out = unknown.output().unwrap();
    let words = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && words.contains("wanted one of f32, tf32, bf16"), "{words}");
}

#[test]
fn frozen_factors_are_held_in_the_precision_and_what_learns_in_f32() {
    let held = |precision, trainable, name: &str, shape: &[usize]| {
        let weights = Weights::random(1, &Device::Cpu).computing_in(precision).trainable(trainable);
        weights.get(name, shape).unwrap().value().dtype()
    };
    for (name, shape) in [("conv_in.weight", &[8, 4, 3, 3][..]), ("to_q.weight", &[8, 8])] {
        assert_eq!(held(Precision::Bf16, false, name, shape), DType::BF16, "{name}");
        assert_eq!(held(Precision::Bf16, true, name, shape), DType::F32, "{name}");
        assert_eq!(held(Precision::Tf32, false, name, shape), DType::F32, "{name}");
    }
    for (name, shape) in [("norm.weight", &[8][..]), ("token_embedding.weight", &[9, 8])] {
        assert_eq!(held(Precision::Bf16, false, name, shape), DType::F32, "{name}");
    }
}

#[test]
fn a_picture_says_what_it_was_computed_in_unless_that_is_f32() {
    let bundle = Bundle::open(&bundle()).unwrap();
    let request = ImageRequest { prompt: "a mug".into(), negative: String::new(), seed: 1 };
    let settings = SampleSettings { sampler: Sampler::Euler, steps: 2, guidance: 1.0, width: 64, height: 64 };
    let said = |precision| {
        let drawn = Provenance::new(&request, &settings, &bundle, None, false, precision).unwrap();
        let (_, json) = drawn.texts().into_iter().find(|(key, _)| *key == "hypnos").unwrap();
        serde_json::from_str::<Value>(&json).unwrap().get("precision").cloned()
    };
    assert_eq!(said(Precision::F32), None);
    assert_eq!(said(Precision::Tf32), Some("tf32".into()));
    assert_eq!(said(Precision::Bf16), Some("bf16".into()));
}
