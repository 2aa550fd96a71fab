//! The engine on candle: one bundle on one device, and the products that were trained from it.

use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Tensor;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::shelf::Shelf;
use super::{
    Artist, ClassImages, DrawInput, Drawn, Ending, Engine, Flow, TrainInput, Watch, recipe, training,
};
use crate::job::{Fault, FaultCode, Format, PRODUCT, SampleSpec, Scheduler, TrainSpec};
use crate::ml::adapted::{self, Adapted, Product};
use crate::ml::bundle::{Bundle, Drawing, hex};
use crate::ml::sample::{self, Models, Picture};
use crate::ml::samplers::Sampler;
use crate::ml::{self, Error, device, picture};

/// How an engine works. None of it changes what is drawn or learned, but for the rounding of sums.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Pictures of a sample drawn at once, at least 1.
    pub batch: usize,
    /// Bytes that products' models may take while they wait for the next sample. The one in use may be larger.
    pub adapted_bytes_max: u64,
    /// Whether a training computes blocks again instead of keeping them: less memory for a third more time.
    pub checkpointing: bool,
}

/// An engine that trains and draws with a bundle.
pub struct CandleEngine {
    pub(super) settings: Settings,
    pub(super) bundle: Arc<Bundle>,
    pub(super) base: Arc<Models>,
    hash: String,
    adapted: Shelf<Adapted>,
}

impl CandleEngine {
    /// Opens the device, loads the bundle's models and reads every file of it once for its hash. [`Error::Bad`] is one
    /// line for whoever runs the program, and may name paths.
    pub fn open(settings: Settings) -> ml::Result<Self> {
        if settings.batch == 0 {
            return Err(Error::bad("batch: wanted at least 1, got 0"));
        }
        let device = device::open(&settings.device)?;
        let bundle = Bundle::open(&settings.bundle)?;
        let (base, hash) = (Models::load(&bundle, &device)?, bundle.hash()?.to_owned());
        let adapted = Shelf::new(settings.adapted_bytes_max);
        Ok(Self { settings, bundle: Arc::new(bundle), base: Arc::new(base), hash, adapted })
    }

    /// Whether a training of `spec` can begin, as far as words and settings tell.
    pub fn check(&self, spec: &TrainSpec) -> Result<(), Fault> {
        training::check(self, spec)
    }

    /// The models of these weights, loaded unless they are still here.
    fn adapted(&mut self, file: &Path, sha256: &str) -> Result<Arc<Adapted>, Fault> {
        if let Some(adapted) = self.adapted.get(sha256) {
            return Ok(adapted);
        }
        let unusable = |error: Error| match error {
            Error::Bad(_) => {
                Fault::new(FaultCode::ArtifactMissing, without_path(&error, file, "the weights"))
            }
            other => fault(other),
        };
        let bytes = adapted::bytes(file).map_err(unusable)?;
        self.adapted.make_room(bytes);
        let adapted = Adapted::load(file, &self.bundle, &self.base).map_err(unusable)?;
        Ok(self.adapted.put(sha256, bytes, adapted))
    }

    /// How pictures of the bundle's own size are drawn by default, in `steps` steps.
    pub(super) fn how(&self, steps: usize) -> sample::Settings {
        let (side, Drawing { scheduler, guidance }) =
            (self.bundle.resolution(), self.bundle.manifest().drawing);
        sample::Settings { sampler: scheduler, steps, guidance, width: side, height: side }
    }

    /// The file of a picture that was asked for as `prompt`, with the product's place open.
    pub(super) fn encoded(
        &self,
        prompt: &str,
        picture: &Picture,
        how: &sample::Settings,
        pixels: &[u8],
        format: Format,
    ) -> Result<Drawn, Fault> {
        let size = (how.width, how.height);
        let bytes = match format {
            Format::Png => {
                let texts = picture::texts(picture, how, (&self.bundle.manifest().name, &self.hash), false);
                picture::png(pixels, size, &texts)
            }
            Format::Jpeg => picture::jpeg(pixels, size),
            Format::Webp => picture::webp(pixels, size),
        };
        Ok(Drawn {
            bytes: bytes.map_err(fault)?,
            format,
            width: size.0 as u32,
            height: size.1 as u32,
            prompt: prompt.to_owned(),
            seed: picture.seed,
        })
    }
}

impl Artist for CandleEngine {
    fn batch(&self) -> usize {
        self.settings.batch
    }

