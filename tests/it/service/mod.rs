//! The service: real databases, real stores, real HTTP; engines that compute nothing.

mod browser;
mod chaos;
mod disk;
mod floor;
mod house;
mod nginx;
mod postgres;
mod s3;
mod scripted;
mod wire;

mod blobs;
mod cases;
mod http_document;
mod http_edge;
mod http_events;
mod http_jobs;
mod http_keys;
mod http_proxies;
mod http_samples;
mod http_shares;
mod monitoring;
mod operators;
mod page;
mod photos;
mod retry;
mod settings;
mod store;
mod story;
mod unknown;
mod worker;
