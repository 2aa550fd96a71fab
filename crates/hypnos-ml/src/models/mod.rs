//! The models: one architecture, one file. They do not import one another, except TRACER, whose encoder is an
//! EfficientNet.

pub(crate) mod alexnet;
pub mod clip;
pub mod discriminator;
pub mod efficientnet;
pub mod inception;
pub mod tracer;
pub mod unet;
pub mod vae;
pub(crate) mod vgg;
pub(crate) mod vit;

use super::{Error, Result};

/// Refuses a value in a configuration that the model cannot honour.
fn refuse(holds: bool, key: &str, value: impl std::fmt::Debug, wanted: &str) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::file("config.json", format!("{key} is {value:?}, wanted {wanted}")))
    }
}
