//! A directory by diffusers, as it is downloaded or saved: whole files, shards and variants of safetensors, or pickles.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::configs::{PARTS, check_index, model_index, read_config};
use super::super::files::{bad, find_pickle, find_weights, read_json};
use super::super::tensors::Tensors;
use super::{Converted, Import, ImportOptions, Pad, Slice, manifest_of, name_of, predicting};
use crate::models::clip::{self, ClipText};
use crate::models::unet::{self, Unet};
use crate::models::vae::{self, Vae};
use crate::weights::meta_params;
use crate::{Result, param::Param};

/// The pipelines whose parts these are.
const PIPELINES: [&str; 3] =
    ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionPipelineSafe"];

pub(super) fn open(source: &Path, options: &ImportOptions) -> Result<Import> {
    if options.ema {
        return Err(bad(source, "is a directory; --ema is for single files that hold both"));
    }
    check_pipeline(source)?;
    if !source.join("unet").is_dir() {
        return Err(bad(source, "has no unet/; a directory by diffusers or a single file is wanted"));
    }
    let with = options.with.as_deref();
    let mut import = Import::new(source);
    import.manifest = manifest_of(source)?;
    import.manifest.files.clear();
    if import.manifest.name.is_empty() {
        import.manifest.name = name_of(source);
    }
    import.notes.push(format!("{}: a directory by diffusers", source.display()));
    for (part, _) in PARTS {
        if source.join(part).is_dir() {
            let input = open_weights(&source.join(part))?;
            let weights = locate(&input, &params(source, part)?)?;
            import.parts.insert(part, Converted { input: import.inputs.len(), weights });
            import.inputs.push(input);
            import.take(source, format!("{part}/config.json"));
        } else if let Some(with) = with.filter(|with| with.join(part).is_dir()) {
            import.take_part(with, part)?;
            import.notes.push(format!("{part} from {}", with.display()));
        } else {
            return Err(bad(source, format!("has no {part}/; --with names a bundle that has one")));
        }
    }
    let class = scheduler(&mut import, source, options)?;
    import.make("model_index.json", model_index(&class), "hypnos");
    let text_of = [Some(source), with].into_iter().flatten().find(|dir| dir.join("text_encoder").is_dir());
    let text = read_config(text_of.unwrap_or(source), "text_encoder", clip::Config::check)?;
    import.complete(Some(source), with, text.vocab_size, Pad::AsItIs)?;
    Ok(import)
}

/// Refuses other pipelines by their names.
fn check_pipeline(source: &Path) -> Result<()> {
    let path = source.join("model_index.json");
    if !path.exists() {
        return Ok(());
    }
    if let Some(class) = read_json(&path)?["_class_name"].as_str()
        && !PIPELINES.contains(&class)
    {
        return Err(bad(source, format!("is a {class}; a StableDiffusionPipeline of 1.x or 2.x is wanted")));
    }
    check_index(source)
}

/// The scheduler's settings; their class.
fn scheduler(import: &mut Import, source: &Path, options: &ImportOptions) -> Result<String> {
    const PATH: &str = "scheduler/scheduler_config.json";
    let has = |dir: &&Path| dir.join(PATH).exists();
    let Some(dir) = [Some(source), options.with.as_deref()].into_iter().flatten().find(has) else {
        return Err(bad(source, "has no scheduler/; --with names a bundle that has one"));
    };
    let settings = read_json(&dir.join(PATH))?;
    let class = settings["_class_name"].as_str().unwrap_or("PNDMScheduler").to_owned();
    match options.prediction {
        None => import.take(dir, PATH),
        Some(prediction) => {
            let settings = predicting(&dir.join(PATH), settings, prediction)?;
            import.make(PATH, settings, format!("{PATH} of {}, told what the UNet predicts", name_of(dir)));
        }
    }
    Ok(class)
}

/// What the model of a part reads, by its config.
fn params(dir: &Path, part: &str) -> Result<BTreeMap<String, Param>> {
    match part {
        "text_encoder" => {
            let config = read_config(dir, part, clip::Config::check)?;
            meta_params(|w| ClipText::load(w, &config))
        }
        "unet" => {
            let config = read_config(dir, part, unet::Config::check)?;
            if config.in_channels == 9 {
                return Err(bad(
                    &dir.join(part),
                    "is an inpainting UNet, which reads 9 channels; 4 are wanted",
                ));
            }
            meta_params(|w| Unet::load(w, &config))
        }
        _ => {
            let config = read_config(dir, part, vae::Config::check)?;
            meta_params(|w| Vae::load(w, &config))
        }
    }
}

/// The weights of a part: safetensors, or else pickles.
fn open_weights(dir: &Path) -> Result<Tensors> {
    match find_weights(dir) {
        Ok(safe) => Tensors::open(&safe),
        Err(none) => Tensors::open(&find_pickle(dir).ok_or(none)?),
    }
}

/// Where each weight lies.
fn locate(input: &Tensors, params: &BTreeMap<String, Param>) -> Result<BTreeMap<String, Slice>> {
    let mut weights = BTreeMap::new();
    for (ours, param) in params {
        let shape = param.dims();
        let name = input.find(ours, &shape);
        let name = name.map_err(|what| bad(input.path(), what))?;
        weights.insert(ours.clone(), Slice { name, start: 0, shape });
    }
    Ok(weights)
}
