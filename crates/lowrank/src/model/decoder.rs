//! The decoder: embedding, blocks, final norm, head; forward, loss and backward over one [`Batch`].
//!
//! The base is immutable and shared (`Arc<Decoder>`); what is trained is handed in as an [`AdapterSet`].

use std::ops::Range;
use std::sync::Arc;

use lowrank_kernels::{
    Arena, ComputeDType, CrossEntropy, RopeTable, RowClasses, Tensor, View, Weight, Workspace,
    cross_entropy_forward_backward, embedding_backward, embedding_forward, head_logits, in_pool,
};

use super::batch::Batch;
use super::block::{BlockSaved, Place, Wanted};
use super::config::{ModelConfig, Part, Position, WeightId};
use super::pass::Pass;
use super::saving::Saving;
use super::weights::Weights;
use crate::tuning::{Adapter, AdapterSet};

/// Sums over the supervised tokens of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Σ of the tokens' losses, in nats.
    pub loss: f64,
    /// Tokens whose most likely prediction is the label.
    pub correct: usize,
    /// Number of supervised tokens.
    pub tokens: usize,
}

impl LossSum {
    /// Mean nats a supervised token.
    pub fn mean(&self) -> f64 {
        self.loss / self.tokens as f64
    }

    /// Adds another batch's sums.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct += other.correct;
        self.tokens += other.tokens;
    }
}

/// What the blocks do with their intermediate values.
pub(crate) enum Keep<'a> {
    Nothing,
    Cache(&'a mut KvCache),
    /// Saved by blocks `from` and above, for a backward that goes down to `from`.
    Saved {
        blocks: Vec<BlockSaved>,
        from: usize,
        saving: Saving,
    },
}

/// What a pass with gradients is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassOptions {
    /// Share of a target's probability that is spread over all tokens.
    pub label_smoothing: f32,
    /// Key of the dropout masks; `None`: nothing is dropped.
    pub dropout_key: Option<u64>,
    /// What the blocks keep for the backward.
    pub saving: Saving,
}

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

    pub(crate) fn layer_mut(&mut self, layer: usize) -> (&mut Tensor, &mut Tensor) {
        let (k, v) = &mut self.layers[layer];
        (k, v)
    }
}

/// A base model: immutable weights and what is derived from the config.
pub struct Decoder {
    weights: Weights,
    rope: Option<RopeTable>,
}

impl Decoder {
    /// Wraps loaded weights.
    pub fn new(weights: Weights) -> Arc<Self> {
        let config = weights.config();
        let rope = match &config.position {
            Position::Rope(rope) => {
                let frequencies = rope.inverse_frequencies(config.head_size);
                Some(RopeTable::new(
                    &frequencies,
                    1.0,
                    config.max_position_embeddings,
                ))
            }
            Position::Learned => None,
        };
        Arc::new(Self { weights, rope })
    }

    /// The model's shapes and choices.
    pub fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    /// The base's tensors.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The losses of a batch, without gradients.
    ///
    /// # Panics
    /// If the batch has not the virtual tokens of its rows' adapters.
    pub fn loss(&self, batch: &Batch, adapters: AdapterSet, ws: &Workspace) -> LossSum {
        in_pool(|| self.loss_here(batch, adapters, ws))
    }

    fn loss_here(&self, batch: &Batch, adapters: AdapterSet, ws: &Workspace) -> LossSum {
        check_virtual(batch, adapters);
        let pass = self.pass(batch, adapters, ws);
        let adapter_rows = batch.adapters_of(&batch.supervised);
        let wanted = self.wanted(batch, &adapter_rows);
        let x = self.blocks(&pass, &mut Keep::Nothing, wanted);
        let rows = match wanted {
            Some(_) => x,
            None => gather(&pass, x, &batch.supervised),
        };
        let (h, saved) = pass.norm(WeightId::FinalNorm, rows.view());
        let head = head(&pass);
        let sums = cross_entropy_forward_backward(
            None,
            None,
            h.view(),
            head,
            &batch.targets,
            0.0,
            pass.precision,
            ws,
        );
        pass.give([rows, h]);
        pass.give_norm(saved);
        loss_sum(sums, batch)
    }

