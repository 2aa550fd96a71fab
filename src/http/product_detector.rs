//! Interface to the model that finds the product in a photo.

use std::error::Error;

use serde::Serialize;
use utoipa::ToSchema;

/// Where the product is in a photo, as a training that makes views of it would see it.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Product)]
pub struct DetectedProduct {
    /// Why such a training would refuse the photo; null if it would not.
    pub refusal: Option<String>,
    /// Warnings: it touches an edge, is not alone, is small, has a vague outline.
    pub warnings: Vec<String>,
    /// Share of the photo that it covers.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub area: f64,
    /// How certain its outline is: 1 where every pixel is.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub confidence: f64,
    /// The product alone, on grey, at most 256 pixels long: a `data:` URL of a PNG.
    #[schema(pattern = "^data:image/png;base64,")]
    pub preview: String,
}

/// Finds the product in photos.
pub trait ProductDetector: Send + Sync {
    /// Finds the product in a photo, given as PNG. Blocks, for seconds at worst.
    fn detect(&self, png: &[u8]) -> Result<DetectedProduct, Box<dyn Error + Send + Sync>>;
}
