//! A checkpoint in one file, by the names of the original code (`export::ldm_names`).
//!
//! As diffusers' `from_single_file`, it does not work the configs out of shapes: the UNet's tensors say which family it
//! is of, and everything else is that family's. A model of other sizes can be read with a bundle of the same sizes,
//! whose configs are taken; numbers of heads are nowhere in a checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::super::configs::{model_index, read_config};
use super::super::families::{Like, Sizes};
use super::super::files::{bad, read_json};
use super::super::manifest::{Manifest, RESOLUTIONS};
use super::super::tensors::Tensors;
use super::refusal::something_else;
use super::{Converted, Import, ImportOptions, Pad, Slice, manifest_of, name_of, predicting, stem_of};
use crate::diffusion::Prediction;
use crate::export::ldm_names::{CLIP, LdmNames, OPEN_CLIP, UNET, VAE};
use crate::models::clip::{self, ClipText};
use crate::models::unet::{self, Unet};
use crate::models::vae::{self, Vae};
use crate::product::Product;
use crate::weights::{meta_params, without_kernel};
use crate::{Error, Result};

/// A build that a checkpoint may have, and the configs of it.
struct Family {
    /// What people call it.
    name: String,
    /// The sizes, where they are known here.
    sizes: Option<Sizes>,
    json: BTreeMap<&'static str, Value>,
    text: clip::Config,
    unet: unet::Config,
    vae: vae::Config,
}

/// Names and shapes that a part's model reads.
type Shapes = BTreeMap<String, Vec<usize>>;

pub(super) fn open(source: &Path, options: &ImportOptions) -> Result<Import> {
    let tensors = Tensors::open(source)?;
    if let Some(what) = something_else(&tensors) {
        return Err(bad(source, what));
    }
    let with = options.with.as_deref();
    let family = family(&tensors, with)?;
    let mut import = Import::new(source);

    // 1. Weights.
    let names = LdmNames::new(&family.text, &family.unet, &family.vae);
    let unet = locate(&tensors, &names, "unet", &family.shapes("unet")?, options.ema);
    let unet = unet.map_err(|what| bad(source, family.refusal(&what)))?;
    import.parts.insert("unet", Converted { input: 0, weights: unet });
    import.make("unet/config.json", family.json["unet"].clone(), family.origin());
    for (part, prefixes) in [("text_encoder", &[CLIP, OPEN_CLIP][..]), ("vae", &[VAE])] {
        let begins =
            |name: &str| prefixes.iter().any(|p| name.strip_prefix(p).is_some_and(|r| r.starts_with('.')));
        if tensors.names().any(begins) {
            let weights = locate(&tensors, &names, part, &family.shapes(part)?, false);
            let weights = weights.map_err(|what| bad(source, family.refusal(&what)))?;
            import.parts.insert(part, Converted { input: 0, weights });
            import.make(&format!("{part}/config.json"), family.json[part].clone(), family.origin());
        } else if let Some(with) = with.filter(|with| with.join(part).is_dir()) {
            import.take_part(with, part)?;
            import.notes.push(format!("{part} from {}", with.display()));
        } else {
            let what = format!("has no {part} (`{}.*`); --with names a bundle that has one", prefixes[0]);
            return Err(bad(source, what));
        }
    }

    // 2. What they do.
    let (prediction, why) = prediction(&tensors, options, &family)?;
    let (scheduler, class) = family.scheduler(prediction, with)?;
    import.make("scheduler/scheduler_config.json", scheduler, family.origin());
    import.make("model_index.json", model_index(&class), "hypnos");
    import.manifest = manifest(&tensors, &family, prediction, with)?;
    let side = import.manifest.resolution.map_or(String::new(), |side| format!(", {side}x{side} pixels"));
    let average = if options.ema { ", the moving average of its weights" } else { "" };
    let what =
        format!("{}: {}{side}, predicts {}{why}{average}", source.display(), family.name, prediction.word());
    import.notes.insert(0, what);
    if let (Some(sizes), Some(side)) = (&family.sizes, import.manifest.resolution) {
        let mut config = family.json["unet"].clone();
        config["sample_size"] = (side * sizes.unet_side / sizes.resolution()).into();
        import.make("unet/config.json", config, family.origin());
    }

    if !options.ema && tensors.names().any(|name| name.starts_with("model_ema.diffusion_model")) {
        import.notes.push("the moving average of the UNet's weights is left out; --ema takes it".into());
    }

    // 3. What no checkpoint has.
    import.complete(None, with, family.text.vocab_size, family.pad())?;
    import.inputs.push(tensors);
    Ok(import)
}

impl Family {
    /// One of those that everybody knows.
    fn known(name: &str, like: Like) -> Result<Self> {
        let sizes = like.sizes();
        let mut json = BTreeMap::new();
        for (path, mut config) in sizes.configs() {
            if let (Some((part, _)), Some(config)) = (path.split_once('/'), config.as_object_mut()) {
                config.remove("timestep_spacing"); // its files leave that to each sampler
                json.insert(part, Value::Object(config.clone()));
            }
        }
        let (text, unet, vae) = (typed(&json["text_encoder"])?, typed(&json["unet"])?, typed(&json["vae"])?);
        Ok(Self { name: name.to_owned(), sizes: Some(sizes), json, text, unet, vae })
    }

