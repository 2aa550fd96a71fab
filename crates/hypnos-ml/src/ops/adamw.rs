//! AdamW over many tensors: one pass over memory, gradients clipped to a total norm on the way.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::blockwise::{BLOCK, Blocks, SIGNED, UNSIGNED, encode};
use super::cpu::{View, sum, zeros};
use crate::param::Param;

/// How AdamW's two moments of a weight are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MomentFormat {
    /// In f32: 8 bytes for each weight.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// In 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861): 2.03 bytes for each weight. Weights of
    /// fewer than 4,096 elements keep f32, as in bitsandbytes.
    #[serde(rename = "8bit")]
    Bits8,
}

/// Weights of fewer elements keep their moments in f32.
const ELEMENTS_MIN: usize = 4096;

impl MomentFormat {
    /// Whether it is the default.
    pub fn is_f32(&self) -> bool {
        *self == Self::F32
    }

    /// Bytes of both moments of a weight with so many elements.
    pub fn bytes(self, n_elements: usize) -> u64 {
        if is_in_8_bits(self, n_elements) {
            2 * (n_elements + 4 * n_elements.div_ceil(BLOCK)) as u64
        } else {
            8 * n_elements as u64
        }
    }
}

/// Settings of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), with PyTorch's defaults where they are sound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest total norm of the gradients; larger ones are scaled down together. `None`: no clipping.
    pub max_norm: Option<f64>,
    /// How the moments are kept.
    pub moments: MomentFormat,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 2e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 1e-2,
            max_norm: Some(1.0),
            moments: MomentFormat::F32,
        }
    }
}

/// The optimiser: its parameters and their moments.
pub struct AdamW {
    /// May be changed between steps.
    pub(crate) config: AdamWConfig,
    params: Vec<(Param, Moments)>,
    n_steps: u64,
}

/// First and second moment of one weight, where the weight lies.
enum Moments {
    Cpu {
        m: Vec<f32>,
        v: Vec<f32>,
    },
    Cpu8 {
        m: Blocks,
        v: Blocks,
    },
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::Moments),
}

impl AdamW {
    /// Takes the trained ones of `params`; frozen ones are passed over. Moments begin at zero.
    pub fn new(params: impl IntoIterator<Item = Param>, config: AdamWConfig) -> Result<Self> {
        let params = params.into_iter().filter(Param::is_trainable);
        let moments = |param: &Param| Moments::new(param, config.moments);
        let params = params.map(|param| Ok((param.clone(), moments(&param)?))).collect::<Result<_>>()?;
        Ok(Self { config, params, n_steps: 0 })
    }

    /// Steps taken so far.
    pub fn n_steps(&self) -> u64 {
        self.n_steps
    }

    /// Updates every weight with the gradient in its slot, and empties the slots.
    ///
    /// Gives the total norm of the gradients before clipping. Errors, changing nothing, if a weight has no gradient
    /// (its graph was cut somewhere) or the norm is not finite.
    pub fn step(&mut self) -> Result<f64> {
        let norm = self.grad_norm()?;
        self.step_clipped(norm)?;
        Ok(norm)
    }

    /// [`AdamW::step`] for a caller who has asked for [`AdamW::grad_norm`] already: that is a pass over all gradients.
    pub(crate) fn step_clipped(&mut self, norm: f64) -> Result<()> {
        if !norm.is_finite() {
            bail!("AdamW: the norm of the gradients is {norm}");
        }
        self.n_steps += 1;
        let clip = self.config.max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let update = Update::new(&self.config, self.n_steps, clip);
        #[cfg(feature = "cuda")]
        let mut on_gpu = Vec::new();
        for (param, moments) in &mut self.params {
            let Some(grad) = param.take_grad() else { bail!("AdamW: {} lost its gradient", param.name()) };
            let value = param.value();
            match moments {
                Moments::Cpu { m, v } => {
                    value.inplace_op2(&grad, &CpuStep { moments: Mutex::new((m, v)), update: &update })?;
                }
                Moments::Cpu8 { m, v } => {
                    value.inplace_op2(&grad, &CpuStep8 { moments: Mutex::new((m, v)), update: &update })?;
                }
                #[cfg(feature = "cuda")]
                Moments::Cuda(moments) => {
                    let narrow = param.narrow();
                    on_gpu.push(super::cuda::Slot { value, narrow, grad, moments });
                    continue;
                }
            }
            param.value_changed();
        }
        #[cfg(feature = "cuda")]
        super::cuda::adamw(&mut on_gpu, &update)?;
        Ok(())
    }

