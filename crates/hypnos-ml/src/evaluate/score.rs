//! The result of an evaluation, as reports keep it: every number with its sample size, range and backbone.

use serde::Serialize;

/// With fewer generated pictures than this, the mean of a similarity is only indicative.
///
/// Assumption: of one training's pictures such a mean moves by some 0.05 with eight of them, about what people notice.
const FEW: usize = 8;

/// A network that looked, and which weights it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackboneInfo {
    /// What it is, such as `dino_vits16`.
    pub name: String,
    /// SHA-256 of its weights, in lower-case hexadecimal.
    pub sha256: String,
}

/// What a number says of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// The more the better.
    Higher,
    /// The less the better.
    Lower,
}

/// A mean, and all it takes to know what it is worth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Number {
    /// The mean; none where there is nothing to take it of, or nothing to look with.
    pub value: Option<f64>,
    /// How many values it is the mean of.
    pub n: usize,
    /// What they are of: `pairs`, or `pictures`.
    pub of: &'static str,
    /// What it can be at least and at most; no bound where there is none.
    pub range: [Option<f64>; 2],
    /// Which way is better.
    pub better: Better,
    /// What looked; none where pixels are compared.
    pub backbone: Option<BackboneInfo>,
    /// Why there is no value, or why it is only indicative.
    pub note: Option<String>,
}

/// One protocol's numbers (table 1 and table 2 of arXiv 2410.14265).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Protocol {
    /// Generated pictures.
    pub n_pictures: usize,
    /// Cosine of DINO features, every picture with every photo (Ruiz et al. 2023, section 4.1).
    pub dino: Number,
    /// The same of CLIP's image features.
    pub clip_i: Number,
    /// Cosine of a picture's CLIP features with its prompt's, in which the class name stands for the product.
    pub clip_t: Number,
    /// Fréchet distance of the 64 features after Inception's first pooling (Heusel et al. 2017).
    pub fid_64: Number,
    /// The same of its last 2048 features.
    pub fid_2048: Number,
    /// Structural similarity, every picture with every photo (Wang et al. 2004).
    pub ssim: Number,
    /// Peak signal-to-noise ratio in dB, every picture with every photo.
    pub psnr: Number,
    /// LPIPS, every picture with every photo (Zhang et al. 2018).
    pub lpips: Number,
}

/// The photos against themselves: what no model can be expected to pass.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Real {
    /// Cosine of DINO features, every photo with every other.
    pub dino: Number,
    /// The same of CLIP's.
    pub clip_i: Number,
}

/// How near one picture is to the product and to its prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fidelity {
    /// Mean cosine of its DINO features with the photos'.
    pub dino: Option<f64>,
    /// The same of CLIP's.
    pub clip_i: Option<f64>,
    /// Cosine of its CLIP features with its prompt's.
    pub clip_t: Option<f64>,
}

/// All that is found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Photos compared with.
    pub n_photos: usize,
    /// Pictures of one standard prompt.
    pub prompt_invariant: Option<Protocol>,
    /// Pictures of a prompt each.
    pub prompt_varying: Option<Protocol>,
    /// The photos against themselves.
    pub real: Real,
    /// PRES (Ruiz et al. 2023, section 4.3): cosine of DINO features of pictures of the class with the photos. High
    /// where all things of the class have come to look like the product.
    pub pres: Number,
    /// DIV (the same): LPIPS between pictures of one prompt. Low where they are all alike.
    pub div: Number,
    /// Each generated picture, the prompt-invariant ones first.
    pub pictures: Vec<Fidelity>,
    /// What is compared with what.
    pub pairing: &'static str,
}

/// What [`Evaluation::pairing`] says.
pub(super) const PAIRING: &str = "DINO, CLIP-I, SSIM, PSNR and LPIPS are means over every generated picture with every \
     photo; for SSIM, PSNR and LPIPS the middle square of the photo is brought to the picture's size. CLIP-T is taken \
     of each prompt with the class name in the product's place: the rare token means nothing to CLIP.";

impl Number {
    /// The mean of cosines between `n` pairs, of `n_pictures` generated pictures.
    pub(super) fn cosine(value: Option<f64>, n: usize, n_pictures: usize) -> Self {
        let number = Self {
            value,
            n,
            of: "pairs",
            range: [Some(-1.0), Some(1.0)],
            better: Better::Higher,
            backbone: None,
            note: None,
        };
        number.of_few(n_pictures)
    }

    /// A distance with no upper bound.
    pub(super) fn distance(value: Option<f64>, n: usize, n_pictures: usize) -> Self {
        Self { range: [Some(0.0), None], better: Better::Lower, ..Self::cosine(value, n, n_pictures) }
    }

    /// Says so if it is the mean of few.
    fn of_few(self, n_pictures: usize) -> Self {
        if self.value.is_none() || n_pictures >= FEW {
            return self;
        }
        let pictures = if n_pictures == 1 { "picture" } else { "pictures" };
        self.noted(format!("indicative: {n_pictures} {pictures}"))
    }

    /// Adds a word to it.
    pub(super) fn noted(self, note: impl Into<String>) -> Self {
        let note = note.into();
        let note = self.note.map_or(note.clone(), |before| format!("{before}; {note}"));
        Self { note: Some(note), ..self }
    }
}
