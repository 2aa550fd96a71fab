//! What a bundle can be used for beyond drawing, and one sentence for each thing that it cannot.

use super::directory::Bundle;

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

    /// What cannot be done without the part.
    fn purpose(self) -> &'static str {
        match self {
            Self::Segmentation => "finding the product in a photo",
            Self::PerceptualLoss => "the perceptual loss",
            Self::Dino => "scoring by DINO and PRES",
            Self::Clip => "scoring by CLIP-I and CLIP-T, and choosing the step that is served,",
            Self::Inception => "scoring by FID",
            Self::Lpips => "scoring by LPIPS and DIV",
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

    /// One sentence, to be put after the name of the part, for a bundle that does not have it.
    pub fn missing(self) -> String {
        let without = match self.option_without() {
            Some(option) => format!("a training with {option} goes without"),
            None => "trainings and evaluations leave it out".to_owned(),
        };
        format!("is missing; {} needs it, though drawing does not, and {without}", self.purpose())
    }
}

impl Bundle {
    /// What this bundle can be used for beyond drawing, by the parts that it has; whether they are sound says
    /// [`Bundle::check`].
    pub fn capabilities(&self) -> Vec<Capability> {
        Capability::ALL.into_iter().filter(|capability| self.can(*capability)).collect()
    }

    /// What it cannot be used for; [`Capability::missing`] says why.
    pub fn missing(&self) -> Vec<Capability> {
        Capability::ALL.into_iter().filter(|capability| !self.can(*capability)).collect()
    }

    /// Whether it has the part that this takes.
    pub fn can(&self, capability: Capability) -> bool {
        self.has(capability.part())
    }
}
