//! The low-rank branch of an adapted linear layer: y += s·drop(x)·Aᵀ·Bᵀ (Hu et al., "LoRA", 2021).
//!
//! All results accumulate, except that the forward overwrites u. Only the given rows of T and the
//! columns from `out_offset` on of y are touched, so one batch may use many adapters, and one fused
//! matrix may carry several branches.

use std::ops::Range;

use rayon::prelude::*;

use crate::classes::RowClasses;
use crate::cpu::parallel::{ForEachPart, for_runs};
use crate::cpu::product::blocks::add_turned;
use crate::cpu::product::few::{FewJob, few_times_rows};
use crate::cpu::product::layout::NR;
use crate::cpu::product::mat::{ALL, Mat, MatMut, Shared, for_tiles};
use crate::cpu::product::multiply::{multiply, product, thin_product};

use crate::cpu::product::rows::{Packed, products_of_rows, with_packed};
use crate::cpu::product::term::{Factor, Job, Start, Term};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd;
use crate::profile::op;
use crate::random::drop_out;
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// Dropout whose mask is a function of a key and a position, so that recomputing gives it again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element, in [0, 1).
    pub p: f32,
    /// Which mask.
    pub key: u64,
}

impl Dropout {
    /// What the element at a row and column is multiplied by: 0, or 1 / (1 - p).
    pub fn factor(&self, row: usize, col: usize) -> f32 {
        let mut factor = [0.0];
        drop_out(&mut factor, &[1.0], self.p, self.key, row, col);
        factor[0]
    }
}

/// The two factors of a low-rank branch.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// A [r, in], f32.
    pub a: View<'a>,
    /// B [n_out, r], f32.
    pub b: View<'a>,
    /// Factor of the branch: lora_alpha / r.
    pub scale: f32,
    /// Column of y where the branch's output begins.
    pub out_offset: usize,
    /// Dropout of the branch's input.
    pub dropout: Option<Dropout>,
}

impl LowRank<'_> {
    fn rank(&self) -> usize {
        self.a.rows()
    }

    /// Whether elements of the input are dropped.
    pub fn drops(&self) -> bool {
        self.active_dropout().is_some()
    }

    fn active_dropout(&self) -> Option<Dropout> {
        self.dropout.filter(|dropout| dropout.p > 0.0)
    }

    /// The term that adds s·u·Bᵀ to rows of an output, from row `first` on. It is apart, since it may be for some of the rows.
    pub(crate) fn up<'b>(&'b self, u: View<'b>, first: usize) -> Term<'b> {
        Term {
            scale: self.scale,
            at: (first, self.out_offset),
            apart: true,
            ..Term::new(u.as_mat(), Factor::turned(self.b))
        }
    }

    /// u = x·Aᵀ for generated rows.
    pub(crate) fn down_job<'b>(&self, u: ViewMut<'b>, rows: Range<usize>) -> FewJob<'b>
    where
        Self: 'b,
    {
        FewJob {
            y: u,
            rows,
            w: self.a,
            start: Start::Zero,
        }
    }

    pub(crate) fn check(
        &self,
        y_cols: usize,
        x: View<'_>,
        u: (usize, usize),
        rows: &Range<usize>,
        classes: RowClasses,
    ) {
        self.b.assert_shape("B", self.b.rows(), self.rank());
        self.a.assert_shape("A", self.rank(), x.cols());
        assert!(
            self.out_offset + self.b.rows() <= y_cols,
            "columns {}..{} of a branch do not lie within the {y_cols} of its output",
            self.out_offset,
            self.out_offset + self.b.rows()
        );
        assert_eq!(u, (rows.len(), self.rank()), "shape of x·Aᵀ");
        if let Some(dropout) = self.dropout {
            let p = dropout.p;
            assert!((0.0..1.0).contains(&p), "{p} is not a rate of dropout");
        }
        assert!(
            rows.start <= rows.end && rows.end <= x.rows(),
            "rows {rows:?} do not lie within the {} of the input",
            x.rows()
        );
        assert!(
            !self.drops() || classes.split(rows).1.is_empty(),
            "dropout is for training, and generated rows are not trained on"
        );
    }
}

/// Tokens of a sum that are masked at once.
const DEPTH: usize = 512;
/// Tokens that a task takes.
const TOKENS: usize = 64;
/// Rank from which a general product is faster than products of rows.
const WIDE_RANK: usize = 16;
/// Rank from which a product in panels, of which every one has 16 columns, is faster.
const PANEL_RANK: usize = 8;
/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;

