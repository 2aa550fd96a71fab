//! The `hypnos` program.
fn main() {}
