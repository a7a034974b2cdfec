//! A linear layer: y = x·Wᵀ + b.
//!
//! `linear_forward` overwrites y; `linear_backward_input` overwrites or accumulates as asked;
//! `linear_backward_weight` and `bias_backward` accumulate.

use std::borrow::Cow;
use std::ops::Range;

use crate::classes::RowClasses;
use crate::compute::ComputeDType;
use crate::cpu::product::few::{FewJob, few_times_rows};
use crate::cpu::product::mat::for_tiles;
use crate::cpu::product::multiply::multiply;
use crate::cpu::product::term::{Factor, Job, Start, Term};
use crate::cpu::simd;
use crate::ops::low_rank::{GeneratedBranch, LowRank, add_generated, low_rank_down};
use crate::profile::op;
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
/// A row's bits are those that it has alone, among rows of its class. The workspace is for devices that need temporaries here; this
/// one does not.
///
/// # Panics
/// If the shapes do not match, or a branch of generated rows drops some of their numbers.
pub fn linears_forward(
    x: View<'_>,
    outputs: Vec<LinearOutput<'_>>,
    classes: RowClasses,
    compute: ComputeDType,
    _ws: &Workspace,
) {
    forward(x, outputs, classes, compute);
}

/// y = x·Wᵀ + b; y [T, out] is overwritten, x [T, in], b [1, out].
///
/// # Panics
/// If the shapes do not match.
pub fn linear_forward(
    y: ViewMut<'_>,
    x: View<'_>,
    w: Weight<'_>,
    bias: Option<View<'_>>,
    classes: RowClasses,
) {
    let output = LinearOutput {
        y,
        w,
        bias,
        branches: Vec::new(),
    };
    forward(x, vec![output], classes, ComputeDType::F32);
}

/// What is left of an output when its `y` is taken.
struct Rest<'a> {
    w: Weight<'a>,
    bias: Option<Cow<'a, [f32]>>,
    prompt: Vec<BranchOutput<'a>>,
    generated: Vec<BranchOutput<'a>>,
}

impl<'a> Rest<'a> {
    fn start(&self) -> Start<'_> {
        self.bias.as_deref().map_or(Start::Zero, Start::Row)
    }

    /// The rows that panels compute: those of prompts, and all where a weight does not lie as generated rows read it.
    fn rows_in_panels(&self, tokens: usize, classes: RowClasses) -> Range<usize> {
        match self.w.layout {
            Layout::OutIn => classes.split(&(0..tokens)).0,
            Layout::InOut => 0..tokens,
        }
    }

    fn new(output: LinearOutput<'a>, x: View<'_>, classes: RowClasses) -> (ViewMut<'a>, Self) {
        let LinearOutput {
            y,
            w,
            bias,
            branches,
        } = output;
        x.assert_shape("the input of a linear", y.rows(), w.inputs());
        y.assert_shape("the output of a linear", x.rows(), w.outputs());
        let bias = bias.map(|bias| {
            bias.assert_shape("the bias of a linear", 1, w.outputs());
            (bias.numbers().f32s()).map_or_else(|| Cow::Owned(bias.to_vec()), Cow::Borrowed)
        });
        let (mut prompt, mut generated) = (Vec::new(), Vec::new());
        for BranchOutput { u, rows, branch } in branches {
            branch.check(y.cols(), x, (u.rows(), u.cols()), &rows, classes);
            let (before, after) = classes.split(&rows);
            let (u_before, u_after) = u.split_rows(before.len());
            for (u, rows, list) in [
                (u_before, before, &mut prompt),
                (u_after, after, &mut generated),
            ] {
                if !rows.is_empty() {
                    list.push(BranchOutput { u, rows, branch });
                }
            }
        }
        let rest = Self {
            w,
            bias,
            prompt,
            generated,
        };
        (y, rest)
    }
}

fn forward(
    x: View<'_>,
    outputs: Vec<LinearOutput<'_>>,
    classes: RowClasses,
    compute: ComputeDType,
) {
    let outputs = outputs
        .into_iter()
        .map(|output| Rest::new(output, x, classes));
    let (mut ys, mut rest): (Vec<_>, Vec<_>) = outputs.unzip();
    for output in &mut rest {
        for BranchOutput { u, rows, branch } in &mut output.prompt {
            low_rank_down(u.reborrow(), x, rows.clone(), branch);
        }
    }
    let _op = op("linear forward", || {
        let products = rest.iter().map(|output| {
            let branches = output.prompt.iter();
            let branches = branches.map(|b| b.rows.len() * b.branch.b.len());
            x.rows() * output.w.view.len() + branches.sum::<usize>()
        });
        2.0 * products.sum::<usize>() as f64
    });
    in_panels(x, &mut ys, &rest, classes, compute);
    generated(x, ys, &mut rest, classes);
}

