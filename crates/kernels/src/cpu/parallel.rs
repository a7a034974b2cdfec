//! How work is cut into tasks, and how threads share them.
//!
//! What a task takes depends on the sizes of the data alone, so the result does not depend on the
//! number of threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::profile::region;

/// Rows a task of an element-wise operation takes: about 16 thousand numbers, which is long enough
/// to pay for the hand-over to another thread.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (16 * 1024 / cols.max(1)).max(1)
}

/// Runs a pass on a thread of the pool. Its operations then hand tasks out from there, which is
/// cheaper than waking the pool for each of them and sleeping meanwhile.
pub fn in_pool<R: Send>(pass: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| pass())
}

/// Parts of data that threads share.
pub(crate) trait ForEachPart: IndexedParallelIterator {
    /// Calls `work` with each of them, on all threads.
    fn for_each_part(self, work: impl Fn(Self::Item) + Sync + Send) {
        region(Some(self.len()), || self.for_each(work));
    }

    /// What `work` makes of each of them, in their order.
    fn map_parts<R: Send>(self, work: impl Fn(Self::Item) -> R + Sync + Send) -> Vec<R> {
        region(Some(self.len()), || self.map(work).collect())
    }
}

impl<I: IndexedParallelIterator> ForEachPart for I {}

/// Calls `work` with each number below `tasks`, on all threads: each takes the next one when it has
/// done one. For tasks that take long, and not equally long.
pub(crate) fn for_each_task(tasks: usize, work: impl Fn(usize) + Sync) {
    region(Some(tasks), || share_tasks(tasks, work));
}

/// [`for_each_task`] where the number of threads says how many tasks there are.
pub(crate) fn for_each_piece(pieces: usize, work: impl Fn(usize) + Sync) {
    region(None, || share_tasks(pieces, work));
}

fn share_tasks(tasks: usize, work: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(tasks);
    if threads <= 1 {
        return (0..tasks).for_each(work);
    }
    let next = AtomicUsize::new(0);
    let run = || {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            work(task);
        }
    };
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| run());
        }
        run();
    });
}

/// Calls `run` with each number below `count`, on all threads. For many short tasks.
///
/// Each thread goes through a run of neighbours, and then helps the others with theirs, so that
/// memory is read in order and nobody waits for more than one task.
pub(crate) fn for_runs(count: usize, run: impl Fn(usize) + Sync) {
    region(Some(count), || share_runs(count, run));
}

fn share_runs(count: usize, run: impl Fn(usize) + Sync) {
    /// More threads than this share runs.
    const RUNS: usize = 64;
    let runs = rayon::current_num_threads().min(RUNS).min(count);
    if runs <= 1 {
        return (0..count).for_each(run);
    }
    let bound = |i: usize| count * i / runs;
    let next: [AtomicUsize; RUNS] = std::array::from_fn(|i| AtomicUsize::new(bound(i)));
    (0..runs).into_par_iter().with_max_len(1).for_each(|own| {
        for i in (own..runs).chain(0..own) {
            let end = bound(i + 1);
            loop {
                let task = next[i].fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                run(task);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for count in [0, 1, 2, 3, 7, 64, 1000] {
            let ran: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            let count_in = |i: usize| {
                ran[i].fetch_add(1, Ordering::Relaxed);
            };
            for_runs(count, count_in);
            for_each_task(count, count_in);
            assert!(ran.iter().all(|ran| ran.load(Ordering::Relaxed) == 2));
        }
    }
}
