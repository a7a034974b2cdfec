//! The angles of rotary positions.

use rayon::prelude::*;

use crate::cpu::parallel::ForEachPart;
use crate::tensor::Tensor;

/// Cosines and sines of every position: row p is cos(p·f) for the D/2 frequencies, then sin(p·f).
#[derive(Clone, Debug)]
pub struct RopeTable {
    pub(crate) table: Tensor,
    pub(crate) half: usize,
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
