//! A model's own record of its operations, in place of candle's graph: the backward moves the first gradient of a value
//! and adds the next to it, where candle adds each one to zeros, and drops what an operation kept as soon as its gradients
//! are known.
//!
//! While a forward is recorded, every value of [`custom_op`] is a variable to candle. What candle's own operations make of
//! such variables in between are small graphs of candle's, which end at them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, TensorId, Var, bail};

use super::custom_op::{Computed, custom_op};
use super::tape::{self, Entry, Grads, Operation, Tape};

/// `forward(inputs)`, differentiable in `inputs` (at most three) and in every weight. `forward` must not use tracked
/// tensors other than those that it is given.
///
/// Its result can be differentiated once: that uses up what was recorded.
pub(crate) fn recorded(
    inputs: &[&Tensor],
    forward: impl FnOnce(&[Tensor]) -> Result<Tensor>,
) -> Result<Tensor> {
    let recording = Recording::of(inputs, forward)?;
    if !recording.output.track_op() {
        return Ok(recording.output);
    }
    // Where only weights are tracked, candle needs a variable in the inputs' place.
    let is_anchored = !inputs.iter().any(|input| input.track_op());
    let anchor = if is_anchored { Some(Var::zeros(1, DType::F32, recording.output.device())?) } else { None };
    let anchor = anchor.as_ref().map(|anchor| [anchor.as_tensor()]);
    let given = anchor.as_ref().map_or(inputs, |anchor| anchor.as_slice());
    let value = Computed::copy_of(&recording.output)?;
    let recording = Mutex::new(Some(recording));
    custom_op("recorded", given, value, move |dy| {
        let recording = recording.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(recording) = recording else { bail!("a recorded forward can be differentiated once") };
        let mut grads = recording.backward(dy)?.into_iter();
        let mut next = || grads.next().flatten().filter(|_| !is_anchored);
        Ok([next(), next(), next()])
    })
}

/// The gradients of the inputs (at most three) from the one of `forward(inputs)`, which is computed for that alone. Those of
/// weights go to the weights.
pub(super) fn gradients(
    inputs: &[&Tensor],
    forward: impl FnOnce(&[Tensor]) -> Result<Tensor>,
    dy: &Tensor,
) -> Result<Grads> {
    let mut grads = Recording::of(inputs, forward)?.backward(dy)?.into_iter();
    let mut next = || grads.next().flatten();
    Ok([next(), next(), next()])
}

/// What was recorded of one forward.
struct Recording {
    tape: Tape,
    /// The inputs as `forward` got them: variables where they are tracked.
    inputs: Vec<Tensor>,
    output: Tensor,
}

impl Recording {
    fn of(inputs: &[&Tensor], forward: impl FnOnce(&[Tensor]) -> Result<Tensor>) -> Result<Self> {
        let inputs = inputs.iter().map(|input| as_variable(input)).collect::<Result<Vec<_>>>()?;
        let (output, mut tape) = tape::of(|| forward(&inputs))?;
        tape.candle(&output);
        Ok(Self { tape, inputs, output })
    }

    /// The gradients of the inputs, from the one of the output; `None` for those that have none.
    fn backward(self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { tape, inputs, output } = self;
        let mut grads = Sums(HashMap::from([(output.id(), dy.clone())]));
        for entry in tape.0.into_iter().rev() {
            match entry {
                Entry::Operation(Operation { name, inputs, output, kept, backward }) => {
                    let Some(dy) = grads.0.remove(&output) else { continue }; // nothing came of it
                    let results = backward(kept.as_ref(), &dy.contiguous()?)?;
                    drop((kept, dy, backward));
                    for ((input, is_wanted), grad) in inputs.into_iter().zip(results) {
                        if is_wanted && grad.is_none() {
                            bail!("{name}: a tracked input got no gradient");
                        }
                        grads.add(input, grad.filter(|_| is_wanted))?;
                    }
                }
                Entry::Candle(value) => {
                    let Some(dy) = grads.0.remove(&value.id()) else { continue };
                    grads.extend(through_candle(&value, dy)?)?;
                }
            }
        }
        let of_inputs = inputs.iter().map(|input| match grads.0.remove(&input.id()) {
            None if input.track_op() => input.zeros_like().map(Some),
            grad => Ok(grad.filter(|_| input.track_op())),
        });
        let of_inputs = of_inputs.collect::<Result<Vec<_>>>()?;
        // Of a weight's tag there is none.
        match grads.0.values().next() {
            Some(grad) => bail!("a recorded forward used a tracked tensor {:?} from outside", grad.dims()),
            None => Ok(of_inputs),
        }
    }
}

/// Gradients by the tensor that they are of.
struct Sums(HashMap<TensorId, Tensor>);

impl Sums {
    fn add(&mut self, of: TensorId, grad: Option<Tensor>) -> Result<()> {
        let Some(grad) = grad else { return Ok(()) };
        let sum = match self.0.remove(&of) {
            Some(before) => (before + grad)?,
            None => grad,
        };
        self.0.insert(of, sum);
        Ok(())
    }

    fn extend(&mut self, store: GradStore) -> Result<()> {
        for id in store.get_ids() {
            self.add(*id, store.get_id(*id).cloned())?;
        }
        Ok(())
    }
}

