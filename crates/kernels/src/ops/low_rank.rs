//! The low-rank branch of an adapted linear layer: y += s·drop(x)·Aᵀ·Bᵀ (Hu et al., "LoRA", 2021).
//!
//! All results accumulate, except that the forward overwrites u. Only the given rows of T and the
//! columns from `out_offset` on of y are touched, so one batch may use many adapters, and one fused
//! matrix may carry several branches.

use std::ops::Range;

use crate::cpu;
use crate::profile::op;
use crate::types::classes::RowClasses;
use crate::types::low_rank::LowRank;
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// u = drop(x)·Aᵀ and y += s·u·Bᵀ for the given rows.
///
/// y [T, out] with n_out columns touched, u [rows, r] overwritten and saved for the backward,
/// x [T, in]. The workspace is for devices that need temporaries here; this one does not.
///
/// # Panics
/// If the shapes do not match, or numbers of generated rows are dropped.
pub fn low_rank_forward(
    y: ViewMut<'_>,
    u: ViewMut<'_>,
    x: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
    classes: RowClasses,
    _ws: &Workspace,
) {
    let _op = op("low-rank forward", || {
        2.0 * (rows.len() * (lr.a.len() + lr.b.len())) as f64
    });
    check(lr, y.cols(), x, (u.rows(), u.cols()), &rows, classes);
    assert_eq!(y.rows(), x.rows(), "tokens of a low-rank branch");
    cpu::low_rank::low_rank_forward(y, u, x, rows, lr, classes);
}

/// The gradient of the inner rows: du = s·dy·B for the given rows; du [rows, r] overwritten, dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn low_rank_backward_hidden(
    du: ViewMut<'_>,
    dy: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
    let _op = op("low-rank backward", || {
        2.0 * (rows.len() * lr.b.len()) as f64
    });
    du.assert_shape("the gradient of x·Aᵀ", rows.len(), lr.rank());
    cpu::low_rank::low_rank_backward_hidden(du, dy, rows, lr);
}

/// The gradients of A and B for the given rows, added to what is there.
///
/// da [r, in], db [n_out, r], dy [T, out], x [T, in], u and du [rows, r] as
/// [`linears_forward`](crate::linears_forward) and [`low_rank_backward_hidden`] gave them.
///
/// # Panics
/// If the shapes do not match.
pub fn low_rank_backward_weights(
    da: ViewMut<'_>,
    db: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
    (u, du): (View<'_>, View<'_>),
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
    let _op = op("low-rank backward", || {
        2.0 * (rows.len() * (lr.a.len() + lr.b.len())) as f64
    });
    let shape = (u.rows(), u.cols());
    check(lr, dy.cols(), x, shape, &rows, RowClasses::PROMPT);
    assert_eq!(dy.rows(), x.rows(), "tokens of a low-rank branch");
    da.assert_shape("the gradient of A", lr.rank(), x.cols());
    db.assert_shape("the gradient of B", lr.b.rows(), lr.rank());
    du.assert_shape("the gradient of x·Aᵀ", rows.len(), lr.rank());
    cpu::low_rank::low_rank_backward_weights(da, db, dy, x, (u, du), rows, lr);
}

/// The gradient of a branch's input, added to dx: drop(du·A) with the mask of the forward.
///
/// dx [T, in], du [rows, r] as [`low_rank_backward_hidden`] gave it. Branches that drop nothing go with
/// their linears through [`linears_backward_input`](crate::linears_backward_input).
///
/// # Panics
/// If the shapes do not match.
pub fn low_rank_backward_input(
    dx: ViewMut<'_>,
    du: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
    let _op = op("low-rank backward", || {
        2.0 * (rows.len() * lr.a.len()) as f64
    });
    let name = "the input gradient of a low-rank branch";
    dx.assert_shape(name, dx.rows(), lr.a.cols());
    du.assert_shape("the gradient of x·Aᵀ", rows.len(), lr.rank());
    cpu::low_rank::low_rank_backward_input(dx, du, rows, lr);
}

/// Panics unless a branch fits its input and output.
pub(crate) fn check(
    lr: &LowRank<'_>,
    y_cols: usize,
    x: View<'_>,
    u: (usize, usize),
    rows: &Range<usize>,
    classes: RowClasses,
) {
    lr.b.assert_shape("B", lr.b.rows(), lr.rank());
    lr.a.assert_shape("A", lr.rank(), x.cols());
    assert!(
        lr.out_offset + lr.b.rows() <= y_cols,
        "columns {}..{} of a branch do not lie within the {y_cols} of its output",
        lr.out_offset,
        lr.out_offset + lr.b.rows()
    );
    assert_eq!(u, (rows.len(), lr.rank()), "shape of x·Aᵀ");
    if let Some(dropout) = lr.dropout {
        let p = dropout.p;
        assert!((0.0..1.0).contains(&p), "{p} is not a rate of dropout");
    }
    assert!(
        rows.start <= rows.end && rows.end <= x.rows(),
        "rows {rows:?} do not lie within the {} of the input",
        x.rows()
    );
    assert!(
        !lr.drops() || classes.split(rows).1.is_empty(),
        "dropout is for training, and generated rows are not trained on"
    );
}
