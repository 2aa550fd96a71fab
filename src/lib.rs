//! Hypnos turns 3-5 photos of a product into a model that draws that product anywhere.
//!
//! Two programs that never call each other, an HTTP front and a worker, meet only in a table and a bucket, round one pure
//! core that knows neither:
//!
//! ```text
//! cli       words in, exit codes out; wires the rest together
//! http      requests to rows        worker    rows to results         (neither knows the other)
//! store     the only SQL            blobs     the only object keys    photo    bytes of strangers to pixels
//! engine    what a device can do: the seam between worker and core
//! report    what people look at: a training as a page, tables of numbers
//! ml        the core: models, mathematics, operations
//! job       the nouns               config    every setting            health   how the devices are doing
//! clock     time, which a test may move by hand
//! ```

pub mod blobs;
pub mod cli;
pub mod clock;
pub mod config;
pub mod deployment;
pub mod engine;
pub mod health;
pub mod http;
pub mod janitor;
pub mod job;
pub mod memory;
pub mod ml;
pub mod photo;
pub mod report;
pub mod retry;
pub mod store;
pub mod sweep;
pub mod telemetry;
pub mod worker;
