//! The end of an attempt: objects first, then one write to the row, then removal of what the row does not name.

use std::time::Duration;

use tracing::{info, warn};

use super::context::Worker;
use super::lease::LeaseHandle;
use super::outcome::Outcome;
use super::retry::{Refused, Transient, WAIT};
use crate::blobs::Scope;
use crate::clock;
use crate::job::{Fault, FaultCode, Job};
use crate::maintenance;
use crate::store::Completion;

/// How long reading the job's row is retried, after its end, before the attempt's objects are left to the sweep.
const READ_ROW: Duration = Duration::from_secs(30);

/// Wait before a failed job is retried, for each attempt so far.
const RETRY_AFTER: Duration = Duration::from_secs(5);

impl Worker {
    /// Writes the outcome of an attempt, retried for as long as the lease is held, and removes objects that the row
    /// does not name.
    pub(super) async fn finish(&self, job: &Job, lease: &LeaseHandle, outcome: Outcome) {
        let used = lease.device_time.total();
        metrics::counter!("hypnos_device_milliseconds_total", "kind" => job.kind.as_str())
            .increment(used.as_millis() as u64);
        let end =
            async |completion| self.write(lease, || self.store.end(lease.lease, completion, used)).await;
        let ended = match &outcome {
            Outcome::Done { result, objects } => {
                end(Completion::Succeed { result, artifacts: objects }).await
            }
            Outcome::Paused => end(Completion::Release).await,
            Outcome::Canceled => end(Completion::Cancel).await,
            Outcome::Failed(fault) => {
                warn!(code = %fault.code, fault = fault.message, "attempt failed");
                let retry = fault.retryable.then(|| RETRY_AFTER * job.attempt.clamp(1, 60) as u32);
                let public = public_fault(fault);
                if fault.code == FaultCode::Machine {
                    let retry = retry.unwrap_or_default();
                    let host = &self.settings.host;
                    end(Completion::MachineFailed { fault: &public, host, retry }).await
                } else {
                    end(Completion::Fail { fault: &public, retry }).await
                }
            }
            Outcome::Lost => Err(Refused::LeaseLost),
        };
        match ended {
            Ok(state) => {
                info!(%state, "attempt ended");
                let labels = [("kind", job.kind.as_str()), ("state", state.as_str())];
                metrics::counter!("hypnos_attempts_total", &labels).increment(1);
            }
            Err(error) => {
                warn!(%error, "attempt outcome not recorded");
                metrics::counter!("hypnos_leases_lost_total").increment(1);
            }
        }
        if let Err(error) = self.remove_unreferenced(job).await {
            warn!(%error, "objects of the attempt not removed; left to the sweep");
        }
        if let Err(error) = maintenance::remove_obsolete_checkpoints(&self.store, &self.blobs).await {
            warn!(%error, "obsolete checkpoint not removed; left to maintenance");
        }
    }

    /// Removes the attempt's objects that the row does not name. The row is read under its lock: a write of this
    /// attempt may have been done without an answer, or may still be in progress.
    async fn remove_unreferenced(&self, job: &Job) -> Result<(), maintenance::Error> {
        let scope = Scope::attempt(job.tenant, job.lease());
        let until = clock::now() + READ_ROW;
        let referenced = loop {
            match self.store.referenced_keys(job.id).await {
                Err(error) if error.is_transient() && clock::now() < until => {
                    clock::sleep(WAIT).await;
                }
                referenced => break referenced?,
            }
        };
        // Listed after that: every object there now was written before.
        for entry in self.blobs.list(&scope).await? {
            if !referenced.contains(entry.key.as_str()) {
                self.blobs.delete(&entry.key).await?;
            }
        }
        Ok(())
    }
}

/// The fault that the job's owner sees. Details of an internal fault, such as a file's path, stay in the log.
fn public_fault(fault: &Fault) -> Fault {
    let message = match fault.code {
        FaultCode::Internal => "an internal fault; the worker's log has more",
        _ => &fault.message,
    };
    Fault { message: message.into(), ..fault.clone() }
}
