//! What is measured: names, shapes and configurations, for both sides alike. Nothing is computed here.

use serde::Serialize;
use serde_json::Value;

use super::inputs::{TEXT, UNET, VAE, json};

/// One row of the table.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Case {
    /// Stable: results of different days are compared by it.
    pub name: String,
    pub pass: Pass,
    pub work: Work,
    /// Memory one side takes at its peak, GiB, roughly.
    #[serde(skip)]
    pub gib: f64,
}

/// How far a case goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Pass {
    /// The output; nothing is recorded for a backward.
    Forward,
    /// The output, then the gradients of every input of an operation and of every trained weight.
    Backward,
    /// An optimiser's step; for a model after forward and backward.
    Step,
}

/// An operation or a model with its sizes. PyTorch's side has a function of the same name as each.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(super) enum Work {
    Conv2d {
        x: [usize; 4],
        weight: [usize; 4],
        stride: usize,
        padding: usize,
    },
    Depthwise {
        x: [usize; 4],
        weight: [usize; 4],
        stride: usize,
        padding: usize,
    },
    Linear {
        x: Vec<usize>,
        weight: [usize; 2],
        bias: bool,
    },
    LayerNorm {
        x: Vec<usize>,
    },
    GroupNormSilu {
        x: [usize; 4],
        groups: usize,
    },
    Attention {
        q: [usize; 3],
        kv: [usize; 3],
        heads: usize,
    },
    Softmax {
        x: Vec<usize>,
    },
    Geglu {
        x: Vec<usize>,
    },
    Activation {
        x: Vec<usize>,
        kind: &'static str,
    },
    Upsample {
        x: [usize; 4],
        size: [usize; 2],
    },
    Embedding {
        ids: usize,
        table: [usize; 2],
    },
    Adamw {
        shapes: Vec<[usize; 2]>,
        fused: bool,
    },
    Text {
        config: Value,
        tokens: usize,
    },
    Unet {
        config: Value,
        latents: [usize; 4],
        fused: bool,
    },
    VaeDecode {
        config: Value,
        latents: [usize; 4],
    },
    /// A whole step: text encoder and UNet, an instance and a class image, clipping and AdamW.
    Train {
        text: Value,
        config: Value,
        latents: [usize; 4],
        checkpointing: bool,
        /// The perceptual loss, through this autoencoder's decoder and this classifier.
        perceptual: Option<Looks>,
        /// The discriminator's loss, and its own step after.
        discriminator: bool,
    },
}

/// What the perceptual loss looks through.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Looks {
    pub vae: Value,
    pub classifier: Value,
}

impl Work {
    /// The sizes that matter, for a reader of the table.
    pub(super) fn sizes(&self) -> String {
        match self {
            Self::Conv2d { x, weight, stride, .. } | Self::Depthwise { x, weight, stride, .. } => {
                format!("{} * {}, stride {stride}", by(x), by(weight))
            }
            Self::Linear { x, weight, bias } => {
                format!("{} * {}{}", by(x), by(weight), if *bias { " + bias" } else { "" })
            }
            Self::GroupNormSilu { x, groups } => format!("{}, {groups} groups", by(x)),
            Self::Attention { q, kv, heads } => format!("q {}, k v {}, {heads} heads", by(q), by(kv)),
            Self::LayerNorm { x } | Self::Softmax { x } | Self::Geglu { x } | Self::Activation { x, .. } => {
                by(x)
            }
            Self::Upsample { x, size } => format!("{} to {}", by(x), by(size)),
            Self::Embedding { ids, table } => format!("{ids} of {}", by(table)),
            Self::Adamw { shapes, .. } => {
                let n: usize = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
                format!("{:.1} M weights, {} tensors", n as f64 / 1e6, shapes.len())
            }
            Self::Text { tokens, .. } => format!("1x{tokens} tokens"),
            Self::Unet { latents, .. } => format!("{}, text {}x77", by(latents), latents[0]),
            Self::VaeDecode { latents, .. } => by(latents),
            Self::Train { latents, checkpointing, perceptual, discriminator, .. } => {
                let also = [
                    (*checkpointing, ", checkpointing"),
                    (perceptual.is_some(), ", perceptual"),
                    (*discriminator, ", discriminator"),
                ];
                let also: String = also.into_iter().filter(|(is, _)| *is).map(|(_, what)| what).collect();
                format!("{}, text 2x77{also}", by(latents))
            }
        }
    }
}

fn by(sizes: &[usize]) -> String {
    sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join("x")
}

