//! The plan of a sample: memory and arithmetic of one batch of pictures.

use serde::Serialize;

use super::Arithmetic;
use super::dry;
use super::meta::MetaModels;
use super::needs::{KEPT_IN_SAMPLE, LIBRARIES, Needs, PROGRAM, Peak, Phase, Place};
use crate::Result;
use crate::bundle::Bundle;
use crate::device::DeviceKind;
use crate::precision::Precision;

/// What decides the size of a sample, beside its bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SampleSizes {
    /// Pictures drawn at once.
    pub batch: usize,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
}

/// The plan of a batch of pictures that are drawn with guidance.
#[derive(Clone, Debug, Serialize)]
pub struct SamplePlan {
    /// What was counted.
    pub sizes: SampleSizes,
    /// Memory, without a fine-tuned model: the bundle alone.
    pub needs: Needs,
    /// Bytes that drawing works with, beside the weights.
    pub workspace_bytes: u64,
    /// Bytes of the text encoder and the UNet: what a fine-tuned model takes in addition.
    pub fine_tuned: u64,
    /// A step of a sampler, for the whole batch.
    pub step: Arithmetic,
    /// Decoding of one picture.
    pub decoding: Arithmetic,
}

impl SamplePlan {
    /// Counts, for models that compute in `precision`.
    pub fn new(
        bundle: &Bundle,
        sizes: &SampleSizes,
        device: DeviceKind,
        precision: Precision,
    ) -> Result<Self> {
        Self::of(&MetaModels::frozen(bundle, precision)?, sizes, device)
    }

    pub(super) fn of(models: &MetaModels, sizes: &SampleSizes, device: DeviceKind) -> Result<Self> {
        let (on_gpu, size) = (device == DeviceKind::Cuda, (sizes.width, sizes.height));
        let step = dry::sampler_step(models, sizes.batch.max(1), size, on_gpu)?;
        let decoding = dry::decoding(models, size, on_gpu)?;
        let workspace_bytes = step.bytes.max(decoding.bytes);
        let mut needs = Needs::default();
        let mut add = |name, place, bytes| needs.add(name, place, bytes, &[Phase::Sampling]);
        add("the program", Place::Host, PROGRAM);
        add("text encoder and UNet of the bundle", Place::Device, models.drawing_bytes());
        add("autoencoder", Place::Device, models.vae_bytes());
        add("forward", Place::Device, workspace_bytes);
        add("pixels", Place::Host, (3 * sizes.batch * sizes.width * sizes.height) as u64);
        if on_gpu {
            add("CUDA's libraries", Place::Device, LIBRARIES);
        } else {
            needs.add_kept(KEPT_IN_SAMPLE);
        }
        Ok(Self {
            sizes: *sizes,
            needs,
            workspace_bytes,
            fine_tuned: models.drawing_bytes(),
            step: step.arithmetic,
            decoding: decoding.arithmetic,
        })
    }

    /// The most memory at once on the device: on a CPU all of it.
    pub fn peak(&self, device: DeviceKind) -> Peak {
        self.needs.peak(device.place())
    }
}
