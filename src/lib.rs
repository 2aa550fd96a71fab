//! Hypnos turns 3-5 photos of a product into a model that draws that product anywhere.

pub mod cli;
pub mod memory;
pub mod ml;
