//! y = x·wᵀ for generated rows, for one weight or several, and for some of the rows or all.
//!
//! A strip of a weight comes from memory once, meets all rows, and nothing of it is copied; see [`rows`](crate::cpu::product::rows). All
//! weights are one piece of work for the threads, because the smallest take only microseconds. A row's bits do not depend on the
//! others.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, for_runs};
use crate::cpu::product::mat::{MatMut, Shared};
use crate::cpu::product::rows::{
    Packed, TOGETHER, lies_packed, pack_rows_for, packed_len, products_of_rows,
};
use crate::cpu::product::term::Start;
use crate::cpu::scratch::with_scratch;
use crate::storage::{Number, NumberVisitor, Window};
use crate::view::{View, ViewMut};

/// Weights, and rows of them, that a task takes at least. Tokens that do not fit in the L1 cache come
/// into it anew with each task.
const BLOCK: usize = 8 * 1024;
const ROWS: usize = 32;

/// A weight, the rows of x that it is for, and where their product goes.
pub(crate) struct FewJob<'a> {
    /// [rows, N].
    pub(crate) y: ViewMut<'a>,
    pub(crate) rows: Range<usize>,
    /// [N, K].
    pub(crate) w: View<'a>,
    pub(crate) start: Start<'a>,
}

/// A job under way.
struct Job<'a> {
    y: Shared<'a>,
    w: View<'a>,
    start: Start<'a>,
    /// Which of the packed ones are its rows.
    packed: usize,
    tokens: usize,
}

/// Rows of x that are packed for one order of a weight's numbers.
#[derive(PartialEq, Eq)]
struct Pack {
    rows: Range<usize>,
    even_first: bool,
}

/// y (+)= x·wᵀ for each job; x [T, K].
pub(crate) fn few_times_rows(x: View<'_>, jobs: Vec<FewJob<'_>>) {
    let ins = x.cols();
    let mut packs: Vec<Pack> = Vec::new();
    let jobs: Vec<Job<'_>> = jobs
        .into_iter()
        .filter(|job| !job.rows.is_empty())
        .map(|FewJob { y, rows, w, start }| {
            let tokens = rows.len();
            let pack = Pack {
                rows,
                even_first: w.format().even_first(),
            };
            let known = packs.iter().position(|other| *other == pack);
            Job {
                y: Shared::from(y),
                w,
                start,
                packed: known.unwrap_or_else(|| {
                    packs.push(pack);
                    packs.len() - 1
                }),
                tokens,
            }
        })
        .collect();
    // Rows of a weight that a task takes.
    let block = BLOCK.div_ceil(ins.max(1)).max(ROWS);
    let tasks = |job: &Job<'_>| job.w.rows().div_ceil(block);
    with_all_packed(x, &packs, |packed| {
        for_runs(jobs.iter().map(tasks).sum(), |mut task| {
            for job in &jobs {
                if task < tasks(job) {
                    let outs = task * block..((task + 1) * block).min(job.w.rows());
                    return run(job, outs, packed[job.packed], ins);
                }
                task -= tasks(job);
            }
        });
    });
}

/// One task of a job: these rows of the weight with all of the job's rows.
fn run(job: &Job<'_>, outs: Range<usize>, packed: Packed<'_>, ins: usize) {
    #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
    // SAFETY: each task of a job has other columns, and each job another matrix.
    let mut tile = unsafe { job.y.block(0..job.tokens, outs.clone()) };
    let add = job.start.prepare(&mut tile, &outs);
    if ins == 0 {
        if !add {
            tile.fill_zero();
        }
        return;
    }
    let numbers = outs.len() * ins;
    let window = Window {
        stride: ins,
        rows: outs,
        cols: 0..ins,
    };
    window.read(
        job.w.numbers(),
        Products {
            tile,
            add,
            packed,
            numbers,
        },
    );
}

/// What is left to do of a task once the format of the weight is known.
struct Products<'a> {
    tile: MatMut<'a>,
    add: bool,
    packed: Packed<'a>,
    /// Numbers of the weight that the task takes: whole rows.
    numbers: usize,
}

impl NumberVisitor for Products<'_> {
    type Output = ();

    #[inline]
    fn visit<N: Number>(self, w: &[N], stride: usize) {
        let Self {
            mut tile,
            add,
            packed,
            numbers,
        } = self;
        products_of_rows(
            packed,
            &w[..numbers],
            stride,
            #[inline(always)]
            |token, out, sums, more| {
                tile.put_column(token, out, sums, add || more);
            },
        );
    }
}

/// Calls `work` with each of these packed, in their order.
fn with_all_packed(x: View<'_>, packs: &[Pack], work: impl FnOnce(&[Packed<'_>])) {
    let cols = x.cols();
    let lies_packed = |pack: &Pack| lies_packed(pack.rows.len(), cols, pack.even_first);
    let len = |pack: &Pack| {
        if lies_packed(pack) {
            0
        } else {
            packed_len(pack.rows.len(), cols)
        }
    };
    with_scratch(packs.iter().map(len).sum(), |scratch| {
        let mut pieces = Vec::new();
        let mut rest = &mut *scratch;
        for pack in packs.iter().filter(|pack| !lies_packed(pack)) {
            for first in pack.rows.clone().step_by(TOGETHER) {
                let rows = first..(first + TOGETHER).min(pack.rows.end);
                let (to, others) = rest.split_at_mut(packed_len(rows.len(), cols));
                rest = others;
                let from = &x.f32s()[rows.start * cols..rows.end * cols];
                pieces.push((to, from, pack.even_first));
            }
        }
        let pack = |(to, from, even_first): (&mut [f32], &[f32], bool)| {
            pack_rows_for(to, from, cols, even_first);
        };
        // Other threads are worth their while only for many rows.
        if pieces.len() <= 2 {
            pieces.into_iter().for_each(pack);
        } else {
            pieces.into_par_iter().for_each_part(pack);
        }
        let mut rest = &*scratch;
        let mut packed = Vec::with_capacity(packs.len());
        for pack in packs {
            let (own, others) = rest.split_at(len(pack));
            rest = others;
            let own = if lies_packed(pack) {
                &x.f32s()[pack.rows.start * cols..pack.rows.end * cols]
            } else {
                own
            };
            packed.push(Packed::new(own, pack.rows.len(), cols));
        }
        work(&packed);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::engine::{engines, with_engine};
    use crate::storage::{NumberFormat, matrix_of};
    use crate::tensor::Tensor;

    /// A format that is widened first is multiplied like the f32 numbers that it stands for.
    #[test]
    fn any_format_can_be_multiplied() {
        for engine in engines() {
            with_engine(engine, check_formats);
        }
    }

    fn check_formats() {
        let x: Vec<f32> = (0..3 * 256).map(|i| ((i * 5) as f32).cos()).collect();
        let x = Tensor::from_f32(3, 256, x);
        for format in NumberFormat::ALL {
            let [stored, wide] = matrix_of(format, 70, 256);
            let product = |w: &Tensor| {
                let mut y = Tensor::zeros(3, 70);
                let job = FewJob {
                    y: y.view_mut(),
                    rows: 0..3,
                    w: w.view(),
                    start: Start::Zero,
                };
                few_times_rows(x.view(), vec![job]);
                y.to_vec()
            };
            let (found, expected) = (product(&stored), product(&wide));
            if format == NumberFormat::Bf16 {
                // Lanes have other numbers.
                for (found, expected) in found.iter().zip(&expected) {
                    assert!((found - expected).abs() < 1e-4 * expected.abs().max(1.0));
                }
                continue;
            }
            assert_eq!(found, expected, "{format}");
        }
    }
}
