//! The scores of an evaluation: what generated pictures are worth beside the photos, each score with all that it
//! takes to judge it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::job::string_enum;
use crate::ml::evaluate::{self, Evaluation, Fidelity, Number, Real};

string_enum!(
    /// How the prompts of an evaluation's pictures are chosen.
    Protocol {
        /// One standard prompt for all: whether they show the product.
        PromptInvariant = "prompt_invariant",
        /// A prompt for each: whether the product stays recognisable in other scenes, and whether prompts are
        /// followed.
        PromptVarying = "prompt_varying",
    }
);

string_enum!(
    /// Which way a score is better.
    Better {
        /// The higher, the better.
        Higher = "higher",
        /// The lower, the better.
        Lower = "lower",
    }
);

/// The network that a score is computed with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScoreNetwork {
    /// What it is, such as `dino_vits16`.
    pub name: String,
    /// SHA-256 of its weights, in lower-case hexadecimal.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    pub sha256: String,
}

/// A mean, and what it is a mean of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Score {
    /// The mean; null where there was nothing to take it of, or no network to compute it with.
    pub value: Option<f64>,
    /// How many values it is the mean of.
    pub n: u64,
    /// What each of the values was computed of: `pairs`, or `pictures`.
    pub of: String,
    /// The lowest and the highest possible value; null where there is no bound.
    #[schema(min_items = 2, max_items = 2)]
    pub range: [Option<f64>; 2],
    /// Which way it is better.
    pub better: Better,
    /// The network that it was computed with; null where pixels are compared, or where the network is missing.
    pub backbone: Option<ScoreNetwork>,
    /// Why there is no value, or why it is only indicative.
    pub note: Option<String>,
}

/// The scores of one protocol (tables 1 and 2 of arXiv 2410.14265). Pictures are compared with photos pair by pair,
/// every generated picture with every photo.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProtocolScores {
    /// Generated pictures.
    pub n_pictures: u64,
    /// DINO: cosine similarity of DINO features (Ruiz et al. 2023, section 4.1).
    pub dino: Score,
    /// CLIP-I: cosine similarity of CLIP's image features.
    pub clip_i: Score,
    /// CLIP-T: cosine similarity of a picture's CLIP features with those of its prompt, in which the class name
    /// stands for the product.
    pub clip_t: Score,
    /// FID-64: Fréchet distance of the 64 features after Inception's first pooling (Heusel et al. 2017).
    pub fid_64: Score,
    /// FID-2048: Fréchet distance of Inception's last 2048 features.
    pub fid_2048: Score,
    /// SSIM: structural similarity (Wang et al. 2004).
    pub ssim: Score,
    /// PSNR: peak signal-to-noise ratio, in dB.
    pub psnr: Score,
    /// LPIPS: perceptual distance (Zhang et al. 2018).
    pub lpips: Score,
}

/// The scores of the photos among themselves, every photo with every other one: what a perfect model can reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PhotoScores {
    /// Cosine similarity of DINO features.
    pub dino: Score,
    /// Cosine similarity of CLIP's image features.
    pub clip_i: Score,
}

/// The scores of one picture.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PictureScores {
    /// Mean cosine similarity of its DINO features with the photos', -1 to 1; null without the network.
    pub dino: Option<f64>,
    /// Mean cosine similarity of its CLIP features with the photos', -1 to 1; null without the network.
    pub clip_i: Option<f64>,
    /// Cosine similarity of its CLIP features with its prompt's, -1 to 1; null without the network.
    pub clip_t: Option<f64>,
}

/// All scores of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Scores {
    /// Photos that were compared with.
    pub n_photos: u64,
    /// The pictures of one standard prompt; null if there were none.
    pub prompt_invariant: Option<ProtocolScores>,
    /// The pictures with a prompt each; null if there were none.
    pub prompt_varying: Option<ProtocolScores>,
    /// The photos among themselves.
    pub real: PhotoScores,
    /// PRES (Ruiz et al. 2023, section 4.3): cosine similarity of DINO features of pictures of the class with the
    /// photos. High where every object of the class has come to look like the product.
    pub pres: Score,
    /// DIV (the same): LPIPS between pictures of one prompt. Low where they are all alike.
    pub div: Score,
    /// Each generated picture, the prompt-invariant ones first.
    pub pictures: Vec<PictureScores>,
    /// How pictures and photos are paired and prepared, in words.
    pub pairing: String,
}

/// A metric of the paper's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metric {
    Dino,
    ClipI,
    ClipT,
    Fid64,
    Fid2048,
    Ssim,
    Psnr,
    Lpips,
}

