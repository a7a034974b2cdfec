//! A factor a column, as IA³ has it (Liu et al., 2022): y = l ⊙ x with l [1, n] for every row.
//!
//! The forward changes x in place; the gradient of l accumulates.

use rayon::prelude::*;

use crate::matmul::for_tiles;
use crate::parallel::{ForEachPart, rows_per_task};
use crate::profile::op;
use crate::simd::vectorize;
use crate::view::{View, ViewMut};

/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;

/// x[i, j] *= l[j]; x [T, n], l [1, n].
///
/// # Panics
/// If the shapes do not match.
pub fn scale_columns(x: ViewMut<'_>, l: View<'_>) {
    let _op = op("scale columns", || 0.0);
    let cols = x.cols();
    l.assert_shape("the factors of columns", 1, cols);
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

/// dl[j] += Σ over i of dy[i, j] · x[i, j], x being what [`scale_columns`] multiplied; dl [1, n], dy and x [T, n].
///
/// The gradient of x is `scale_columns` of dy.
///
/// # Panics
/// If the shapes do not match.
pub fn scale_columns_backward(dl: ViewMut<'_>, dy: View<'_>, x: View<'_>) {
    let _op = op("scale columns backward", || 0.0);
    let cols = dy.cols();
    dl.assert_shape("the gradient of the factors of columns", 1, cols);
    x.assert_shape("the scaled matrix", dy.rows(), cols);
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
