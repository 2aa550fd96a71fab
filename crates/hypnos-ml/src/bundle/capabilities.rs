//! What a bundle can be used for beyond drawing, and one sentence for each thing that it cannot.

/// Something that takes a part which only some bundles have. A plain directory of Stable Diffusion has none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Capability {
    /// To find the product in photos, which views of it are made from.
    Segmentation,
    /// The perceptual loss.
    PerceptualLoss,
    /// The scores DINO and PRES.
    Dino,
    /// The scores CLIP-I and CLIP-T, and the choice of the training step that is served.
    Clip,
    /// The score FID.
    Inception,
    /// The scores LPIPS and DIV.
    Lpips,
}

impl Capability {
    /// All, in the order of a training.
    pub const ALL: [Self; 6] =
        [Self::Segmentation, Self::PerceptualLoss, Self::Dino, Self::Clip, Self::Inception, Self::Lpips];

    /// Those whose networks score pictures.
    pub const SCORES: [Self; 4] = [Self::Dino, Self::Clip, Self::Inception, Self::Lpips];

    /// The capability that takes this part, if one does.
    pub fn of_part(part: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|capability| capability.part() == part)
    }

    /// The parts of all: what a bundle may have beside the models that draw.
    pub fn parts() -> [&'static str; 6] {
        Self::ALL.map(Self::part)
    }

    /// The part that it takes, a directory of the bundle.
    pub fn part(self) -> &'static str {
        match self {
            Self::Segmentation => "segmenter",
            Self::PerceptualLoss => "perceptual",
            Self::Dino => "metrics/dino",
            Self::Clip => "metrics/clip",
            Self::Inception => "metrics/inception",
            Self::Lpips => "metrics/lpips",
        }
    }

    /// The training option that goes without it. Scores are left out by themselves.
    pub fn option_without(self) -> Option<&'static str> {
        match self {
            Self::Segmentation => Some("views.enabled=false"),
            Self::PerceptualLoss => Some("loss_weights.perceptual=0"),
            Self::Dino | Self::Clip | Self::Inception | Self::Lpips => None,
        }
    }

    /// What cannot be done with a bundle that lacks the part: one sentence, to be put after the part's name.
    pub fn missing(self) -> &'static str {
        match self {
            Self::Segmentation => {
                "is missing: no product is found in photos, so a training needs views.enabled=false"
            }
            Self::PerceptualLoss => {
                "is missing: there is no perceptual loss, so a training needs loss_weights.perceptual=0"
            }
            Self::Dino => "is missing: there are no DINO and PRES scores",
            Self::Clip => {
                "is missing: there are no CLIP-I and CLIP-T scores, and a training's last step is served"
            }
            Self::Inception => "is missing: there is no FID score",
            Self::Lpips => "is missing: there are no LPIPS and DIV scores",
        }
    }
}
