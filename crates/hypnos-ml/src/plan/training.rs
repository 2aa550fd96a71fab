//! The plan of a training: memory in each of its phases, files, arithmetic.

use serde::Serialize;

use super::dry::{self, Counted, Step};
use super::meta::{self, MetaModels};
use super::needs::{KEPT_IN_TRAINING, LIBRARIES, Needs, PROGRAM, Peak, Phase, Place};
use super::{Arithmetic, SamplePlan, SampleSizes};
use crate::bundle::{Bundle, Capability};
use crate::device::DeviceKind;
use crate::models::tracer;
use crate::ops::MomentFormat;
use crate::precision::Precision;
use crate::train::Learner;
use crate::{Result, perceptual};

/// Bytes of a pixel of a photo that is looked at as numbers: the photo in f32, its mask, and what finds parts in it.
const NUMBERS_OF_A_PIXEL: u64 = 24;

/// What the metrics' networks work with. Assumption: their largest values are those of Inception's first layers and of
/// LPIPS's, a few of 5 to 20 MB for a picture of 512 pixels; counted layer by layer they would not change any peak, for a
/// step of the UNet takes far more.
const METRICS_WORKSPACE_BYTES: u64 = 64 << 20;

/// What decides the size of a training, beside its bundle.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingSizes {
    /// What is trained.
    pub learner: Learner,
    /// How AdamW's moments are kept.
    pub adamw_moments: MomentFormat,
    /// Steps.
    pub n_steps: u64,
    /// Photos of the product.
    pub n_photos: usize,
    /// Pixels of each.
    pub photo_pixels: u64,
    /// Class images, of which each step takes one; 0 trains on the product alone.
    pub n_class_images: usize,
    /// Views; none learns from the photos as they are.
    pub n_views: Option<usize>,
    /// The perceptual loss, where it counts.
    pub perceptual: Option<PerceptualSizes>,
    /// Steps of the discriminator before the first one of the training and latents in each, real and fake together,
    /// where one takes part.
    pub discriminator: Option<(u64, usize)>,
    /// What is drawn and scored; none draws nothing.
    pub evaluation: Option<EvaluationSizes>,
    /// Previews on the way.
    pub n_previews: usize,
    /// Sampler steps of a class image.
    pub class_image_steps: usize,
    /// Class images drawn at once.
    pub class_image_batch: usize,
    /// Whether blocks are computed again in the backward.
    pub checkpointing: bool,
    /// What the models compute in.
    pub precision: Precision,
}

/// The perceptual loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerceptualSizes {
    /// The last step at which it counts.
    pub until_step: u64,
    /// Side, in latents, of what it looks at, where that is not all.
    pub crop: Option<usize>,
}

/// What is drawn and scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvaluationSizes {
    /// Pictures of the result.
    pub n_images: usize,
    /// Pictures of the class beside them.
    pub n_class_images: usize,
    /// Pictures of the result drawn at once.
    pub batch: usize,
    /// Sampler steps of each.
    pub steps: usize,
    /// Steps after which pictures are scored.
    pub trials: Vec<u64>,
    /// Pictures scored each time.
    pub n_trial_images: usize,
    /// Of these drawn at once.
    pub trial_batch: usize,
}

/// Bytes of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// The weights of the result.
    pub weights: u64,
    /// A checkpoint, when it is largest.
    pub checkpoint: u64,
    /// The best step's weights, in the scratch directory until the end.
    pub best: u64,
    /// Class images, as PNG: what they take at most.
    pub class_images: u64,
}

impl Disk {
    /// Bytes of all of them.
    pub fn total(&self) -> u64 {
        self.weights + self.checkpoint + self.best + self.class_images
    }
}

/// Arithmetic of what a training does, once each, and of all of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Work {
    /// A step, with the perceptual loss where it counts.
    pub step: Arithmetic,
    /// A step without it.
    pub plain_step: Arithmetic,
    /// A class image.
    pub class_image: Arithmetic,
    /// Everything: views, class images, steps, trials, pictures of the result. Networks of metrics aside.
    pub total: Arithmetic,
}

/// The plan of a training.
#[derive(Clone, Debug, Serialize)]
pub struct TrainingPlan {
    /// Memory, without other products' models.
    pub needs: Needs,
    /// Bytes of the text encoder and the UNet: what a product's model takes that is drawn meanwhile.
    pub fine_tuned: u64,
    /// Files.
    pub disk: Disk,
    /// Arithmetic.
    pub work: Work,
}

