//! The service: real databases, real stores, real HTTP; engines that compute nothing.

mod browser;
mod chaos;
mod floor;
mod house;
mod postgres;
mod s3;
mod scripted;

mod blobs;
mod cases;
mod hosts;
mod http_document;
mod http_edge;
mod http_events;
mod http_jobs;
mod http_keys;
mod http_samples;
mod monitoring;
mod operators;
mod page;
mod photos;
mod retry;
mod settings;
mod shares;
mod store;
mod story;
mod worker;
