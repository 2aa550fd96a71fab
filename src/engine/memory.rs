//! Whether a training or a sample fits the memory that there is, and which settings make it fit: counted, before
//! anything is allocated.

use std::sync::{Arc, OnceLock};

use serde::Serialize;

use super::training;
use crate::job::{AdamwMoments, Fault, FaultCode, Method, N_PHOTOS_MAX, N_PHOTOS_MIN, TrainOptions};
use crate::ml::Result;
use crate::ml::bundle::Bundle;
use crate::ml::device::DeviceKind;
use crate::ml::plan::{SamplePlan, SampleSizes, TrainingPlan};
use crate::ml::precision::Precision;

/// Photos, and pixels of each, where nothing is known of them. Assumption: as many as there may be, by a phone; up to 40
/// million pixels are accepted.
pub const PHOTOS: (usize, u64) = (N_PHOTOS_MAX, 12_000_000);

/// Those of the smallest training.
pub const FEWEST_PHOTOS: (usize, u64) = (N_PHOTOS_MIN, 1_000_000);

/// Sides, in latents, of the square that the perceptual loss looks at, which are tried to make a training fit.
const CROPS: [u32; 3] = [32, 16, 8];

/// When an engine draws products, whose models lie beside the bundle's. One is counted: the cache of others takes what is
/// left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// Never: it works for one command.
    Never,
    /// While it does not train.
    BetweenTrainings,
    /// Also while it trains.
    BesideTrainings,
}

impl Products {
    /// Those of a worker whose samples may take this share of a device that trains, 0 to 1.
    pub fn of_worker(sample_share: f64) -> Self {
        if sample_share > 0.0 { Self::BesideTrainings } else { Self::BetweenTrainings }
    }
}

/// What an engine's settings mean for its memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemorySettings {
    /// Pictures drawn at once.
    pub batch: usize,
    /// Whether a training computes blocks again instead of keeping them.
    pub checkpointing: bool,
    /// What the models compute in.
    pub precision: Precision,
    /// When products are drawn.
    pub products: Products,
    /// Photos of the product, and pixels of each.
    pub photos: (usize, u64),
}

impl MemorySettings {
    /// Bytes of the product's model that is drawn while the engine trains, of so many bytes; 0 if none is.
    fn beside_trainings(&self, fine_tuned: u64) -> u64 {
        if self.products == Products::BesideTrainings { fine_tuned } else { 0 }
    }
}

/// How an engine learns what memory it may take.
#[derive(Clone, Debug)]
pub struct MemoryCheck {
    /// What this process could have of the machine's, with what it has already; none if that is not known.
    pub obtainable: fn() -> Option<u64>,
    /// What this process could have if no other had any; none if that is not known.
    pub capacity: fn() -> Option<u64>,
    /// Bytes that were free on the GPU before the first of the engines that share it took any; they hold one together.
    pub gpu: Arc<OnceLock<u64>>,
    /// Engines that share the memory of the device.
    pub sharers: usize,
    /// When products are drawn.
    pub products: Products,
}

impl MemoryCheck {
    /// The part of one engine, of what is free on its GPU or else of the machine's memory. What is free on a GPU counts as
    /// it was for the first engine, so that no more is expected of an idle one, and no engine's models are taken off
    /// before its share is. None if it is not known.
    pub(super) fn room(&self, gpu: Option<u64>) -> Option<Room> {
        let own = |bytes| share(bytes, self.sharers);
        let gpu = gpu.map(|now| *self.gpu.get_or_init(|| now));
        let idle = gpu.or_else(self.capacity).map(own);
        gpu.or_else(self.obtainable).map(|free| Room { free: own(free), idle })
    }
}

/// Memory that one engine may take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Now, with what it has taken.
    pub(super) free: u64,
    /// On an idle machine; none if that is not known.
    pub(super) idle: Option<u64>,
}

/// What each of so many engines may take of memory that is free for all of them.
pub fn share(free: u64, sharers: usize) -> u64 {
    free / sharers.max(1) as u64
}

/// A setting that makes something smaller.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Remedy {
    /// The setting, as the command line or a job's options have it.
    pub setting: String,
    /// The most memory at once with it and all before it.
    pub bytes: u64,
}

/// What something takes beside what there is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fit {
    /// What it is.
    pub what: String,
    /// The most memory at once.
    pub wanted: u64,
    /// What is free for it; none if that is not known.
    pub free: Option<u64>,
    /// Settings that make it smaller, the cheapest first, each on top of those before it. The last one makes it fit, if
    /// any does.
    pub remedies: Vec<Remedy>,
}

impl Fit {
    /// Whether it fits.
    pub fn fits(&self) -> bool {
        self.free.is_none_or(|free| self.wanted <= free)
    }

