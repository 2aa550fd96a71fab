//! The metrics against the references' packages, from the pictures' pixels on: preprocessing, features, distances.
//!
//! `tests/golden/metrics.py` says what is compared, and how to compare networks of full size.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use hypnos::ml::Result;
use hypnos::ml::bundle::{Backbones, Bundle, check};
use hypnos::ml::metrics::preprocess::{Library, resize_and_center_crop, stretch};
use hypnos::ml::metrics::{
    Clip, Dino, Features, Inception, Lpips, clip, dino, frechet, inception, lpips, mean_paired_cosine,
    mean_pairwise_cosine, mean_self_cosine, psnr, ssim,
};
use hypnos::ml::models::clip::Clip as ClipNet;
use hypnos::ml::nn::{avg_pool2d, max_pool2d};
use hypnos::ml::param::Param;
use hypnos::ml::random;
use hypnos::ml::tokenizer::Tokenizer;
use hypnos::ml::weights::{Weights, save};
use image::RgbImage;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::bundles::copy;
use crate::golden::{Golden, OUTPUT, Place, assert_close, variable};

/// The pictures of a pair have the same size.
const PAIRS: [(usize, usize); 2] = [(0, 1), (2, 3)];

fn miniature() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::open(&miniature().join("tokenizer")).expect("the miniature's tokenizer")
}

/// The weight of this name and shape; `drawn` in `metrics.py`.
fn drawn(name: &str, dims: &[usize]) -> Vec<f32> {
    let seed = random::derive(0, name);
    let unit = random::uniform(seed, 0, dims.iter().product());
    let fan_in = dims.iter().skip(1).product::<usize>() as f64;
    let (is_weight, of_table) = (name.ends_with("weight"), name.ends_with("embedding.weight"));
    let kind: Box<dyn Fn(f32) -> f32> = match dims.len() {
        _ if name.ends_with("running_var") => Box::new(|u| 0.5 + u),
        _ if name.ends_with("bias") || name.ends_with("running_mean") => Box::new(|u| 0.1 * (2.0 * u - 1.0)),
        _ if name.starts_with("lin") => Box::new(|u| u),
        1 if is_weight => Box::new(|u| 1.0 + 0.2 * (2.0 * u - 1.0)),
        n if !is_weight || of_table && n == 2 => Box::new(|u| 0.5 * (2.0 * u - 1.0)),
        _ => Box::new(move |u| (6.0 / fan_in).sqrt() as f32 * (2.0 * u - 1.0)),
    };
    unit.into_iter().map(kind).collect()
}

/// Drawn weights for all that a model asks for; those that the golden brings stand in their place.
fn weights<M>(golden: &Golden, name: &str, device: &Device, load: impl Fn(&Weights) -> Result<M>) -> Weights {
    let tensors = tensors(golden, name, load);
    Weights::from_tensors(tensors.into_iter().collect(), device)
}

fn tensors<M>(golden: &Golden, name: &str, load: impl Fn(&Weights) -> Result<M>) -> BTreeMap<String, Tensor> {
    let meta = Weights::meta();
    load(&meta).expect("the shapes");
    let of = |(key, param): (String, Param)| {
        let value = golden.find(&format!("weight.{name}.{key}"));
        let drawn = || Tensor::from_vec(drawn(&key, &param.dims()), param.dims(), &Device::Cpu);
        let value = value.map_or_else(drawn, Ok).expect("a weight");
        (key, value)
    };
    meta.params().into_iter().map(of).collect()
}

fn pictures(golden: &Golden) -> Vec<RgbImage> {
    let found = (0..).map_while(|i| golden.find(&format!("input.picture.{i}")));
    let pictures: Vec<RgbImage> = found.map(|pixels| picture(&pixels)).collect();
    assert_eq!(pictures.len(), 5);
    pictures
}

fn picture(pixels: &Tensor) -> RgbImage {
    let (h, w, _) = pixels.dims3().expect("a picture");
    let bytes = pixels.flatten_all().and_then(|pixels| pixels.to_vec1()).expect("bytes");
    RgbImage::from_raw(w as u32, h as u32, bytes).expect("a picture")
}

