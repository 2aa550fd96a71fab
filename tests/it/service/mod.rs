//! The service round the core, against real servers wherever there is one.

pub(crate) mod chaos;
pub(crate) mod s3;

mod blobs;
mod photos;
