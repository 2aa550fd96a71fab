//! `hypnos segment`: writes a mask of every photo with its quality, and says which photos cannot be used. The masks
//! themselves are tested in `method.rs`; here the segmenter has the golden's random weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use hypnos::ml::bundle::Bundle;
use hypnos::ml::image_io;
use hypnos::ml::segment::segment;
use hypnos::ml::weights::save;
use serde_json::Value;
use tempfile::TempDir;

use crate::bundles::copy;
use crate::cli_train::{bundle, scratch};
use crate::golden::{Golden, path};

/// The miniature with the golden's segmenter, its last bias raised by `raised`.
pub(crate) fn segmenting(raised: f64) -> TempDir {
    let dir = scratch();
    copy(&bundle(), dir.path());
    let part = dir.path().join("segmenter");
    if part.exists() {
        fs::remove_dir_all(&part).expect("a directory");
    }
    fs::create_dir(&part).expect("a directory");
    let config: Value = Golden::open("tracer").metadata("config");
    fs::write(part.join("config.json"), config.to_string()).expect("a config");
    let all = candle_core::safetensors::load(path("tracer.safetensors"), &Device::Cpu).expect("a golden");
    let named = all.into_iter().filter_map(|(name, t)| Some((name.strip_prefix("weight.")?.to_owned(), t)));
    let mut tensors: BTreeMap<String, Tensor> = named.collect();
    let bias = tensors.get_mut("ObjectAttention1.conv1.bn.bias").expect("the last bias");
    *bias = (&*bias + raised).expect("a tensor");
    save(&part.join("model.safetensors"), &tensors, &BTreeMap::new(), DType::F32).expect("weights");
    dir
}

/// The golden's photo as a file.
fn photo(file: PathBuf) -> PathBuf {
    let photo = Golden::open("tracer").get("input.all.photo");
    let (h, w, _) = photo.dims3().expect("a photo");
    let bytes = photo.flatten_all().and_then(|p| p.to_vec1::<u8>()).expect("bytes");
    fs::write(&file, image_io::png(&bytes, (w, h), &[]).expect("a PNG")).expect("a file");
    file
}

fn run(bundle: &Path, photos: &[&Path], out: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
    command.arg("segment").arg("--bundle").arg(bundle).arg("--photos").args(photos).arg("--out").arg(out);
    command.output().expect("the program runs")
}

fn lines(bytes: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect()
}

fn reported_photos(out: &Path) -> Vec<Value> {
    let text = fs::read(out.join("masks.json")).expect("a list");
    let list: Value = serde_json::from_slice(&text).expect("JSON");
    list["photos"].as_array().expect("photos").clone()
}

#[test]
fn each_photo_gets_a_mask_a_cut_out_and_a_line() {
    let (bundle, dir) = (segmenting(0.0), scratch());
    let (photos, out) = (dir.path().join("photos"), dir.path().join("out"));
    fs::create_dir(&photos).expect("a directory");
    photo(photos.join("a.png"));
    fs::write(photos.join("notes.txt"), "no photo").expect("a file");
    let other = photo(dir.path().join("a.PNG")); // of the same name, from elsewhere
    let done = run(bundle.path(), &[&photos, &other], &out);
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));

    let device = Device::Cpu;
    let tracer = Bundle::open(bundle.path()).and_then(|b| b.segmenter(&device)).expect("a segmenter");
    let pixels = image_io::read_png(&fs::read(&other).expect("a file")).expect("a photo");
    let (mask, stats) = segment(&tracer, &pixels, &device).expect("a mask").cleaned();
    assert_eq!(stats.refusal(), None);
    let said = lines(&done.stdout);
    assert_eq!(said.len(), 2);
    let wanted = format!("a product on {:.1} % of it, confidence", stats.area * 100.0);
    assert!(
        said.iter().all(|line| line.contains(&wanted) && line.contains("; the product touches")),
        "{said:?}"
    );
    for (entry, name) in reported_photos(&out).iter().zip(["a", "a-2"]) {
        let read = |key: &str| {
            let file = out.join(entry[key].as_str().expect("a name"));
            image_io::read_png(&fs::read(file).expect("a file")).expect("a picture")
        };
        assert_eq!(entry["mask"], format!("{name}-mask.png"));
        assert!(read("mask") == mask.picture() && read("cut_out") == mask.cut_out(&pixels));
        assert_eq!(entry["area"].as_f64(), Some(stats.area));
        assert_eq!(entry["confidence"].as_f64(), Some(stats.confidence));
        assert_eq!(entry["touches"].as_array().map(Vec::len), Some(stats.touches.len()));
        assert_eq!(entry["warnings"].as_array().map(Vec::len), Some(stats.warnings().len()));
        assert!(entry["refusal"].is_null() && entry["things"].is_u64());
    }
}