    /// Why it cannot be done, and what would help, in one line; none if it fits.
    pub fn refusal(&self) -> Option<String> {
        let free = self.free.filter(|free| self.wanted > *free)?;
        let settings: Vec<&str> = self.remedies.iter().map(|remedy| remedy.setting.as_str()).collect();
        let settings = settings.join(", ");
        let help = match self.remedies.last() {
            Some(last) if last.bytes <= free => format!("it fits with {settings} ({})", gib(last.bytes)),
            Some(last) => format!("even with {settings} it takes {}", gib(last.bytes)),
            None => "no setting makes it smaller".to_owned(),
        };
        Some(format!("{}: wanted {} of memory, free {}; {help}", self.what, gib(self.wanted), gib(free)))
    }
}

/// Bytes in GiB, for people.
pub fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// The plan of a training, as an engine with these settings does it.
pub fn training_plan(
    bundle: &Bundle,
    options: &TrainOptions,
    settings: &MemorySettings,
    kind: DeviceKind,
) -> Result<TrainingPlan> {
    let mut plan = TrainingPlan::new(bundle, &training::sizes(options, settings), kind)?;
    plan.needs.add_product(settings.beside_trainings(plan.fine_tuned));
    Ok(plan)
}

/// The plan of a sample's batch.
pub fn sample_plan(
    bundle: &Bundle,
    sizes: &SampleSizes,
    settings: &MemorySettings,
    kind: DeviceKind,
) -> Result<SamplePlan> {
    let mut plan = SamplePlan::new(bundle, sizes, kind, settings.precision)?;
    let fine_tuned = plan.fine_tuned;
    plan.needs.add_product(if settings.products == Products::Never { 0 } else { fine_tuned });
    Ok(plan)
}

/// The plan of a training, whether it fits, and if it does not, what makes it fit.
pub fn training_fit(
    bundle: &Bundle,
    options: &TrainOptions,
    settings: &MemorySettings,
    kind: DeviceKind,
    free: Option<u64>,
) -> Result<(TrainingPlan, Fit)> {
    let plan = training_plan(bundle, options, settings, kind)?;
    let wanted = plan.peak(kind).bytes;
    let side = bundle.resolution();
    let what = format!("a training ({}, {side} x {side} pixels)", options.method);
    let mut fit = Fit { what, wanted, free, remedies: Vec::new() };
    let (mut options, mut settings) = (options.clone(), *settings);
    for remedy in REMEDIES {
        let least = fit.remedies.last().map_or(wanted, |last| last.bytes);
        if free.is_none_or(|free| least <= free) {
            break;
        }
        for (setting, changed, tried) in remedy(bundle, &options, &settings) {
            let bytes = training_plan(bundle, &changed, &tried, kind)?.peak(kind).bytes;
            // A setting that saves next to nothing is no advice.
            if bytes + least / 100 < least {
                (options, settings) = (changed, tried);
                // Of several sizes of one setting the last that was needed is named.
                fit.remedies.retain(|before| key(&before.setting) != key(&setting));
                fit.remedies.push(Remedy { setting, bytes });
            }
            if free.is_none_or(|free| bytes <= free) {
                break;
            }
        }
    }
    Ok((plan, fit))
}

/// The name of a setting, without its value.
fn key(setting: &str) -> &str {
    setting.split(['=', ' ']).next().unwrap_or(setting)
}

/// Options and settings with one of them changed, and what was changed.
type Changed = (String, TrainOptions, MemorySettings);

/// What to try, the gentlest first.
type Change = fn(&Bundle, &TrainOptions, &MemorySettings) -> Vec<Changed>;

/// What makes a training smaller, in the order of what it costs: time, time of samples, samples meanwhile, exactness of
/// the moments, exactness of a loss, the best step, the method.
const REMEDIES: [Change; 7] = [
    |_, options, settings| {
        let tried = MemorySettings { checkpointing: true, ..*settings };
        vec![("--gradient-checkpointing".into(), options.clone(), tried)]
    },
    |_, options, settings| {
        vec![("--batch 1".into(), options.clone(), MemorySettings { batch: 1, ..*settings })]
    },
    |_, options, settings| {
        let tried = MemorySettings { products: Products::BetweenTrainings, ..*settings };
        let beside = settings.products == Products::BesideTrainings;
        beside.then(|| ("--sample-share 0".into(), options.clone(), tried)).into_iter().collect()
    },
    |_, options, settings| {
        let changed = TrainOptions { adamw_moments: AdamwMoments::Bits8, ..options.clone() };
        vec![("adamw_moments=8bit".into(), changed, *settings)]
    },
    |bundle, options, settings| {
        let side = (bundle.resolution() / bundle.factor()) as u32;
        let smaller = CROPS.into_iter().filter(|crop| *crop < options.perceptual.crop.unwrap_or(side));
        let cropped = smaller.map(|crop| {
            let mut changed = options.clone();
            changed.perceptual.crop = Some(crop);
            (format!("perceptual.crop={crop}"), changed, *settings)
        });
        cropped.collect()
    },
    |_, options, settings| {
        let mut changed = options.clone();
        changed.evaluation.trials = Some(Vec::new());
        vec![("evaluation.trials=[]".into(), changed, *settings)]
    },
    |_, options, settings| {
        let changed = TrainOptions { steps: options.steps, ..TrainOptions::of(Method::TextualInversion) };
        vec![("method=textual_inversion".into(), changed, *settings)]
    },
];

