//! Sound bundles pass; each way of being broken gets one clear line and exit code 2, through the real program.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use hypnos::job::{Method, TrainOptions};
use hypnos::ml::bundle::{Bundle, Capability, check, random_metrics};
use hypnos::ml::device::DeviceKind;
use hypnos::ml::ops::MomentFormat;
use hypnos::ml::plan::{EvaluationSizes, TrainingPlan, TrainingSizes};
use hypnos::ml::precision::Precision;
use hypnos::ml::tensorfile::TensorFile;
use hypnos::ml::tokenizer::Tokenizer;
use hypnos::ml::train::Learner;
use hypnos::ml::weights::{Weights, save};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::loading::shard;

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const INDEX: &str = "diffusion_pytorch_model.safetensors.index.json";

fn miniature() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle")
}

/// A copy of the miniature to break. Without `hypnos.json`, so that hashes say nothing about it.
struct Broken(TempDir);

impl Broken {
    fn new() -> Broken {
        let dir = tempfile::tempdir().unwrap();
        copy(&miniature(), dir.path());
        fs::remove_file(dir.path().join("hypnos.json")).unwrap();
        Broken(dir)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn write(self, path: &str, bytes: impl AsRef<[u8]>) -> Broken {
        fs::write(self.at(path), bytes).unwrap();
        self
    }

    fn remove(self, path: &str) -> Broken {
        fs::remove_file(self.at(path)).unwrap();
        self
    }

    /// Changes one key of a JSON file.
    fn set(self, path: &str, key: &str, value: Value) -> Broken {
        let mut config: Value = serde_json::from_slice(&fs::read(self.at(path)).unwrap()).unwrap();
        config[key] = value;
        self.write(path, config.to_string())
    }

    /// Writes the tensors of a file again, changed.
    fn retensor(self, path: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> Broken {
        let mut tensors = tensors(&self.at(path));
        change(&mut tensors);
        save(&self.at(path), &tensors, &BTreeMap::new(), DType::F32).unwrap();
        self
    }

    /// What `models check` says: all its lines of error, which have to begin with `error: ` and name a file here.
    #[track_caller]
    fn findings(&self) -> Vec<String> {
        let (code, _, errors) = hypnos(&["models", "check", self.0.path().to_str().unwrap()]);
        assert_eq!(code, 2, "exit code; it said {errors}");
        assert!(!errors.contains("panicked"), "{errors}");
        let prefix = format!("error: {}/", self.0.path().display());
        errors
            .lines()
            .map(|line| {
                line.strip_prefix(&prefix).unwrap_or_else(|| panic!("names no file: {line}")).to_owned()
            })
            .collect()
    }

    /// What it remarks without calling it an error.
    fn remarks(&self) -> Vec<String> {
        let prefix = format!("{}/", self.0.path().display());
        let remarks = check(self.0.path()).remarks.into_iter().map(|remark| remark.to_string());
        remarks.map(|line| line.strip_prefix(&prefix).expect("the file's name").to_owned()).collect()
    }

    /// The same where one line is all there is to say.
    #[track_caller]
    fn finding(&self) -> String {
        let lines = self.findings();
        assert_eq!(lines.len(), 1, "one line, but it said {lines:#?}");
        lines[0].clone()
    }
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::write(target, fs::read(entry.path()).unwrap()).unwrap(); // not its read-only mode
        }
    }
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let file = TensorFile::open(path).unwrap();
    let tensor =
        |name: &str| Tensor::from_vec(file.read(name).unwrap(), file.shape(name).unwrap(), &Device::Cpu);
    file.names().map(|name| (name.to_owned(), tensor(name).unwrap())).collect()
}

/// Exit code, standard output and standard error of the program.
fn hypnos(args: &[&str]) -> (i32, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_hypnos")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

/// A safetensors file of this header, and so many bytes of data.
fn raw(header: &str, n_data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; n_data]].concat()
}

#[test]
fn the_miniature_is_sound() {
    let (code, said, errors) = hypnos(&["models", "check", miniature().to_str().unwrap()]);
    assert_eq!((code, errors.as_str()), (0, ""), "{said}");
    assert!(said.contains("a sound bundle for 64x64 pixels"), "{said}");
}

/// What the demo and the page send for the bundle in the program, as the API reads it, and how it draws.
#[test]
fn what_the_bundle_in_the_program_says_of_itself_is_accepted() {
    let bundle = Bundle::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles/miniature")).unwrap();
    let manifest = bundle.manifest();
    for method in Method::ALL {
        let mut options = manifest.suited(method.as_str());
        assert!(options["steps"].is_u64(), "{method}: {options}");
        options["method"] = json!(method);
        TrainOptions::given(&options).unwrap().check().unwrap();
    }
    let drawing = serde_json::to_value(manifest.drawing).unwrap();
    assert_eq!(drawing, json!({ "scheduler": "euler-a", "guidance": 4.0 }));
}