impl TrainingPlan {
    /// Counts. [`crate::Error::File`] where a config or a header of the bundle cannot be read.
    pub fn new(bundle: &Bundle, sizes: &TrainingSizes, device: DeviceKind) -> Result<Self> {
        let counts = Counts::of(bundle, sizes, device)?;
        let (needs, fine_tuned) = (counts.needs(sizes), counts.drawing);
        Ok(Self { needs, fine_tuned, disk: counts.disk(sizes), work: counts.work(sizes) })
    }

    /// The most memory at once on the device: on a CPU all of it.
    pub fn peak(&self, device: DeviceKind) -> Peak {
        self.needs.peak(device.place())
    }
}

/// All that the plan is put together from.
struct Counts {
    side: usize,
    /// Weights of the bundle's models.
    drawing: u64,
    vae: u64,
    /// Weights that learn, in f32.
    trainable: u64,
    /// Their moments.
    moments: u64,
    /// The copy of them in bf16.
    rounded: u64,
    segmenter: u64,
    perceptual: u64,
    metrics: u64,
    discriminator: u64,
    latents: u64,
    device: DeviceKind,
    segmenting: Counted,
    encoding: Counted,
    class_images: SamplePlan,
    trial: Option<SamplePlan>,
    drawn: Option<SamplePlan>,
    discriminator_step: Counted,
    step: Counted,
    plain_step: Counted,
}

impl Counts {
    fn of(bundle: &Bundle, sizes: &TrainingSizes, device: DeviceKind) -> Result<Self> {
        let side = bundle.resolution();
        let (precision, learner) = (sizes.precision, sizes.learner);
        let frozen = MetaModels::frozen(bundle, precision)?;
        let models = MetaModels::training(bundle, precision, learner, sizes.checkpointing)?;
        let on_gpu = device == DeviceKind::Cuda;
        let edge = side / bundle.factor();
        let net = sizes.perceptual.and(bundle.perceptual_config()?);
        let (trained, bytes) = meta::discriminator(bundle.latent_channels(), edge, true)?;
        let (judge, _) = meta::discriminator(bundle.latent_channels(), edge, false)?;
        let discriminator = sizes.discriminator.map(|(_, n)| {
            // One guess of the diffusion model more in each step of the training.
            dry::discriminator_step(&trained, &frozen.latent_dims(n + 1, side, side), on_gpu)
        });
        let step = |net: Option<&perceptual::Config>| {
            let crop = sizes.perceptual.and_then(|one| one.crop).filter(|crop| *crop < edge);
            let step = Step {
                models: &models,
                b: 1 + usize::from(sizes.n_class_images > 0),
                side,
                perceptual: net.map(|net| (net, crop.unwrap_or(edge))),
                discriminator: sizes.discriminator.is_some().then_some(&judge),
            };
            step.count(on_gpu)
        };
        let sample = |batch: usize| {
            let sizes = SampleSizes { batch, width: side, height: side };
            SamplePlan::of(&frozen, &sizes, device)
        };
        let segmenter = bundle.segmenter_config()?.filter(|_| sizes.n_views.is_some());
        let evaluation = sizes.evaluation.as_ref();
        let judges = Capability::SCORES.into_iter().filter(|_| evaluation.is_some());
        let metrics = judges.map(|score| bundle.weight_bytes(score)).sum::<Result<u64>>()?;
        Ok(Self {
            side,
            drawing: frozen.drawing_bytes(),
            vae: frozen.vae_bytes(),
            trainable: match learner {
                Learner::Weights => models.drawing_bytes(),
                Learner::Embedding => 4 * models.text.model.width() as u64,
            },
            moments: match learner {
                Learner::Weights => models.moment_bytes(sizes.adamw_moments),
                Learner::Embedding => sizes.adamw_moments.bytes(models.text.model.width()),
            },
            rounded: if learner == Learner::Weights { frozen.rounded_bytes() } else { 0 },
            segmenter: if segmenter.is_some() { bundle.weight_bytes(Capability::Segmentation)? } else { 0 },
            perceptual: if net.is_some() { bundle.weight_bytes(Capability::PerceptualLoss)? } else { 0 },
            metrics,
            discriminator: if discriminator.is_some() { bytes } else { 0 },
            latents: 4 * frozen.latent_dims(1, side, side).iter().product::<usize>() as u64,
            device,
            segmenting: segmented(segmenter.as_ref(), on_gpu)?,
            encoding: dry::encoding(&frozen, side, on_gpu)?,
            class_images: sample(sizes.class_image_batch.min(sizes.n_class_images))?,
            trial: evaluation.map(|one| sample(one.trial_batch.min(one.n_trial_images))).transpose()?,
            drawn: evaluation.map(|one| sample(one.batch.min(one.n_images))).transpose()?,
            discriminator_step: discriminator.transpose()?.unwrap_or_default(),
            step: step(net.as_ref())?,
            plain_step: step(None)?,
        })
    }

