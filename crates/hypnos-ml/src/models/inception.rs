//! Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567) as the Fréchet inception distance has it: the network of
//! 2015-12-05.
//!
//! Ports pytorch-fid 0.3.0, `inception.py`. It is not torchvision's: average pools do not count the zeros beyond the
//! edge, and the last block pools by maximum, not by mean. Names are those of its file.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::refuse;
use crate::nn::{NormedConv2d, avg_pool2d, max_pool2d};
use crate::ops::Conv2dSpec;
use crate::weights::Weights;

/// Eps of every batch norm.
const EPS: f64 = 1e-3;

/// The smallest side that leaves a pixel for every layer.
const SIDE_MIN: usize = 75;

/// Sizes.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Side of the pictures, in pixels.
    #[serde(default = "image_size")]
    pub image_size: usize,
    /// What every number of channels is divided by: 1 is the published network.
    #[serde(default = "channel_divisor")]
    pub(crate) channel_divisor: usize,
}

fn image_size() -> usize {
    299
}

fn channel_divisor() -> usize {
    1
}

impl Config {
    /// Refuses what is no network.
    pub(crate) fn check(&self) -> crate::Result<()> {
        let divisor = self.channel_divisor;
        refuse(
            divisor > 0 && 16_usize.is_multiple_of(divisor),
            "channel_divisor",
            divisor,
            "1, 2, 4, 8 or 16",
        )?;
        refuse((SIDE_MIN..=4096).contains(&self.image_size), "image_size", self.image_size, "75 to 4096")
    }
}

/// What the network gives of pictures, in two depths.
#[derive(Clone, Debug)]
pub(crate) struct Pools {
    /// Means over the first max-pool, `[B, 64]`.
    pub(crate) first: Tensor,
    /// Means over the last block, `[B, 2048]`.
    pub(crate) last: Tensor,
}

/// The network, without its classifier.
#[derive(Debug)]
pub struct Inception {
    /// To the first max-pool.
    stem: Vec<Conv>,
    /// From there to the second.
    second: Vec<Conv>,
    mixed: Vec<Vec<Branch>>,
}

impl Inception {
    /// From weights named as pytorch-fid's file names them, such as `Mixed_5b.branch1x1.conv.weight`.
    pub(crate) fn load(w: &Weights, config: &Config) -> crate::Result<Self> {
        config.check()?;
        let net = Reader { w, divisor: config.channel_divisor };
        let stem = [
            ("Conv2d_1a_3x3", 32, (3, 3), Valid(2)),
            ("Conv2d_2a_3x3", 32, (3, 3), Valid(1)),
            ("Conv2d_2b_3x3", 64, (3, 3), Same),
        ];
        let second = [("Conv2d_3b_1x1", 80, (1, 1), Same), ("Conv2d_4a_3x3", 192, (3, 3), Valid(1))];
        Ok(Self {
            stem: net.chain(w, 3, &stem)?,
            second: net.chain(w, 64, &second)?,
            mixed: vec![
                net.mixed("Mixed_5b", 192, &a(32))?,
                net.mixed("Mixed_5c", 256, &a(64))?,
                net.mixed("Mixed_5d", 288, &a(64))?,
                net.mixed("Mixed_6a", 288, &b())?,
                net.mixed("Mixed_6b", 768, &c(128))?,
                net.mixed("Mixed_6c", 768, &c(160))?,
                net.mixed("Mixed_6d", 768, &c(160))?,
                net.mixed("Mixed_6e", 768, &c(192))?,
                net.mixed("Mixed_7a", 768, &d())?,
                net.mixed("Mixed_7b", 1280, &e(Pool::Average))?,
                net.mixed("Mixed_7c", 2048, &e(Pool::Max))?,
            ],
        })
    }

