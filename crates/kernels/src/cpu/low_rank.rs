//! Products of low-rank branches.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, for_runs};
use crate::cpu::product::few::{FewJob, few_times_rows};
use crate::cpu::product::layout::NR;
use crate::cpu::product::mat::{ALL, Mat, MatMut, Shared, for_tiles};
use crate::cpu::product::multiply::{multiply, product, thin_product};
use crate::cpu::product::rows::{Packed, products_of_rows, with_packed};
use crate::cpu::product::term::{Factor, Job, Start, Term};
use crate::cpu::product::turned::add_turned;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd;
use crate::random::drop_out;
use crate::types::classes::RowClasses;
use crate::types::low_rank::LowRank;
use crate::view::{View, ViewMut};

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

pub(crate) fn low_rank_forward(
    y: ViewMut<'_>,
    u: ViewMut<'_>,
    x: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
    classes: RowClasses,
) {
    let (prompt, generated) = classes.split(&rows);
    let (mut u_prompt, mut u_generated) = u.split_rows(prompt.len());
    let (y_prompt, y_generated) = y.slice_rows(rows).split_rows(prompt.len());
    if !prompt.is_empty() {
        down_prompts(u_prompt.reborrow(), x, prompt, lr);
        let terms = &[up(lr, u_prompt.as_view(), 0)];
        multiply(vec![Job {
            y: y_prompt,
            start: Start::Sum,
            terms,
        }]);
    }
    if !generated.is_empty() {
        few_times_rows(x, vec![down_job(lr, u_generated.reborrow(), generated)]);
        let branch = GeneratedBranch {
            u: u_generated.as_view(),
            first: 0,
            branch: *lr,
        };
        add_generated(vec![(y_generated, vec![branch])]);
    }
}

/// The term that adds s·u·Bᵀ to rows of an output, from row `first` on. It is apart, since it may be for some of the rows.
pub(crate) fn up<'b>(lr: &LowRank<'b>, u: View<'b>, first: usize) -> Term<'b> {
    Term {
        scale: lr.scale,
        at: (first, lr.out_offset),
        apart: true,
        ..Term::new(u.as_mat(), Factor::turned(lr.b))
    }
}

/// u = x·Aᵀ for generated rows.
pub(crate) fn down_job<'b>(lr: &LowRank<'b>, u: ViewMut<'b>, rows: Range<usize>) -> FewJob<'b> {
    FewJob {
        y: u,
        rows,
        w: lr.a,
        start: Start::Zero,
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

/// Products of numbers below which handing work to another thread costs more than it saves.
const SMALL: usize = 32 * 1024;

/// y += s·u·Bᵀ for all branches of each y, the branches of all adapters as one piece of work for the threads.
pub(crate) fn add_generated(outputs: Vec<(ViewMut<'_>, Vec<GeneratedBranch<'_>>)>) {
    let outputs = outputs
        .into_iter()
        .filter(|(_, branches)| !branches.is_empty());
    let outputs: Vec<_> = outputs
        .map(|(y, branches)| (y.rows(), y.cols(), Shared::from(y), branches))
        .collect();
    let branches = outputs.iter().flat_map(|(.., branches)| branches);
    let products = branches.map(|b| b.u.len() * b.branch.b.rows());
    if products.sum::<usize>() < SMALL {
        for (rows, cols, y, branches) in &outputs {
            add_branches((y, *rows), 0..*cols, branches);
        }
        return;
    }
    let tasks = |cols: usize| cols.div_ceil(STRIP);
    let count = outputs.iter().map(|(_, cols, ..)| tasks(*cols)).sum();
    for_runs(count, |mut task: usize| {
        for (rows, cols, y, branches) in &outputs {
            if task >= tasks(*cols) {
                task -= tasks(*cols);
                continue;
            }
            let strip = task * STRIP..((task + 1) * STRIP).min(*cols);
            return add_branches((y, *rows), strip, branches);
        }
    });
}

/// What all branches of an output add to some of its columns.
fn add_branches(
    (y, rows): (&Shared<'_>, usize),
    strip: Range<usize>,
    branches: &[GeneratedBranch<'_>],
) {
    #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
    // SAFETY: each call for an output has other columns, and each output is another matrix.
    let mut tile = unsafe { y.block(0..rows, strip.clone()) };
    for branch in branches {
        add_branch(&mut tile, &strip, branch);
    }
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
pub(crate) fn down_prompts(u: ViewMut<'_>, x: View<'_>, rows: Range<usize>, lr: &LowRank<'_>) {
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

pub(crate) fn low_rank_backward_hidden(
    du: ViewMut<'_>,
    dy: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
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

pub(crate) fn low_rank_backward_weights(
    da: ViewMut<'_>,
    db: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
    (u, du): (View<'_>, View<'_>),
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
    let (rank, outs) = (lr.rank(), lr.b.rows());
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

pub(crate) fn low_rank_backward_input(
    dx: ViewMut<'_>,
    du: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
) {
    let (ins, rank) = (lr.a.cols(), lr.rank());
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
