//! The tests of the GPU, and of the software device in its place: a binary of its own with what they need of `it`, which
//! takes minutes to compile once more with CUDA.

#![allow(clippy::unwrap_used)] // a test fails where it unwraps nothing
#![allow(dead_code)] // what serves the tests of `it` alone

#[path = "../it/bundles.rs"]
mod bundles;
#[path = "../it/golden.rs"]
mod golden;
#[path = "../it/loading.rs"]
mod loading;
#[path = "../it/provenance.rs"]
mod provenance;

#[path = "../it/device.rs"]
mod device;
#[path = "../it/engine.rs"]
mod engine;
#[path = "../it/loading.rs"]
mod loading;
#[path = "../it/method.rs"]
mod method;
#[path = "../it/metrics.rs"]
mod metrics;
#[path = "../it/models.rs"]
mod models;
#[path = "../it/ops.rs"]
mod ops;
#[path = "../it/train.rs"]
mod train;

mod attention;
mod cuda;
mod launches;
mod methods;
mod precision;
