//! Rotary positions (Su et al., 2021) in the "rotate half" order of Hugging Face: element i of a
//! head's first half is paired with element i of its second half.
//!
//! Both directions work in place.

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::simd::vectorize;
use crate::profile::op;
use crate::tensor::Tensor;
use crate::view::ViewMut;

/// Cosines and sines of every position: row p is cos(p·f) for the D/2 frequencies, then sin(p·f).
#[derive(Clone, Debug)]
pub struct RopeTable {
    table: Tensor,
    half: usize,
}

impl RopeTable {
    /// A table for positions below `max_positions`.
    ///
    /// `inv_freq` holds the D/2 frequencies; `attention_scale` multiplies both tables, as YaRN asks.
    /// Computed in f64 and rounded once.
    pub fn new(inv_freq: &[f32], attention_scale: f32, max_positions: usize) -> Self {
        let half = inv_freq.len();
        let mut table = Tensor::zeros(max_positions, 2 * half);
        table
            .view_mut()
            .into_f32s()
            .par_chunks_mut((2 * half).max(1))
            .enumerate()
            .for_each_part(|(position, row)| {
                let (cos, sin) = row.split_at_mut(half);
                for ((cos, sin), &frequency) in cos.iter_mut().zip(sin).zip(inv_freq) {
                    let (s, c) = (position as f64 * f64::from(frequency)).sin_cos();
                    *cos = (c * f64::from(attention_scale)) as f32;
                    *sin = (s * f64::from(attention_scale)) as f32;
                }
            });
        Self { table, half }
    }

    /// How many positions the table covers.
    pub fn max_positions(&self) -> usize {
        self.table.rows()
    }
}

/// Rotates each head of each row by its position; x [T, n·D] in place, one position a row.
///
/// # Panics
/// If the shapes do not match, or a position is not in the table.
pub fn rope_forward(x: ViewMut<'_>, positions: &[u32], table: &RopeTable, head_size: usize) {
    let _op = op("rope forward", || 0.0);
    rotate(x, positions, table, head_size, 1.0);
}

/// Rotates back: dx [T, n·D] holds the gradient of the output and then that of the input.
///
/// # Panics
/// If the shapes do not match, or a position is not in the table.
pub fn rope_backward(dx: ViewMut<'_>, positions: &[u32], table: &RopeTable, head_size: usize) {
    let _op = op("rope backward", || 0.0);
    // (a, b) -> (a·cos - b·sin, b·cos + a·sin); its transpose has the sine's sign turned
    rotate(dx, positions, table, head_size, -1.0);
}

fn rotate(x: ViewMut<'_>, positions: &[u32], table: &RopeTable, head_size: usize, sign: f32) {
    let half = table.half;
    assert_eq!(head_size, 2 * half, "head size and rope table");
    assert_eq!(positions.len(), x.rows(), "positions and rows");
    assert!(
        head_size > 0 && x.cols().is_multiple_of(head_size),
        "{} columns are not heads of {head_size}",
        x.cols()
    );
    if let Some(largest) = positions.iter().max() {
        assert!(
            (*largest as usize) < table.max_positions(),
            "position {largest} is past the {} of the rope table",
            table.max_positions()
        );
    }
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
                        let angles = &angles[position as usize * head_size..][..head_size];
                        let (cos, sin) = angles.split_at(half);
                        for head in row.chunks_exact_mut(head_size) {
                            let (first, second) = head.split_at_mut(half);
                            for i in 0..half {
                                let (a, b) = (first[i], second[i]);
                                let (cos, sin) = (cos[i], sign * sin[i]);
                                first[i] = a * cos - b * sin;
                                second[i] = b * cos + a * sin;
                            }
                        }
                    }
                },
            );
        });
}
