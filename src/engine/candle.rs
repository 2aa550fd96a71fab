//! The engine on candle: opens a bundle on a device, keeps the loaded models of products, trains and draws.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Tensor;

use super::api::{ClassImages, DrawInput, Ending, Engine, Flow, Image, ImageGenerator, Observer, TrainInput};
use super::base::Base;
use super::faults::{fault, unreadable};
use super::lru::LruCache;
use super::memory::{self, FEWEST_PHOTOS, MemoryCheck, MemorySettings, Products};
use super::model::{held_model, sampler};
use super::training;
use crate::job::{Fault, FaultCode, HeldModel, SampleSpec, TrainSpec};
use crate::ml::bundle::Bundle;
use crate::ml::device::DeviceKind;
use crate::ml::finetuned::{self, FineTuned};
use crate::ml::precision::Precision;
use crate::ml::provenance::FineTune;
use crate::ml::sample::{self, ImageRequest, SampleSettings, Shared};
use crate::ml::{self, Error, Interrupt, device};
use hypnos_photo::png_size;

/// How an engine works. None of it changes what is drawn or learned, but for rounding.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// What the models compute in; by default what suits the device ([`Precision::chosen`]).
    pub precision: Option<Precision>,
    /// Images of a sample drawn at once, at least 1.
    pub batch: usize,
    /// Bytes that products' models may take while they wait for the next sample. The one in use may be larger.
    pub finetuned_bytes_max: u64,
    /// Whether a training computes blocks again instead of keeping them: less memory for a third more time.
    pub checkpointing: bool,
    /// What memory it may take. None lets everything begin, whatever it is counted to take.
    pub memory: Option<MemoryCheck>,
}

/// An engine that trains and draws with a bundle.
pub struct CandleEngine {
    base: Arc<Base>,
    model: HeldModel,
    settings: EngineSettings,
    /// Bytes that were free on a GPU before anything was loaded.
    gpu_bytes: Option<u64>,
    finetuned: LruCache<FineTuned>,
}

impl CandleEngine {
    /// Opens the device, loads the bundle's models and reads every file of it once for its hash. An error is one line
    /// for whoever runs the program, and may name paths.
    pub fn open(settings: EngineSettings) -> ml::Result<Self> {
        if settings.batch == 0 {
            return Err(Error::setting("batch", "wanted at least 1, got 0"));
        }
        let (device, precision) = device::open_in(&settings.device, settings.precision)?;
        let bundle = Bundle::open(&settings.bundle)?;
        let gpu_bytes = device::free_bytes(&device)?;
        let limits = memory_of(&settings, precision, FEWEST_PHOTOS);
        if let Some(room) = settings.memory.as_ref().and_then(|check| check.room(gpu_bytes))
            && let Some(refusal) = memory::too_small(&bundle, &limits, DeviceKind::of(&device), room.free)?
        {
            return Err(Error::input(format!("{refusal}; --ignore-memory starts anyway")));
        }
        let shared = Shared::load(&bundle, &device, precision)?;
        let base = Arc::new(Base::load(bundle, shared, settings.checkpointing)?);
        let finetuned = LruCache::new(settings.finetuned_bytes_max);
        let model = held_model(&base)?;
        Ok(Self { base, model, settings, gpu_bytes, finetuned })
    }

    /// What the bundle's files ask for that is not done, one line each; they may name paths.
    pub fn warnings(&self) -> &[String] {
        self.base.bundle.warnings()
    }

    /// Whether a training of `spec` on these photos can begin, as far as words, settings and memory tell.
    pub fn check(&self, spec: &TrainSpec, photos: &[Vec<u8>]) -> Result<(), Fault> {
        training::check(&self.base, spec)?;
        self.check_memory(spec, photos).map(|_| ())
    }

    /// Refuses a training that does not fit the memory. Gives the bytes of products' models that leave it what it takes.
    fn check_memory(&self, spec: &TrainSpec, photos: &[Vec<u8>]) -> Result<u64, Fault> {
        let most = self.settings.finetuned_bytes_max;
        let room = self.settings.memory.as_ref().and_then(|check| check.room(self.gpu_bytes));
        let Some(room) = room else { return Ok(most) }; // it is not known, or not to be looked at
        let limits = memory_of(&self.settings, self.base.shared.precision, photo_sizes(photos));
        let kind = DeviceKind::of(self.base.device());
        let left = memory::check_training(&self.base.bundle, &spec.options, &limits, kind, room)?;
        Ok(most.min(left))
    }

    /// The models of these weights, loaded unless they are still here.
    fn finetuned(&mut self, file: &Path, sha256: &str) -> Result<Arc<FineTuned>, Fault> {
        if let Some(finetuned) = self.finetuned.get(sha256) {
            return Ok(finetuned);
        }
        let unreadable = |error| unreadable(error, file, "the weights");
        let bytes = finetuned::bytes(file, self.base.shared.precision).map_err(unreadable)?;
        self.finetuned.make_room(bytes);
        let base = || self.base.models().map(|models| (models.text.clone(), models.unet.clone()));
        let finetuned = FineTuned::load_with(file, &self.base.bundle, &self.base.shared, base);
        let finetuned = finetuned.map_err(unreadable)?;
        Ok(self.finetuned.put(sha256, bytes, finetuned))
    }
}

