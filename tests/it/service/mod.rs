//! The service: what it promises, on real databases.

pub(crate) mod postgres;
mod store;
