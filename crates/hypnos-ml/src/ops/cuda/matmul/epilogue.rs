//! Matrix products by cuBLASLt, which adds a bias and another matrix before it rounds and writes the result.
//!
//! Only algorithms that add their parts in f32: the same rule as for the products without.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;

use candle_core::Error;
use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use sys::cublasLtMatmulDescAttributes_t as ProductAttribute;
use sys::cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute;
use sys::cublasLtMatrixLayoutAttribute_t as LayoutAttribute;

use super::{Call, CudaDevice, DType, Mat, Result, Size, View, WrapErr, allows_tf32, bail};

/// Most bytes of scratch memory an algorithm may ask for: what NVIDIA advises for Hopper.
const WORKSPACE_BYTES_MOST: u64 = 32 << 20;

/// `to = a b + bias + more`, matrix by matrix, where `bias` has one number for each column and `more` lies as `to` does.
/// All are of one dtype. False, and nothing done, if cuBLASLt has no algorithm for it.
///
/// The matrices must lie within their tensors: the callers' sizes say so.
pub(in crate::ops::cuda) fn product_and(
    device: &CudaDevice,
    to: Mat,
    size: Size,
    (a, b): (Mat, Mat),
    (bias, more): (Option<&View>, Option<&View>),
) -> Result<bool> {
    let added = [(bias, size.n), (more, size.batch * size.m * size.n)];
    let wrong = |(view, len): &(Option<&View>, usize)| {
        view.is_some_and(|view| view.dtype != to.dtype || view.len != *len)
    };
    if a.dtype != to.dtype || b.dtype != to.dtype || added.iter().any(wrong) {
        bail!("a product with something added: wanted {:?} and sizes as of the result", to.dtype);
    }
    if size.batch == 0 || size.m == 0 || size.n == 0 {
        return Ok(true);
    }
    device.cuda_stream().context().bind_to_thread().w()?;
    let call = Call::new(to, size, a, b)?;
    let tf32 = to.dtype == DType::F32 && allows_tf32(device);
    let operation = Operation::new(&call, to.dtype, tf32, bias)?;
    with_session(device, |session| {
        let key = Key::new(&call, (to.dtype, tf32), bias, more);
        let plan = match session.plans.get(&key) {
            Some(&known) => known,
            None => operation.plan(session, key.alignment)?,
        };
        session.plans.insert(key, plan);
        let Some(plan) = plan else { return Ok(false) };
        operation.run(device, session, &plan, (&call, more))?;
        Ok(true)
    })
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    transposed: [bool; 2],
    sizes: [i32; 4],
    rows: [i32; 3],
    strides: [i64; 3],
    dtype: DType,
    tf32: bool,
    has_bias: bool,
    has_more: bool,
    /// Bytes that divide every address.
    alignment: u32,
}

impl Key {
    fn new(call: &Call, (dtype, tf32): (DType, bool), bias: Option<&View>, more: Option<&View>) -> Self {
        let added = bias.into_iter().chain(more).map(|view| view.address);
        let addresses = call.address.into_iter().chain(added);
        let alignment = 1 << addresses.fold(8, |least: u32, address| least.min(address.trailing_zeros()));
        Self {
            transposed: call.transposed,
            sizes: [call.batch, call.m, call.n, call.k],
            rows: call.row,
            strides: call.stride,
            dtype,
            tf32,
            has_bias: bias.is_some(),
            has_more: more.is_some(),
            alignment,
        }
    }
}

/// An algorithm and its scratch memory in bytes; `None` where cuBLASLt has none.
type Plan = Option<(sys::cublasLtMatmulAlgo_t, usize)>;

/// A handle and what was asked of it before.
struct Session {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Key, Plan>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: the handle is this session's own. An error here could not be acted on.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

thread_local! {
    static SESSIONS: RefCell<HashMap<DeviceId, Session>> = RefCell::default();
}

/// Calls `f` with this thread's session on the device.
fn with_session<T>(device: &CudaDevice, f: impl FnOnce(&mut Session) -> Result<T>) -> Result<T> {
    SESSIONS.with_borrow_mut(|sessions| match sessions.entry(device.id()) {
        Entry::Occupied(mut known) => f(known.get_mut()),
        Entry::Vacant(place) => {
            let handle = result::create_handle().map_err(Error::wrap)?;
            f(place.insert(Session { handle, plans: HashMap::new() }))
        }
    })
}

/// One of cuBLASLt's descriptions, destroyed at the end.
struct Description<T: Copy>(T, unsafe fn(T) -> std::result::Result<(), CublasError>);

impl<T: Copy> Drop for Description<T> {
    fn drop(&mut self) {
        // SAFETY: the description is this value's own. An error here could not be acted on.
        let _ = unsafe { self.1(self.0) };
    }
}

type Layout = Description<sys::cublasLtMatrixLayout_t>;

/// The call as cuBLASLt wants it described: `to = a b + more`, all by columns.
struct Operation {
    product: Description<sys::cublasLtMatmulDesc_t>,
    a: Layout,
    b: Layout,
    to: Layout,
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => bail!("no matrix product of {other:?}; wanted f32 or bf16"),
    }
}

