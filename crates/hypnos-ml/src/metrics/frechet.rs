//! The Fréchet distance of two sets of features, each taken for a normal distribution (Heusel et al. 2017, arXiv
//! 1706.08500, eq. 6). In f64.

use nalgebra::DMatrix;

use super::features::{Features, shared_width};
use crate::{Error, Result};

/// `|m - w|^2 + tr(C + D - 2 (C D)^1/2)` of the means and covariances (over n - 1) of the rows of `a` and of `b`: FID
/// where they are Inception's. At least 0, and 0 for equal sets; its range depends on the features, so numbers of two
/// backbones, or of different n, are not to be compared.
///
/// With fewer rows than features, as with a few photos, the covariances are singular and the number is exact all the
/// same, but says little of the distributions. [`Error::Input`] for fewer than two rows of either, for widths that
/// differ, or for rows that are not finite.
///
/// Departure: the trace of the root is the sum of the singular values of `A B^T`, where C is `A^T A` and D is `B^T B`:
/// the same number, since that matrix's squared singular values are the eigenvalues of `C D`. pytorch-fid takes the
/// root of the product itself, which is no longer accurate where it is singular, and adds 1e-6 to both diagonals where
/// it fails.
pub fn frechet(a: &Features, b: &Features) -> Result<f64> {
    shared_width("Fréchet distance", (a, 2), (b, 2))?;
    let ((mean_a, a), (mean_b, b)) = (centred(a), centred(b));
    let between_means: f64 = mean_a.iter().zip(&mean_b).map(|(a, b)| (a - b).powi(2)).sum();
    let trace = a.norm_squared() + b.norm_squared();
    let shared = singular_values_sum(narrowed(a) * narrowed(b).transpose())?;
    Ok((between_means + trace - 2.0 * shared).max(0.0))
}

/// The mean of the rows, and the matrix `A` `[n, D]` whose `A^T A` is their covariance.
fn centred(features: &Features) -> (Vec<f64>, DMatrix<f64>) {
    let (n, width) = (features.values.len(), features.values[0].len());
    let value = |i: usize, j: usize| f64::from(features.values[i][j]);
    let mean: Vec<f64> = (0..width).map(|j| (0..n).map(|i| value(i, j)).sum::<f64>() / n as f64).collect();
    let root = ((n - 1) as f64).sqrt();
    let rows = DMatrix::from_fn(n, width, |i, j| (value(i, j) - mean[j]) / root);
    (mean, rows)
}

/// A matrix with the same `A^T A` and no more rows than columns.
fn narrowed(a: DMatrix<f64>) -> DMatrix<f64> {
    if a.nrows() > a.ncols() { a.qr().r() } else { a }
}

fn singular_values_sum(m: DMatrix<f64>) -> Result<f64> {
    let most = 200 * m.nrows().max(m.ncols());
    match m.try_svd(false, false, f64::EPSILON, most) {
        Some(svd) => Ok(svd.singular_values.sum()),
        None => Err(Error::input(
            "Fréchet distance: the singular values were not found; the features are too large",
        )),
    }
}
