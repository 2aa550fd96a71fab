//! The pure core: models, mathematics and operations on tensors. No network, no SQL, no clock, no environment,
//! no hidden randomness.

pub mod ops;