    fn needs(&self, sizes: &TrainingSizes) -> Needs {
        use Phase::{ClassImages, Discriminating, Drawing, Evaluating, Refining, Training};
        use Place::{Device, Host};
        let (all, learning) = (&Phase::TRAINING, &[Discriminating, Training, Drawing, Evaluating]);
        let mut needs = Needs::default();
        needs.add("the program", Host, PROGRAM, all);
        // A training of all weights lets those go that it began with, but for the pictures of a first trial.
        let as_they_came: &[Phase] = match sizes.learner {
            Learner::Weights => &[Refining, ClassImages],
            Learner::Embedding => all,
        };
        needs.add("text encoder and UNet of the bundle", Device, self.drawing, as_they_came);
        needs.add("autoencoder", Device, self.vae, all);
        needs.add("photos", Host, photo_bytes(sizes), all);
        let [latents, pixels] = self.data(sizes);
        needs.add("latents of pictures", Device, latents, all);
        needs.add("views, as pixels", Host, pixels, all);
        if sizes.n_views.is_some() {
            needs.add("a photo, as numbers", Host, NUMBERS_OF_A_PIXEL * sizes.photo_pixels, &[Refining]);
        }
        needs.add("segmenter", Device, self.segmenter, &[Refining]);
        needs.add("perceptual network", Device, self.perceptual, learning);
        needs.add("weights that are trained", Device, self.trainable, learning);
        needs.add("AdamW's moments", Device, self.moments, learning);
        needs.add("discriminator with its moments", Device, 3 * self.discriminator, learning);
        needs.add("gradients", Device, self.trainable, &[Training]);
        let (scored, step) = self.largest_step(sizes);
        let judged: &[Phase] = if scored { &[Training, Drawing, Evaluating] } else { &[Drawing, Evaluating] };
        needs.add("metrics' networks", Device, self.metrics, judged);
        // They wait in a file.
        let is_copy = scored && sizes.learner == Learner::Weights;
        let computing: &[Phase] = if is_copy { &[Training] } else { &[Training, Drawing, Evaluating] };
        needs.add("weights that are trained, in bf16", Device, self.rounded, computing);
        needs.add(
            "the best step's weights",
            Device,
            if is_copy { self.drawing } else { 0 },
            &[Drawing, Evaluating],
        );
        if self.metrics > 0 {
            needs.add(
                "photos, for the metrics",
                Host,
                3 * sizes.n_photos as u64 * sizes.photo_pixels,
                judged,
            );
        }
        let class_images = if sizes.n_class_images > 0 { self.class_images.workspace_bytes } else { 0 };
        needs.add_each(
            "forward and backward",
            Device,
            [
                (Refining, self.segmenting.bytes.max(self.encoding.bytes.saturating_sub(self.segmenter))),
                (ClassImages, class_images.max(self.encoding.bytes)),
                (Discriminating, self.discriminator_step.bytes),
                (Training, step),
                (Drawing, self.drawn.as_ref().map_or(0, |drawn| drawn.workspace_bytes)),
                (Evaluating, if self.metrics > 0 { METRICS_WORKSPACE_BYTES } else { 0 }),
            ],
        );
        match self.device {
            DeviceKind::Cuda => needs.add("CUDA's libraries", Device, LIBRARIES, all),
            DeviceKind::Cpu => needs.add_kept(KEPT_IN_TRAINING),
        }
        needs
    }

