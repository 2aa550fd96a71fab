//! The bundle that an engine works with, its models on one device, and how they draw by default.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Device;

use super::api::Image;
use super::faults::fault;
use crate::job::{Fault, Format};
use crate::ml::bundle::{Bundle, Drawing};
use crate::ml::provenance::{FineTune, Provenance};
use crate::ml::sample::{ImageRequest, Models, SampleSettings, Shared};
use crate::ml::{self, image_io};

/// An opened bundle with its models.
pub(super) struct Base {
    pub(super) bundle: Bundle,
    /// What its models have in common with those of products.
    pub(super) shared: Shared,
    /// Its models, while they are held.
    models: Mutex<Option<Arc<Models>>>,
    /// SHA-256 of the bundle.
    hash: String,
    /// Whether a training computes blocks again instead of keeping them.
    pub(super) checkpointing: bool,
}

impl Base {
    /// Loads the bundle's models, and reads every file of it once for its hash.
    pub(super) fn load(bundle: Bundle, shared: Shared, checkpointing: bool) -> ml::Result<Self> {
        let models = Mutex::new(Some(Arc::new(shared.with_bundle(&bundle)?)));
        let hash = bundle.hash()?.to_owned();
        Ok(Self { bundle, shared, models, hash, checkpointing })
    }

    /// The bundle's own models, read once more where they were let go.
    pub(super) fn models(&self) -> ml::Result<Arc<Models>> {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        match &*models {
            Some(models) => Ok(Arc::clone(models)),
            None => Ok(Arc::clone(models.insert(Arc::new(self.shared.with_bundle(&self.bundle)?)))),
        }
    }

    /// Lets the bundle's own models go until they are asked for: a training of all weights has a copy that learns, and
    /// has no use for one that does not.
    pub(super) fn let_go(&self) {
        *self.models.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn hash(&self) -> &str {
        &self.hash
    }

    pub(super) fn device(&self) -> &Device {
        &self.shared.device
    }

    /// The settings by which it draws images of its own size by default, in `steps` steps.
    pub(super) fn drawing(&self, steps: usize) -> SampleSettings {
        let (side, Drawing { scheduler, guidance }) =
            (self.bundle.resolution(), self.bundle.manifest().drawing);
        SampleSettings { sampler: scheduler, steps, guidance, width: side, height: side }
    }

    /// The file of an image that `finetune` drew and that was asked for as `prompt`, with the placeholder for the
    /// product in it.
    pub(super) fn encoded(
        &self,
        prompt: &str,
        request: &ImageRequest,
        settings: &SampleSettings,
        finetune: FineTune<'_>,
        pixels: &[u8],
        format: Format,
    ) -> Result<Image, Fault> {
        let size = (settings.width, settings.height);
        let precision = self.shared.precision;
        let drawn = Provenance::new(request, settings, &self.bundle, Some(finetune), false, precision);
        let drawn = drawn.map_err(fault)?;
        let bytes = match format {
            Format::Png => image_io::png(pixels, size, &drawn.texts()),
            Format::Jpeg => image_io::jpeg(pixels, size).map(|file| drawn.in_jpeg(&file)),
            Format::Webp => image_io::webp(pixels, size).map(|file| drawn.in_webp(&file, size)),
        };
        Ok(Image {
            bytes: bytes.map_err(fault)?,
            format,
            width: size.0 as u32,
            height: size.1 as u32,
            prompt: prompt.to_owned(),
            seed: request.seed,
        })
    }
}
