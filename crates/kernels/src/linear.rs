//! A linear layer: y = x·Wᵀ + b.
//!
//! `linear_forward` overwrites y; `linear_backward_input` overwrites or accumulates as asked;
//! `linear_backward_weight` and `bias_backward` accumulate.

use std::ops::Range;

use crate::few::{FEW_TOKENS, few_times_rows};
use crate::low_rank::{LowRank, low_rank_down, low_rank_forward};
use crate::matmul::for_tiles;
use crate::profile::op;
use crate::simd;
use crate::strips::{Factor, Job, Precision, Start, Term, multiply, times_columns, times_rows};
use crate::tensor::DType;
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

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

/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;

/// One of several linears that read the same input.
pub struct LinearOutput<'a> {
    /// [T, out], overwritten.
    pub y: ViewMut<'a>,
    /// The weight.
    pub w: Weight<'a>,
    /// [1, out].
    pub bias: Option<View<'a>>,
    /// What is added beside it.
    pub branches: Vec<BranchOutput<'a>>,
}

/// A low-rank branch beside a linear.
pub struct BranchOutput<'a> {
    /// drop(x)·Aᵀ [rows, r], overwritten and saved for the backward.
    pub u: ViewMut<'a>,
    /// The rows of the input that it applies to.
    pub rows: Range<usize>,
    /// Its factors.
    pub branch: LowRank<'a>,
}

/// y = x·Wᵀ + b, plus s·u·Bᵀ with u = drop(x)·Aᵀ for each branch; for several linears at once. x [T, in].
///
/// # Panics
/// If the shapes do not match.
pub fn linears_forward(
    x: View<'_>,
    outputs: Vec<LinearOutput<'_>>,
    precision: Precision,
    ws: &Workspace,
) {
    if x.rows() <= FEW_TOKENS {
        return few_linears_forward(x, outputs, ws);
    }
    let (mut ys, mut rest) = (Vec::new(), Vec::new());
    for mut output in outputs {
        for BranchOutput { u, rows, branch } in &mut output.branches {
            branch.check(output.y.cols(), x, (u.rows(), u.cols()), rows);
            low_rank_down(u.reborrow(), x, rows.clone(), branch);
        }
        let shape = (x.rows(), output.w.outputs());
        output
            .y
            .assert_shape("the output of a linear", shape.0, shape.1);
        x.assert_shape("the input of a linear", x.rows(), output.w.inputs());
        if let Some(bias) = output.bias {
            bias.assert_shape("the bias of a linear", 1, shape.1);
        }
        ys.push(output.y);
        rest.push((output.w, output.bias.map(|b| b.to_vec()), output.branches));
    }
    let _op = op("linear forward", || {
        let products = rest.iter().map(|(w, _, branches)| {
            let branches = branches.iter().map(|b| b.rows.len() * b.branch.b.len());
            x.rows() * w.view.len() + branches.sum::<usize>()
        });
        2.0 * products.sum::<usize>() as f64
    });
    let terms: Vec<Vec<Term<'_>>> = rest
        .iter()
        .map(|(w, _, branches)| {
            let w = match w.layout {
                Layout::OutIn => Factor::turned(w.view),
                Layout::InOut => Factor::straight(w.view),
            };
            let branches = branches.iter().map(|b| Term {
                a: b.u.as_view().as_mat(),
                b: Factor::turned(b.branch.b),
                scale: b.branch.scale,
                precision,
                at: (b.rows.start, b.branch.out_offset),
            });
            let product = Term::new(x.as_mat(), w).with(precision);
            std::iter::once(product).chain(branches).collect()
        })
        .collect();
    let jobs = ys.into_iter().zip(&terms).zip(&rest);
    let jobs = jobs.map(|((y, terms), (_, bias, _))| Job {
        y,
        start: bias.as_deref().map_or(Start::Zero, Start::Row),
        terms,
    });
    multiply(jobs.collect());
}

/// [`linears_forward`] for few tokens: the weights together, then each branch.
fn few_linears_forward(x: View<'_>, mut outputs: Vec<LinearOutput<'_>>, ws: &Workspace) {
    let together = outputs.iter().all(|output| {
        let bias = output.bias.is_none_or(|bias| bias.dtype() == DType::F32);
        output.w.layout == Layout::OutIn && bias
    });
    if together {
        let _op = op("linear forward", || {
            let weights: usize = outputs.iter().map(|output| output.w.view.len()).sum();
            2.0 * (x.rows() * weights) as f64
        });
        let jobs = outputs.iter_mut().map(|output| {
            let LinearOutput { y, w, bias, .. } = output;
            x.assert_shape("the input of a linear", y.rows(), w.inputs());
            y.assert_shape("the output of a linear", x.rows(), w.outputs());
            if let Some(bias) = bias {
                bias.assert_shape("the bias of a linear", 1, w.outputs());
            }
            let start = bias.map_or(Start::Zero, |bias| Start::Row(bias.f32s()));
            (y.reborrow(), w.view, start)
        });
        few_times_rows(x, jobs.collect());
    } else {
        for LinearOutput { y, w, bias, .. } in &mut outputs {
            linear_forward(y.reborrow(), x, *w, *bias);
        }
    }
    for output in outputs {
        let mut y = output.y;
        for BranchOutput { u, rows, branch } in output.branches {
            low_rank_forward(y.reborrow(), u, x, rows, &branch, ws);
        }
    }
}

