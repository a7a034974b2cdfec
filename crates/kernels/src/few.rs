//! y = x·wᵀ for few tokens, for one weight or several of one input.
//!
//! Each weight is read once and nothing of it is copied; see [`rows`](crate::rows). Several weights
//! are one piece of work for the threads, because the smallest take only microseconds.

use half::bf16;

use crate::matmul::Shared;
use crate::parallel::for_runs;
use crate::rows::{Element, Packed, products_of_rows, with_packed};
use crate::strips::Start;
use crate::view::{Data, View, ViewMut};

/// Tokens up to which this is faster than packing the weights.
pub(crate) const FEW_TOKENS: usize = 32;
/// Weights, and rows of them, that a task takes at least. Tokens that do not fit in the L1 cache come
/// into it anew with each task.
const BLOCK: usize = 8 * 1024;
const ROWS: usize = 32;

/// A weight and where its product goes.
struct Job<'a> {
    y: Shared<'a>,
    w: View<'a>,
    start: Start<'a>,
}

/// y (+)= x·wᵀ for each (y, w, start); y [T, N], x [T, K], w [N, K].
pub(crate) fn few_times_rows(x: View<'_>, outputs: Vec<(ViewMut<'_>, View<'_>, Start<'_>)>) {
    let jobs: Vec<Job<'_>> = outputs
        .into_iter()
        .map(|(y, w, start)| Job {
            y: Shared::from(y),
            w,
            start,
        })
        .collect();
    let (tokens, ins) = (x.rows(), x.cols());
    let rows = BLOCK.div_ceil(ins.max(1)).max(ROWS);
    let tasks = |job: &Job<'_>| job.w.rows().div_ceil(rows);
    let run = |mut task: usize, wide: Packed<'_>, narrow: Packed<'_>| {
        let mut jobs = jobs.iter();
        let job = loop {
            let Some(job) = jobs.next() else { return };
            if task < tasks(job) {
                break job;
            }
            task -= tasks(job);
        };
        let outs = task * rows..((task + 1) * rows).min(job.w.rows());
        #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
        // SAFETY: each task of a job has other columns, and each job another matrix.
        let mut tile = unsafe { job.y.block(0..tokens, outs.clone()) };
        let add = job.start.prepare(&mut tile, &outs);
        if ins == 0 && !add {
            (0..tokens).for_each(|token| tile.row(token).fill(0.0));
        }
        let numbers = outs.start * ins..outs.end * ins;
        match job.w.data() {
            Data::F32(w) => products_of_rows(
                wide,
                &w[numbers],
                ins,
                #[inline(always)]
                |token, out, sums, more| {
                    tile.put_column(token, out, sums, add || more);
                },
            ),
            Data::Bf16(w) => products_of_rows(
                narrow,
                &w[numbers],
                ins,
                #[inline(always)]
                |token, out, sums, more| {
                    tile.put_column(token, out, sums, add || more);
                },
            ),
        }
    };
    let count = jobs.iter().map(tasks).sum();
    let is_wide = |job: &Job<'_>| matches!(job.w.data(), Data::F32(_));
    with_packed_if::<f32>(jobs.iter().any(is_wide), x, |wide| {
        with_packed_if::<bf16>(!jobs.iter().all(is_wide), x, |narrow| {
            for_runs(count, |task| run(task, wide, narrow));
        });
    });
}

/// Calls `work` with the tokens packed for an `E`, or with nothing if no weight is one.
fn with_packed_if<E: Element>(needed: bool, x: View<'_>, work: impl FnOnce(Packed<'_>)) {
    let x_if = if needed { x.f32s() } else { &[] };
    with_packed::<E, _>(x_if, x.cols(), work);
}
