//! Normalisation of rows.

mod layer;
mod rms;

pub use layer::{layer_norm_apply, layer_norm_backward, layer_norm_forward};
pub use rms::{rms_norm_apply, rms_norm_backward, rms_norm_forward};

use crate::scratch::with_scratch;
use crate::view::{Data, View};

/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;

/// Calls `work` with a vector in f32, widened into scratch memory if it is bf16.
fn with_vector<R>(vector: View<'_>, work: impl FnOnce(&[f32]) -> R) -> R {
    match vector.data() {
        Data::F32(x) => work(x),
        Data::Bf16(_) => with_scratch(vector.len(), |scratch| {
            vector.widen(0, 0..vector.len(), scratch);
            work(scratch)
        }),
    }
}