    /// That of a bundle, if it has one.
    fn of_bundle(dir: &Path) -> Result<Option<Self>> {
        let files = ["text_encoder", "unet", "vae"].map(|part| (part, dir.join(part).join("config.json")));
        let scheduler = dir.join("scheduler/scheduler_config.json");
        if !files.iter().all(|(_, path)| path.exists()) || !scheduler.exists() {
            return Ok(None);
        }
        let mut json = BTreeMap::from([("scheduler", read_json(&scheduler)?)]);
        for (part, path) in files {
            json.insert(part, read_json(&path)?);
        }
        Ok(Some(Self {
            name: format!("model of the sizes of {}", name_of(dir)),
            sizes: None,
            json,
            text: read_config(dir, "text_encoder", clip::Config::check)?,
            unet: read_config(dir, "unet", unet::Config::check)?,
            vae: read_config(dir, "vae", vae::Config::check)?,
        }))
    }

    fn shapes(&self, part: &str) -> Result<Shapes> {
        let params = match part {
            "text_encoder" => meta_params(|w| ClipText::load(w, &self.text))?,
            "unet" => meta_params(|w| Unet::load(w, &self.unet))?,
            _ => meta_params(|w| Vae::load(w, &self.vae))?,
        };
        Ok(params.into_iter().map(|(name, param)| (name, param.dims())).collect())
    }

    /// Why a checkpoint is none of it.
    fn refusal(&self, what: &str) -> String {
        format!("is no {}: {what}", self.name)
    }

    /// Where its settings come from.
    fn origin(&self) -> String {
        format!("the settings of a {}", self.name)
    }

    fn pad(&self) -> Pad {
        match &self.sizes {
            None => Pad::AsItIs,
            Some(sizes) if sizes.pad() == "!" => Pad::Zero,
            Some(_) => Pad::End,
        }
    }

    /// The scheduler's settings, and its class. Those that are not known here are of the bundle `with`.
    fn scheduler(&self, prediction: Prediction, with: Option<&Path>) -> Result<(Value, String)> {
        let path = with.unwrap_or(Path::new("")).join("scheduler/scheduler_config.json");
        let mut json = predicting(&path, self.json["scheduler"].clone(), prediction)?;
        if self.sizes.as_ref().is_some_and(|sizes| sizes.prediction != prediction) {
            json["_class_name"] = "PNDMScheduler".into(); // what SD 1.x and SD 2's base come with
            json["skip_prk_steps"] = true.into();
        }
        let class = json["_class_name"].as_str().unwrap_or("PNDMScheduler").to_owned();
        Ok((json, class))
    }
}

fn typed<T: DeserializeOwned>(json: &Value) -> Result<T> {
    serde_json::from_value(json.clone()).map_err(|e| Error::input(format!("settings: {e}")))
}

/// The family of a checkpoint: the first whose UNet it has.
fn family(tensors: &Tensors, with: Option<&Path>) -> Result<Family> {
    let known = [("Stable Diffusion 1.x", Like::Sd15), ("Stable Diffusion 2.x", Like::Sd2)];
    let mut families =
        known.map(|(name, like)| Family::known(name, like)).into_iter().collect::<Result<Vec<_>>>()?;
    families.extend(with.map(Family::of_bundle).transpose()?.flatten());
    let mut reasons = Vec::new();
    for family in families {
        let names = LdmNames::new(&family.text, &family.unet, &family.vae);
        match locate(tensors, &names, "unet", &family.shapes("unet")?, false) {
            Ok(_) => return Ok(family),
            Err(what) => reasons.push((family.unet.cross_attention_dim, family.refusal(&what))),
        }
    }
    // The one that it is most likely of says what is wrong.
    let width = text_width(tensors);
    let reason = reasons.into_iter().find(|(theirs, _)| Some(*theirs) == width).map(|(_, why)| why);
    Err(bad(tensors.path(), reason.unwrap_or_else(|| match width {
        Some(width) => format!(
            "has a UNet that attends to texts of width {width}; 768 (Stable Diffusion 1.x) or 1024 (2.x) is wanted, or \
             a bundle of the same sizes for --with"
        ),
        None => "has a UNet that attends to no text".into(),
    })))
}

/// Width of the text that a UNet attends to.
fn text_width(tensors: &Tensors) -> Option<usize> {
    let name = tensors.names().find(|name| name.starts_with(UNET) && name.ends_with(".attn2.to_k.weight"))?;
    tensors.shape(name)?.get(1).copied()
}

