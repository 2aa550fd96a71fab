//! Operations that a GPU fuses, beside the CPU, which computes one after the other.

use candle_core::{DType, Device, Result, Tensor};
use hypnos::ml::ops::{self, AdamW, AdamWConfig, Conv2dSpec, MomentFormat};
use hypnos::ml::param::Param;

use crate::golden::{Place, assert_close, trained, variable};

/// The same numbers every time, within -1 and 1.
fn numbers(dims: &[usize], seed: u32) -> Tensor {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).expect("a tensor")
}

/// What an operation gives, and the gradients of all that it takes.
fn outcome(
    place: &Place,
    inputs: &[Tensor],
    params: &[Tensor],
    op: impl Fn(&[Tensor], &[Param]) -> Result<Tensor>,
) -> Vec<Tensor> {
    let variables: Vec<_> = inputs.iter().map(|input| variable(&place.input(input))).collect();
    let arguments: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    let weights: Vec<Param> = params.iter().map(|param| trained("p", &place.weight(param))).collect();
    let y = op(&arguments, &weights).expect("the operation works");
    let w = place.input(&numbers(y.dims(), 99));
    let grads = (&y * w).and_then(|y| y.sum_all()).and_then(|y| y.backward()).expect("a backward");
    let of_inputs = variables.iter().map(|variable| grads.get(variable).expect("a gradient").clone());
    let of_weights = weights.iter().map(|weight| weight.grad().expect("a gradient"));
    [y.detach()].into_iter().chain(of_inputs).chain(of_weights).collect()
}

/// Holds the outcome at `place` against the CPU's.
fn compare(
    place: &Place,
    what: &str,
    shapes: (&[&[usize]], &[&[usize]]),
    op: impl Fn(&[Tensor], &[Param]) -> Result<Tensor>,
) {
    let drawn = |shapes: &[&[usize]], seed: u32| -> Vec<Tensor> {
        shapes.iter().zip(seed..).map(|(shape, seed)| numbers(shape, seed)).collect()
    };
    let (inputs, params) = (drawn(shapes.0, 1), drawn(shapes.1, 51));
    let wanted = outcome(&Place::cpu(), &inputs, &params, &op);
    let ours = outcome(place, &inputs, &params, &op);
    for (i, (ours, wanted)) in ours.iter().zip(&wanted).enumerate() {
        let tolerance = if i == 0 { place.operation.0 } else { place.operation.1 };
        assert_close(&format!("{what}, {i}"), ours, wanted, tolerance);
    }
}

pub(crate) fn products(place: &Place) {
    for (rows, wide) in [(5, 6), (64, 48)] {
        let (x, residual) = ([2, rows, wide], [2, rows, 7]);
        compare(place, "linear_plus", (&[&residual, &x], &[&[7, wide], &[7]]), |x, w| {
            ops::linear_plus(&x[0], &x[1], &w[0], Some(&w[1]))
        });
        compare(place, "linear_plus without a bias", (&[&residual, &x], &[&[7, wide]]), |x, w| {
            ops::linear_plus(&x[0], &x[1], &w[0], None)
        });
    }
}

/// Frozen weights of two shapes, by which a GPU multiplies one input together: held in f32, or in what is computed in.
pub(crate) fn shared_input(place: &Place) {
    let of = |place: &Place, is_narrow: bool| -> Vec<Tensor> {
        let frozen = |dims: &[usize], seed| {
            let value = place.weight(&numbers(dims, seed));
            let value = if is_narrow { value.to_dtype(place.dtype).expect("a dtype") } else { value };
            Param::new("p", value, false).expect("a parameter")
        };
        let weights = [(7, 1), (4, 2), (7, 3)].map(|(n, seed)| frozen(&[n, 6], seed));
        let biases = [(7, 11), (4, 12), (7, 13)].map(|(n, seed)| {
            Param::new("b", place.weight(&numbers(&[n], seed)), false).expect("a parameter")
        });
        let all = weights.each_ref();
        let layers: Vec<(&Param, &Param)> = all.into_iter().zip(&biases).collect();
        let (x, row) = (place.input(&numbers(&[2, 5, 6], 4)), place.input(&numbers(&[2, 6], 6)));
        let before = ops::linear(&x, &weights[1], None).expect("a layer");
        let products = ops::linears(&x, &all).expect("layers");
        let after = ops::linear(&x, &weights[1], None).expect("a layer");
        let changed = place.weight(&numbers(&[7, 6], 5));
        weights[0].set(&changed).expect("a value of its shape");
        let again = ops::linears(&x, &all).expect("layers");
        let reversed = ops::linears(&x, &[all[2], all[1], all[0]]).expect("layers");
        let columns = ops::linear_columns(&row, &layers).expect("layers");
        let picture = place.input(&numbers(&[2, 4, 5, 3], 7));
        let norm =
            [8, 9].map(|seed| Param::new("n", place.weight(&numbers(&[4], seed)), false).expect("one"));
        let shifted = ops::group_norm_shifted(&picture, &columns[1], (&norm[0], &norm[1]), 2, 1e-5, true);
        let lists = [vec![before, after, shifted.expect("a norm")], products, again, reversed, columns];
        lists.concat()
    };
    for is_narrow in [false, true] {
        for (i, (ours, wanted)) in of(place, is_narrow).iter().zip(of(&Place::cpu(), false)).enumerate() {
            assert_close(&format!("linears, {i}"), ours, &wanted, place.operation.0);
        }
    }
}

