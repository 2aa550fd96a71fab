//! How requests are answered.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Who may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// Whoever has an API key.
    Keys,
    /// Whoever reaches the loopback interface; the caller sees to it that nobody else does.
    None,
}

/// How requests are answered.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What URLs begin with, without a slash at the end.
    pub public_url: String,
    /// Who may call.
    pub auth: Auth,
    /// Largest photo, in bytes.
    pub photo_bytes_max: usize,
    /// How long an upload may take to arrive.
    pub upload_time: Duration,
    /// Uploads that are on their way or wait for their turn; each has up to five photos on disk.
    pub uploads_max: usize,
    /// Where they lie until they are worked on: a directory, made if it is not there.
    pub spool: PathBuf,
    /// Requests answered at once.
    pub requests_max: usize,
    /// Requests that wait for a change.
    pub waits_max: usize,
    /// Event streams and downloads at once.
    pub streams_max: usize,
    /// Waiting jobs of one tenant.
    pub queue_max: u64,
    /// Attempts that a job may have.
    pub attempts_max: i64,
    /// Life of a URL to an object.
    pub url_time: Duration,
    /// How long a key that was looked up is believed: one that is revoked works no longer than this.
    pub key_time: Duration,
    /// For each method, training options that suit the models of the workers, as the page offers them.
    pub suggested: BTreeMap<String, serde_json::Value>,
}

impl Default for Settings {
    /// A server on loopback without keys.
    fn default() -> Self {
        Self {
            public_url: "http://127.0.0.1:8080".into(),
            auth: Auth::None,
            photo_bytes_max: 15 << 20,
            upload_time: Duration::from_mins(1),
            uploads_max: 64,
            spool: tempfile::env::temp_dir(),
            requests_max: 256,
            waits_max: 512,
            streams_max: 1000,
            queue_max: 10_000,
            attempts_max: 3,
            url_time: Duration::from_hours(1),
            key_time: Duration::from_secs(30),
            suggested: BTreeMap::new(),
        }
    }
}
