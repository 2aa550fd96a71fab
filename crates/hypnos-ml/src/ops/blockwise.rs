//! Numbers in 8 bits, block by block, for the moments of AdamW (Dettmers et al. 2022, arXiv 2110.02861).
//!
//! A block of 256 numbers has one scale, its number of largest magnitude; each number is a code, the nearest of 256
//! values times the scale. The values are those of bitsandbytes (`functional.create_dynamic_map`): seven decades, and
//! in each twice as many values as in the one below.
//!
//! Departure: the scale has a sign. In bitsandbytes it has none and 1 is a value, but -1 is not, so a block whose
//! largest number is negative loses 0.7 per cent of it. Here that number is exact, and numbers that were read back and
//! are stored again are the same: a training can be continued from its checkpoint to the bit.
//!
//! Departure: a positive second moment never becomes zero. A step is divided by its root.
//!
//! Departure: a first moment whose nearest value is zero becomes zero, whatever its sign. On a GPU bitsandbytes gives a
//! negative one the next value below zero, to keep its sign, but a positive one zero: small moments lean to one side.
//! On a CPU, which tests/golden/adamw8.safetensors is from, it has no such rule.

use std::sync::LazyLock;

/// Numbers of a block.
pub(super) const BLOCK: usize = 256;

/// The values of the codes, increasing.
pub(super) type Values = [f32; 256];

/// For numbers of both signs: -0.993 to 1, with 0.
pub(super) static SIGNED: LazyLock<Values> = LazyLock::new(|| values(true));

/// For numbers that are not negative: 0 to 1.
pub(super) static UNSIGNED: LazyLock<Values> = LazyLock::new(|| values(false));

fn values(signed: bool) -> Values {
    let mut values = vec![0.0, 1.0];
    for decade in 0..7 {
        let n = if signed { 1 << decade } else { 2 << decade };
        let size = 10_f64.powi(decade - 6);
        for i in 0..n {
            // The middle of one of n equal parts of 0.1 to 1.
            let value = size * (0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(n));
            values.push(value as f32);
            if signed {
                values.push(-value as f32);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("twice 127 values, or 254, and the two")
}

/// Numbers in 8 bits: a code for each, a scale for each block.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Blocks {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
    pub(super) values: &'static Values,
}

impl Blocks {
    /// So many zeros.
    pub(super) fn zeros(n: usize, values: &'static Values) -> Self {
        Self { codes: vec![zero(values); n], scales: vec![0.0; n.div_ceil(BLOCK)], values }
    }

    /// These numbers, each within half a step of the values.
    pub(super) fn of(numbers: &[f32], values: &'static Values) -> Self {
        let mut blocks = Self::zeros(numbers.len(), values);
        for ((numbers, codes), scale) in
            numbers.chunks(BLOCK).zip(blocks.codes.chunks_mut(BLOCK)).zip(&mut blocks.scales)
        {
            *scale = encode(numbers, codes, values);
        }
        blocks
    }

    pub(super) fn to_f32(&self) -> Vec<f32> {
        let scales = self.scales.iter().zip(self.codes.chunks(BLOCK));
        scales
            .flat_map(|(scale, codes)| codes.iter().map(move |&code| self.values[usize::from(code)] * scale))
            .collect()
    }
}

/// The code of zero.
fn zero(values: &Values) -> u8 {
    if values[0] < 0.0 { 127 } else { 0 }
}

/// Writes the codes of a block and returns its scale. Numbers are finite.
pub(super) fn encode(numbers: &[f32], codes: &mut [u8], values: &Values) -> f32 {
    let (low, high) = numbers.iter().fold((0.0_f32, 0.0_f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let scale = if high >= -low { high } else { low };
    for (code, x) in codes.iter_mut().zip(numbers) {
        *code = if scale == 0.0 { zero(values) } else { nearest(x / scale, values) };
        if *x > 0.0 && values[0] == 0.0 {
            *code = (*code).max(1);
        }
    }
    scale
}

/// The code whose value is nearest to `x`, which is at most 1; the larger of two.
fn nearest(x: f32, values: &Values) -> u8 {
    let mut code = 0;
    for step in [128, 64, 32, 16, 8, 4, 2, 1] {
        if values[code + step] <= x {
            code += step;
        }
    }
    if code < 255 && values[code + 1] - x <= x - values[code] {
        code += 1;
    }
    code as u8
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::tensorfile::TensorFile;

    fn numbers(n: usize) -> Vec<f32> {
        // Spread over decades and signs, without a generator.
        (0..n)
            .map(|i| ((i * 7919 % 1009) as f32 / 504.5 - 1.0).powi(5) * if i % 3 == 0 { -3.0 } else { 2.0 })
            .collect()
    }

    #[test]
    fn the_values_are_those_of_bitsandbytes() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/adamw8.safetensors");
        let golden = TensorFile::open(Path::new(golden)).expect("a golden");
        for (name, values) in [("code.signed", &*SIGNED), ("code.unsigned", &*UNSIGNED)] {
            let wanted = golden.read(name).expect("values");
            assert_eq!(wanted.len(), values.len());
            for (wanted, value) in wanted.iter().zip(values) {
                assert!((wanted - value).abs() <= 1e-6 * wanted.abs(), "{name}: {value}, wanted {wanted}");
            }
        }
    }

    #[test]
    fn what_was_read_back_is_stored_as_it_was() {
        for (values, numbers) in [
            (&*SIGNED, numbers(1000)),
            (&*UNSIGNED, numbers(1000).iter().map(|x| x * x).collect()),
            (&*SIGNED, vec![-1.0, 1.0, 0.5]),
            (&*UNSIGNED, vec![0.0; 300]),
        ] {
            let stored = Blocks::of(&numbers, values);
            assert_eq!(Blocks::of(&stored.to_f32(), values), stored);
        }
    }

    #[test]
    fn each_number_gets_the_nearest_value() {
        for values in [&*SIGNED, &*UNSIGNED] {
            for i in 0..=2000 {
                let x = if values[0] < 0.0 { i as f32 / 1000.0 - 1.0 } else { i as f32 / 2000.0 };
                let distance = |code: u8| (values[usize::from(code)] - x).abs();
                let best = (0..=255).map(distance).fold(f32::INFINITY, f32::min);
                assert!(distance(nearest(x, values)) <= best, "{x}");
            }
        }
    }

    #[test]
    fn the_largest_number_of_a_block_is_exact_whatever_its_sign() {
        for sign in [1.0, -1.0] {
            let mut numbers = numbers(256);
            numbers[77] = sign * 12.345_678;
            assert_eq!(Blocks::of(&numbers, &SIGNED).to_f32()[77].to_bits(), numbers[77].to_bits());
        }
    }

    #[test]
    fn a_small_first_moment_becomes_zero_whatever_its_sign() {
        let read = Blocks::of(&[1.0, 2e-7, -2e-7], &SIGNED).to_f32();
        assert!(read[1..].iter().all(|x| x.abs() < f32::MIN_POSITIVE), "{read:?}");
    }

    #[test]
    fn a_positive_second_moment_never_becomes_zero() {
        let read = Blocks::of(&[1.0, 1e-12, 0.0], &UNSIGNED).to_f32();
        assert!(read[1] > 0.0 && read[2].abs() < f32::MIN_POSITIVE, "{read:?}");
    }
}