/// The gradient of a linear's output, on its way to the input.
pub struct LinearGradient<'a> {
    /// [T, out].
    pub dy: View<'a>,
    /// The weight.
    pub w: Weight<'a>,
    /// Of its branches that drop nothing.
    pub branches: Vec<BranchGradient<'a>>,
}

/// The gradient of a low-rank branch's inner rows.
pub struct BranchGradient<'a> {
    /// s·dy·B [rows, r], as [`low_rank_backward_hidden`](crate::low_rank_backward_hidden) gives it.
    pub du: View<'a>,
    /// The rows of the input that the branch applies to.
    pub rows: Range<usize>,
    /// A [r, in].
    pub a: View<'a>,
}

/// dx = Σ over linears of dy·W + Σ over their branches of du·A; dx [T, in] is overwritten.
///
/// # Panics
/// If the shapes do not match.
pub fn linears_backward_input(
    dx: ViewMut<'_>,
    gradients: &[LinearGradient<'_>],
    precision: Precision,
) {
    let _op = op("linear backward, input", || {
        let products = gradients.iter().map(|linear| {
            let branches = linear.branches.iter().map(|b| b.rows.len() * b.a.len());
            linear.dy.rows() * linear.w.view.len() + branches.sum::<usize>()
        });
        2.0 * products.sum::<usize>() as f64
    });
    let mut terms = Vec::new();
    for LinearGradient { dy, w, branches } in gradients {
        dx.assert_shape("the input gradient of a linear", dy.rows(), w.inputs());
        dy.assert_shape("the output gradient of a linear", dx.rows(), w.outputs());
        // y = x·Wᵀ + b, so dx = dy·W
        let w = match w.layout {
            Layout::OutIn => Factor::straight(w.view),
            Layout::InOut => Factor::turned(w.view),
        };
        terms.push(Term::new(dy.as_mat(), w).with(precision));
        for BranchGradient { du, rows, a } in branches {
            a.assert_shape("A", du.cols(), dx.cols());
            assert!(rows.len() == du.rows() && rows.end <= dx.rows());
            // u = x·Aᵀ, so dx += du·A
            terms.push(Term {
                at: (rows.start, 0),
                ..Term::new(du.as_mat(), Factor::straight(*a)).with(precision)
            });
        }
    }
    multiply(vec![Job {
        y: dx,
        start: Start::Zero,
        terms: &terms,
    }]);
}

/// y = x·Wᵀ + b; y [T, out] is overwritten, x [T, in], b [1, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_forward(y: ViewMut<'_>, x: View<'_>, w: Weight<'_>, bias: Option<View<'_>>) {
    let _op = op("linear forward", || 2.0 * (x.rows() * w.view.len()) as f64);
    x.assert_shape("the input of a linear", y.rows(), w.inputs());
    y.assert_shape("the output of a linear", x.rows(), w.outputs());
    let run = |start: Start<'_>| match w.layout {
        Layout::OutIn => times_rows(y, x, w.view, start, Precision::F32),
        Layout::InOut => times_columns(y, x, w.view, start, Precision::F32),
    };
    match bias {
        None => run(Start::Zero),
        Some(bias) => {
            bias.assert_shape("the bias of a linear", 1, w.outputs());
            bias.with_f32s(|bias| run(Start::Row(bias)));
        }
    }
}

/// dx = dy·W, or dx += dy·W if `accumulate`; dx [T, in], dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_backward_input(
    dx: ViewMut<'_>,
    dy: View<'_>,
    w: Weight<'_>,
    accumulate: bool,
    precision: Precision,
) {
    let _op = op("linear backward, input", || {
        2.0 * (dy.rows() * w.view.len()) as f64
    });
    dx.assert_shape("the input gradient of a linear", dy.rows(), w.inputs());
    dy.assert_shape("the output gradient of a linear", dx.rows(), w.outputs());
    let start = if accumulate { Start::Sum } else { Start::Zero };
    // y = x·Wᵀ + b, so dx = dy·W
    match w.layout {
        Layout::OutIn => times_columns(dx, dy, w.view, start, precision),
        Layout::InOut => times_rows(dx, dy, w.view, start, precision),
    }
}

/// dW += dyᵀ·x in the weight's own layout; dy [T, out], x [T, in].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_backward_weight(
    dw: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
    layout: Layout,
    precision: Precision,
) {
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
    let terms = &[Term::new(left.as_mat().t(), Factor::straight(right)).with(precision)];
    multiply(vec![Job {
        y: dw,
        start: Start::Sum,
        terms,
    }]);
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
