//! Factors of columns, and their gradient.

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::product::mat::for_tiles;
use crate::cpu::simd::vectorize;
use crate::view::{View, ViewMut};

/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;

pub(crate) fn scale_columns(x: ViewMut<'_>, l: View<'_>) {
    let cols = x.cols();
    if cols == 0 {
        return;
    }
    let l = l.f32s();
    x.into_f32s()
        .par_chunks_mut(rows_per_task(cols) * cols)
        .for_each_part(|rows| {
            vectorize(
                #[inline(always)]
                || {
                    for row in rows.chunks_exact_mut(cols) {
                        for (x, l) in row.iter_mut().zip(l) {
                            *x *= l;
                        }
                    }
                },
            );
        });
}

pub(crate) fn scale_columns_backward(dl: ViewMut<'_>, dy: View<'_>, x: View<'_>) {
    let cols = dy.cols();
    // y = l ⊙ x, so dl += Σ dy ⊙ x
    let (dy, x) = (dy.f32s(), x.f32s());
    for_tiles(dl, (1, COLUMNS), |mut sums, _, across| {
        let sums = sums.row(0);
        vectorize(
            #[inline(always)]
            || {
                for (dy, x) in dy.chunks_exact(cols).zip(x.chunks_exact(cols)) {
                    let pairs = dy[across.clone()].iter().zip(&x[across.clone()]);
                    for (sum, (dy, x)) in sums.iter_mut().zip(pairs) {
                        *sum += dy * x;
                    }
                }
            },
        );
    });
}
