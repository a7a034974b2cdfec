//! Products with a weight in f32 or bf16, a strip of it at a time.
//!
//! A bf16 weight is never widened as a whole. A task takes a strip, widens it into scratch memory
//! of its thread, and multiplies a block of tokens with it; for few tokens see
//! [`few`](crate::few).

use std::ops::Range;

use crate::few::{FEW_TOKENS, few_times_rows};
use crate::matmul::{Mat, MatMut, for_tiles, product};
use crate::scratch::with_scratch;
use crate::simd;
use crate::view::{Data, View, ViewMut};

/// Outputs that a task takes.
const STRIP: usize = 96;
/// Tokens that a task takes.
const TOKENS: usize = 256;
/// Terms of a sum that are widened at once; with `STRIP` f32 columns they fill 192 KiB.
const DEPTH: usize = 512;
/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing: the output is overwritten.
    Zero,
    /// What the output holds.
    Sum,
    /// A bias, the same for each row.
    Row(&'a [f32]),
}

impl Start<'_> {
    /// Puts into a tile what the product is added to; whether there is anything.
    pub(crate) fn prepare(self, tile: &mut MatMut<'_>, columns: &Range<usize>) -> bool {
        match self {
            Self::Zero => false,
            Self::Sum => true,
            Self::Row(bias) => {
                for row in 0..tile.rows() {
                    tile.row(row).copy_from_slice(&bias[columns.clone()]);
                }
                true
            }
        }
    }
}

/// y (+)= x·wᵀ; y [T, N], x [T, K], w [N, K].
pub(crate) fn times_rows(y: ViewMut<'_>, x: View<'_>, w: View<'_>, start: Start<'_>) {
    let ins = x.cols();
    if x.rows() <= FEW_TOKENS {
        return few_times_rows([y], x, [w], [start]);
    }
    let x = x.as_mat();
    for_tiles(y, (TOKENS, STRIP), |mut tile, down, across| {
        let accumulate = start.prepare(&mut tile, &across);
        let x = x.block(down, 0..ins);
        with_widened(w, across, 0..ins, |strip| {
            product(tile, accumulate, 1.0, x, strip.t());
        });
    });
}

/// y (+)= x·w; y [T, N], x [T, K], w [K, N].
pub(crate) fn times_columns(y: ViewMut<'_>, x: View<'_>, w: View<'_>, start: Start<'_>) {
    let ins = x.cols();
    let x = x.as_mat();
    for_tiles(y, (TOKENS, STRIP), |mut tile, down, across| {
        let accumulate = start.prepare(&mut tile, &across);
        // Summing a part of the inputs at a time, in order, keeps the strip within the cache.
        for first in (0..ins.max(1)).step_by(DEPTH) {
            let part = first..(first + DEPTH).min(ins);
            let x = x.block(down.clone(), part.clone());
            with_widened(w, part, across.clone(), |strip| {
                product(tile.reborrow(), accumulate || first > 0, 1.0, x, strip);
            });
        }
    });
}

/// Calls `work` with a block of a weight in f32: in place if it is f32, else widened into scratch.
fn with_widened(w: View<'_>, rows: Range<usize>, cols: Range<usize>, work: impl FnOnce(Mat<'_>)) {
    match w.data() {
        Data::F32(data) => work(Mat::new(data, w.rows(), w.cols()).block(rows, cols)),
        Data::Bf16(data) => with_scratch(rows.len() * cols.len(), |scratch| {
            let from = &data[rows.start * w.cols()..rows.end * w.cols()];
            if !scratch.is_empty() {
                simd::widen_rows(scratch, cols.len(), &from[cols.start..], w.cols());
            }
            work(Mat::new(scratch, rows.len(), cols.len()));
        }),
    }
}