    /// The losses of a batch and the gradient of their SUM, added to `grads` (laid out as the adapter's `params`). Every
    /// row uses adapter 0 of the set.
    ///
    /// # Panics
    /// As [`loss`](Self::loss).
    pub fn forward_backward(
        &self,
        batch: &Batch,
        adapters: AdapterSet,
        grads: &mut Arena,
        options: &PassOptions,
        ws: &Workspace,
    ) -> LossSum {
        in_pool(|| self.forward_backward_here(batch, adapters, grads, options, ws))
    }

    fn forward_backward_here(
        &self,
        batch: &Batch,
        adapters: AdapterSet,
        grads: &mut Arena,
        options: &PassOptions,
        ws: &Workspace,
    ) -> LossSum {
        check_virtual(batch, adapters);
        let pass = Pass {
            dropout_key: options.dropout_key,
            precision: options.saving.precision(),
            ..self.pass(batch, adapters, ws)
        };
        let adapter = adapters.get(0);
        let lowest = adapter.lowest_layer();
        let layers = self.config().num_hidden_layers;
        let mut keep = Keep::Saved {
            blocks: Vec::with_capacity(layers),
            from: lowest.unwrap_or(layers),
            saving: options.saving,
        };
        let adapter_rows = batch.adapters_of(&batch.supervised);
        let wanted = self.wanted(batch, &adapter_rows);
        let x = self.blocks(&pass, &mut keep, wanted);
        let Keep::Saved {
            mut blocks, from, ..
        } = keep
        else {
            unreachable!("the blocks do not change how they keep")
        };

        let rows = match wanted {
            Some(_) => x,
            None => gather(&pass, x, &batch.supervised),
        };
        let (h, norm_saved) = pass.norm(WeightId::FinalNorm, rows.view());
        // A head that is trained alone needs no gradient of what it reads.
        let trains_below = from < layers
            || [Part::Weight, Part::Bias]
                .into_iter()
                .any(|part| pass.trained(WeightId::FinalNorm(part)).is_some());
        let mut dh = trains_below.then(|| pass.take(h.rows(), h.cols()));
        let head_slot = pass.trained(pass.head_id());
        let dw = head_slot.map(|slot| grads.view_mut(slot));
        let head = head(&pass);
        let sums = cross_entropy_forward_backward(
            dh.as_mut().map(Tensor::view_mut),
            dw,
            h.view(),
            head,
            &batch.targets,
            options.label_smoothing,
            pass.precision,
            ws,
        );

        let Some(dh) = dh else {
            pass.give([rows, h]);
            pass.give_norm(norm_saved);
            return loss_sum(sums, batch);
        };

        let mut d_rows = pass.take(h.rows(), h.cols());
        d_rows.view_mut().fill(0.0);
        pass.norm_backward(
            WeightId::FinalNorm,
            d_rows.view_mut(),
            dh.view(),
            rows.view(),
            &norm_saved,
            grads,
        );
        pass.give([rows, h, dh]);
        pass.give_norm(norm_saved);
        let mut dx = if wanted.is_some() {
            d_rows
        } else {
            let mut dx = pass.take(batch.tokens(), d_rows.cols());
            dx.view_mut().fill(0.0);
            // rows = x[supervised]
            embedding_backward(dx.view_mut(), &batch.supervised, d_rows.view());
            ws.give(d_rows);
            dx
        };

        for layer in (from..layers).rev() {
            let Some(saved) = blocks.pop() else { break };
            dx = pass.block_backward(
                self.place(layer, wanted),
                dx,
                saved,
                adapter.reach(layer),
                grads,
            );
        }
        embed_backward(&pass, dx.view(), grads);
        ws.give(dx);
        loss_sum(sums, batch)
    }

    /// Logits [rows, V] of the given rows of a batch. With a cache, the batch's keys and values are appended to it first,
    /// and its segments refer to cache rows.
    ///
    /// # Panics
    /// Without a cache as [`loss`](Self::loss).
    pub fn logits(
        &self,
        batch: &Batch,
        adapters: AdapterSet,
        rows: &[u32],
        cache: Option<&mut KvCache>,
        ws: &Workspace,
    ) -> Tensor {
        in_pool(|| self.logits_here(batch, adapters, rows, cache, ws))
    }

