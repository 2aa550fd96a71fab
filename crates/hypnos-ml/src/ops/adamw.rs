//! AdamW over many tensors: one pass over memory, gradients clipped to a total norm on the way.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{View, sum, zeros};
use crate::param::Param;

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
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { lr: 2e-6, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2, max_norm: Some(1.0) }
    }
}

/// The optimiser: its parameters and their moments.
pub struct AdamW {
    /// May be changed between steps.
    pub(crate) config: AdamWConfig,
    params: Vec<(Param, Moments)>,
    n_steps: u64,
}

/// First and second moment of one weight, f32, where the weight lies.
enum Moments {
    Cpu {
        m: Vec<f32>,
        v: Vec<f32>,
    },
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::Moments),
}

impl AdamW {
    /// Takes the trained ones of `params`; frozen ones are passed over. Moments begin at zero.
    pub fn new(params: impl IntoIterator<Item = Param>, config: AdamWConfig) -> Result<Self> {
        let params = params.into_iter().filter(Param::is_trainable);
        let params = params.map(|param| Ok((param.clone(), Moments::new(&param)?))).collect::<Result<_>>()?;
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
                #[cfg(feature = "cuda")]
                Moments::Cuda(moments) => on_gpu.push(super::cuda::Slot { value, grad, moments }),
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

    /// First and second moment of the weight called `name`, each of its shape, on the CPU.
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
            Moments::from_tensors(param, &m, &v)
        });
        let restored = restored.collect::<Result<Vec<_>>>()?;
        self.params.iter_mut().zip(restored).for_each(|((_, moments), new)| *moments = new);
        self.n_steps = n_steps;
        Ok(())
    }
}

impl Moments {
    fn new(param: &Param) -> Result<Self> {
        let n = param.value().elem_count();
        match param.device() {
            Device::Cpu => Ok(Self::Cpu { m: zeros(n), v: zeros(n) }),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(super::cuda::Moments::zeros(&device, n)?)),
            other => bail!("AdamW: no kernel for {other:?}"),
        }
    }

    fn from_tensors(param: &Param, m: &Tensor, v: &Tensor) -> Result<Self> {
        let flat =
            |tensor: &Tensor| tensor.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>();
        match param.device() {
            Device::Cpu => Ok(Self::Cpu { m: flat(m)?, v: flat(v)? }),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                Ok(Self::Cuda(super::cuda::Moments::upload(&device, &flat(m)?, &flat(v)?)?))
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
            #[cfg(feature = "cuda")]
            Self::Cuda(moments) => {
                let (m, v) = moments.download()?;
                Ok((Tensor::from_vec(m, dims.clone(), &cpu)?, Tensor::from_vec(v, dims, &cpu)?))
            }
        }
    }
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
        let (CpuStorage::F32(p), CpuStorage::F32(g)) = (p, g) else { bail!("AdamW: wanted f32 on the CPU") };
        let (Some((p_from, p_to)), Some((g_from, g_to))) =
            (p_l.contiguous_offsets(), g_l.contiguous_offsets())
        else {
            bail!("AdamW: wanted contiguous tensors");
        };
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let (m, v) = &mut *moments;
        let (p, g) = (&mut p[p_from..p_to], &g[g_from..g_to]);
        if p.len() != g.len() || p.len() != m.len() {
            bail!("AdamW: {} weights, {} gradients, {} moments", p.len(), g.len(), m.len());
        }
        let chunks = p.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
        chunks.zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK)).for_each(|(((p, g), m), v)| {
            for i in 0..p.len() {
                self.update.apply(&mut p[i], g[i], &mut m[i], &mut v[i]);
            }
        });
        Ok(())
    }
}

/// Sum of squares, in f64 across blocks.
fn square_sum(x: &Tensor) -> Result<f64> {
    let x = View::of(x, "AdamW")?;
    // Chunk by chunk in order, so that the sum does not depend on how threads are scheduled.
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(|part| sum(part, |v| v * v)).collect();
    Ok(parts.iter().sum())
}
