//! Products of low-rank factors as strips of a weight.

use crate::cpu::product::mat::{ALL, for_tiles};
use crate::cpu::product::multiply::product;
use crate::types::linear::Layout;
use crate::view::{View, ViewMut};

/// Rows or columns of the weight that a task takes.
const STRIP: usize = 64;

pub(crate) fn low_rank_delta(
    delta: ViewMut<'_>,
    a: View<'_>,
    b: View<'_>,
    scale: f32,
    layout: Layout,
    out_offset: usize,
) {
    let (outs, rank) = (b.rows(), a.rows());
    let (a, b) = (a.as_mat(), b.as_mat());
    let target = out_offset..out_offset + outs;
    match layout {
        Layout::OutIn => {
            let delta = delta.slice_rows(target);
            for_tiles(delta, (STRIP, ALL), |out, strip, _| {
                product(out, true, scale, b.block(strip, 0..rank), a);
            });
        }
        Layout::InOut => for_tiles(delta, (STRIP, ALL), |out, strip, _| {
            let out = out.columns(target.clone());
            product(out, true, scale, a.block(0..rank, strip).t(), b.t());
        }),
    }
}