impl ImageGenerator for CandleEngine {
    fn batch(&self) -> usize {
        self.settings.batch
    }

    fn draw(
        &mut self,
        input: &DrawInput<'_>,
        pictures: Range<usize>,
        observe: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Image>>, Fault> {
        let finetuned = self.finetuned(input.weights, input.weights_sha256)?;
        let (spec, models, product) = (input.spec, &finetuned.models, &finetuned.product);
        let settings = drawing(spec, self.base.drawing(spec.steps as usize));
        settings.check(models).map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
        let request = |prompt: &str, seed| ImageRequest {
            prompt: product.named(prompt),
            negative: product.named(&spec.negative_prompt),
            seed,
        };
        let asked = spec.pictures().skip(pictures.start).take(pictures.len());
        let (prompts, batch): (Vec<&str>, Vec<ImageRequest>) =
            asked.map(|(prompt, seed)| (prompt, request(prompt, seed))).unzip();
        let observe = &mut |step, n_steps| match observe(step as u64, n_steps as u64) {
            Flow::Continue => Ok(()),
            _ => Err(Interrupt::Stopped(())),
        };
        let drawn = match sample::draw(models, &batch, &settings, observe) {
            Ok(drawn) => drawn,
            Err(Interrupt::Stopped(())) => return Ok(None),
            Err(Interrupt::Failed(error)) => return Err(fault(error)),
        };
        let job = input.job.map(|job| job.to_string());
        let finetune = FineTune { weights_sha256: Some(input.weights_sha256), job: job.as_deref() };
        let files = prompts.iter().zip(&batch).zip(drawn);
        let encode = |((prompt, request), pixels): ((&&str, &ImageRequest), Vec<u8>)| {
            self.base.encoded(prompt, request, &settings, finetune, &pixels, spec.format)
        };
        files.map(encode).collect::<Result<_, _>>().map(Some)
    }

    fn probe(&mut self) -> Result<(), Fault> {
        let computed = (|| {
            let numbers = Tensor::arange(0f32, 64.0, self.base.device())?;
            numbers.sqr()?.sum_all()?.to_scalar::<f32>()
        })();
        let sum = computed.map_err(|error| fault(error.into()))?;
        // The squares of 0 to 63, whose sum f32 holds exactly, in whatever order.
        if (sum - 85_344.0).abs() < 0.5 {
            Ok(())
        } else {
            Err(Fault::device_lost("the device computes wrong numbers"))
        }
    }
}

impl Engine for CandleEngine {
    fn model(&self) -> &HeldModel {
        &self.model
    }

    fn class_images(&self, spec: &TrainSpec) -> ClassImages {
        training::class_images(&self.base, spec)
    }

    fn train(&mut self, input: TrainInput<'_>, observe: &mut Observer<'_>) -> Result<Ending, Fault> {
        let beside = self.check_memory(input.spec, input.photos)?;
        self.finetuned.bound(beside);
        let ending = training::train(&Arc::clone(&self.base), self, input, observe);
        self.finetuned.bound(self.settings.finetuned_bytes_max);
        ending
    }
}

/// What an engine's settings mean for its memory.
fn memory_of(settings: &EngineSettings, precision: Precision, photos: (usize, u64)) -> MemorySettings {
    MemorySettings {
        batch: settings.batch,
        checkpointing: settings.checkpointing,
        precision,
        products: settings.memory.as_ref().map_or(Products::Never, |check| check.products),
        photos,
    }
}

/// How many photos there are, and the pixels of the largest, by the heads of their PNGs.
fn photo_sizes(photos: &[Vec<u8>]) -> (usize, u64) {
    let sizes = photos.iter().filter_map(|png| png_size(png));
    (photos.len(), sizes.map(|(width, height)| u64::from(width) * u64::from(height)).max().unwrap_or(0))
}

/// What a sample asks for, on top of what the bundle does by itself.
fn drawing(spec: &SampleSpec, own: SampleSettings) -> SampleSettings {
    let side = |asked: Option<u32>, own: usize| asked.map_or(own, |side| side as usize);
    SampleSettings {
        sampler: spec.scheduler.map_or(own.sampler, sampler),
        steps: spec.steps as usize,
        guidance: spec.guidance.unwrap_or(own.guidance),
        width: side(spec.width, own.width),
        height: side(spec.height, own.height),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_job_and_the_core_have_one_placeholder_for_the_product() {
        assert_eq!(crate::job::PRODUCT, crate::ml::product::PLACEHOLDER);
    }
}
