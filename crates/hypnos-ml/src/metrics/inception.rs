//! Inception-v3 as the Fréchet inception distance uses it (Heusel et al. 2017, arXiv 1706.08500): features of whole
//! sets of pictures.
//!
//! As pytorch-fid 0.3.0 does: each picture stretched to 299 by 299 without antialiasing, signed, through the network of
//! 2015-12-05; features behind its first max-pool (64) and behind its last block (2048).

use candle_core::Device;
use image::RgbImage;

use super::features::{Features, look};
use super::preprocess::stretch;
use crate::Result;
use crate::models::inception as net;
use crate::weights::Weights;

pub use net::Config;

/// Features in two depths. Their width is over the divisor of a narrow network.
#[derive(Clone, Debug, PartialEq)]
pub struct InceptionFeatures {
    /// Behind the first max-pool: colours and edges. Few pictures suffice, and it sees little.
    pub pool64: Features,
    /// Behind the last block: the features of the usual FID. Below 2048 pictures its covariance is singular.
    pub pool2048: Features,
}

/// The network with its preprocessing.
#[derive(Debug)]
pub struct Inception {
    net: net::Inception,
    side: usize,
    device: Device,
}

impl Config {
    /// What the field calls it.
    pub(crate) fn name(&self) -> String {
        let narrow = match self.channel_divisor {
            1 => String::new(),
            divisor => format!(", channels over {divisor}"),
        };
        format!("Inception-v3 of 2015-12-05{narrow}")
    }
}

impl Inception {
    /// From weights as `net::Inception::load` names them.
    pub fn load(w: &Weights, config: &Config, device: &Device) -> Result<Self> {
        let net = net::Inception::load(w, config)?;
        Ok(Self { net, side: config.image_size, device: device.clone() })
    }

    /// Both features of each picture of any size. [`crate::Error::Input`] if one is not finite.
    pub fn features(&self, pictures: &[RgbImage]) -> Result<InceptionFeatures> {
        let prepare = |picture: &RgbImage| stretch(picture, self.side);
        let run = |batch: &_| {
            let pools = self.net.forward(batch)?;
            Ok([pools.first, pools.last])
        };
        let [pool64, pool2048] = look("Inception", pictures, &self.device, prepare, run)?;
        Ok(InceptionFeatures { pool64, pool2048 })
    }
}