    /// Euclidean norm of all gradients together.
    pub(crate) fn grad_norm(&self) -> Result<f64> {
        let mut total = 0.0;
        #[cfg(feature = "cuda")]
        let mut on_gpu = Vec::new();
        for (param, _) in &self.params {
            let Some(grad) = param.grad() else { bail!("AdamW: {} got no gradient", param.name()) };
            match grad.device() {
                Device::Cpu => total += square_sum(&grad)?,
                #[cfg(feature = "cuda")]
                Device::Cuda(_) => on_gpu.push(grad),
                other => bail!("AdamW: no kernel for {other:?}"),
            }
        }
        #[cfg(feature = "cuda")]
        {
            total += super::cuda::square_sum(&on_gpu)?;
        }
        Ok(total.sqrt())
    }

    /// First and second moment of the weight called `name`, each of its shape, f32, on the CPU.
    pub fn moments(&self, name: &str) -> Result<(Tensor, Tensor)> {
        match self.params.iter().find(|(param, _)| param.name() == name) {
            Some((param, moments)) => moments.tensors(param),
            None => bail!("AdamW: does not train {name}"),
        }
    }

    /// Puts saved moments back, as [`AdamW::moments`] gave them, after `n_steps` steps; `saved` is asked for each
    /// weight by its name. Errors, changing nothing, if one does not come or is of another shape.
    pub fn restore(
        &mut self,
        n_steps: u64,
        mut saved: impl FnMut(&str) -> Result<(Tensor, Tensor)>,
    ) -> Result<()> {
        let restored = self.params.iter().map(|(param, _)| {
            let (m, v) = saved(param.name())?;
            for moment in [&m, &v] {
                if moment.dims() != param.dims() {
                    bail!("moments of {}: wanted {:?}, got {:?}", param.name(), param.dims(), moment.dims());
                }
            }
            Moments::from_tensors(param, &m, &v, self.config.moments)
        });
        let restored = restored.collect::<Result<Vec<_>>>()?;
        self.params.iter_mut().zip(restored).for_each(|((_, moments), new)| *moments = new);
        self.n_steps = n_steps;
        Ok(())
    }
}

impl Moments {
    fn new(param: &Param, format: MomentFormat) -> Result<Self> {
        let n = param.value().elem_count();
        let in_8_bits = is_in_8_bits(format, n);
        match param.device() {
            Device::Cpu if in_8_bits => {
                Ok(Self::Cpu8 { m: Blocks::zeros(n, &SIGNED), v: Blocks::zeros(n, &UNSIGNED) })
            }
            Device::Cpu => Ok(Self::Cpu { m: zeros(n), v: zeros(n) }),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(super::cuda::Moments::zeros(&device, n, in_8_bits)?)),
            other => bail!("AdamW: no kernel for {other:?}"),
        }
    }

    fn from_tensors(param: &Param, m: &Tensor, v: &Tensor, format: MomentFormat) -> Result<Self> {
        let in_8_bits = is_in_8_bits(format, param.value().elem_count());
        let flat =
            |tensor: &Tensor| tensor.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>();
        match param.device() {
            Device::Cpu if in_8_bits => {
                Ok(Self::Cpu8 { m: Blocks::of(&flat(m)?, &SIGNED), v: Blocks::of(&flat(v)?, &UNSIGNED) })
            }
            Device::Cpu => Ok(Self::Cpu { m: flat(m)?, v: flat(v)? }),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                Ok(Self::Cuda(super::cuda::Moments::upload(&device, &flat(m)?, &flat(v)?, in_8_bits)?))
            }
            other => bail!("AdamW: no kernel for {other:?}"),
        }
    }

    fn tensors(&self, param: &Param) -> Result<(Tensor, Tensor)> {
        let (dims, cpu) = (param.dims(), Device::Cpu);
        match self {
            Self::Cpu { m, v } => {
                Ok((Tensor::from_slice(m, dims.clone(), &cpu)?, Tensor::from_slice(v, dims, &cpu)?))
            }
            Self::Cpu8 { m, v } => Ok((
                Tensor::from_vec(m.to_f32(), dims.clone(), &cpu)?,
                Tensor::from_vec(v.to_f32(), dims, &cpu)?,
            )),
            #[cfg(feature = "cuda")]
            Self::Cuda(moments) => {
                let (m, v) = moments.download()?;
                Ok((Tensor::from_vec(m, dims.clone(), &cpu)?, Tensor::from_vec(v, dims, &cpu)?))
            }
        }
    }
}

fn is_in_8_bits(format: MomentFormat, n_elements: usize) -> bool {
    format == MomentFormat::Bits8 && n_elements >= ELEMENTS_MIN
}

