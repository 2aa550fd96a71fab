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

mod backup;
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
mod janitor;
mod monitoring;
mod operators;
mod page;
mod photos;
mod retry;
mod s3_stores;
mod settings;
mod store;
mod story;
mod sweep;
mod unknown;
mod worker;
