//! Settings of a worker.

use std::path::PathBuf;
use std::time::Duration;

use super::shares::Clock;

/// Settings of a worker.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the lease keeper connects to.
    pub database: String,
    /// How long a claim holds without being renewed.
    pub lease: Duration,
    /// How often leases are renewed.
    pub heartbeat: Duration,
    /// How long one attempt may take.
    pub deadline: Duration,
    /// How often the queue is polled when no notification arrives.
    pub poll: Duration,
    /// How often a training's checkpoint is written to the object store.
    pub checkpoint_every: Duration,
    /// Directory for temporary files and cached weights; may be emptied between runs.
    pub scratch: PathBuf,
    /// Bound on the weights cached in `scratch`, in bytes.
    pub weights_bytes_max: u64,
    /// The part of a device's time that samples may take while it trains, 0 to 1; with 0 a device holds one job at a time.
    pub sample_share: f64,
    /// How long nothing is claimed after a first fault of the machine; doubled after each further one.
    pub backoff: Duration,
    /// How long storing work in progress may take during shutdown.
    pub drain: Duration,
    /// Name of this machine: rows remember the machines that failed under them.
    pub host: String,
    /// Clock that device time is measured by.
    pub clock: Clock,
}
