//! The operations of a forward that is being recorded (`recorded.rs`), in order.

use std::cell::RefCell;

use candle_core::{Result, Tensor, TensorId};

/// Gradients of up to three inputs. `None` for an input that has none.
pub(super) type Grads = [Option<Tensor>; 3];

/// The gradients of the inputs from the value, where it is kept, and its gradient.
pub(super) type Backward = Box<dyn Fn(Option<&Tensor>, &Tensor) -> Result<Grads> + Send + Sync>;

thread_local! {
    /// The forwards that this thread records, the innermost last; `None` where nothing is to be recorded.
    static TAPES: RefCell<Vec<Option<Tape>>> = const { RefCell::new(Vec::new()) };
}

/// What was recorded, in order.
#[derive(Default)]
pub(super) struct Tape(pub(super) Vec<Entry>);

pub(super) enum Entry {
    Operation(Operation),
    /// A value of candle's operations that one of ours was given.
    Candle(Tensor),
}

/// An operation of ours.
pub(super) struct Operation {
    pub(crate) name: &'static str,
    /// Of each input its id, and whether it wants a gradient.
    pub(crate) inputs: Vec<(TensorId, bool)>,
    pub(crate) output: TensorId,
    /// The value, if the backward reads it.
    pub(crate) kept: Option<Tensor>,
    pub(crate) backward: Backward,
}

/// Runs `forward`, and gives what it did.
pub(super) fn of<T>(forward: impl FnOnce() -> Result<T>) -> Result<(T, Tape)> {
    let _level = Level::enter(Some(Tape::default()));
    let value = forward()?;
    let tape = TAPES.with_borrow_mut(|tapes| tapes.last_mut().and_then(Option::take));
    Ok((value, tape.unwrap_or_default()))
}

/// How many forwards are under way.
#[cfg(test)]
pub(super) fn depth() -> usize {
    TAPES.with_borrow(Vec::len)
}

/// Runs `forward` without recording what it does.
pub(super) fn unrecorded<T>(forward: impl FnOnce() -> T) -> T {
    let _level = Level::enter(None);
    forward()
}

/// Whether a forward is being recorded.
pub(super) fn is_recording() -> bool {
    TAPES.with_borrow(|tapes| matches!(tapes.last(), Some(Some(_))))
}

/// Records an operation with its value, a variable of candle's. `reads_value` says whether `backward` does.
pub(super) fn record(
    name: &'static str,
    inputs: &[&Tensor],
    output: &Tensor,
    reads_value: bool,
    backward: Backward,
) {
    TAPES.with_borrow_mut(|tapes| {
        let Some(Some(tape)) = tapes.last_mut() else { return };
        for input in inputs {
            tape.candle(input);
        }
        let inputs = inputs.iter().map(|input| (input.id(), wants_gradient(input))).collect();
        let kept = reads_value.then(|| output.clone());
        tape.0.push(Entry::Operation(Operation { name, inputs, output: output.id(), kept, backward }));
    });
}

impl Tape {
    /// Records a value of candle's own operations on variables, once.
    pub(super) fn candle(&mut self, value: &Tensor) {
        let is_known = |entry: &Entry| matches!(entry, Entry::Candle(known) if known.id() == value.id());
        if value.track_op() && !value.is_variable() && !self.0.iter().any(is_known) {
            self.0.push(Entry::Candle(value.clone()));
        }
    }
}

/// Whether it is tracked, and not just a weight's tag.
pub(super) fn wants_gradient(input: &Tensor) -> bool {
    input.track_op() && !(input.is_variable() && input.elem_count() == 1)
}

/// A place in [`TAPES`], left when it is dropped.
struct Level;

impl Level {
    fn enter(tape: Option<Tape>) -> Self {
        TAPES.with_borrow_mut(|tapes| tapes.push(tape));
        Self
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        TAPES.with_borrow_mut(Vec::pop);
    }
}
