//! A tensor without values, and the graph that it is a node of.

use std::rc::Rc;

use candle_core::{DType, Result};

use super::meter::{Block, Meter};

/// A tensor without values. Cloning shares it.
#[derive(Clone)]
pub(crate) struct DryTensor(Rc<Inner>);

pub(super) struct Inner {
    dims: Vec<usize>,
    dtype: DType,
    memory: Rc<Block>,
    meter: Meter,
    is_contiguous: bool,
    is_variable: bool,
    node: Option<Node>,
}

/// How a tracked tensor came to be. Holds what candle's graph holds.
pub(super) struct Node {
    pub(super) inputs: Vec<DryTensor>,
    pub(super) rule: Rule,
}

/// A block of a model, from its inputs to its result.
pub(super) type Recompute = dyn Fn(&[DryTensor]) -> Result<DryTensor>;

/// What the backward of a node does.
pub(super) enum Rule {
    /// candle's own: one gradient after the other, for untracked inputs too; each by way of so many values of its
    /// input's size.
    Candle { temporaries: u64 },
    /// An operation of ours: all gradients at once, for tracked inputs only.
    Custom(Cost),
    /// A block that is computed again.
    Checkpoint(Box<Recompute>),
}

/// What an operation of ours costs beyond its result and its inputs' gradients.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// Floating point operations of the forward.
    pub flops: f64,
    /// Floating point operations of the inputs' gradients.
    pub input_flops: f64,
    /// Floating point operations of the weights' gradients.
    pub weight_flops: f64,
    /// Whether they are a convolution's, or else a matrix product's.
    pub is_convolution: bool,
    /// Bytes that the forward works with.
    pub scratch: u64,
    /// Bytes that the backward works with.
    pub backward_scratch: u64,
    /// Bytes of weights' gradients, which stay.
    pub gradients: u64,
}

impl DryTensor {
    /// An f32 value that no gradient goes to.
    pub(crate) fn constant(meter: &Meter, dims: &[usize]) -> Self {
        Self::new(meter, dims, DType::F32, None)
    }

    pub(super) fn new(meter: &Meter, dims: &[usize], dtype: DType, node: Option<Node>) -> Self {
        let memory = meter.alloc((dtype.size_in_bytes() * dims.iter().product::<usize>()) as u64);
        let (dims, meter) = (dims.to_vec(), meter.clone());
        Self(Rc::new(Inner { dims, dtype, memory, meter, is_contiguous: true, is_variable: false, node }))
    }

    /// A copy of `of` that a graph begins with.
    fn variable(of: &Self) -> Self {
        let Inner { dims, dtype, meter, .. } = &*of.0;
        let memory = meter.alloc(of.bytes());
        let (dims, dtype, meter) = (dims.clone(), *dtype, meter.clone());
        Self(Rc::new(Inner {
            dims,
            dtype,
            memory,
            meter,
            is_contiguous: true,
            is_variable: true,
            node: None,
        }))
    }

    /// The same memory seen otherwise, as the result of `node`.
    pub(super) fn view(&self, dims: &[usize], is_contiguous: bool, node: Option<Node>) -> Self {
        let (dims, memory, meter) = (dims.to_vec(), self.0.memory.clone(), self.meter().clone());
        let dtype = self.dtype();
        Self(Rc::new(Inner { dims, dtype, memory, meter, is_contiguous, is_variable: false, node }))
    }

    /// The same values without history.
    pub(crate) fn detach(&self) -> Self {
        self.view(self.dims(), self.is_contiguous(), None)
    }

    /// The result of an operation of ours on `inputs`, which are contiguous; `self` is one of them, or lends its meter.
    pub(crate) fn custom(&self, inputs: &[&Self], dims: &[usize], cost: Cost) -> Self {
        let meter = self.meter();
        meter.compute(cost.flops, cost.is_convolution);
        let _scratch = meter.alloc(cost.scratch);
        let is_tracked = cost.gradients > 0 || inputs.iter().any(|input| input.is_tracked());
        let node = is_tracked
            .then(|| Node { inputs: inputs.iter().copied().cloned().collect(), rule: Rule::Custom(cost) });
        Self::new(meter, dims, self.dtype(), node)
    }

    /// The result of an operation of ours on weights alone, f32.
    pub(crate) fn custom_leaf(meter: &Meter, dims: &[usize], cost: Cost) -> Self {
        let rule = Rule::Custom(cost);
        let node = (cost.gradients > 0).then(|| Node { inputs: Vec::new(), rule });
        Self::new(meter, dims, DType::F32, node)
    }

    /// The node of an operation of candle's own, if anything is tracked.
    pub(super) fn candle_node(inputs: &[&Self], temporaries: u64) -> Option<Node> {
        inputs.iter().any(|input| input.is_tracked()).then(|| Node {
            inputs: inputs.iter().copied().cloned().collect(),
            rule: Rule::Candle { temporaries },
        })
    }

    pub(crate) fn dims(&self) -> &[usize] {
        &self.0.dims
    }

    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.0.dims.iter().product()
    }

    pub(crate) fn bytes(&self) -> u64 {
        (self.dtype().size_in_bytes() * self.len()) as u64
    }

    pub(crate) fn meter(&self) -> &Meter {
        &self.0.meter
    }

    pub(crate) fn is_tracked(&self) -> bool {
        self.0.is_variable || self.0.node.is_some()
    }

    pub(super) fn is_contiguous(&self) -> bool {
        self.0.is_contiguous
    }

    pub(super) fn is_variable(&self) -> bool {
        self.0.is_variable
    }

    pub(super) fn node(&self) -> Option<&Node> {
        self.0.node.as_ref()
    }

    /// What tells it from others as long as it lives.
    pub(super) fn id(&self) -> *const Inner {
        Rc::as_ptr(&self.0)
    }
}

/// [`crate::ops::checkpoint()`] in a dry run: keeps the inputs; the block's inside is there twice, each time for a moment.
pub(crate) fn checkpoint(
    inputs: &[&DryTensor],
    block: impl Fn(&[DryTensor]) -> Result<DryTensor> + 'static,
) -> Result<DryTensor> {
    let detached: Vec<DryTensor> = inputs.iter().map(|input| input.detach()).collect();
    let inside = block(&detached)?;
    let mut inputs: Vec<DryTensor> = inputs.iter().copied().cloned().collect();
    if inside.is_tracked() && !inputs.iter().any(DryTensor::is_tracked) {
        inputs[0] = DryTensor::variable(&inputs[0]);
    }
    let is_tracked = inputs.iter().any(DryTensor::is_tracked);
    let node = is_tracked.then(|| Node { inputs, rule: Rule::Checkpoint(Box::new(block)) });
    Ok(DryTensor::new(inside.meter(), inside.dims(), inside.dtype(), node))
}

/// The inputs of a block that is computed again: copies of the tracked ones, the others as they are.
pub(super) fn fresh(inputs: &[DryTensor]) -> Vec<DryTensor> {
    let fresh = |input: &DryTensor| {
        if input.is_tracked() { DryTensor::variable(&input.detach()) } else { input.detach() }
    };
    inputs.iter().map(fresh).collect()
}