/// The numbers of one step, worked out once in f64.
pub(super) struct Update {
    /// Factor on the gradient that clips it.
    pub(crate) clip: f32,
    pub beta1: f32,
    pub beta2: f32,
    /// `lr / (1 - beta1^t)`
    pub(crate) rate: f32,
    /// `1 / sqrt(1 - beta2^t)`
    pub(crate) correction: f32,
    pub eps: f32,
    /// `1 - lr * weight_decay`
    pub(crate) keep: f32,
}

impl Update {
    fn new(config: &AdamWConfig, step: u64, clip: f64) -> Self {
        let AdamWConfig { lr, beta1, beta2, eps, weight_decay, .. } = *config;
        let t = step as f64;
        Self {
            clip: clip as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            rate: (lr / (1.0 - beta1.powf(t))) as f32,
            correction: (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
            eps: eps as f32,
            keep: (1.0 - lr * weight_decay) as f32,
        }
    }

    #[inline]
    fn apply(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = g * self.clip;
        *m += (1.0 - self.beta1) * (g - *m);
        *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
        *p = *p * self.keep - self.rate * *m / (v.sqrt() * self.correction + self.eps);
    }
}

struct CpuStep<'a> {
    moments: Mutex<(&'a mut [f32], &'a mut [f32])>,
    update: &'a Update,
}

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 15;

impl InplaceOp2 for CpuStep<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, p_l: &Layout, g: &CpuStorage, g_l: &Layout) -> Result<()> {
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let (m, v) = &mut *moments;
        let (p, g) = slices((p, p_l), (g, g_l), m.len())?;
        let chunks = p.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
        chunks.zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK)).for_each(|(((p, g), m), v)| {
            for i in 0..p.len() {
                self.update.apply(&mut p[i], g[i], &mut m[i], &mut v[i]);
            }
        });
        Ok(())
    }
}

struct CpuStep8<'a> {
    moments: Mutex<(&'a mut Blocks, &'a mut Blocks)>,
    update: &'a Update,
}

impl InplaceOp2 for CpuStep8<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, p_l: &Layout, g: &CpuStorage, g_l: &Layout) -> Result<()> {
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let (m, v) = &mut *moments;
        let (p, g) = slices((p, p_l), (g, g_l), m.codes.len())?;
        let weights = p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK));
        let first = m.codes.par_chunks_mut(BLOCK).zip(&mut m.scales);
        let second = v.codes.par_chunks_mut(BLOCK).zip(&mut v.scales);
        weights.zip(first).zip(second).with_min_len(CHUNK / BLOCK).for_each(|(((p, g), first), second)| {
            self.update.apply_to_block(p, g, first, second);
        });
        Ok(())
    }
}

impl Update {
    /// [`Update::apply`] to the weights of a block, whose moments are codes and a scale. The step is that of the new
    /// moments before they are rounded.
    fn apply_to_block(
        &self,
        p: &mut [f32],
        g: &[f32],
        first: (&mut [u8], &mut f32),
        second: (&mut [u8], &mut f32),
    ) {
        let ((m_codes, m_scale), (v_codes, v_scale)) = (first, second);
        let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
        for i in 0..p.len() {
            m[i] = SIGNED[usize::from(m_codes[i])] * *m_scale;
            v[i] = UNSIGNED[usize::from(v_codes[i])] * *v_scale;
            self.apply(&mut p[i], g[i], &mut m[i], &mut v[i]);
        }
        *m_scale = encode(&m[..p.len()], m_codes, &SIGNED);
        *v_scale = encode(&v[..p.len()], v_codes, &UNSIGNED);
    }
}

/// The elements of a weight and of its gradient, as many as there are moments.
fn slices<'a>(
    (p, p_l): (&'a mut CpuStorage, &Layout),
    (g, g_l): (&'a CpuStorage, &Layout),
    n_moments: usize,
) -> Result<(&'a mut [f32], &'a [f32])> {
    let (CpuStorage::F32(p), CpuStorage::F32(g)) = (p, g) else { bail!("AdamW: wanted f32 on the CPU") };
    let (Some((p_from, p_to)), Some((g_from, g_to))) = (p_l.contiguous_offsets(), g_l.contiguous_offsets())
    else {
        bail!("AdamW: wanted contiguous tensors");
    };
    let (p, g) = (&mut p[p_from..p_to], &g[g_from..g_to]);
    if p.len() != g.len() || p.len() != n_moments {
        bail!("AdamW: {} weights, {} gradients, {n_moments} moments", p.len(), g.len());
    }
    Ok((p, g))
}

/// Sum of squares, in f64 across blocks.
fn square_sum(x: &Tensor) -> Result<f64> {
    let x = View::of(x, "AdamW")?;
    // Chunk by chunk in order, so that the sum does not depend on how threads are scheduled.
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(|part| sum(part, |v| v * v)).collect();
    Ok(parts.iter().sum())
}
