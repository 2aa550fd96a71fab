//! Our operations with backward.
