//! Gradient checkpointing: keeps only a block's inputs, and computes the block again in the backward pass.

use candle_core::{Result, Tensor, Var};

use super::custom_op::{Computed, custom_op};
use super::recorded::gradients;
use super::tape::unrecorded;

/// `block(inputs)`, whose intermediate values are dropped at once and recomputed in the backward
/// (Chen et al. 2016, arXiv 1604.06174). One to three inputs.
///
/// Weights inside the block get their gradients in their own slots, so the block may hold any number of them. `block`
/// must be a pure function of its inputs and weights.
pub fn checkpoint(
    inputs: &[&Tensor],
    block: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let detached: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
    let y = unrecorded(|| block(&detached))?;
    // A trained weight inside makes the result tracked even where no input is: the first input then stands in for it.
    let anchor = if y.track_op() && !inputs.iter().any(|input| input.track_op()) {
        Some(Var::from_tensor(inputs[0])?)
    } else {
        None
    };
    let value = Computed::copy_of(&y.detach())?;
    drop(y);
    let mut inputs: Vec<Tensor> = inputs.iter().map(|&input| input.clone()).collect();
    if let Some(anchor) = anchor {
        inputs[0] = anchor.into_inner();
    }
    let kept = inputs.clone();
    custom_op("checkpoint", &inputs.iter().collect::<Vec<_>>(), value, move |dy| {
        if dy.device().is_cuda() {
            return gradients(&kept.iter().collect::<Vec<_>>(), &block, dy);
        }
        let inputs = kept.iter().map(fresh).collect::<Result<Vec<_>>>()?;
        let y = block(&inputs)?;
        let mut store = (y * dy)?.sum_all()?.backward()?;
        let mut grads = [None, None, None];
        for ((slot, input), kept) in grads.iter_mut().zip(&inputs).zip(&kept) {
            if kept.track_op() {
                *slot = Some(match store.remove(input) {
                    Some(grad) => grad.detach(),
                    None => input.zeros_like()?,
                });
            }
        }
        Ok(grads)
    })
}

/// A tracked input becomes a variable of the inner graph, any other stays a constant.
fn fresh(input: &Tensor) -> Result<Tensor> {
    let detached = input.detach();
    if input.track_op() { Ok(Var::from_tensor(&detached)?.into_inner()) } else { Ok(detached) }
}