    /// Signed pictures `[B, 3, S, S]` to means of two of its layers, of 64 and 2048 channels over the divisor.
    pub(crate) fn forward(&self, pictures: &Tensor) -> Result<Pools> {
        let mut x = pictures.clone();
        for conv in &self.stem {
            x = conv.forward(&x)?;
        }
        x = max_pool2d(&x, 3, 2, 0)?;
        let first = mean(&x)?;
        for conv in &self.second {
            x = conv.forward(&x)?;
        }
        x = max_pool2d(&x, 3, 2, 0)?;
        for branches in &self.mixed {
            let parts: Vec<Tensor> =
                branches.iter().map(|branch| branch.forward(&x)).collect::<Result<_>>()?;
            x = Tensor::cat(&parts, 1)?;
        }
        Ok(Pools { first, last: mean(&x)? })
    }
}

/// `[B, C, h, w]` to `[B, C]`.
fn mean(x: &Tensor) -> Result<Tensor> {
    x.flatten_from(2)?.mean(2)
}

/// How a convolution ends at the edges.
#[derive(Clone, Copy)]
enum Edge {
    /// Padded so that the size stays.
    Same,
    /// Not padded, with this stride.
    Valid(usize),
}
use Edge::{Same, Valid};

/// A convolution: its name, channels, kernel and edge.
type Layer = (&'static str, usize, (usize, usize), Edge);

/// What comes first in a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pool {
    No,
    /// 3x3, the size stays.
    Average,
    /// 3x3, the size stays.
    Max,
    /// The maximum with stride 2.
    Halve,
}

/// A branch as the blocks below describe it: a pool, convolutions one after the other, then some side by side.
struct Plan {
    pool: Pool,
    chain: Vec<Layer>,
    fork: Vec<Layer>,
}

fn plain(chain: &[Layer]) -> Plan {
    Plan { pool: Pool::No, chain: chain.to_vec(), fork: Vec::new() }
}

fn pooled(pool: Pool, chain: &[Layer]) -> Plan {
    Plan { pool, ..plain(chain) }
}

/// Figure 5 of the paper.
fn a(pool_channels: usize) -> Vec<Plan> {
    vec![
        plain(&[("branch1x1", 64, (1, 1), Same)]),
        plain(&[("branch5x5_1", 48, (1, 1), Same), ("branch5x5_2", 64, (5, 5), Same)]),
        plain(&[
            ("branch3x3dbl_1", 64, (1, 1), Same),
            ("branch3x3dbl_2", 96, (3, 3), Same),
            ("branch3x3dbl_3", 96, (3, 3), Same),
        ]),
        pooled(Pool::Average, &[("branch_pool", pool_channels, (1, 1), Same)]),
    ]
}

/// Figure 10: half the size.
fn b() -> Vec<Plan> {
    vec![
        plain(&[("branch3x3", 384, (3, 3), Valid(2))]),
        plain(&[
            ("branch3x3dbl_1", 64, (1, 1), Same),
            ("branch3x3dbl_2", 96, (3, 3), Same),
            ("branch3x3dbl_3", 96, (3, 3), Valid(2)),
        ]),
        pooled(Pool::Halve, &[]),
    ]
}

/// Figure 6, with n = 7.
fn c(width: usize) -> Vec<Plan> {
    vec![
        plain(&[("branch1x1", 192, (1, 1), Same)]),
        plain(&[
            ("branch7x7_1", width, (1, 1), Same),
            ("branch7x7_2", width, (1, 7), Same),
            ("branch7x7_3", 192, (7, 1), Same),
        ]),
        plain(&[
            ("branch7x7dbl_1", width, (1, 1), Same),
            ("branch7x7dbl_2", width, (7, 1), Same),
            ("branch7x7dbl_3", width, (1, 7), Same),
            ("branch7x7dbl_4", width, (7, 1), Same),
            ("branch7x7dbl_5", 192, (1, 7), Same),
        ]),
        pooled(Pool::Average, &[("branch_pool", 192, (1, 1), Same)]),
    ]
}

/// Half the size once more.
fn d() -> Vec<Plan> {
    vec![
        plain(&[("branch3x3_1", 192, (1, 1), Same), ("branch3x3_2", 320, (3, 3), Valid(2))]),
        plain(&[
            ("branch7x7x3_1", 192, (1, 1), Same),
            ("branch7x7x3_2", 192, (1, 7), Same),
            ("branch7x7x3_3", 192, (7, 1), Same),
            ("branch7x7x3_4", 192, (3, 3), Valid(2)),
        ]),
        pooled(Pool::Halve, &[]),
    ]
}

