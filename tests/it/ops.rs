//! Every operation against PyTorch's, outputs and gradients.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor};
use hypnos::ml::ops::{self, Activation, AdamW, AdamWConfig, Conv2dSpec, MomentFormat};
use hypnos::ml::param::Param;
use serde_json::Value;

use crate::golden::{Golden, Place, assert_close, trained, variable};

/// Runs `op` on the inputs of `case`, once as they are and once with strides that are not contiguous, and compares the
/// output and the gradient of `sum(out * w)` for every input and parameter.
fn check(
    place: &Place,
    case: &str,
    inputs: &[&str],
    params: &[&str],
    op: impl Fn(&[Tensor], &[Param]) -> Result<Tensor>,
) {
    let golden = Golden::open("ops");
    let get = |name: &str| golden.get(&format!("input.{case}.{name}"));
    for strided in [false, true] {
        let variables: Vec<_> = inputs.iter().map(|name| variable(&place.input(&get(name)))).collect();
        let arguments: Vec<Tensor> =
            variables.iter().map(|v| if strided { odd_strides(v) } else { v.as_tensor().clone() }).collect();
        let weights: Vec<Param> =
            params.iter().map(|name| trained(name, &place.weight(&get(name)))).collect();
        let y = op(&arguments, &weights).expect("the operation works");
        assert_close(
            &format!("{case} out"),
            &y,
            &golden.get(&format!("output.{case}.out")),
            place.operation.0,
        );
        let w = place.input(&get("w")).to_dtype(y.dtype()).expect("the result's dtype");
        let grads = (y * w).and_then(|y| y.sum_all()).and_then(|y| y.backward()).expect("a backward");
        for (name, variable) in inputs.iter().zip(&variables) {
            let grad = grads.get(variable).unwrap_or_else(|| panic!("{case}: {name} got no gradient"));
            assert_close(
                &format!("{case} {name}"),
                grad,
                &golden.get(&format!("grad.{case}.{name}")),
                place.operation.1,
            );
        }
        for weight in &weights {
            let grad = weight.grad().unwrap_or_else(|| panic!("{case}: {} got no gradient", weight.name()));
            let wanted = golden.get(&format!("grad.{case}.{}", weight.name()));
            assert_close(&format!("{case} {}", weight.name()), &grad, &wanted, place.operation.1);
        }
    }
}

/// The same values behind transposed strides.
fn odd_strides(x: &Tensor) -> Tensor {
    let last = x.rank() - 1;
    if last == 0 {
        return x.clone();
    }
    let swapped = x.transpose(0, last).and_then(|x| x.contiguous()).expect("a transpose");
    let back = swapped.transpose(0, last).expect("a transpose");
    assert!(x.dims()[0] == 1 || x.dims()[last] == 1 || !back.is_contiguous());
    back
}

fn settings(case: &str) -> Value {
    Golden::open("ops").metadata::<HashMap<String, Value>>("settings").remove(case).expect("settings")
}

fn spec(case: &str) -> Conv2dSpec {
    let settings = settings(case);
    let stride = settings["stride"].as_u64().expect("a stride") as usize;
    if let Some(padding) = settings["padding"].as_u64() {
        return Conv2dSpec::padded(stride, padding as usize);
    }
    // left, right, top, bottom
    assert_eq!(settings["padding"], serde_json::json!([0, 1, 0, 1]));
    Conv2dSpec { stride, before: 0, after: 1 }
}

#[test]
fn convolution_agrees_with_torch() {
    convolution(&Place::cpu());
}

pub(crate) fn convolution(place: &Place) {
    for case in [
        "conv1",
        "conv3",
        "conv3_s2",
        "conv3_s2_asym",
        "conv3_s2_asym_even",
        "conv3_s2_even",
        "conv3_wide",
        "conv5",
        "conv5_s2",
    ] {
        let spec = spec(case);
        check(place, case, &["x"], &["weight", "bias"], |x, w| ops::conv2d(&x[0], &w[0], Some(&w[1]), spec));
    }
    let spec = spec("conv3_nobias");
    check(place, "conv3_nobias", &["x"], &["weight"], |x, w| ops::conv2d(&x[0], &w[0], None, spec));
}