#[test]
fn the_miniature_opens_with_all_its_parts() {
    let bundle = Bundle::open(&miniature()).unwrap();
    assert_eq!((bundle.resolution(), bundle.factor(), bundle.latent_channels()), (64, 4, 4));
    assert!((bundle.scaling_factor() - 0.429_625_455).abs() < 1e-9);
    assert_eq!(bundle.manifest().rare_tokens.len(), 6);
    assert_eq!(bundle.unet(&Device::Cpu, Precision::F32, true).unwrap().params.len(), 326);
    assert_eq!(bundle.text_encoder(&Device::Cpu, Precision::F32, true).unwrap().params.len(), 68);
    let vae = bundle.vae(&Device::Cpu, Precision::F32, false).unwrap();
    assert_eq!(vae.params.len(), 156);
    assert!(vae.params.values().all(|param| !param.is_trainable()));
}

#[test]
fn without_hypnos_json_the_configs_tell_the_resolution() {
    let plain = Broken::new();
    assert_eq!(check(plain.0.path()).errors, []);
    let bundle = Bundle::open(plain.0.path()).unwrap();
    assert_eq!(bundle.resolution(), 64);
    let full = Bundle::open(&miniature()).unwrap();
    assert_eq!(
        bundle.hash().unwrap(),
        full.hash().unwrap(),
        "the hash is of what draws, not of what we say of it"
    );
    let other = Broken::new().set("vae/config.json", "scaling_factor", json!(0.5));
    assert_ne!(Bundle::open(other.0.path()).unwrap().hash().unwrap(), full.hash().unwrap());
}

#[test]
fn no_directory_is_one_line() {
    let (code, _, errors) = hypnos(&["models", "check", "nowhere/at/all"]);
    assert_eq!(
        (code, errors.as_str()),
        (2, "error: nowhere/at/all: is not a directory; a bundle is wanted\n")
    );
}

#[test]
fn a_missing_file_is_named() {
    for path in ["unet/config.json", "scheduler/scheduler_config.json"] {
        assert_eq!(Broken::new().remove(path).finding(), format!("{path}: is missing"));
    }
    let finding = Broken::new().remove("tokenizer/vocab.json").finding();
    assert!(finding.starts_with("tokenizer/vocab.json: cannot be read: "), "{finding}");
    let finding = Broken::new().remove(UNET).finding();
    assert_eq!(finding, "unet: has no weights (diffusion_pytorch_model.safetensors)");
}

#[test]
fn a_pickle_beside_missing_weights_is_named() {
    let finding = Broken::new().remove(UNET).write("unet/diffusion_pytorch_model.bin", "PK").finding();
    let wanted = "there is diffusion_pytorch_model.bin, a pickle: `hypnos models import` converts it";
    assert!(finding.ends_with(wanted), "{finding}");
}

#[test]
fn a_half_precision_file_serves_as_well() {
    let broken = Broken::new();
    fs::rename(broken.at(UNET), broken.at("unet/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    assert_eq!(check(broken.0.path()).errors, []);
}

/// A plain directory, as it is downloaded: none of what this program adds.
fn plain() -> Broken {
    let plain = Broken::new();
    for part in ["segmenter", "perceptual"] {
        fs::remove_dir_all(plain.at(part)).unwrap();
    }
    plain
}

#[test]
fn a_plain_directory_is_sound_and_is_told_what_it_lacks() {
    let plain = plain();
    let (code, said, errors) = hypnos(&["models", "check", plain.0.path().to_str().unwrap()]);
    assert_eq!((code, errors.as_str()), (0, ""), "{said}");
    assert!(said.contains("a sound bundle for 64x64 pixels"), "{said}");
    let bundle = Bundle::open(plain.0.path()).unwrap();
    assert_eq!((bundle.missing(), bundle.capabilities()), (Capability::ALL.to_vec(), vec![]));
    for capability in Capability::ALL {
        let line = format!("remark: {}: {}", plain.at(capability.part()).display(), capability.missing());
        assert!(said.lines().any(|one| one == line), "{line} is not in {said}");
    }
    let whole = Bundle::open(&miniature()).unwrap();
    assert_eq!(whole.capabilities(), [Capability::Segmentation, Capability::PerceptualLoss]);
    let error = bundle.segmenter(&Device::Cpu).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "segmenter: is missing: no product is found in photos, so a training needs views.enabled=false"
        ),
        "{error}"
    );
}