fn of_golden<C: DeserializeOwned>(golden: &Golden, name: &str) -> C {
    golden.metadata(&format!("config.{name}"))
}

fn assert_features(what: &str, found: &Features, golden: &Golden, place: &Place) {
    let found = Tensor::new(found.values.clone(), &Device::Cpu).expect("features");
    assert_close(what, &found, &golden.get(&format!("output.{what}")), place.model_output);
}

fn assert_number(what: &str, found: f64, golden: &Golden) {
    let wanted = golden.scalar(&format!("output.{what}"));
    let off = (found - wanted).abs() / wanted.abs();
    eprintln!("{what}: off by {off:.2e}"); // the runner keeps it unless it is asked
    assert!(off <= OUTPUT, "{what}: {found}, wanted {wanted}, off by {off:.2e}");
}

/// The same bytes, pixel by pixel.
fn assert_middles(what: &str, pictures: &[RgbImage], resize: usize, library: Library, golden: &Golden) {
    let wanted = golden.get(&format!("output.{what}"));
    let crop = wanted.dim(1).expect("a side");
    for (i, photo) in pictures.iter().enumerate() {
        let found = resize_and_center_crop(photo, resize, crop, library);
        let wanted = picture(&wanted.get(i).expect("as many as pictures"));
        let n_off = found.as_raw().iter().zip(wanted.as_raw()).filter(|(a, b)| a != b).count();
        assert_eq!(n_off, 0, "{what}: picture {i}: bytes of {}", wanted.as_raw().len());
    }
}

fn part(features: &Features, range: std::ops::Range<usize>) -> Features {
    Features { values: features.values[range].to_vec() }
}

#[test]
fn dino_agrees_with_the_official_form() {
    dino_golden(&Place::cpu());
}

pub(crate) fn dino_golden(place: &Place) {
    let golden = Golden::open("metrics");
    let (config, pictures): (dino::Config, _) = (of_golden(&golden, "dino"), pictures(&golden));
    assert_middles("dino.middle", &pictures, config.resize.expect("a size"), Library::Pillow, &golden);
    let load = |w: &Weights| Dino::load(w, &config, &place.device);
    let model = load(&weights(&golden, "dino", &place.device, load)).expect("a network");
    let features = model.features(&pictures).expect("features");
    assert_features("dino.features", &features, &golden, place);
    let pairwise = mean_pairwise_cosine(&part(&features, 0..3), &part(&features, 3..5)).expect("a number");
    assert_number("dino.pairwise", pairwise, &golden);
    assert_number("dino.self", mean_self_cosine(&features).expect("a number"), &golden);
}

#[test]
fn clip_agrees_with_transformers() {
    clip_golden(&Place::cpu());
}

pub(crate) fn clip_golden(place: &Place) {
    let golden = Golden::open("metrics");
    let (config, pictures): (clip::Config, _) = (of_golden(&golden, "clip"), pictures(&golden));
    let side = config.net.vision_config.image_size;
    assert_middles("clip.middle", &pictures, side, Library::Torch, &golden);
    let source = weights(&golden, "clip", &place.device, |w| ClipNet::load(w, &config.net));
    let model = Clip::load(&source, &config, tokenizer(), &place.device).expect("a network");
    let images = model.images(&pictures).expect("features");
    assert_features("clip.images", &images, &golden, place);
    let texts: Vec<String> = golden.metadata("texts");
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let texts = model.texts(&texts).expect("features");
    assert_features("clip.texts", &texts, &golden, place);
    let pairwise = mean_pairwise_cosine(&part(&images, 0..3), &part(&images, 3..5)).expect("a number");
    assert_number("clip.pairwise", pairwise, &golden);
    let (found, wanted) =
        (mean_paired_cosine(&images, &texts).expect("a number"), golden.scalar("output.clip.paired"));
    eprintln!("clip.paired: off by {:.2e} of 1", (found - wanted).abs()); // of random weights it is about zero
    assert!((found - wanted).abs() <= OUTPUT, "clip.paired: {found}, wanted {wanted}");
}

