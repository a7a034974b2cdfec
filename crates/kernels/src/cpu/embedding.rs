//! Rows of tables.

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::product::mat::{ALL, for_tiles};
use crate::cpu::simd;
use crate::view::{View, ViewMut};

/// Columns that a task takes in the backward.
const COLUMNS: usize = 64;

pub(crate) fn embedding_forward(y: ViewMut<'_>, ids: &[u32], table: View<'_>, accumulate: bool) {
    let cols = table.cols();
    let rows = rows_per_task(cols);
    y.into_f32s()
        .par_chunks_mut((rows * cols).max(1))
        .zip(ids.par_chunks(rows))
        .for_each_part(|(y, ids)| {
            for (y, &id) in y.chunks_exact_mut(cols).zip(ids) {
                let from = id as usize * cols..(id as usize + 1) * cols;
                if accumulate {
                    table.with_part(from, |row| simd::add(y, row));
                } else {
                    table.numbers().widen(y, from.start);
                }
            }
        });
}

pub(crate) fn embedding_backward(dtable: ViewMut<'_>, ids: &[u32], dy: View<'_>) {
    let cols = dtable.cols();
    let dy = dy.f32s();
    // Several tokens may have the same id, so tasks take columns and not tokens.
    for_tiles(dtable, (ALL, COLUMNS), |mut out, _, columns| {
        for (&id, dy) in ids.iter().zip(dy.chunks_exact(cols)) {
            simd::add(out.row(id as usize), &dy[columns.clone()]);
        }
    });
}