#[test]
fn rare_tokens_are_words_of_the_vocabulary_where_the_bundle_names_none() {
    let tokens = |broken: &Broken| {
        let tokenizer = Tokenizer::open(&broken.at("tokenizer")).unwrap();
        Bundle::open(broken.0.path()).unwrap().rare_tokens(&tokenizer)
    };
    assert_eq!(tokens(&plain()), ["sks", "ohwx", "olis", "zwx", "xjy", "qvk"]);
    let placeholder = plain().write("tokenizer/added_tokens.json", r#"{"sks": 5}"#);
    assert_eq!(tokens(&placeholder)[..2], ["ohwx", "olis"], "a placeholder has a meaning");
    let vocab: Value =
        serde_json::from_slice(&fs::read(plain().at("tokenizer/vocab.json")).unwrap()).unwrap();
    let without = |words: &[&str]| {
        let vocab = vocab.as_object().unwrap().iter().map(|(word, id)| {
            let word = if words.contains(&word.trim_end_matches("</w>")) {
                format!("{word}!")
            } else {
                word.clone()
            };
            (word, id.clone())
        });
        let merges = fs::read_to_string(plain().at("tokenizer/merges.txt")).unwrap();
        let kept =
            merges.lines().filter(|line| !words.contains(&line.replace([' '], "").trim_end_matches("</w>")));
        let merges: Vec<&str> = kept.collect();
        plain()
            .write("tokenizer/vocab.json", Value::Object(vocab.collect()).to_string())
            .write("tokenizer/merges.txt", merges.join("\n"))
    };
    assert_eq!(tokens(&without(&["sks", "olis"])), ["ohwx", "zwx", "xjy", "qvk"]);
    let named = json!({ "rare_tokens": ["zwx", "two words", "sks", "SKS", "sks"] });
    let named = plain().write("hypnos.json", named.to_string());
    assert_eq!(
        tokens(&named),
        ["zwx", "sks"],
        "those of hypnos.json as well are one token each, and no two the same"
    );
    let none = without(&["sks", "ohwx", "olis", "zwx", "xjy", "qvk"]);
    assert_eq!(tokens(&none), [""; 0]);
    let wanted = "tokenizer: has fewer than two rare tokens: a training has to be given instance_token, and";
    assert!(none.remarks().iter().any(|line| line.starts_with(wanted)), "{:#?}", none.remarks());
}

#[test]
fn texts_that_are_too_long_for_the_text_encoder_are_one_line() {
    let broken = Broken::new().set("tokenizer/tokenizer_config.json", "model_max_length", json!(78));
    let line = "tokenizer: gives texts of 78 tokens; the text encoder has places for 77";
    assert_eq!(broken.finding(), line);
}

#[test]
fn a_training_that_scores_nothing_is_planned_without_the_metrics() {
    let broken = Broken::new();
    random_metrics(broken.0.path(), 1).unwrap();
    let broken = broken.write("metrics/dino/model.safetensors", "short");
    let bundle = Bundle::open(broken.0.path()).unwrap();
    let evaluation = EvaluationSizes {
        n_images: 1,
        n_class_images: 0,
        batch: 1,
        steps: 2,
        trials: Vec::new(),
        n_trial_images: 0,
        trial_batch: 0,
    };
    let plan = |evaluation| {
        let sizes = TrainingSizes {
            learner: Learner::Embedding,
            adamw_moments: MomentFormat::F32,
            n_steps: 2,
            n_photos: 3,
            photo_pixels: 4096,
            n_class_images: 0,
            n_views: None,
            perceptual: None,
            discriminator: None,
            evaluation,
            n_previews: 0,
            class_image_steps: 2,
            class_image_batch: 1,
            checkpointing: false,
            precision: Precision::F32,
        };
        TrainingPlan::new(&bundle, &sizes, DeviceKind::Cpu)
    };
    assert!(plan(None).is_ok());
    let error = plan(Some(evaluation)).unwrap_err().to_string();
    assert!(error.contains("metrics/dino/model.safetensors: has 5 bytes"), "{error}");
}

#[test]
fn weights_that_are_no_numbers_are_found_and_not_loaded() {
    let spoil = |names: &'static [&str], value: f32| {
        move |t: &mut BTreeMap<String, Tensor>| {
            for name in names {
                let bias = t[*name].zeros_like().unwrap().to_vec1::<f32>().unwrap();
                let spoilt: Vec<f32> =
                    bias.iter().enumerate().map(|(i, v)| if i < 2 { value } else { *v }).collect();
                t.insert((*name).into(), Tensor::new(spoilt, &Device::Cpu).unwrap());
            }
        }
    };
    let broken = Broken::new().retensor(UNET, spoil(&["conv_in.bias"], f32::NAN));
    let line = "tensor `conv_in.bias` has 2 values that are infinite or not a number";
    assert_eq!(broken.finding(), format!("{UNET}: {line}"));
    let loaded = Bundle::open(broken.0.path()).unwrap().unet(&Device::Cpu, Precision::F32, true);
    assert_eq!(loaded.unwrap_err().to_string(), format!("{}: {line}", broken.at(UNET).display()));
    let broken = Broken::new().retensor(UNET, spoil(&["conv_in.bias", "conv_norm_out.bias"], f32::INFINITY));
    let line = "has 4 values that are infinite or not a number, in 2 tensors, the first in `conv_in.bias`";
    assert_eq!(broken.finding(), format!("{UNET}: {line}"));
    // In one of several files.
    let broken = Broken::new().retensor(UNET, spoil(&["conv_out.bias"], f32::NAN));
    shard(&broken.at(UNET), 2, "diffusion_pytorch_model-{i}", INDEX);
    let finding = broken.finding();
    let line = "tensor `conv_out.bias` has 2 values that are infinite or not a number";
    assert_eq!(finding, format!("unet/{INDEX}: {line}"));
    let loaded = Bundle::open(broken.0.path())
        .unwrap()
        .unet(&Device::Cpu, Precision::F32, true)
        .unwrap_err()
        .to_string();
    assert!(loaded.contains("unet/diffusion_pytorch_model-0000") && loaded.ends_with(line), "{loaded}");
}

