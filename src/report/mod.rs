//! What people look at: a training's report as one page that needs nothing beside it, and tables of numbers.
//!
//! A page has no scripts and fetches nothing; its pictures are in it. It is a pure function of the report's JSON and a
//! [`Gallery`]. Texts of clients are escaped where they are set.

mod page;
mod plot;
mod table;
mod times;

pub use page::{comparison_page, page};
pub use plot::{Curve, losses_svg};
pub use table::{Cell, Found, Table, comparison, of_evaluation};
pub use times::Times;

/// A picture of a page, small enough to be in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shot {
    /// The file, WebP.
    pub webp: Vec<u8>,
    /// What it shows, in words; may be empty.
    pub caption: String,
}

/// The pictures of a page, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gallery {
    /// The photos.
    pub photos: Vec<Shot>,
    /// Where the product was found in each.
    pub masks: Vec<Shot>,
    /// Where the discriminator looks in the first views.
    pub attention: Vec<Shot>,
    /// The first of the views that were learned from, with their prompts.
    pub views: Vec<Shot>,
    /// What was drawn with the result, as the report's `images` name them.
    pub pictures: Vec<Shot>,
}
