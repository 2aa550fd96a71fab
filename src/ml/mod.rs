//! The pure core: models, mathematics and operations on tensors. No network, no SQL, no clock, no environment,
//! no hidden randomness.
//!
//! Dimension key, used in every comment on shapes: `B` batch, `C` channels, `H W` pixels, `h w` latents, `L` tokens
//! (77), `D` width, `N` heads, `K` width of a head, `T` steps of the noise schedule.
//!
//! Value ranges: *pixels* u8 0..255, *unit* 0..1, *signed* -1..1.

pub mod adapted;
pub mod bundle;
pub mod device;
pub mod diffusion;
pub mod evaluate;
pub mod export;
pub mod metrics;
pub mod models;
pub mod nn;
pub mod ops;
pub mod param;
pub mod perceptual;
pub mod picture;
pub mod random;
pub mod sample;
pub mod samplers;
pub mod segment;
pub mod sheet;
pub mod tensorfile;
pub mod tokenizer;
pub mod train;
pub mod views;
pub mod weights;

/// Why something in `ml` did not work.
#[derive(Debug)]
pub enum Error {
    /// Input that cannot work: one line saying what came, what was wanted, and where.
    Bad(String),
    /// A training left the numbers: its loss or gradient at this step, counted from 1, is not finite.
    Diverged(u64),
    /// The tensor library failed.
    Tensor(candle_core::Error),
}

/// A result whose error is one line for a person.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Bad`] from anything that can be shown.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::Bad(message.into())
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bad(message) => f.write_str(message),
            Self::Diverged(step) => {
                write!(f, "the loss was no longer a finite number at step {step}; try a lower learning rate")
            }
            // candle appends a backtrace to its text; a person reads the first line.
            Self::Tensor(error) => f.write_str(error.to_string().lines().next().unwrap_or("unknown")),
        }
    }
}

impl std::error::Error for Error {}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(error)
    }
}