/// u = drop(x)·Aᵀ and y += s·u·Bᵀ for the given rows.
///
/// y [T, out] with n_out columns touched, u [rows, r] overwritten and saved for the backward,
/// x [T, in]. The workspace is for devices that need temporaries here; this one does not.
///
/// # Panics
/// If the shapes do not match, or numbers of generated rows are dropped.
pub fn low_rank_forward(
    y: ViewMut<'_>,
    u: ViewMut<'_>,
    x: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
    classes: RowClasses,
    _ws: &Workspace,
) {
    let _op = op("low-rank forward", || {
        2.0 * (rows.len() * (lr.a.len() + lr.b.len())) as f64
    });
    lr.check(y.cols(), x, (u.rows(), u.cols()), &rows, classes);
    assert_eq!(y.rows(), x.rows(), "tokens of a low-rank branch");
    let (prompt, generated) = classes.split(&rows);
    let (mut u_prompt, mut u_generated) = u.split_rows(prompt.len());
    let (y_prompt, y_generated) = y.slice_rows(rows).split_rows(prompt.len());
    if !prompt.is_empty() {
        low_rank_down(u_prompt.reborrow(), x, prompt, lr);
        let terms = &[lr.up(u_prompt.as_view(), 0)];
        multiply(vec![Job {
            y: y_prompt,
            start: Start::Sum,
            terms,
        }]);
    }
    if !generated.is_empty() {
        few_times_rows(x, vec![lr.down_job(u_generated.reborrow(), generated)]);
        let branch = GeneratedBranch {
            u: u_generated.as_view(),
            first: 0,
            branch: *lr,
        };
        add_generated(vec![(y_generated, vec![branch])]);
    }
}

/// A branch of generated rows, whose u is known.
pub(crate) struct GeneratedBranch<'a> {
    pub(crate) u: View<'a>,
    /// The first of its rows in the output.
    pub(crate) first: usize,
    pub(crate) branch: LowRank<'a>,
}

/// Columns of an output that a task of [`add_generated`] takes.
const STRIP: usize = 4 * NR;

/// y += s·u·Bᵀ for all branches of each y, the branches of all adapters as one piece of work for the threads.
pub(crate) fn add_generated(outputs: Vec<(ViewMut<'_>, Vec<GeneratedBranch<'_>>)>) {
    let outputs = outputs
        .into_iter()
        .filter(|(_, branches)| !branches.is_empty());
    let outputs: Vec<_> = outputs
        .map(|(y, branches)| (y.rows(), y.cols(), Shared::from(y), branches))
        .collect();
    let tasks = |cols: usize| cols.div_ceil(STRIP);
    let count = outputs.iter().map(|(_, cols, ..)| tasks(*cols)).sum();
    for_runs(count, |mut task| {
        for (rows, cols, y, branches) in &outputs {
            if task >= tasks(*cols) {
                task -= tasks(*cols);
                continue;
            }
            let strip = task * STRIP..((task + 1) * STRIP).min(*cols);
            #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
            // SAFETY: each task of an output has other columns, and each output is another matrix.
            let mut tile = unsafe { y.block(0..*rows, strip.clone()) };
            for branch in branches {
                add_branch(&mut tile, &strip, branch);
            }
            return;
        }
    });
}

/// What a branch adds to some columns of an output.
fn add_branch(tile: &mut MatMut<'_>, strip: &Range<usize>, branch: &GeneratedBranch<'_>) {
    let GeneratedBranch { u, first, branch } = branch;
    let (offset, rank) = (branch.out_offset, branch.rank());
    let columns = strip.start.max(offset)..strip.end.min(offset + branch.b.rows());
    if columns.is_empty() || rank == 0 {
        return;
    }
    let window = tile.window(
        *first..first + u.rows(),
        columns.start - strip.start..columns.end - strip.start,
    );
    let b = branch.b.as_mat();
    let b = b.block(columns.start - offset..columns.end - offset, 0..rank);
    add_turned(window, u.as_mat(), b, branch.scale);
}

