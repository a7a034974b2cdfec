//! Looking rows up in a table: `y[t] = table[ids[t]]`.
//!
//! The forward overwrites or accumulates as asked; the gradient of the table accumulates.

use crate::cpu;
use crate::profile::op;
use crate::view::{View, ViewMut};

/// `y[t] = table[ids[t]]`, or `+=` if `accumulate`; y [T, C], table [V, C].
///
/// # Panics
/// If the shapes do not match, or an id is not in the table.
pub fn embedding_forward(y: ViewMut<'_>, ids: &[u32], table: View<'_>, accumulate: bool) {
    let _op = op("embedding forward", || 0.0);
    check(ids, table.rows());
    y.assert_shape("the output of an embedding", ids.len(), table.cols());
    cpu::embedding::embedding_forward(y, ids, table, accumulate);
}

/// `dtable[ids[t]] += dy[t]`, in the order of the tokens; dtable [V, C], dy [T, C].
///
/// # Panics
/// If the shapes do not match, or an id is not in the table.
pub fn embedding_backward(dtable: ViewMut<'_>, ids: &[u32], dy: View<'_>) {
    let _op = op("embedding backward", || 0.0);
    check(ids, dtable.rows());
    dy.assert_shape(
        "the output gradient of an embedding",
        ids.len(),
        dtable.cols(),
    );
    cpu::embedding::embedding_backward(dtable, ids, dy);
}

fn check(ids: &[u32], rows: usize) {
    if let Some(largest) = ids.iter().max() {
        assert!(
            (*largest as usize) < rows,
            "id {largest} is past the {rows} rows of the table"
        );
    }
}
