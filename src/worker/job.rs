//! One job, from its claim to the last write of its attempt.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tracing::{Instrument, Span, info, info_span};

use super::context::Worker;
use super::device::Device;
use super::lease::LeaseHandle;
use super::outcome::Outcome;
use crate::job::{Fault, FaultCode, HeldModel, Invalid, Spec, TrainSpec};
use crate::store::Claim;
use crate::telemetry;

/// The last fault of the machine, set by a job's task before it is written to the row, and taken by the driver.
#[derive(Clone, Debug, Default)]
pub(super) struct MachineFault(Arc<Mutex<Option<Fault>>>);

impl MachineFault {
    fn set(&self, fault: &Fault) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault.clone());
    }

    pub(super) fn take(&self) -> Option<Fault> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Worker {
    /// Runs one claimed job; whether it succeeded. `left` counts the images of a sample that no batch was begun for;
    /// `requested` is when the claim was sent.
    pub(super) async fn run_job(
        self,
        device: Device,
        model: Arc<HeldModel>,
        claim: Claim,
        left: Arc<AtomicUsize>,
        requested: Instant,
        machine_fault: MachineFault,
    ) -> bool {
        let job = &claim.job;
        let span = info_span!("job", job = %job.id, kind = %job.kind, attempt = job.attempt);
        telemetry::set_parent(&span, job.trace.as_deref());
        let guard = self.lease_keeper.hold(job.lease(), requested);
        let lease = &guard.handle;
        async {
            info!("job claimed");
            let outcome = match job.spec() {
                Ok(Spec::Train(spec)) => match self.bind_model(&model, *spec, lease).await {
                    Ok(spec) => self.train(&device, &model.card.sha256, job, &spec, lease).await,
                    Err(outcome) => outcome,
                },
                Ok(Spec::Sample(spec)) => self.sample(&device, &claim, &spec, left, lease).await,
                Err(_) => Fault::new(FaultCode::Internal, "the job's row has no valid specification").into(),
            };
            if let Outcome::Failed(fault) = &outcome {
                telemetry::record_error(&Span::current(), fault.code.as_str());
                if fault.code == FaultCode::Machine {
                    self.n_machine_faults.fetch_add(1, Ordering::AcqRel);
                    machine_fault.set(fault);
                }
            }
            let succeeded = matches!(outcome, Outcome::Done { .. });
            self.finish(job, lease, outcome).await;
            succeeded
        }
        .instrument(span)
        .await
    }

    /// The training's specification, completed for the device's model and stored so if options were left open.
    async fn bind_model(
        &self,
        model: &HeldModel,
        spec: TrainSpec,
        lease: &LeaseHandle,
    ) -> Result<TrainSpec, Outcome> {
        match spec.resolved(&model.card) {
            Ok(None) => Ok(spec),
            Ok(Some(mut resolved)) => {
                resolved.warnings.extend(model.class_warning(&spec.class_name));
                self.write(lease, || self.store.bind_model(lease.lease, &resolved)).await?;
                Ok(resolved)
            }
            Err(Invalid { pointer, message }) => {
                Err(Fault::new(FaultCode::Input, format!("options{pointer}: {message}")).into())
            }
        }
    }
}
