//! What the hub of the tests publishes: the small networks of `tests/bundle` and small judges, in the forms and under the
//! names of the real ones, and the table of sources that says so.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use hypnos::ml::bundle::random_metrics;
use hypnos::ml::weights::save;
use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha512};
use tempfile::TempDir;

use super::hub::{COMMIT, Hub};
use super::torch_files::{archive, stream};
use super::{Tensors, tensors};
use crate::bundles::copy;

const SMALL: [&str; 7] = [
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
];

const WEIGHTS: [&str; 3] = [
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
];

pub(super) const UNET: &str = "/sd/fifteen/resolve/main/unet/diffusion_pytorch_model.safetensors";
pub(super) const VOCAB: &str = "/sd/fifteen/resolve/main/tokenizer/vocab.json";
pub(super) const TRACER: &str = "/carve/tracer/resolve/0123456789abcdef0123456789abcdef01234567/tracer.pth";
pub(super) const INCEPTION: &str = "/plain/inception.pth";

/// A hub with everything on it, and a directory to work in.
pub(super) struct World {
    pub(super) hub: Hub,
    pub(super) dir: TempDir,
    /// The bundle whose networks are published.
    pub(super) bundle: PathBuf,
    pub(super) sources: Value,
}

impl World {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("original");
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundle"), &bundle);
        random_metrics(&bundle, 5).unwrap();
        // That of the tests is f16 in the repository; the published base is f32, and f16 beside it.
        for path in WEIGHTS.map(|path| bundle.join(path)) {
            fs::write(&path, safetensors(&tensors(&path), DType::F32)).unwrap();
        }
        let mut world = Self { hub: Hub::start().await, dir, bundle, sources: Value::Null };
        world.sources = world.publish();
        world.write_sources();
        world
    }

    pub(super) fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    /// The program with the hub, what it fetches and where it puts that; later options win.
    pub(super) fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypnos"));
        command.args(["models", "pull", "sd15", "--sources"]).arg(self.dir.path().join("sources.json"));
        command.arg("--out").arg(self.out()).args(more);
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
            command.env_remove(name).env_remove(name.to_lowercase());
        }
        command.env_remove("HF_TOKEN");
        command.env("HF_ENDPOINT", self.hub.endpoint());
        command
    }

    /// Changes an entry of the table.
    pub(super) fn set(&mut self, pointer: &str, value: Value) {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        self.sources.pointer_mut(parent).unwrap()[key] = value;
        self.write_sources();
    }

    fn write_sources(&self) {
        fs::write(self.dir.path().join("sources.json"), self.sources.to_string()).unwrap();
    }

    fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.bundle.join(path)).unwrap()
    }

    fn config(&self, part: &str) -> Value {
        serde_json::from_slice(&self.read(&format!("{part}/config.json"))).unwrap()
    }

    /// Puts a file on the hub and gives its size and hash for the table.
    fn put(&self, url: &str, bytes: Vec<u8>) -> Value {
        let about = json!({ "size": bytes.len(), "sha256": format!("{:x}", Sha256::digest(&bytes)) });
        self.hub.put(url, bytes);
        about
    }

    fn publish(&self) -> Value {
        json!({
            "name": "Small Diffusion", "kind": "small", "resolution": 64,
            "rare_tokens": ["sks", "ohwx", "olis"],
            "licences": {
                "OpenRAIL": { "url": "https://licences.example/rail", "note": "has an attachment" },
                "MIT": { "url": "https://licences.example/mit" },
                "BSD-2-Clause": { "url": "https://licences.example/bsd" },
            },
            "parts": [
                self.base(), self.segmenter(), self.perceptual(),
                self.safetensors("dino"), self.safetensors("clip"), self.inception(), self.lpips(),
            ],
        })
    }

    fn base(&self) -> Value {
        let mut files = Vec::new();
        for path in SMALL.into_iter().chain(WEIGHTS) {
            let mut file = self.put(&format!("/sd/fifteen/resolve/main/{path}"), self.read(path));
            file["path"] = json!(path);
            if WEIGHTS.contains(&path) {
                file["dtype"] = json!("f32");
                files.push(self.halved(path));
            }
            files.push(file);
        }
        json!({ "name": "base", "about": "draws", "licence": "OpenRAIL", "hub": "sd/fifteen", "revision": "main",
                "files": files })
    }

    /// The weights in f16, which go to the same place.
    fn halved(&self, path: &str) -> Value {
        let narrow = path.replace(".safetensors", ".fp16.safetensors");
        let bytes = safetensors(&tensors(&self.bundle.join(path)), DType::F16);
        let mut file = self.put(&format!("/sd/fifteen/resolve/main/{narrow}"), bytes);
        (file["path"], file["to"], file["dtype"]) = (json!(narrow), json!(path), json!("f16"));
        file
    }

    /// A zip archive with more in it than is read; its hash is of another kind.
    fn segmenter(&self) -> Value {
        let mut all = tensors(&self.bundle.join("segmenter/model.safetensors"));
        all.insert("encoder.edge.weight".into(), (vec![2, 2], vec![1.0; 4]));
        let bytes = archive(&all);
        let file = json!({ "path": "tracer.pth", "size": bytes.len(), "sha512": format!("{:x}", Sha512::digest(&bytes)) });
        self.hub.put(TRACER, bytes);
        json!({ "name": "segmenter", "about": "finds", "licence": "MIT", "hub": "carve/tracer", "revision": COMMIT,
                "into": "segmenter", "config": self.config("segmenter"), "files": [file] })
    }

    /// Safetensors with a classifier's head.
    fn perceptual(&self) -> Value {
        let mut all = tensors(&self.bundle.join("perceptual/model.safetensors"));
        all.insert("conv_head.weight".into(), (vec![3], vec![1.0; 3]));
        let mut file =
            self.put(&format!("/timm/net/resolve/{COMMIT}/model.safetensors"), safetensors(&all, DType::F32));
        file["path"] = json!("model.safetensors");
        json!({ "name": "perceptual", "about": "looks", "licence": "MIT", "hub": "timm/net", "revision": COMMIT,
                "into": "perceptual", "config": self.config("perceptual"), "files": [file] })
    }

    /// Safetensors as they are read; nothing is known of them.
    fn safetensors(&self, name: &str) -> Value {
        let into = format!("metrics/{name}");
        self.put(
            &format!("/timm/{name}/resolve/{COMMIT}/model.safetensors"),
            self.read(&format!("{into}/model.safetensors")),
        );
        json!({ "name": name, "about": "compares", "licence": "MIT", "hub": format!("timm/{name}"), "revision": COMMIT,
                "into": into, "config": self.config(&into), "files": [{ "path": "model.safetensors" }] })
    }

    /// A stream, from no hub.
    fn inception(&self) -> Value {
        let all = tensors(&self.bundle.join("metrics/inception/model.safetensors"));
        let mut file = self.put(INCEPTION, stream(&all));
        (file["url"], file["revision"]) = (json!(format!("{}{INCEPTION}", self.hub.endpoint())), json!("v1"));
        json!({ "name": "inception", "about": "compares", "licence": "MIT", "into": "metrics/inception",
                "config": self.config("metrics/inception"), "files": [file] })
    }

    /// Two files that become one: the trunk with its classifier, and the heads.
    fn lpips(&self) -> Value {
        let all = tensors(&self.bundle.join("metrics/lpips/model.safetensors"));
        let (heads, mut trunk): (Tensors, Tensors) =
            all.into_iter().partition(|(name, _)| name.starts_with("lin"));
        trunk.insert("classifier.1.weight".into(), (vec![2], vec![0.5; 2]));
        let mut files =
            [("trunk.pth", archive(&trunk)), ("heads.pth", stream(&heads))].map(|(name, bytes)| {
                let mut file = self.put(&format!("/plain/{name}"), bytes);
                file["url"] = json!(format!("{}/plain/{name}", self.hub.endpoint()));
                file["revision"] = json!("v2");
                file
            });
        files[1]["licence"] = json!("BSD-2-Clause");
        json!({ "name": "lpips", "about": "compares", "licence": "MIT", "into": "metrics/lpips",
                "config": self.config("metrics/lpips"), "files": files })
    }
}

fn safetensors(tensors: &Tensors, dtype: DType) -> Vec<u8> {
    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("it.safetensors");
    let tensors: BTreeMap<String, Tensor> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            (name.clone(), Tensor::from_vec(values.clone(), shape.as_slice(), &Device::Cpu).unwrap())
        })
        .collect();
    save(&path, &tensors, &BTreeMap::from([("format".into(), "pt".into())]), dtype).unwrap();
    fs::read(&path).unwrap()
}
