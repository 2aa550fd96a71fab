//! Bundles made of what people have, against what diffusers' `from_single_file` makes of the same files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use hypnos::ml::bundle::{Bundle, Import, ImportOptions, check};
use hypnos::ml::diffusion::Prediction;
use hypnos::ml::pickle::PickleFile;
use hypnos::ml::tensorfile::TensorFile;
use hypnos::ml::weights::save;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::bundles::copy;
use crate::cli_train::{bundle, demo_photos, hypnos, limited, refused, scratch, succeeds, text, train_from};
use crate::pull::torch_files::archive;
use crate::pull::{Tensors, tensors};

const PARTS: [(&str, &str); 3] = [
    ("text_encoder", "text_encoder/model.safetensors"),
    ("unet", "unet/diffusion_pytorch_model.safetensors"),
    ("vae", "vae/diffusion_pytorch_model.safetensors"),
];

/// The type that a file's weights have.
#[derive(Clone, Copy)]
enum Width {
    F32,
    F16,
    Bf16,
}

impl Width {
    fn word(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// One of the goldens: its head, and name, shape and type of each tensor of the single file.
struct Case {
    head: Value,
    tensors: Vec<(String, Vec<usize>, String)>,
}

impl Case {
    fn open(name: &str) -> Self {
        let path = crate::golden::path("imports").join(format!("{name}.jsonl"));
        let text = fs::read_to_string(path).expect("the golden is committed");
        let (head, rows) = text.split_once('\n').expect("lines");
        let rows = rows.lines().map(|line| serde_json::from_str(line).expect("a tensor"));
        Self { head: serde_json::from_str(head).expect("a head"), tensors: rows.collect() }
    }

    /// Writes the single file, with what `change` leaves of its tensors.
    fn write(&self, path: &Path, width: Width, keep: impl Fn(&str) -> bool) {
        let mut all = BTreeMap::new();
        for (name, shape, kind) in self.tensors.iter().filter(|(name, ..)| keep(name)) {
            all.insert(name.clone(), stored(name, shape, kind, width));
        }
        write_tensors(path, &all);
    }

    /// A bundle of the same sizes: configs, tokenizer, and random weights.
    fn sibling(&self) -> TempDir {
        let dir = scratch();
        let configs = &self.head["configs"];
        for part in ["unet", "vae", "text_encoder"] {
            write_json(&dir.path().join(part).join("config.json"), &configs[part]);
        }
        write_json(&dir.path().join("scheduler/scheduler_config.json"), &configs["scheduler"]);
        copy(&bundle().join("tokenizer"), &dir.path().join("tokenizer"));
        dir
    }

    /// What diffusers' parts hash to where the file is of this type.
    fn wanted(&self, kind: &str) -> BTreeMap<String, String> {
        serde_json::from_value(self.head["sha256"][kind].clone()).expect("hashes")
    }
}

fn write_json(path: &Path, value: &Value) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    fs::write(path, value.to_string()).expect("a file");
}

/// A tensor of the goldens: `((40503 i + crc32(name)) mod 65536) / 65536 - 1/2`, rounded to its type.
fn stored(name: &str, shape: &[usize], kind: &str, width: Width) -> (Dtype, Vec<usize>, Vec<u8>) {
    let seed = u64::from(crc32fast::hash(name.as_bytes()));
    let count = shape.iter().product::<usize>() as u64;
    let values = (0..count).map(|i| ((i * 40503 + seed) % 65536) as f32 / 65536.0 - 0.5);
    let kind = if kind == "float" { width.word() } else { kind };
    let (dtype, bytes): (Dtype, Vec<u8>) = match kind {
        "f32" => (Dtype::F32, values.flat_map(f32::to_le_bytes).collect()),
        "f16" => (Dtype::F16, values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect()),
        "bf16" => (Dtype::BF16, values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect()),
        "i64" => (Dtype::I64, (0..count).flat_map(|i| (i as i64).to_le_bytes()).collect()),
        _ => (Dtype::I32, (0..count).flat_map(|i| (i as i32).to_le_bytes()).collect()),
    };
    (dtype, shape.to_vec(), bytes)
}

fn write_tensors(path: &Path, all: &BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>) {
    let views = all.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    fs::write(path, safetensors::serialize(views, None).expect("a file")).expect("a file");
}

/// What the parts of a bundle hash to, as the goldens have it.
fn hashes(dir: &Path) -> BTreeMap<String, String> {
    let hash = |(part, file): &(&str, &str)| {
        let file = TensorFile::open(&dir.join(file)).expect("weights");
        let mut total = Sha256::new();
        for name in file.names() {
            let shape = file.shape(name).expect("a shape");
            let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
            total.update(format!("{name}\0[{}]\0", shape.join(",")));
            for value in file.read(name).expect("values") {
                total.update(value.to_le_bytes());
            }
        }
        let digits = format!("{:x}", total.finalize());
        ((*part).to_owned(), digits)
    };
    PARTS.iter().map(hash).collect()
}

fn import(source: &Path, out: &Path, more: &[&str]) -> Command {
    hypnos(&[&["models", "import", text(source), "--out", text(out)], more].concat())
}

#[test]
fn a_single_file_becomes_what_diffusers_makes_of_it() {
    for (name, widths) in
        [("sd1", &[Width::F32, Width::F16, Width::Bf16][..]), ("sd2", &[Width::F32, Width::F16, Width::Bf16])]
    {
        let (case, dir) = (Case::open(name), scratch());
        let sibling = case.sibling();
        for width in widths {
            let word = width.word();
            let (file, out) = (dir.path().join(format!("{word}.safetensors")), dir.path().join(word));
            case.write(&file, *width, |_| true);
            succeeds(&mut import(&file, &out, &["--with", text(sibling.path())]));
            assert_eq!(hashes(&out), case.wanted(word), "{name} {word}");
            let dtype = TensorFile::open(&out.join(PARTS[1].1)).expect("a file").dtype("conv_in.bias");
            let wanted = [Dtype::F32, Dtype::F16, Dtype::BF16]
                ["f32 f16 bf16".split(' ').position(|w| w == word).expect("one")];
            assert_eq!(dtype, Some(wanted), "weights keep their type");
            assert_eq!(check(&out).errors, []);
            let prediction = Bundle::open(&out).expect("a bundle").schedule().prediction();
            assert_eq!(prediction == Prediction::V, name == "sd2");
        }
    }
}

#[test]
fn the_moving_average_is_taken_where_it_is_asked_for() {
    let (case, dir) = (Case::open("sd1"), scratch());
    let (sibling, file) = (case.sibling(), dir.path().join("both.safetensors"));
    case.write(&file, Width::F32, |_| true);
    let (out, plain) = (dir.path().join("ema"), dir.path().join("plain.safetensors"));
    succeeds(&mut import(&file, &out, &["--with", text(sibling.path()), "--ema"]));
    assert_eq!(hashes(&out), case.wanted("ema"));
    case.write(&plain, Width::F32, |name| !name.starts_with("model_ema."));
    let none = dir.path().join("none");
    let line = refused(&mut import(&plain, &none, &["--with", text(sibling.path()), "--ema"]), 2);
    assert!(line.contains("tensor `model_ema.diffusion_model"), "{line}");
    assert!(!none.exists());
}

#[test]
fn a_pickle_becomes_the_same_and_one_with_code_does_nothing() {
    let (case, dir) = (Case::open("pickled"), scratch());
    let (sibling, out) = (case.sibling(), dir.path().join("out"));
    let with = ["--with", text(sibling.path())];
    succeeds(&mut import(&crate::golden::path("imports/pickled.ckpt"), &out, &with));
    assert_eq!(hashes(&out), case.wanted("f16"));
    let none = dir.path().join("none");
    let code = crate::golden::path("imports/code.ckpt");
    let line = refused(import(&code, &none, &with).current_dir(dir.path()), 2);
    assert!(line.contains("system") && line.contains("nothing of it was run"), "{line}");
    assert!(!none.exists() && !dir.path().join("hypnos-ran-code").exists());
}

#[test]
fn a_place_may_end_in_a_slash() {
    let (case, dir) = (Case::open("pickled"), scratch());
    let (sibling, out) = (case.sibling(), dir.path().join("out/"));
    let source = crate::golden::path("imports/pickled.ckpt");
    succeeds(&mut import(&source, &out, &["--with", text(sibling.path())]));
    assert_eq!(hashes(&out), case.wanted("f16"));
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1, "nothing is left beside it");
}

