//! Magnitudes of a linear's outputs, as DoRA has them (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024):
//! y = c ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + b with c = m / ‖W + s·B·A‖, the norms being those of the rows of an [out, in] matrix.
//!
//! The norms come from ‖wᵢ + s·bᵢ·A‖² = ‖wᵢ‖² + 2s·(W·Aᵀ)ᵢ·bᵢ + s²·bᵢ·(A·Aᵀ)·bᵢᵀ, so that W + s·B·A is never made. The
//! backward takes them as constants, as section 4.3 of the paper and PEFT do. Gradients of m accumulate; those of what is
//! scaled overwrite.

use crate::cpu;
use crate::profile::op;
use crate::types::linear::Weight;
use crate::types::low_rank::LowRank;
use crate::view::{View, ViewMut};

/// Σ x² of each output's weights, `[out]`: ‖wᵢ‖² in f64, in a fixed order. A weight that is not f32 is widened a strip at a time.
pub fn output_squares(w: Weight<'_>) -> Vec<f64> {
    let _op = op("squares of outputs", || 2.0 * w.view.len() as f64);
    cpu::magnitude::output_squares(w)
}

/// Adds to the outputs' ‖wᵢ‖² what makes them ‖wᵢ + s·bᵢ·A‖²; `squares` is `[out]`, `wa` = A·Wᵀ [r, out].
///
/// Branches that write different outputs may be added one after the other.
///
/// # Panics
/// If the shapes do not match.
pub fn adapted_squares(squares: &mut [f64], wa: View<'_>, lr: &LowRank<'_>) {
    let _op = op("norms of adapted outputs", || {
        let r = lr.rank() as f64;
        2.0 * r * (r * lr.b.rows() as f64 + lr.a.len() as f64 / 2.0)
    });
    wa.assert_shape("A·Wᵀ", lr.rank(), squares.len());
    lr.b.assert_shape("B", lr.b.rows(), lr.rank());
    assert!(
        lr.out_offset + lr.b.rows() <= squares.len(),
        "outputs {}..{} of a branch do not lie within the {} of the linear",
        lr.out_offset,
        lr.out_offset + lr.b.rows(),
        squares.len()
    );
    cpu::magnitude::adapted_squares(squares, wa, lr);
}

/// u = y - b and y = c ⊙ u + b for every row; y and u [T, n], c and b [1, n].
///
/// y is a linear's output with its bias and its branches. u is for the backward; it may be absent where nobody reads it, or where
/// the backward has y and there is no bias.
///
/// # Panics
/// If the shapes do not match.
pub fn magnitude_forward(
    y: ViewMut<'_>,
    u: Option<ViewMut<'_>>,
    c: View<'_>,
    bias: Option<View<'_>>,
) {
    let _op = op("magnitude", || 0.0);
    if let Some(u) = &u {
        u.assert_shape("the output without its magnitude", y.rows(), y.cols());
    }
    c.assert_shape("the factors of outputs", 1, y.cols());
    if let Some(bias) = bias {
        bias.assert_shape("the bias of a linear", 1, y.cols());
    }
    cpu::magnitude::magnitude_forward(y, u, c, bias);
}

/// du = c ⊙ dy, and dm += (Σ over rows of dy ⊙ u) / norms; du, dy and u [T, n], c, norms and dm [1, n].
///
/// y = c ⊙ u does in the place of u, and then m in the place of the norms. Either may be bf16.
///
/// # Panics
/// If the shapes do not match.
pub fn magnitude_backward(
    du: ViewMut<'_>,
    dm: ViewMut<'_>,
    dy: View<'_>,
    u: View<'_>,
    (c, divisors): (View<'_>, View<'_>),
) {
    let _op = op("magnitude backward", || 0.0);
    for (name, rows) in [("u", u), ("dy", dy)] {
        rows.assert_shape(name, du.rows(), du.cols());
    }
    for (name, row) in [
        ("the factors of outputs", c),
        ("what sums are divided by", divisors),
    ] {
        row.assert_shape(name, 1, du.cols());
    }
    dm.assert_shape("the gradient of magnitudes", 1, du.cols());
    cpu::magnitude::magnitude_backward(du, dm, dy, u, (c, divisors));
}
