//! The pure core: models, mathematics and operations on tensors. No network, no SQL, no clock, no environment,
//! no hidden randomness.
//!
//! Dimension key, used in every comment on shapes: `B` batch, `C` channels, `H W` pixels, `h w` latents, `L` tokens
//! (77), `D` width, `N` heads, `K` width of a head, `T` steps of the noise schedule.
//!
//! Value ranges: *pixels* u8 0..255, *unit* 0..1, *signed* -1..1.

pub mod bundle;
pub mod contact_sheet;
pub mod device;
pub mod diffusion;
mod dry_run;
mod error;
pub mod evaluate;
pub mod export;
pub mod finetuned;
pub mod image_io;
mod interrupt;
pub mod metrics;
pub mod models;
pub mod nn;
pub mod ops;
pub mod param;
pub mod perceptual;
pub mod pickle;
pub mod plan;
pub mod precision;
pub mod product;
pub mod provenance;
pub mod random;
pub mod sample;
pub mod samplers;
pub mod segment;
pub mod tensorfile;
pub mod tokenizer;
pub mod train;
pub mod views;
pub mod weights;

pub use error::{Error, Result, io_words};
pub use interrupt::Interrupt;
