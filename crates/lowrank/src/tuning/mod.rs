//! What is trained beside, or instead of, the base's weights.
//!
//! A method turns its options into an [`Adapter`]: named f32 parameters in one arena and a table that says where in the
//! model each of them acts. The decoder knows these hook points and nothing of the methods:
//!
//! - `low_rank`: a branch `scale · (x Aᵀ) Bᵀ` added to some columns of a linear's output;
//! - `replaced`: a base weight whose values are the adapter's own (full training: all of them).
//!
//! A new method is a module here that fills the table, a [`Method`] entry, and, where it acts at a point that no method
//! has used before, a new kind of hook.

pub mod full;
pub mod lora;

use std::collections::HashMap;

use lowrank_kernels::{Arena, View};

use crate::model::{LinearId, WeightId};

/// A way to adapt a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Low-rank matrices beside frozen linears (Hu et al., 2021).
    Lora,
    /// Every weight.
    Full,
}

/// A low-rank branch beside a linear.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankSite {
    /// Arena slot of A, [r, in].
    pub a: usize,
    /// Arena slot of B, [n, r], n being the columns that the branch writes.
    pub b: usize,
    /// lora_alpha / r, or lora_alpha / √r.
    pub scale: f32,
    /// The first column of the linear's output that the branch writes.
    pub out_offset: usize,
    /// Probability that an element of the branch's input is dropped in training.
    pub dropout: f32,
}

/// Trainable values and where in the model they act.
pub struct Adapter {
    /// The values, f32.
    pub params: Arena,
    /// A name for each slot of `params`, as the method saves it.
    pub names: Vec<String>,
    /// Low-rank branches by the linear they stand beside.
    pub low_rank: HashMap<LinearId, Vec<LowRankSite>>,
    /// Base weights whose values are slots of `params`.
    pub replaced: HashMap<WeightId, usize>,
}

impl Adapter {
    /// The lowest block in which something is trained; backward goes no further down. `None`: only what lies above the
    /// blocks.
    pub fn lowest_layer(&self) -> Option<usize> {
        let branches = self.low_rank.keys().map(|id| id.layer);
        let weights = self.replaced.keys().filter_map(|id| match id {
            WeightId::Linear(linear, _) => Some(linear.layer),
            WeightId::Norm(layer, ..) => Some(*layer),
            WeightId::Embedding | WeightId::Positions => Some(0),
            WeightId::FinalNorm(_) | WeightId::Head => None,
        });
        branches.chain(weights).min()
    }

    /// Whether the gradient must reach the embedding tables.
    pub fn trains_embedding(&self) -> bool {
        self.replaced.contains_key(&WeightId::Embedding)
            || self.replaced.contains_key(&WeightId::Positions)
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        self.params.len()
    }

    /// Slot of a parameter by its name.
    pub fn slot(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|n| n == name)
    }
}

/// The adapters that a batch may use, by index. Many sets can share one base.
#[derive(Clone, Copy, Default)]
pub struct AdapterSet<'a> {
    adapters: &'a [&'a Adapter],
}

impl<'a> AdapterSet<'a> {
    /// A set; [`Batch::adapters`](crate::model::Batch::adapters) refers to its indices.
    ///
    /// An adapter that replaces base weights changes every row, so it can only be the sole member.
    pub fn new(adapters: &'a [&'a Adapter]) -> Self {
        debug_assert!(adapters.len() < 2 || adapters.iter().all(|a| a.replaced.is_empty()));
        Self { adapters }
    }

    /// The base alone.
    pub fn none() -> Self {
        Self { adapters: &[] }
    }

    pub(crate) fn get(&self, index: usize) -> &'a Adapter {
        self.adapters[index]
    }

    /// The values that stand in for a base weight.
    pub(crate) fn replacement(&self, id: WeightId) -> Option<View<'a>> {
        let adapter = self.adapters.first()?;
        adapter
            .replaced
            .get(&id)
            .map(|&slot| adapter.params.view(slot))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.adapters.is_empty()
    }
}
