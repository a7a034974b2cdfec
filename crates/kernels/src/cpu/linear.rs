//! Products of linears with their branches.

use std::borrow::Cow;
use std::ops::Range;

use crate::cpu::low_rank::{GeneratedBranch, add_generated, down_job, up};
use crate::cpu::product::few::{FewJob, few_times_rows};
use crate::cpu::product::integers::{self, IntegerJob};
use crate::cpu::product::mat::for_tiles;
use crate::cpu::product::multiply::multiply;
use crate::cpu::product::term::{Factor, Job, Left, Start, Term};
use crate::cpu::simd;
use crate::types::classes::RowClasses;
use crate::types::compute::ComputeDType;
use crate::types::linear::{
    BranchGradient, BranchOutput, Layout, LinearGradient, LinearOutput, Weight,
};
use crate::view::{View, ViewMut};

/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;

/// What is left of an output when its `y` is taken: the branches of rows of prompts, and those of generated ones.
pub(crate) struct Rest<'a> {
    pub(crate) w: Weight<'a>,
    bias: Option<Cow<'a, [f32]>>,
    pub(crate) prompt: Vec<BranchOutput<'a>>,
    pub(crate) generated: Vec<BranchOutput<'a>>,
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

    pub(crate) fn new(output: LinearOutput<'a>, classes: RowClasses) -> (ViewMut<'a>, Self) {
        let LinearOutput {
            y,
            w,
            bias,
            branches,
        } = output;
        let bias = bias.map(|bias| {
            (bias.numbers().f32s()).map_or_else(|| Cow::Owned(bias.to_vec()), Cow::Borrowed)
        });
        let (mut prompt, mut generated) = (Vec::new(), Vec::new());
        for BranchOutput { u, rows, branch } in branches {
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

/// The rows that panels compute, with their branches.
pub(crate) fn in_panels(
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
            let compute = if classes.rounds() && w.view.format().has_integers() {
                ComputeDType::Bf16
            } else {
                compute
            };
            let product = Term::new(x.slice_rows(rows).as_left(), w).with(compute);
            let branches =
                (output.prompt.iter()).map(|b| up(&b.branch, b.u.as_view(), b.rows.start));
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

/// What panels do not compute: the generated rows of weights that lie as these read them, and x·Aᵀ of their branches.
pub(crate) fn generated(
    x: View<'_>,
    ys: &mut [ViewMut<'_>],
    rest: &mut [Rest<'_>],
    classes: RowClasses,
) {
    let (_, rows) = classes.split(&(0..x.rows()));
    if rows.is_empty() {
        return;
    }
    let (mut jobs, mut of_integers) = (Vec::new(), Vec::new());
    for (y, output) in ys.iter_mut().zip(rest) {
        let start = output.bias.as_deref().map_or(Start::Zero, Start::Row);
        let (w, y) = (output.w.view, y.reborrow());
        if output.w.layout == Layout::OutIn {
            let y = y.slice_rows(rows.clone());
            if classes.rounds() && w.format().has_integers() {
                of_integers.push(IntegerJob { y, w, start });
            } else {
                jobs.push(FewJob {
                    y,
                    rows: rows.clone(),
                    w,
                    start,
                });
            }
        }
        for BranchOutput { u, rows, branch } in &mut output.generated {
            jobs.push(down_job(branch, u.reborrow(), rows.clone()));
        }
    }
    if !of_integers.is_empty() {
        integers::multiply(x.slice_rows(rows), of_integers);
    }
    few_times_rows(x, jobs);
}

/// Adds the branches of generated rows.
pub(crate) fn generated_branches(
    ys: Vec<ViewMut<'_>>,
    rest: &[Rest<'_>],
    tokens: usize,
    classes: RowClasses,
) {
    let (_, rows) = classes.split(&(0..tokens));
    let outputs = ys.into_iter().zip(rest).map(|(y, output)| {
        let branches = output.generated.iter().map(|b| GeneratedBranch {
            u: b.u.as_view(),
            first: b.rows.start - rows.start,
            branch: b.branch,
        });
        (y.slice_rows(rows.clone()), branches.collect())
    });
    add_generated(outputs.collect());
}

pub(crate) fn linears_backward_input(
    dx: ViewMut<'_>,
    gradients: &[LinearGradient<'_>],
    compute: ComputeDType,
) {
    let mut terms = Vec::new();
    for LinearGradient { dy, w, branches } in gradients {
        // y = x·Wᵀ + b, so dx = dy·W
        let w = match w.layout {
            Layout::OutIn => Factor::straight(w.view),
            Layout::InOut => Factor::turned(w.view),
        };
        terms.push(Term::new(dy.as_left(), w).with(compute));
        for BranchGradient { du, rows, a } in branches {
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

pub(crate) fn linear_backward_input(
    dx: ViewMut<'_>,
    dy: Left<'_>,
    w: Weight<'_>,
    accumulate: bool,
    compute: ComputeDType,
) {
    let start = if accumulate { Start::Sum } else { Start::Zero };
    // y = x·Wᵀ + b, so dx = dy·W
    let w = match w.layout {
        Layout::OutIn => Factor::straight(w.view),
        Layout::InOut => Factor::turned(w.view),
    };
    let terms = &[Term::new(dy, w).with(compute)];
    multiply(vec![Job {
        y: dx,
        start,
        terms,
    }]);
}

pub(crate) fn linear_backward_weight(
    dw: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
    layout: Layout,
    compute: ComputeDType,
) {
    // y = x·Wᵀ + b, so dW += dyᵀ·x
    let (left, right) = match layout {
        Layout::OutIn => (dy, x),
        Layout::InOut => (x, dy),
    };
    let terms = &[Term::new(left.as_mat().t(), Factor::straight(right)).with(compute)];
    multiply(vec![Job {
        y: dw,
        start: Start::Sum,
        terms,
    }]);
}

pub(crate) fn bias_backward(db: ViewMut<'_>, dy: View<'_>) {
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