pub(crate) fn projections(place: &Place) {
    for (h, w) in [(3, 5), (8, 8)] {
        let (picture, tokens) = ([2, 6, h, w], [2, h * w, 6]);
        compare(place, "picture_to_tokens", (&[&picture], &[&[7, 6], &[7]]), |x, w| {
            ops::picture_to_tokens(&x[0], &w[0], Some(&w[1]))
        });
        compare(place, "tokens_to_picture", (&[&[2, 7, h, w], &tokens], &[&[7, 6], &[7]]), |x, w| {
            ops::tokens_to_picture(&x[0], &x[1], &w[0], Some(&w[1]))
        });
        compare(place, "concat", (&[&picture, &[2, 3, h, w]], &[]), |x, _| ops::concat(&x[0], &x[1]));
    }
}

pub(crate) fn convolutions(place: &Place) {
    let x = [2, 3, 9, 8];
    for (kernel, stride, residual) in [(3, 1, [2, 5, 9, 8]), (3, 2, [2, 5, 5, 4]), (1, 1, [2, 5, 9, 8])] {
        let spec = Conv2dSpec::padded(stride, kernel / 2);
        let weight = [5, 3, kernel, kernel];
        compare(place, "conv2d_plus", (&[&residual, &x], &[&weight, &[5]]), |x, w| {
            ops::conv2d_plus(&x[0], &x[1], &w[0], Some(&w[1]), spec)
        });
        compare(place, "conv2d_plus without a bias", (&[&residual, &x], &[&weight]), |x, w| {
            ops::conv2d_plus(&x[0], &x[1], &w[0], None, spec)
        });
    }
}

pub(crate) fn norms(place: &Place) {
    // Groups that one block takes, four elements at a time or one, and one that is cut into parts.
    for (h, w) in [(6, 6), (5, 3), (160, 160)] {
        for silu in [false, true] {
            compare(place, "group_norm", (&[&[2, 4, h, w]], &[&[4], &[4]]), |x, w| {
                ops::group_norm(&x[0], &w[0], &w[1], 2, 1e-5, silu)
            });
            compare(place, "group_norm_shifted", (&[&[2, 4, h, w], &[2, 4]], &[&[4], &[4]]), |x, w| {
                ops::group_norm_shifted(&x[0], &x[1], (&w[0], &w[1]), 2, 1e-5, silu)
            });
        }
    }
}

/// What is computed with after a step of AdamW is the new weight: it changes its copy in what is computed in as well.
pub(crate) fn stepped_weight(place: &Place) {
    for moments in [MomentFormat::F32, MomentFormat::Bits8] {
        let weight = trained("p", &place.weight(&numbers(&[70, 60], 1)));
        let x = place.input(&numbers(&[3, 60], 2));
        let config = AdamWConfig { lr: 0.1, moments, ..AdamWConfig::default() };
        let mut adamw = AdamW::new([weight.clone()], config).expect("an optimiser");
        let product = |weight: &Param| ops::linear(&x, weight, None).expect("a layer");
        let bits = |y: Tensor| {
            let y = y.flatten_all().and_then(|y| y.to_dtype(DType::F32)).and_then(|y| y.to_vec1::<f32>());
            y.expect("values").into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let before = product(&weight);
        before.sum_all().and_then(|sum| sum.backward()).expect("a backward");
        adamw.step().expect("a step");
        let fresh = Param::new("p", weight.value(), false).expect("a parameter");
        let after = bits(product(&weight));
        assert_eq!(after, bits(product(&fresh)));
        assert_ne!(after, bits(before));
    }
}
