//! A training's report: its content, a page for people, and tables of scores.
//!
//! The engine builds a [`Report`], whoever has a clock adds the seconds of each phase, and everyone else reads it as
//! that type. The page is a pure function of the report and a [`Gallery`]: it has no scripts and fetches nothing, and
//! its pictures are in it. Texts of clients are escaped where they are inserted.

mod document;
mod page;
mod plot;
mod scores;
mod table;
mod times;

pub use document::{
    BundleId, ClassImageSet, LossCurve, MaskQuality, PhotoSize, Prompts, Report, ReportImage, Seeds,
    TrialScores,
};
pub use page::{comparison_page, page};
pub use plot::losses_svg;
pub use scores::{Better, PhotoScores, PictureScores, Protocol, ProtocolScores, Score, ScoreNetwork, Scores};
pub use table::{Cell, Evaluated, Table, comparison_table, scores_table};
pub use times::PhaseTimes;

/// A picture of a page, small enough to be part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thumbnail {
    /// The file, WebP.
    pub webp: Vec<u8>,
    /// What it shows, in words; may be empty.
    pub caption: String,
}

/// The pictures of a page, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gallery {
    /// The photos.
    pub photos: Vec<Thumbnail>,
    /// The mask of the product in each photo.
    pub masks: Vec<Thumbnail>,
    /// The discriminator's attention in the first views.
    pub attention: Vec<Thumbnail>,
    /// The first of the views that were learned from, with their prompts.
    pub views: Vec<Thumbnail>,
    /// The pictures drawn with the result, in the order of [`Report::images`].
    pub pictures: Vec<Thumbnail>,
}
