//! Quantiles of measured values.

/// The values at these shares of the sorted order, 0 the smallest and 1 the largest; NaN of no values.
pub(super) fn quantiles<const N: usize>(values: &[f64], shares: [f64; N]) -> [f64; N] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1) as f64;
    shares.map(|share| sorted.get((last * share).round() as usize).copied().unwrap_or(f64::NAN))
}
