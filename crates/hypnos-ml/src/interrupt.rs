//! Why a function that calls an observer ended early.

use std::convert::Infallible;

use super::error::Error;

/// Why a function that calls an observer ended early. An observer that continues returns `Ok(())`; one that never
/// stops anything has `B` = [`Infallible`], and `?` then gives the [`Error`].
#[derive(Debug)]
pub enum Interrupt<B> {
    /// The observer stopped it, for this reason.
    Stopped(B),
    /// It failed.
    Failed(Error),
}

impl<B> From<Error> for Interrupt<B> {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl<B> From<candle_core::Error> for Interrupt<B> {
    fn from(error: candle_core::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl From<Interrupt<Infallible>> for Error {
    fn from(interrupt: Interrupt<Infallible>) -> Self {
        let Interrupt::Failed(error) = interrupt;
        error
    }
}