/// The plan of the pictures of a sample that are drawn at once, whether they fit, and if they do not, whether one does.
pub fn sample_fit(
    bundle: &Bundle,
    sizes: &SampleSizes,
    settings: &MemorySettings,
    kind: DeviceKind,
    free: Option<u64>,
) -> Result<(SamplePlan, Fit)> {
    let plan = sample_plan(bundle, sizes, settings, kind)?;
    let wanted = plan.peak(kind).bytes;
    let what = format!("a sample ({} at once, {} x {} pixels)", sizes.batch, sizes.width, sizes.height);
    let mut fit = Fit { what, wanted, free, remedies: Vec::new() };
    if !fit.fits() && sizes.batch > 1 {
        let one = sample_plan(bundle, &SampleSizes { batch: 1, ..*sizes }, settings, kind)?;
        fit.remedies.push(Remedy { setting: "--batch 1".into(), bytes: one.peak(kind).bytes });
    }
    Ok((plan, fit))
}

/// Why an engine is of no use: one picture of a sample, or the smallest training, does not fit. None if both do.
pub fn too_small(
    bundle: &Bundle,
    settings: &MemorySettings,
    kind: DeviceKind,
    free: u64,
) -> Result<Option<String>> {
    let side = bundle.resolution();
    let sizes = SampleSizes { batch: 1, width: side, height: side };
    let (_, sample) = sample_fit(bundle, &sizes, settings, kind, Some(free))?;
    if let Some(refusal) = sample.refusal() {
        return Ok(Some(refusal));
    }
    let smallest = TrainOptions::of(Method::TextualInversion);
    let (_, training) = training_fit(bundle, &smallest, settings, kind, Some(free))?;
    Ok(training.refusal())
}

/// Refuses a training that does not fit: [`FaultCode::Machine`] if it fits when nothing else has memory, or else
/// [`FaultCode::Input`]. Gives the bytes that are left beside one that fits, without a product's model.
pub(super) fn check_training(
    bundle: &Bundle,
    options: &TrainOptions,
    settings: &MemorySettings,
    kind: DeviceKind,
    room: Room,
) -> std::result::Result<u64, Fault> {
    let (plan, fit) =
        training_fit(bundle, options, settings, kind, Some(room.free)).map_err(super::faults::fault)?;
    if let Some(refusal) = fit.refusal() {
        let is_short_now = room.idle.is_some_and(|idle| fit.wanted <= idle);
        let code = if is_short_now { FaultCode::Machine } else { FaultCode::Input };
        return Err(Fault::new(code, refusal));
    }
    Ok(room.free - (fit.wanted - settings.beside_trainings(plan.fine_tuned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_of_one_device_have_its_memory_in_equal_parts() {
        let room = |sharers, gpu| {
            let products = Products::Never;
            let gpu_memory = Arc::default();
            MemoryCheck { obtainable: || Some(60), capacity: || Some(90), gpu: gpu_memory, sharers, products }
                .room(gpu)
        };
        assert_eq!(room(3, None), Some(Room { free: 20, idle: Some(30) }));
        assert_eq!(room(1, None), Some(Room { free: 60, idle: Some(90) }));
        assert_eq!(room(3, Some(9)), Some(Room { free: 3, idle: Some(3) }), "of a GPU's own");
    }

    #[test]
    fn what_one_engine_takes_of_a_gpu_is_not_taken_off_another_s_part() {
        let check = MemoryCheck {
            obtainable: || None,
            capacity: || None,
            gpu: Arc::default(),
            sharers: 2,
            products: Products::Never,
        };
        let other = check.clone();
        assert_eq!(check.room(Some(80)), Some(Room { free: 40, idle: Some(40) }));
        assert_eq!(other.room(Some(50)), Some(Room { free: 40, idle: Some(40) }), "the first has 30");
    }
}
