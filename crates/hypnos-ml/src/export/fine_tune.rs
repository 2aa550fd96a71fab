//! A fine-tune and its bundle, opened for export: which tensors there are, where each comes from, and under which
//! licence.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::bundle::Bundle;
use crate::finetuned::{self, EMBEDDING, TEXT_ENCODER, UNET};
use crate::product::Product;
use crate::tensorfile::TensorFile;
use crate::weights;
use crate::{Error, Result};

/// The autoencoder, which no training changes.
const VAE: &str = "vae";

/// All parts with weights.
pub(super) const PARTS: [&str; 3] = [TEXT_ENCODER, UNET, VAE];

/// The table of all tokens in a text encoder.
const TOKENS: &str = "text_model.embeddings.token_embedding.weight";

/// A fine-tune and the bundle that it was trained from, both on disk.
pub struct FineTune<'a> {
    pub(super) bundle: &'a Bundle,
    pub(super) learned: TensorFile,
    pub(super) product: Product,
    /// Learned rows of the token table: which, and their names in the file.
    embeddings: Vec<(usize, String)>,
    pub(super) parts: BTreeMap<&'static str, Part>,
}

/// A part of the bundle: its weight file, and names and shapes of what its model reads of it.
pub(super) struct Part {
    file: TensorFile,
    pub(super) shapes: BTreeMap<String, Vec<usize>>,
}

impl<'a> FineTune<'a> {
    /// Opens the weights `file` and the files of the bundle. [`Error::File`] if it was trained from another one, or a
    /// tensor is missing or misshapen.
    pub fn open(file: &Path, bundle: &'a Bundle) -> Result<Self> {
        let (learned, product) = finetuned::open(file, bundle)?;
        let mut parts = BTreeMap::new();
        for part in PARTS {
            let file = TensorFile::open(&bundle.dir().join(&bundle.weight_files(part)?[0]))?;
            parts.insert(part, Part { file, shapes: bundle.shapes(part)? });
        }
        let embeddings = embeddings(&learned, bundle)?;
        let fine_tune = Self { bundle, learned, product, embeddings, parts };
        fine_tune.check()?;
        Ok(fine_tune)
    }

    /// Whether all of a part was trained.
    fn trained(&self, part: &str) -> bool {
        self.embeddings.is_empty() && part != VAE
    }

    /// Whether a part is another than the bundle's.
    pub(super) fn changed(&self, part: &str) -> bool {
        self.trained(part) || part == TEXT_ENCODER
    }

    /// Every weight of a trained part is there.
    fn check(&self) -> Result<()> {
        for part in PARTS.into_iter().filter(|part| self.trained(part)) {
            for (name, shape) in &self.parts[part].shapes {
                let name = format!("{part}.{name}");
                if self.learned.shape(&name) != Some(shape) {
                    let what = format!("tensor `{name}` of shape {shape:?} is missing");
                    return Err(Error::file(self.learned.path(), what));
                }
            }
        }
        Ok(())
    }

    /// A tensor of a part: what was learned, else what the bundle has.
    pub(super) fn tensor(&self, part: &str, name: &str) -> Result<Tensor> {
        let Part { file, shapes } = &self.parts[part];
        let shape = shapes[name].as_slice();
        if self.trained(part) {
            let values = self.learned.read_finite(&format!("{part}.{name}"))?;
            return Ok(Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
        let tensor = weights::read(file, name, shape)?;
        if (part, name) != (TEXT_ENCODER, TOKENS) {
            return Ok(tensor);
        }
        let (width, mut rows) = (shape[1], tensor.flatten_all()?.to_vec1::<f32>()?);
        for (row, name) in &self.embeddings {
            rows[row * width..][..width].copy_from_slice(&self.learned.read_finite(name)?);
        }
        Ok(Tensor::from_vec(rows, shape, &Device::Cpu)?)
    }

    /// That a part of the bundle that goes out unread has no weights that are no numbers.
    pub(super) fn check_values(&self, part: &str) -> Result<()> {
        let Part { file, shapes } = &self.parts[part];
        for (name, shape) in shapes {
            weights::read(file, name, shape)?;
        }
        Ok(())
    }

    /// The licence of a part's weights, as the bundle gives it.
    pub(super) fn licence_of(&self, part: &str) -> Option<&str> {
        let known = &self.bundle.manifest().files;
        let mut paths = self.bundle.weight_files(part).ok()?.into_iter();
        paths.find_map(|path| Some(known.get(path.to_str()?)?.licence.as_str()))
    }

    /// The licence of all weights together, an SPDX expression, if the bundle gives that of each.
    pub(super) fn licence(&self) -> Option<String> {
        let licences = PARTS.iter().map(|part| self.licence_of(part)).collect::<Option<BTreeSet<_>>>()?;
        if licences.len() == 1 {
            return licences.first().map(|one| (*one).to_owned());
        }
        Some(licences.iter().map(|one| format!("({one})")).collect::<Vec<_>>().join(" AND "))
    }

    /// What people call the bundle.
    pub(super) fn bundle_name(&self) -> &str {
        match self.bundle.manifest().name.as_str() {
            "" => "Stable Diffusion",
            name => name,
        }
    }

    /// What people call what comes out.
    pub(super) fn title(&self) -> String {
        format!("{} ({}), from {}", self.product.class_name, self.product.token, self.bundle_name())
    }
}

/// The rows of the token table that a file replaces.
fn embeddings(learned: &TensorFile, bundle: &Bundle) -> Result<Vec<(usize, String)>> {
    let (text, _, _) = bundle.configs();
    let tokenizer = bundle.tokenizer()?;
    let mut rows = Vec::new();
    for name in learned.names() {
        let Some(token) = name.strip_prefix(EMBEDDING).and_then(|rest| rest.strip_prefix('.')) else {
            continue;
        };
        let bad = |what: String| Error::file(learned.path(), format!("tensor `{name}` {what}"));
        let Some(row) = tokenizer.id(token).map(|id| id as usize).filter(|&row| row < text.vocab_size) else {
            return Err(bad("is of a token that the bundle does not have".into()));
        };
        match (learned.shape(name), text.hidden_size) {
            (Some([1, found]), width) if *found == width => rows.push((row, name.to_owned())),
            (found, width) => {
                return Err(bad(format!("is {:?}, wanted [1, {width}]", found.unwrap_or_default())));
            }
        }
    }
    Ok(rows)
}
