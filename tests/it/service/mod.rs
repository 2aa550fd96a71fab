//! The service: real databases, real stores, real HTTP; engines that compute nothing.

mod floor;
mod house;
mod http_document;
mod http_jobs;
mod scripted;
mod worker;
