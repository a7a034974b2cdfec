//! Handing tasks to threads, and how much an element-wise task takes.
//!
//! The latter depends on the sizes of the data alone, so the result does not depend on the number of
//! threads.

use std::sync::atomic::{AtomicUsize, Ordering};

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

/// Calls `work` with 0..`tasks`, in parallel.
///
/// Each thread takes the next task when it has done one, in order: tasks that follow each other
/// and share data run close together, and threads that are slowed down get less.
pub(crate) fn for_each_task(tasks: usize, work: impl Fn(usize) + Sync) {
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
