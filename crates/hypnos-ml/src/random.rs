//! Random numbers that are a pure function of (seed, stream, index): Philox4x32-10.
//!
//! A counter-based generator has no state to carry, save or race for: the n-th number of a stream is computed from
//! n, so a picture's noise does not depend on its neighbours in the batch, and a resumed training draws what the
//! uninterrupted one would have drawn. This module does not decide who draws what: callers make one seed per
//! purpose with [`derive()`] and number their streams (a picture, a step) themselves.
//! Numbers drawn by two functions from the same seed and stream share their bits; give each purpose its own seed.
//!
//! Not for secrets. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123).

use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// Numbers that one thread draws at a time; a multiple of the four of a block.
const RUN: usize = 1 << 14;

/// Standard normal numbers, mean 0 and variance 1: the first `n` of stream `stream` of `seed`.
///
/// The first n of a longer draw are the shorter draw. Box and Muller 1958, in f64 and then rounded; finite, and
/// within ±6.8 because a uniform number has 32 bits here.
pub fn normal(seed: u64, stream: u64, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n];
    out.par_chunks_mut(RUN).enumerate().for_each(|(run, values)| {
        for (block, four) in values.chunks_mut(4).enumerate() {
            let [a, b, c, d] = words(seed, (run * RUN / 4 + block) as u64, stream);
            let ([a, b], [c, d]) = (box_muller(a, b), box_muller(c, d));
            four.copy_from_slice(&[a, b, c, d][..four.len()]);
        }
    });
    out
}

/// Uniform numbers in [0, 1), multiples of 2⁻²⁴: the first `n` of stream `stream` of `seed`.
pub fn uniform(seed: u64, stream: u64, n: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(n + 3);
    for block in 0..n.div_ceil(4) {
        out.extend(words(seed, block as u64, stream).map(|w| (w >> 8) as f32 / (1 << 24) as f32));
    }
    out.truncate(n);
    out
}

/// The `i`-th integer of stream `stream` of `seed`, uniform in 0..`n` with no modulo bias; 0 where `n` is 0 or 1.
///
/// `i` below 2⁴⁸. Lemire 2019 (arXiv 1805.10941): multiply, keep the high half, reject the few products that would
/// make some numbers likelier. A rejected draw takes the next block of its own, so draws stay independent of i ± 1.
pub fn below(seed: u64, stream: u64, i: u64, n: usize) -> usize {
    let n = n as u64;
    if n < 2 {
        return 0;
    }
    let reject_below = n.wrapping_neg() % n; // 2^64 mod n
    let mut block = i;
    loop {
        let [a, b, c, d] = words(seed, block, stream);
        for candidate in [pair(a, b), pair(c, d)] {
            let product = u128::from(candidate) * u128::from(n);
            if (product as u64) >= reject_below {
                return (product >> 64) as usize;
            }
        }
        block = block.wrapping_add(1 << 48);
    }
}

/// A seed for one purpose, made from another seed and a name: the first 8 bytes of SHA-256(seed, label).
///
/// Different labels (and different seeds) give unrelated generators, so a new purpose never shifts an old one.
pub fn derive(seed: u64, label: &str) -> u64 {
    let hash = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(label.as_bytes()).finalize();
    hash[..8].iter().rev().fold(0, |acc, &byte| acc << 8 | u64::from(byte))
}

/// One block: 128 random bits, the cipher of `block` and `stream` under `seed`.
fn words(seed: u64, block: u64, stream: u64) -> [u32; 4] {
    let [key_lo, key_hi] = halves(seed);
    let [block_lo, block_hi] = halves(block);
    let [stream_lo, stream_hi] = halves(stream);
    philox4x32_10([block_lo, block_hi, stream_lo, stream_hi], [key_lo, key_hi])
}

/// Philox4x32 with 10 rounds, Salmon et al. 2011; multipliers and key steps are theirs.
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let [lo0, hi0] = halves(u64::from(counter[0]) * 0xD251_1F53);
        let [lo1, hi1] = halves(u64::from(counter[2]) * 0xCD9E_8D57);
        counter = [hi1 ^ counter[1] ^ key[0], lo1, hi0 ^ counter[3] ^ key[1], lo0];
    }
    counter
}

/// Two independent normal numbers from two uniform ones; the radius' uniform is never 0, so its logarithm is finite.
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    let radius = (-2.0 * unit(a).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * unit(b)).sin_cos();
    [(radius * cos) as f32, (radius * sin) as f32]
}

/// Low and high 32 bits.
fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

