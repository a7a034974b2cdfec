//! A linear layer: y = x·Wᵀ + b.
//!
//! `linear_forward` overwrites y; `linear_backward_input` overwrites or accumulates as asked;
//! `linear_backward_weight` and `bias_backward` accumulate.
//!
//! A bf16 weight is never widened as a whole. A task takes a strip of it, widens that into scratch
//! memory of its thread, and multiplies a block of tokens with it.

use std::ops::Range;

use crate::matmul::{Mat, MatMut, Shared, product};
use crate::parallel::{for_blocks, for_tiles};
use crate::scratch::with_scratch;
use crate::simd::{self, Element};
use crate::view::{Data, View, ViewMut};

/// How a weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// [out, in], as in PyTorch's `nn.Linear`.
    OutIn,
    /// [in, out], as in GPT-2's `Conv1D`.
    InOut,
}

/// The weight of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// The matrix, [out, in] or [in, out] as `layout` says.
    pub view: View<'a>,
    /// Which of its sides is which.
    pub layout: Layout,
}

impl Weight<'_> {
    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        match self.layout {
            Layout::OutIn => self.view.cols(),
            Layout::InOut => self.view.rows(),
        }
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        match self.layout {
            Layout::OutIn => self.view.rows(),
            Layout::InOut => self.view.cols(),
        }
    }
}

/// Rows or columns of a weight that a task takes.
const STRIP: usize = 96;
/// Tokens that a task takes.
const TOKENS: usize = 256;
/// Terms of a sum that are widened at once; with `STRIP` f32 columns they fill 192 KiB.
const DEPTH: usize = 512;
/// Tokens up to which products of rows, which read each weight once and pack nothing, are faster.
const FEW_TOKENS: usize = 32;
/// Weights that a task takes when there are few tokens.
const FEW_BLOCK: usize = 32 * 1024;

/// y = x·Wᵀ + b; y [T, out] is overwritten, x [T, in], b [1, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_forward(mut y: ViewMut<'_>, x: View<'_>, w: Weight<'_>, bias: Option<View<'_>>) {
    x.assert_shape("the input of a linear", y.rows(), w.inputs());
    y.assert_shape("the output of a linear", x.rows(), w.outputs());
    let accumulate = bias.is_some();
    if let Some(bias) = bias {
        bias.assert_shape("the bias of a linear", 1, w.outputs());
        for row in y
            .reborrow()
            .into_f32s()
            .chunks_exact_mut(bias.cols().max(1))
        {
            bias.widen(0, 0..bias.cols(), row);
        }
    }
    match w.layout {
        Layout::OutIn => times_rows(y, x, w.view, accumulate),
        Layout::InOut => times_columns(y, x, w.view, accumulate),
    }
}

/// dx = dy·W, or dx += dy·W if `accumulate`; dx [T, in], dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_backward_input(dx: ViewMut<'_>, dy: View<'_>, w: Weight<'_>, accumulate: bool) {
    dx.assert_shape("the input gradient of a linear", dy.rows(), w.inputs());
    dy.assert_shape("the output gradient of a linear", dx.rows(), w.outputs());
    // y = x·Wᵀ + b
    match w.layout {
        Layout::OutIn => times_columns(dx, dy, w.view, accumulate),
        Layout::InOut => times_rows(dx, dy, w.view, accumulate),
    }
}

/// dW += dyᵀ·x in the weight's own layout; dy [T, out], x [T, in].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_backward_weight(dw: ViewMut<'_>, dy: View<'_>, x: View<'_>, layout: Layout) {
    assert_eq!(dy.rows(), x.rows(), "tokens of a weight gradient");
    // y = x·Wᵀ + b
    let (left, right) = match layout {
        Layout::OutIn => (dy, x),
        Layout::InOut => (x, dy),
    };
    dw.assert_shape("the weight gradient of a linear", left.cols(), right.cols());
    let (rows, cols) = (dw.rows(), dw.cols());
    let (left, right) = (matrix(left), matrix(right));
    let out = Shared::new(dw.into_f32s(), rows, cols);
    let tokens = 0..dy.rows();
    for_tiles((rows, STRIP), (cols, TOKENS), |down, across| {
        #[expect(unsafe_code, reason = "tasks write disjoint tiles")]
        // SAFETY: the tiles of `for_tiles` do not overlap.
        let tile = unsafe { out.block(down.clone(), across.clone()) };
        product(
            tile,
            true,
            1.0,
            left.block(tokens.clone(), down).t(),
            right.block(tokens.clone(), across),
        );
    });
}