#[test]
fn what_a_file_lacks_comes_from_another_bundle_and_hypnos_json_says_so() {
    let (case, dir) = (Case::open("sd1"), scratch());
    let sibling = case.sibling();
    let (with, file, out) = (sibling.path(), dir.path().join("no-vae.safetensors"), dir.path().join("out"));
    case.write(&file, Width::F16, |name| !name.starts_with("first_stage_model."));
    let line = refused(&mut import(&file, &out, &["--with", text(with)]), 2);
    assert!(line.starts_with(&format!("{}: has no weights", with.join("vae").display())), "{line}");
    let whole = dir.path().join("vae.safetensors");
    case.write(&whole, Width::F32, |_| true);
    let made = dir.path().join("made");
    succeeds(&mut import(&whole, &made, &["--with", text(with)]));
    for part in ["segmenter", "perceptual"] {
        copy(&bundle().join(part), &made.join(part));
    }
    succeeds(&mut import(&file, &out, &["--with", text(&made)]));
    let (theirs, ours) = (hashes(&made), hashes(&out));
    assert_eq!(theirs["vae"], ours["vae"]);
    assert_eq!(ours["unet"], case.wanted("f16")["unet"]);
    let manifest = Bundle::open(&out).expect("a bundle").manifest().clone();
    assert_eq!(manifest.name, "no-vae");
    let origin = |path: &str| manifest.files[path].clone();
    let unet = origin("unet/diffusion_pytorch_model.safetensors");
    let digits = format!("{:x}", Sha256::digest(fs::read(&file).expect("a file")));
    assert!(unet.source.contains("no-vae.safetensors"), "{unet:?}");
    assert!(format!("{unet:?}").contains(&digits), "{unet:?}");
    assert!(origin("vae/diffusion_pytorch_model.safetensors").source.contains("vae.safetensors"));
    assert!(origin("tokenizer/vocab.json").source.contains("tokenizer/vocab.json of "));
    assert!(origin("segmenter/model.safetensors").source.contains("segmenter/model.safetensors of made"));
    assert_eq!(manifest.files.len(), 12 + 4, "{:#?}", manifest.files.keys());
}

