//! The one integration test binary, in reading order.

mod golden;
mod layers;

mod device;
mod ops;

mod models;
mod sample;

mod bundles;
mod tokenizer;
