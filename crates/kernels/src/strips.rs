//! Products with a weight in f32 or bf16, a strip of it at a time.
//!
//! A bf16 weight is never widened as a whole. A task takes a strip, widens it into scratch memory
//! of its thread, and multiplies a block of tokens with it; with few tokens it is widened in
//! registers.

use std::ops::Range;

use crate::matmul::{Mat, MatMut, for_tiles, product};
use crate::scratch::with_scratch;
use crate::simd::{self, Element};
use crate::view::{Data, View, ViewMut};

/// Outputs that a task takes.
const STRIP: usize = 96;
/// Tokens that a task takes.
const TOKENS: usize = 256;
/// Terms of a sum that are widened at once; with `STRIP` f32 columns they fill 192 KiB.
const DEPTH: usize = 512;
/// Tokens up to which products of rows, which read each weight once and pack nothing, are faster.
const FEW_TOKENS: usize = 32;
/// Weights that a task takes when there are few tokens.
const FEW_BLOCK: usize = 32 * 1024;

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
    fn prepare(self, tile: &mut MatMut<'_>, columns: &Range<usize>) -> bool {
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
        return match w.data() {
            Data::F32(w) => few_times_rows(y, x, w, start),
            Data::Bf16(w) => few_times_rows(y, x, w, start),
        };
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

/// [`times_rows`] for few tokens, as products of rows of x with rows of w.
fn few_times_rows<E: Element>(y: ViewMut<'_>, x: View<'_>, w: &[E], start: Start<'_>) {
    let ins = x.cols();
    let x = x.f32s();
    let block = (FEW_BLOCK / ins.max(1)).next_multiple_of(4).max(4);
    for_tiles(y, (FEW_TOKENS, block), |mut tile, _, across| {
        let accumulate = start.prepare(&mut tile, &across);
        let w = &w[across.start * ins..across.end * ins];
        dots_of_rows(&mut tile, x, w, ins, accumulate);
    });
}

/// out (+)= x·wᵀ on one thread by products of rows; x [T, ins], w [N, ins], both without gaps.
pub(crate) fn dots_of_rows<E: Element>(
    out: &mut MatMut<'_>,
    x: &[f32],
    w: &[E],
    ins: usize,
    accumulate: bool,
) {
    let tokens = out.rows();
    let mut token = 0;
    while token < tokens {
        // As many sums at once as vector registers hold.
        let group = (tokens - token).min(4);
        let x = &x[token * ins..];
        match group {
            1 => few_columns::<E, 1, 4>(out, token, x, w, ins, accumulate),
            2 => few_columns::<E, 2, 4>(out, token, x, w, ins, accumulate),
            3 => few_columns::<E, 3, 2>(out, token, x, w, ins, accumulate),
            _ => few_columns::<E, 4, 2>(out, token, x, w, ins, accumulate),
        }
        token += group;
    }
}

/// Rows `first..first + I` of a block of the output, `J` columns at a time.
fn few_columns<E: Element, const I: usize, const J: usize>(
    out: &mut MatMut<'_>,
    first: usize,
    x: &[f32],
    w: &[E],
    ins: usize,
    accumulate: bool,
) {
    let outs = out.row(first).len();
    let x: [&[f32]; I] = std::array::from_fn(|i| &x[i * ins..(i + 1) * ins]);
    let row = |j: usize| &w[j * ins..(j + 1) * ins];
    let mut write = |i: usize, j: usize, sum: f32| {
        let y = &mut out.row(first + i)[j];
        *y = if accumulate { *y + sum } else { sum };
    };
    let whole = outs / J * J;
    for start in (0..whole).step_by(J) {
        let sums = simd::dots(x, std::array::from_fn::<_, J, _>(|j| row(start + j)));
        for (i, sums) in sums.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate() {
                write(i, start + j, sum);
            }
        }
    }
    for j in whole..outs {
        for (i, [sum]) in simd::dots(x, [row(j)]).into_iter().enumerate() {
            write(i, j, sum);
        }
    }
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