#[test]
fn a_directory_with_variants_and_without_a_tokenizer_becomes_a_bundle() {
    let dir = scratch();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    copy(&bundle(), &source);
    fs::remove_file(source.join("hypnos.json")).expect("a file");
    for part in ["segmenter", "perceptual", "tokenizer"] {
        fs::remove_dir_all(source.join(part)).expect("a directory");
    }
    let unet = |variant: &str| source.join(format!("unet/diffusion_pytorch_model{variant}.safetensors"));
    fs::rename(unet(""), unet(".fp16")).expect("a file");
    let line = refused(&mut import(&source, &out, &[]), 2);
    assert!(line.contains("has no tokenizer/; --with names a bundle that has one"), "{line}");
    succeeds(&mut import(&source, &out, &["--with", text(&bundle())]));
    assert_eq!(check(&out).errors, []);
    assert_eq!(hashes(&out), hashes(&bundle()));
    assert!(out.join("segmenter/config.json").exists() && out.join("perceptual/config.json").exists());
    assert_eq!(Bundle::open(&out).expect("a bundle").manifest().name, "source");
}

#[test]
fn a_directory_with_pickles_becomes_a_bundle() {
    let (case, dir) = (Case::open("pickled"), scratch());
    let (sibling, source, out) = (case.sibling(), dir.path().join("source"), dir.path().join("out"));
    let with = ["--with", text(sibling.path())];
    succeeds(&mut import(&crate::golden::path("imports/pickled.ckpt"), &source, &with));
    fs::remove_file(source.join("hypnos.json")).expect("a file");
    fs::remove_file(source.join(PARTS[1].1)).expect("a file");
    let pickle = source.join("unet/diffusion_pytorch_model.bin");
    fs::copy(crate::golden::path("imports/pickled_unet.bin"), pickle).expect("a file");
    succeeds(&mut import(&source, &out, &[]));
    assert_eq!(hashes(&out), case.wanted("f16"));
}

/// Two halves of a file's tensors in the place of the file, and the index that names them.
fn split(file: &Path, suffix: &str, write: impl Fn(&Path, &Tensors)) {
    let stem = file.with_extension("");
    let half = |i: usize| PathBuf::from(format!("{}-{i:05}-of-00002.{suffix}", stem.display()));
    let mut halves = [Tensors::new(), Tensors::new()];
    let mut places = BTreeMap::new();
    for (i, (name, tensor)) in tensors(file).into_iter().enumerate() {
        let shard = half(1 + i % 2);
        places.insert(name.clone(), shard.file_name().expect("a name").to_string_lossy().into_owned());
        halves[i % 2].insert(name, tensor);
    }
    (1..).zip(&halves).for_each(|(i, tensors)| write(&half(i), tensors));
    let index = PathBuf::from(format!("{}.{suffix}.index.json", stem.display()));
    write_json(&index, &json!({ "metadata": { "total_size": 1 }, "weight_map": places }));
    fs::remove_file(file).expect("a file");
}

