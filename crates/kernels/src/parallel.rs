//! Cutting work into pieces of a fixed size for rayon's pool.
//!
//! The boundaries depend on the sizes of the data alone, so the result does not depend on the
//! number of threads.

use std::ops::Range;

use rayon::prelude::*;

/// Calls `work` for each of the consecutive blocks of `0..n`; the last may be shorter.
pub(crate) fn for_blocks(n: usize, block: usize, work: impl Fn(Range<usize>) + Sync) {
    let blocks = n.div_ceil(block);
    if blocks == 1 {
        work(0..n);
        return;
    }
    (0..blocks)
        .into_par_iter()
        .for_each(|i| work(i * block..((i + 1) * block).min(n)));
}

/// Calls `work` for each pair of blocks of `0..rows` and of `0..cols`.
pub(crate) fn for_tiles(
    (rows, row_block): (usize, usize),
    (cols, col_block): (usize, usize),
    work: impl Fn(Range<usize>, Range<usize>) + Sync,
) {
    let down = rows.div_ceil(row_block);
    let tiles = down * cols.div_ceil(col_block);
    let tile = |i: usize| {
        // Neighbouring tasks share a block of columns, so the one thread that takes both finds the
        // strip of weights in its cache.
        let (row, col) = (i % down * row_block, i / down * col_block);
        work(
            row..(row + row_block).min(rows),
            col..(col + col_block).min(cols),
        );
    };
    if tiles == 1 {
        tile(0);
    } else {
        (0..tiles).into_par_iter().for_each(tile);
    }
}

/// Rows a task of an element-wise operation takes: about 16 thousand numbers, which is long enough
/// to pay for the hand-over to another thread.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (16 * 1024 / cols.max(1)).max(1)
}