#[test]
fn inception_and_fid_agree_with_pytorch_fid() {
    inception_golden(&Place::cpu());
}

pub(crate) fn inception_golden(place: &Place) {
    let golden = Golden::open("metrics");
    let (config, pictures): (inception::Config, _) = (of_golden(&golden, "inception"), pictures(&golden));
    let wanted = golden.get("output.inception.prepared"); // every seventh row
    for (i, photo) in pictures.iter().enumerate() {
        let rows: Vec<u32> = (0..config.image_size as u32).step_by(7).collect();
        let rows = Tensor::new(rows, &Device::Cpu).expect("rows");
        let found = stretch(photo, config.image_size).and_then(|x| Ok(x.index_select(&rows, 2)?));
        let wanted = wanted.narrow(0, i, 1).expect("as many as pictures");
        assert_close(&format!("stretched {i}"), &found.expect("a picture"), &wanted, 1e-5);
    }
    let load = |w: &Weights| Inception::load(w, &config, &place.device);
    let model = load(&weights(&golden, "inception", &place.device, load)).expect("a network");
    let found = model.features(&pictures).expect("features");
    for (depth, features) in [("pool64", &found.pool64), ("pool2048", &found.pool2048)] {
        assert_features(&format!("inception.{depth}"), features, &golden, place);
        let fid = frechet(&part(features, 0..3), &part(features, 2..5)).expect("a number");
        assert_number(&format!("inception.fid.{depth}"), fid, &golden);
    }
}

#[test]
fn lpips_agrees_with_its_package() {
    lpips_golden(&Place::cpu());
}

pub(crate) fn lpips_golden(place: &Place) {
    let golden = Golden::open("metrics");
    let pictures = pictures(&golden);
    for name in ["lpips_alex", "lpips_vgg"] {
        let config: lpips::Config = of_golden(&golden, name);
        let load = |w: &Weights| Lpips::load(w, &config, &place.device);
        let model = load(&weights(&golden, name, &place.device, load)).expect("a network");
        for (i, j) in PAIRS {
            let found = model.distance(&pictures[i], &pictures[j]).expect("a distance");
            assert_number(&format!("{name}.{i}-{j}"), found, &golden);
        }
        let same = model.distance(&pictures[0], &pictures[0]).expect("a distance");
        assert!(same.abs() < 1e-12, "{same}");
        let (i, j) = PAIRS[1];
        let turned = image::imageops::flip_horizontal(&pictures[i]);
        let among = model.mean_pairwise(&[pictures[i].clone(), pictures[j].clone(), turned]);
        assert_number(&format!("{name}.among"), among.expect("a mean"), &golden);
    }
}

#[test]
fn ssim_and_psnr_agree_with_scikit_image() {
    let golden = Golden::open("metrics");
    let pictures = pictures(&golden);
    for (i, j) in PAIRS {
        let (a, b) = (&pictures[i], &pictures[j]);
        assert_number(&format!("ssim.{i}-{j}"), ssim(a, b).expect("a number"), &golden);
        assert_number(&format!("psnr.{i}-{j}"), psnr(a, b).expect("a number"), &golden);
    }
    let own = &pictures[0];
    assert_eq!(ssim(own, own).expect("a number").to_bits(), 1.0_f64.to_bits());
    assert!(psnr(own, own).expect("a number").is_infinite());
}

#[test]
fn the_frechet_distance_agrees_with_pytorch_fid_for_many_and_for_few_rows() {
    let golden = Golden::open("metrics");
    for case in ["many", "few", "mixed"] {
        let rows = |side: &str| {
            let values = golden.get(&format!("input.frechet.{case}.{side}")).to_vec2().expect("rows");
            Features { values }
        };
        let (a, b) = (rows("a"), rows("b"));
        assert_number(&format!("frechet.{case}"), frechet(&a, &b).expect("a number"), &golden);
        assert!(frechet(&a, &a).expect("a number") < 1e-9 * golden.scalar(&format!("output.frechet.{case}")));
    }
}