    fn draw(
        &mut self,
        input: &DrawInput<'_>,
        pictures: Range<usize>,
        watch: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Drawn>>, Fault> {
        let adapted = self.adapted(input.weights, input.weights_sha256)?;
        let (spec, models) = (input.spec, &adapted.models);
        let how = drawing(spec, self.how(spec.steps as usize));
        how.check(models).map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
        let (prompts, batch): (Vec<&str>, Vec<Picture>) = spec
            .pictures()
            .skip(pictures.start)
            .take(pictures.len())
            .map(|(prompt, seed)| (prompt, picture_of(spec, prompt, seed, &adapted.product)))
            .unzip();
        let observe = &mut |step, n_steps| match watch(step as u64, n_steps as u64) {
            Flow::Continue => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        };
        let Some(drawn) = sample::draw(models, &batch, &how, observe).map_err(fault)? else {
            return Ok(None);
        };
        let files = prompts.iter().zip(&batch).zip(drawn);
        let encode = |((prompt, picture), pixels): ((&&str, &Picture), Vec<u8>)| {
            self.encoded(prompt, picture, &how, &pixels, spec.format)
        };
        files.map(encode).collect::<Result<_, _>>().map(Some)
    }

    fn probe(&mut self) -> Result<(), Fault> {
        let computed = (|| {
            let numbers = Tensor::arange(0f32, 64.0, &self.base.device)?;
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
    fn bundle(&self) -> &str {
        &self.hash
    }

    fn class_images(&self, spec: &TrainSpec) -> ClassImages {
        let how = self.how(training::CLASS_IMAGE_STEPS);
        let decides = json!({
            "bundle": self.hash, "prompt": recipe::templates(spec).of_class(&spec.class_name), "negative": "",
            "sampler": how.sampler.name(), "steps": how.steps, "guidance": how.guidance,
            "width": how.width, "height": how.height,
        });
        let settings = hex(&Sha256::digest(decides.to_string()));
        // Seeds of no training's own, so that the next one finds these pictures drawn.
        let n = if spec.options.loss_weights.prior > 0.0 { spec.options.class_images } else { 0 };
        ClassImages { settings, seeds: (0..u64::from(n)).collect() }
    }

    fn train(&mut self, input: TrainInput<'_>, watch: &mut Watch<'_>) -> Result<Ending, Fault> {
        training::train(self, input, watch)
    }
}

/// What a sample asks for, on top of what the bundle does by itself.
fn drawing(spec: &SampleSpec, own: sample::Settings) -> sample::Settings {
    let side = |asked: Option<u32>, own: usize| asked.map_or(own, |side| side as usize);
    sample::Settings {
        sampler: spec.scheduler.map_or(own.sampler, |scheduler| match scheduler {
            Scheduler::Ddim => Sampler::Ddim,
            Scheduler::Pndm => Sampler::Pndm,
            Scheduler::Dpmpp2m => Sampler::Dpmpp2m,
            Scheduler::Dpmpp2mKarras => Sampler::Dpmpp2mKarras,
            Scheduler::Euler => Sampler::Euler,
            Scheduler::EulerA => Sampler::EulerAncestral,
        }),
        steps: spec.steps as usize,
        guidance: spec.guidance.unwrap_or(own.guidance),
        width: side(spec.width, own.width),
        height: side(spec.height, own.height),
    }
}

fn picture_of(spec: &SampleSpec, prompt: &str, seed: u64, product: &Product) -> Picture {
    Picture { prompt: named(prompt, product), negative: named(&spec.negative_prompt, product), seed }
}

/// A prompt with the product's words in its place.
pub(super) fn named(prompt: &str, product: &Product) -> String {
    prompt.replace(PRODUCT, &product.words())
}

/// What a failure of the core is to a job, where nothing nearer is known.
pub(super) fn fault(error: Error) -> Fault {
    let words = error.to_string();
    match error {
        Error::Diverged(_) => Fault::new(FaultCode::Diverged, words),
        Error::Tensor(_) if says(&words, &OUT_OF_MEMORY) => Fault::new(FaultCode::Machine, words),
        Error::Tensor(_) if says(&words, &OF_THE_DRIVER) => Fault::device_lost(words),
        Error::Bad(_) | Error::Tensor(_) => Fault::new(FaultCode::Internal, words),
    }
}

/// Errors of the driver and its libraries come through candle as text only. Out of memory, a device is as good as
/// before; after any other it may answer everything with the same error until the process ends.
const OUT_OF_MEMORY: [&str; 3] = ["out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED"];
const OF_THE_DRIVER: [&str; 7] = [
    "CUDA_ERROR",
    "DriverError",
    "CublasError",
    "CUBLAS_STATUS",
    "CudnnError",
    "CUDNN_STATUS",
    "CurandError",
];

fn says(words: &str, signs: &[&str]) -> bool {
    signs.iter().any(|sign| words.contains(sign))
}

/// An error's words, with what a file is in place of where it lies: clients and logs hear no paths.
pub(super) fn without_path(error: &Error, file: &Path, what: &str) -> String {
    error.to_string().replace(&file.display().to_string(), what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_memory_is_kept_and_one_that_fails_otherwise_is_not() {
        let of = |words: &str| {
            let fault = fault(Error::from(candle_core::Error::Msg(words.into())));
            (fault.code, fault.device_lost)
        };
        let memory = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        assert_eq!(of(memory), (FaultCode::Machine, false));
        assert_eq!(of("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"), (FaultCode::Machine, false));
        let sticky = "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")";
        assert_eq!(of(sticky), (FaultCode::Machine, true));
        assert_eq!(of("CublasError(CUBLAS_STATUS_EXECUTION_FAILED)"), (FaultCode::Machine, true));
        assert_eq!(of("CudnnError(CUDNN_STATUS_INTERNAL_ERROR)"), (FaultCode::Machine, true));
        assert_eq!(of("shape mismatch in add"), (FaultCode::Internal, false));
    }
}
