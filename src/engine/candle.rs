//! The engine on candle: one bundle on one device, and the products that were trained from it.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
    fn draw(
        &mut self,
        input: &DrawInput<'_>,
        watch: &mut dyn FnMut(u64, u64) -> Flow,
    ) -> Result<Option<Vec<Drawn>>, Fault> {
        let adapted = self.adapted(input.weights, input.weights_sha256)?;
        let (spec, models) = (input.spec, &adapted.models);
        let how = drawing(spec, self.how(spec.steps as usize));
        how.check(models).map_err(|error| Fault::new(FaultCode::Input, error.to_string()))?;
        let (prompts, pictures): (Vec<&str>, Vec<Picture>) = spec
            .pictures()
            .map(|(prompt, seed)| (prompt, picture_of(spec, prompt, seed, &adapted.product)))
            .unzip();
        let n_batches = pictures.len().div_ceil(self.settings.batch);
        let mut drawn = Vec::with_capacity(pictures.len());
        for (i, batch) in pictures.chunks(self.settings.batch).enumerate() {
            let observe =
                &mut |step, n_steps| match watch((i * n_steps + step) as u64, (n_batches * n_steps) as u64) {
                    Flow::Continue => ControlFlow::Continue(()),
                    _ => ControlFlow::Break(()),
                };
            let Some(pixels) = sample::draw(models, batch, &how, observe).map_err(fault)? else {
                return Ok(None);
            };
            for (picture, pixels) in batch.iter().zip(pixels) {
                let prompt = prompts[drawn.len()];
                drawn.push(self.encoded(prompt, picture, &how, &pixels, spec.format)?);
            }
        }
        Ok(Some(drawn))
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
    let code = match error {
        Error::Diverged(_) => FaultCode::Diverged,
        Error::Tensor(_) if is_of_the_device(&words) => FaultCode::Machine,
        Error::Bad(_) | Error::Tensor(_) => FaultCode::Internal,
    };
    Fault::new(code, words)
}

/// The driver's own errors come through candle as text only.
fn is_of_the_device(words: &str) -> bool {
    ["out of memory", "OUT_OF_MEMORY", "CUDA_ERROR", "DriverError"].iter().any(|sign| words.contains(sign))
}

/// An error's words, with what a file is in place of where it lies: clients and logs hear no paths.
pub(super) fn without_path(error: &Error, file: &Path, what: &str) -> String {
    error.to_string().replace(&file.display().to_string(), what)
}