/// Makes a layout one of `batch` matrices, `stride` elements apart.
fn stack(layout: &Layout, batch: i32, stride: i64) -> Result<()> {
    if batch == 1 {
        return Ok(());
    }
    let set = |attribute: LayoutAttribute, value: *const c_void, bytes: usize| {
        // SAFETY: the layout is alive, and `value` points to as many bytes, which are the attribute's type.
        unsafe { result::set_matrix_layout_attribute(layout.0, attribute, value, bytes) }.map_err(Error::wrap)
    };
    let (batch, stride) = (&raw const batch, &raw const stride);
    set(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, batch.cast(), size_of::<i32>())?;
    set(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, stride.cast(), size_of::<i64>())
}

impl Operation {
    fn new(call: &Call, dtype: DType, tf32: bool, bias: Option<&View>) -> Result<Self> {
        let dtype = data_type(dtype)?;
        // Of factor or result number `which`.
        let layout = |which: usize, transposed: bool, rows: i32, cols: i32| -> Result<Layout> {
            let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
            let row = i64::from(call.row[which]);
            let made = result::create_matrix_layout(dtype, rows as u64, cols as u64, row);
            let layout: Layout = Description(made.map_err(Error::wrap)?, result::destroy_matrix_layout);
            stack(&layout, call.batch, call.stride[which])?;
            Ok(layout)
        };
        let [a_transposed, b_transposed] = call.transposed;
        // Both sum in f32; the FAST one rounds f32 factors to TF32.
        let compute = if tf32 {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let product = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F);
        let product = product.map_err(Error::wrap)?;
        let operation = Self {
            product: Description(product, result::destroy_matmul_desc),
            a: layout(0, a_transposed, call.m, call.k)?,
            b: layout(1, b_transposed, call.k, call.n)?,
            to: layout(2, false, call.m, call.n)?,
        };
        let [a, b] = call.transposed.map(i32::from); // CUBLAS_OP_T is 1
        operation.set(ProductAttribute::CUBLASLT_MATMUL_DESC_TRANSA, &a)?;
        operation.set(ProductAttribute::CUBLASLT_MATMUL_DESC_TRANSB, &b)?;
        if let Some(bias) = bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            operation.set(ProductAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            operation.set(ProductAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.address)?;
        }
        Ok(operation)
    }

    fn set<T: Copy>(&self, attribute: ProductAttribute, value: &T) -> Result<()> {
        let bytes = std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the description is alive, and `value` is of the type that the attribute has.
        unsafe { result::set_matmul_desc_attribute(self.product.0, attribute, bytes, size_of::<T>()) }
            .map_err(Error::wrap)
    }

    /// The algorithm that cuBLASLt thinks the fastest.
    fn plan(&self, session: &Session, alignment: u32) -> Result<Plan> {
        let made = result::create_matmul_pref().map_err(Error::wrap)?;
        let preference = Description(made, result::destroy_matmul_pref);
        let set = |attribute: PreferenceAttribute, value: *const c_void, bytes: usize| {
            // SAFETY: the preference is alive, and `value` points to as many bytes, which are the attribute's type.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, value, bytes) }
                .map_err(Error::wrap)
        };
        let most = std::ptr::from_ref(&WORKSPACE_BYTES_MOST).cast();
        set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, most, size_of::<u64>())?;
        let in_f32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let scheme = std::ptr::from_ref(&in_f32).cast();
        set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme, size_of::<u32>())?;
        for attribute in [
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            set(attribute, std::ptr::from_ref(&alignment).cast(), size_of::<u32>())?;
        }
        let Self { product, a, b, to } = self;
        // SAFETY: all descriptions are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(session.handle, product.0, a.0, b.0, to.0, to.0, preference.0)
        };
        match found {
            Ok(found) => Ok(Some((found.algo, found.workspaceSize))),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(Error::wrap(error)),
        }
    }

    fn run(
        &self,
        device: &CudaDevice,
        session: &Session,
        (algorithm, bytes): &(sys::cublasLtMatmulAlgo_t, usize),
        (call, more): (&Call, Option<&View>),
    ) -> Result<()> {
        let stream = device.cuda_stream();
        // SAFETY: cuBLASLt writes what it reads there. The driver refuses to allocate nothing.
        let scratch = unsafe { device.alloc::<u8>((*bytes).max(1)) }?;
        let [a, b, to] = call.address;
        // If nothing else is added, beta is 0 and the old result is not read.
        let (alpha, beta) = (1.0_f32, if more.is_some() { 1.0_f32 } else { 0.0 });
        let more = more.map_or(to, |more| more.address);
        // SAFETY: the addresses are those of views and buffers that the caller holds, as long as the descriptions say;
        // alpha and beta are f32, as the descriptions say. The scratch memory is freed in the stream's order.
        unsafe {
            result::matmul(
                session.handle,
                self.product.0,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                a as *const c_void,
                self.a.0,
                b as *const c_void,
                self.b.0,
                more as *const c_void,
                self.to.0,
                to as *mut c_void,
                self.to.0,
                algorithm,
                scratch.device_ptr(&stream).0 as *mut c_void,
                *bytes,
                stream.cu_stream().cast(),
            )
            .map_err(Error::wrap)
        }
    }
}