/// The rows that panels compute, with their branches.
fn in_panels(
    x: View<'_>,
    ys: &mut [ViewMut<'_>],
    rest: &[Rest<'_>],
    classes: RowClasses,
    compute: ComputeDType,
) {
    let terms: Vec<Vec<Term<'_>>> = rest
        .iter()
        .map(|output| {
            let w = match output.w.layout {
                Layout::OutIn => Factor::turned(output.w.view),
                Layout::InOut => Factor::straight(output.w.view),
            };
            let rows = output.rows_in_panels(x.rows(), classes);
            let product = Term::new(x.slice_rows(rows).as_mat(), w).with(compute);
            let branches = (output.prompt.iter()).map(|b| b.branch.up(b.u.as_view(), b.rows.start));
            let branches = branches.map(|term| term.with(compute));
            std::iter::once(product).chain(branches).collect()
        })
        .collect();
    let jobs = ys.iter_mut().zip(&terms).zip(rest);
    let jobs = jobs.filter_map(|((y, terms), output)| {
        let rows = output.rows_in_panels(x.rows(), classes);
        (!rows.is_empty()).then(|| Job {
            y: y.reborrow().slice_rows(rows),
            start: output.start(),
            terms,
        })
    });
    let jobs: Vec<Job<'_>> = jobs.collect();
    if !jobs.is_empty() {
        multiply(jobs);
    }
}

/// What panels do not compute: the generated rows of weights that lie as these read them, and the branches of generated rows.
fn generated(x: View<'_>, ys: Vec<ViewMut<'_>>, rest: &mut [Rest<'_>], classes: RowClasses) {
    let (_, rows) = classes.split(&(0..x.rows()));
    if rows.is_empty() {
        return;
    }
    let mut ys: Vec<ViewMut<'_>> = (ys.into_iter())
        .map(|y| y.slice_rows(rows.clone()))
        .collect();
    let mut jobs = Vec::new();
    for (y, output) in ys.iter_mut().zip(&mut *rest) {
        if output.w.layout == Layout::OutIn {
            jobs.push(FewJob {
                y: y.reborrow(),
                rows: rows.clone(),
                w: output.w.view,
                start: output.bias.as_deref().map_or(Start::Zero, Start::Row),
            });
        }
        for BranchOutput { u, rows, branch } in &mut output.generated {
            jobs.push(branch.down_job(u.reborrow(), rows.clone()));
        }
    }
    few_times_rows(x, jobs);
    let branches: Vec<Vec<GeneratedBranch<'_>>> = rest
        .iter()
        .map(|output| {
            let branches = output.generated.iter().map(|b| GeneratedBranch {
                u: b.u.as_view(),
                first: b.rows.start - rows.start,
                branch: b.branch,
            });
            branches.collect()
        })
        .collect();
    add_generated(ys.into_iter().zip(branches).collect());
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
    compute: ComputeDType,
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
        terms.push(Term::new(dy.as_mat(), w).with(compute));
        for BranchGradient { du, rows, a } in branches {
            a.assert_shape("A", du.cols(), dx.cols());
            assert!(rows.len() == du.rows() && rows.end <= dx.rows());
            // u = x·Aᵀ, so dx += du·A
            terms.push(Term {
                at: (rows.start, 0),
                ..Term::new(du.as_mat(), Factor::straight(*a)).with(compute)
            });
        }
    }
    multiply(vec![Job {
        y: dx,
        start: Start::Zero,
        terms: &terms,
    }]);
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
    compute: ComputeDType,
) {
    let _op = op("linear backward, input", || {
        2.0 * (dy.rows() * w.view.len()) as f64
    });
    dx.assert_shape("the input gradient of a linear", dy.rows(), w.inputs());
    dy.assert_shape("the output gradient of a linear", dx.rows(), w.outputs());
    let start = if accumulate { Start::Sum } else { Start::Zero };
    // y = x·Wᵀ + b, so dx = dy·W
    let w = match w.layout {
        Layout::OutIn => Factor::straight(w.view),
        Layout::InOut => Factor::turned(w.view),
    };
    let terms = &[Term::new(dy.as_mat(), w).with(compute)];
    multiply(vec![Job {
        y: dx,
        start,
        terms,
    }]);
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
    compute: ComputeDType,
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
    let terms = &[Term::new(left.as_mat().t(), Factor::straight(right)).with(compute)];
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
