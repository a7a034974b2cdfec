//! Sums, multiples and copies of columns.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::simd::{self, vectorize};
use crate::profile::op;
use crate::storage::encode;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

/// Numbers that a task takes.
const BLOCK: usize = 16 * 1024;

/// y += x; both of one shape.
///
/// # Panics
/// If the shapes differ.
pub fn add_assign(y: ViewMut<'_>, x: View<'_>) {
    let _op = op("add", || 0.0);
    x.assert_shape("the matrix to add", y.rows(), y.cols());
    y.into_f32s()
        .par_chunks_mut(BLOCK)
        .zip(x.f32s().par_chunks(BLOCK))
        .for_each_part(|(y, x)| simd::add(y, x));
}

/// Copies a matrix into one of the same shape and another number format, rounding to nearest.
///
/// # Panics
/// If the shapes differ or the target's memory is shared.
pub fn convert(to: &mut Tensor, from: View<'_>) {
    let _op = op("convert", || 0.0);
    from.assert_shape("the matrix to convert", to.rows(), to.cols());
    let dtype = to.dtype();
    let bytes = dtype.bytes_for(BLOCK);
    let chunks = to.bytes_mut().par_chunks_mut(bytes).enumerate();
    chunks.for_each_part(|(i, to)| {
        let part = i * BLOCK..(i * BLOCK + BLOCK).min(from.len());
        from.with_part(part, |from| encode(dtype, to, from));
    });
}

/// y = 0.
pub(crate) fn set_zero(y: ViewMut<'_>) {
    y.into_f32s()
        .par_chunks_mut(BLOCK)
        .for_each_part(|y| y.fill(0.0));
}

/// y *= factor.
pub fn scale(y: ViewMut<'_>, factor: f32) {
    let _op = op("scale", || 0.0);
    y.into_f32s().par_chunks_mut(BLOCK).for_each_part(|y| {
        vectorize(
            #[inline(always)]
            || {
                for y in y.iter_mut() {
                    *y *= factor;
                }
            },
        );
    });
}

/// Overwrites the columns of `dst` from `dst_col` on with columns `src_cols` of `src`.
///
/// # Panics
/// If the rows differ or the columns do not lie within the matrices.
pub fn copy_cols(dst: ViewMut<'_>, dst_col: usize, src: View<'_>, src_cols: Range<usize>) {
    let _op = op("copy columns", || 0.0);
    for_columns(dst, dst_col, src, src_cols, |to, from| {
        to.copy_from_slice(from);
    });
}

/// Adds columns `src_cols` of `src` to the columns of `dst` from `dst_col` on.
///
/// # Panics
/// If the rows differ or the columns do not lie within the matrices.
pub fn add_cols(dst: ViewMut<'_>, dst_col: usize, src: View<'_>, src_cols: Range<usize>) {
    let _op = op("add columns", || 0.0);
    for_columns(dst, dst_col, src, src_cols, simd::add);
}

fn for_columns(
    dst: ViewMut<'_>,
    dst_col: usize,
    src: View<'_>,
    src_cols: Range<usize>,
    work: impl Fn(&mut [f32], &[f32]) + Sync,
) {
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
    if src_cols.is_empty() {
        return;
    }
    let (to_width, from_width) = (dst.cols(), src.cols());
    let rows = rows_per_task(src_cols.len());
    dst.into_f32s()
        .par_chunks_mut(rows * to_width)
        .zip(src.f32s().par_chunks(rows * from_width))
        .for_each_part(|(to, from)| {
            let rows = to
                .chunks_exact_mut(to_width)
                .zip(from.chunks_exact(from_width));
            for (to, from) in rows {
                work(&mut to[dst_cols.clone()], &from[src_cols.clone()]);
            }
        });
}