    /// Whether the most is taken after pictures were scored, which leaves the metrics' networks in memory, and what is
    /// worked with then beside the gradients. The perceptual loss may have ended by then. The pictures themselves are
    /// drawn without gradients, the first ones by the bundle's own models.
    fn largest_step(&self, sizes: &TrainingSizes) -> (bool, u64) {
        let beside_gradients = |bytes: u64| bytes.saturating_sub(self.trainable);
        let first = sizes.evaluation.as_ref().filter(|_| self.metrics > 0);
        let Some(first) = first.and_then(|one| one.trials.iter().copied().min()) else {
            return (false, beside_gradients(self.step.bytes));
        };
        let after = match sizes.perceptual {
            _ if first >= sizes.n_steps => 0,
            Some(one) if one.until_step > first => self.step.bytes,
            _ => self.plain_step.bytes,
        };
        let untrained = if sizes.learner == Learner::Weights { self.drawing } else { 0 };
        // The copy in bf16, which is counted beside the weights, is not there while the untrained ones draw.
        let untrained = untrained.saturating_sub(self.rounded);
        let drawing = self.trial.as_ref().map_or(0, |trial| untrained + trial.workspace_bytes);
        let left = self.metrics + 3 * sizes.n_photos as u64 * sizes.photo_pixels;
        if after.max(drawing) + left >= self.step.bytes {
            (true, beside_gradients(after.max(drawing)))
        } else {
            (false, beside_gradients(self.step.bytes))
        }
    }

    /// Bytes of the latents' distributions, mean and variance of each picture, and of the pixels that are kept.
    fn data(&self, sizes: &TrainingSizes) -> [u64; 2] {
        let n_views = sizes.n_views.unwrap_or(sizes.n_photos);
        // With a discriminator, two spoiled pictures beside each view.
        let spoiled = if sizes.discriminator.is_some() && sizes.n_views.is_some() { 2 * n_views } else { 0 };
        let n = (n_views + spoiled + sizes.n_class_images) as u64;
        [2 * n * self.latents, (n_views * 3 * self.side * self.side) as u64]
    }

    fn disk(&self, sizes: &TrainingSizes) -> Disk {
        let evaluation = sizes.evaluation.as_ref().filter(|_| self.metrics > 0);
        let is_kept = evaluation.is_some_and(|one| one.trials.iter().any(|step| *step < sizes.n_steps));
        let best = if is_kept { self.trainable } else { 0 };
        Disk {
            weights: self.trainable,
            checkpoint: 3 * (self.trainable + self.discriminator) + best,
            best,
            class_images: (3 * sizes.n_class_images * self.side * self.side) as u64,
        }
    }

    fn work(&self, sizes: &TrainingSizes) -> Work {
        let image = |plan: &SamplePlan, steps: usize| {
            let n = plan.sizes.batch.max(1) as f64;
            plan.step.times(steps as f64 / n).plus(&plan.decoding)
        };
        let class_image = image(&self.class_images, sizes.class_image_steps);
        let n_perceptual = sizes.perceptual.map_or(0, |one| one.until_step.min(sizes.n_steps));
        let mut total = self.step.arithmetic.times(n_perceptual as f64);
        total = total.plus(&self.plain_step.arithmetic.times((sizes.n_steps - n_perceptual) as f64));
        let n_encoded =
            sizes.n_views.map_or(sizes.n_photos, |n| n * if sizes.discriminator.is_some() { 3 } else { 1 });
        total = total.plus(&self.encoding.arithmetic.times((n_encoded + sizes.n_class_images) as f64));
        total = total.plus(&self.segmenting.arithmetic.times(sizes.n_photos as f64));
        total = total.plus(&class_image.times(sizes.n_class_images as f64));
        let alone = sizes.discriminator.map_or(0, |(n_steps, _)| n_steps);
        total = total.plus(&self.discriminator_step.arithmetic.times((alone + sizes.n_steps) as f64));
        if let (Some(one), Some(trial), Some(drawn)) = (&sizes.evaluation, &self.trial, &self.drawn) {
            // The untrained model draws once too, to compare with.
            let n_trials = if self.metrics > 0 { one.trials.len() as f64 + 0.5 } else { 0.0 };
            let n_drawn = one.n_images + one.n_class_images + sizes.n_previews;
            total = total.plus(&image(trial, one.steps).times(n_trials * one.n_trial_images as f64));
            total = total.plus(&image(drawn, one.steps).times(n_drawn as f64));
        }
        Work { step: self.step.arithmetic, plain_step: self.plain_step.arithmetic, class_image, total }
    }
}

/// A photo through the segmenter, where there is one.
fn segmented(config: Option<&tracer::Config>, on_gpu: bool) -> Result<Counted> {
    config.map_or_else(|| Ok(Counted::default()), |config| dry::segmenting(config, on_gpu))
}

/// Photos as pixels, and as the PNG that they came as: at most as large.
fn photo_bytes(sizes: &TrainingSizes) -> u64 {
    2 * 3 * sizes.n_photos as u64 * sizes.photo_pixels
}