/// Every case, the small ones first. Those of real size are for GPUs.
pub(super) fn all(on_gpu: bool) -> Vec<Case> {
    let both = |(name, work): (&str, Work)| {
        [(Pass::Forward, "fwd"), (Pass::Backward, "fwd+bwd")]
            .map(|(pass, suffix)| case(format!("{name}/{suffix}"), pass, work.clone(), 0.5))
    };
    let steps = [false, true].map(|fused| {
        let name = format!("adamw-25m/{}", if fused { "fused" } else { "default" });
        case(name, Pass::Step, Work::Adamw { shapes: shapes_of_25m(), fused }, 0.6)
    });
    let real = if on_gpu { real_models() } else { Vec::new() };
    operations().into_iter().flat_map(both).chain(steps).chain(models()).chain(real).collect()
}

fn case(name: impl Into<String>, pass: Pass, work: Work, gib: f64) -> Case {
    Case { name: name.into(), pass, work, gib }
}

fn operations() -> Vec<(&'static str, Work)> {
    let conv = |c: usize, o: usize, side: usize, kernel: usize, stride: usize, b: usize| Work::Conv2d {
        x: [b, c, side, side],
        weight: [o, c, kernel, kernel],
        stride,
        padding: kernel / 2,
    };
    let depthwise =
        |stride| Work::Depthwise { x: [1, 240, 64, 64], weight: [240, 1, 5, 5], stride, padding: 2 };
    let linear =
        |rows, n_in, n_out, bias| Work::Linear { x: vec![1, rows, n_in], weight: [n_out, n_in], bias };
    let norm = |c, side| Work::GroupNormSilu { x: [1, c, side, side], groups: 32 };
    let attention = |l, s, heads, width| Work::Attention { q: [1, l, width], kv: [1, s, width], heads };
    let activation = |kind| Work::Activation { x: vec![1 << 20], kind };
    vec![
        ("conv3x3-320-32", conv(320, 320, 32, 3, 1, 1)),
        ("conv3x3-640-16", conv(640, 640, 16, 3, 1, 1)),
        ("conv3x3-1280-8", conv(1280, 1280, 8, 3, 1, 1)),
        ("conv3x3-2560-1280-4-b2", conv(2560, 1280, 4, 3, 1, 2)),
        ("conv3x3-128-256", conv(128, 128, 256, 3, 1, 1)),
        ("conv3x3-320-32-stride2", conv(320, 320, 32, 3, 2, 1)),
        ("conv1x1-640-320-32", conv(640, 320, 32, 1, 1, 1)),
        ("depthwise5x5-240-64", depthwise(1)),
        ("depthwise5x5-240-64-stride2", depthwise(2)),
        ("linear-1024x320-2560", linear(1024, 320, 2560, true)),
        ("linear-77x768-320", linear(77, 768, 320, false)),
        ("layer-norm-1024x320", Work::LayerNorm { x: vec![1, 1024, 320] }),
        ("group-norm-silu-320-32", norm(320, 32)),
        ("group-norm-silu-128-256", norm(128, 256)),
        ("attention-self-8x1024x40", attention(1024, 1024, 8, 320)),
        ("attention-cross-8x1024x77x40", attention(1024, 77, 8, 320)),
        ("attention-self-8x256x80", attention(256, 256, 8, 640)),
        ("attention-vae-1x1024x512", attention(1024, 1024, 1, 512)),
        ("softmax-8x1024x1024", Work::Softmax { x: vec![8, 1024, 1024] }),
        ("geglu-1024x2560", Work::Geglu { x: vec![1, 1024, 2560] }),
        ("gelu-1m", activation("gelu")),
        ("silu-1m", activation("silu")),
        ("quick-gelu-1m", activation("quick_gelu")),
        ("upsample-640-16-32", Work::Upsample { x: [1, 640, 16, 16], size: [32, 32] }),
        ("embedding-77-49408x768", Work::Embedding { ids: 77, table: [49408, 768] }),
    ]
}

/// Thirty tensors of the sizes a UNet has, 24.9 million weights: matrices, 3x3 kernels and biases, as rows and columns.
fn shapes_of_25m() -> Vec<[usize; 2]> {
    let matrices = [[1280, 1280]; 5].into_iter().chain([[2560, 1280]; 2]);
    let kernels = [[640, 640], [1280, 320], [640, 320], [320, 320]].map(|[o, c]| [o, c * 3 * 3]);
    matrices.chain(kernels).chain([[1280, 1]; 19]).collect()
}

