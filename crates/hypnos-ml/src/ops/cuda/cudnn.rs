//! Convolution by cuDNN.
//!
//! Only algorithms that sum the products as they stand and in a fixed order: those that transform them (Winograd, FFT)
//! round differently, and those that add with atomics give other bits each time. f32 is f32 throughout, and its factors
//! are rounded to TF32 only on a device that is told to.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cudnn::result::CudnnError;
use candle_core::cuda_backend::cudarc::cudnn::{
    ConvBackwardData, ConvBackwardFilter, ConvBiasActivationForward, ConvDescriptor, ConvForward, Cudnn,
    CudnnDataType, FilterDescriptor, TensorDescriptor, sys,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, DeviceId};
use candle_core::{StorageRef, WithDType};
use half::bf16;
use sys::cudnnConvolutionBwdDataAlgo_t as ToInput;
use sys::cudnnConvolutionBwdFilterAlgo_t as ToWeight;
use sys::cudnnConvolutionFwdAlgo_t as Forward;

use super::{Buffer, CudaDevice, DType, Result, Storage, Tensor, allows_tf32, bail};
use crate::ops::conv2d::{Conv, Conv2dSpec};

/// Most bytes of scratch memory an algorithm may ask for.
const WORKSPACE_BYTES_MOST: usize = 1 << 30;

/// In the order in which they are tried.
const FORWARD: [Forward; 2] = [
    Forward::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
    Forward::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM,
];
/// The one that adds a bias without an activation.
const FORWARD_PLUS: [Forward; 1] = [Forward::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM];
const TO_INPUT: [ToInput; 1] = [ToInput::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1];
const TO_WEIGHT: [ToWeight; 1] = [ToWeight::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1];

/// The algorithm for a shape and its scratch memory in bytes; `None` where cuDNN has none.
type Plan<A> = Option<(A, usize)>;
type Plans<A> = HashMap<(Conv, DType), Plan<A>>;

/// A handle and what was asked of it before. cuDNN's handles stay on the thread that made them.
struct Session {
    handle: Arc<Cudnn>,
    /// Whether the factors of f32 convolutions are rounded to TF32.
    tf32: bool,
    forward: Plans<Forward>,
    forward_plus: Plans<Forward>,
    to_input: Plans<ToInput>,
    to_weight: Plans<ToWeight>,
}

impl Session {
    fn new(device: &CudaDevice) -> Result<Self> {
        Ok(Self {
            handle: Cudnn::new(device.cuda_stream())?,
            tf32: allows_tf32(device),
            forward: HashMap::new(),
            forward_plus: HashMap::new(),
            to_input: HashMap::new(),
            to_weight: HashMap::new(),
        })
    }
}

thread_local! {
    static SESSIONS: RefCell<HashMap<DeviceId, Session>> = RefCell::default();
}

/// Calls `f` with this thread's session on the device.
fn with_session<T>(device: &CudaDevice, f: impl FnOnce(&mut Session) -> Result<T>) -> Result<T> {
    SESSIONS.with_borrow_mut(|sessions| match sessions.entry(device.id()) {
        Entry::Occupied(mut known) => f(known.get_mut()),
        Entry::Vacant(place) => f(place.insert(Session::new(device)?)),
    })
}

