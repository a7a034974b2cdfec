//! How much an element-wise task takes.
//!
//! It depends on the sizes of the data alone, so the result does not depend on the number of
//! threads.

/// Rows a task of an element-wise operation takes: about 16 thousand numbers, which is long enough
/// to pay for the hand-over to another thread.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (16 * 1024 / cols.max(1)).max(1)
}
