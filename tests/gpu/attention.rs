//! The fused attention: its widths beside the CPU in f32, and what must not change a bit of it.
//!
//! The sizes are small, for the software device is slow, but each kernel has a case with rows that do not fill its last
//! tile.

use candle_core::{DType, Device, Result, Tensor, Var};
use hypnos::ml::{ops, random};

use crate::golden::{Place, assert_close, variable};

#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    heads: usize,
    width: usize,
    queries: usize,
    keys: usize,
    causal: bool,
}

const fn case(batch: usize, heads: usize, width: usize, queries: usize, keys: usize) -> Case {
    Case { batch, heads, width, queries, keys, causal: false }
}

/// With 77 keys, the text's, and with more than the 128 that have kernels of their own.
const CASES: [Case; 9] = [
    case(2, 2, 40, 70, 77),
    case(1, 1, 40, 140, 140),
    Case { causal: true, ..case(2, 1, 64, 77, 77) },
    Case { causal: true, ..case(1, 1, 64, 140, 140) },
    case(1, 2, 80, 70, 77),
    case(1, 1, 80, 20, 140),
    case(1, 2, 160, 70, 77),
    case(2, 1, 160, 10, 33),
    case(1, 1, 512, 37, 77),
];

impl Case {
    fn name(&self) -> String {
        let Self { batch, heads, width, queries, keys, causal } = self;
        let causal = if *causal { ", causal" } else { "" };
        format!("{batch} x {heads} heads of {width}, {queries} queries, {keys} keys{causal}")
    }

    /// Queries, keys, values and the gradient of the result: numbers that bf16 has, in f32 on the CPU.
    fn numbers(&self) -> [Tensor; 4] {
        let drawn = |(stream, n): (u64, usize)| -> Result<Tensor> {
            let dims = (self.batch, n, self.heads * self.width);
            let values = random::normal(self.width as u64, stream, dims.0 * dims.1 * dims.2);
            Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)
        };
        let (queries, keys) = (self.queries, self.keys);
        [(0, queries), (1, keys), (2, keys), (3, queries)].map(|of| drawn(of).expect("numbers"))
    }

    fn run(&self, [q, k, v]: [&Tensor; 3]) -> Tensor {
        ops::attention(q, k, v, self.heads, self.causal).expect("attention")
    }

    /// The result, and the gradients of those inputs that are `wanted`.
    fn pass(&self, numbers: &[Tensor; 4], wanted: [bool; 3]) -> (Tensor, [Option<Tensor>; 3]) {
        let [q, k, v, dy] = numbers;
        let variables: Vec<Option<Var>> =
            [q, k, v].iter().zip(wanted).map(|(x, wanted)| wanted.then(|| variable(x))).collect();
        let input = |i: usize| variables[i].as_ref().map_or(&numbers[i], Var::as_tensor);
        let y = self.run([input(0), input(1), input(2)]);
        let grads = (&y * dy).and_then(|y| y.sum_all()).and_then(|y| y.backward()).expect("a backward");
        let grad = |i: usize| variables[i].as_ref().map(|x| grads.get(x).expect("a gradient").clone());
        (y.detach(), [grad(0), grad(1), grad(2)])
    }
}

/// Results and gradients beside those of the CPU in f32.
pub(crate) fn widths(place: &Place) {
    for case in CASES {
        let numbers = case.numbers();
        let (wanted, wanted_grads) = case.pass(&numbers, [true; 3]);
        let (y, grads) = case.pass(&numbers.map(|x| place.input(&x)), [true; 3]);
        assert_eq!(y.dtype(), place.dtype);
        assert_close(&format!("{} out", case.name()), &y, &wanted, place.operation.0);
        for ((name, grad), wanted) in ["q", "k", "v"].iter().zip(&grads).zip(&wanted_grads) {
            let (grad, wanted) = (grad.as_ref().expect("a gradient"), wanted.as_ref().expect("a gradient"));
            assert_close(&format!("{} {name}", case.name()), grad, wanted, place.operation.1);
        }
    }
}

/// Gradients are the same whichever others are wanted beside them.
pub(crate) fn wanted_gradients(place: &Place) {
    for case in [case(1, 2, 40, 20, 33), case(1, 1, 160, 20, 33)] {
        let numbers = case.numbers().map(|x| place.input(&x));
        let (y, all) = case.pass(&numbers, [true; 3]);
        for wanted in [[true, false, false], [false, true, false], [false, false, true], [false, true, true]]
        {
            let (again, some) = case.pass(&numbers, wanted);
            same(&case, &again, &y);
            for ((some, all), wanted) in some.iter().zip(&all).zip(wanted) {
                assert_eq!(some.is_some(), wanted);
                some.iter().zip(all).for_each(|(some, all)| same(&case, some, all));
            }
        }
    }
}

/// Numbers that begin where no kernel reads them, and those that do not lie side by side.
pub(crate) fn views(place: &Place) {
    let case = case(1, 2, 40, 20, 33);
    let numbers = case.numbers().map(|x| place.input(&x));
    let (y, grads) = case.pass(&numbers, [true; 3]);
    let seen: [fn(&Tensor) -> Result<Tensor>; 2] = [
        |x| {
            let flat = x.flatten_all()?;
            let longer = Tensor::cat(&[&flat.narrow(0, 0, 1)?, &flat], 0)?;
            longer.narrow(0, 1, flat.elem_count())?.reshape(x.dims())
        },
        |x| x.transpose(1, 2)?.contiguous()?.transpose(1, 2),
    ];
    for view in seen {
        let [q, k, v, dy] = &numbers;
        let variables = [q, k, v].map(variable);
        let [q, k, v] = [0, 1, 2].map(|i| view(&variables[i]).expect("a view"));
        let again = case.run([&q, &k, &v]);
        same(&case, &again, &y);
        let grads_again = (&again * view(dy).expect("a view")).and_then(|y| y.sum_all()?.backward());
        let grads_again = grads_again.expect("a backward");
        for (variable, grad) in variables.iter().zip(&grads) {
            let (again, grad) = (grads_again.get(variable), grad.as_ref());
            same(&case, again.expect("a gradient"), grad.expect("a gradient"));
        }
    }
}

pub(crate) fn two_types(place: &Place) {
    let [q, k, v, _] = case(1, 2, 40, 20, 33).numbers();
    let error = ops::attention(&place.input(&q), &place.input(&k), &place.weight(&v), 2, false);
    let error = error.expect_err("bf16 and f32").to_string();
    assert!(error.starts_with("attention: wanted q, k and v of one dtype, got [BF16, BF16, F32]"), "{error}");
}

/// Fails unless both have the same bits.
fn same(case: &Case, actual: &Tensor, wanted: &Tensor) {
    let bits = |x: &Tensor| -> Vec<u32> {
        let values = x.to_dtype(DType::F32).and_then(|x| x.flatten_all()?.to_vec1::<f32>()).expect("numbers");
        values.into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(actual.dims(), wanted.dims());
    assert!(bits(actual) == bits(wanted), "{}: other bits", case.name());
}
