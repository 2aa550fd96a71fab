//! Exports of fine-tuned models: other programs' tensor names, all weights, and no half-written files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use hypnos::ml::bundle::Bundle;
use hypnos::ml::export::ldm_names::{LdmNames, Place};
use hypnos::ml::models::clip::ClipText;
use hypnos::ml::models::unet::{self, Unet};
use hypnos::ml::models::vae::{self, Vae};
use hypnos::ml::tensorfile::TensorFile;
use hypnos::ml::weights::{Weights, save};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::bundles::copy;
use crate::cli_train::{bundle, demo_photos, hypnos, limited, refused, scratch, succeeds, text, train};

/// One tensor as diffusers' converter knows it: part, name in diffusers, name in a single file, shape there, and the row
/// of that at which it begins.
#[derive(Debug, Deserialize)]
struct Named(String, String, String, Vec<usize>, #[serde(default)] usize);

/// Configs and tensors of a golden.
fn golden(name: &str) -> (Value, Vec<Named>) {
    let path = crate::golden::path("ldm_names").join(format!("{name}.jsonl"));
    let text = fs::read_to_string(path).expect("the golden is committed");
    let (head, rows) = text.split_once('\n').expect("lines");
    let rows = rows.lines().map(|line| serde_json::from_str(line).expect("a tensor"));
    (serde_json::from_str(head).expect("configs"), rows.collect())
}

fn config<T: serde::de::DeserializeOwned>(configs: &Value, part: &str) -> T {
    serde_json::from_value(configs[part].clone()).expect("a config")
}

/// Name and shape of every weight that our models of these configs read, by part.
fn ours(configs: &Value) -> Vec<(&'static str, String, Vec<usize>)> {
    let parts = ["text_encoder", "unet", "vae"].map(|part| (part, Weights::meta()));
    ClipText::load(&parts[0].1, &config(configs, "text_encoder")).expect("a text encoder");
    Unet::load(&parts[1].1, &config(configs, "unet")).expect("a UNet");
    Vae::load(&parts[2].1, &config(configs, "vae")).expect("an autoencoder");
    let all = parts.iter().flat_map(|(part, weights)| {
        weights.params().into_iter().map(move |(name, param)| (*part, name, param.dims()))
    });
    all.collect()
}

#[test]
fn every_weight_has_the_name_and_the_shape_that_diffusers_converts_back() {
    for (name, n_wanted, n_theirs) in
        [("sd15", 1130, 1130), ("sd2", 1306, 1306 - 23 * 4), ("odd", 954, 954), ("miniature", 550, 550)]
    {
        let (configs, rows) = golden(name);
        let (unet, vae): (unet::Config, vae::Config) = (config(&configs, "unet"), config(&configs, "vae"));
        let names = LdmNames::new(&config(&configs, "text_encoder"), &unet, &vae);
        let wanted: BTreeSet<_> = rows
            .iter()
            .map(|Named(part, ours, name, shape, row)| {
                let place = Place { name: name.clone(), shape: shape.clone(), row: *row };
                (part.as_str(), ours.clone(), place)
            })
            .collect();
        let found: BTreeSet<_> = ours(&configs)
            .into_iter()
            .map(|(part, name, shape)| {
                let place = names.of(part, &name, &shape);
                (part, name, place)
            })
            .collect();
        let difference: Vec<_> = found.symmetric_difference(&wanted).take(4).collect();
        assert!(difference.is_empty(), "{name}: {difference:#?}");
        let theirs: BTreeSet<&String> = found.iter().map(|(_, _, place)| &place.name).collect();
        assert_eq!((found.len(), theirs.len()), (n_wanted, n_theirs), "{name}: no name twice");
    }
}

fn export(model: &Path, out: &Path, more: &[&str]) -> Command {
    export_of(&bundle(), model, out, more)
}

fn export_of(bundle: &Path, model: &Path, out: &Path, more: &[&str]) -> Command {
    let words = ["export", "--bundle", text(bundle), "--model", text(model), "--out", text(out)];
    hypnos(&[&words, more].concat())
}

/// The pixels of a picture of the product that `more` draws.
fn drawn(more: &[&str]) -> Vec<u8> {
    let out = scratch();
    let words = ["sample", "--steps", "3", "--guidance", "2", "--seed", "5", "--out", text(out.path())];
    succeeds(&mut hypnos(&[&words, more].concat()));
    let file = fs::File::open(out.path().join("5.png")).expect("a picture");
    let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
    reader.next_frame(&mut pixels).expect("pixels");
    pixels
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

const DREAMBOOTH: [&str; 4] = ["--method", "dreambooth", "--set", "steps=2"];
const BOTH: [&str; 4] = ["--as", "diffusers", "--as", "single-file"];
const PROMPT: [&str; 2] = ["--prompt", "a photo of {product}"];

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn a_training_exports_all_of_its_weights_in_both_forms() {
    let dir = scratch();
    let (out, again, small) = (dir.path().join("mug"), dir.path().join("again"), dir.path().join("small"));
    let forms = ["--export", "diffusers", "--export", "single-file"];
    succeeds(&mut train(&demo_photos(), &out, &[&DREAMBOOTH[..], &forms].concat()));
    let (weights, single) = (out.join("weights.safetensors"), out.join("single-file.safetensors"));
    let diffusers = out.join("diffusers");

    // 1. The directory is a bundle, and draws what the weights draw.
    let said = succeeds(&mut hypnos(&["models", "check", text(&diffusers)]));
    assert!(said.contains("a sound bundle for 64x64 pixels"), "{said}");
    let bundle = bundle();
    let of_weights = drawn(&[&["--bundle", text(&bundle), "--model", text(&weights)], &PROMPT[..]].concat());
    let of_export = drawn(&[&["--bundle", text(&diffusers)], &PROMPT[..]].concat());
    assert!(of_weights == of_export, "the export draws another picture");
    let by_words = ["--prompt", "a photo of sks mug"];
    assert!(of_export == drawn(&[&["--bundle", text(&diffusers)], &by_words[..]].concat()));
    assert!(
        of_export != drawn(&[&["--bundle", text(&bundle)], &by_words[..]].concat()),
        "nothing was learned"
    );
    let manifest: Value =
        serde_json::from_slice(&fs::read(diffusers.join("hypnos.json")).expect("a file")).expect("JSON");
    assert_eq!(
        (&manifest["product"]["token"], &manifest["product"]["class_name"]),
        (&"sks".into(), &"mug".into())
    );
    assert_eq!(manifest["files"]["unet/diffusion_pytorch_model.safetensors"]["licence"], "MIT OR Apache-2.0");
    assert!(
        !manifest["rare_tokens"].as_array().expect("tokens").contains(&"sks".into()),
        "it has a meaning now"
    );

    // 2. The single file, by the reference's names, has each weight to the bit.
    let file = TensorFile::open(&single).expect("a file");
    let learned = TensorFile::open(&weights).expect("a file");
    let vae = TensorFile::open(&bundle.join("vae/diffusion_pytorch_model.safetensors")).expect("a file");
    let (_, rows) = golden("miniature");
    assert_eq!(file.names().count(), rows.len());
    for Named(part, name, theirs, shape, _) in &rows {
        assert_eq!(file.shape(theirs), Some(shape.as_slice()), "{theirs}");
        let wanted = if part == "vae" { vae.read(name) } else { learned.read(&format!("{part}.{name}")) };
        let found = file.read(theirs).expect("a tensor");
        assert!(bits(found) == bits(wanted.expect("a tensor")), "{theirs} is another");
    }
    for (key, wanted) in [
        ("modelspec.sai_model_spec", "1.0.1"),
        ("modelspec.architecture", "latent-diffusion"),
        ("modelspec.implementation", "https://github.com/CompVis/stable-diffusion"),
        ("modelspec.title", "mug (sks), from miniature"),
        ("modelspec.resolution", "64x64"),
        ("modelspec.prediction_type", "epsilon"),
        ("modelspec.trigger_phrase", "sks mug"),
        ("modelspec.license", "MIT OR Apache-2.0"),
        ("hypnos.class_name", "mug"),
    ] {
        assert_eq!(file.metadata().get(key).map(String::as_str), Some(wanted), "{key}");
    }
    assert_eq!(file.metadata()["hypnos.bundle_sha256"], learned.metadata()["bundle"]);
    assert!(!file.metadata().contains_key("modelspec.date"), "there is no clock");
    let bytes = fs::read(&single).expect("a file");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let hash = Sha256::digest(&bytes[8 + header..]);
    let digits: Vec<String> = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(file.metadata()["modelspec.hash_sha256"], format!("0x{}", digits.concat()));

    // 3. The verb writes the same bytes, and does not write over them.
    let said = succeeds(&mut export(&weights, &again, &BOTH));
    assert_eq!(
        said.lines().collect::<Vec<_>>(),
        [text(&again.join("diffusers")), text(&again.join("single-file.safetensors"))]
    );
    for name in [
        "single-file.safetensors",
        "diffusers/unet/diffusion_pytorch_model.safetensors",
        "diffusers/hypnos.json",
    ] {
        assert!(
            fs::read(out.join(name)).expect("a file") == fs::read(again.join(name)).expect("a file"),
            "{name}"
        );
    }
    let line = refused(&mut export(&weights, &again, &BOTH), 2);
    assert_eq!(line, format!("{}: already exists; wanted a new path", again.join("diffusers").display()));

    // 4. Half the width, half the size, rounded as f16 rounds.
    succeeds(&mut export(&weights, &small, &["--as", "single-file", "--dtype", "f16"]));
    let narrow = TensorFile::open(&small.join("single-file.safetensors")).expect("a file");
    let name = "model.diffusion_model.out.2.weight";
    let rounded = |v: f32| half::f16::from_f32(v).to_f32();
    let wanted = file.read(name).expect("a tensor").into_iter().map(rounded).collect();
    assert!(bits(narrow.read(name).expect("a tensor")) == bits(wanted));
}

#[test]
fn a_learned_embedding_stands_in_the_row_of_its_token_and_all_else_is_the_bundle_s() {
    let dir = scratch();
    let out = dir.path().join("mug");
    let more = ["--method", "textual_inversion", "--set", "steps=2", "--export", "diffusers"];
    succeeds(&mut train(&demo_photos(), &out, &more));
    let (weights, diffusers, bundle) = (out.join("weights.safetensors"), out.join("diffusers"), bundle());
    for part in ["unet", "vae"] {
        let name = format!("{part}/diffusion_pytorch_model.safetensors");
        let read = |dir: &Path| fs::read(dir.join(&name)).expect("a file");
        assert!(read(&diffusers) == read(&bundle), "{part} is another");
    }
    let tensors = |dir: &Path| {
        let file = TensorFile::open(&dir.join("text_encoder/model.safetensors")).expect("a file");
        let read = |name: &str| (name.to_owned(), bits(file.read(name).expect("a tensor")));
        file.names().map(read).collect::<BTreeMap<_, _>>()
    };
    let (before, after) = (tensors(&bundle), tensors(&diffusers));
    let changed: Vec<&String> = before.keys().filter(|name| before[*name] != after[*name]).collect();
    assert_eq!(changed, ["text_model.embeddings.token_embedding.weight"]);
    let learned = TensorFile::open(&weights).expect("a file");
    let row = bits(learned.read("embedding.sks").expect("an embedding"));
    let rows = |tensors: &BTreeMap<String, Vec<u32>>| -> Vec<Vec<u32>> {
        tensors[changed[0]].chunks(row.len()).map(<[u32]>::to_vec).collect()
    };
    let others: Vec<(Vec<u32>, Vec<u32>)> =
        rows(&before).into_iter().zip(rows(&after)).filter(|(before, after)| before != after).collect();
    assert!(others.len() == 1 && others[0].1 == row, "{} rows are others", others.len());
    let of_weights = drawn(&[&["--bundle", text(&bundle), "--model", text(&weights)], &PROMPT[..]].concat());
    assert!(of_weights == drawn(&[&["--bundle", text(&diffusers)], &PROMPT[..]].concat()));
}

#[test]
fn a_failed_export_is_one_line_and_leaves_no_file() {
    let dir = scratch();
    let out = dir.path().join("mug");
    succeeds(&mut train(&demo_photos(), &out, &DREAMBOOTH));
    let (weights, place) = (out.join("weights.safetensors"), dir.path().join("place"));
    let refuse = |mut command: Command, wanted: &str| {
        let line = refused(&mut command, 2);
        assert!(line.contains(wanted), "{line}");
        assert!(!place.exists(), "{wanted}: left something");
    };
    let other = scratch();
    let random = "models random --like miniature --seed 1 --out".split(' ').chain([text(other.path())]);
    succeeds(&mut hypnos(&random.collect::<Vec<_>>()));
    refuse(export_of(other.path(), &weights, &place, &BOTH), "was trained from another bundle");
    let bundle = bundle();
    refuse(
        export(&bundle.join("unet/diffusion_pytorch_model.safetensors"), &place, &BOTH),
        "is of format \"pt\"",
    );
    refuse(export(&dir.path().join("nowhere"), &place, &BOTH), "nowhere: cannot be opened: no such file");

    let less = dir.path().join("less.safetensors");
    rewrite(&weights, &less, |tensors, _| drop(tensors.remove("unet.conv_in.bias")));
    refuse(
        export(&less, &place, &BOTH),
        "less.safetensors: tensor `unet.conv_in.bias` of shape [64] is missing",
    );

    // Weights that are no numbers, whether they were learned or go out with the bundle's.
    let (name, no_number) =
        ("unet.conv_in.bias", Tensor::full(f32::NAN, 64, &Device::Cpu).expect("a tensor"));
    let broken = dir.path().join("broken.safetensors");
    rewrite(&weights, &broken, |tensors, _| drop(tensors.insert(name.into(), no_number)));
    let wanted = "tensor `unet.conv_in.bias` has 64 values that are infinite or not a number";
    refuse(export(&broken, &place, &["--as", "diffusers"]), wanted);
    refuse(export(&broken, &place, &["--as", "single-file"]), wanted);
    let spoilt = scratch();
    copy(&bundle, spoilt.path());
    let vae = spoilt.path().join("vae/diffusion_pytorch_model.safetensors");
    let infinite = Tensor::full(f32::INFINITY, 8, &Device::Cpu).expect("a tensor");
    rewrite(&vae, &vae, |tensors, _| drop(tensors.insert("quant_conv.bias".into(), infinite)));
    let hash = Bundle::open(spoilt.path()).and_then(|b| Ok(b.hash()?.to_owned())).expect("a hash");
    rewrite(&weights, &broken, |_, about| drop(about.insert("bundle".into(), hash)));
    let wanted = "tensor `quant_conv.bias` has 8 values that are infinite or not a number";
    refuse(export_of(spoilt.path(), &broken, &place, &["--as", "diffusers"]), wanted);
    refuse(export_of(spoilt.path(), &broken, &place, &["--as", "single-file"]), wanted);

    // The UNet has more bytes than a file may grow to.
    for form in ["diffusers", "single-file"] {
        let plain = export(&weights, &place, &["--as", form]);
        refuse(limited(&plain, 8 * 1024), &format!("place/{form}"));
    }
}

/// Writes a file of weights again, changed.
fn rewrite(
    from: &Path,
    to: &Path,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut BTreeMap<String, String>),
) {
    let file = TensorFile::open(from).expect("a file");
    let read = |name: &str| {
        let (values, shape) = (file.read(name).expect("a tensor"), file.shape(name).expect("a shape"));
        (name.to_owned(), Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor"))
    };
    let (mut tensors, mut metadata) = (file.names().map(read).collect(), file.metadata().clone());
    change(&mut tensors, &mut metadata);
    save(to, &tensors, &metadata, DType::F32).expect("a file");
}

#[test]
fn a_bundle_without_a_manifest_is_exported_too() {
    let (dir, plain) = (scratch(), scratch());
    copy(&bundle(), plain.path());
    fs::remove_file(plain.path().join("hypnos.json")).expect("a file");
    let edit = |path: &str, pairs: &[(&str, Value)]| {
        let path = plain.path().join(path);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        pairs.iter().for_each(|(key, value)| config[*key] = value.clone());
        fs::write(path, config.to_string()).expect("a file");
    };
    let checker = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    edit("model_index.json", &[("safety_checker", checker), ("requires_safety_checker", true.into())]);
    edit("text_encoder/config.json", &[("dtype", "float16".into())]);
    let (out, theirs) = (dir.path().join("mug"), dir.path().join("theirs.safetensors"));
    succeeds(&mut train(&demo_photos(), &out, &DREAMBOOTH));
    let hash = Bundle::open(plain.path()).and_then(|b| Ok(b.hash()?.to_owned())).expect("a hash");
    rewrite(&out.join("weights.safetensors"), &theirs, |_, about| drop(about.insert("bundle".into(), hash)));

    let place = dir.path().join("place");
    let done = export_of(plain.path(), &theirs, &place, &BOTH).output().expect("the program runs");
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{errors}");
    assert!(errors.contains("warning: the bundle does not say what licence"), "{errors}");
    let json = |name: &str| -> Value {
        let bytes = fs::read(place.join("diffusers").join(name)).expect("a file");
        serde_json::from_slice(&bytes).expect("JSON")
    };
    let index = json("model_index.json");
    assert_eq!(
        (&index["safety_checker"], &index["requires_safety_checker"]),
        (&json!([null, null]), &json!(false))
    );
    assert_eq!(index["scheduler"], json!(["diffusers", "DDIMScheduler"]));
    assert_eq!(json("text_encoder/config.json")["dtype"], "float32", "or transformers would round them");
    let files = json("hypnos.json")["files"].clone();
    assert_eq!(files["unet/diffusion_pytorch_model.safetensors"]["licence"], "NOASSERTION");
    assert!(files.get("tokenizer/vocab.json").is_none(), "nobody knows where it comes from");
    succeeds(&mut hypnos(&["models", "check", text(&place.join("diffusers"))]));
    let single = TensorFile::open(&place.join("single-file.safetensors")).expect("a file");
    assert!(!single.metadata().contains_key("modelspec.license"));
}

#[test]
fn a_part_in_several_files_of_a_variant_is_exported_under_plain_names() {
    let (dir, split) = (scratch(), scratch());
    copy(&bundle(), split.path());
    fs::remove_file(split.path().join("hypnos.json")).expect("a file");
    let vae = split.path().join("vae");
    let whole = vae.join("diffusion_pytorch_model.safetensors");
    let before = TensorFile::open(&whole).expect("a file");
    let names: Vec<String> = before.names().map(str::to_owned).collect();
    let mut files = serde_json::Map::new();
    for (i, half) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors", i + 1);
        rewrite(&whole, &vae.join(&file), |tensors, _| tensors.retain(|name, _| half.contains(name)));
        files.extend(half.iter().map(|name| (name.clone(), json!(file))));
    }
    let index = json!({"metadata": {}, "weight_map": files}).to_string();
    fs::write(vae.join("diffusion_pytorch_model.safetensors.index.fp16.json"), index).expect("a file");
    fs::remove_file(&whole).expect("a file");
    succeeds(&mut hypnos(&["models", "check", text(split.path())]));

    let (out, theirs) = (dir.path().join("mug"), dir.path().join("theirs.safetensors"));
    succeeds(&mut train(&demo_photos(), &out, &DREAMBOOTH));
    let hash = Bundle::open(split.path()).and_then(|b| Ok(b.hash()?.to_owned())).expect("a hash");
    rewrite(&out.join("weights.safetensors"), &theirs, |_, about| drop(about.insert("bundle".into(), hash)));
    let place = dir.path().join("place");
    succeeds(&mut export_of(split.path(), &theirs, &place, &BOTH));
    let exported = place.join("diffusers/vae/diffusion_pytorch_model.safetensors.index.json");
    let after = TensorFile::open(&exported).expect("an index and its files");
    for name in &names {
        let read = |file: &TensorFile| bits(file.read(name).expect("a tensor"));
        assert!(read(&before) == read(&after), "{name} is another");
    }
    succeeds(&mut hypnos(&["models", "check", text(&place.join("diffusers"))]));
}

#[test]
fn a_placeholder_is_refused_where_no_product_was_learned() {
    let (out, bundle) = (scratch(), bundle());
    let words = ["sample", "--bundle", text(&bundle), "--out", text(out.path()), "--prompt", "a {product}"];
    let line = refused(&mut hypnos(&words), 2);
    assert_eq!(line, "--prompt: asks for {product}, but the bundle has none; --model has one");
}
