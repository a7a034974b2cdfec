//! The KV cache: keys and values of tokens that were read before.

use std::ops::Range;

use lowrank_kernels::{Tensor, View};

use super::adapter::Adapter;
use super::config::ModelConfig;

/// Keys and values of earlier tokens: for each layer two matrices [capacity, KV·D]; a batch says which rows are whose.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
}

impl KvCache {
    /// Room for `rows` tokens in all.
    pub fn new(config: &ModelConfig, rows: usize) -> Self {
        let new = || Tensor::zeros(rows, config.kv_size());
        Self {
            layers: (0..config.num_hidden_layers)
                .map(|_| (new(), new()))
                .collect(),
        }
    }

    /// Writes an adapter's trained keys and values to the rows from `at` on.
    pub(crate) fn write_prefix(&mut self, adapter: &Adapter, at: usize) {
        for (layer, &(k, v)) in adapter.virtual_tokens.key_values.iter().enumerate() {
            let (cache_k, cache_v) = self.layer_mut(layer);
            for (cache, slot) in [(cache_k, k), (cache_v, v)] {
                let values = adapter.params.view(slot);
                let mut rows = cache.view_mut().slice_rows(at..at + values.rows());
                rows.copy_from(values);
            }
        }
    }

    pub(crate) fn layer(&self, layer: usize) -> (View<'_>, View<'_>) {
        let (k, v) = &self.layers[layer];
        (k.view(), v.view())
    }

    fn layer_mut(&mut self, layer: usize) -> (&mut Tensor, &mut Tensor) {
        let (k, v) = &mut self.layers[layer];
        (k, v)
    }

    /// Writes new rows of k and v to their places.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        k: View,
        v: View,
        appends: &[(Range<usize>, usize)],
    ) {
        let (cache_k, cache_v) = self.layer_mut(layer);
        for (cache, new) in [(cache_k, k), (cache_v, v)] {
            for (rows, place) in appends {
                let mut target = cache.view_mut().slice_rows(*place..place + rows.len());
                target.copy_from(new.slice_rows(rows.clone()));
            }
        }
    }
}
