//! The one integration test binary, in reading order.

#![allow(clippy::unwrap_used)] // a test fails where it unwraps nothing

mod golden;
mod layers;
mod method;

mod device;
mod ops;

mod candle_transformers;
mod metrics;
mod models;
mod precision;
mod provenance;
mod sample;
mod samplers;
mod train;

mod cli_train;
mod exports;
mod memory;
mod segment;

mod engine;
mod evaluate;

mod bundles;
mod imports;
mod loading;
mod pickles;
mod pull;
mod tokenizer;

mod bench;

mod service;
