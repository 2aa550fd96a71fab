//! The one integration test binary.

mod device;