/// Figure 7.
fn e(pool: Pool) -> Vec<Plan> {
    vec![
        plain(&[("branch1x1", 320, (1, 1), Same)]),
        Plan {
            fork: vec![("branch3x3_2a", 384, (1, 3), Same), ("branch3x3_2b", 384, (3, 1), Same)],
            ..plain(&[("branch3x3_1", 384, (1, 1), Same)])
        },
        Plan {
            fork: vec![("branch3x3dbl_3a", 384, (1, 3), Same), ("branch3x3dbl_3b", 384, (3, 1), Same)],
            ..plain(&[("branch3x3dbl_1", 448, (1, 1), Same), ("branch3x3dbl_2", 384, (3, 3), Same)])
        },
        pooled(pool, &[("branch_pool", 192, (1, 1), Same)]),
    ]
}

/// Builds layers of a network whose channels are divided; the numbers above are undivided.
struct Reader<'a> {
    w: &'a Weights,
    divisor: usize,
}

impl Reader<'_> {
    fn mixed(&self, name: &str, n_in: usize, plans: &[Plan]) -> crate::Result<Vec<Branch>> {
        let w = self.w.pp(name);
        let branch = |plan: &Plan| {
            let n_inside = plan.chain.last().map_or(n_in, |layer| layer.1);
            Ok(Branch {
                pool: plan.pool,
                chain: self.chain(&w, n_in, &plan.chain)?,
                fork: plan
                    .fork
                    .iter()
                    .map(|layer| self.conv(&w, n_inside, *layer))
                    .collect::<crate::Result<_>>()?,
            })
        };
        plans.iter().map(branch).collect()
    }

    fn chain(&self, w: &Weights, n_in: usize, layers: &[Layer]) -> crate::Result<Vec<Conv>> {
        let inputs = std::iter::once(n_in).chain(layers.iter().map(|layer| layer.1));
        inputs.zip(layers).map(|(n_in, layer)| self.conv(w, n_in, *layer)).collect()
    }

    fn conv(&self, w: &Weights, n_in: usize, (name, n_out, kernel, edge): Layer) -> crate::Result<Conv> {
        let n_in = if n_in == 3 { 3 } else { n_in / self.divisor };
        let (kh, kw) = kernel;
        let (stride, (up, left)) = match edge {
            Same => (1, (kh / 2, kw / 2)),
            Valid(stride) => (stride, (0, 0)),
        };
        // The operation pads all sides alike; what an oblong kernel wants besides is put there before it.
        let all = up.min(left);
        let spec = Conv2dSpec::padded(stride, all);
        let shape = [n_out / self.divisor, n_in, kh, kw];
        let conv = NormedConv2d::load(&w.pp(name), ("conv", "bn"), shape, spec, EPS)?;
        Ok(Conv { conv, rows: up - all, columns: left - all })
    }
}

/// Convolution, batch norm and ReLU.
#[derive(Debug)]
struct Conv {
    conv: NormedConv2d,
    /// Rows of zeros above and below.
    rows: usize,
    /// Columns of zeros left and right.
    columns: usize,
}

impl Conv {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (dim, n) in [(2, self.rows), (3, self.columns)].into_iter().filter(|(_, n)| *n > 0) {
            x = x.pad_with_zeros(dim, n, n)?;
        }
        self.conv.forward(&x)?.relu()
    }
}

#[derive(Debug)]
struct Branch {
    pool: Pool,
    chain: Vec<Conv>,
    fork: Vec<Conv>,
}

impl Branch {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = match self.pool {
            Pool::No => x.clone(),
            Pool::Average => avg_pool2d(x, 3, 1, 1)?,
            Pool::Max => max_pool2d(x, 3, 1, 1)?,
            Pool::Halve => max_pool2d(x, 3, 2, 0)?,
        };
        for conv in &self.chain {
            x = conv.forward(&x)?;
        }
        if self.fork.is_empty() {
            return Ok(x);
        }
        let ways: Vec<Tensor> = self.fork.iter().map(|conv| conv.forward(&x)).collect::<Result<_>>()?;
        Tensor::cat(&ways, 1)
    }
}