#[test]
fn depthwise_convolution_agrees_with_torch() {
    depthwise_convolution(&Place::cpu());
}

pub(crate) fn depthwise_convolution(place: &Place) {
    for case in ["depthwise3_s1", "depthwise3_s2", "depthwise5_s1", "depthwise5_s2"] {
        let spec = spec(case);
        check(place, case, &["x"], &["weight", "bias"], |x, w| {
            ops::depthwise_conv2d(&x[0], &w[0], Some(&w[1]), spec)
        });
    }
}

#[test]
fn a_linear_layer_agrees_with_torch() {
    linear(&Place::cpu());
}

pub(crate) fn linear(place: &Place) {
    check(place, "linear", &["x"], &["weight", "bias"], |x, w| ops::linear(&x[0], &w[0], Some(&w[1])));
    check(place, "linear_flat", &["x"], &["weight"], |x, w| ops::linear(&x[0], &w[0], None));
}

#[test]
fn norms_agree_with_torch() {
    norms(&Place::cpu());
}

pub(crate) fn norms(place: &Place) {
    let eps = |case| settings(case)["eps"].as_f64().expect("eps");
    check(place, "layer_norm", &["x"], &["weight", "bias"], |x, w| {
        ops::layer_norm(&x[0], &w[0], &w[1], eps("layer_norm"))
    });
    for (case, silu) in [("group_norm", false), ("group_norm_silu", true)] {
        let groups = settings(case)["groups"].as_u64().expect("groups") as usize;
        check(place, case, &["x"], &["weight", "bias"], |x, w| {
            ops::group_norm(&x[0], &w[0], &w[1], groups, eps(case), silu)
        });
    }
}

#[test]
fn attention_agrees_with_torch() {
    attention(&Place::cpu());
}

pub(crate) fn attention(place: &Place) {
    for (case, causal) in [("attention_self", false), ("attention_causal", true), ("attention_cross", false)]
    {
        check(place, case, &["q", "k", "v"], &[], |x, _| {
            // The reference has the heads in a dimension of their own: [B, N, L, K].
            let (b, n, l, width) = x[0].dims4()?;
            let merge = |x: &Tensor| x.transpose(1, 2)?.flatten_from(2);
            let y = ops::attention(&merge(&x[0])?, &merge(&x[1])?, &merge(&x[2])?, n, causal)?;
            y.reshape((b, l, n, width))?.transpose(1, 2)
        });
    }
}

#[test]
fn activations_agree_with_torch() {
    activations(&Place::cpu());
}

pub(crate) fn activations(place: &Place) {
    for (case, activation) in
        [("gelu", Activation::Gelu), ("quick_gelu", Activation::QuickGelu), ("silu", Activation::Silu)]
    {
        // The reference takes three times the input, so that the tails are seen too.
        check(place, case, &["x"], &[], |x, _| ops::activate(&(&x[0] * 3.0)?, activation));
    }
    check(place, "geglu", &["x"], &[], |x, _| ops::geglu(&x[0]));
    let scale = settings("softmax")["scale"].as_f64().expect("a scale");
    check(place, "softmax", &["x"], &[], |x, _| ops::softmax(&(&x[0] * scale)?));
}

#[test]
fn upsampling_agrees_with_torch() {
    upsampling(&Place::cpu());
}

pub(crate) fn upsampling(place: &Place) {
    for case in ["upsample_double", "upsample_odd", "upsample_uneven"] {
        let (_, _, h, w) = Golden::open("ops").get(&format!("output.{case}.out")).dims4().expect("a picture");
        check(place, case, &["x"], &[], |x, _| ops::upsample_nearest(&x[0], (h, w)));
    }
}

#[test]
fn an_embedding_sums_the_gradients_of_repeated_ids() {
    embedding(&Place::cpu());
}