#[test]
fn pools_agree_with_torch() {
    pools(&Place::cpu());
}

pub(crate) fn pools(place: &Place) {
    let golden = Golden::open("metrics");
    for (name, pool) in [("max", max_pool2d as fn(&_, _, _, _) -> _), ("avg", avg_pool2d)] {
        for (kernel, stride, padding) in [(3, 2, 0), (3, 1, 1), (2, 2, 0), (3, 2, 1)] {
            let case = format!("pool.{name}.{kernel}.{stride}.{padding}");
            let x = variable(&place.input(&golden.get("input.pool.x")));
            let y: Tensor = pool(x.as_tensor(), kernel, stride, padding).expect("a pool");
            assert_close(&case, &y, &golden.get(&format!("output.{case}")), place.operation.0);
            let w = place.input(&golden.get(&format!("input.{case}")));
            let grads = (y * w).and_then(|y| y.sum_all()?.backward()).expect("a backward");
            let grad = grads.get(&x).expect("a gradient");
            assert_close(&case, grad, &golden.get(&format!("grad.{case}")), place.operation.1);
        }
    }
    let x = golden.get("input.pool.x");
    assert!(max_pool2d(&x, 12, 1, 1).is_err() && max_pool2d(&x, 3, 0, 1).is_err());
    assert!(avg_pool2d(&x, 3, 1, 2).is_err(), "a window without a pixel has no mean");
}

#[test]
fn an_image_of_any_proportions_has_a_middle_square() {
    for library in [Library::Pillow, Library::Torch] {
        for (width, height) in [(1, 9000), (9000, 1), (1, 1), (37, 37)] {
            let plain = RgbImage::from_pixel(width, height, image::Rgb([10, 200, 255]));
            let found = resize_and_center_crop(&plain, 37, 32, library);
            assert_eq!(found.dimensions(), (32, 32));
            assert!(found.pixels().all(|pixel| pixel.0 == [10, 200, 255]), "{width} x {height}");
        }
    }
}

/// The miniature with all four backbones, whose weights are drawn.
fn bundle_with_backbones() -> TempDir {
    let golden = Golden::committed("metrics");
    let dir = tempfile::tempdir().expect("a directory");
    copy(&miniature(), dir.path());
    let cpu = Device::Cpu;
    let [dino, clip, inception, lpips] = ["dino", "clip", "inception", "lpips_alex"].map(|name| {
        let config: Value = of_golden(&golden, name);
        let part = name.split('_').next().expect("a name");
        fs::create_dir_all(dir.path().join("metrics").join(part)).expect("a directory");
        let file = dir.path().join("metrics").join(part).join("config.json");
        fs::write(file, config.to_string()).expect("a file");
        config
    });
    let put = |part: &str, tensors: BTreeMap<String, Tensor>| {
        let file = dir.path().join("metrics").join(part).join("model.safetensors");
        save(&file, &tensors, &BTreeMap::new(), DType::F32).expect("a file");
    };
    let dino = serde_json::from_value(dino).expect("a config");
    put("dino", tensors(&golden, "dino", |w| Dino::load(w, &dino, &cpu)));
    let clip: clip::Config = serde_json::from_value(clip).expect("a config");
    put("clip", tensors(&golden, "clip", |w| ClipNet::load(w, &clip.net)));
    let inception = serde_json::from_value(inception).expect("a config");
    put("inception", tensors(&golden, "inception", |w| Inception::load(w, &inception, &cpu)));
    let lpips = serde_json::from_value(lpips).expect("a config");
    put("lpips", tensors(&golden, "lpips_alex", |w| Lpips::load(w, &lpips, &cpu)));
    dir
}

/// Changes the weights of a backbone of that bundle.
fn retensor(dir: &TempDir, part: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let file = dir.path().join("metrics").join(part).join("model.safetensors");
    let mut tensors =
        candle_core::safetensors::load(&file, &Device::Cpu).expect("a file").into_iter().collect();
    change(&mut tensors);
    save(&file, &tensors, &BTreeMap::new(), DType::F32).expect("a file");
}

