//! Puts a value that is already computed into candle's graph as a custom operation, together with its backward.

use std::sync::{Mutex, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};

use super::tape::{self, Backward, Grads};
use crate::param::Param;

/// What a kernel computed: storage in row-major order and its shape.
pub(super) struct Computed {
    pub(crate) storage: Storage,
    pub(crate) shape: Shape,
}

impl Computed {
    /// A value on the CPU.
    pub(super) fn cpu(values: Vec<f32>, shape: impl Into<Shape>) -> Self {
        Self { storage: Storage::Cpu(CpuStorage::F32(values)), shape: shape.into() }
    }

    /// A copy of a tensor's numbers, in row-major order.
    pub(super) fn copy_of(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.contiguous()?;
        let storage = tensor.storage_and_layout().0.try_clone(tensor.layout())?;
        Ok(Self { storage, shape: tensor.shape().clone() })
    }

    /// The value as a tensor without history.
    pub(super) fn detached(self) -> Tensor {
        Tensor::from_storage(self.storage, self.shape, BackpropOp::none(), false)
    }
}

/// Makes `value` a node of the graph whose inputs are `inputs` (one to three): of candle's, or of the record of the forward
/// that is under way ([`super::tape`]).
///
/// `backward` gets the gradient of the value and returns one gradient per input, `Some` exactly for those inputs that
/// are tracked ([`Tensor::track_op`]); weights are reached through their [`Param`] instead.
pub(super) fn custom_op(
    name: &'static str,
    inputs: &[&Tensor],
    value: Computed,
    backward: impl Fn(&Tensor) -> Result<Grads> + Send + Sync + 'static,
) -> Result<Tensor> {
    node(name, inputs, value, false, Box::new(move |_, dy| backward(dy)))
}

/// As [`custom_op()`], for a `backward` that reads the value too: `backward(y, dy)`.
pub(super) fn custom_op_with_result(
    name: &'static str,
    inputs: &[&Tensor],
    value: Computed,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Grads> + Send + Sync + 'static,
) -> Result<Tensor> {
    let backward: Backward = Box::new(move |y, dy| match y {
        Some(y) => backward(y, dy),
        None => bail!("{name}: its value was not kept"),
    });
    node(name, inputs, value, true, backward)
}

fn node(
    name: &'static str,
    inputs: &[&Tensor],
    value: Computed,
    reads_value: bool,
    backward: Backward,
) -> Result<Tensor> {
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(value.detached());
    }
    if tape::is_recording() {
        let Computed { storage, shape } = value;
        let output = Tensor::from_storage(storage, shape, BackpropOp::none(), true);
        tape::record(name, inputs, &output, reads_value, backward);
        return Ok(output);
    }
    // candle's operations have a fixed number of inputs; an untracked copy of the first fills the empty places.
    let filler = inputs[0].detach();
    let at = |i: usize| inputs.get(i).copied().unwrap_or(&filler);
    let Computed { storage, shape } = value;
    let op = PrecomputedOp { name, value: Mutex::new(Some(storage)), shape, backward };
    at(0).apply_op3(at(1), at(2), op)
}

/// The tag of whichever of the two is trained.
pub(super) fn trained_tag(weight: &Param, bias: Option<&Param>) -> Tensor {
    match bias {
        Some(bias) if bias.is_trainable() => bias.tag().clone(),
        _ => weight.tag().clone(),
    }
}

struct PrecomputedOp {
    name: &'static str,
    /// The value, waiting for candle to ask for it.
    value: Mutex<Option<Storage>>,
    shape: Shape,
    backward: Backward,
}

impl PrecomputedOp {
    fn take(&self) -> Result<(Storage, Shape)> {
        match self.value.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(storage) => Ok((storage, self.shape.clone())),
            None => bail!("{}: the computed value can be taken only once", self.name),
        }
    }
}

impl CustomOp3 for PrecomputedOp {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: the inputs are on the CPU, the value is not", self.name),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: the inputs are on a CUDA device, the value is not", self.name),
        }
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, c: &Tensor, y: &Tensor, grad: &Tensor) -> Result<TripleGrad> {
        let [mut da, mut db, mut dc] = (self.backward)(Some(y), &grad.contiguous()?)?;
        // candle panics where a tracked input's gradient is missing, and would give an untracked one a needless store.
        for (input, slot) in [(a, &mut da), (b, &mut db), (c, &mut dc)] {
            if !input.track_op() || slot.is_none() && !tape::wants_gradient(input) {
                *slot = None;
            } else if slot.is_none() {
                bail!("{}: a tracked input got no gradient", self.name);
            }
        }
        Ok((da, db, dc))
    }
}

type TripleGrad = (Option<Tensor>, Option<Tensor>, Option<Tensor>);
