//! Normalisation of rows.

pub(crate) mod layer;
pub(crate) mod rms;

/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;
