//! Smallest, median and largest.

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of no values: three times NaN.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
        let n = sorted.len();
        let median = f64::midpoint(at(n.saturating_sub(1) / 2), at(n / 2));
        Self { min: at(0), median, max: at(n.saturating_sub(1)) }
    }
}

#[test]
fn the_median_of_an_even_number_lies_between_the_middle_two() {
    assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 8.0]), Spread { min: 1.0, median: 3.0, max: 8.0 });
    assert_eq!(Spread::of(&[4.0, 1.0, 2.0]), Spread { min: 1.0, median: 2.0, max: 4.0 });
    assert_eq!(Spread::of(&[5.0]), Spread { min: 5.0, median: 5.0, max: 5.0 });
}
