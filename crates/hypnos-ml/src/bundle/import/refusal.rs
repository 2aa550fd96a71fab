//! What else a file of weights may be, told by the names in it.

use super::super::tensors::Tensors;
use crate::export::ldm_names::UNET;

/// How a name tells.
enum Sign {
    Begins(&'static str),
    Holds(&'static str),
}

use Sign::{Begins, Holds};

/// What holds tensors of such names and no UNet. The first that fits counts, here and below.
const ADDITIONS: [(Sign, &str); 5] = [
    (Holds(".lora_up."), LORA),
    (Holds(".lora_down."), LORA),
    (Holds(".lora_A."), LORA),
    (Holds(".hada_w1"), LORA),
    (Begins("lora_"), LORA),
];

/// What holds tensors of such names, with a UNet or without.
const OTHER_MODELS: [(Sign, &str); 11] = [
    (Begins("conditioner.embedders.1."), "is a Stable Diffusion XL checkpoint"),
    (Begins("conditioner.embedders.0."), "is a Stable Diffusion XL refiner"),
    (Begins("control_model."), CONTROL),
    (Begins("controlnet_"), CONTROL),
    (Begins("zero_convs."), CONTROL),
    (Begins("model.diffusion_model.joint_blocks."), "is a Stable Diffusion 3 checkpoint"),
    (Begins("model.diffusion_model.double_blocks."), "is a Flux checkpoint"),
    (Begins("double_blocks."), "is a Flux checkpoint"),
    (Holds(".motion_modules."), "is a motion module for videos"),
    (
        Begins("model.diffusion_model.label_emb."),
        "is a checkpoint that draws with a class or a picture (unCLIP, XL)",
    ),
    (Begins("embedder.model.visual."), "is a checkpoint that draws with a picture (unCLIP)"),
];

/// What holds tensors of such names and no UNet. Beside one, they are left-overs that nothing reads.
const PARTS: [(Sign, &str); 5] = [
    (Begins("down_blocks."), "is a UNet alone by diffusers' names, which comes in a directory"),
    (Begins("decoder."), "is an autoencoder alone"),
    (Begins("text_model."), "is a text encoder alone"),
    (Begins("emb_params"), EMBEDDING),
    (Begins("string_to_param"), EMBEDDING),
];

const LORA: &str = "is a LoRA, which changes a checkpoint and is none";
const CONTROL: &str = "is a ControlNet";
const EMBEDDING: &str = "is an embedding of textual inversion";

/// Channels that the UNet reads where it reads more than latents.
const CHANNELS: [(usize, &str); 4] = [
    (9, "is an inpainting checkpoint, whose UNet reads 9 channels"),
    (8, "is an InstructPix2Pix checkpoint, whose UNet reads 8 channels"),
    (5, "is a depth checkpoint, whose UNet reads 5 channels"),
    (7, "is an upscaling checkpoint, whose UNet reads 7 channels"),
];

/// What was wanted.
const WANTED: &str = "a checkpoint of Stable Diffusion 1.x or 2.x by its original names is wanted";

/// Why this is no checkpoint that can be imported, as far as names tell.
pub(super) fn something_else(tensors: &Tensors) -> Option<String> {
    let fits = |sign: &Sign| {
        tensors.names().any(|name| match sign {
            Begins(begin) => name.starts_with(begin),
            Holds(part) => name.contains(part),
        })
    };
    let first = tensors.shape(&format!("{UNET}.input_blocks.0.0.weight"));
    let (additions, parts) = if first.is_none() { (&ADDITIONS[..], &PARTS[..]) } else { Default::default() };
    let mut signs = additions.iter().chain(&OTHER_MODELS).chain(parts);
    let what = signs.find(|(sign, _)| fits(sign)).map(|(_, what)| *what);
    let channels = first.and_then(|shape| shape.get(1)).copied();
    let by_channels = || CHANNELS.iter().find(|(n, _)| channels == Some(*n)).map(|(_, what)| *what);
    match what.or_else(by_channels) {
        Some(what) => Some(format!("{what}; {WANTED}")),
        None if first.is_none() => Some(format!("has no `{UNET}.*`; {WANTED}")),
        None => None,
    }
}
