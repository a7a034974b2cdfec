//! The angles of rotary positions.

use rayon::prelude::*;

use crate::cpu::parallel::ForEachPart;
use crate::tensor::Tensor;

/// Which numbers of a head are turned together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopeOrder {
    /// Number i of the first half with number i of the second ("rotate half").
    #[default]
    Halves,
    /// Neighbours: numbers 2i and 2i + 1.
    Neighbours,
}

/// Cosines and sines of every position: row p is cos(p·f) for the frequencies, then sin(p·f). There are D/2 of them, or fewer where
/// only the first numbers of a head are turned.
#[derive(Clone, Debug)]
pub struct RopeTable {
    pub(crate) table: Tensor,
    pub(crate) half: usize,
    pub(crate) order: RopeOrder,
}

impl RopeTable {
    /// A table for positions below `max_positions`.
    ///
    /// `inv_freq` holds the frequencies; `attention_scale` multiplies both tables, as YaRN asks.
    /// Computed in f64 and rounded once.
    pub fn new(inv_freq: &[f32], attention_scale: f32, max_positions: usize) -> Self {
        Self::with_scale(inv_freq, |_| f64::from(attention_scale), max_positions)
    }

    /// The same with a factor of its own for each position.
    pub fn with_scale(
        inv_freq: &[f32],
        scale: impl Fn(usize) -> f64 + Sync,
        max_positions: usize,
    ) -> Self {
        let half = inv_freq.len();
        let mut table = Tensor::zeros(max_positions, 2 * half);
        table
            .view_mut()
            .into_f32s()
            .par_chunks_mut((2 * half).max(1))
            .enumerate()
            .for_each_part(|(position, row)| {
                let (cos, sin) = row.split_at_mut(half);
                let scale = scale(position);
                for ((cos, sin), &frequency) in cos.iter_mut().zip(sin).zip(inv_freq) {
                    let (s, c) = (position as f64 * f64::from(frequency)).sin_cos();
                    *cos = (c * scale) as f32;
                    *sin = (s * scale) as f32;
                }
            });
        Self {
            table,
            half,
            order: RopeOrder::Halves,
        }
    }

    /// The same angles for other pairs.
    #[must_use]
    pub fn with_order(self, order: RopeOrder) -> Self {
        Self { order, ..self }
    }

    /// How many positions the table covers.
    pub fn max_positions(&self) -> usize {
        self.table.rows()
    }
}
