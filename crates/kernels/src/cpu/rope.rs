//! The loop of rotary positions.

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::simd::vectorize;
use crate::types::rope::{RopeOrder, RopeTable};
use crate::view::ViewMut;

/// Rotates each head of each row by its position; `sign` is that of the angles.
pub(crate) fn rotate(
    x: ViewMut<'_>,
    positions: &[u32],
    table: &RopeTable,
    head_size: usize,
    sign: f32,
) {
    let half = table.half;
    let turned = 2 * half;
    let cols = x.cols();
    let rows = rows_per_task(cols);
    let angles = table.table.view().f32s();
    x.into_f32s()
        .par_chunks_mut((rows * cols).max(1))
        .zip(positions.par_chunks(rows))
        .for_each_part(|(x, positions)| {
            vectorize(
                #[inline(always)]
                || {
                    for (row, &position) in x.chunks_exact_mut(cols).zip(positions) {
                        let angles = &angles[position as usize * turned..][..turned];
                        let (cos, sin) = angles.split_at(half);
                        for head in row.chunks_exact_mut(head_size) {
                            let head = &mut head[..turned];
                            match table.order {
                                RopeOrder::Halves => turn_halves(head, cos, sin, sign),
                                RopeOrder::Neighbours => turn_neighbours(head, cos, sin, sign),
                            }
                        }
                    }
                },
            );
        });
}

#[inline(always)]
fn turn_halves(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    let (first, second) = head.split_at_mut(half);
    for i in 0..half {
        let (a, b) = (first[i], second[i]);
        let (cos, sin) = (cos[i], sign * sin[i]);
        first[i] = a * cos - b * sin;
        second[i] = b * cos + a * sin;
    }
}

#[inline(always)]
fn turn_neighbours(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let ([a, b], sin) = (*pair, sign * sin);
        *pair = [a * cos - b * sin, b * cos + a * sin];
    }
}
