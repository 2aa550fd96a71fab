//! The store: the only SQL. The queue, the tenants and their API keys, on SQLite and on Postgres alike.
//!
//! The table `job` is a queue with leases. A claim increments `run_lease`, and every later write of the worker names
//! it: `where id and state = 'running' and run_lease`. No row means that the lease is lost and nothing was written.
//! Terminal states never change. An acknowledged cancel never succeeds. Another tenant's row counts as absent. Time is
//! the database's. Photos, images and weights never come here: a row names objects that are already in the object
//! store.
//!
//! ```text
//! handle    connections, schema, notifications                error     errors and their classification
//! jobs      new jobs, filters, queue lengths                  db        both databases alike: statements and rows
//! api       clients: submit, read, cancel, delete             sqlite    SQLite: one writer
//! worker    workers: claim, renew, finish, rescue             postgres  Postgres, and poolers in front of it
//! admin     operators: look at all, requeue, pause            schema    migrations
//! tenants   enable, disable, erase                            json      JSON columns
//! keys      API keys                                          in_doubt  writes whose outcome is unknown
//! objects   artifacts and class images                        notifier  hints between processes
//! fair_queue  whose job is claimed next                       boot_clock  the clock of SQLite's leases
//! models    what the workers hold
//! deployment  the object store that belongs to the database   fault_injection  lost answers, for tests
//! ```

mod admin;
mod api;
mod boot_clock;
mod db;
mod deployment;
mod error;
mod fair_queue;
mod fault_injection;
mod handle;
mod in_doubt;
mod jobs;
mod json;
mod keys;
mod models;
mod notifier;
mod objects;
mod postgres;
mod schema;
mod sqlite;
mod tenants;
mod timeout;
mod worker;

pub use admin::{AdminFilter, AdminJob, Pause, Requeued};
pub use deployment::{Deployment, References};
pub use error::{Cause, Error, Result};
pub use fair_queue::{QueuePlace, WEIGHT_MAX};
pub use fault_injection::{Commit, Delivery, FaultInjector, Guard, Statement};
pub use handle::{DatabaseServer, Store};
pub use jobs::{Filter, Gauge, Gauges, Idempotency, NewJob, Origin, Submitted};
pub use keys::{Key, NewKey, Scope};
pub use models::{ModelDevice, RegisteredModel};
pub use notifier::Subscription;
pub use postgres::Sessions;
pub use tenants::{Holdings, Tenant, TenantState};
pub use worker::{Claim, ClaimFilter, Completion, HOSTS_MAX, Renewal, Rescued};
