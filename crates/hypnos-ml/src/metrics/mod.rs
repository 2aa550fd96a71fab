//! Metrics: a backbone that turns pictures into features, with its own preprocessing, and a pure distance on features.
//!
//! | metric | features | distance | range, better |
//! |---|---|---|---|
//! | DINO | [`dino`] of generated and real pictures | [`mean_pairwise_cosine`] | -1..1, higher |
//! | PRES | [`dino`] of class pictures and real ones | [`mean_pairwise_cosine`] | -1..1, lower |
//! | CLIP-I | [`clip`] of generated and real pictures | [`mean_pairwise_cosine`] | -1..1, higher |
//! | CLIP-T | [`clip`] of pictures and of their prompts | [`mean_paired_cosine`] | -1..1, higher |
//! | FID | [`inception`] of generated and real pictures | [`frechet()`] | 0.., lower |
//! | LPIPS | [`lpips`], pair by pair | its own | 0.., lower |
//! | DIV | [`lpips`] among the pictures of one prompt | their mean | 0.., higher |
//! | SSIM, PSNR | none | [`ssim`], [`psnr`], pair by pair | -1..1 and 0.., higher |
//!
//! DINO, CLIP-I, CLIP-T, PRES and DIV are those of DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, sections 4.2 and
//! 4.3).

pub mod clip;
pub mod dino;
pub mod inception;
pub mod lpips;
pub mod preprocess;

mod cosine;
mod features;
mod frechet;
mod pixelwise;

pub use clip::Clip;
pub use cosine::{mean_paired_cosine, mean_pairwise_cosine, mean_self_cosine};
pub use dino::Dino;
pub use features::Features;
pub use frechet::frechet;
pub use inception::Inception;
pub use lpips::Lpips;
pub use pixelwise::{psnr, ssim};