/// The gradients of the variables that candle's operations made `value` of.
fn through_candle(value: &Tensor, dy: Tensor) -> Result<GradStore> {
    let zero = Computed::copy_of(&Tensor::zeros(1, DType::F32, value.device())?)?;
    let seed =
        tape::unrecorded(|| custom_op("seed", &[value], zero, move |_| Ok([Some(dy.clone()), None, None])))?;
    let mut store = seed.backward()?;
    store.remove(&seed);
    Ok(store)
}

/// A tracked input becomes a variable, any other stays a constant.
fn as_variable(input: &Tensor) -> Result<Tensor> {
    let detached = input.detach();
    if input.track_op() { Ok(Var::from_tensor(&detached)?.into_inner()) } else { Ok(detached) }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::{Activation, activate, checkpoint, linear};
    use crate::param::Param;

    fn numbers(dims: (usize, usize), first: f32) -> Tensor {
        let values = (0..dims.0 * dims.1).map(|i| (first + 0.7 * i as f32).sin()).collect();
        Tensor::from_vec(values, dims, &Device::Cpu).expect("a tensor")
    }

    fn weight() -> Param {
        Param::new("w", numbers((6, 6), 1.0), true).expect("a weight")
    }

    /// Values that go to several operations, ours and candle's, one of them computed again in the backward.
    fn forward(x: &Tensor, weight: &Param) -> Result<Tensor> {
        let hidden = linear(x, weight, None)?;
        let sum = (&hidden + x)?;
        let (again, kept) = (weight.clone(), linear(&sum, weight, None)?);
        let block = checkpoint(&[&sum], move |inputs| linear(&inputs[0], &again, None))?;
        let unused = activate(&kept, Activation::Gelu)?;
        drop(unused);
        ((activate(&sum, Activation::Silu)? + block)? * 0.5)? + kept.t()?.t()?
    }

    /// What `y` is, and the gradients of `x` and of the weight.
    fn outcome(y: Result<Tensor>, x: &Tensor, weight: &Param) -> [Vec<f32>; 3] {
        let y = y.expect("a forward");
        let grads = (&y * numbers((2, 6), 9.0)).and_then(|y| y.sum_all()).and_then(|y| y.backward());
        let dx = grads.expect("a backward").get(x).expect("a gradient").clone();
        [y, dx, weight.take_grad().expect("a gradient")]
            .map(|tensor| tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("numbers"))
    }

    #[test]
    fn a_recorded_forward_has_the_gradients_of_candle_s_graph() {
        let (x, weight) = (Var::from_tensor(&numbers((2, 6), 3.0)).expect("a variable"), weight());
        let wanted = outcome(forward(&x, &weight), &x, &weight);
        let record = || recorded(&[x.as_tensor()], |inputs| forward(&inputs[0], &weight));
        for (ours, wanted) in outcome(record(), &x, &weight).iter().zip(&wanted) {
            assert!(
                ours.iter().zip(wanted).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0)),
                "{ours:?}"
            );
        }
        // In a record of another.
        let inner =
            || recorded(&[x.as_tensor()], |outer| recorded(&[&outer[0]], |x| forward(&x[0], &weight)));
        for (ours, wanted) in outcome(inner(), &x, &weight).iter().zip(&wanted) {
            assert!(
                ours.iter().zip(wanted).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0)),
                "{ours:?}"
            );
        }
        assert_eq!(tape::depth(), 0);
    }

    #[test]
    fn a_weight_gets_its_gradient_where_no_input_is_tracked() {
        let (x, weight) = (numbers((2, 6), 3.0), weight());
        let of = |y: Result<Tensor>| {
            y.and_then(|y| y.sum_all()).and_then(|y| y.backward()).expect("a backward");
            weight
                .take_grad()
                .and_then(|grad| grad.flatten_all().ok()?.to_vec1::<f32>().ok())
                .expect("numbers")
        };
        let wanted = of(linear(&x, &weight, None));
        assert_eq!(of(recorded(&[&x], |inputs| linear(&inputs[0], &weight, None))), wanted);
        assert_eq!(of(recorded(&[], |_| linear(&x, &weight, None))), wanted);
    }

    #[test]
    fn what_has_no_gradient_is_no_part_of_a_graph() {
        let frozen = Param::new("w", numbers((6, 6), 1.0), false).expect("a weight");
        let y = recorded(&[&numbers((2, 6), 3.0)], |inputs| linear(&inputs[0], &frozen, None));
        assert!(!y.expect("a value").track_op());
    }

    #[test]
    fn a_second_backward_and_a_tensor_from_outside_are_refused() {
        let (x, weight) = (Var::from_tensor(&numbers((2, 6), 3.0)).expect("a variable"), weight());
        let y = recorded(&[x.as_tensor()], |inputs| forward(&inputs[0], &weight)).expect("a value");
        y.backward().expect("a backward");
        let words = y.backward().expect_err("a refusal").to_string();
        assert!(words.contains("can be differentiated once"), "{words}");

        let other = Var::from_tensor(&numbers((2, 6), 4.0)).expect("a variable");
        let y = recorded(&[x.as_tensor()], |inputs| {
            activate(&(&inputs[0] + other.as_tensor())?, Activation::Silu)
        });
        let words = y.expect("a value").backward().expect_err("a refusal").to_string();
        assert!(words.contains("used a tracked tensor [2, 6] from outside"), "{words}");
    }
}
