//! Mean cosine similarity of features. In f64; -1..1, 1 for equal directions.

use super::features::{Features, shared_width};
use crate::{Error, Result};

/// The mean over all pairs of a row of `a` and a row of `b`: DINO and CLIP-I of generated against real pictures, PRES
/// of class pictures against real ones. [`Error::Input`] if either is empty, their widths differ, or a row is zero or
/// not finite.
pub fn mean_pairwise_cosine(a: &Features, b: &Features) -> Result<f64> {
    shared_width("cosine", (a, 1), (b, 1))?;
    // The mean of all products of two is the product of the means.
    let (a, b) = (mean(&directions(a)?), mean(&directions(b)?));
    Ok(dot(&a, &b))
}

/// The mean over all pairs of two different rows: how alike the pictures of one set are, real ones among themselves
/// being the upper bound of what generated ones can be. [`Error::Input`] as for [`mean_pairwise_cosine`], and for fewer
/// than two rows.
pub fn mean_self_cosine(a: &Features) -> Result<f64> {
    a.width("cosine", 2)?;
    let rows = directions(a)?;
    let n = rows.len() as f64;
    let mean = mean(&rows);
    // All pairs less those of a row with itself, which are 1 each.
    Ok((n * dot(&mean, &mean) - 1.0) / (n - 1.0))
}

/// The mean over rows at equal places: CLIP-T of pictures and their prompts. [`Error::Input`] as for
/// [`mean_pairwise_cosine`], and if there are more of one.
pub fn mean_paired_cosine(a: &Features, b: &Features) -> Result<f64> {
    shared_width("cosine", (a, 1), (b, 1))?;
    let (n, other) = (a.values.len(), b.values.len());
    if n != other {
        return Err(Error::input(format!("cosine: {n} rows and {other}; wanted as many of both, in pairs")));
    }
    let (a, b) = (directions(a)?, directions(b)?);
    Ok(a.iter().zip(&b).map(|(a, b)| dot(a, b)).sum::<f64>() / n as f64)
}

/// The rows at length one.
fn directions(features: &Features) -> Result<Vec<Vec<f64>>> {
    let direction = |(i, row): (usize, &Vec<f32>)| {
        let row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
        let length = dot(&row, &row).sqrt();
        if length == 0.0 {
            return Err(Error::input(format!("cosine: the features of number {} are all zero", i + 1)));
        }
        Ok(row.iter().map(|v| v / length).collect())
    };
    features.values.iter().enumerate().map(direction).collect()
}

fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    let mut sum = vec![0.0; rows.first().map_or(0, Vec::len)];
    for row in rows {
        sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    }
    sum.iter().map(|v| v / rows.len() as f64).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
