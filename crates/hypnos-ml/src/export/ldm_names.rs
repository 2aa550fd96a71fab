//! Maps the names of weights in diffusers and transformers to those in the original code of Stable Diffusion.
//!
//! CompVis/stable-diffusion numbers the UNet's blocks in one row down and one row up (`UNetModel` in
//! `ldm/modules/diffusionmodules/openaimodel.py`); its autoencoder has levels, which the decoder counts from the
//! picture as the encoder does (`model.py` beside it). Its text encoder has transformers' names; that of Stable Diffusion
//! 2 has OpenCLIP's (`TextTransformer` of open_clip's `transformer.py`), which packs three projections into one tensor.
//! AUTOMATIC1111 and ComfyUI read these names. Reading a single file goes through the same table: each weight that a
//! model wants is looked for where it would be written.

use std::collections::HashMap;

use crate::models::{clip, unet, vae};
use crate::ops::Activation;

/// Layers outside all blocks of the UNet.
const UNET_ENDS: [(&str, &str); 5] = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

/// Layers of a residual block of the UNet; those of its transformers are called the same.
const UNET_RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// Layers of a residual block of the autoencoder that are not called the same.
const VAE_RESNET: [(&str, &str); 1] = [("conv_shortcut", "nin_shortcut")];

/// Layers of the autoencoder's attention.
const VAE_ATTENTION: [(&str, &str); 5] =
    [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")];

/// Paths of modules that lie elsewhere or are called otherwise, and where they lie. They carry what lies below them
/// along; what is not here is called the same.
type Moved = HashMap<String, String>;

/// Layers of OpenCLIP's text encoder that are not called the same, behind its prefix.
const OPEN_CLIP_ENDS: [(&str, &str); 3] = [
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm.", "ln_final."),
];

/// Layers of its blocks.
const OPEN_CLIP_BLOCK: [(&str, &str); 8] = [
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("self_attn.q_proj.", "attn.in_proj_"),
    ("self_attn.k_proj.", "attn.in_proj_"),
    ("self_attn.v_proj.", "attn.in_proj_"),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
];

/// The order of the projections that are packed into one tensor.
const PACKED: [&str; 3] = [".q_proj.", ".k_proj.", ".v_proj."];

/// Where OpenAI's text encoder lies.
pub(crate) const CLIP: &str = "cond_stage_model.transformer";

/// Where OpenCLIP's lies.
pub(crate) const OPEN_CLIP: &str = "cond_stage_model.model";

/// Where the UNet lies.
pub(crate) const UNET: &str = "model.diffusion_model";

/// Where the autoencoder lies.
pub(crate) const VAE: &str = "first_stage_model";

/// Where a tensor lies in a single file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// What it is called there.
    pub name: String,
    /// Shape of all that is called so: the tensor's own elements in the same order, or several tensors one behind the
    /// other along the first axis.
    pub shape: Vec<usize>,
    /// The row at which it begins there.
    pub row: usize,
}

/// The names of one model, whatever its depth.
#[derive(Debug)]
pub struct LdmNames {
    open_clip: bool,
    unet: Moved,
    vae: Moved,
}

impl LdmNames {
    /// For models of these configs. A text encoder with the exact gelu is OpenCLIP's.
    pub fn new(text: &clip::Config, unet: &unet::Config, vae: &vae::Config) -> Self {
        let open_clip = text.hidden_act == Activation::Gelu;
        Self { open_clip, unet: unet_modules(unet), vae: vae_modules(vae) }
    }

    /// Where in a single file a tensor of `part` (`text_encoder`, `unet` or `vae`) lies that diffusers calls `name`.
    pub fn of(&self, part: &str, name: &str, shape: &[usize]) -> Place {
        let (prefix, theirs) = match part {
            "text_encoder" if self.open_clip => return open_clip(name, shape),
            "text_encoder" => (CLIP, name.to_owned()),
            "unet" => (UNET, moved(name, &self.unet)),
            _ => (VAE, moved(name, &self.vae)),
        };
        let mut shape = shape.to_vec();
        if part == "vae" && name.contains(".attentions.") && shape.len() == 2 {
            shape.extend([1, 1]); // matrices are convolutions of one pixel there
        }
        Place { name: format!("{prefix}.{theirs}"), shape, row: 0 }
    }
}

/// The same of a tensor of OpenCLIP's text encoder.
fn open_clip(name: &str, shape: &[usize]) -> Place {
    let ours = name.strip_prefix("text_model.").unwrap_or(name);
    let replaced = |layers: &[(&str, &str)], ours: &str| {
        let (from, to) = layers.iter().find(|(from, _)| ours.starts_with(from))?;
        Some(format!("{to}{}", &ours[from.len()..]))
    };
    let of_block = |rest: &str| {
        let (block, layer) = rest.split_once('.')?;
        Some(format!("transformer.resblocks.{block}.{}", replaced(&OPEN_CLIP_BLOCK, layer)?))
    };
    let theirs = match ours.strip_prefix("encoder.layers.") {
        Some(rest) => of_block(rest),
        None => replaced(&OPEN_CLIP_ENDS, ours),
    };
    let name = format!("{OPEN_CLIP}.{}", theirs.as_deref().unwrap_or(ours));
    let mut shape = shape.to_vec();
    let Some(third) = PACKED.iter().position(|packed| ours.contains(packed)) else {
        return Place { name, shape, row: 0 };
    };
    let row = third * shape[0];
    shape[0] *= PACKED.len();
    Place { name, shape, row }
}

