//! Normalisation of rows.

mod layer;
mod rms;

pub use layer::{layer_norm_apply, layer_norm_backward, layer_norm_forward};
pub use rms::{rms_norm_apply, rms_norm_backward, rms_norm_forward};

/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;