impl Metric {
    /// Every one, in the order of the tables.
    pub(super) const ALL: [Self; 8] = [
        Self::Dino,
        Self::ClipI,
        Self::ClipT,
        Self::Fid64,
        Self::Fid2048,
        Self::Ssim,
        Self::Psnr,
        Self::Lpips,
    ];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Dino => "DINO",
            Self::ClipI => "CLIP-I",
            Self::ClipT => "CLIP-T",
            Self::Fid64 => "FID-64",
            Self::Fid2048 => "FID-2048",
            Self::Ssim => "SSIM",
            Self::Psnr => "PSNR",
            Self::Lpips => "LPIPS",
        }
    }
}

impl ProtocolScores {
    pub(super) fn score(&self, metric: Metric) -> &Score {
        match metric {
            Metric::Dino => &self.dino,
            Metric::ClipI => &self.clip_i,
            Metric::ClipT => &self.clip_t,
            Metric::Fid64 => &self.fid_64,
            Metric::Fid2048 => &self.fid_2048,
            Metric::Ssim => &self.ssim,
            Metric::Psnr => &self.psnr,
            Metric::Lpips => &self.lpips,
        }
    }
}

impl PhotoScores {
    /// `None` for metrics that are not computed of photos alone.
    pub(super) fn score(&self, metric: Metric) -> Option<&Score> {
        match metric {
            Metric::Dino => Some(&self.dino),
            Metric::ClipI => Some(&self.clip_i),
            _ => None,
        }
    }
}

impl Scores {
    /// The scores of one protocol, if it had any pictures.
    pub fn protocol(&self, protocol: Protocol) -> Option<&ProtocolScores> {
        match protocol {
            Protocol::PromptInvariant => self.prompt_invariant.as_ref(),
            Protocol::PromptVarying => self.prompt_varying.as_ref(),
        }
    }
}

impl From<Number> for Score {
    fn from(number: Number) -> Self {
        let Number { value, n, of, range, better, backbone, note } = number;
        let better = match better {
            evaluate::Better::Higher => Better::Higher,
            evaluate::Better::Lower => Better::Lower,
        };
        let backbone = backbone.map(|network| ScoreNetwork { name: network.name, sha256: network.sha256 });
        Self { value, n: n as u64, of: of.to_owned(), range, better, backbone, note }
    }
}

impl From<evaluate::Protocol> for ProtocolScores {
    fn from(scores: evaluate::Protocol) -> Self {
        Self {
            n_pictures: scores.n_pictures as u64,
            dino: scores.dino.into(),
            clip_i: scores.clip_i.into(),
            clip_t: scores.clip_t.into(),
            fid_64: scores.fid_64.into(),
            fid_2048: scores.fid_2048.into(),
            ssim: scores.ssim.into(),
            psnr: scores.psnr.into(),
            lpips: scores.lpips.into(),
        }
    }
}

impl From<Real> for PhotoScores {
    fn from(real: Real) -> Self {
        Self { dino: real.dino.into(), clip_i: real.clip_i.into() }
    }
}

impl From<Fidelity> for PictureScores {
    fn from(fidelity: Fidelity) -> Self {
        let Fidelity { dino, clip_i, clip_t } = fidelity;
        Self { dino, clip_i, clip_t }
    }
}

impl From<Evaluation> for Scores {
    fn from(evaluation: Evaluation) -> Self {
        Self {
            n_photos: evaluation.n_photos as u64,
            prompt_invariant: evaluation.prompt_invariant.map(ProtocolScores::from),
            prompt_varying: evaluation.prompt_varying.map(ProtocolScores::from),
            real: evaluation.real.into(),
            pres: evaluation.pres.into(),
            div: evaluation.div.into(),
            pictures: evaluation.pictures.into_iter().map(PictureScores::from).collect(),
            pairing: evaluation.pairing.to_owned(),
        }
    }
}

/// Scores to show in tests: of the prompt-invariant protocol, these values of DINO and LPIPS, each the mean of 8
/// pairs.
#[cfg(test)]
pub(super) fn example(dino: Option<f64>, lpips: Option<f64>) -> Scores {
    let network = ScoreNetwork { name: "dino_vits16".into(), sha256: "0123456789abcdef".into() };
    let none = Score {
        value: None,
        n: 8,
        of: "pairs".into(),
        range: [Some(-1.0), Some(1.0)],
        better: Better::Higher,
        backbone: None,
        note: None,
    };
    let note = Some("indicative: 2 pictures".to_owned());
    let invariant = ProtocolScores {
        n_pictures: 2,
        dino: Score { value: dino, backbone: Some(network), note, ..none.clone() },
        clip_i: none.clone(),
        clip_t: none.clone(),
        fid_64: none.clone(),
        fid_2048: none.clone(),
        ssim: none.clone(),
        psnr: none.clone(),
        lpips: Score { value: lpips, better: Better::Lower, ..none.clone() },
    };
    Scores {
        n_photos: 4,
        prompt_invariant: Some(invariant),
        prompt_varying: None,
        real: PhotoScores { dino: none.clone(), clip_i: none.clone() },
        pres: none.clone(),
        div: none,
        pictures: Vec::new(),
        pairing: "every one".into(),
    }
}
