//! A bundle: one directory with everything that draws pictures, in the Hugging Face diffusers layout.
//!
//! ```text
//! text_encoder/ unet/ vae/              config.json and weights in safetensors each
//! tokenizer/ scheduler/                 settings, and the vocabulary
//! model_index.json                      what diffusers says of them; may be missing
//! hypnos.json                           what we say of them; may be missing
//! segmenter/ perceptual/                what HYPNOS learns with; may be missing
//! metrics/{dino,clip,inception,lpips}/  what judges the pictures; may be missing
//!                                       (both as text_encoder/, with config.json and weights)
//! ```
//! Any SD 1.x or 2.x in that layout is one. Sizes, factors and channels come from the configs, never from constants.
//! Weights may lie in several files that an index names, and tokenizers in any form that transformers wrote;
//! `docs/loading.md` says what is accepted.
//! Opening reads the small files only, and converts nothing; weights are read when a part is asked for. [`Import`] makes
//! a bundle of other files. Nothing is downloaded here.

mod backbones;
mod capabilities;
mod check;
mod configs;
mod convert;
mod directory;
mod embedded;
mod families;
mod files;
mod import;
mod manifest;
mod random;
mod random_parts;
mod rare_tokens;
mod scheduler;
mod sizes;
mod tensors;

pub use backbones::{Backbones, MetricBackbone};
pub use capabilities::Capability;
pub use check::{Finding, Report, check};
pub use configs::model_index;
pub use convert::{convert, part_shapes};
pub use directory::{Bundle, Part};
pub use embedded::{MINIATURE_NAME, miniature};
pub use families::Like;
pub(crate) use files::{copy, make_directory, plain_name, read_json, weight_file};
pub use files::{hash_file, write_json};
pub use import::{Import, ImportOptions};
pub use manifest::{Drawing, Fetched, Manifest, Origin, read_manifest};
pub use random::random;
pub use random_parts::{random_metrics, random_part};