    fn logits_here(
        &self,
        batch: &Batch,
        adapters: AdapterSet,
        rows: &[u32],
        cache: Option<&mut KvCache>,
        ws: &Workspace,
    ) -> Tensor {
        if cache.is_none() {
            check_virtual(batch, adapters);
        }
        // One new row a sequence of the cache is a generated one.
        let single = batch.segments.iter().all(|s| s.queries.len() == 1);
        let classes = if single && cache.is_some() {
            RowClasses::GENERATED
        } else {
            RowClasses::PROMPT
        };
        let pass = Pass {
            classes,
            ..self.pass(batch, adapters, ws)
        };
        let x = self.blocks(&pass, &mut cache.map_or(Keep::Nothing, Keep::Cache), None);
        let gathered = gather(&pass, x, rows);
        let (h, saved) = pass.norm(WeightId::FinalNorm, gathered.view());
        let mut logits = pass.take(rows.len(), self.config().vocab_size);
        head_logits(logits.view_mut(), h.view(), head(&pass), pass.classes);
        pass.give([gathered, h]);
        pass.give_norm(saved);
        logits
    }

    fn pass<'a>(
        &'a self,
        batch: &'a Batch,
        adapters: AdapterSet<'a>,
        ws: &'a Workspace,
    ) -> Pass<'a> {
        Pass {
            weights: &self.weights,
            batch,
            adapters,
            rows_of_adapters: &batch.adapters,
            classes: RowClasses::PROMPT,
            ws,
            dropout_key: None,
            precision: ComputeDType::F32,
        }
    }

    /// The place of a block; of the last one only the wanted rows are computed to the end.
    fn place<'a>(&'a self, layer: usize, wanted: Option<Wanted<'a>>) -> Place<'a> {
        Place {
            layer,
            rope: self.rope.as_ref(),
            wanted: wanted.filter(|_| layer + 1 == self.config().num_hidden_layers),
        }
    }

    /// The scored rows, where they are so few that going on with them alone pays for picking them out.
    fn wanted<'b>(
        &self,
        batch: &'b Batch,
        adapters: &'b [(Range<usize>, usize)],
    ) -> Option<Wanted<'b>> {
        let few = Batch::goes_on_with(batch.supervised.len(), batch.tokens());
        (few && self.config().num_hidden_layers > 0).then_some(Wanted {
            rows: &batch.supervised,
            adapters,
        })
    }

    fn blocks(&self, pass: &Pass, keep: &mut Keep, wanted: Option<Wanted>) -> Tensor {
        let config = self.config();
        let mut x = pass.take(pass.batch.tokens(), config.hidden_size);
        embedding_forward(
            x.view_mut(),
            &pass.batch.ids,
            pass.weight(WeightId::Embedding),
            false,
        );
        pass.embed_virtual(&mut x);
        if config.position == Position::Learned {
            embedding_forward(
                x.view_mut(),
                &pass.batch.positions,
                pass.weight(WeightId::Positions),
                true,
            );
        }
        for layer in 0..config.num_hidden_layers {
            x = pass.block(self.place(layer, wanted), x, keep);
        }
        x
    }
}

fn head<'p>(pass: &'p Pass) -> Weight<'p> {
    Weight {
        view: pass.weight(pass.head_id()),
        layout: lowrank_kernels::Layout::OutIn,
    }
}

/// Panics unless the batch was laid out for the adapters that its rows use.
fn check_virtual(batch: &Batch, adapters: AdapterSet) {
    for (_, index) in &batch.adapters {
        assert_eq!(
            adapters.get(*index).virtual_tokens(),
            batch.virtual_tokens,
            "a batch begins with the virtual tokens of its adapter"
        );
    }
}

fn embed_backward(pass: &Pass, dx: View, grads: &mut Arena) {
    pass.embed_virtual_backward(dx, grads);
    if let Some(slot) = pass.trained(WeightId::Embedding) {
        embedding_backward(grads.view_mut(slot), &pass.batch.ids, dx);
    }
    if let Some(slot) = pass.trained(WeightId::Positions) {
        embedding_backward(grads.view_mut(slot), &pass.batch.positions, dx);
    }
}

/// Some rows of x, which is given back.
fn gather(pass: &Pass, x: Tensor, rows: &[u32]) -> Tensor {
    let mut gathered = pass.take(rows.len(), x.cols());
    embedding_forward(gathered.view_mut(), rows, x.view(), false);
    pass.ws.give(x);
    gathered
}

fn loss_sum(sums: CrossEntropy, batch: &Batch) -> LossSum {
    LossSum {
        loss: sums.loss_sum,
        correct: sums.correct,
        tokens: batch.targets.len(),
    }
}