/// A name with the longest of its paths that has moved where it lies now.
fn moved(name: &str, to: &Moved) -> String {
    let mut paths = name.rmatch_indices('.').map(|(end, _)| name.split_at(end));
    let found = paths.find_map(|(path, rest)| to.get(path).map(|theirs| format!("{theirs}{rest}")));
    found.unwrap_or_else(|| name.to_owned())
}

/// Notes the layers of a block.
fn note(moved: &mut Moved, ours: &str, theirs: &str, layers: &[(&str, &str)]) {
    moved.extend(layers.iter().map(|(a, b)| (format!("{ours}.{a}"), format!("{theirs}.{b}"))));
}

fn unet_modules(config: &unet::Config) -> Moved {
    let n_levels = config.block_out_channels.len();
    let mut moved: Moved = UNET_ENDS.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    // 1. Down: the first block is `conv_in`, and each halving has one of its own.
    let mut n = 1;
    for level in 0..n_levels {
        let ours = format!("down_blocks.{level}");
        for layer in 0..config.n_layers(level) {
            let theirs = format!("input_blocks.{n}");
            note(&mut moved, &format!("{ours}.resnets.{layer}"), &format!("{theirs}.0"), &UNET_RESNET);
            moved.insert(format!("{ours}.attentions.{layer}"), format!("{theirs}.1"));
            n += 1;
        }
        if level + 1 < n_levels {
            moved.insert(format!("{ours}.downsamplers.0.conv"), format!("input_blocks.{n}.0.op"));
            n += 1;
        }
    }
    // 2. Middle.
    note(&mut moved, "mid_block.resnets.0", "middle_block.0", &UNET_RESNET);
    moved.insert("mid_block.attentions.0".into(), "middle_block.1".into());
    note(&mut moved, "mid_block.resnets.1", "middle_block.2", &UNET_RESNET);
    // 3. Up: a doubling belongs to the last block of its level, behind what else is there.
    let mut n = 0;
    for i in 0..n_levels {
        let (ours, n_layers) = (format!("up_blocks.{i}"), config.n_layers(n_levels - 1 - i) + 1);
        for layer in 0..n_layers {
            let theirs = format!("output_blocks.{n}");
            note(&mut moved, &format!("{ours}.resnets.{layer}"), &format!("{theirs}.0"), &UNET_RESNET);
            moved.insert(format!("{ours}.attentions.{layer}"), format!("{theirs}.1"));
            if layer + 1 == n_layers {
                let behind = 1 + usize::from(config.attends_up(i));
                moved.insert(format!("{ours}.upsamplers.0.conv"), format!("{theirs}.{behind}.conv"));
            }
            n += 1;
        }
    }
    moved
}

fn vae_modules(config: &vae::Config) -> Moved {
    let (n_levels, mut moved) = (config.block_out_channels.len(), Moved::new());
    let resnet = |moved: &mut Moved, ours: String, theirs: String| {
        note(moved, &ours, &theirs, &VAE_RESNET);
        moved.insert(ours, theirs);
    };
    for coder in ["encoder", "decoder"] {
        let (ours, theirs) = (format!("{coder}.mid_block"), format!("{coder}.mid"));
        resnet(&mut moved, format!("{ours}.resnets.0"), format!("{theirs}.block_1"));
        note(&mut moved, &format!("{ours}.attentions.0"), &format!("{theirs}.attn_1"), &VAE_ATTENTION);
        resnet(&mut moved, format!("{ours}.resnets.1"), format!("{theirs}.block_2"));
        moved.insert(format!("{coder}.conv_norm_out"), format!("{coder}.norm_out"));
    }
    for i in 0..n_levels {
        let (ours, theirs) = (format!("encoder.down_blocks.{i}"), format!("encoder.down.{i}"));
        for layer in 0..config.layers_per_block {
            resnet(&mut moved, format!("{ours}.resnets.{layer}"), format!("{theirs}.block.{layer}"));
        }
        moved.insert(format!("{ours}.downsamplers.0"), format!("{theirs}.downsample"));
        // The decoder counts its levels from the picture too.
        let (ours, theirs) = (format!("decoder.up_blocks.{i}"), format!("decoder.up.{}", n_levels - 1 - i));
        for layer in 0..=config.layers_per_block {
            resnet(&mut moved, format!("{ours}.resnets.{layer}"), format!("{theirs}.block.{layer}"));
        }
        moved.insert(format!("{ours}.upsamplers.0"), format!("{theirs}.upsample"));
    }
    moved
}