/// What is left when a model is saved again in another form: either may be the older one.
#[test]
fn weights_beside_those_that_are_read_are_a_remark() {
    for (part, stem, read) in [
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"),
        ("text_encoder", "model", "model.safetensors"),
    ] {
        let broken = Broken::new();
        let file = format!("{stem}.safetensors");
        let bytes = fs::read(broken.at(&format!("{part}/{file}"))).unwrap();
        let index = format!("{stem}.safetensors.index.json");
        shard(&broken.at(&format!("{part}/{file}")), 2, &format!("{stem}-{{i}}"), &index);
        assert_eq!(check(broken.0.path()).errors, []);
        assert!(!broken.remarks().iter().any(|line| line.contains("is not read: the weights are")));
        fs::write(broken.at(&format!("{part}/{file}")), bytes).unwrap();
        let other = if read == file { &index } else { &file };
        let wanted = format!("{part}/{other}: is not read: the weights are those of {read}");
        assert!(broken.remarks().contains(&wanted), "{:#?}", broken.remarks());
    }
}

#[test]
fn what_a_frozen_network_does_not_read_is_no_error() {
    let broken = Broken::new();
    random_metrics(broken.0.path(), 1).unwrap();
    let more = |t: &mut BTreeMap<String, Tensor>| {
        let one = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        // What timm's classifiers have, and what is only trained with.
        for name in [
            "conv_head.weight",
            "bn2.running_mean",
            "bn2.num_batches_tracked",
            "classifier.bias",
            "edge.0.weight",
        ] {
            t.insert(name.into(), one.clone());
        }
    };
    let file = "metrics/dino/model.safetensors";
    let broken = broken.retensor(file, more);
    assert_eq!(check(broken.0.path()).errors, []);
    let wanted = format!("{file}: tensor `edge.0.weight` is not read: the model of the config has none such");
    assert!(broken.remarks().contains(&wanted), "{:#?}", broken.remarks());
    let broken = broken.retensor(file, |t| drop(t.remove("norm.bias")));
    assert!(broken.finding().starts_with(&format!("{file}: tensor `norm.bias` of shape ")));
    // The networks that a training learns with: a classifier's head says nothing, anything else is a remark.
    for part in ["segmenter", "perceptual"] {
        let file = format!("{part}/model.safetensors");
        let broken = Broken::new().retensor(&file, more);
        assert_eq!(check(broken.0.path()).errors, [], "{part}");
        let wanted =
            format!("{file}: tensor `edge.0.weight` is not read: the model of the config has none such");
        let said = broken.remarks();
        let of_file: Vec<_> = said.iter().filter(|line| line.starts_with(&file)).collect();
        assert_eq!(of_file, [&wanted], "{part}");
        let bundle = Bundle::open(broken.0.path()).unwrap();
        match part {
            "segmenter" => drop(bundle.segmenter(&Device::Cpu).unwrap()),
            _ => drop(bundle.perceptual(&Device::Cpu).unwrap()),
        }
    }
}

#[test]
fn settings_of_a_scheduler_that_are_not_followed_are_said_and_it_draws() {
    let path = "scheduler/scheduler_config.json";
    let broken = Broken::new()
        .set(path, "algorithm_type", json!("sde-dpmsolver++"))
        .set(path, "final_sigmas_type", json!("sigma_min"))
        .set(path, "clip_sample", json!(true))
        .set(path, "steps_offset", json!(0));
    let wanted = [
        "steps_offset is 0, and is taken as 1, as diffusers takes it",
        "clip_sample is true, and is taken as false, as diffusers takes it: latents are not clipped",
        r#"algorithm_type is "sde-dpmsolver++", and is taken as "dpmsolver++" by dpmpp-2m, dpmpp-2m-karras"#,
        r#"final_sigmas_type is "sigma_min", and is taken as "zero" by dpmpp-2m, dpmpp-2m-karras, euler"#,
    ]
    .map(|line| format!("{path}: {line}"));
    let report = check(broken.0.path());
    assert_eq!(report.errors, []);
    assert_eq!(broken.remarks()[..4], wanted);
    let bundle = Bundle::open(broken.0.path()).unwrap();
    assert_eq!(bundle.warnings().len(), 4);
    assert_eq!(bundle.schedule().config().steps_offset(), 1);
    let out = tempfile::tempdir().unwrap();
    let [dir, out] = [broken.0.path(), out.path()].map(|path| path.to_str().unwrap());
    let (code, _, errors) = hypnos(&[
        "sample",
        "--bundle",
        dir,
        "--prompt",
        "a mug",
        "--steps",
        "2",
        "--out",
        out,
        "--scheduler",
        "dpmpp-2m",
    ]);
    assert_eq!(code, 0, "{errors}");
    for line in wanted {
        assert!(errors.contains(&format!("warning: {dir}/{line}")), "{errors}");
    }
    let lcm = Broken::new().set("model_index.json", "scheduler", json!(["diffusers", "LCMScheduler"]));
    let line = format!(
        "{path}: the class LCMScheduler is not among the samplers; dpmpp-2m is used where none is asked for"
    );
    assert!(lcm.remarks().contains(&line), "{:#?}", lcm.remarks());
}

