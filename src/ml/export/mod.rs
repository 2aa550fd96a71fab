//! A fine-tune as files that other programs read: a directory for diffusers, which is a bundle of ours too, and the single file
//! of AUTOMATIC1111 and ComfyUI.
//!
//! Weights go from where they lie, the fine-tune's file or the bundle's, to where they are wanted one tensor at a time: an
//! export takes the memory of its largest tensor. It appears whole or not at all.

mod diffusers;
pub mod ldm_names;
mod single_file;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::adapted::{self, EMBEDDING, Product, TEXT_ENCODER, UNET};
use super::bundle::Bundle;
use super::tensorfile::{TensorFile, io_words};
use super::weights;
use super::{Error, Result};

/// The autoencoder, which no training changes.
const VAE: &str = "vae";

/// All parts with weights.
const PARTS: [&str; 3] = [TEXT_ENCODER, UNET, VAE];

/// The table of all tokens in a text encoder.
const TOKENS: &str = "text_model.embeddings.token_embedding.weight";

/// What a fine-tune is exported as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `diffusers/`: what `StableDiffusionPipeline.from_pretrained` loads, and a bundle.
    Diffusers,
    /// `single-file.safetensors`: all weights under the names of the original code.
    SingleFile,
}

/// What weights are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// As they were trained: many of a fine-tune's changes are too small for anything narrower.
    F32,
    /// Half the size. Small changes are lost.
    F16,
}

impl Form {
    /// What it is called in the directory that it is put in.
    pub fn name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::SingleFile => "single-file.safetensors",
        }
    }

    /// Where it would lie in `dir`. [`Error::Bad`] if something is there already.
    pub fn vacant(self, dir: &Path) -> Result<PathBuf> {
        let path = dir.join(self.name());
        if path.symlink_metadata().is_ok() {
            return Err(Error::Bad(format!("{}: is there already; a new place is wanted", path.display())));
        }
        Ok(path)
    }
}

impl Width {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
        }
    }

    /// As configs name it.
    fn word(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
        }
    }
}

/// A fine-tune and the bundle that it was trained from, both on disk.
pub struct FineTune<'a> {
    bundle: &'a Bundle,
    learned: TensorFile,
    product: Product,
    /// Learned rows of the token table: which, and their names in the file.
    embeddings: Vec<(usize, String)>,
    parts: BTreeMap<&'static str, Part>,
}

/// A part of the bundle: its weight file, and names and shapes of what its model reads of it.
struct Part {
    file: TensorFile,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl<'a> FineTune<'a> {
    /// Opens the weights `file` and the files of the bundle. [`Error::Bad`] if it was trained from another one, or a tensor
    /// is missing or misshapen.
    pub fn open(file: &Path, bundle: &'a Bundle) -> Result<Self> {
        let (learned, product) = adapted::open(file, bundle)?;
        let mut parts = BTreeMap::new();
        for part in PARTS {
            let file = TensorFile::open(&bundle.dir().join(bundle.weight_file(part)?))?;
            parts.insert(part, Part { file, shapes: bundle.shapes(part)? });
        }
        let embeddings = embeddings(&learned, bundle)?;
        let fine_tune = Self { bundle, learned, product, embeddings, parts };
        fine_tune.check()?;
        Ok(fine_tune)
    }

    /// Writes it into `dir`, which is made if it is not there, and gives where. [`Error::Bad`] if something is there already
    /// or cannot be written: then there is as much in `dir` as before.
    pub fn export(&self, form: Form, width: Width, dir: &Path) -> Result<PathBuf> {
        let path = form.vacant(dir)?;
        let made = !dir.exists();
        fs::create_dir_all(dir)
            .map_err(|e| Error::Bad(format!("{}: cannot be made: {}", dir.display(), io_words(&e))))?;
        let written = match form {
            Form::Diffusers => diffusers::write(self, width, &path),
            Form::SingleFile => single_file::write(self, width, &path),
        };
        if written.is_err() && made {
            let _ = fs::remove_dir(dir); // the first error is the one worth telling
        }
        written.map(|()| path)
    }

    /// What may surprise whoever reads it in this form.
    pub fn warnings(&self, form: Form) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.licence().is_none() {
            let what =
                "the bundle does not say what licence its weights come under, so the export does not either";
            warnings.push(what.into());
        }
        if form == Form::SingleFile && !single_file::is_sd1(self.bundle) {
            let name = form.name();
            warnings.push(format!(
                "{name}: the bundle has not the sizes of Stable Diffusion 1, which its readers expect"
            ));
        }
        warnings
    }

    /// Whether all of a part was trained.
    fn trained(&self, part: &str) -> bool {
        self.embeddings.is_empty() && part != VAE
    }

    /// Whether a part is another than the bundle's.
    fn changed(&self, part: &str) -> bool {
        self.trained(part) || part == TEXT_ENCODER
    }

    /// Every weight of a trained part is there.
    fn check(&self) -> Result<()> {
        for part in PARTS.into_iter().filter(|part| self.trained(part)) {
            for (name, shape) in &self.parts[part].shapes {
                let name = format!("{part}.{name}");
                if self.learned.shape(&name) != Some(shape) {
                    let file = self.learned.path().display();
                    return Err(Error::Bad(format!("{file}: tensor `{name}` of shape {shape:?} is missing")));
                }
            }
        }
        Ok(())
    }

    /// A tensor of a part: what was learned, else what the bundle has.
    fn tensor(&self, part: &str, name: &str) -> Result<Tensor> {
        let Part { file, shapes } = &self.parts[part];
        let shape = shapes[name].as_slice();
        if self.trained(part) {
            let values = self.learned.read(&format!("{part}.{name}"))?;
            return Ok(Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
        let tensor = weights::read(file, name, shape)?;
        if (part, name) != (TEXT_ENCODER, TOKENS) {
            return Ok(tensor);
        }
        let (width, mut rows) = (shape[1], tensor.flatten_all()?.to_vec1::<f32>()?);
        for (row, name) in &self.embeddings {
            rows[row * width..][..width].copy_from_slice(&self.learned.read(name)?);
        }
        Ok(Tensor::from_vec(rows, shape, &Device::Cpu)?)
    }

    /// The licence of a part's weights, as the bundle gives it.
    fn licence_of(&self, part: &str) -> Option<&str> {
        let path = self.bundle.weight_file(part).ok()?.to_string_lossy().into_owned();
        Some(self.bundle.manifest().files.get(&path)?.licence.as_str())
    }

    /// The licence of all weights together, an SPDX expression, if the bundle gives that of each.
    fn licence(&self) -> Option<String> {
        let licences = PARTS.iter().map(|part| self.licence_of(part)).collect::<Option<BTreeSet<_>>>()?;
        if licences.len() == 1 {
            return licences.first().map(|one| (*one).to_owned());
        }
        Some(licences.iter().map(|one| format!("({one})")).collect::<Vec<_>>().join(" AND "))
    }

    /// What people call the bundle.
    fn bundle_name(&self) -> &str {
        match self.bundle.manifest().name.as_str() {
            "" => "Stable Diffusion",
            name => name,
        }
    }

    /// What people call what comes out.
    fn title(&self) -> String {
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
        let bad = |what: String| Error::Bad(format!("{}: tensor `{name}` {what}", learned.path().display()));
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
