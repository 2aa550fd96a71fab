//! Plans: what a training or a sample takes in memory, on disk and in arithmetic, counted from configs and headers
//! before a weight is read.
//!
//! What is held for long (weights, moments, pictures) is added up; what a forward and a backward work with comes from
//! dry runs (`dry_run`) of the same layers on shapes alone, in the precision that the programs compute in.

mod arithmetic;
mod dry;
mod meta;
mod needs;
mod sample;
mod training;

pub use arithmetic::{Arithmetic, Calibration, Rates};
pub use needs::{Item, Needs, Peak, Phase, Place};
pub use sample::{SamplePlan, SampleSizes};
pub use training::{Disk, EvaluationSizes, PerceptualSizes, TrainingPlan, TrainingSizes, Work};
