//! Loops over all elements.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::simd::{self, vectorize};
use crate::storage::encode;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

/// Numbers that a task takes.
const BLOCK: usize = 16 * 1024;

pub(crate) fn add_assign(y: ViewMut<'_>, x: View<'_>) {
    y.into_f32s()
        .par_chunks_mut(BLOCK)
        .zip(x.f32s().par_chunks(BLOCK))
        .for_each_part(|(y, x)| simd::add(y, x));
}

pub(crate) fn convert(to: &mut Tensor, from: View<'_>) {
    let dtype = to.written_dtype();
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

pub(crate) fn scale(y: ViewMut<'_>, factor: f32) {
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

pub(crate) fn copy_cols(dst: ViewMut<'_>, dst_col: usize, src: View<'_>, src_cols: Range<usize>) {
    for_columns(dst, dst_col, src, src_cols, |to, from| {
        to.copy_from_slice(from);
    });
}

pub(crate) fn add_cols(dst: ViewMut<'_>, dst_col: usize, src: View<'_>, src_cols: Range<usize>) {
    for_columns(dst, dst_col, src, src_cols, simd::add);
}

fn for_columns(
    dst: ViewMut<'_>,
    dst_col: usize,
    src: View<'_>,
    src_cols: Range<usize>,
    work: impl Fn(&mut [f32], &[f32]) + Sync,
) {
    let dst_cols = dst_col..dst_col + src_cols.len();
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