/// Where each weight of a part lies in the file, or the first that is missing or misshapen, or one of the UNet's too
/// many.
fn locate(
    tensors: &Tensors,
    names: &LdmNames,
    part: &str,
    wanted: &Shapes,
    ema: bool,
) -> Result<BTreeMap<String, Slice>, String> {
    let mut found = BTreeMap::new();
    for (ours, shape) in wanted {
        let place = names.of(part, ours, shape);
        let spelled = if ema { averaged(&place.name) } else { place.name.clone() };
        let plain = spelled.replacen(".transformer.text_model.", ".transformer.", 1); // older files
        let name = [spelled.clone(), plain].into_iter().find(|name| tensors.shape(name).is_some());
        let Some(name) = name else {
            return Err(format!("tensor `{spelled}` of shape {:?} is missing", place.shape));
        };
        let theirs = tensors.shape(&name).unwrap_or_default();
        if without_kernel(theirs) != without_kernel(&place.shape) {
            return Err(format!("tensor `{name}` has shape {theirs:?}, but {:?} is wanted", place.shape));
        }
        let row: usize = shape[1..].iter().product();
        found.insert(ours.clone(), Slice { name, start: place.row * row, shape: shape.clone() });
    }
    if part == "unet" && !ema {
        let used: BTreeSet<&str> = found.values().map(|slice| slice.name.as_str()).collect();
        let more = tensors.names().find(|name| name.starts_with(UNET) && !used.contains(name));
        if let Some(more) = more {
            return Err(format!("has the tensor `{more}`, which is none of that UNet's"));
        }
    }
    Ok(found)
}

/// What the moving average of a weight is called: `LitEma` of ldm/modules/ema.py leaves out the dots.
fn averaged(name: &str) -> String {
    let rest = name.split_once('.').map_or(name, |(_, rest)| rest);
    format!("model_ema.{}", rest.replace('.', ""))
}

/// What the UNet predicts, and why that is believed.
///
/// Nothing in a checkpoint of Stable Diffusion 2 says it for certain. Assumption: what ModelSpec's metadata say counts,
/// then the number of steps of the published base (diffusers' `single_file_utils.py` looks at it as well), then how far
/// one norm's bias is spread, by which ComfyUI decides (`comfy/supported_models.py`, `SD20`).
fn prediction(
    tensors: &Tensors,
    options: &ImportOptions,
    family: &Family,
) -> Result<(Prediction, &'static str)> {
    if let Some(asked) = options.prediction {
        return Ok((asked, ""));
    }
    match tensors.metadata("modelspec.prediction_type") {
        Some("v") => return Ok((Prediction::V, "")),
        Some("epsilon") => return Ok((Prediction::Epsilon, "")),
        _ => {}
    }
    if tensors.shape("v_pred").is_some() {
        return Ok((Prediction::V, ""));
    }
    let Some(sizes) = &family.sizes else {
        let theirs = family.json["scheduler"]["prediction_type"].as_str();
        return Ok((if theirs == Some("v_prediction") { Prediction::V } else { Prediction::Epsilon }, ""));
    };
    if sizes.prediction == Prediction::Epsilon {
        return Ok((Prediction::Epsilon, ""));
    }
    if tensors.number("global_step") == Some(875_000) {
        return Ok((Prediction::Epsilon, ""));
    }
    let bias = tensors.read(&format!("{UNET}.output_blocks.11.1.transformer_blocks.0.norm1.bias"))?;
    let spread = deviation(&bias) > 0.09;
    let why = " (guessed from its weights; --prediction says otherwise)";
    Ok((if spread { Prediction::V } else { Prediction::Epsilon }, why))
}

/// Standard deviation.
fn deviation(values: &[f32]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    (values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n).sqrt()
}

fn manifest(
    tensors: &Tensors,
    family: &Family,
    prediction: Prediction,
    with: Option<&Path>,
) -> Result<Manifest> {
    let fits = |side: &usize| RESOLUTIONS.contains(side) && side.is_multiple_of(family.vae.factor());
    let said = tensors.metadata("modelspec.resolution").and_then(|said| said.split('x').next()?.parse().ok());
    let said = said.filter(fits); // anybody may have written it
    let product: Option<Product> =
        tensors.metadata("hypnos.recipe").and_then(|recipe| serde_json::from_str(recipe).ok());
    let mut manifest = match (&family.sizes, with) {
        // The sizes are its, so what suits it suits this.
        (None, Some(with)) => manifest_of(with)?,
        _ => Manifest::default(),
    };
    manifest.files.clear();
    manifest.name =
        tensors.metadata("modelspec.title").map_or_else(|| stem_of(tensors.path()), str::to_owned);
    manifest.product = product;
    if let Some(sizes) = &family.sizes {
        sizes.kind.clone_into(&mut manifest.kind);
        // SD 2's base, which predicts noise, has the size of SD 1.x.
        let side = if prediction == sizes.prediction { sizes.resolution() } else { 512 };
        manifest.resolution = Some(said.unwrap_or(side));
    } else if said.is_some() {
        manifest.resolution = said;
    }
    Ok(manifest)
}