fn backbones(dir: &Path) -> Result<Backbones> {
    Backbones::load(&Bundle::open(dir)?, &Device::Cpu)
}

#[test]
fn a_bundle_brings_its_backbones_each_with_its_name_and_hash() {
    let golden = Golden::committed("metrics");
    let none = backbones(&miniature()).expect("a bundle without");
    assert!(none.dino.is_none() && none.clip.is_none() && none.inception.is_none() && none.lpips.is_none());

    let dir = bundle_with_backbones();
    assert_eq!(check(dir.path()).errors, []);
    let all = backbones(dir.path()).expect("a bundle with all four");
    let (dino, clip) = (all.dino.expect("DINO"), all.clip.expect("CLIP"));
    let (inception, lpips) = (all.inception.expect("Inception"), all.lpips.expect("LPIPS"));
    assert_eq!(
        [&dino.name, &clip.name, &inception.name, &lpips.name].map(String::as_str),
        [
            "DINO ViT-2x48/8",
            "CLIP ViT-2x48/8",
            "Inception-v3 of 2015-12-05, channels over 16",
            "LPIPS 0.1 AlexNet, channels over 8"
        ]
    );
    let bytes = fs::read(dir.path().join("metrics/clip/model.safetensors")).expect("a file");
    let hash: Vec<String> = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(clip.sha256, hash.concat());
    let photos = pictures(&golden);
    let place = Place::cpu();
    assert_features("dino.features", &dino.model.features(&photos).expect("features"), &golden, &place);
    assert_features("clip.images", &clip.model.images(&photos).expect("features"), &golden, &place);
}

#[test]
fn each_problem_of_a_backbone_is_one_line() {
    let dir = bundle_with_backbones();
    // A whole classifier's file serves: what is beyond the trunk is left alone.
    retensor(&dir, "inception", |tensors| {
        tensors
            .insert("fc.weight".into(), Tensor::zeros((1008, 128), DType::F32, &Device::Cpu).expect("zeros"));
    });
    assert_eq!(check(dir.path()).errors, []);
    retensor(&dir, "dino", |tensors| {
        tensors.remove("blocks.1.norm2.bias");
    });
    retensor(&dir, "lpips", |tensors| {
        tensors.insert(
            "lin0.model.1.weight".into(),
            Tensor::zeros((1, 9, 1, 1), DType::F32, &Device::Cpu).expect("zeros"),
        );
    });
    let config = dir.path().join("metrics/clip/config.json");
    let mut clip: Value = serde_json::from_slice(&fs::read(&config).expect("a file")).expect("JSON");
    clip["vision_config"]["patch_size"] = 7.into();
    fs::write(&config, clip.to_string()).expect("a file");
    let found: Vec<String> = check(dir.path()).errors.iter().map(ToString::to_string).collect();
    let at = |file: &str| format!("{}/metrics/{file}: ", dir.path().display());
    assert_eq!(
        found,
        [
            at("dino/model.safetensors")
                + "tensor `blocks.1.norm2.bias` of shape [48] is missing (there is `blocks.0.norm2.bias`)",
            at("clip/config.json") + "patch_size is 7, wanted a divisor of image_size",
            at("lpips/model.safetensors")
                + "tensor `lin0.model.1.weight` has shape [1, 9, 1, 1], but [1, 8, 1, 1] is wanted",
        ]
    );
    let error = backbones(dir.path()).expect_err("a broken bundle").to_string();
    assert_eq!(error, found[0]);
}

