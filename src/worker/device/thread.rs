//! The thread that owns a device and its engine.
//!
//! It trains, and between two steps of a training it draws waiting samples, a batch at a time, as far as their share of
//! the device allows. An engine that panics or loses its device is replaced.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::{error, warn};

use super::command::Reply;
use super::queue::{DeviceQueue, EngineFailure, catch_panic, probe, send_reply};
use crate::engine::Engine;
use crate::job::{Fault, FaultCode, HeldModel};

/// Makes the engine of a device, on the device's own thread; called again after a panic.
pub type MakeEngine = Box<dyn Fn() -> Result<Box<dyn Engine>, Fault> + Send>;

/// What the thread owns.
pub(super) struct DeviceThread {
    make: MakeEngine,
    engine: Option<Box<dyn Engine>>,
    has_engine: Arc<AtomicBool>,
    queue: DeviceQueue,
}

impl DeviceThread {
    pub(super) fn new(make: MakeEngine, has_engine: Arc<AtomicBool>, queue: DeviceQueue) -> Self {
        Self { make, engine: None, has_engine, queue }
    }

    /// Works until no command will come any more. `ready` receives the engine's model.
    pub(super) fn run(mut self, ready: Reply<HeldModel>) {
        let made = self.make();
        let is_made = made.is_ok();
        send_reply(ready, made);
        while is_made && self.queue.wait() {
            match &mut self.engine {
                Some(engine) => {
                    if let Err(failure) = self.queue.work(engine.as_mut()) {
                        self.replace(failure);
                    }
                }
                None => self.serve_without_engine(),
            }
        }
    }

    /// Makes the engine; its model.
    fn make(&mut self) -> Result<HeldModel, Fault> {
        let make = &self.make;
        let engine = catch_panic(make)
            .unwrap_or_else(|_| Err(Fault::device_lost("the engine panicked while it was made")))?;
        let model = engine.model().clone();
        self.engine = Some(engine);
        self.has_engine.store(true, Ordering::Release);
        Ok(model)
    }

    /// Drops a failed engine. After a panic another is made at once: if that works, the panic was the command's fault,
    /// else the device's.
    fn replace(&mut self, EngineFailure(waiting): EngineFailure) {
        self.has_engine.store(false, Ordering::Release);
        let old = self.engine.take();
        if catch_panic(|| drop(old)).is_err() {
            warn!("engine panicked again while it was dropped");
        }
        if waiting.is_empty() {
            return; // the next probe makes another
        }
        error!("engine panicked; creating another");
        let fault = match self.make_and_probe() {
            Ok(()) => Fault::new(FaultCode::Internal, "the engine panicked"),
            Err(fault) => Fault::device_lost(format!(
                "the engine panicked and cannot be created again: {}",
                fault.message
            )),
        };
        waiting.into_iter().for_each(|send| send(fault.clone()));
    }

    fn make_and_probe(&mut self) -> Result<(), Fault> {
        self.make()?;
        let outcome = self.engine.as_mut().map_or(Ok(()), |engine| probe(engine.as_mut()));
        if outcome.is_err() {
            self.replace(EngineFailure::default());
        }
        outcome
    }

    /// Without an engine, a probe makes another, and every other command is rejected.
    fn serve_without_engine(&mut self) {
        for reply in self.queue.reject_all() {
            let outcome = if self.engine.is_some() { Ok(()) } else { self.make_and_probe() };
            send_reply(reply, outcome);
        }
    }
}
