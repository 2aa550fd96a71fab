//! What survives when the database does not.
