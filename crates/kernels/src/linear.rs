//! A linear layer: y = x·Wᵀ + b.
//!
//! `linear_forward` overwrites y; `linear_backward_input` overwrites or accumulates as asked;
//! `linear_backward_weight` and `bias_backward` accumulate.

use crate::few::{FEW_TOKENS, few_times_rows};
use crate::matmul::{for_tiles, product};
use crate::profile::op;
use crate::simd;
use crate::strips::{Start, times_columns, times_rows};
use crate::tensor::DType;
use crate::view::{View, ViewMut};

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

/// Rows and columns of a weight's gradient that a task takes.
const TILE: (usize, usize) = (96, 256);
/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;

/// y = x·Wᵀ + b; y [T, out] is overwritten, x [T, in], b [1, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_forward(y: ViewMut<'_>, x: View<'_>, w: Weight<'_>, bias: Option<View<'_>>) {
    let _op = op("linear forward", || 2.0 * (x.rows() * w.view.len()) as f64);
    x.assert_shape("the input of a linear", y.rows(), w.inputs());
    y.assert_shape("the output of a linear", x.rows(), w.outputs());
    let run = |start: Start<'_>| match w.layout {
        Layout::OutIn => times_rows(y, x, w.view, start),
        Layout::InOut => times_columns(y, x, w.view, start),
    };
    match bias {
        None => run(Start::Zero),
        Some(bias) => {
            bias.assert_shape("the bias of a linear", 1, w.outputs());
            bias.with_f32s(|bias| run(Start::Row(bias)));
        }
    }
}

/// y = x·Wᵀ + b for several linears of one input, as [`linear_forward`] does each; with few tokens
/// they are computed together.
///
/// # Panics
/// If the shapes do not match.
pub fn linear_forward_each<const N: usize>(
    ys: [ViewMut<'_>; N],
    x: View<'_>,
    ws: [Weight<'_>; N],
    biases: [Option<View<'_>>; N],
) {
    let together = x.rows() <= FEW_TOKENS
        && ws.iter().all(|w| w.layout == Layout::OutIn)
        && biases.iter().flatten().all(|b| b.dtype() == DType::F32);
    if !together {
        for ((y, w), bias) in ys.into_iter().zip(ws).zip(biases) {
            linear_forward(y, x, w, bias);
        }
        return;
    }
    let _op = op("linear forward", || {
        let weights: usize = ws.iter().map(|w| w.view.len()).sum();
        2.0 * (x.rows() * weights) as f64
    });
    for ((y, w), bias) in ys.iter().zip(&ws).zip(&biases) {
        x.assert_shape("the input of a linear", y.rows(), w.inputs());
        y.assert_shape("the output of a linear", x.rows(), w.outputs());
        if let Some(bias) = bias {
            bias.assert_shape("the bias of a linear", 1, w.outputs());
        }
    }
    let starts = biases.map(|bias| bias.map_or(Start::Zero, |bias| Start::Row(bias.f32s())));
    few_times_rows(ys, x, ws.map(|w| w.view), starts);
}

/// dx = dy·W, or dx += dy·W if `accumulate`; dx [T, in], dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_backward_input(dx: ViewMut<'_>, dy: View<'_>, w: Weight<'_>, accumulate: bool) {
    let _op = op("linear backward, input", || {
        2.0 * (dy.rows() * w.view.len()) as f64
    });
    dx.assert_shape("the input gradient of a linear", dy.rows(), w.inputs());
    dy.assert_shape("the output gradient of a linear", dx.rows(), w.outputs());
    let start = if accumulate { Start::Sum } else { Start::Zero };
    // y = x·Wᵀ + b, so dx = dy·W
    match w.layout {
        Layout::OutIn => times_columns(dx, dy, w.view, start),
        Layout::InOut => times_rows(dx, dy, w.view, start),
    }
}

/// dW += dyᵀ·x in the weight's own layout; dy [T, out], x [T, in].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_backward_weight(dw: ViewMut<'_>, dy: View<'_>, x: View<'_>, layout: Layout) {
    let _op = op("linear backward, weight", || {
        2.0 * (dy.rows() * dw.len()) as f64
    });
    assert_eq!(dy.rows(), x.rows(), "tokens of a weight gradient");
    // y = x·Wᵀ + b, so dW += dyᵀ·x
    let (left, right) = match layout {
        Layout::OutIn => (dy, x),
        Layout::InOut => (x, dy),
    };
    dw.assert_shape("the weight gradient of a linear", left.cols(), right.cols());
    let (left, right) = (left.as_mat(), right.as_mat());
    let tokens = 0..dy.rows();
    for_tiles(dw, TILE, |tile, down, across| {
        let left = left.block(tokens.clone(), down).t();
        product(tile, true, 1.0, left, right.block(tokens.clone(), across));
    });
}

/// db += Σ over tokens of dy; db [1, out], dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn bias_backward(db: ViewMut<'_>, dy: View<'_>) {
    let _op = op("bias backward", || 0.0);
    db.assert_shape("the bias gradient of a linear", 1, dy.cols());
    // y = x·Wᵀ + b, so db += Σ dy
    let cols = dy.cols();
    let dy = dy.f32s();
    for_tiles(db, (1, COLUMNS), |mut sums, _, across| {
        let sums = sums.row(0);
        for row in dy.chunks_exact(cols) {
            simd::add(sums, &row[across.clone()]);
        }
    });
}
