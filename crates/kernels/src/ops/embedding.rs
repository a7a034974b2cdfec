//! Looking rows up in a table: `y[t] = table[ids[t]]`.
//!
//! The forward overwrites or accumulates as asked; the gradient of the table accumulates.

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::product::mat::{ALL, for_tiles};
use crate::cpu::simd;
use crate::profile::op;
use crate::view::{View, ViewMut};

/// Columns that a task takes in the backward.
const COLUMNS: usize = 64;

/// `y[t] = table[ids[t]]`, or `+=` if `accumulate`; y [T, C], table [V, C].
///
/// # Panics
/// If the shapes do not match, or an id is not in the table.
pub fn embedding_forward(y: ViewMut<'_>, ids: &[u32], table: View<'_>, accumulate: bool) {
    let _op = op("embedding forward", || 0.0);
    check(ids, table.rows());
    let cols = table.cols();
    y.assert_shape("the output of an embedding", ids.len(), cols);
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

/// `dtable[ids[t]] += dy[t]`, in the order of the tokens; dtable [V, C], dy [T, C].
///
/// # Panics
/// If the shapes do not match, or an id is not in the table.
pub fn embedding_backward(dtable: ViewMut<'_>, ids: &[u32], dy: View<'_>) {
    let _op = op("embedding backward", || 0.0);
    check(ids, dtable.rows());
    let cols = dtable.cols();
    dy.assert_shape("the output gradient of an embedding", ids.len(), cols);
    let dy = dy.f32s();
    // Several tokens may have the same id, so tasks take columns and not tokens.
    for_tiles(dtable, (ALL, COLUMNS), |mut out, _, columns| {
        for (&id, dy) in ids.iter().zip(dy.chunks_exact(cols)) {
            simd::add(out.row(id as usize), &dy[columns.clone()]);
        }
    });
}

fn check(ids: &[u32], rows: usize) {
    if let Some(largest) = ids.iter().max() {
        assert!(
            (*largest as usize) < rows,
            "id {largest} is past the {rows} rows of the table"
        );
    }
}
