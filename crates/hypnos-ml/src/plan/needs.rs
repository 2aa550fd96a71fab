//! Memory by what it is for, where it lies and when it is in use.

use std::fmt;

use serde::Serialize;

/// What the program takes before it opens anything: its code and what is embedded in it, threads, caches.
///
/// Assumption: measured, a few tens of MB, of a release and of a dev build.
pub(super) const PROGRAM: u64 = 64 << 20;

/// What cuBLAS and cuDNN take on a GPU beside tensors.
///
/// Assumption: half of what `ops/cuda/cudnn.rs` allows a convolution; cuDNN chooses by itself.
pub(super) const LIBRARIES: u64 = 512 << 20;

/// What an allocator that keeps freed memory takes beyond what is asked for, with pages of 2 MB: a part of all that is in
/// use, and so many bytes more, most in a training, which asks for many sizes.
///
/// Assumption: measured on CPUs. Whole trainings of Stable Diffusion 1.5 at 256 pixels took 10 % more than was asked for at
/// once; samples of the miniature, of 0.1 GB, took 13 to 32 MB more and its trainings, of 0.3 GB, 60 to 110 MB.
const KEPT_PART: f64 = 0.08;
pub(super) const KEPT_IN_SAMPLE: u64 = 12 << 20;
pub(super) const KEPT_IN_TRAINING: u64 = 72 << 20;

/// What is being done. Those of a training follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The product is found in its photos, and views of it are made and encoded.
    Refining,
    /// Class images are drawn and encoded.
    ClassImages,
    /// The discriminator learns alone.
    Discriminating,
    /// Steps are taken; between them, a few pictures are drawn and scored.
    Training,
    /// The pictures of the result are drawn.
    Drawing,
    /// They are scored.
    Evaluating,
    /// Pictures of a sample are drawn.
    Sampling,
}

impl Phase {
    /// Those of a training, in order.
    pub const TRAINING: [Self; 6] = [
        Self::Refining,
        Self::ClassImages,
        Self::Discriminating,
        Self::Training,
        Self::Drawing,
        Self::Evaluating,
    ];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Refining => "refining",
            Self::ClassImages => "class images",
            Self::Discriminating => "discriminator",
            Self::Training => "training",
            Self::Drawing => "drawing",
            Self::Evaluating => "evaluating",
            Self::Sampling => "sampling",
        })
    }
}

/// Where memory lies. On a CPU both are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Beside the models.
    Device,
    /// In the machine's memory, whatever the device is.
    Host,
}

/// Memory for one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What it is for.
    pub name: &'static str,
    /// Where it lies.
    pub place: Place,
    /// Bytes in each phase in which it is in use.
    pub bytes: Vec<(Phase, u64)>,
}

impl Item {
    /// Bytes in this phase, 0 if it is not in use then.
    pub fn at(&self, phase: Phase) -> u64 {
        self.bytes.iter().find(|(at, _)| *at == phase).map_or(0, |(_, bytes)| *bytes)
    }
}

/// The most that is in use at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Peak {
    /// When.
    pub phase: Phase,
    /// How much.
    pub bytes: u64,
}

/// All memory that something takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// By what it is for.
    pub items: Vec<Item>,
}

impl Needs {
    /// Adds an item that takes as many bytes in each of `phases`. Nothing is added for no bytes.
    pub(super) fn add(&mut self, name: &'static str, place: Place, bytes: u64, phases: &[Phase]) {
        self.add_each(name, place, phases.iter().map(|&phase| (phase, bytes)));
    }

    /// Adds an item with its own bytes in each phase.
    pub(super) fn add_each(
        &mut self,
        name: &'static str,
        place: Place,
        bytes: impl IntoIterator<Item = (Phase, u64)>,
    ) {
        let bytes: Vec<(Phase, u64)> = bytes.into_iter().filter(|(_, bytes)| *bytes > 0).collect();
        if !bytes.is_empty() {
            self.items.push(Item { name, place, bytes });
        }
    }

    /// Adds what the allocator keeps beyond all that was added before, and `more` bytes.
    pub(super) fn add_kept(&mut self, more: u64) {
        let kept = |phase| (phase, more + (KEPT_PART * self.at(phase, None) as f64) as u64);
        let each: Vec<(Phase, u64)> = self.phases().into_iter().map(kept).collect();
        self.add_each("kept by the allocator", Place::Host, each);
    }

    /// Adds a product's model, which is drawn at any time.
    pub fn add_product(&mut self, bytes: u64) {
        let phases = self.phases();
        self.add("weights of a product drawn meanwhile", Place::Device, bytes, &phases);
    }

    /// Those in which anything is in use, in order.
    pub fn phases(&self) -> Vec<Phase> {
        let mut phases: Vec<Phase> =
            self.items.iter().flat_map(|item| &item.bytes).map(|(phase, _)| *phase).collect();
        phases.sort_unstable();
        phases.dedup();
        phases
    }

    /// Bytes in a phase: of one place, or of both.
    pub fn at(&self, phase: Phase, place: Option<Place>) -> u64 {
        let here = self.items.iter().filter(|item| place.is_none_or(|place| item.place == place));
        here.map(|item| item.at(phase)).sum()
    }

    /// The most at once: of one place, or of both.
    pub fn peak(&self, place: Option<Place>) -> Peak {
        let peaks = self.phases().into_iter().map(|phase| Peak { phase, bytes: self.at(phase, place) });
        peaks.max_by_key(|peak| peak.bytes).unwrap_or(Peak { phase: Phase::Sampling, bytes: 0 })
    }
}
