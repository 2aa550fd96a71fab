//! The tests that need a GPU or, in its place, the software device of tests/software_cuda. They are a test program of
//! their own, with only those files of tests/it that they use: compiling all of `it` with CUDA as well takes minutes.

#![allow(clippy::unwrap_used)] // a test fails where it unwraps nothing
#![allow(dead_code)] // what only other tests of `it` use

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
mod fused;
mod launches;
mod methods;
mod precision;