/// The first of `algorithms` that cuDNN has for the shape within [`WORKSPACE_BYTES_MOST`].
fn plan<A: Copy>(
    algorithms: &[A],
    size: impl Fn(A) -> std::result::Result<usize, CudnnError>,
) -> Result<Plan<A>> {
    for &algorithm in algorithms {
        match size(algorithm) {
            Ok(bytes) if bytes <= WORKSPACE_BYTES_MOST => return Ok(Some((algorithm, bytes))),
            Ok(_) => {}
            Err(error) if is_unsupported(error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// The statuses from 3000 say in different words that something is not supported.
fn is_unsupported(error: CudnnError) -> bool {
    (error.0 as u32) / 1000 == 3
}

/// What cuDNN wants to know of a convolution that is evenly padded.
struct Descriptors<T> {
    conv: ConvDescriptor<f32>,
    x: TensorDescriptor<T>,
    w: FilterDescriptor<T>,
    y: TensorDescriptor<T>,
}

/// What a tensor's elements must be for cuDNN.
trait Element: CudnnDataType + CudaDType + DeviceRepr + WithDType {
    /// How cuDNN multiplies them.
    fn math(tf32: bool) -> sys::cudnnMathType_t;
}

impl Element for f32 {
    fn math(tf32: bool) -> sys::cudnnMathType_t {
        if tf32 { sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH } else { sys::cudnnMathType_t::CUDNN_FMA_MATH }
    }
}

impl Element for bf16 {
    fn math(_: bool) -> sys::cudnnMathType_t {
        sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH
    }
}

impl<T: Element> Descriptors<T> {
    fn new(session: &Session, conv: &Conv) -> Result<Self> {
        let handle = &session.handle;
        let whole = |dims: [usize; 4]| dims.map(|n| n as i32);
        let (stride, pad) = (conv.spec.stride as i32, conv.spec.before as i32);
        let format = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW;
        let mode = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let mut descriptor = handle.create_conv2d::<f32>([pad, pad], [stride, stride], [1, 1], mode)?;
        descriptor.set_math_type(T::math(session.tf32))?;
        Ok(Self {
            conv: descriptor,
            x: handle.create_4d_tensor(format, whole([conv.b, conv.c, conv.h, conv.w]))?,
            w: handle.create_4d_filter(format, whole([conv.o, conv.c, conv.kh, conv.kw]))?,
            y: handle.create_4d_tensor(format, whole([conv.b, conv.o, conv.oh, conv.ow]))?,
        })
    }
}

/// A convolution whose padding is the same on all sides, and its input: cuDNN knows no other.
fn evenly_padded(x: &Tensor, conv: &Conv) -> Result<(Tensor, Conv)> {
    let Conv2dSpec { stride, before, after } = conv.spec;
    if before == after {
        return Ok((x.detach(), *conv));
    }
    let x = x.detach().pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
    Ok((x.contiguous()?, widened(conv, stride)))
}

/// The sizes of a convolution whose padding has become part of its input.
fn widened(conv: &Conv, stride: usize) -> Conv {
    let more = conv.spec.before + conv.spec.after;
    Conv { h: conv.h + more, w: conv.w + more, spec: Conv2dSpec::padded(stride, 0), ..*conv }
}

/// A tensor's elements on the GPU.
struct Elements<'a>(StorageRef<'a>, usize);

impl<'a> Elements<'a> {
    fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self(storage, layout.start_offset())
    }

    fn get<T: Element>(&self) -> Result<CudaView<'_, T>> {
        match &*self.0 {
            Storage::Cuda(storage) => Ok(storage.as_cuda_slice::<T>()?.slice(self.1..)),
            _ => bail!("cuDNN: wanted a tensor on the GPU"),
        }
    }
}

/// Scratch memory.
fn workspace(device: &CudaDevice, bytes: usize) -> Result<CudaSlice<u8>> {
    // SAFETY: cuDNN writes what it reads there. The driver refuses to allocate nothing.
    unsafe { device.alloc::<u8>(bytes.max(1)) }
}

/// `x` convolved with `weight`; `None` if cuDNN has no algorithm for the shape.
pub(super) fn value(x: &Tensor, weight: &Tensor, conv: &Conv) -> Result<Option<Buffer>> {
    match x.dtype() {
        DType::F32 => value_of::<f32>(x, weight, conv),
        DType::BF16 => value_of::<bf16>(x, weight, conv),
        other => bail!("conv2d: wanted f32 or bf16 on the GPU, got {other:?}"),
    }
}

fn value_of<T: Element>(x: &Tensor, weight: &Tensor, conv: &Conv) -> Result<Option<Buffer>> {
    let device = x.device().as_cuda_device()?;
    let (x, conv) = evenly_padded(x, conv)?;
    with_session(device, |session| {
        let Descriptors { conv: convolution, x: x_shape, w, y: y_shape } =
            &Descriptors::<T>::new(session, &conv)?;
        let operation = ConvForward { conv: convolution, x: x_shape, w, y: y_shape };
        let plan = match session.forward.get(&(conv, T::DTYPE)) {
            Some(&known) => known,
            None => plan(&FORWARD, |algorithm| operation.get_workspace_size(algorithm))?,
        };
        session.forward.insert((conv, T::DTYPE), plan);
        let Some((algorithm, bytes)) = plan else { return Ok(None) };
        let mut y = Buffer::new(device, conv.out_dims(), T::DTYPE)?;
        let (x, weight) = (Elements::of(&x), Elements::of(weight));
        let (mut scratch, factors) = (workspace(device, bytes)?, (T::from_f64(1.0), T::from_f64(0.0)));
        let to = y.storage.as_cuda_slice_mut::<T>()?;
        // SAFETY: the descriptors were made from the sizes that these tensors have.
        unsafe {
            operation.launch(
                algorithm,
                Some(&mut scratch),
                factors,
                &x.get::<T>()?,
                &weight.get::<T>()?,
                to,
            )?;
        }
        Ok(Some(y))
    })
}

/// `x` convolved with `weight`, and `bias` `[O]` and `more`, as large as the result, added before it is rounded; all of
/// one dtype. `None` if cuDNN cannot do that for the shape.
pub(super) fn value_plus(
    x: &Tensor,
    weight: &Tensor,
    added: (&Tensor, Option<&Tensor>),
    conv: &Conv,
) -> Result<Option<Buffer>> {
    match x.dtype() {
        DType::F32 => value_plus_of::<f32>(x, weight, added, conv),
        DType::BF16 => value_plus_of::<bf16>(x, weight, added, conv),
        other => bail!("conv2d: wanted f32 or bf16 on the GPU, got {other:?}"),
    }
}

/// Memory that another owner frees, until it is dropped.
struct Borrowed<T>(Option<CudaSlice<T>>);

impl<T> Drop for Borrowed<T> {
    fn drop(&mut self) {
        self.0.take().map(CudaSlice::leak);
    }
}

fn value_plus_of<T: Element>(
    x: &Tensor,
    weight: &Tensor,
    (bias, more): (&Tensor, Option<&Tensor>),
    conv: &Conv,
) -> Result<Option<Buffer>> {
    let device = x.device().as_cuda_device()?;
    let (x, conv) = evenly_padded(x, conv)?;
    with_session(device, |session| {
        let Descriptors { conv: convolution, x: x_shape, w, y: y_shape } =
            &Descriptors::<T>::new(session, &conv)?;
        let format = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW;
        let bias_shape = &session.handle.create_4d_tensor::<T>(format, [1, conv.o as i32, 1, 1])?;
        let (mode, nan) = (
            sys::cudnnActivationMode_t::CUDNN_ACTIVATION_IDENTITY,
            sys::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN,
        );
        let act = &session.handle.create_activation::<f32>(mode, nan, 0.0)?;
        let operation = ConvBiasActivationForward {
            conv: convolution,
            act,
            x: x_shape,
            w,
            z: y_shape,
            bias: bias_shape,
            y: y_shape,
        };
        let plan = match session.forward_plus.get(&(conv, T::DTYPE)) {
            Some(&known) => known,
            None => plan(&FORWARD_PLUS, |algorithm| operation.get_workspace_size(algorithm))?,
        };
        session.forward_plus.insert((conv, T::DTYPE), plan);
        let Some((algorithm, bytes)) = plan else { return Ok(None) };
        let mut y = Buffer::new(device, conv.out_dims(), T::DTYPE)?;
        // cuDNN wants an address even if there is nothing to add: it gets the result's, which it does not read.
        // SAFETY: it is as long as the buffer, which lives longer and frees it alone.
        let own = unsafe { device.cuda_stream().upgrade_device_ptr::<T>(y.address, y.len()) };
        let own = Borrowed(Some(own));
        let (x, weight, bias) = (Elements::of(&x), Elements::of(weight), Elements::of(bias));
        let more = more.map(Elements::of);
        let z = match (&more, &own.0) {
            (Some(more), _) => more.get::<T>()?,
            (None, Some(own)) => own.slice(..),
            (None, None) => bail!("conv2d: the result has no address"),
        };
        let share = if more.is_some() { 1.0 } else { 0.0 };
        let (mut scratch, factors) = (workspace(device, bytes)?, (T::from_f64(1.0), T::from_f64(share)));
        let (x, weight, bias) = (x.get::<T>()?, weight.get::<T>()?, bias.get::<T>()?);
        let to = y.storage.as_cuda_slice_mut::<T>()?;
        // SAFETY: the descriptors were made from the sizes that these tensors have.
        let launched =
            unsafe { operation.launch(algorithm, Some(&mut scratch), factors, &x, &weight, &z, &bias, to) };
        match launched {
            Ok(()) => Ok(Some(y)),
            // It says so no earlier.
            Err(error) if is_unsupported(error) => {
                session.forward_plus.insert((conv, T::DTYPE), None);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    })
}

/// The gradient of the weight, all three f32; `None` if cuDNN has no algorithm for the shape. From bf16 it makes bf16.
pub(super) fn weight_gradient(x: &Tensor, dy: &Tensor, conv: &Conv) -> Result<Option<Buffer>> {
    let device = x.device().as_cuda_device()?;
    let (x, conv) = evenly_padded(x, conv)?;
    with_session(device, |session| {
        let Descriptors { conv: convolution, x: x_shape, w, y } = &Descriptors::<f32>::new(session, &conv)?;
        let operation = ConvBackwardFilter { conv: convolution, x: x_shape, dw: w, dy: y };
        let plan = match session.to_weight.get(&(conv, DType::F32)) {
            Some(&known) => known,
            None => plan(&TO_WEIGHT, |algorithm| operation.get_workspace_size(algorithm))?,
        };
        session.to_weight.insert((conv, DType::F32), plan);
        let Some((algorithm, bytes)) = plan else { return Ok(None) };
        let mut dw = Buffer::new(device, (conv.o, conv.c, conv.kh, conv.kw), DType::F32)?;
        let (x, dy) = (Elements::of(&x), Elements::of(dy));
        let (mut scratch, factors) = (workspace(device, bytes)?, (1.0, 0.0));
        let to = dw.storage.as_cuda_slice_mut::<f32>()?;
        // SAFETY: the descriptors were made from the sizes that these tensors have.
        unsafe {
            operation.launch(
                algorithm,
                Some(&mut scratch),
                factors,
                &x.get::<f32>()?,
                to,
                &dy.get::<f32>()?,
            )?;
        }
        Ok(Some(dw))
    })
}

/// The gradient of the input; `None` if cuDNN has no algorithm for the shape.
pub(super) fn input_gradient(dy: &Tensor, weight: &Tensor, conv: &Conv) -> Result<Option<Buffer>> {
    let wide = if conv.spec.before == conv.spec.after { *conv } else { widened(conv, conv.spec.stride) };
    let dx = match dy.dtype() {
        DType::F32 => input_gradient_of::<f32>(dy, weight, &wide)?,
        DType::BF16 => input_gradient_of::<bf16>(dy, weight, &wide)?,
        other => bail!("conv2d: wanted f32 or bf16 on the GPU, got {other:?}"),
    };
    match dx {
        Some(dx) if wide != *conv => Ok(Some(without_padding(dx, conv)?)),
        dx => Ok(dx),
    }
}

/// Cuts the padding off a gradient again.
fn without_padding(dx: Buffer, conv: &Conv) -> Result<Buffer> {
    let before = conv.spec.before;
    let dx = dx.tensor().narrow(2, before, conv.h)?.narrow(3, before, conv.w)?.contiguous()?;
    match dx.storage_and_layout().0.try_clone(dx.layout())? {
        Storage::Cuda(storage) => Buffer::of(storage, dx.shape().clone(), dx.dtype()),
        _ => bail!("conv2d: the gradient left the GPU"),
    }
}

fn input_gradient_of<T: Element>(dy: &Tensor, weight: &Tensor, conv: &Conv) -> Result<Option<Buffer>> {
    let device = dy.device().as_cuda_device()?;
    with_session(device, |session| {
        let Descriptors { conv: convolution, x, w, y } = &Descriptors::<T>::new(session, conv)?;
        let operation = ConvBackwardData { conv: convolution, dx: x, w, dy: y };
        let plan = match session.to_input.get(&(*conv, T::DTYPE)) {
            Some(&known) => known,
            None => plan(&TO_INPUT, |algorithm| operation.get_workspace_size(algorithm))?,
        };
        session.to_input.insert((*conv, T::DTYPE), plan);
        let Some((algorithm, bytes)) = plan else { return Ok(None) };
        let mut dx = Buffer::new(device, (conv.b, conv.c, conv.h, conv.w), T::DTYPE)?;
        let (dy, weight) = (Elements::of(dy), Elements::of(weight));
        let (mut scratch, factors) = (workspace(device, bytes)?, (T::from_f64(1.0), T::from_f64(0.0)));
        let to = dx.storage.as_cuda_slice_mut::<T>()?;
        // SAFETY: the descriptors were made from the sizes that these tensors have.
        unsafe {
            operation.launch(
                algorithm,
                Some(&mut scratch),
                factors,
                to,
                &weight.get::<T>()?,
                &dy.get::<T>()?,
            )?;
        }
        Ok(Some(dx))
    })
}
