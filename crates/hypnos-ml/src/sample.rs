//! Generates pictures: prompts and weights to pixels.
//!
//! A picture's noise comes from its own seed alone, so the same picture comes out alone or in a batch (up to the
//! rounding of sums, which a matrix product orders by its size).

use std::ops::Deref;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::bundle::Bundle;
use super::diffusion::Schedule;
use super::models::{clip::ClipText, unet::Unet, vae::Vae};
use super::precision::Precision;
use super::random;
use super::samplers::{self, Observe, Sampler};
use super::tokenizer::Tokenizer;
use super::{Error, Interrupt, Result};

/// What training leaves alone: one for a bundle and all that was trained from it. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Words to ids.
    pub tokenizer: Arc<Tokenizer>,
    /// Latents to pixels.
    pub vae: Arc<Vae>,
    /// How noise is laid over latents.
    pub schedule: Arc<Schedule>,
    /// Where the weights lie.
    pub device: Device,
    /// What the models compute in.
    pub precision: Precision,
}

impl Shared {
    /// Loads the models of a bundle that fine-tuning leaves as they are, to compute in `precision`, which the device must
    /// support.
    pub fn load(bundle: &Bundle, device: &Device, precision: Precision) -> Result<Self> {
        Ok(Self {
            tokenizer: Arc::new(bundle.tokenizer()?),
            vae: Arc::new(bundle.vae(device, precision, false)?.model),
            schedule: Arc::new(bundle.schedule().clone()),
            device: device.clone(),
            precision,
        })
    }

    /// With the frozen text encoder and UNet of the same bundle.
    pub fn with_bundle(&self, bundle: &Bundle) -> Result<Models> {
        let text = bundle.text_encoder(&self.device, self.precision, false)?;
        let unet = bundle.unet(&self.device, self.precision, false)?;
        Ok(self.with(text.model, unet.model))
    }

    /// With a text encoder and a UNet, frozen ones of the same bundle's shapes.
    pub(crate) fn with(&self, text: ClipText, unet: Unet) -> Models {
        Models { shared: self.clone(), text, unet }
    }
}

/// Everything that draws, on one device.
#[derive(Debug)]
pub struct Models {
    /// What it has in common with others.
    pub shared: Shared,
    /// Ids to hidden states.
    pub text: ClipText,
    /// Noisy latents to noise.
    pub unet: Unet,
}

impl Models {
    /// Loads the frozen models of a bundle, to compute in `precision`, which the device must support.
    pub fn load(bundle: &Bundle, device: &Device, precision: Precision) -> Result<Self> {
        Shared::load(bundle, device, precision)?.with_bundle(bundle)
    }
}

impl Deref for Models {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

/// One picture to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageRequest {
    /// What it shows.
    pub prompt: String,
    /// What it must not show; empty for nothing in particular.
    pub negative: String,
    /// Where its noise comes from.
    pub seed: u64,
}

/// How pictures are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleSettings {
    /// The way from noise to latents.
    pub sampler: Sampler,
    /// Calls of the UNet, about.
    pub steps: usize,
    /// Weight of the prompt against the negative prompt (Ho and Salimans 2022, arXiv 2207.12598). At 1 or below the
    /// negative prompt is not looked at and each step costs half.
    pub guidance: f64,
    /// Pixels, a multiple of the autoencoder's factor.
    pub width: usize,
    /// Pixels, a multiple of the autoencoder's factor.
    pub height: usize,
}

impl SampleSettings {
    /// Refuses what cannot be drawn, naming the setting.
    pub fn check(&self, shared: &Shared) -> Result<()> {
        let factor = shared.vae.factor();
        for (name, size) in [("width", self.width), ("height", self.height)] {
            if size == 0 || size % factor != 0 {
                let what = format!("wanted a multiple of {factor} above zero, got {size}");
                return Err(Error::setting(name, what));
            }
        }
        let most = shared.schedule.n_timesteps();
        if self.steps == 0 || self.steps > most {
            return Err(Error::setting("steps", format!("wanted 1 to {most}, got {}", self.steps)));
        }
        if !self.guidance.is_finite() || self.guidance < 0.0 {
            let what = format!("wanted a number from 0 on, got {}", self.guidance);
            return Err(Error::setting("guidance", what));
        }
        Ok(())
    }

    /// Shape of the latents of one picture: `[c, h, w]`.
    pub fn latent_dims(&self, models: &Models) -> [usize; 3] {
        let factor = models.vae.factor();
        [models.unet.in_channels(), self.height / factor, self.width / factor]
    }
}

/// Unit normal noise `[B, c, h, w]` that the pictures begin with, on the CPU: each from its own seed.
pub fn initial_noise(pictures: &[ImageRequest], dims: [usize; 3]) -> Result<Tensor> {
    noise(pictures, "initial", 0, dims)
}

