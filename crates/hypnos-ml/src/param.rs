//! A model weight: its name, its value, whether it is trainable, and its gradient.
//!
//! candle keeps gradients in a store made anew by each `backward`, adding each one to zeros first: for 860 M weights
//! that is three more passes over 3.4 GB, and a checkpointed block, whose backward runs inside another, has no way to
//! reach the outer store. So the operations in [`crate::ops`] put a weight's gradient here, where the optimiser
//! finds it, and candle's store holds activations only.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use candle_core::{DType, Device, Result, Tensor, Var};

/// One named weight. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Param(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    /// The master value, contiguous and detached.
    value: RwLock<Tensor>,
    /// The value in a narrower compute dtype, made when first asked for; dropped or changed with the master.
    narrow: Mutex<Option<Tensor>>,
    /// What the value, or `narrow`, is a part of, and where that begins along the first dimension.
    pack: Mutex<Option<(Tensor, usize)>>,
    /// One element; a variable exactly if the weight is trained. Operations take it as an input, so that candle
    /// records them even where no other input has a gradient.
    tag: Tensor,
    grad: Mutex<Option<Tensor>>,
}

impl Param {
    /// A weight with the given value, copied if it is trained. A frozen one never costs a gradient.
    pub fn new(name: impl Into<String>, value: Tensor, trainable: bool) -> Result<Self> {
        // An optimiser changes a trained weight in place; the tensor it was made from must not change with it.
        let value = if trainable { value.force_contiguous()? } else { value };
        Self::owning(name, value, trainable)
    }

    /// A weight with a value that nobody else holds: it is not copied.
    pub(crate) fn owning(name: impl Into<String>, value: Tensor, trainable: bool) -> Result<Self> {
        let tag = if trainable {
            Var::zeros(1, DType::F32, value.device())?.into_inner()
        } else {
            Tensor::zeros(1, DType::F32, value.device())?
        };
        Ok(Self::of(name.into(), value.contiguous()?.detach(), tag))
    }

    /// A weight of zeros of this dtype that takes no memory whatever its shape: for listing what a model would read and
    /// for dry runs, not for computing, since the operations want contiguous values.
    pub(crate) fn placeholder(
        name: impl Into<String>,
        shape: &[usize],
        dtype: DType,
        trainable: bool,
    ) -> Result<Self> {
        let zero = Tensor::zeros((), dtype, &Device::Cpu)?;
        let tag = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
        let tag = if trainable { Var::from_tensor(&tag)?.into_inner() } else { tag };
        Ok(Self::of(name.into(), zero.broadcast_as(shape)?, tag))
    }

    fn of(name: String, value: Tensor, tag: Tensor) -> Self {
        let (value, narrow, grad) = (RwLock::new(value), Mutex::new(None), Mutex::new(None));
        Self(Arc::new(Inner { name, value, narrow, pack: Mutex::new(None), tag, grad }))
    }

    /// Full name in the checkpoint, such as `down_blocks.0.resnets.0.conv1.weight`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The master value. Shares storage with the weight: an optimiser's step shows through it.
    pub fn value(&self) -> Tensor {
        self.0.value.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The value in the dtype of the computation, converted once and kept until the weight changes.
    pub(crate) fn weight(&self, dtype: DType) -> Result<Tensor> {
        let value = self.value();
        if value.dtype() == dtype {
            return Ok(value);
        }
        let mut narrow = lock(&self.0.narrow);
        match narrow.as_ref() {
            Some(kept) if kept.dtype() == dtype => Ok(kept.clone()),
            _ => Ok(narrow.insert(value.to_dtype(dtype)?).clone()),
        }
    }

    /// What [`Param::weight`] has converted and keeps: who changes the value in place changes this as well, or calls
    /// [`Param::value_changed`].
    #[cfg(feature = "cuda")]
    pub(crate) fn narrow(&self) -> Option<Tensor> {
        lock(&self.0.narrow).clone()
    }

    /// The values of frozen weights that may differ in their first dimension, in this dtype, one behind the other along
    /// it. Each one's [`Param::weight`] is a part of it from then on, and its value too if that has this dtype: nothing is
    /// kept twice.
    #[cfg(feature = "cuda")]
    pub(crate) fn pack(params: &[&Self], dtype: DType) -> Result<Tensor> {
        let sizes: Vec<usize> = params.iter().map(|param| param.dims()[0]).collect();
        let begins: Vec<usize> = sizes
            .iter()
            .scan(0, |end, size| {
                let begin = *end;
                *end += size;
                Some(begin)
            })
            .collect();
        let packs: Vec<_> = params.iter().filter_map(|param| lock(&param.0.pack).clone()).collect();
        if let Some((pack, _)) = packs.first()
            && packs.len() == params.len()
            && packs.iter().zip(&begins).all(|((one, at), begin)| one.id() == pack.id() && at == begin)
            && (pack.dtype(), pack.dims()[0]) == (dtype, sizes.iter().sum())
        {
            return Ok(pack.clone());
        }
        let values = params.iter().map(|param| param.value().to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
        let pack = Tensor::cat(&values, 0)?.detach();
        for ((param, &size), &begin) in params.iter().zip(&sizes).zip(&begins) {
            let part = pack.narrow(0, begin, size)?.detach();
            if param.value().dtype() == dtype {
                *param.0.value.write().unwrap_or_else(PoisonError::into_inner) = part;
            } else {
                *lock(&param.0.narrow) = Some(part);
            }
            *lock(&param.0.pack) = Some((pack.clone(), begin));
        }
        Ok(pack)
    }

    /// Shape of the weight.
    pub fn dims(&self) -> Vec<usize> {
        self.value().dims().to_vec()
    }

    /// Where the weight lies.
    pub(crate) fn device(&self) -> Device {
        self.value().device().clone()
    }

    /// Whether the weight takes part in training.
    pub fn is_trainable(&self) -> bool {
        self.0.tag.is_variable()
    }

    /// The marker that an operation passes to candle in place of the weight.
    pub(crate) fn tag(&self) -> &Tensor {
        &self.0.tag
    }

    /// The gradient gathered since it was last taken, f32, of the weight's shape.
    pub fn grad(&self) -> Option<Tensor> {
        lock(&self.0.grad).clone()
    }

    /// Takes the gradient out, leaving none.
    pub fn take_grad(&self) -> Option<Tensor> {
        lock(&self.0.grad).take()
    }

    /// Adds to the gradient. Does nothing for a frozen weight.
    pub fn add_grad(&self, grad: Tensor) -> Result<()> {
        if !self.is_trainable() {
            return Ok(());
        }
        let grad = grad.to_dtype(DType::F32)?.detach();
        let mut slot = lock(&self.0.grad);
        let sum = match slot.take() {
            Some(before) => (before + grad)?,
            None => grad,
        };
        *slot = Some(sum);
        Ok(())
    }

    /// Replaces the value, keeping shape and dtype.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        let old = self.value();
        if old.dims() != value.dims() {
            candle_core::bail!("{}: wanted {:?}, got {:?}", self.name(), old.dims(), value.dims());
        }
        let value = value.to_dtype(old.dtype())?.to_device(old.device())?.contiguous()?.detach();
        *self.0.value.write().unwrap_or_else(PoisonError::into_inner) = value;
        self.value_changed();
        Ok(())
    }

    /// Forgets what was derived from the value; called after the value was changed in place.
    pub(crate) fn value_changed(&self) {
        *lock(&self.0.narrow) = None;
        *lock(&self.0.pack) = None;
    }
}

/// A poisoned lock means a panic elsewhere; the tensor inside is whole all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
