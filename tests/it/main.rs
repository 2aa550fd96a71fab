//! The one integration test binary, in reading order.

mod golden;
mod ops;

mod models;

mod bench;
