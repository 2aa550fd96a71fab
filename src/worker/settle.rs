//! How a job ends: objects first, then one guarded write; what did not count is taken away again, once that is settled.

use std::time::Duration;

use serde_json::{Value, json};
use tracing::{info, warn};

use super::Worker;
use super::lease::Held;
use crate::blobs::{self, Key, Name, Scope};
use crate::clock;
use crate::engine::Drawn;
use crate::janitor;
use crate::job::{Checkpoint, Fault, FaultCode, Job, Object};
use crate::store::{self, Wish};

/// What became of a claimed job.
pub(super) enum Outcome {
    /// Its result is in the store.
    Done {
        /// Facts for the row.
        result: Value,
        /// What the row is to name.
        objects: Vec<Object>,
    },
    /// It goes back to the queue, from where its last checkpoint left it.
    Paused,
    /// Its owner wanted it to end.
    Canceled,
    /// It is no longer ours.
    Lost,
    /// It failed.
    Failed(Fault),
}

impl Outcome {
    /// In words, for the log.
    pub(super) fn why(&self) -> &str {
        match self {
            Self::Failed(fault) => &fault.message,
            Self::Lost => "the lease was lost",
            Self::Done { .. } | Self::Paused | Self::Canceled => "the job has ended",
        }
    }
}

impl From<Fault> for Outcome {
    fn from(fault: Fault) -> Self {
        Self::Failed(fault)
    }
}

/// First wait between two tries of something that the network refused; doubled up to [`WAIT_MAX`].
const WAIT: Duration = Duration::from_millis(500);
const WAIT_MAX: Duration = Duration::from_secs(15);

/// How long a job's row is asked for, after its end, before the attempt's objects are left where they are.
const SETTLE: Duration = Duration::from_secs(30);

/// Pause before a job that failed by the machine's fault is tried again, for each attempt so far.
const RETRY_AFTER: Duration = Duration::from_secs(5);

impl Worker {
    /// Writes the job's end, for as long as the lease is held, and takes away what did not count.
    pub(super) async fn settle(&self, job: &Job, held: &Held, outcome: Outcome) {
        let lease = held.lease;
        let used = held.meter.total();
        metrics::counter!("hypnos_device_milliseconds_total", "kind" => job.kind.as_str())
            .increment(used.as_millis() as u64);
        let end = async |wish| self.write(held, || self.store.end(lease, wish, used)).await;
        let ended = match &outcome {
            Outcome::Done { result, objects } => end(Wish::Succeed { result, artifacts: objects }).await,
            Outcome::Paused => end(Wish::GiveBack).await,
            Outcome::Canceled => end(Wish::Cancel).await,
            Outcome::Failed(fault) => {
                warn!("failed: {fault}");
                let retry = fault.retryable.then(|| RETRY_AFTER * job.attempt.clamp(1, 60) as u32);
                let told = told(fault);
                if fault.code == FaultCode::Machine {
                    let retry = retry.unwrap_or_default();
                    let host = &self.settings.host;
                    end(Wish::MachineFailed { fault: &told, host, retry }).await
                } else {
                    end(Wish::Fail { fault: &told, retry }).await
                }
            }
            Outcome::Lost => Err(Refused::Lost),
        };
        match ended {
            Ok(state) => {
                info!("now {state}");
                let labels = [("kind", job.kind.as_str()), ("state", state.as_str())];
                metrics::counter!("hypnos_attempts_total", &labels).increment(1);
            }
            Err(refused) => {
                warn!("ended without a word: {refused}");
                metrics::counter!("hypnos_leases_lost_total").increment(1);
            }
        }
        if let Err(error) = self.remove_unnamed(job).await {
            warn!("what this attempt stored is left to the sweep: {error}");
        }
        if let Err(error) = janitor::remove_spent_checkpoints(&self.store, &self.blobs).await {
            warn!("a checkpoint that nothing needs is left to the janitor: {error}");
        }
    }

    /// Stores something under this attempt, with what else there is to know of it.
    pub(super) async fn put(
        &self,
        job: &Job,
        held: &Held,
        name: Name,
        content: Content<'_>,
        meta: Value,
    ) -> Result<Object, Outcome> {
        let key = Key::artifact(job.tenant, job.lease(), name);
        let stored = patiently(held, async || match &content {
            Content::Bytes(bytes) => self.blobs.put(&key, bytes.clone()).await,
            Content::File(file) => self.blobs.put_file(&key, file, |_| {}).await,
        });
        Ok(Object { meta, ..stored.await? })
    }

    /// Stores a picture, with what it takes to draw it again.
    pub(super) async fn put_picture(
        &self,
        job: &Job,
        held: &Held,
        name: Name,
        picture: &Drawn,
    ) -> Result<Object, Outcome> {
        let meta = json!({
            "prompt": picture.prompt, "seed": picture.seed,
            "width": picture.width, "height": picture.height,
        });
        self.put(job, held, name, Content::Bytes(picture.bytes.clone().into()), meta).await
    }

