//! Rotary positions: which angles a family turns its queries and keys by.

use std::sync::{Arc, PoisonError, RwLock};

use lowrank_kernels::{RopeOrder, RopeTable};

/// Rotary position embedding: the base and how its frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `rope_theta`.
    pub theta: f64,
    /// `rope_scaling` / `rope_parameters`.
    pub scaling: RopeScaling,
    /// Numbers of a head that are rotated, from the first on: D, or less (`partial_rotary_factor`).
    pub rotary_size: usize,
    /// Which numbers are a pair.
    pub order: RopeOrder,
    /// A factor of rotated queries that grows with the position.
    pub query_scale: Option<QueryScale>,
}

/// The supported kinds of rope scaling (`rope_type`).
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `default`, and `dynamic`, which is the same for sequences of at most `max_position_embeddings`, and there are no longer ones.
    None,
    /// `linear`: every frequency divided by `factor`.
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// `llama3`: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length of pretraining.
        original_max_position_embeddings: f64,
    },
    /// `yarn` (Peng et al., 2023): frequencies that turn less than `beta_slow` times in the original context are divided by `factor`, those
    /// that turn more than `beta_fast` times are kept, a ramp over their indices between.
    Yarn {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Turns from which a frequency is kept.
        beta_fast: f64,
        /// Turns up to which a frequency is divided.
        beta_slow: f64,
        /// Whether the ramp begins and ends at whole indices.
        truncate: bool,
        /// The context length of pretraining.
        original_max_position_embeddings: f64,
        /// Factor of rotated queries and keys.
        attention_factor: f64,
    },
    /// `longrope` (Ding et al., 2024) within the context length of pretraining: every frequency is divided by a factor of its own.
    LongRope {
        /// `short_factor`, one a frequency.
        short_factor: Vec<f64>,
        /// Factor of rotated queries and keys.
        attention_factor: f64,
    },
}

/// `1 + beta · ln(1 + ⌊position / original_max_position_embeddings⌋)`, as Llama 4 has it (`llama_4_scaling_beta`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScale {
    /// `llama_4_scaling_beta`.
    pub beta: f64,
    /// The context length of pretraining.
    pub original_max_position_embeddings: f64,
}

impl QueryScale {
    fn factor(self, position: usize) -> f64 {
        let turns = (position as f64 / self.original_max_position_embeddings).floor();
        1.0 + self.beta * turns.ln_1p()
    }
}

/// Positions whose angles are computed at first.
const FIRST_POSITIONS: usize = 2048;

/// The angles of a model's rotary embeddings, of as many positions as were asked for so far: models are made for up to a million, whose
/// angles would take more memory than a small model's weights, and few texts are so long.
pub(crate) struct RopeCache {
    ropes: Vec<Rope>,
    most: usize,
    filled: RwLock<Filled>,
}

/// Tables of so many positions, one for each rotary embedding.
#[derive(Clone, Default)]
struct Filled {
    positions: usize,
    tables: Arc<Vec<RopeTables>>,
}

impl RopeCache {
    /// For positions below `most`.
    pub(crate) fn new(ropes: &[Rope], most: usize) -> Self {
        Self {
            ropes: ropes.to_vec(),
            most,
            filled: RwLock::default(),
        }
    }

    /// Tables of at least so many positions. What a position's angles are does not depend on how many there are.
    pub(crate) fn tables(&self, positions: usize) -> Arc<Vec<RopeTables>> {
        let found = self.filled.read().unwrap_or_else(PoisonError::into_inner);
        if found.positions >= positions && found.positions > 0 {
            return Arc::clone(&found.tables);
        }
        drop(found);
        let mut filled = self.filled.write().unwrap_or_else(PoisonError::into_inner);
        if filled.positions < positions || filled.positions == 0 {
            let wanted = positions.max(FIRST_POSITIONS).next_power_of_two();
            let count = wanted.min(self.most).max(positions);
            let tables = self.ropes.iter().map(|rope| rope.tables(count));
            *filled = Filled {
                positions: count,
                tables: Arc::new(tables.collect()),
            };
        }
        Arc::clone(&filled.tables)
    }
}

/// The angles of a rotary embedding.
pub(crate) struct RopeTables {
    keys: RopeTable,
    /// Where those of queries have another factor.
    queries: Option<RopeTable>,
}

impl RopeTables {
    pub(crate) fn keys(&self) -> &RopeTable {
        &self.keys
    }

    pub(crate) fn queries(&self) -> &RopeTable {
        self.queries.as_ref().unwrap_or(&self.keys)
    }
}

impl Rope {
    /// The angles of positions below `max_positions`.
    pub(crate) fn tables(&self, max_positions: usize) -> RopeTables {
        let frequencies = self.inverse_frequencies();
        let factor = self.attention_factor();
        let table = |scale: &(dyn Fn(usize) -> f64 + Sync)| {
            RopeTable::with_scale(&frequencies, scale, max_positions).with_order(self.order)
        };
        RopeTables {
            keys: table(&|_| factor),
            queries: self
                .query_scale
                .map(|scale| table(&|position| factor * scale.factor(position))),
        }
    }

    /// The inverse frequencies, half as many as numbers are rotated, as transformers' `ROPE_INIT_FUNCTIONS` computes them.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        (0..self.rotary_size / 2)
            .map(|i| {
                let plain = self.theta.powf(-((2 * i) as f64) / self.rotary_size as f64);
                self.scale(i, plain) as f32
            })
            .collect()
    }

    /// Factor of rotated queries and keys.
    fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => attention_factor,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    fn scale(&self, index: usize, frequency: f64) -> f64 {
        match &self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength > original_max_position_embeddings / low_freq_factor {
                    frequency / factor
                } else if wavelength < original_max_position_embeddings / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings,
                ..
            } => {
                let size = self.rotary_size as f64;
                // The index whose frequency turns so many times in the original context.
                let index_of = |turns: &f64| {
                    let length =
                        original_max_position_embeddings / (turns * 2.0 * std::f64::consts::PI);
                    size * length.ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (index_of(beta_fast), index_of(beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(size - 1.0));
                if low == high {
                    high += 0.001;
                }
                let divided = ((index as f64 - low) / (high - low)).clamp(0.0, 1.0);
                divided * frequency / factor + (1.0 - divided) * frequency
            }
            RopeScaling::LongRope { short_factor, .. } => frequency / short_factor[index],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_are_the_same_however_many_there_are() {
        let rope = Rope {
            theta: 10_000.0,
            scaling: RopeScaling::None,
            rotary_size: 8,
            order: RopeOrder::default(),
            query_scale: None,
        };
        let cache = RopeCache::new(std::slice::from_ref(&rope), 100_000);
        let turned = |tables: &[RopeTables], position: u32| {
            let mut x = lowrank_kernels::Tensor::from_f32(1, 8, (0..8).map(|i| i as f32).collect());
            lowrank_kernels::rope_forward(x.view_mut(), &[position], tables[0].keys(), 8);
            x.to_vec()
        };
        let small = cache.tables(10);
        let before = turned(&small, 9);
        assert_eq!(cache.filled.read().unwrap().positions, FIRST_POSITIONS);
        let large = cache.tables(70_000);
        assert_eq!(cache.filled.read().unwrap().positions, 100_000);
        assert_eq!(turned(&large, 9), before);
        // A pass that began before goes on with what it has.
        assert_eq!(turned(&small, 9), before);
        turned(&large, 69_999);
    }
}
