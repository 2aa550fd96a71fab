//! Commands to a device's thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tokio::sync::oneshot;

use crate::engine::{ClassImages, Ending, Flow, Image, TrainEvent};
use crate::job::{Fault, JobId, SampleSpec, TrainSpec};
use crate::worker::shares::DeviceTime;

/// Where the answer to a command goes.
pub(in crate::worker) type Reply<T> = oneshot::Sender<Result<T, Fault>>;

/// A command to a device.
pub(in crate::worker) enum Command {
    /// Say which class images a training needs. The training follows.
    PlanTraining { spec: TrainSpec, reply: Reply<ClassImages> },
    /// Train. One at a time: a second training waits for the first to end.
    Train(TrainCommand),
    /// Draw a sample, between two steps of a training.
    Draw(DrawCommand),
    /// Compute something small, to see whether the device works. A lost engine is made again first.
    Probe(Reply<()>),
}

pub(in crate::worker) struct TrainCommand {
    pub(in crate::worker) spec: TrainSpec,
    pub(in crate::worker) job: JobId,
    pub(in crate::worker) photos: Vec<Vec<u8>>,
    pub(in crate::worker) class_images: Vec<Option<Vec<u8>>>,
    pub(in crate::worker) resume: Option<PathBuf>,
    pub(in crate::worker) scratch: PathBuf,
    /// Receives every event of the training and says how to continue.
    pub(in crate::worker) observer: Box<dyn FnMut(TrainEvent) -> Flow + Send>,
    pub(in crate::worker) device_time: Arc<DeviceTime>,
    pub(in crate::worker) reply: Reply<Ending>,
}

pub(in crate::worker) struct DrawCommand {
    pub(in crate::worker) spec: SampleSpec,
    pub(in crate::worker) train: TrainSpec,
    pub(in crate::worker) weights: PathBuf,
    pub(in crate::worker) weights_sha256: String,
    /// The training's job.
    pub(in crate::worker) train_job: Option<JobId>,
    /// The tenant's turn and weight at the claim: of several samples the one with the earliest turn is drawn next.
    pub(in crate::worker) turn: i64,
    pub(in crate::worker) weight: i64,
    /// Images that no batch was begun for: tells the driver whether the device needs more samples.
    pub(in crate::worker) left: Arc<AtomicUsize>,
    /// Receives the steps done and the total of steps.
    pub(in crate::worker) on_step: Box<dyn FnMut(u64, u64) + Send>,
    /// Whether the sample is still wanted; asked between any two steps.
    pub(in crate::worker) is_wanted: Box<dyn Fn() -> bool + Send>,
    pub(in crate::worker) device_time: Arc<DeviceTime>,
    /// `None` if the sample is no longer wanted.
    pub(in crate::worker) reply: Reply<Option<Vec<Image>>>,
}