fn pair(lo: u32, hi: u32) -> u64 {
    u64::from(hi) << 32 | u64::from(lo)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three lines `philox4x32 10` of Random123's `kat_vectors`.
    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        let check = |counter, key, want| assert_eq!(philox4x32_10(counter, key), want);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn seed_block_and_stream_all_reach_the_cipher() {
        let first = words(1, 2, 3);
        for other in [words(2, 2, 3), words(1 << 32 | 1, 2, 3), words(1, 3, 3), words(1, 1 << 32 | 2, 3)] {
            assert_ne!(first, other);
        }
        assert_ne!(first, words(1, 2, 4));
        assert_ne!(first, words(1, 2, 1 << 32 | 3));
    }

    #[test]
    fn normal_numbers_have_the_moments_of_the_normal_distribution() {
        let n = 400_000;
        let xs = normal(7, 1, n);
        let moment = |k: i32| xs.iter().map(|&x| f64::from(x).powi(k)).sum::<f64>() / n as f64;
        // Five standard errors: 1, √2, √15 and √96 over √n.
        assert!(moment(1).abs() < 0.008, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.0112, "variance {}", moment(2));
        assert!(moment(3).abs() < 0.031, "third moment {}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.078, "fourth moment {}", moment(4));
        let beyond_3 = xs.iter().filter(|x| x.abs() > 3.0).count() as f64 / n as f64;
        assert!((beyond_3 - 0.0027).abs() < 0.0005, "beyond three sigma {beyond_3}");
    }

    #[test]
    fn neighbouring_streams_and_numbers_are_uncorrelated() {
        let n = 100_000;
        let (a, b) = (normal(7, 1, n + 1), normal(7, 2, n));
        let dot =
            |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>() / n as f64;
        assert!(dot(&a[..n], &b).abs() < 0.016, "streams {}", dot(&a[..n], &b));
        assert!(dot(&a[..n], &a[1..]).abs() < 0.016, "lag one {}", dot(&a[..n], &a[1..]));
    }

    #[test]
    fn a_shorter_draw_is_the_beginning_of_a_longer_one() {
        let (long_normal, long_uniform) = (normal(3, 9, 1000), uniform(3, 9, 1000));
        for n in [0, 1, 2, 3, 4, 5, 63, 999] {
            assert_eq!(normal(3, 9, n), long_normal[..n]);
            assert_eq!(uniform(3, 9, n), long_uniform[..n]);
        }
    }

    #[test]
    fn normal_numbers_stay_finite_at_the_ends_of_the_uniform_range() {
        for (a, b) in [(0, 0), (0, u32::MAX), (u32::MAX, 0), (u32::MAX, u32::MAX)] {
            assert!(box_muller(a, b).iter().all(|x| x.is_finite() && x.abs() < 6.8), "{a} {b}");
        }
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let n = 100_000;
        let xs = uniform(11, 0, n);
        assert!(xs.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = xs.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
        let square = xs.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.005, "mean {mean}");
        assert!((square - mean * mean - 1.0 / 12.0).abs() < 0.002, "variance {}", square - mean * mean);
    }

    #[test]
    fn integers_below_n_are_equally_frequent_and_never_reach_n() {
        let (n, draws) = (7, 70_000);
        let mut counts = vec![0_usize; n];
        for i in 0..draws {
            counts[below(5, 0, i, n)] += 1;
        }
        for (value, &count) in counts.iter().enumerate() {
            assert!((9_500..10_500).contains(&count), "{value} came {count} times of {draws}");
        }
        assert_eq!((below(5, 0, 0, 0), below(5, 0, 0, 1)), (0, 0));
    }

    /// At n = ⅔ · 2⁶⁴ a third of the candidates is rejected; taking them anyway would make every other number
    /// of the range twice as likely, and the parity below would be one third and two thirds.
    #[test]
    fn rejection_keeps_huge_ranges_unbiased() {
        let n = usize::MAX / 3 * 2;
        let draws = 20_000;
        let mean = (0..draws).map(|i| below(5, 1, i, n) as f64 / n as f64).sum::<f64>() / draws as f64;
        let odd = (0..draws).filter(|&i| below(5, 1, i, n) % 2 == 1).count() as f64 / draws as f64;
        assert!((mean - 0.5).abs() < 0.011, "mean {mean}");
        assert!((odd - 0.5).abs() < 0.018, "odd {odd}");
    }

    #[test]
    fn derived_seeds_differ_by_label_and_by_seed_and_never_change() {
        assert_ne!(derive(1, "noise"), derive(1, "timestep"));
        assert_ne!(derive(1, "noise"), derive(2, "noise"));
        // SHA-256 of 8 zero bytes begins af 55 70 f5 a1 81 0b 7a.
        assert_eq!(derive(0, ""), 0x7a0b_81a1_f570_55af);
    }
}
