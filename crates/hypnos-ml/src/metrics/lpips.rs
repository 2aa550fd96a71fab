//! LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1: how far apart two pictures look to a person, by what a
//! classifier makes of them place by place.
//!
//! As lpips 0.1.4 does: pictures signed and not resized, its own scaling, features of unit length in five depths, their
//! squared difference weighted channel by channel by learned heads, averaged over places, summed over depths.

use candle_core::{Device, Tensor};
use image::RgbImage;
use serde::Deserialize;

use crate::image_io::signed;
use crate::models::alexnet::{self, AlexNet};
use crate::models::vgg::{self, Vgg16};
use crate::weights::Weights;
use crate::{Error, Result};

/// What is taken off each channel of a signed picture.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
/// What it is then divided by.
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];

/// Keeps a place where nothing is seen from being divided by zero.
const EPS: f64 = 1e-10;

/// The trunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Net {
    /// AlexNet, the package's default: the best judge as a metric.
    #[default]
    Alex,
    /// VGG-16, nearer to what is called a perceptual loss.
    Vgg,
}

/// `metrics/lpips/config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// The trunk.
    #[serde(default)]
    pub(crate) net: Net,
    /// What every number of channels is divided by: 1 is the published network.
    #[serde(default = "channel_divisor")]
    pub(crate) channel_divisor: usize,
}

fn channel_divisor() -> usize {
    1
}

impl Config {
    /// Refuses what is no network.
    pub(crate) fn check(&self) -> Result<()> {
        let divisor = self.channel_divisor;
        if divisor > 0 && 64_usize.is_multiple_of(divisor) {
            return Ok(());
        }
        Err(Error::file("config.json", format!("channel_divisor is {divisor}, wanted a divisor of 64")))
    }

    /// What the field calls it.
    pub(crate) fn name(&self) -> String {
        let net = match self.net {
            Net::Alex => "AlexNet",
            Net::Vgg => "VGG-16",
        };
        let narrow = match self.channel_divisor {
            1 => String::new(),
            divisor => format!(", channels over {divisor}"),
        };
        format!("LPIPS 0.1 {net}{narrow}")
    }

    fn channels(&self) -> [usize; 5] {
        match self.net {
            Net::Alex => alexnet::CHANNELS,
            Net::Vgg => vgg::CHANNELS,
        }
    }
}

#[derive(Debug)]
enum Trunk {
    Alex(AlexNet),
    Vgg(Vgg16),
}

/// The trunk, its heads, and how pictures come to it.
#[derive(Debug)]
pub struct Lpips {
    trunk: Trunk,
    /// Weights of the channels of each depth, `[1, C, 1, 1]`.
    heads: Vec<Tensor>,
    shift: Tensor,
    scale: Tensor,
    device: Device,
}

/// What a picture looks like: features in five depths, of unit length at each place.
struct Look {
    size: (u32, u32),
    depths: Vec<Tensor>,
}

impl Lpips {
    /// From weights named as in the files they come from: `features.N` as in torchvision's trunk, `lin0.model.1.weight`
    /// to `lin4` as in lpips' heads.
    pub fn load(w: &Weights, config: &Config, device: &Device) -> Result<Self> {
        config.check()?;
        let divisor = config.channel_divisor;
        let features = w.pp("features");
        let trunk = match config.net {
            Net::Alex => Trunk::Alex(AlexNet::load(&features, divisor)?),
            Net::Vgg => Trunk::Vgg(Vgg16::load(&features, divisor)?),
        };
        let head = |(i, channels): (usize, usize)| {
            Ok(w.pp(format!("lin{i}.model.1")).get("weight", &[1, channels / divisor, 1, 1])?.value())
        };
        let constant = |values: [f32; 3]| Tensor::new(values.as_slice(), device)?.reshape((1, 3, 1, 1));
        Ok(Self {
            trunk,
            heads: config.channels().into_iter().enumerate().map(head).collect::<Result<_>>()?,
            shift: constant(SHIFT)?,
            scale: constant(SCALE)?,
            device: device.clone(),
        })
    }

    /// LPIPS of two pictures of one size, 0 for equal ones. [`Error::Input`] if their sizes differ, are too small for
    /// the trunk, or the number is not finite.
    pub fn distance(&self, a: &RgbImage, b: &RgbImage) -> Result<f64> {
        self.between(&self.look(a)?, &self.look(b)?)
    }

    /// Mean LPIPS over all pairs of pictures: DIV, where they are of one prompt. [`Error::Input`] as for
    /// [`Lpips::distance`], and for fewer than two.
    pub fn mean_pairwise(&self, pictures: &[RgbImage]) -> Result<f64> {
        if pictures.len() < 2 {
            return Err(Error::input(format!("LPIPS: wanted at least 2 pictures, got {}", pictures.len())));
        }
        let looks: Vec<Look> = pictures.iter().map(|picture| self.look(picture)).collect::<Result<_>>()?;
        let mut sum = 0.0;
        for (i, a) in looks.iter().enumerate() {
            for b in &looks[..i] {
                sum += self.between(a, b)?;
            }
        }
        Ok(sum / (looks.len() * (looks.len() - 1) / 2) as f64)
    }

    fn look(&self, picture: &RgbImage) -> Result<Look> {
        let (size, least) = (picture.dimensions(), self.side_min());
        if (size.0.min(size.1) as usize) < least {
            return Err(Error::input(format!(
                "LPIPS: a picture of {} x {}; this trunk wants at least {least} pixels a side",
                size.0, size.1
            )));
        }
        let x = signed(picture)?.to_device(&self.device)?;
        let x = x.broadcast_sub(&self.shift)?.broadcast_div(&self.scale)?;
        let depths = match &self.trunk {
            Trunk::Alex(net) => net.features(&x)?,
            Trunk::Vgg(net) => net.features(&x)?,
        };
        let depths = depths.iter().map(|x| {
            let length = x.sqr()?.sum_keepdim(1)?.sqrt()?; // [1, 1, h, w]
            Ok(x.broadcast_div(&(length + EPS)?)?)
        });
        Ok(Look { size, depths: depths.collect::<Result<_>>()? })
    }

    fn between(&self, a: &Look, b: &Look) -> Result<f64> {
        if a.size != b.size {
            let ((w, h), (other_w, other_h)) = (a.size, b.size);
            return Err(Error::input(format!(
                "LPIPS: pictures of {w} x {h} and of {other_w} x {other_h}; wanted two of one size"
            )));
        }
        let mut sum = 0.0;
        for ((a, b), head) in a.depths.iter().zip(&b.depths).zip(&self.heads) {
            let places = (a - b)?.sqr()?.broadcast_mul(head)?.sum_keepdim(1)?; // [1, 1, h, w]
            sum += f64::from(places.mean_all()?.to_scalar::<f32>()?);
        }
        if sum.is_finite() {
            Ok(sum)
        } else {
            Err(Error::NotFinite(format!("LPIPS: the distance is {sum}; the weights are broken")))
        }
    }

    fn side_min(&self) -> usize {
        match &self.trunk {
            Trunk::Alex(_) => alexnet::SIDE_MIN,
            Trunk::Vgg(_) => vgg::SIDE_MIN,
        }
    }
}
