//! The sizes of a bundle's models, from configs and headers: for planning, without reading a weight.

use serde::de::DeserializeOwned;

use super::capabilities::Capability;
use super::configs::read_config;
use super::directory::{Bundle, Part, part};
use super::files::find_weights;
use crate::Result;
use crate::models::clip::ClipText;
use crate::models::tracer;
use crate::models::unet::Unet;
use crate::models::vae::Vae;
use crate::perceptual;
use crate::precision::Precision;
use crate::tensorfile::TensorFile;
use crate::weights::Weights;

impl Bundle {
    /// Its text encoder without values, for dry runs in `precision`; so for the other two.
    pub(crate) fn meta_text_encoder(&self, precision: Precision, trainable: bool) -> Result<Part<ClipText>> {
        part(meta(precision), trainable, |w| ClipText::load(w, self.configs().0))
    }

    /// Its UNet without values.
    pub(crate) fn meta_unet(&self, precision: Precision, trainable: bool) -> Result<Part<Unet>> {
        part(meta(precision), trainable, |w| Unet::load(w, self.configs().1))
    }

    /// Its VAE without values.
    pub(crate) fn meta_vae(&self, precision: Precision) -> Result<Part<Vae>> {
        part(meta(precision), false, |w| Vae::load(w, self.configs().2))
    }

    /// The config of its segmenter, if it has one.
    pub(crate) fn segmenter_config(&self) -> Result<Option<tracer::Config>> {
        self.optional_config(Capability::Segmentation, tracer::Config::check)
    }

    /// The config of its perceptual network, if it has one.
    pub(crate) fn perceptual_config(&self) -> Result<Option<perceptual::Config>> {
        self.optional_config(Capability::PerceptualLoss, perceptual::Config::check)
    }

    fn optional_config<C: DeserializeOwned>(
        &self,
        capability: Capability,
        check: impl Fn(&C) -> Result<()>,
    ) -> Result<Option<C>> {
        let read = || read_config(self.dir(), capability.part(), check);
        self.can(capability).then(read).transpose()
    }

    /// Bytes that the weights of a capability's part take in memory, in f32, by the header of its file; 0 if it has no
    /// such part.
    pub(crate) fn weight_bytes(&self, capability: Capability) -> Result<u64> {
        if !self.can(capability) {
            return Ok(0);
        }
        let file = TensorFile::open(&find_weights(&self.dir().join(capability.part()))?)?;
        let shapes = file.names().filter_map(|name| file.shape(name));
        Ok(shapes.map(|shape| 4 * shape.iter().product::<usize>() as u64).sum())
    }
}

fn meta(precision: Precision) -> Weights {
    Weights::meta().computing_in(precision)
}