#[test]
fn weights_in_shards_are_imported_whichever_form_they_have() {
    let (case, dir) = (Case::open("pickled"), scratch());
    let (sibling, source, out) = (case.sibling(), dir.path().join("source"), dir.path().join("out"));
    let with = ["--with", text(sibling.path())];
    succeeds(&mut import(&crate::golden::path("imports/pickled.ckpt"), &source, &with));
    split(&source.join(PARTS[1].1), "bin", |path, tensors| {
        fs::write(path, archive(tensors)).expect("a file");
    });
    split(&source.join(PARTS[2].1), "safetensors", |path, tensors| {
        let tensor = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            let tensor = Tensor::from_vec(values.clone(), shape.as_slice(), &Device::Cpu);
            (name.clone(), tensor.expect("a tensor"))
        };
        let tensors = tensors.iter().map(tensor).collect();
        save(path, &tensors, &BTreeMap::new(), DType::F16).expect("a file");
    });
    succeeds(&mut import(&source, &out, &[]));
    assert_eq!(hashes(&out), case.wanted("f16"));

    // Each shard counts in what tells imports apart.
    let key =
        || Import::open(&source, &ImportOptions::default()).and_then(|import| import.key()).expect("a key");
    let before = key();
    let shard = source.join("unet/diffusion_pytorch_model-00002-of-00002.bin");
    let mut bytes = fs::read(&shard).expect("a file");
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(&shard, bytes).expect("a file");
    assert_ne!(key(), before);

    // Shards of another bundle are taken as they are.
    let none = dir.path().join("no-vae");
    copy(&out, &none);
    fs::remove_dir_all(none.join("vae")).expect("a directory");
    let whole = dir.path().join("whole");
    succeeds(&mut import(&none, &whole, &["--with", text(&source)]));
    assert_eq!(check(&whole).errors, []);
    assert!(whole.join("vae/diffusion_pytorch_model-00002-of-00002.safetensors").exists());

    // What is wrong with a value is said of the shard that has it.
    let file = PickleFile::open(&shard).expect("a shard");
    let read = |name: &str| {
        (file.shape(name).expect("a shape").to_vec(), file.read(name).expect("a tensor of numbers"))
    };
    let mut spoilt: Tensors = file.names().map(|name| (name.to_owned(), read(name))).collect();
    spoilt.first_entry().expect("a tensor").get_mut().1[0] = f32::NAN;
    fs::write(&shard, archive(&spoilt)).expect("a file");
    let line = refused(&mut import(&source, &dir.path().join("spoilt"), &[]), 2);
    assert!(line.starts_with(&format!("{}: tensor `", shard.display())), "{line}");
    assert!(line.ends_with("` has 1 value that is infinite or not a number"), "{line}");

    fs::remove_file(&shard).expect("a file");
    let line = refused(&mut import(&source, &dir.path().join("less"), &[]), 2);
    assert_eq!(line, format!("{}: is missing; the index names it", shard.display()));
}

/// The tensors of a bundle's parts under other names, one file for all.
fn write_named(path: &Path, names: &[(&str, &[usize])]) {
    let tensors = names.iter().map(|(name, shape)| {
        ((*name).to_owned(), Tensor::zeros(*shape, DType::F32, &Device::Cpu).expect("a tensor"))
    });
    save(path, &tensors.collect(), &BTreeMap::new(), DType::F32).expect("a file");
}

#[test]
fn what_is_no_checkpoint_of_ours_is_refused_by_its_name() {
    let dir = scratch();
    let (file, out) = (dir.path().join("x.safetensors"), dir.path().join("out"));
    let first = "model.diffusion_model.input_blocks.0.0.weight";
    for (names, wanted) in [
        (&[("lora_unet_down_blocks_0.lora_up.weight", &[4, 4][..])][..], "is a LoRA"),
        (&[("unet.down_blocks.0.attn.to_q.lora_A.weight", &[4, 4])], "is a LoRA"),
        (
            &[(first, &[8, 4, 3, 3]), ("conditioner.embedders.1.model.ln_final.bias", &[4])],
            "is a Stable Diffusion XL checkpoint",
        ),
        (
            &[(first, &[8, 4, 3, 3]), ("conditioner.embedders.0.model.ln_final.bias", &[4])],
            "is a Stable Diffusion XL refiner",
        ),
        (&[(first, &[8, 9, 3, 3])], "is an inpainting checkpoint, whose UNet reads 9 channels"),
        (&[("control_model.time_embed.0.weight", &[4, 4])], "is a ControlNet"),
        (&[("down_blocks.0.resnets.0.conv1.weight", &[4, 4, 3, 3])], "is a UNet alone by diffusers' names"),
        (&[("decoder.mid.block_1.conv1.weight", &[4, 4, 3, 3])], "is an autoencoder alone"),
        (&[("emb_params", &[1, 768])], "is an embedding of textual inversion"),
        (&[("something", &[1])], "has no `model.diffusion_model.*`"),
        (&[(first, &[8, 4, 3, 3])], "has a UNet that attends to no text"),
    ] {
        write_named(&file, names);
        let line = refused(&mut import(&file, &out, &[]), 2);
        assert!(line.starts_with(&format!("{}: {wanted}", file.display())), "{line}");
        assert!(!out.exists());
    }
    let source = dir.path().join("xl");
    write_json(&source.join("model_index.json"), &json!({ "_class_name": "StableDiffusionXLPipeline" }));
    let line = refused(&mut import(&source, &out, &[]), 2);
    assert!(line.contains("is a StableDiffusionXLPipeline; a StableDiffusionPipeline"), "{line}");
}