pub(crate) fn embedding(place: &Place) {
    let golden = Golden::open("ops");
    let ids = golden.rows("input.embedding.ids").concat();
    let dims = golden.get("input.embedding.ids").dims().to_vec();
    check(place, "embedding", &[], &["table"], |_, w| ops::embedding(&ids, &dims, &w[0]));
}

#[test]
fn adamw_agrees_with_torch_over_five_clipped_steps() {
    adamw(&Place::cpu());
}

pub(crate) fn adamw(place: &Place) {
    let golden = Golden::open("ops");
    let names = ["p0", "p1", "p2"];
    let params: Vec<Param> = names
        .iter()
        .map(|name| trained(name, &place.weight(&golden.get(&format!("input.adamw.{name}")))))
        .collect();
    let config = AdamWConfig { lr: 0.01, ..AdamWConfig::default() };
    let mut adamw = AdamW::new(params.clone(), config).expect("an optimiser");
    let norms = golden.numbers("output.adamw.norm");
    for (step, &wanted) in norms.iter().enumerate() {
        for param in &params {
            let grad = golden.get(&format!("input.adamw.grad_{}", param.name())).get(step).expect("a step");
            push_gradient(param, &place.weight(&grad));
        }
        let norm = adamw.step().expect("a step");
        assert!((norm - wanted).abs() <= 1e-5 * wanted, "norm {norm}, wanted {wanted}");
        for param in &params {
            let wanted = golden.get(&format!("output.adamw.{}", param.name())).get(step).expect("a step");
            assert_close(&format!("{} after step {step}", param.name()), &param.value(), &wanted, 1e-5);
        }
    }
}

#[test]
fn adamw_with_moments_in_8_bits_is_as_near_to_f32_as_that_of_bitsandbytes() {
    adamw_in_8_bits(&Place::cpu());
}

pub(crate) fn adamw_in_8_bits(place: &Place) {
    let golden = Golden::open("adamw8");
    let (weight, grads) = (golden.get("weight"), golden.get("gradient"));
    let param = trained("p", &place.weight(&weight));
    let moments = MomentFormat::Bits8;
    let config = AdamWConfig { lr: 1e-3, max_norm: None, moments, ..AdamWConfig::default() };
    let mut adamw = AdamW::new([param.clone()], config).expect("an optimiser");
    for step in 0..grads.dims()[0] {
        push_gradient(&param, &place.weight(&grads.get(step).expect("a step")));
        adamw.step().expect("a step");
    }
    let found = param.value().to_device(&Device::Cpu).and_then(|x| x.to_vec1::<f32>()).expect("values");
    let [theirs, exact] = ["adamw8", "adamw"].map(|name| golden.get(name).to_vec1::<f32>().expect("values"));
    let distance = |a: &[f32], b: &[f32]| {
        let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let (ours, bound) = (distance(&found, &exact), distance(&theirs, &exact));
    assert!(ours <= bound && ours > 0.1 * bound, "{ours:.2e} from f32, theirs {bound:.2e}");
    assert!(distance(&found, &theirs) <= bound, "{:.2e} from theirs", distance(&found, &theirs));
}

/// Gives a weight a gradient the only way there is: through a graph.
fn push_gradient(param: &Param, grad: &Tensor) {
    let rows = param.value().elem_count();
    let flat = trained(param.name(), &param.value().reshape((rows, 1)).expect("a column"));
    let ids: Vec<u32> = (0..rows as u32).collect();
    let y = ops::embedding(&ids, &[rows], &flat).expect("an embedding");
    let loss = (y * grad.reshape((rows, 1)).expect("a column")).and_then(|y| y.sum_all()).expect("a sum");
    loss.backward().expect("a backward");
    let grad = flat.take_grad().expect("a gradient").reshape(param.dims()).expect("its shape");
    param.add_grad(grad).expect("a gradient of the weight's shape");
}

#[test]
fn adamw_resumed_from_saved_moments_equals_an_uninterrupted_run() {
    saved_moments(&Place::cpu());
}

pub(crate) fn saved_moments(place: &Place) {
    saved_moments_of(place, 3, MomentFormat::F32);
    saved_moments_of(place, 4400, MomentFormat::Bits8);
}

fn saved_moments_of(place: &Place, n: usize, moments: MomentFormat) {
    let config = AdamWConfig { moments, ..AdamWConfig::default() };
    let numbers = |step: usize| -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + step * 101) % 211) as f32 / 105.0 - 1.0).map(|x| x.powi(3)).collect()
    };
    let values = Tensor::new(numbers(7), &place.device).expect("a tensor");
    let grads = [1, 2, 3].map(numbers);
    let run = |stop_after: Option<usize>| {
        let param = trained("p", &values);
        let mut adamw = AdamW::new([param.clone()], config).expect("an optimiser");
        for (i, grad) in grads.iter().enumerate() {
            if stop_after == Some(i) {
                let (moments, n_steps) = (adamw.moments("p").expect("moments"), adamw.n_steps());
                adamw = AdamW::new([param.clone()], config).expect("an optimiser");
                adamw.restore(n_steps, |_| Ok(moments.clone())).expect("moments that fit");
            }
            push_gradient(&param, &Tensor::new(&grad[..], &place.device).expect("a tensor"));
            adamw.step().expect("a step");
        }
        param.value().to_vec1::<f32>().expect("values")
    };
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(run(None)), bits(run(Some(2))));
}

