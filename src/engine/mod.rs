//! What a device can do: train on photos, draw images with the result. Tests put a scripted engine in its place.
//!
//! An engine is owned by one OS thread. It does no network and no SQL and knows no queue: it is given files and bytes
//! and reports to an *observer* between two steps; the observer says whether to continue. Time is the caller's too.

mod api;
mod base;
mod candle;
mod faults;
mod lru;
pub mod memory;
mod model;
mod training;

pub use api::{
    ClassImages, DrawInput, Ending, Engine, Flow, Image, ImageGenerator, Observer, Shown, TraceInput,
    TrainEvent, TrainInput, Trained,
};
pub use candle::{CandleEngine, EngineSettings};
pub use training::missing_part;