#[test]
fn bad_files_and_places_are_one_line_each_and_leave_nothing() {
    let (case, dir) = (Case::open("sd1"), scratch());
    let sibling = case.sibling();
    let with = ["--with", text(sibling.path())];
    let (file, out) = (dir.path().join("x.safetensors"), dir.path().join("out"));
    case.write(&file, Width::F16, |_| true);
    let whole = fs::read(&file).expect("a file");
    let odd = dir.path().join("odd.ckpt");
    let pickle = fs::read(crate::golden::path("imports/pickled.ckpt")).expect("a file");
    for (bytes, wanted) in [
        (&b"<!DOCTYPE html><html><body>Access denied</body></html>"[..], "is a web page"),
        (&whole[..whole.len() / 2], "truncated"),
        (&pickle[..pickle.len() / 2], "zip"),
    ] {
        fs::write(&odd, bytes).expect("a file");
        let line = refused(&mut import(&odd, &out, &with), 2);
        assert!(line.starts_with(text(&odd)) && line.contains(wanted), "{line}");
    }
    let line = refused(&mut import(&dir.path().join("nowhere.ckpt"), &out, &with), 2);
    assert!(line.contains("nowhere.ckpt: cannot be opened: no such file"), "{line}");
    let line = refused(&mut import(&file, &out, &["--with", "nowhere"]), 2);
    assert!(line.contains("nowhere: is not a directory; a bundle is wanted"), "{line}");

    // Without a sibling nobody knows how many heads such a model has.
    let line = refused(&mut import(&file, &out, &[]), 2);
    assert!(
        line.contains("attends to texts of width 16; 768 (Stable Diffusion 1.x) or 1024 (2.x)"),
        "{line}"
    );
    let line = refused(&mut import(&file, &out, &["--with", text(&bundle())]), 2);
    assert!(line.contains("attends to texts of width 16"), "{line}");

    // Something is there already.
    fs::create_dir(&out).expect("a directory");
    fs::write(out.join("mine"), "").expect("a file");
    let line = refused(&mut import(&file, &out, &with), 2);
    assert_eq!(line, format!("{}: is not empty; a new directory is wanted", out.display()));
    fs::remove_file(out.join("mine")).expect("a file");

    // One tensor is missing, another is too much, a third is no number.
    let less = dir.path().join("less.safetensors");
    case.write(&less, Width::F16, |name| name != "model.diffusion_model.out.2.bias");
    let line = refused(&mut import(&less, &out, &with), 2);
    assert!(line.contains("tensor `model.diffusion_model.out.2.bias` of shape [4] is missing"), "{line}");
    let mut all = BTreeMap::new();
    for (name, shape, kind) in &case.tensors {
        all.insert(name.clone(), stored(name, shape, kind, Width::F32));
    }
    all.insert("model.diffusion_model.more".into(), stored("more", &[2], "f32", Width::F32));
    write_tensors(&less, &all);
    let line = refused(&mut import(&less, &out, &with), 2);
    let wanted = "has the tensor `model.diffusion_model.more`, which is none of that UNet's";
    assert!(line.ends_with(wanted), "{line}");
    all.remove("model.diffusion_model.more");
    let bias = all.get_mut("first_stage_model.decoder.conv_out.bias").expect("a tensor");
    bias.2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    write_tensors(&less, &all);
    let line = refused(&mut import(&less, &out, &with), 2);
    assert!(line.contains("decoder.conv_out.bias` has 1 value that is infinite or not a number"), "{line}");

    // The UNet has more bytes than a file may grow to.
    let plain = import(&file, &dir.path().join("full"), &with);
    let line = refused(&mut limited(&plain, 16), 2);
    assert!(line.contains("cannot be written: file too large"), "{line}");
    let left: Vec<_> =
        fs::read_dir(dir.path()).expect("a directory").map(|e| e.expect("one").file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("full")), "{left:?}");
    assert_eq!(fs::read_dir(&out).expect("a directory").count(), 0, "as before");
}

#[test]
fn what_is_wrong_with_the_other_bundle_is_said_of_its_file() {
    let (case, dir) = (Case::open("pickled"), scratch());
    let (sibling, out) = (case.sibling(), dir.path().join("out"));
    let with = sibling.path();
    let refuse = |file: &str, wanted: &str| {
        let source = crate::golden::path("imports/pickled.ckpt");
        let line = refused(&mut import(&source, &out, &["--with", text(with)]), 2);
        assert!(line.starts_with(&format!("{}: {wanted}", with.join(file).display())), "{line}");
        assert!(!out.exists());
    };
    copy(&bundle().join("segmenter"), &with.join("segmenter"));
    fs::remove_file(with.join("segmenter/config.json")).expect("a file");
    refuse("segmenter/config.json", "cannot be opened: no such file");
    write_json(&with.join("scheduler/scheduler_config.json"), &json!([]));
    refuse("scheduler/scheduler_config.json", "is not a JSON object");
}

