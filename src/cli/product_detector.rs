//! The segmenter of the HTTP server, to inspect photos.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tracing::info;

use super::error::CliError;
use crate::http::{DetectedProduct, ProductDetector};
use crate::ml::bundle::{Bundle, Capability};
use crate::ml::models::tracer::Tracer;
use crate::ml::segment::segment;
use crate::ml::{Result, device, image_io};

/// Longer side of a preview, in pixels.
const PREVIEW: u32 = 256;

/// The device of the segmenter: an HTTP server may have no other.
const DEVICE: &str = "cpu";

/// The segmenter of the bundle in `dir`; none if the bundle is missing, since only workers need one, or has no
/// segmenter.
pub(super) fn open(dir: &Path) -> std::result::Result<Option<Arc<dyn ProductDetector>>, CliError> {
    if !dir.join(Capability::Segmentation.part()).is_dir() {
        info!(bundle = %dir.display(), "bundle has no segmenter; photos are inspected without it");
        return Ok(None);
    }
    let tracer = Bundle::open(dir)?.segmenter(&device::open(DEVICE)?)?;
    Ok(Some(Arc::new(Segmenter(tracer))))
}

struct Segmenter(Tracer);

impl ProductDetector for Segmenter {
    fn detect(&self, png: &[u8]) -> std::result::Result<DetectedProduct, Box<dyn Error + Send + Sync>> {
        Ok(self.try_detect(png)?)
    }
}

impl Segmenter {
    fn try_detect(&self, png: &[u8]) -> Result<DetectedProduct> {
        let photo = image_io::read_png(png)?;
        let (mask, stats) = segment(&self.0, &photo, &device::open(DEVICE)?)?.cleaned();
        let preview = image_io::shrink_to(&mask.cut_out(&photo), PREVIEW);
        let (width, height) = preview.dimensions();
        let preview = image_io::png(preview.as_raw(), (width as usize, height as usize), &[])?;
        Ok(DetectedProduct {
            refusal: stats.refusal(),
            warnings: stats.warnings(),
            area: stats.area,
            confidence: stats.confidence,
            preview: format!("data:image/png;base64,{}", STANDARD.encode(preview)),
        })
    }
}