#[test]
fn the_optimiser_refuses_a_weight_without_a_gradient() {
    let param =
        trained("conv_in.weight", &Tensor::ones(3, candle_core::DType::F32, &Device::Cpu).expect("ones"));
    let mut adamw = AdamW::new([param.clone()], AdamWConfig::default()).expect("an optimiser");
    let error = adamw.step().expect_err("no gradient").to_string();
    assert!(error.contains("conv_in.weight got no gradient"), "{error}");
    assert_eq!(adamw.n_steps(), 0);
}

#[test]
fn a_frozen_weight_costs_no_gradient() {
    frozen_weight(&Place::cpu());
}

pub(crate) fn frozen_weight(place: &Place) {
    let x = Tensor::ones((2, 3), candle_core::DType::F32, &place.device).expect("ones");
    let weight = Param::new("w", x.clone(), false).expect("a parameter");
    let y = ops::linear(&x, &weight, None).expect("a layer");
    assert!(!y.track_op(), "nothing here is trained, so nothing is recorded");
    let input = variable(&x);
    let y = ops::linear(&input, &weight, None).and_then(|y| y.sum_all()).expect("a layer");
    let grads = y.backward().expect("a backward");
    assert!(grads.get(&input).is_some() && weight.grad().is_none());
    assert_eq!(grads.get_ids().count(), 1);
}

#[test]
fn a_checkpointed_block_has_the_same_gradients() {
    checkpoint(&Place::cpu());
}

pub(crate) fn checkpoint(place: &Place) {
    let golden = Golden::open("ops");
    let get = |name: &str| place.weight(&golden.get(&format!("input.linear.{name}")));
    let run = |checkpointed: bool, tracked: bool| {
        let (weight, bias) = (trained("weight", &get("weight")), trained("bias", &get("bias")));
        let x = variable(&get("x"));
        let input = if tracked { x.as_tensor().clone() } else { get("x") };
        let (w, b) = (weight.clone(), bias.clone());
        let block = move |x: &[Tensor]| ops::activate(&ops::linear(&x[0], &w, Some(&b))?, Activation::Silu);
        let y = if checkpointed { ops::checkpoint(&[&input], block) } else { block(&[input]) };
        let grads =
            y.and_then(|y| y.sqr()).and_then(|y| y.sum_all()).and_then(|y| y.backward()).expect("a backward");
        let mut all = vec![weight.grad().expect("a gradient"), bias.grad().expect("a gradient")];
        all.extend(grads.get(&x).cloned());
        assert_eq!(all.len(), if tracked { 3 } else { 2 });
        all.iter()
            .map(|g| g.flatten_all().and_then(|g| g.to_vec1::<f32>()).expect("values"))
            .collect::<Vec<_>>()
    };
    for tracked in [true, false] {
        assert_eq!(run(false, tracked), run(true, tracked));
    }
}
