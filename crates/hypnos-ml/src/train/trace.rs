//! Writes one training step to a file with its inputs and outputs, so that other programs can recompute it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

use super::losses::{Batch, Losses};
use super::recipe::Recipe;
use crate::Result;
use crate::param::Param;
use crate::tensorfile::save;

/// Weights whose gradients a trace holds, by the end of their names: both ends of each model and a projection in
/// between.
const TRACED: [&str; 6] = [
    "unet.conv_in.weight",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "unet.conv_out.weight",
    "token_embedding.weight",
    "encoder.layers.0.self_attn.q_proj.weight",
    "final_layer_norm.weight",
];

/// Which steps are written, and where.
///
/// `step-0001.safetensors` and so on, f32: `latents` and `noise` `[B, c, h, w]` (the product's picture first), `t`
/// `[B]`, `ids` `[B, 77]`, `prediction`, `z0`, `decoded`, `reference`, `crop` (top, left, side in latents),
/// `loss.<term>` unweighted, `loss.total`, `grad_norm` before clipping, `grad.<weight>` of a few weights,
/// `discriminator.<weight>` as the step found them. What a step does not compute is not there. The metadata hold the
/// recipe. The weights of step 1 are the bundle's; those of a later one are in a checkpoint of the step before.
#[derive(Clone, Debug)]
pub struct Trace {
    /// A directory that exists.
    pub dir: PathBuf,
    /// Steps, counted from 1.
    pub steps: BTreeSet<u64>,
}

/// A step that is about to be taken.
pub(super) struct StepRecord<'a> {
    /// Counted from 1.
    pub(super) step: u64,
    pub(super) recipe: &'a Recipe,
    pub(super) batch: &'a Batch,
    pub(super) losses: &'a Losses,
    /// Norm of all gradients together, before clipping.
    pub(super) grad_norm: f64,
    /// Every trained weight, with its gradient.
    pub(super) params: &'a BTreeMap<String, Param>,
    /// The discriminator's weights, where one takes part.
    pub(super) discriminator: Option<&'a BTreeMap<String, Param>>,
}

impl Trace {
    pub(super) fn wants(&self, step: u64) -> bool {
        self.steps.contains(&step)
    }

    /// Writes a step.
    pub(super) fn write(&self, record: &StepRecord<'_>) -> Result<()> {
        let StepRecord { step, recipe, batch, losses, grad_norm, params, discriminator } = *record;
        let cpu = Device::Cpu;
        let mut all: BTreeMap<String, Tensor> = BTreeMap::new();
        let mut put = |name: &str, tensor: Option<&Tensor>| -> Result<()> {
            if let Some(tensor) = tensor {
                all.insert(
                    name.to_owned(),
                    tensor.detach().to_device(&cpu)?.to_dtype(DType::F32)?.contiguous()?,
                );
            }
            Ok(())
        };
        let row = |values: Vec<f32>| Tensor::new(values, &cpu);
        let ids: Vec<Vec<f32>> =
            batch.ids.iter().map(|ids| ids.iter().map(|&id| id as f32).collect()).collect();
        let crop = batch.crop.map(|(top, left, side)| row(vec![top as f32, left as f32, side as f32]));
        put("latents", Some(&batch.latents))?;
        put("noise", Some(&batch.noise))?;
        put("t", Some(&row(batch.t.iter().map(|&t| t as f32).collect())?))?;
        put("ids", Some(&Tensor::new(ids, &cpu)?))?;
        put("reference", batch.reference.as_ref())?;
        put("crop", crop.transpose()?.as_ref())?;
        put("prediction", Some(&losses.prediction))?;
        put("z0", losses.z0.as_ref())?;
        put("decoded", losses.decoded.as_ref())?;
        put("loss.total", Some(&losses.total))?;
        put("loss.reconstruction", Some(&losses.reconstruction))?;
        put("loss.cut", Some(&losses.cut))?;
        put("loss.prior", losses.prior.as_ref())?;
        put("loss.perceptual", losses.perceptual.as_ref())?;
        put("loss.adversarial", losses.adversarial.as_ref())?;
        put("grad_norm", Some(&Tensor::new(grad_norm as f32, &cpu)?))?;
        let traced =
            |name: &str| TRACED.iter().any(|end| name.ends_with(end)) || name.starts_with("embedding.");
        for (name, param) in params.iter().filter(|(name, _)| traced(name)) {
            put(&format!("grad.{name}"), param.grad().as_ref())?;
        }
        for (name, param) in discriminator.into_iter().flatten() {
            put(&format!("discriminator.{name}"), Some(&param.value()))?;
        }
        let metadata =
            [("format", "hypnos trace 1"), ("recipe", &recipe.json()), ("step", &step.to_string())];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        save(&self.dir.join(format!("step-{step:04}.safetensors")), &all, &metadata, DType::F32)
    }
}