    /// Fetches an object that a row names, whole.
    pub(super) async fn get(&self, held: &Held, object: &Object) -> Result<bytes::Bytes, Outcome> {
        Ok(patiently(held, || self.blobs.get(object)).await?)
    }

    /// A guarded write to the job's row, tried for as long as the lease is held. One whose outcome is unknown is said again:
    /// the row shows whether it was done.
    pub(super) async fn write<T, F: Future<Output = store::Result<T>>>(
        &self,
        held: &Held,
        write: impl Fn() -> F,
    ) -> Result<T, Refused<store::Error>> {
        patiently(held, write).await
    }

    /// Removes what this attempt stored and the row does not name. The row is locked for that: a write of this attempt may
    /// have been done without an answer, or may be under way still.
    async fn remove_unnamed(&self, job: &Job) -> Result<(), janitor::Error> {
        let scope = Scope::attempt(job.tenant, job.lease());
        let until = clock::now() + SETTLE;
        let named = loop {
            match self.store.named(job.id).await {
                Err(error) if error.is_passing() && clock::now() < until => {
                    clock::sleep(WAIT).await;
                }
                named => break named?,
            }
        };
        // Listed after that: all that is there now was written before.
        for entry in self.blobs.list(&scope).await? {
            if !named.contains(entry.key.as_str()) {
                self.blobs.delete(&entry.key).await?;
            }
        }
        Ok(())
    }

    /// Makes `checkpoint` the one to go on from, and removes the one before.
    pub(super) async fn commit(
        &self,
        held: &Held,
        checkpoint: &Checkpoint,
    ) -> Result<(), Refused<store::Error>> {
        let before = self.write(held, || self.store.commit_checkpoint(held.lease, checkpoint)).await?;
        if let Some(key) = before.and_then(|before| Key::parse(&before.object.key))
            && let Err(error) = self.blobs.delete(&key).await
        {
            warn!("the checkpoint before is left behind: {error}");
        }
        Ok(())
    }
}

/// Where the bytes of something to store are.
pub(super) enum Content<'a> {
    Bytes(bytes::Bytes),
    File(&'a std::path::Path),
}

/// What the job's owner hears of a fault: of our own ones nothing that only we understand, such as where a file lies.
fn told(fault: &Fault) -> Fault {
    let message = match fault.code {
        FaultCode::Internal => "an internal fault; the worker's log has more",
        _ => &fault.message,
    };
    Fault { message: message.into(), ..fault.clone() }
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused<E> {
    /// The lease is gone.
    #[error("the lease was lost")]
    Lost,
    /// It cannot be done, however often it is tried.
    #[error(transparent)]
    Error(#[from] E),
}

impl From<Refused<blobs::Error>> for Outcome {
    fn from(refused: Refused<blobs::Error>) -> Self {
        match refused {
            Refused::Lost => Self::Lost,
            Refused::Error(error) => {
                let code = match error {
                    blobs::Error::Missing | blobs::Error::Damaged => FaultCode::ArtifactMissing,
                    _ => FaultCode::Machine,
                };
                Self::Failed(Fault::new(code, error.to_string()))
            }
        }
    }
}

impl From<Refused<store::Error>> for Outcome {
    fn from(refused: Refused<store::Error>) -> Self {
        match refused {
            Refused::Lost => Self::Lost,
            Refused::Error(error) => Self::Failed(Fault::new(FaultCode::Machine, error.to_string())),
        }
    }
}

/// Errors that may be gone the next time.
pub(super) trait Passing {
    /// Whether to try again.
    fn is_passing(&self) -> bool;
    /// Whether it says that the lease is lost.
    fn is_lost(&self) -> bool;
}

impl Passing for blobs::Error {
    fn is_passing(&self) -> bool {
        matches!(self, Self::Away(_) | Self::Full | Self::Refused(_))
    }

    fn is_lost(&self) -> bool {
        false
    }
}

impl Passing for store::Error {
    fn is_passing(&self) -> bool {
        // A schema that is not ours may be that of a database that is just being put back.
        matches!(self, Self::Away(_) | Self::Unknown(_) | Self::Schema(_))
    }

    fn is_lost(&self) -> bool {
        matches!(self, Self::LeaseLost)
    }
}

/// Does something that a network may refuse for a while: again and again, for as long as the lease is held.
pub(super) async fn patiently<T, E: Passing, F: Future<Output = Result<T, E>>>(
    held: &Held,
    work: impl Fn() -> F,
) -> Result<T, Refused<E>> {
    let mut wait = WAIT;
    loop {
        if held.is_lost() {
            return Err(Refused::Lost);
        }
        match work().await {
            Ok(done) => return Ok(done),
            Err(error) if error.is_lost() => {
                held.lose();
                return Err(Refused::Lost);
            }
            Err(error) if !error.is_passing() => return Err(Refused::Error(error)),
            Err(_) => clock::sleep(wait.min(held.left())).await,
        }
        wait = (wait * 2).min(WAIT_MAX);
    }
}