#[test]
fn every_problem_is_told_not_just_the_first() {
    let broken = Broken::new()
        .remove("vae/config.json")
        .write("scheduler/scheduler_config.json", "{")
        .set("text_encoder/config.json", "vocab_size", json!(901))
        .retensor(UNET, |t| drop(t.remove("conv_in.bias")));
    let findings = broken.findings();
    for wanted in [
        "vae/config.json: is missing",
        "scheduler/scheduler_config.json: ",
        "text_encoder/config.json: vocab_size is 901, but the tokenizer has 902",
        "text_encoder/model.safetensors: tensor `text_model.embeddings.token_embedding.weight` has shape [902, 128], but [901, 128] is wanted",
        "unet/diffusion_pytorch_model.safetensors: tensor `conv_in.bias` of shape [64] is missing",
    ] {
        assert!(findings.iter().any(|line| line.starts_with(wanted)), "{wanted} is not in {findings:#?}");
    }
    assert_eq!(findings.len(), 5, "{findings:#?}");
}

#[test]
fn bad_json_is_named_with_line_and_column() {
    let finding = Broken::new().write("unet/config.json", "{\n  \"in_channels\": 4,\n}").finding();
    assert_eq!(finding, "unet/config.json: is not JSON: trailing comma at line 3 column 1");
    let finding = Broken::new().write("model_index.json", "").finding();
    assert!(finding.starts_with("model_index.json: is not JSON: "), "{finding}");
    let finding = Broken::new().write("hypnos.json", "{\"resolution\": -1}").finding();
    assert!(finding.starts_with("hypnos.json: ") && finding.contains("line 1"), "{finding}");
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both() {
    let wrong = |t: &mut BTreeMap<String, Tensor>| {
        t.insert("conv_in.weight".into(), Tensor::zeros((64, 5, 3, 3), DType::F32, &Device::Cpu).unwrap());
    };
    let wanted = "tensor `conv_in.weight` has shape [64, 5, 3, 3], but [64, 4, 3, 3] is wanted";
    let broken = Broken::new().retensor(UNET, wrong);
    assert_eq!(broken.finding(), format!("{UNET}: {wanted}"));
    let loaded = Bundle::open(broken.0.path()).unwrap().unet(&Device::Cpu, Precision::F32, false);
    assert_eq!(loaded.unwrap_err().to_string(), format!("{}: {wanted}", broken.at(UNET).display()));
}

#[test]
fn a_missing_tensor_is_named_with_the_one_it_may_be() {
    let rename = |t: &mut BTreeMap<String, Tensor>| {
        let value = t.remove("conv_norm_out.weight").unwrap();
        t.insert("model.conv_norm_out.weight".into(), value);
    };
    let broken = Broken::new().retensor(UNET, rename);
    let missing =
        "tensor `conv_norm_out.weight` of shape [64] is missing (there is `model.conv_norm_out.weight`)";
    assert_eq!(broken.finding(), format!("{UNET}: {missing}"));
    let extra = "tensor `model.conv_norm_out.weight` is not read: the model of the config has none such";
    assert!(broken.remarks().contains(&format!("{UNET}: {extra}")), "{:#?}", broken.remarks());
}

#[test]
fn a_config_that_does_not_fit_the_weights_is_told_by_tensor() {
    let broken = Broken::new().set("vae/config.json", "layers_per_block", json!(2));
    let findings = broken.findings();
    let wanted = "vae/diffusion_pytorch_model.safetensors: tensor `decoder.up_blocks.0.resnets.2.conv1.weight` of shape [64, 64, 3, 3] is missing";
    assert!(findings.iter().any(|line| line.starts_with(wanted)), "{findings:#?}");
    let findings = Broken::new().set("unet/config.json", "cross_attention_dim", json!(96)).findings();
    let wanted = "unet/config.json: cross_attention_dim is 96, but the text encoder's hidden_size is 128";
    assert!(findings.contains(&wanted.to_owned()), "{findings:#?}");
}

#[test]
fn settings_that_cannot_be_honoured_are_named() {
    let finding = Broken::new().set("unet/config.json", "class_embed_type", json!("timestep")).finding();
    assert!(finding.starts_with("unet/config.json: class_embed_type is "), "{finding}");
    let finding = Broken::new().set("text_encoder/config.json", "hidden_act", json!("tanh")).finding();
    assert!(finding.starts_with("text_encoder/config.json: ") && finding.contains("tanh"), "{finding}");
    let finding = Broken::new().set("model_index.json", "unet", json!(["diffusers", "FluxModel"])).finding();
    assert_eq!(finding, "model_index.json: unet is \"FluxModel\", wanted \"UNet2DConditionModel\"");
}

#[test]
fn sizes_beyond_belief_are_refused_before_anything_is_computed_from_them() {
    let huge = json!([u64::MAX / 2, 96, 128]);
    let finding = Broken::new().set("unet/config.json", "block_out_channels", huge).finding();
    assert_eq!(
        finding,
        "unet/config.json: block_out_channels is 9223372036854775807; at most 1000000 is believed"
    );
    let finding =
        Broken::new().set("text_encoder/config.json", "num_hidden_layers", json!(1_000_000)).finding();
    assert_eq!(finding, "text_encoder/config.json: num_hidden_layers is 1000000; at most 100 is believed");
}

#[test]
fn an_unknown_scheduler_is_named() {
    let (path, class) = ("scheduler/scheduler_config.json", json!("FlowMatchEulerDiscreteScheduler"));
    let finding = Broken::new().set("model_index.json", "scheduler", json!(["diffusers", class])).finding();
    assert!(
        finding.starts_with(&format!("model_index.json: scheduler is {class}; this program supports ")),
        "{finding}"
    );
    let other = Broken::new().set(path, "_class_name", class.clone());
    assert_eq!(check(other.0.path()).errors, [], "diffusers makes the class that the index names");
    let finding = other.remove("model_index.json").finding();
    assert!(
        finding.starts_with(&format!("{path}: _class_name is {class}; this program supports ")),
        "{finding}"
    );
}

#[test]
fn a_truncated_file_is_told_by_tensor() {
    let whole = fs::read(miniature().join(UNET)).unwrap();
    let finding = Broken::new().write(UNET, &whole[..whole.len() - 1000]).finding();
    assert!(finding.starts_with(&format!("{UNET}: tensor `")), "{finding}");
    assert!(finding.ends_with("it is truncated"), "{finding}");
    let finding = Broken::new().write(UNET, &whole[..1000]).finding();
    assert!(finding.starts_with(&format!("{UNET}: is truncated: the header alone wants ")), "{finding}");
    let finding = Broken::new().write(UNET, "short").finding();
    assert_eq!(finding, format!("{UNET}: has 5 bytes; a safetensors file has at least 8"));
    let finding = Broken::new().write(UNET, "").finding();
    assert_eq!(finding, format!("{UNET}: has 0 bytes; a safetensors file has at least 8"));
}

#[test]
fn a_header_bomb_is_refused_unread() {
    let bomb = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    let finding = Broken::new().write(UNET, bomb).finding();
    assert_eq!(
        finding,
        format!("{UNET}: announces a header of {} bytes; at most 100000000 are read", u64::MAX)
    );
    let n = 100_000_001_u64; // all there, and still too long
    let broken = Broken::new().write(UNET, n.to_le_bytes());
    fs::OpenOptions::new().write(true).open(broken.at(UNET)).unwrap().set_len(n + 8).unwrap();
    assert_eq!(
        broken.finding(),
        format!("{UNET}: announces a header of {n} bytes; at most 100000000 are read")
    );
    let deep = raw(&"[".repeat(100_000).replacen('[', "{\"a\":", 1), 0);
    let finding = Broken::new().write(UNET, deep).finding();
    assert!(finding.contains("has a header that is not JSON: recursion limit exceeded"), "{finding}");
}

#[test]
fn a_header_that_lies_is_told_by_tensor() {
    let lie = |entry: &str, n| Broken::new().write(UNET, raw(&format!("{{\"a.b\":{entry}}}"), n)).finding();
    let finding = lie(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}"#, 4);
    assert_eq!(finding, format!("{UNET}: tensor `a.b` has the impossible shape [4294967296, 4294967296]"));
    let finding = lie(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, 4);
    assert_eq!(finding, format!("{UNET}: tensor `a.b` lies at 0..4, but [2] of F32 takes 8 bytes"));
    let finding = lie(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#, 4);
    assert!(finding.starts_with(&format!("{UNET}: tensor `a.b` lies at 4..0")), "{finding}");
    let finding = lie(r#"{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}"#, 4);
    assert!(finding.starts_with(&format!("{UNET}: tensor `a.b` has a bad header entry: ")), "{finding}");
    let finding = lie(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#, 8);
    assert!(finding.starts_with(&format!("{UNET}: has an inconsistent header: ")), "{finding}");
}

#[test]
fn what_is_no_safetensors_file_is_called_by_its_name() {
    for (bytes, wanted) in [
        (&b"PK\x03\x04 and so on"[..], "is a zip archive, most likely a PyTorch pickle"),
        (b"\x80\x02}q\x00(X\x0b\x00", "is a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"\x02\0\0\0\0\0\0\0[]", "is not a safetensors file: its header does not begin with `{`"),
    ] {
        let finding = Broken::new().write(UNET, bytes).finding();
        assert!(finding.starts_with(&format!("{UNET}: {wanted}")), "{finding}");
    }
}

#[test]
fn a_file_that_differs_from_its_hash_is_named() {
    let broken = Broken::new();
    fs::copy(miniature().join("hypnos.json"), broken.at("hypnos.json")).unwrap();
    let mut bytes = fs::read(broken.at(UNET)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    let finding = broken.write(UNET, bytes).finding();
    assert!(finding.starts_with(&format!("{UNET}: has SHA-256 ")), "{finding}");
    assert!(finding.contains(", but hypnos.json says "), "{finding}");
}

#[test]
fn a_manifest_cannot_reach_outside_and_its_rare_tokens_are_tried() {
    let origin = json!({"source": "", "revision": "", "sha256": "", "licence": ""});
    let manifest =
        json!({"rare_tokens": ["sks", "two words"], "files": {"../secret": origin}, "resolution": 66});
    let findings = Broken::new().write("hypnos.json", manifest.to_string()).findings();
    assert_eq!(
        findings,
        [
            "hypnos.json: resolution is 66, wanted a multiple of the VAE's factor 4",
            "hypnos.json: rare token `two words` is not a single token of the tokenizer",
            "hypnos.json: lists `../secret`, which is not a path within the bundle",
        ]
    );
}

#[test]
fn old_attention_names_and_kernels_of_one_pixel_load_as_the_same_weights() {
    let vae = "vae/diffusion_pytorch_model.safetensors";
    let old = |t: &mut BTreeMap<String, Tensor>| {
        for coder in ["encoder", "decoder"] {
            for (new, old) in
                [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
            {
                let place = format!("{coder}.mid_block.attentions.0");
                let weight = t.remove(&format!("{place}.{new}.weight")).unwrap();
                let bias = t.remove(&format!("{place}.{new}.bias")).unwrap();
                let (rows, columns) = weight.dims2().unwrap();
                t.insert(format!("{place}.{old}.weight"), weight.reshape((rows, columns, 1, 1)).unwrap());
                t.insert(format!("{place}.{old}.bias"), bias);
            }
        }
    };
    let older = Broken::new().retensor(vae, old);
    assert_eq!(check(older.0.path()).errors, []);
    let load =
        |dir: &Path| Bundle::open(dir).unwrap().vae(&Device::Cpu, Precision::F32, false).unwrap().params;
    let (ours, theirs) = (load(&miniature()), load(older.0.path()));
    assert_eq!(ours.len(), theirs.len());
    for (name, param) in ours {
        assert_same(&param.value(), &theirs[&name].value(), &name);
    }
}

#[test]
fn the_text_encoder_loads_with_and_without_its_prefix_and_its_old_buffer() {
    let path = "text_encoder/model.safetensors";
    let strip = |t: &mut BTreeMap<String, Tensor>| {
        let stripped =
            t.iter().map(|(name, v)| (name.strip_prefix("text_model.").unwrap().to_owned(), v.clone()));
        *t = stripped.collect();
        let places = Tensor::zeros((1, 77), DType::F32, &Device::Cpu).unwrap();
        t.insert("embeddings.position_ids".into(), places);
    };
    let newer = Broken::new().retensor(path, strip);
    assert_eq!(check(newer.0.path()).errors, []);
    let load = |dir: &Path| {
        Bundle::open(dir).unwrap().text_encoder(&Device::Cpu, Precision::F32, false).unwrap().params
    };
    let (ours, theirs) = (load(&miniature()), load(newer.0.path()));
    for (name, param) in ours {
        assert_same(&param.value(), &theirs[&name].value(), &name);
    }
}

fn assert_same(a: &Tensor, b: &Tensor, name: &str) {
    assert_eq!(a.dims(), b.dims(), "{name}");
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(flat(a), flat(b), "{name}");
}

/// Writes a random bundle like the miniature.
fn random(seed: &str, dtype: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().to_str().unwrap();
    let args = ["models", "random", "--like", "miniature", "--seed", seed, "--out", out, "--dtype", dtype];
    let (code, _, errors) = hypnos(&args);
    assert_eq!(code, 0, "{errors}");
    dir
}

#[test]
fn a_random_bundle_is_the_same_for_the_same_seed_and_is_sound() {
    let (a, b, c) = (random("7", "f32"), random("7", "f32"), random("8", "f32"));
    let files = Bundle::open(a.path()).unwrap().manifest().files.clone();
    assert_eq!(files.len(), 12);
    for path in files.keys().map(String::as_str).chain(["hypnos.json"]) {
        let read = |dir: &TempDir| fs::read(dir.path().join(path)).unwrap();
        assert!(read(&a) == read(&b), "{path} differs");
        if path.ends_with("safetensors") {
            assert!(read(&a) != read(&c), "{path} is the same for another seed");
        }
    }
    assert_eq!(check(a.path()).errors, []);
}

#[test]
fn a_random_bundle_has_the_shapes_of_the_miniature() {
    let shapes = |path: PathBuf| {
        let file = TensorFile::open(&path).unwrap();
        file.names().map(|n| (n.to_owned(), file.shape(n).unwrap().to_vec())).collect::<BTreeMap<_, _>>()
    };
    let random = random("0", "bf16");
    for path in [UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"] {
        assert_eq!(shapes(random.path().join(path)), shapes(miniature().join(path)), "{path}");
    }
}

#[test]
fn a_random_bundle_is_not_written_over_anything() {
    let full = Broken::new();
    let out = full.0.path().to_str().unwrap();
    let (code, _, errors) = hypnos(&["models", "random", "--like", "miniature", "--out", out]);
    assert_eq!((code, errors), (2, format!("error: {out}: is not empty; a new directory is wanted\n")));
}

#[test]
fn saved_weights_come_back_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let device = Device::Cpu;
    // Values that all three types hold exactly; a transposed tensor, one without elements, one without axes.
    let ramp = Tensor::arange(-8f32, 8., &device).unwrap().reshape((2, 8)).unwrap();
    let many: Vec<f32> = (0..600_000).map(|i| (i % 251) as f32).collect(); // more than is converted at a time
    let wanted = BTreeMap::from([
        ("ramp".to_owned(), ramp.t().unwrap()),
        ("none".to_owned(), Tensor::zeros((0, 3), DType::F32, &device).unwrap()),
        ("many".to_owned(), Tensor::from_vec(many, (600, 1000), &device).unwrap()),
        ("one".to_owned(), Tensor::new(0.5f32, &device).unwrap()),
    ]);
    let text = BTreeMap::from([("made by".to_owned(), "a test".to_owned())]);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let path = dir.path().join("w.safetensors");
        save(&path, &wanted, &text, dtype).unwrap();
        assert_eq!(TensorFile::open(&path).unwrap().metadata(), &text);
        let weights = Weights::open(&path, &device).unwrap();
        for (name, tensor) in &wanted {
            assert_same(&weights.get(name, tensor.dims()).unwrap().value(), tensor, name);
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
}

#[test]
fn a_save_that_fails_leaves_the_old_file_and_no_temporary_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let tensors =
        |value: f32| BTreeMap::from([("a".to_owned(), Tensor::new(&[1., value], &Device::Cpu).unwrap())]);
    save(&path, &tensors(2.), &BTreeMap::new(), DType::F16).unwrap();
    let before = fs::read(&path).unwrap();
    let error = save(&path, &tensors(1e6), &BTreeMap::new(), DType::F16).unwrap_err().to_string();
    assert!(
        error.ends_with("tensor `a` holds 1000000, beyond the range of f16; save it as bf16 or f32"),
        "{error}"
    );
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn random_weights_depend_on_seed_and_name_and_not_on_the_order_of_asking() {
    let (a, b) = (Weights::random(3, &Device::Cpu), Weights::random(3, &Device::Cpu));
    let flat = |w: &Weights, name: &str, shape: &[usize]| {
        w.get(name, shape).unwrap().value().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let kernel = flat(&a, "x.conv.weight", &[128, 64, 3, 3]);
    let other = flat(&b, "y.conv.weight", &[128, 64, 3, 3]);
    assert_eq!(kernel, flat(&b.pp("x").pp("conv"), "weight", &[128, 64, 3, 3]));
    assert_ne!(kernel, other);
    let variance = kernel.iter().map(|v| v * v).sum::<f32>() / kernel.len() as f32;
    assert!((variance * 576. - 1.).abs() < 0.02, "1/fan-in, but {variance}");
    assert_eq!(flat(&a, "norm.weight", &[3]), [1., 1., 1.]);
    assert_eq!(flat(&a, "norm.bias", &[2]), [0., 0.]);
}

#[test]
fn meta_weights_list_what_a_model_would_read() {
    let weights = Weights::meta().trainable(true).pp("a");
    weights.get("b.weight", &[1 << 20, 1 << 20]).unwrap(); // four terabytes, were it real
    let params = weights.params();
    assert_eq!(params["a.b.weight"].dims(), [1 << 20, 1 << 20]);
}

#[test]
fn a_weight_asked_for_twice_is_one_weight() {
    let weights = Weights::random(0, &Device::Cpu);
    let first = weights.clone().trainable(true).get("w", &[2, 2]).unwrap();
    let again = weights.clone().trainable(true).get("w", &[2, 2]).unwrap();
    first.set(&Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
    assert_same(&first.value(), &again.value(), "w");
    let error = weights.get("w", &[2, 2]).unwrap_err().to_string();
    assert_eq!(error, "random weights of seed 0: tensor `w` is wanted as trainable and as frozen");
}
