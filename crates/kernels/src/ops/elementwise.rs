//! Sums, multiples and copies of columns.

use std::ops::Range;

use crate::cpu;
use crate::profile::op;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

/// y += x; both of one shape.
///
/// # Panics
/// If the shapes differ.
pub fn add_assign(y: ViewMut<'_>, x: View<'_>) {
    let _op = op("add", || 0.0);
    x.assert_shape("the matrix to add", y.rows(), y.cols());
    cpu::elementwise::add_assign(y, x);
}

/// Copies a matrix into one of the same shape and another number format, rounding to nearest.
///
/// # Panics
/// If the shapes differ or the target's memory is shared.
pub fn convert(to: &mut Tensor, from: View<'_>) {
    let _op = op("convert", || 0.0);
    from.assert_shape("the matrix to convert", to.rows(), to.cols());
    cpu::elementwise::convert(to, from);
}

/// y *= factor.
pub fn scale(y: ViewMut<'_>, factor: f32) {
    let _op = op("scale", || 0.0);
    cpu::elementwise::scale(y, factor);
}

/// Overwrites the columns of `dst` from `dst_col` on with columns `src_cols` of `src`.
///
/// # Panics
/// If the rows differ or the columns do not lie within the matrices.
pub fn copy_cols(dst: ViewMut<'_>, dst_col: usize, src: View<'_>, src_cols: Range<usize>) {
    let _op = op("copy columns", || 0.0);
    check_columns(&dst, dst_col, src, &src_cols);
    cpu::elementwise::copy_cols(dst, dst_col, src, src_cols);
}

/// Adds columns `src_cols` of `src` to the columns of `dst` from `dst_col` on.
///
/// # Panics
/// If the rows differ or the columns do not lie within the matrices.
pub fn add_cols(dst: ViewMut<'_>, dst_col: usize, src: View<'_>, src_cols: Range<usize>) {
    let _op = op("add columns", || 0.0);
    check_columns(&dst, dst_col, src, &src_cols);
    cpu::elementwise::add_cols(dst, dst_col, src, src_cols);
}

fn check_columns(dst: &ViewMut<'_>, dst_col: usize, src: View<'_>, src_cols: &Range<usize>) {
    assert_eq!(dst.rows(), src.rows(), "rows of copied columns");
    assert!(
        src_cols.start <= src_cols.end && src_cols.end <= src.cols(),
        "columns {src_cols:?} do not lie within the {} of the source",
        src.cols()
    );
    let dst_cols = dst_col..dst_col + src_cols.len();
    assert!(
        dst_cols.end <= dst.cols(),
        "columns {dst_cols:?} do not lie within the {} of the destination",
        dst.cols()
    );
}
