//! Dense layers between pictures and tokens. A picture `[C, h w]` is the tokens' matrix `[h w, C]` transposed, which is
//! for cuBLAS a matter of how it reads.

use super::elementwise::add_bias;
use super::matmul::{Mat, Size, product, product_and};
use super::reduce::{channel_sums, column_sums};
use super::{Buffer, Computed, CudaDevice, DType, Result, Tensor, View, bail};
use crate::ops::cpu::Into;
use crate::param::Param;

/// How many pictures, of how many places, and the layer's width before and behind.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    places: usize,
    n_in: usize,
    n_out: usize,
}

impl Sizes {
    /// Of a picture as the input, or else of tokens.
    fn of(x: &Tensor, weight: &Param) -> Result<Self> {
        let (dims, (n_out, n_in)) = (x.dims(), (weight.dims()[0], weight.dims()[1]));
        match *dims {
            [b, _, h, w] => Ok(Self { b, places: h * w, n_in, n_out }),
            [b, places, _] => Ok(Self { b, places, n_in, n_out }),
            _ => bail!("wanted a picture or tokens, got {dims:?}"),
        }
    }

    /// A matrix for each picture, `[places, width]`, of tokens that lie in `mat`.
    fn tokens(&self, mat: Mat, width: usize) -> Mat {
        mat.every(self.places * width)
    }

    /// The weight's gradient, f32: the sum over pictures of `dy^T x`, both `[places, width]`.
    fn weight_gradient(&self, device: &CudaDevice, weight: &Param, dy: Mat, x: Mat) -> Result<()> {
        if !weight.is_trainable() {
            return Ok(());
        }
        let dw = Buffer::new(device, weight.dims(), DType::F32)?;
        for image in 0..self.b {
            let (n_dy, n_x) = (image * self.places * self.n_out, image * self.places * self.n_in);
            let size = Size::one(self.n_out, self.n_in, self.places);
            let factors = (dy.at(n_dy).t(), x.at(n_x));
            let into = if image == 0 { Into::Replace } else { Into::Add };
            product(device, Mat::buffer(&dw, self.n_in), into, size, factors)?;
        }
        weight.add_grad(dw.tensor())
    }
}

pub(in crate::ops) fn picture_to_tokens(
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Computed> {
    let (device, sizes) = (x.device().as_cuda_device()?, Sizes::of(x, weight)?);
    let narrow = weight.weight(x.dtype())?;
    let narrow_bias = bias.map(|bias| bias.weight(x.dtype())).transpose()?;
    let (x, narrow) = (View::of(x)?, View::of(&narrow)?);
    let narrow_bias = narrow_bias.as_ref().map(View::of).transpose()?;
    let Sizes { b, places, n_in, n_out } = sizes;
    let y = Buffer::new(device, (b, places, n_out), x.dtype)?;
    let factors = (sizes.tokens(Mat::view(&x, places).t(), n_in), Mat::view(&narrow, n_in).t());
    let (to, size) =
        (sizes.tokens(Mat::buffer(&y, n_out), n_out), Size { batch: b, m: places, n: n_out, k: n_in });
    if !product_and(device, to, size, factors, (narrow_bias.as_ref(), None))? {
        product(device, to, Into::Replace, size, factors)?;
        let bias = bias.map(Param::value);
        add_bias(device, &y, (bias.as_ref(), None), 1)?;
    }
    Ok(y.computed())
}

pub(in crate::ops) fn picture_to_tokens_backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Option<Tensor>> {
    let (device, sizes) = (x.device().as_cuda_device()?, Sizes::of(x, weight)?);
    let Sizes { b, places, n_in, n_out } = sizes;
    let (input, grad) = (View::of(x)?, View::of(dy)?);
    if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
        bias.add_grad(column_sums(device, &grad, n_out)?)?;
    }
    let dy = Mat::view(&grad, n_out);
    sizes.weight_gradient(device, weight, dy, Mat::view(&input, places).t())?;
    if !x.track_op() {
        return Ok(None);
    }
    let narrow = weight.weight(x.dtype())?;
    let narrow = View::of(&narrow)?;
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let to = sizes.tokens(Mat::buffer(&dx, places), n_in);
    let factors = (Mat::view(&narrow, n_in).t(), sizes.tokens(dy.t(), n_out));
    product(device, to, Into::Replace, Size { batch: b, m: n_in, n: places, k: n_out }, factors)?;
    Ok(Some(dx.tensor()))
}

pub(in crate::ops) fn tokens_to_picture(
    residual: &Tensor,
    x: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Computed> {
    let (device, sizes) = (x.device().as_cuda_device()?, Sizes::of(x, weight)?);
    let narrow = weight.weight(x.dtype())?;
    let (x, narrow, residual_view) = (View::of(x)?, View::of(&narrow)?, View::of(residual)?);
    let Sizes { b, places, n_in, n_out } = sizes;
    let y = Buffer::new(device, residual.dims(), x.dtype)?;
    let factors = (Mat::view(&narrow, n_in), sizes.tokens(Mat::view(&x, n_in).t(), n_in));
    let to = sizes.tokens(Mat::buffer(&y, places), n_out);
    product(device, to, Into::Replace, Size { batch: b, m: n_out, n: places, k: n_in }, factors)?;
    let bias = bias.map(Param::value);
    add_bias(device, &y, (bias.as_ref(), Some(&residual_view)), places)?;
    Ok(y.computed())
}

pub(in crate::ops) fn tokens_to_picture_backward(
    x: &Tensor,
    dy: &Tensor,
    weight: &Param,
    bias: Option<&Param>,
) -> Result<Option<Tensor>> {
    let (device, sizes) = (x.device().as_cuda_device()?, Sizes::of(x, weight)?);
    let Sizes { b, places, n_in, n_out } = sizes;
    let (input, grad) = (View::of(x)?, View::of(dy)?);
    if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
        bias.add_grad(channel_sums(device, &grad, n_out, places)?)?;
    }
    let dy = Mat::view(&grad, places).t();
    sizes.weight_gradient(device, weight, dy, Mat::view(&input, n_in))?;
    if !x.track_op() {
        return Ok(None);
    }
    let narrow = weight.weight(x.dtype())?;
    let narrow = View::of(&narrow)?;
    let dx = Buffer::new(device, x.dims(), x.dtype())?;
    let to = sizes.tokens(Mat::buffer(&dx, n_in), n_in);
    let factors = (sizes.tokens(dy, n_out), Mat::view(&narrow, n_in));
    product(device, to, Into::Replace, Size { batch: b, m: places, n: n_in, k: n_out }, factors)?;
    Ok(Some(dx.tensor()))
}
