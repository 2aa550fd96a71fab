//! The pretrained networks in a bundle's `metrics/`, by which pictures are evaluated.

use candle_core::Device;
use serde::de::DeserializeOwned;

use super::capabilities::Capability;
use super::configs::read_config;
use super::directory::Bundle;
use super::files::{all_weights, hash_files};
use crate::Result;
use crate::metrics::{Clip, Dino, Inception, Lpips, clip, dino, inception, lpips};
use crate::weights::Weights;

/// A backbone of a bundle, and what a report says of it.
#[derive(Debug)]
pub struct MetricBackbone<M> {
    /// The network with its preprocessing.
    pub model: M,
    /// What the field calls it, such as `DINO ViT-S/16`.
    pub name: String,
    /// SHA-256 of its weight file, or one hash of several, in lower-case hexadecimal.
    pub sha256: String,
}

/// The backbones that a bundle has.
#[derive(Debug)]
pub struct Backbones {
    /// For DINO and PRES.
    pub dino: Option<MetricBackbone<Dino>>,
    /// For CLIP-I and CLIP-T.
    pub clip: Option<MetricBackbone<Clip>>,
    /// For FID.
    pub inception: Option<MetricBackbone<Inception>>,
    /// For LPIPS and DIV.
    pub lpips: Option<MetricBackbone<Lpips>>,
}

impl Backbones {
    /// Those in `metrics/{dino,clip,inception,lpips}/` of the bundle, each a `config.json` and weights; one that is not
    /// there is `None`. [`Error::File`](crate::Error::File) names the file that cannot be used.
    pub fn load(bundle: &Bundle, device: &Device) -> Result<Self> {
        Ok(Self {
            dino: load(
                bundle,
                Capability::Dino,
                device,
                dino::Config::check,
                dino::Config::name,
                |w, config| Dino::load(w, config, device),
            )?,
            clip: load(
                bundle,
                Capability::Clip,
                device,
                clip::Config::check,
                clip::Config::name,
                |w, config| Clip::load(w, config, bundle.tokenizer()?, device),
            )?,
            inception: load(
                bundle,
                Capability::Inception,
                device,
                inception::Config::check,
                inception::Config::name,
                |w, config| Inception::load(w, config, device),
            )?,
            lpips: load(
                bundle,
                Capability::Lpips,
                device,
                lpips::Config::check,
                lpips::Config::name,
                |w, config| Lpips::load(w, config, device),
            )?,
        })
    }
}

/// The backbone of a score, if the bundle has it: what `load` makes of its weights and its config, what `name` calls
/// it, and the hash of its weights.
fn load<C: DeserializeOwned, M>(
    bundle: &Bundle,
    score: Capability,
    device: &Device,
    check: impl Fn(&C) -> Result<()>,
    name: impl Fn(&C) -> String,
    load: impl FnOnce(&Weights, &C) -> Result<M>,
) -> Result<Option<MetricBackbone<M>>> {
    if !bundle.can(score) {
        return Ok(None);
    }
    let config = read_config(bundle.dir(), score.part(), check)?;
    let files = all_weights(&bundle.dir().join(score.part()))?;
    let model = load(&Weights::open(&files[0], device)?, &config)?;
    Ok(Some(MetricBackbone { model, name: name(&config), sha256: hash_files(&files)? }))
}