/// db += Σ over tokens of dy; db [1, out], dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn bias_backward(db: ViewMut<'_>, dy: View<'_>) {
    db.assert_shape("the bias gradient of a linear", 1, dy.cols());
    // y = x·Wᵀ + b
    let cols = dy.cols();
    let dy = dy.f32s();
    let out = Shared::new(db.into_f32s(), 1, cols);
    for_blocks(cols, STRIP, |across| {
        #[expect(unsafe_code, reason = "tasks write disjoint columns")]
        // SAFETY: the blocks of `for_blocks` do not overlap.
        let mut sums = unsafe { out.block(0..1, across.clone()) };
        let sums = sums.row(0);
        for row in dy.chunks_exact(cols) {
            simd::add(sums, &row[across.clone()]);
        }
    });
}

pub(crate) fn matrix(view: View<'_>) -> Mat<'_> {
    Mat::new(view.f32s(), view.rows(), view.cols())
}

/// y (+)= x·wᵀ; y [T, N], x [T, K], w [N, K].
pub(crate) fn times_rows(y: ViewMut<'_>, x: View<'_>, w: View<'_>, accumulate: bool) {
    let (tokens, outs, ins) = (y.rows(), y.cols(), x.cols());
    if tokens <= FEW_TOKENS {
        return match w.data() {
            Data::F32(w) => few_times_rows(y, x, w, accumulate),
            Data::Bf16(w) => few_times_rows(y, x, w, accumulate),
        };
    }
    let x = matrix(x);
    let out = Shared::new(y.into_f32s(), tokens, outs);
    for_tiles((tokens, TOKENS), (outs, STRIP), |down, across| {
        #[expect(unsafe_code, reason = "tasks write disjoint tiles")]
        // SAFETY: the tiles of `for_tiles` do not overlap.
        let tile = unsafe { out.block(down.clone(), across.clone()) };
        let x = x.block(down, 0..ins);
        with_widened(w, across, 0..ins, |strip| {
            product(tile, accumulate, 1.0, x, strip.t());
        });
    });
}

/// [`times_rows`] for few tokens, as products of rows of x with rows of w.
fn few_times_rows<E: Element>(y: ViewMut<'_>, x: View<'_>, w: &[E], accumulate: bool) {
    let (tokens, outs, ins) = (y.rows(), y.cols(), x.cols());
    let x = x.f32s();
    let block = (FEW_BLOCK / ins.max(1)).next_multiple_of(4).max(4);
    let out = Shared::new(y.into_f32s(), tokens, outs);
    for_blocks(outs, block, |across| {
        #[expect(unsafe_code, reason = "tasks write disjoint columns")]
        // SAFETY: the blocks of `for_blocks` do not overlap.
        let mut tile = unsafe { out.block(0..tokens, across.clone()) };
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
pub(crate) fn times_columns(y: ViewMut<'_>, x: View<'_>, w: View<'_>, accumulate: bool) {
    let (tokens, outs, ins) = (y.rows(), y.cols(), x.cols());
    let x = matrix(x);
    let out = Shared::new(y.into_f32s(), tokens, outs);
    for_tiles((tokens, TOKENS), (outs, STRIP), |down, across| {
        // Summing a part of the inputs at a time, in order, keeps the strip within the cache.
        for start in (0..ins.max(1)).step_by(DEPTH) {
            let part = start..(start + DEPTH).min(ins);
            #[expect(unsafe_code, reason = "tasks write disjoint tiles")]
            // SAFETY: the tiles of `for_tiles` do not overlap, and the tile of the previous part
            // is no longer in use.
            let tile = unsafe { out.block(down.clone(), across.clone()) };
            let x = x.block(down.clone(), part.clone());
            with_widened(w, part, across.clone(), |strip| {
                product(tile, accumulate || start > 0, 1.0, x, strip);
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
