//! The perceptual loss's network in a dry run.

use candle_core::Result;

use super::Config;
use crate::dry_run::DryTensor;
use crate::models::efficientnet::WeightNames;

impl Config {
    /// [`super::Perceptual::features`] of pictures `[B, 3, H, W]`.
    pub(crate) fn dry(&self, pictures: &DryTensor) -> Result<Vec<DryTensor>> {
        let mut x = pictures.affine().affine();
        if self.halve {
            let [b, c, h, w] = [0, 1, 2, 3].map(|axis| x.dims()[axis]);
            x = x.reshape(&[b, c, h / 2, 2, w / 2, 2]).mean(5).mean(3);
        }
        let channels = DryTensor::constant(x.meter(), &[1, 3, 1, 1]);
        let x = x.broadcast_plus(&channels).broadcast_times(&channels);
        self.net.dry(&x, WeightNames::Timm)
    }
}
