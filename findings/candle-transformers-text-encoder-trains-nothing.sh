#!/usr/bin/env bash
# candle-transformers' CLIP text encoder cannot be trained, and does not say so: backward succeeds with no gradients.
#
# Seen with candle-core, candle-nn and candle-transformers 0.11.1 on a CPU. The text encoder ends with candle-nn's layer
# norm, whose fused kernel has no backward. `loss.backward()` on its output returns Ok all the same, with a gradient for
# none of the trainable variables; an optimiser then changes nothing. A loss on one of candle-nn's plain linear layers
# has gradients for all of them, so the variables and the optimiser's way of finding gradients are right.
# Output seen: "linear: 2 of 2", "text encoder: 0 of 36".
#
# What helps: layer norms written with tensor operations (candle_nn::ops::layer_norm_slow), or operations of one's own.
# Fails if candle behaves otherwise. Needs a Rust toolchain; compiles candle, which takes some minutes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/src"
cat >"$work/Cargo.toml" <<'TOML'
[package]
name = "gradients"
version = "0.1.0"
edition = "2024"

[dependencies]
candle-core = "=0.11.1"
candle-nn = "=0.11.1"
candle-transformers = "=0.11.1"

[profile.dev]
debug = false
TOML
cat >"$work/src/main.rs" <<'RUST'
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_transformers::models::clip::text_model::{Activation, ClipTextConfig, ClipTextTransformer};

/// How many of the variables got a gradient.
fn report(name: &str, output: &Tensor, variables: &VarMap) -> Result<()> {
    let gradients = output.sqr()?.mean_all()?.backward()?;
    let all = variables.all_vars();
    let n = all.iter().filter(|variable| gradients.get(variable).is_some()).count();
    println!("{name}: {n} of {}", all.len());
    Ok(())
}

fn main() -> Result<()> {
    let cpu = Device::Cpu;
    let variables = VarMap::new();
    let linear = candle_nn::linear(4, 4, VarBuilder::from_varmap(&variables, DType::F32, &cpu))?;
    report("linear", &linear.forward(&Tensor::ones((2, 4), DType::F32, &cpu)?)?, &variables)?;

    let variables = VarMap::new();
    let config = ClipTextConfig {
        vocab_size: 16,
        embed_dim: 8,
        activation: Activation::QuickGelu,
        intermediate_size: 16,
        max_position_embeddings: 4,
        pad_with: None,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        projection_dim: 8,
    };
    let model = ClipTextTransformer::new(VarBuilder::from_varmap(&variables, DType::F32, &cpu), &config)?;
    let ids = Tensor::new(&[[1u32, 5, 7, 15]], &cpu)?;
    report("text encoder", &model.forward_with_mask(&ids, usize::MAX)?, &variables)
}
RUST
said=$(cd "$work" && CARGO_TARGET_DIR=$work/target cargo run --quiet)
echo "$said"
case $said in
"linear: 2 of 2
text encoder: 0 of 36") ;;
*) echo "candle behaves otherwise now" >&2; exit 1 ;;
esac
