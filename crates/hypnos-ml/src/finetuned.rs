//! Fine-tuned weights: the format of their file, and loading it as models for sampling.
//!
//! One safetensors file: `text_encoder.…` and `unet.…`, or only `embedding.<token>` where nothing else learned; f32,
//! since a fine-tune is lost to the rounding of narrower types; the autoencoder stays the bundle's. Its metadata say
//! what it is, of which bundle, and how it was trained.

use std::collections::BTreeMap;
use std::path::Path;

use super::bundle::Bundle;
use super::models::clip::ClipText;
use super::models::unet::Unet;
use super::precision::Precision;
use super::product::Product;
use super::sample::{Models, Shared};
use super::tensorfile::TensorFile;
use super::weights::Weights;
use super::{Error, Result};

/// Where in such a file the UNet's tensors lie.
pub(crate) const UNET: &str = "unet";
/// Where the text encoder's lie.
pub(crate) const TEXT_ENCODER: &str = "text_encoder";

/// Where learned embeddings lie, `[1, D]` each, by their tokens.
pub(crate) const EMBEDDING: &str = "embedding";

/// What `format` says in the metadata of a file of fine-tuned weights.
pub(crate) const FORMAT: &str = "hypnos weights 1";

/// Models that draw a product.
#[derive(Debug)]
pub struct FineTuned {
    /// The words it was trained with.
    pub product: Product,
    /// The models. They share with the bundle's what was not trained.
    pub models: Models,
}

impl FineTuned {
    /// Loads fine-tuned weights on the device of `base`, the models of the bundle that they were trained from.
    /// [`Error::File`] if the file is of another bundle or not of this kind, or a tensor is missing or misshapen.
    pub fn load(file: &Path, bundle: &Bundle, base: &Models) -> Result<Self> {
        Self::load_with(file, bundle, base, || Ok((base.text.clone(), base.unet.clone())))
    }

    /// The same, where the bundle's text encoder and UNet come from `base` only if they are part of it.
    pub fn load_with(
        file: &Path,
        bundle: &Bundle,
        shared: &Shared,
        base: impl FnOnce() -> Result<(ClipText, Unet)>,
    ) -> Result<Self> {
        let (header, product) = open(file, bundle)?;
        let names: Vec<String> = header.names().map(str::to_owned).collect();
        let weights = Weights::open(file, &shared.device)?;
        let models = models(weights, names.iter(), bundle, shared, base)?;
        Ok(Self { product, models })
    }
}

/// A file of fine-tuned weights, its header read and found to be of this bundle, and the product that it is of.
pub(crate) fn open(file: &Path, bundle: &Bundle) -> Result<(TensorFile, Product)> {
    let header = TensorFile::open(file)?;
    let bad = |what: String| Error::file(file, what);
    check(header.metadata(), FORMAT, bundle.hash()?).map_err(bad)?;
    let recipe = header.metadata().get("recipe").map_or("null", String::as_str);
    let product =
        serde_json::from_str(recipe).map_err(|e| bad(format!("names no product in its recipe: {e}")))?;
    Ok((header, product))
}

/// The models with what was learned, frozen. `names` are all tensors of `learned`; where those are embeddings, the others
/// come from `base`.
pub(crate) fn models<'a>(
    learned: Weights,
    names: impl Iterator<Item = &'a String>,
    bundle: &Bundle,
    shared: &Shared,
    base: impl FnOnce() -> Result<(ClipText, Unet)>,
) -> Result<Models> {
    let learned = learned.computing_in(shared.precision);
    let tokens: Vec<&str> =
        names.filter_map(|name| name.strip_prefix(EMBEDDING)?.strip_prefix('.')).collect();
    if tokens.is_empty() {
        let text = bundle.text_encoder_of(&learned.pp(TEXT_ENCODER))?;
        return Ok(shared.with(text, bundle.unet_of(&learned.pp(UNET))?));
    }
    let (mut text, unet) = base()?;
    for token in tokens {
        let Some(id) = shared.tokenizer.id(token) else {
            return Err(Error::input(format!("embedding of \"{token}\": the bundle has no such token")));
        };
        text = text.with_embedding(id, learned.pp(EMBEDDING).get(token, &[1, text.width()])?)?;
    }
    Ok(shared.with(text, unet))
}

/// Bytes that the weights of a file take in memory where they are drawn with in `precision`, from its header.
pub fn bytes(file: &Path, precision: Precision) -> Result<u64> {
    let file = TensorFile::open(file)?;
    let tensors = file.names().filter_map(|name| Some((name, file.shape(name)?)));
    let bytes = tensors.map(|(name, shape)| {
        precision.held_in(name, shape).size_in_bytes() * shape.iter().product::<usize>()
    });
    Ok(bytes.sum::<usize>() as u64)
}

/// The metadata of a file of ours.
pub(crate) fn metadata(format: &str, bundle: &str, recipe: &str) -> BTreeMap<String, String> {
    let pairs = [("format", format), ("bundle", bundle), ("recipe", recipe)];
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

/// Whether a file's metadata are of this format and of this bundle; if not, why.
pub(crate) fn check(metadata: &BTreeMap<String, String>, format: &str, bundle: &str) -> Result<(), String> {
    let said = |key: &str| metadata.get(key).map_or("nothing", String::as_str);
    if said("format") != format {
        return Err(format!("is of format \"{}\"; \"{format}\" is wanted", said("format")));
    }
    let short = |hash: &str| hash.chars().take(10).collect::<String>();
    if said("bundle") != bundle {
        let (theirs, ours) = (short(said("bundle")), short(bundle));
        return Err(format!("was trained from another bundle ({theirs}); this one is {ours}"));
    }
    Ok(())
}
