//! Features of pictures: the outputs of a network, one row for each picture, each checked to be finite.

use candle_core::{Device, Tensor};
use image::RgbImage;

use crate::{Error, Result};

/// Pictures that go through a network together.
pub(super) const BATCH: usize = 8;

/// What a backbone sees in pictures.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// One row a picture or text, all of one width.
    pub values: Vec<Vec<f32>>,
}

impl Features {
    /// Rows `[n, D]` of a network, the first being picture `first`. [`Error::Input`] if one is not finite.
    pub(super) fn read(of: &str, first: usize, rows: &Tensor) -> Result<Vec<Vec<f32>>> {
        let rows: Vec<Vec<f32>> = rows.to_device(&Device::Cpu)?.to_vec2()?;
        match rows.iter().position(|row| row.iter().any(|v| !v.is_finite())) {
            None => Ok(rows),
            Some(i) => Err(Error::NotFinite(format!(
                "{of}: the features of number {} are not finite; wanted numbers, so the weights or the \
                 picture are broken",
                first + i + 1
            ))),
        }
    }

    /// Their width. [`Error::Input`] unless there are at least `n` rows of one width, all finite.
    pub(super) fn width(&self, of: &str, n: usize) -> Result<usize> {
        let found = self.values.len();
        if found < n {
            return Err(Error::input(format!("{of}: wanted at least {n}, got {found}")));
        }
        let width = self.values.first().map_or(0, Vec::len);
        if let Some(row) = self.values.iter().find(|row| row.len() != width || row.is_empty()) {
            return Err(Error::input(format!("{of}: features of {width} and of {} numbers", row.len())));
        }
        match self.values.iter().position(|row| row.iter().any(|v| !v.is_finite())) {
            None => Ok(width),
            Some(i) => {
                Err(Error::NotFinite(format!("{of}: the features of number {} are not finite", i + 1)))
            }
        }
    }
}

/// The width of both. [`Error::Input`] as [`Features::width`] says, and if they differ.
pub(super) fn shared_width(of: &str, a: (&Features, usize), b: (&Features, usize)) -> Result<usize> {
    let (wide, other) = (a.0.width(of, a.1)?, b.0.width(of, b.1)?);
    if wide == other {
        return Ok(wide);
    }
    Err(Error::input(format!(
        "{of}: features of {wide} and of {other} numbers; both must come from one backbone"
    )))
}

/// Pictures through a network in batches: `prepare` makes `[1, 3, S, S]` of each, on the CPU, `run` gives rows `[B,
/// D]`, one tensor for each kind of features. One [`Features`] of each kind.
pub(super) fn look<const N: usize>(
    of: &str,
    pictures: &[RgbImage],
    device: &Device,
    prepare: impl Fn(&RgbImage) -> Result<Tensor>,
    run: impl Fn(&Tensor) -> Result<[Tensor; N]>,
) -> Result<[Features; N]> {
    let mut found = [const { Vec::new() }; N];
    for (i, batch) in pictures.chunks(BATCH).enumerate() {
        let prepared = batch.iter().enumerate().map(|(j, picture)| match picture.dimensions() {
            (0, _) | (_, 0) => {
                Err(Error::input(format!("{of}: picture {} has no pixels", i * BATCH + j + 1)))
            }
            _ => prepare(picture),
        });
        let prepared = Tensor::cat(&prepared.collect::<Result<Vec<_>>>()?, 0)?.to_device(device)?;
        for (found, rows) in found.iter_mut().zip(run(&prepared)?) {
            found.extend(Features::read(of, i * BATCH, &rows)?);
        }
    }
    Ok(found.map(|values| Features { values }))
}