fn models() -> Vec<Case> {
    let text = Work::Text { config: json(TEXT), tokens: 77 };
    let unet = |fused| Work::Unet { config: json(UNET), latents: [1, 4, 32, 32], fused };
    let train = |side, checkpointing| Work::Train {
        text: json(TEXT),
        config: json(UNET),
        latents: [2, 4, side, side],
        checkpointing,
        perceptual: None,
        discriminator: false,
    };
    let hypnos = || Work::Train {
        text: json(TEXT),
        config: json(UNET),
        latents: [2, 4, 16, 16],
        checkpointing: false,
        perceptual: Some(Looks { vae: json(VAE), classifier: json(CLASSIFIER) }),
        discriminator: true,
    };
    let small = |looks: bool, discriminator| Work::Train {
        text: json(SMALL_TEXT),
        config: json(SMALL_UNET),
        latents: [2, 4, 16, 16],
        checkpointing: false,
        perceptual: looks.then(|| Looks { vae: json(SMALL_VAE), classifier: json(SMALL_CLASSIFIER) }),
        discriminator,
    };
    let vae = Work::VaeDecode { config: json(VAE), latents: [1, 4, 32, 32] };
    vec![
        case("text-encoder/fwd", Pass::Forward, text.clone(), 0.7),
        case("text-encoder/fwd+bwd", Pass::Backward, text, 1.3),
        case("vae-decode-32/fwd", Pass::Forward, vae.clone(), 2.0),
        case("vae-decode-32/fwd+bwd", Pass::Backward, vae, 5.0),
        case("unet-32/fwd", Pass::Forward, unet(false), 4.0),
        case("unet-32/fwd+bwd", Pass::Backward, unet(false), 9.0),
        case("unet-32/fwd+bwd+adamw", Pass::Step, unet(false), 15.5),
        case("unet-32/fwd+bwd+adamw-fused", Pass::Step, unet(true), 15.5),
        case("train-small", Pass::Step, small(false, false), 0.5),
        case("hypnos-small-no-perceptual", Pass::Step, small(false, true), 0.5),
        case("hypnos-small-no-discriminator", Pass::Step, small(true, false), 0.5),
        case("hypnos-small", Pass::Step, small(true, true), 0.5),
        case("hypnos-128", Pass::Step, hypnos(), 19.0),
        case("train-256", Pass::Step, train(32, false), 19.0),
        case("train-512-checkpointing", Pass::Step, train(64, true), 20.0),
    ]
}

/// Stable Diffusion 1.5 at its own size, 512 pixels.
fn real_models() -> Vec<Case> {
    let unet = Work::Unet { config: json(UNET), latents: [2, 4, 64, 64], fused: true };
    let vae = Work::VaeDecode { config: json(VAE), latents: [1, 4, 64, 64] };
    let train = |method: bool| Work::Train {
        text: json(TEXT),
        config: json(UNET),
        latents: [2, 4, 64, 64],
        checkpointing: false,
        perceptual: method.then(|| Looks { vae: json(VAE), classifier: json(CLASSIFIER) }),
        discriminator: method,
    };
    vec![
        case("unet-512-b2/fwd", Pass::Forward, unet.clone(), 6.0),
        case("unet-512-b2/fwd+bwd", Pass::Backward, unet, 20.0),
        case("vae-decode-512/fwd", Pass::Forward, vae.clone(), 6.0),
        case("vae-decode-512/fwd+bwd", Pass::Backward, vae, 12.0),
        case("dreambooth-512", Pass::Step, train(false), 30.0),
        case("hypnos-512", Pass::Step, train(true), 40.0),
    ]
}

/// EfficientNet-B1.
const CLASSIFIER: &str = r#"{ "width_coefficient": 1.0, "depth_coefficient": 1.1 }"#;

// Models of a few million weights for pictures of 128 x 128, such as a CPU trains in minutes.

const SMALL_TEXT: &str = r#"{
    "vocab_size": 902, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5
}"#;

const SMALL_UNET: &str = r#"{
    "in_channels": 4, "out_channels": 4, "sample_size": 16, "block_out_channels": [64, 96, 128],
    "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 128, "norm_num_groups": 16,
    "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": true, "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
}"#;

const SMALL_VAE: &str = r#"{
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 128,
    "block_out_channels": [32, 48, 64, 96], "layers_per_block": 1, "norm_num_groups": 8, "act_fn": "silu",
    "scaling_factor": 0.4,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
}"#;

const SMALL_CLASSIFIER: &str = r#"{ "width_coefficient": 0.5, "depth_coefficient": 0.5 }"#;

#[test]
fn names_are_unique_and_fit_a_command_line() {
    let cases = all(true);
    let names: std::collections::BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len());
    let plain = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-+/".contains(&b));
    assert!(names.iter().all(|name| plain(name)), "{names:?}");
}

#[test]
fn the_optimiser_has_thirty_tensors_of_25_million_weights() {
    let shapes = shapes_of_25m();
    let n: usize = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
    assert_eq!((shapes.len(), n), (30, 24_907_520));
}

#[test]
fn every_operation_has_its_counterpart_in_pytorch() {
    for case in all(true) {
        let work = serde_json::to_value(&case.work).expect("a case is plain data");
        let op = work["op"].as_str().expect("the name of an operation");
        assert!(super::torch::PROGRAM.contains(&format!("\ndef {op}(")), "{op}");
        assert_ne!(work["config"], serde_json::json!({}), "{}", case.name);
        assert!(work.get("config").is_none_or(Value::is_object), "{}", case.name);
    }
}