#[test]
fn one_unusable_photo_does_not_hide_the_others() {
    let (bundle, dir) = (segmenting(0.0), scratch());
    let (good, out) = (photo(dir.path().join("good.png")), dir.path().join("out"));
    let whole = fs::read(&good).expect("a photo");
    let torn = dir.path().join("torn.png");
    fs::write(&torn, &whole[..whole.len() / 2]).expect("half a photo");
    let nowhere = dir.path().join("nowhere.png");
    let done = run(bundle.path(), &[&torn, &nowhere, &good], &out);
    let errors: Vec<String> =
        lines(&done.stderr).into_iter().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(done.status.code(), Some(2), "{errors:?}");
    assert_eq!((errors.len(), lines(&done.stdout).len()), (2, 1), "{errors:?}");
    assert!(errors[0].contains("torn.png: the file is cut short"), "{errors:?}");
    assert!(errors[1].contains("nowhere.png: cannot be read"), "{errors:?}");
    let photos = reported_photos(&out);
    assert!(
        photos[0]["refusal"].is_string()
            && photos[1]["refusal"].is_string()
            && photos[2]["refusal"].is_null()
    );
    assert!(out.join("good-mask.png").is_file() && !out.join("torn-mask.png").exists());
}

#[test]
fn a_photo_without_a_background_is_refused_and_its_mask_is_written() {
    let (bundle, dir) = (segmenting(60.0), scratch());
    let (file, out) = (photo(dir.path().join("full.png")), dir.path().join("out"));
    let done = run(bundle.path(), &[&file], &out);
    let errors: Vec<String> =
        lines(&done.stderr).into_iter().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!((done.status.code(), errors.len()), (Some(2), 1), "{errors:?}");
    assert!(
        errors[0].contains("full.png: no background was found in it (foreground: 100.0 %)"),
        "{errors:?}"
    );
    assert_eq!(reported_photos(&out)[0]["area"].as_f64(), Some(1.0));
    assert!(out.join("full-mask.png").is_file() && out.join("full-cut-out.png").is_file());
}

#[test]
fn a_missing_segmenter_or_photo_is_one_line() {
    let (plain, dir) = (segmenting(0.0), scratch());
    fs::remove_dir_all(plain.path().join("segmenter")).expect("a directory");
    let (file, out) = (photo(dir.path().join("a.png")), dir.path().join("out"));
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).expect("a directory");
    for (bundle, photos, wanted) in [
        (plain.path(), &file, "segmenter: is missing: no product is found in photos"),
        (segmenting(0.0).path(), &empty, "empty: has no photos; wanted PNG, JPEG or WebP"),
    ] {
        let done = run(bundle, &[photos], &out);
        let errors = lines(&done.stderr);
        assert_eq!((done.status.code(), errors.len()), (Some(2), 1), "{errors:?}");
        assert!(errors[0].contains(wanted), "{errors:?}");
        assert!(!out.exists(), "nothing was begun");
    }
}