/// A file of the real names and shapes, whose values are all zero and take no room, and of these metadata.
fn sparse(path: &Path, golden: &str, metadata: &Value) {
    let text = fs::read_to_string(crate::golden::path("ldm_names").join(format!("{golden}.jsonl")));
    let text = text.expect("the golden is committed");
    let rows = text.lines().skip(1).map(|line| serde_json::from_str::<Value>(line).expect("a tensor"));
    let shapes: BTreeMap<String, Vec<usize>> = rows
        .map(|row| {
            let shape = serde_json::from_value(row[3].clone()).expect("a shape");
            (row[2].as_str().expect("a name").to_owned(), shape)
        })
        .collect();
    let (mut at, mut entries) = (0, serde_json::Map::new());
    entries.insert("__metadata__".into(), metadata.clone());
    for (name, shape) in shapes {
        let end = at + 2 * shape.iter().product::<usize>();
        entries.insert(name, json!({ "dtype": "F16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let header = Value::Object(entries).to_string();
    let begin = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    fs::write(path, &begin).expect("a file");
    let file = fs::OpenOptions::new().write(true).open(path).expect("a file");
    file.set_len((begin.len() + at) as u64).expect("room for holes");
}

/// A tokenizer of as many entries as the real ones.
fn real_tokenizer() -> TempDir {
    let with = scratch();
    let vocab: serde_json::Map<String, Value> = (0..49408).map(|i| (format!("t{i}"), json!(i))).collect();
    let mut vocab = vocab;
    for (place, token) in [(0, "!"), (49406, "<|startoftext|>"), (49407, "<|endoftext|>")] {
        vocab.remove(&format!("t{place}"));
        vocab.insert(token.into(), json!(place));
    }
    write_json(&with.path().join("tokenizer/vocab.json"), &Value::Object(vocab));
    fs::write(with.path().join("tokenizer/merges.txt"), "#version: 0.2\n").expect("a file");
    let special = json!({ "pad_token": "<|endoftext|>" });
    write_json(&with.path().join("tokenizer/special_tokens_map.json"), &special);
    with
}

#[test]
fn the_real_sizes_are_recognised_by_the_names_and_shapes_of_the_unet() {
    let (dir, with) = (scratch(), real_tokenizer());
    let notes = |golden: &str, prediction: Option<Prediction>| {
        let file = dir.path().join(format!("{golden}.safetensors"));
        sparse(&file, golden, &json!({}));
        let options =
            ImportOptions { with: Some(with.path().to_owned()), prediction, ..ImportOptions::default() };
        Import::open(&file, &options).expect("an import").notes().join("\n")
    };
    let said = notes("sd15", None);
    assert!(said.contains("Stable Diffusion 1.x, 512x512 pixels, predicts epsilon"), "{said}");
    assert!(!said.contains("filled up"), "{said}");
    let said = notes("sd2", Some(Prediction::V));
    assert!(said.contains("Stable Diffusion 2.x, 768x768 pixels, predicts v_prediction"), "{said}");
    assert!(said.contains("texts are filled up with !"), "{said}");
    let said = notes("sd2", None);
    assert!(said.contains("512x512 pixels, predicts epsilon (guessed from its weights"), "{said}");
}

/// Stable Diffusion 2 with this tokenizer, or why it is refused.
fn sd2_with(tokenizer: &TempDir) -> Result<Import, String> {
    let dir = scratch();
    let file = dir.path().join("x.safetensors");
    sparse(&file, "sd2", &json!({}));
    let with = Some(tokenizer.path().to_owned());
    let options = ImportOptions { with, prediction: Some(Prediction::V), ..ImportOptions::default() };
    Import::open(&file, &options).map_err(|error| error.to_string())
}

#[test]
fn padding_on_the_left_of_short_texts_is_known_for_what_it_is() {
    let with = real_tokenizer();
    let settings = json!({ "padding_side": "left", "model_max_length": 4 });
    write_json(&with.path().join("tokenizer/tokenizer_config.json"), &settings);
    write_json(&with.path().join("tokenizer/special_tokens_map.json"), &json!({ "pad_token": "!" }));
    let said = sd2_with(&with).expect("an import").notes().join("\n");
    assert!(!said.contains("filled up"), "{said}");
}

#[test]
fn a_map_of_special_tokens_that_is_no_object_is_named() {
    let with = real_tokenizer();
    // Where its tokens are listed, the map is not asked; it is written anew for Stable Diffusion 2.
    write_json(&with.path().join("tokenizer/tokenizer_config.json"), &json!({ "added_tokens_decoder": {} }));
    let map = with.path().join("tokenizer/special_tokens_map.json");
    write_json(&map, &json!([1]));
    let error = sd2_with(&with).expect_err("a list");
    assert_eq!(error, format!("{}: is not a JSON object", map.display()));
}

#[test]
fn a_resolution_that_pictures_cannot_have_is_not_taken_from_a_file() {
    let (dir, with) = (scratch(), real_tokenizer());
    let file = dir.path().join("x.safetensors");
    let options = ImportOptions { with: Some(with.path().to_owned()), ..ImportOptions::default() };
    for (said, side) in [
        ("640x640", 640),
        ("4096", 4096),
        ("4104x4104", 512),
        ("0x0", 512),
        ("513x513", 512),
        ("18446744073709551608x18446744073709551608", 512),
        ("large", 512),
    ] {
        sparse(&file, "sd15", &json!({ "modelspec.resolution": said }));
        let notes = Import::open(&file, &options).expect("an import").notes().join("\n");
        assert!(notes.contains(&format!("Stable Diffusion 1.x, {side}x{side} pixels")), "{said}: {notes}");
    }
}

#[test]
fn what_another_hypnos_json_says_makes_another_import() {
    let (case, dir) = (Case::open("sd1"), scratch());
    let (sibling, file) = (case.sibling(), dir.path().join("own.safetensors"));
    case.write(&file, Width::F16, |_| true);
    let options = ImportOptions { with: Some(sibling.path().to_owned()), ..ImportOptions::default() };
    let place = |manifest: Value| {
        write_json(&sibling.path().join("hypnos.json"), &manifest);
        Import::open(&file, &options).and_then(|import| import.place(dir.path())).expect("a place")
    };
    let mut places = vec![
        place(json!({})),
        place(json!({ "rare_tokens": ["zwx", "sks"] })),
        place(json!({ "classes": ["mug"] })),
        place(json!({ "drawing": { "scheduler": "euler-a", "guidance": 4.0 } })),
        place(json!({ "training": { "dreambooth": { "steps": 5 } } })),
    ];
    assert_eq!(places[0], place(json!({})), "the same again");
    places.sort();
    places.dedup();
    assert_eq!(places.len(), 5, "{places:#?}");
}

#[test]
fn a_directory_is_imported_under_its_whole_name() {
    let (dir, options) = (scratch(), ImportOptions::default());
    let source = dir.path().join("sd-v1.5");
    copy(&bundle(), &source);
    let place = Import::open(&source, &options).and_then(|import| import.place(dir.path())).expect("a place");
    let name = place.file_name().expect("a name").to_string_lossy();
    assert!(name.starts_with("sd-v1.5-"), "{name}");
}

#[test]
fn left_overs_beside_a_whole_checkpoint_do_not_make_it_something_else() {
    let (case, dir) = (Case::open("sd1"), scratch());
    let (sibling, file, out) = (case.sibling(), dir.path().join("x.safetensors"), dir.path().join("out"));
    let with = ["--with", text(sibling.path())];
    let mut all = BTreeMap::new();
    for (name, shape, kind) in &case.tensors {
        all.insert(name.clone(), stored(name, shape, kind, Width::F32));
    }
    for name in [
        "decoder.conv_in.bias",
        "text_model.final_layer_norm.bias",
        "lora_te_text_model.lora_up.weight",
        "down_blocks.0.bias",
        "emb_params",
    ] {
        all.insert(name.into(), stored(name, &[2], "f32", Width::F32));
    }
    write_tensors(&file, &all);
    succeeds(&mut import(&file, &out, &with));
    assert_eq!(hashes(&out), case.wanted("f32"));
    // A ControlNet steers a UNet that may be there too.
    all.insert("control_model.time_embed.0.bias".into(), stored("more", &[2], "f32", Width::F32));
    write_tensors(&file, &all);
    let line = refused(&mut import(&file, &dir.path().join("none"), &with), 2);
    assert!(line.contains("is a ControlNet"), "{line}");
}

/// A small model of Stable Diffusion 2's build: the bundle of the tests with other settings, for which its weights
/// serve as well.
fn small_sd2() -> TempDir {
    let dir = scratch();
    copy(&bundle(), dir.path());
    let manifest = json!({ "rare_tokens": ["sks", "zwx"] });
    write_json(&dir.path().join("hypnos.json"), &manifest);
    for (path, pairs) in [
        ("text_encoder/config.json", json!({ "hidden_act": "gelu" })),
        (
            "unet/config.json",
            json!({ "attention_head_dim": [2, 3, 4], "use_linear_projection": true, "upcast_attention": true }),
        ),
        ("scheduler/scheduler_config.json", json!({ "prediction_type": "v_prediction" })),
        ("tokenizer/special_tokens_map.json", json!({ "pad_token": "!" })),
    ] {
        let path = dir.path().join(path);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        for (key, value) in pairs.as_object().expect("pairs") {
            config[key] = value.clone();
        }
        fs::write(path, config.to_string()).expect("a file");
    }
    dir
}

fn output(command: &mut Command) -> Output {
    command.output().expect("the program runs")
}

#[test]
fn stable_diffusion_2_is_drawn_with_trained_and_goes_out_and_in_again() {
    let (sd2, dir) = (small_sd2(), scratch());
    let of_bundle = ["--bundle", text(sd2.path())];
    assert_eq!(check(sd2.path()).errors, []);

    // 1. Every sampler draws.
    for sampler in ["ddim", "pndm", "dpmpp-2m", "dpmpp-2m-karras", "euler", "euler-a"] {
        let out = dir.path().join(sampler);
        let words = ["--prompt", "a mug", "--steps", "2", "--scheduler", sampler, "--out", text(&out)];
        succeeds(&mut hypnos(&[&["sample"], &of_bundle[..], &words].concat()));
        assert!(out.join("0.png").exists());
    }

    // 2. All four losses train it, with v as the target.
    let mug = dir.path().join("mug");
    let short = ["steps=2", "views.n=2", "class_images=1", "discriminator.steps=1"];
    let short = short.iter().flat_map(|pair| ["--set", *pair]);
    let forms = ["--export", "diffusers", "--export", "single-file"];
    let words: Vec<&str> = short.chain(forms).collect();
    succeeds(&mut train_from(sd2.path(), &demo_photos(), &mug, &words));

    // 3. Out, as OpenCLIP and the original code name it, and in again: not a bit is another.
    let single = mug.join("single-file.safetensors");
    let file = TensorFile::open(&single).expect("a file");
    assert_eq!(file.metadata()["modelspec.prediction_type"], "v");
    assert_eq!(
        file.shape("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"),
        Some(&[384, 128][..])
    );
    let back = dir.path().join("back");
    succeeds(&mut import(&single, &back, &["--with", text(sd2.path())]));
    assert_eq!(hashes(&back), hashes(&mug.join("diffusers")));
    assert_ne!(hashes(&back)["unet"], hashes(sd2.path())["unet"], "something was learned");
    let (ours, theirs) =
        (Bundle::open(&back).expect("one"), Bundle::open(&mug.join("diffusers")).expect("one"));
    assert_eq!(ours.schedule().prediction(), Prediction::V);
    assert_eq!(ours.manifest().product, theirs.manifest().product);
}

#[test]
fn a_single_file_serves_as_a_bundle_and_is_imported_once() {
    let (case, dir) = (Case::open("sd1"), scratch());
    let (sibling, file, made) = (case.sibling(), dir.path().join("own.safetensors"), dir.path().join("made"));
    case.write(&file, Width::F16, |_| true);
    let with = ["--with", text(sibling.path())];
    succeeds(&mut import(&file, &made, &with));
    let hash = Bundle::open(&made).and_then(|bundle| Ok(bundle.hash()?.to_owned())).expect("a hash");
    let sample = |out: &str, more: &[&str]| {
        let out = dir.path().join(out);
        let words =
            ["sample", "--bundle", text(&file), "--prompt", "a mug", "--steps", "2", "--out", text(&out)];
        let mut command = hypnos(&[&words, more].concat());
        command.env("XDG_CACHE_HOME", dir.path().join("cache"));
        output(&mut command)
    };
    let done = sample("first", &with);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    // Its weights are no picture's: what it draws may be no number. The bundle is there in either case.
    assert!(said.contains("own.safetensors imported into"), "{said}");
    let bundles: Vec<PathBuf> = fs::read_dir(dir.path().join("cache/hypnos/bundles"))
        .expect("the cache")
        .map(|entry| entry.expect("one").path())
        .collect();
    assert_eq!(bundles.len(), 1, "{bundles:?}");
    assert_eq!(Bundle::open(&bundles[0]).expect("one").hash().expect("a hash"), hash);
    let said = String::from_utf8_lossy(&sample("again", &with).stderr).into_owned();
    assert!(said.contains("own.safetensors was imported into"), "{said}");
    let done = sample("none", &[]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(2), "{said}");
    assert!(said.contains("or a bundle of the same sizes for --with"), "{said}");
}

#[test]
fn a_plan_takes_a_single_file_and_doctor_converts_none() {
    let (case, dir) = (Case::open("sd1"), scratch());
    let (sibling, file, cache) =
        (case.sibling(), dir.path().join("mug.safetensors"), dir.path().join("cache"));
    case.write(&file, Width::F16, |_| true);
    let run = |words: &[&str]| {
        let with = ["--bundle", text(&file), "--with", text(sibling.path())];
        let mut command = hypnos(&[words, &with].concat());
        succeeds(command.env("XDG_CACHE_HOME", &cache).env("HYPNOS_DATA", dir.path().join("data")))
    };
    let doctor = ["doctor", "--weights-gb", "0.1"];
    let said = run(&doctor);
    let wanted = format!("{} is a checkpoint in one file, not converted yet", file.display());
    assert!(said.contains(&wanted) && said.contains("hypnos models import"), "{said}");
    assert!(!cache.exists());
    let said = run(&["models", "plan", "--no-time", "--method", "dreambooth"]);
    assert!(said.contains("AdamW's moments") && said.contains("it fits"), "{said}");
    assert!(cache.join("hypnos/bundles").exists());
    let said = run(&doctor);
    assert!(said.contains("mug: sound, ") && !said.contains("not converted"), "{said}");
    assert!(
        said.contains("a training (dreambooth, ")
            && said.contains("trainings by hypnos: segmenter/ is missing"),
        "{said}"
    );
}
