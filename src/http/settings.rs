//! Settings of the HTTP server.

use std::path::PathBuf;
use std::time::Duration;

/// Who may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// Callers with an API key.
    Keys,
    /// Everyone who reaches the loopback interface; it must not listen on another.
    None,
}

/// Settings of the HTTP server.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Prefix of URLs, without a slash at the end.
    pub public_url: String,
    /// Who may call.
    pub auth: Auth,
    /// Size limit of a photo, in bytes.
    pub photo_bytes_max: usize,
    /// How long an upload may take to arrive.
    pub upload_time: Duration,
    /// Uploads at a time that are received, queued or processed; each has up to five photos on disk.
    pub uploads_max: usize,
    /// Directory where uploads are kept until they are processed; created if missing.
    pub spool: PathBuf,
    /// Concurrent requests.
    pub requests_max: usize,
    /// Concurrent requests that wait for a change.
    pub waits_max: usize,
    /// Concurrent event streams and downloads.
    pub streams_max: usize,
    /// Queued jobs of one tenant.
    pub queue_max: u64,
    /// Attempts of a job.
    pub attempts_max: i64,
    /// Lifetime of a signed URL to an object.
    pub url_time: Duration,
    /// How long keys are cached: a revoked one works for no longer than this.
    pub key_time: Duration,
    /// The model that is trained where a job names none; without one, the only one that workers hold.
    pub default_model: Option<String>,
    /// Names of models whose jobs are accepted before a worker has registered them.
    pub models: Vec<String>,
}

impl Default for Settings {
    /// Those of a server on loopback without keys.
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
            default_model: None,
            models: Vec::new(),
        }
    }
}
