//! What passes of Stable Diffusion 1.5 in its real sizes ask of a GPU: launches, calls of libraries and the bytes of
//! their operands. The software device counts them without computing, and the table is tests/golden/launches.tsv.

use std::collections::HashMap;
use std::process::Command;

use candle_core::cuda_backend::cudarc::driver::Profiler;
use candle_core::{DType, Device, Tensor, Var};
use hypnos::ml::Result;
use hypnos::ml::device::open;
use hypnos::ml::models::unet::Unet;
use hypnos::ml::models::vae::Vae;
use hypnos::ml::ops::{self, AdamW, AdamWConfig};
use hypnos::ml::precision::Precision;
use hypnos::ml::weights::Weights;
use serde_json::{Value, json};

/// A pass: its inputs are made first, what it returns is run once before, so that what is made once is there, and once
/// between the profiler's start and stop.
type Pass = fn(&Device) -> Result<Box<dyn FnMut() -> Result<()>>>;

const PASSES: [(&str, Pass); 7] = [
    ("UNet forward, batch 2, 64 x 64 latents, f32", |device| unet(device, Precision::F32, false)),
    ("UNet forward, batch 2, 64 x 64 latents, bf16", |device| unet(device, Precision::Bf16, false)),
    ("UNet forward, backward and AdamW, batch 2, 64 x 64 latents, f32", |device| {
        unet(device, Precision::F32, true)
    }),
    ("UNet forward, backward and AdamW, batch 2, 64 x 64 latents, bf16", |device| {
        unet(device, Precision::Bf16, true)
    }),
    ("VAE decoder forward, 512 x 512, f32", |device| vae_decode(device, Precision::F32)),
    ("VAE decoder forward, 512 x 512, bf16", |device| vae_decode(device, Precision::Bf16)),
    (
        "attention forward, and backward to the queries, batch 2, 8 heads of 40, 4,096 x 77, bf16",
        attention_of_queries,
    ),
];

/// Names the pass to a process that counts one.
const PASS: &str = "HYPNOS_TEST_PASS";

#[test]
fn stable_diffusion_launches_what_the_table_says() {
    if let Some(wanted) = std::env::var_os(PASS) {
        let (_, pass) = PASSES.iter().find(|(name, _)| wanted == *name).expect("a pass");
        return count(*pass).expect("a pass");
    }
    if !crate::cuda::emulated() {
        return;
    }
    let sections: Vec<String> =
        PASSES.iter().map(|(name, _)| format!("# {name}\n{}", counted(name))).collect();
    let table = sections.join("\n");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/launches.tsv");
    if std::env::var_os("HYPNOS_UPDATE_LAUNCHES").is_some() {
        std::fs::write(path, &table).expect("a table");
    }
    let wanted = std::fs::read_to_string(path).unwrap_or_default();
    let how = "if that is meant, run this with HYPNOS_UPDATE_LAUNCHES=1";
    assert!(wanted == table, "launches.tsv differs; {how}:\n{}", changes(&wanted, &table));
}

/// By pass, the lines that only one of the two tables has: `-` those of the file, `+` those that were counted.
fn changes(wanted: &str, table: &str) -> String {
    let mut changes = Vec::new();
    for (pass, _) in PASSES {
        let [old, new] = [wanted, table].map(|table| section(table, pass));
        let gone = old.iter().filter(|line| !new.contains(line)).map(|line| format!("- {line}"));
        let came = new.iter().filter(|line| !old.contains(line)).map(|line| format!("+ {line}"));
        let lines: Vec<String> = gone.chain(came).collect();
        if !lines.is_empty() {
            changes.push(format!("# {pass}\n{}", lines.join("\n")));
        }
    }
    changes.join("\n")
}

/// The lines of a pass in a table.
fn section<'a>(table: &'a str, pass: &str) -> Vec<&'a str> {
    let (_, rest) = table.split_once(&format!("# {pass}\n")).unwrap_or_default();
    rest.lines().take_while(|line| !line.is_empty()).collect()
}

/// What a process of its own counts.
fn counted(pass: &str) -> String {
    let counts = tempfile::NamedTempFile::new().expect("a file");
    let run = Command::new(std::env::current_exe().expect("a path"))
        .args(["--exact", "launches::stable_diffusion_launches_what_the_table_says"])
        .env(PASS, pass)
        .env("SOFTWARE_CUDA_RECORD", "1")
        .env("SOFTWARE_CUDA_COUNTS", counts.path())
        .output()
        .expect("a process");
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{pass}: {said}{}", String::from_utf8_lossy(&run.stderr));
    std::fs::read_to_string(counts.path()).expect("counts")
}

fn count(pass: Pass) -> Result<()> {
    let device = open("cuda:0")?;
    let mut run = pass(&device)?;
    run()?;
    let profiler = Profiler::new().expect("the driver's");
    run()?;
    device.synchronize()?;
    drop(profiler);
    Ok(())
}

/// Zeros of the shapes that `load` asks for.
fn weights<M>(
    device: &Device,
    precision: Precision,
    trainable: bool,
    load: impl Fn(&Weights) -> Result<M>,
) -> Result<(M, Weights)> {
    let shapes = Weights::meta();
    load(&shapes)?;
    let mut tensors = HashMap::new();
    for (name, param) in shapes.params() {
        tensors.insert(name, Tensor::zeros(param.value().dims(), DType::F32, device)?);
    }
    let weights = Weights::from_tensors(tensors, device).computing_in(precision).trainable(trainable);
    Ok((load(&weights)?, weights))
}

fn config<T: serde::de::DeserializeOwned>(config: Value) -> T {
    serde_json::from_value(config).expect("a config")
}

fn unet(device: &Device, precision: Precision, training: bool) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let of_sd15 = config(json!({"cross_attention_dim": 768}));
    let (model, weights) = weights(device, precision, training, |weights| Unet::load(weights, &of_sd15))?;
    let x = Tensor::zeros((2, 4, 64, 64), DType::F32, device)?;
    let text = Tensor::zeros((2, 77, 768), DType::F32, device)?;
    if !training {
        return Ok(Box::new(move || model.forward(&x, &[500.0; 2], &text).map(drop).map_err(Into::into)));
    }
    let params: Vec<_> = weights.params().into_values().collect();
    let mut optimiser = AdamW::new(params, AdamWConfig::default())?;
    Ok(Box::new(move || {
        let noise = x.zeros_like()?;
        (model.forward(&x, &[500.0; 2], &text)? - noise)?.sqr()?.mean_all()?.backward()?;
        optimiser.step()?;
        Ok(())
    }))
}

fn vae_decode(device: &Device, precision: Precision) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let of_sd15 = config(json!({
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
    }));
    let (model, _) = weights(device, precision, false, |weights| Vae::load(weights, &of_sd15))?;
    let latents = Tensor::zeros((1, 4, 64, 64), DType::F32, device)?;
    Ok(Box::new(move || model.decode(&latents).map(drop).map_err(Into::into)))
}

/// A picture's attention to a caption that learns nothing.
fn attention_of_queries(device: &Device) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let q = Var::zeros((2, 4096, 320), DType::BF16, device)?;
    let caption = Tensor::zeros((2, 77, 320), DType::BF16, device)?;
    Ok(Box::new(move || {
        ops::attention(&q, &caption, &caption, 8, false)?.sum_all()?.backward()?;
        Ok(())
    }))
}