/// u = drop(x)·Aᵀ for rows of prompts; u [rows, r] overwritten, x [T, in]. What computes it depends on the branch alone.
///
/// # Panics
/// If the shapes do not match.
pub(crate) fn low_rank_down(u: ViewMut<'_>, x: View<'_>, rows: Range<usize>, lr: &LowRank<'_>) {
    let _op = op("low-rank forward", || {
        2.0 * (rows.len() * lr.a.len()) as f64
    });
    let rank = lr.rank();
    if rank == 0 || rows.is_empty() {
        return;
    }
    if rank >= PANEL_RANK && lr.active_dropout().is_none() {
        let a = x.slice_rows(rows).as_mat();
        let terms = &[Term::new(a, Factor::turned(lr.a))];
        return multiply(vec![Job {
            y: u,
            start: Start::Zero,
            terms,
        }]);
    }
    let first = rows.start;
    let run = |a: Option<Packed<'_>>| {
        let blocks = u.into_f32s().par_chunks_mut(TOKENS * rank).enumerate();
        blocks.for_each_part(|(i, u)| {
            let count = u.len() / rank;
            let start = first + i * TOKENS;
            let mut u = MatMut::new(u, count, rank);
            down(&mut u, lr, x, start..start + count, a);
        });
    };
    with_rows_of_a(lr, run);
}

/// The gradient of the inner rows: du = s·dy·B for the given rows; du [rows, r] overwritten, dy [T, out].
///
/// # Panics
/// If the shapes do not match.
pub fn low_rank_backward_hidden(
    du: ViewMut<'_>,
    dy: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
    let _op = op("low-rank backward", || {
        2.0 * (rows.len() * lr.b.len()) as f64
    });
    du.assert_shape("the gradient of x·Aᵀ", rows.len(), lr.rank());
    let columns = lr.out_offset..lr.out_offset + lr.b.rows();
    // y += s·u·Bᵀ, so du = s·dy·B
    let terms = &[Term {
        scale: lr.scale,
        ..Term::new(dy.as_mat().block(rows, columns), Factor::straight(lr.b))
    }];
    multiply(vec![Job {
        y: du,
        start: Start::Zero,
        terms,
    }]);
}

/// The gradients of A and B for the given rows, added to what is there.
///
/// da [r, in], db [n_out, r], dy [T, out], x [T, in], u and du [rows, r] as
/// [`linears_forward`](crate::linears_forward) and [`low_rank_backward_hidden`] gave them.
///
/// # Panics
/// If the shapes do not match.
pub fn low_rank_backward_weights(
    da: ViewMut<'_>,
    db: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
    (u, du): (View<'_>, View<'_>),
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
    let _op = op("low-rank backward", || {
        2.0 * (rows.len() * (lr.a.len() + lr.b.len())) as f64
    });
    let shape = (u.rows(), u.cols());
    lr.check(dy.cols(), x, shape, &rows, RowClasses::PROMPT);
    assert_eq!(dy.rows(), x.rows(), "tokens of a low-rank branch");
    let (ins, rank, outs) = (x.cols(), lr.rank(), lr.b.rows());
    da.assert_shape("the gradient of A", rank, ins);
    db.assert_shape("the gradient of B", outs, rank);
    du.assert_shape("the gradient of x·Aᵀ", rows.len(), rank);
    let columns = lr.out_offset..lr.out_offset + outs;
    let dy = dy.as_mat().block(rows.clone(), columns);
    let (u, du) = (u.as_mat(), du.as_mat());
    // y += s·u·Bᵀ, so dBᵀ += s·uᵀ·dy
    for_tiles(db, (COLUMNS, ALL), |mut db, block, _| {
        with_scratch(rank * block.len(), |scratch| {
            let dy = dy.block(0..rows.len(), block.clone());
            thin_product(MatMut::new(scratch, rank, block.len()), u.t(), dy, false);
            for j in 0..block.len() {
                let db = db.row(j);
                for (i, db) in db.iter_mut().enumerate() {
                    *db += lr.scale * scratch[i * block.len() + j];
                }
            }
        });
    });
    // u = drop(x)·Aᵀ, so dA += duᵀ·drop(x)
    for_tiles(da, (ALL, COLUMNS), |mut da, _, block| {
        if lr.active_dropout().is_none() {
            let x = x.as_mat().block(rows.clone(), block);
            return thin_product(da, du.t(), x, true);
        }
        for start in (0..rows.len()).step_by(DEPTH) {
            let part = start..(start + DEPTH).min(rows.len());
            let du = du.block(part.clone(), 0..rank).t();
            let tokens = rows.start + part.start..rows.start + part.end;
            with_dropped(lr, x, tokens, block.clone(), |x| {
                thin_product(da.reborrow(), du, x, true);
            });
        }
    });
}

