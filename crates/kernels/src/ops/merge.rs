//! The dense form of a low-rank branch, for folding an adapter into its weight.

use crate::cpu;
use crate::types::linear::Layout;
use crate::view::{View, ViewMut};

/// Adds scale·B·A to a weight in its own layout, at the outputs from `out_offset` on.
///
/// delta [out, in] or [in, out], a [r, in], b [n_out, r].
///
/// # Panics
/// If the shapes do not match.
pub fn low_rank_delta(
    delta: ViewMut<'_>,
    a: View<'_>,
    b: View<'_>,
    scale: f32,
    layout: Layout,
    out_offset: usize,
) {
    assert_eq!(a.rows(), b.cols(), "ranks of A and B");
    let (ins, outs) = (a.cols(), b.rows());
    let (rows, cols) = (delta.rows(), delta.cols());
    let (all_outs, all_ins) = match layout {
        Layout::OutIn => (rows, cols),
        Layout::InOut => (cols, rows),
    };
    assert_eq!(all_ins, ins, "inputs of A and of the weight");
    assert!(
        out_offset + outs <= all_outs,
        "outputs {out_offset}..{} of a branch do not lie within the {all_outs} of the weight",
        out_offset + outs
    );
    cpu::merge::low_rank_delta(delta, a, b, scale, layout, out_offset);
}
