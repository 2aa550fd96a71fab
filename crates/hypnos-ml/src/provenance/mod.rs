//! What a picture's file says of how it was drawn, in the forms that other programs read.
//!
//! | form                                            | PNG              | JPEG, WebP         |
//! |-------------------------------------------------|------------------|--------------------|
//! | AUTOMATIC1111's text, which readers of the field | text `parameters` | EXIF `UserComment` |
//! | everything, exactly, as JSON                    | text `hypnos`, XMP | XMP              |
//! | IPTC's digital source type                      | XMP              | XMP                |
//!
//! The same picture of the same models says the same, byte for byte: no date, no host.

mod embed;
mod exif;
mod parameters;
mod xmp;

use serde_json::json;

use super::Result;
use super::bundle::Bundle;
use super::precision::Precision;
use super::sample::{ImageRequest, SampleSettings};

/// Hexadecimal digits of a hash by which programs of the field name a model.
const SHORT_HASH: usize = 10;

/// The fine-tuned weights that drew a picture, as far as they are known: a training draws with weights that have no
/// file yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FineTune<'a> {
    /// SHA-256 of their file, in lower-case hexadecimal.
    pub weights_sha256: Option<&'a str>,
    /// The job that trained them.
    pub job: Option<&'a str>,
}

/// What a picture's file says of how it was drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provenance {
    /// AUTOMATIC1111's text; none where its readers would take it for something else.
    parameters: Option<String>,
    /// All of it.
    json: String,
}

impl Provenance {
    /// Of a picture that `bundle` drew, with fine-tuned weights or its own.
    ///
    /// * `own_latents`: whether it began with given noise instead of its seed's
    /// * `precision`: what the models computed in, which is said if it is not f32
    ///
    /// An error is the bundle's, which is hashed unless it was before.
    pub fn new(
        picture: &ImageRequest,
        settings: &SampleSettings,
        bundle: &Bundle,
        finetune: Option<FineTune<'_>>,
        own_latents: bool,
        precision: Precision,
    ) -> Result<Self> {
        let (name, bundle_sha256) = (bundle.manifest().name.as_str(), bundle.hash()?);
        let FineTune { weights_sha256, job } = finetune.unwrap_or_default();
        let drawn_by = if finetune.is_some() { weights_sha256 } else { Some(bundle_sha256) };
        let names = [Some(name.trim()), job].into_iter().flatten().filter(|name| !name.is_empty());
        let model = parameters::Model {
            name: names.collect::<Vec<_>>().join("-"),
            hash: drawn_by.map(|hash| &hash[..SHORT_HASH.min(hash.len())]),
        };
        let names = parameters::sampler_names(settings.sampler, bundle.schedule());
        let parameters = parameters::text(picture, settings, names, &model);

        let ImageRequest { prompt, negative, seed } = picture;
        let SampleSettings { sampler, steps, guidance, width, height } = settings;
        let mut all = json!({
            "prompt": prompt, "negative": negative, "seed": seed, "steps": steps, "guidance": guidance,
            "scheduler": sampler.to_string(), "width": width, "height": height, "bundle": name,
            "bundle_sha256": bundle_sha256, "own_latents": own_latents, "hypnos": env!("CARGO_PKG_VERSION"),
        });
        let rounded = (precision != Precision::F32).then(|| precision.name());
        for (key, known) in [("weights_sha256", weights_sha256), ("job", job), ("precision", rounded)] {
            if let Some(value) = known {
                all[key] = json!(value);
            }
        }
        Ok(Self { parameters, json: all.to_string() })
    }

    /// The texts of a PNG, by their keywords.
    pub fn texts(&self) -> Vec<(&'static str, String)> {
        let parameters = self.parameters.iter().map(|text| ("parameters", text.clone()));
        let others = [("hypnos", self.json.clone()), (xmp::PNG_KEYWORD, xmp::packet(Some(&self.json)))];
        parameters.chain(others).collect()
    }

    /// The same JPEG with what this says. A segment of a JPEG holds 65,533 bytes: of prompts too long for it (dozens of
    /// times the placeholder for a long name), EXIF or the JSON is left out.
    pub fn in_jpeg(&self, file: &[u8]) -> Vec<u8> {
        let exif = self.exif().map(|exif| embed::exif_segment(&exif));
        let xmp = [Some(self.json.as_str()), None].map(|json| embed::xmp_segment(&xmp::packet(json)));
        let xmp = xmp.into_iter().find(|segment| embed::fits(segment));
        let segments = exif.filter(|segment| embed::fits(segment)).into_iter().chain(xmp);
        embed::jpeg_with(file, &segments.collect::<Vec<_>>())
    }

    /// The same WebP, of `width x height` pixels, with what this says; it is to be a single lossy frame.
    pub fn in_webp(&self, file: &[u8], size: (usize, usize)) -> Vec<u8> {
        embed::webp_with(file, size, self.exif().as_deref(), &xmp::packet(Some(&self.json)))
    }

    fn exif(&self) -> Option<Vec<u8>> {
        self.parameters.as_deref().map(exif::user_comment)
    }
}