/// The gradient of a branch's input, added to dx: drop(du·A) with the mask of the forward.
///
/// dx [T, in], du [rows, r] as [`low_rank_backward_hidden`] gave it. Branches that drop nothing go with
/// their linears through [`linears_backward_input`](crate::linears_backward_input).
///
/// # Panics
/// If the shapes do not match.
pub fn low_rank_backward_input(
    dx: ViewMut<'_>,
    du: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
    let _op = op("low-rank backward", || {
        2.0 * (rows.len() * lr.a.len()) as f64
    });
    let (ins, rank) = (lr.a.cols(), lr.rank());
    dx.assert_shape("the input gradient of a low-rank branch", dx.rows(), ins);
    du.assert_shape("the gradient of x·Aᵀ", rows.len(), rank);
    let (a, du) = (lr.a.as_mat(), du.as_mat());
    let dx = dx.slice_rows(rows.clone());
    for_tiles(dx, (TOKENS, ALL), |mut dx, block, _| {
        let du = du.block(block.clone(), 0..rank);
        let Some(dropout) = lr.active_dropout() else {
            return product(dx, true, 1.0, du, a);
        };
        with_scratch((block.len() + 1) * ins, |scratch| {
            let (grads, dropped) = scratch.split_at_mut(block.len() * ins);
            product(MatMut::new(grads, block.len(), ins), false, 1.0, du, a);
            for (i, grads) in grads.chunks_exact(ins.max(1)).enumerate() {
                let row = rows.start + block.start + i;
                drop_out(dropped, grads, dropout.p, dropout.key, row, 0);
                simd::add(dx.row(i), dropped);
            }
        });
    });
}

/// Calls `work` with A's rows packed, unless the rank is so wide that a general product is faster.
fn with_rows_of_a(lr: &LowRank<'_>, work: impl FnOnce(Option<Packed<'_>>)) {
    if lr.rank() < WIDE_RANK && lr.a.cols() > 0 {
        with_packed::<f32, _>(lr.a.f32s(), lr.a.cols(), |a| work(Some(a)));
    } else {
        work(None);
    }
}

/// u = drop(x)·Aᵀ for a block of tokens; `a` holds A's rows unless the rank is wide.
fn down(
    u: &mut MatMut<'_>,
    lr: &LowRank<'_>,
    x: View<'_>,
    tokens: Range<usize>,
    a: Option<Packed<'_>>,
) {
    let ins = x.cols();
    let Some(a) = a else {
        with_dropped(lr, x, tokens, 0..ins, |x| {
            product(u.reborrow(), false, 1.0, x, lr.a.as_mat().t());
        });
        return;
    };
    let mut run = |x: &[f32]| {
        products_of_rows(
            a,
            x,
            ins,
            #[inline(always)]
            |first, token, sums, more| {
                let u = &mut u.row(token)[first..first + sums.len()];
                if more {
                    simd::add(u, sums);
                } else {
                    u.copy_from_slice(sums);
                }
            },
        );
    };
    if lr.active_dropout().is_none() {
        run(&x.f32s()[tokens.start * ins..tokens.end * ins]);
    } else {
        with_dropped(lr, x, tokens, 0..ins, |x| run(x.data()));
    }
}

/// Calls `work` with a block of the branch's input, after dropout.
fn with_dropped(
    lr: &LowRank<'_>,
    x: View<'_>,
    tokens: Range<usize>,
    cols: Range<usize>,
    work: impl FnOnce(Mat<'_>),
) {
    let Some(dropout) = lr.active_dropout() else {
        return work(x.as_mat().block(tokens, cols));
    };
    let width = x.cols();
    let x = x.f32s();
    with_scratch(tokens.len() * cols.len(), |scratch| {
        for (token, to) in tokens
            .clone()
            .zip(scratch.chunks_exact_mut(cols.len().max(1)))
        {
            let from = &x[token * width + cols.start..token * width + cols.end];
            drop_out(to, from, dropout.p, dropout.key, token, cols.start);
        }
        work(Mat::new(scratch, tokens.len(), cols.len()));
    });
}
