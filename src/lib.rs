//! Hypnos fine-tunes Stable Diffusion on 3 to 5 photos of a product, so that the model draws that product anywhere.
//!
//! The HTTP server and the worker never call each other. They share a database table and an object store, and a core
//! that depends on neither:
//!
//! ```text
//! cli       the command line: arguments and exit codes; connects the parts
//! http      requests to rows            worker    rows to results (neither depends on the other)
//! store     the database, the only SQL  blobs     the object store, the only object keys
//! photo     decoding of uploads         engine    the interface between worker and core: one device
//! report    reports, pages, tables      ml        the core: models, losses, operations
//! job       shared types                config    all settings
//! health    condition of the devices    clock     time, which tests can control
//! maintenance  rescue and erasure       deployment  which database and object store belong together
//! retry     retries of ended jobs       sweep     orphaned objects
//! memory    the allocator               telemetry traces and metrics
//! machine   what the machine has
//! pull      published models to a bundle
//! ```

pub mod blobs;
pub mod cli;
pub mod clock;
pub mod config;
pub mod deployment;
pub mod engine;
pub mod health;
pub mod http;
pub mod job;
pub mod machine;
pub mod maintenance;
pub mod memory;
pub mod photo;
mod pull;
pub mod report;
pub mod retry;
pub mod store;
pub mod sweep;
pub mod telemetry;
pub mod worker;

pub use hypnos_ml as ml;
