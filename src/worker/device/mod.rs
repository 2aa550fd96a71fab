//! A device: the handle to the thread that owns it.

mod command;
mod queue;
mod thread;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

pub(super) use command::{Command, DrawCommand, TrainCommand};
pub use thread::MakeEngine;

use super::shares::{Account, Clock};
use crate::engine::ClassImages;
use crate::job::{Fault, FaultCode, HeldModel, TrainSpec};
use queue::DeviceQueue;
use thread::DeviceThread;

/// The handle to a device's thread.
#[derive(Clone, Debug)]
pub(super) struct Device {
    commands: UnboundedSender<Command>,
    account: Account,
    clock: Clock,
    has_engine: Arc<AtomicBool>,
}

impl Device {
    /// Starts a device's thread and waits until its engine is made. Returns the handle and its model.
    pub(super) async fn start(
        name: &str,
        make: MakeEngine,
        share: f64,
        clock: Clock,
    ) -> Result<(Self, HeldModel), Fault> {
        let (commands, inbox) = unbounded_channel();
        let (ready, made) = oneshot::channel();
        let account = Account::new(share, clock.now());
        let has_engine = Arc::new(AtomicBool::new(true));
        let queue = DeviceQueue::new(inbox, account.clone(), clock.clone());
        let flag = has_engine.clone();
        std::thread::Builder::new()
            .name(format!("device {name}"))
            .spawn(move || DeviceThread::new(make, flag, queue).run(ready))
            .map_err(|error| Fault::new(FaultCode::Machine, format!("no thread for the device: {error}")))?;
        Ok((Self { commands, account, clock, has_engine }, answer(made).await?))
    }

    /// Which class images a training needs.
    pub(super) async fn class_images(&self, spec: &TrainSpec) -> Result<ClassImages, Fault> {
        let (reply, answered) = oneshot::channel();
        self.send(Command::PlanTraining { spec: spec.clone(), reply });
        answer(answered).await
    }

    /// Has the device compute something small. A lost engine is made again first.
    pub(super) async fn probe(&self) -> Result<(), Fault> {
        let (reply, answered) = oneshot::channel();
        self.send(Command::Probe(reply));
        answer(answered).await
    }

    /// Whether the device has an engine that takes commands.
    pub(super) fn has_engine(&self) -> bool {
        self.has_engine.load(Ordering::Acquire)
    }

    /// How long another sample would wait for its share beside the training in progress.
    pub(super) fn sample_wait(&self) -> Duration {
        self.account.wait(self.clock.now())
    }

    /// Sends a command. If the thread has ended, the command is dropped, and with it its reply.
    pub(super) fn send(&self, command: Command) {
        let _ = self.commands.send(command); // whoever waits for the reply sees that it is gone
    }
}

/// Waits for a device's answer; its thread may end before it gives one.
pub(super) async fn answer<T>(answered: oneshot::Receiver<Result<T, Fault>>) -> Result<T, Fault> {
    answered.await.unwrap_or_else(|_| Err(Fault::new(FaultCode::Machine, "the device's thread has ended")))
}
