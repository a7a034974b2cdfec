//! A factor a column, as IA³ has it (Liu et al., 2022): y = l ⊙ x with l [1, n] for every row.
//!
//! The forward changes x in place; the gradient of l accumulates.

use crate::cpu;
use crate::profile::op;
use crate::view::{View, ViewMut};

/// x = l ⊙ x for every row; x [T, n], l [1, n].
///
/// # Panics
/// If the shapes do not match.
pub fn scale_columns(x: ViewMut<'_>, l: View<'_>) {
    let _op = op("scale columns", || 0.0);
    l.assert_shape("the factors of columns", 1, x.cols());
    cpu::factors::scale_columns(x, l);
}

/// dl += Σ over rows of dy ⊙ x, x being what [`scale_columns`] multiplied; dl [1, n], dy and x [T, n].
///
/// The gradient of x is `scale_columns` of dy.
///
/// # Panics
/// If the shapes do not match.
pub fn scale_columns_backward(dl: ViewMut<'_>, dy: View<'_>, x: View<'_>) {
    let _op = op("scale columns backward", || 0.0);
    dl.assert_shape("the gradient of the factors of columns", 1, dy.cols());
    x.assert_shape("the scaled matrix", dy.rows(), dy.cols());
    cpu::factors::scale_columns_backward(dl, dy, x);
}