#[test]
fn a_text_encoder_that_has_another_vocabulary_is_refused() {
    let dir = bundle_with_backbones();
    let config = dir.path().join("metrics/clip/config.json");
    let mut clip: Value = serde_json::from_slice(&fs::read(&config).expect("a file")).expect("JSON");
    clip["text_config"]["vocab_size"] = 900.into();
    fs::write(&config, clip.to_string()).expect("a file");
    let error = backbones(dir.path()).expect_err("another vocabulary").to_string();
    let wanted = "metrics/clip: the bundle's tokenizer has 902 tokens and texts of 77, but its text encoder reads 900 and 77";
    assert_eq!(error, wanted);
    clip["vision_config"]["hidden_size"] = 2_000_000.into();
    fs::write(&config, clip.to_string()).expect("a file");
    let error = backbones(dir.path()).expect_err("a huge size").to_string();
    assert!(error.ends_with("vision_config: hidden_size is 2000000; at most 1000000 is believed"), "{error}");
}

#[test]
fn features_that_are_not_finite_are_refused_with_the_image_s_index() {
    let dir = bundle_with_backbones();
    let huge = Tensor::new(&[f32::MAX; 48], &Device::Cpu).expect("numbers of which each is finite");
    retensor(&dir, "dino", |tensors| {
        tensors.insert("norm.weight".into(), huge);
    });
    let all = backbones(dir.path()).expect("a bundle");
    let photos = pictures(&Golden::committed("metrics"));
    let error = all.dino.expect("DINO").model.features(&photos).expect_err("no numbers").to_string();
    let wanted = "DINO: the features of number 1 are not finite; wanted numbers, so the weights or the picture are broken";
    assert_eq!(error, wanted);
    let rows = Features { values: vec![vec![1.0, 2.0], vec![1.0, f32::NAN]] };
    let error = frechet(&rows, &rows).expect_err("no numbers").to_string();
    assert_eq!(error, "Fréchet distance: the features of number 2 are not finite");
    let error = mean_pairwise_cosine(&rows, &rows).expect_err("no numbers").to_string();
    assert_eq!(error, "cosine: the features of number 2 are not finite");
}

#[test]
fn images_that_cannot_be_compared_are_refused_in_one_line() {
    let rows = |n: usize, width: usize| Features { values: vec![vec![1.0; width]; n] };
    let says = |result: Result<f64>, wanted: &str| {
        assert_eq!(result.expect_err("nothing to compare").to_string(), wanted);
    };
    says(frechet(&rows(1, 4), &rows(3, 4)), "Fréchet distance: wanted at least 2, got 1");
    says(mean_self_cosine(&rows(1, 4)), "cosine: wanted at least 2, got 1");
    says(mean_pairwise_cosine(&rows(2, 4), &rows(0, 4)), "cosine: wanted at least 1, got 0");
    says(
        mean_pairwise_cosine(&rows(2, 4), &rows(2, 5)),
        "cosine: features of 4 and of 5 numbers; both must come from one backbone",
    );
    says(
        mean_paired_cosine(&rows(2, 4), &rows(3, 4)),
        "cosine: 2 rows and 3; wanted as many of both, in pairs",
    );
    let zero = Features { values: vec![vec![0.0; 4]] };
    says(mean_pairwise_cosine(&rows(2, 4), &zero), "cosine: the features of number 1 are all zero");
    let (wide, high, small) = (RgbImage::new(40, 32), RgbImage::new(32, 40), RgbImage::new(40, 10));
    says(ssim(&wide, &high), "SSIM: pictures of 40 x 32 and of 32 x 40; wanted two of one size");
    says(psnr(&wide, &high), "PSNR: pictures of 40 x 32 and of 32 x 40; wanted two of one size");
    says(ssim(&small, &small), "SSIM: pictures of 40 x 10; wanted at least 11 pixels a side");
    let lpips = backbones(bundle_with_backbones().path()).expect("a bundle").lpips.expect("LPIPS").model;
    says(lpips.distance(&wide, &high), "LPIPS: pictures of 40 x 32 and of 32 x 40; wanted two of one size");
    says(
        lpips.distance(&small, &small),
        "LPIPS: a picture of 40 x 10; this trunk wants at least 31 pixels a side",
    );
    says(lpips.mean_pairwise(&[wide]), "LPIPS: wanted at least 2 pictures, got 1");
}