fn noise(pictures: &[ImageRequest], label: &str, stream: u64, [c, h, w]: [usize; 3]) -> Result<Tensor> {
    let values: Vec<f32> = pictures
        .iter()
        .flat_map(|picture| random::normal(random::derive(picture.seed, label), stream, c * h * w))
        .collect();
    Ok(Tensor::from_vec(values, (pictures.len(), c, h, w), &Device::Cpu)?)
}

/// Draws latents for `pictures` from `noise` `[B, c, h, w]`, unit normal.
///
/// Negative prompts and prompts go through the UNet as one batch. `observe` gets each step (done, all) and may
/// stop. Gives `[B, c, h, w]` in the UNet's scale.
pub fn latents<B>(
    models: &Models,
    pictures: &[ImageRequest],
    settings: &SampleSettings,
    noise: &Tensor,
    observe: &mut Observe<'_, B>,
) -> Result<Tensor, Interrupt<B>> {
    settings.check(models)?;
    let dims = settings.latent_dims(models);
    let wanted = [pictures.len(), dims[0], dims[1], dims[2]];
    if noise.dims() != wanted {
        return Err(Error::input(format!("latents: wanted {wanted:?}, got {:?}", noise.dims())).into());
    }
    let guided = settings.guidance > 1.0;
    let words = pictures.iter().map(|picture| &picture.prompt);
    let ids: Vec<Vec<u32>> = if guided {
        let negative = pictures.iter().map(|picture| &picture.negative);
        negative.chain(words).map(|text| models.tokenizer.encode(text)).collect()
    } else {
        words.map(|text| models.tokenizer.encode(text)).collect()
    };
    let text = models.text.forward(&ids)?.detach(); // [2 B, L, D]
    let n_rows = ids.len();
    let mut predict = |x: &Tensor, t: f64| {
        if !guided {
            return Ok(models.unet.forward(x, &vec![t; n_rows], &text)?.detach());
        }
        let both = models.unet.forward(&Tensor::cat(&[x, x], 0)?, &vec![t; n_rows], &text)?.detach();
        let parts = both.chunk(2, 0)?;
        let (without, with) = (&parts[0], &parts[1]);
        without + ((with - without)? * settings.guidance)?
    };
    let mut step_noise = |step: usize| {
        let drawn = self::noise(pictures, "step", step as u64, dims);
        drawn.map_err(candle_core::Error::wrap)?.to_device(&models.device)
    };
    let noise = noise.to_device(&models.device)?.to_dtype(DType::F32)?;
    samplers::sample(
        settings.sampler,
        &models.schedule,
        settings.steps,
        &noise,
        &mut predict,
        &mut step_noise,
        observe,
    )
}

/// Draws `pictures` from their seeds' noise, as one batch, to interleaved RGB pixels: one buffer of
/// `height x width x 3` bytes each.
///
/// `observe` is called after each step and each decoded picture, and may stop.
pub fn draw<B>(
    models: &Models,
    pictures: &[ImageRequest],
    settings: &SampleSettings,
    observe: &mut Observe<'_, B>,
) -> Result<Vec<Vec<u8>>, Interrupt<B>> {
    settings.check(models)?;
    let noise = initial_noise(pictures, settings.latent_dims(models))?;
    let mut last = (0, 0);
    let observe_step = &mut |step, n_steps| {
        last = (step, n_steps);
        observe(step, n_steps)
    };
    let latents = latents(models, pictures, settings, &noise, observe_step)?;
    let mut drawn = Vec::with_capacity(pictures.len());
    for i in 0..pictures.len() {
        drawn.extend(decode(models, &latents.narrow(0, i, 1)?)?);
        observe(last.0, last.1)?;
    }
    Ok(drawn)
}

/// Turns latents `[B, c, h, w]` into pictures, one after the other to bound memory: interleaved RGB pixels, one buffer
/// of `height x width x 3` bytes each.
pub fn decode(models: &Models, latents: &Tensor) -> Result<Vec<Vec<u8>>> {
    (0..latents.dim(0)?).map(|i| pixels(&models.vae.decode(&latents.narrow(0, i, 1)?)?)).collect()
}

/// A signed picture `[1, 3, H, W]` to pixels, as the reference rounds them: `round((x / 2 + 1/2) * 255)`.
fn pixels(picture: &Tensor) -> Result<Vec<u8>> {
    let unit = ((picture.detach().to_dtype(DType::F32)? * 0.5)? + 0.5)?.clamp(0.0, 1.0)?;
    let interleaved =
        (unit.squeeze(0)?.permute((1, 2, 0))?.contiguous()? * 255.0)?.to_device(&Device::Cpu)?;
    let values = interleaved.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|value| !value.is_finite()) {
        let what = "sample: the picture is not finite; the weights or the latents are broken";
        return Err(Error::NotFinite(what.into()));
    }
    Ok(values.into_iter().map(|value| value.round_ties_even() as u8).collect())
}
