//! The service: real databases, real stores, real HTTP; engines that compute nothing.

mod floor;
mod scripted;
mod worker;
