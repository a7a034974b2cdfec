//! The transformer, a decoder or an encoder: embedding, blocks, final norm; forward and backward over one [`Batch`].
//!
//! The base is immutable and shared (`Arc<Decoder>`); what is trained is handed in as an [`AdapterSet`]. A forward gives hidden rows,
//! and what scores them is not known here: [`Forward::backward`] takes the gradient of the hidden rows from there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use lowrank_kernels::{
    Arena, ComputeDType, DType, HeadWeight, Pauses, Tensor, View, Workspace, embedding_backward,
    embedding_forward, head_logits, head_own_logits, in_pool, scale,
};

use super::adapter::{Adapter, AdapterSet, Reach};
use super::batch::Batch;
use super::block::{Block, BlockSaved, Places, SomeRows};
use super::cache::KvCache;
use super::config::{EmbeddingScale, ModelConfig, Part, Position, Rope, WeightId};
use super::pass::{NormSaved, Pass};
use super::relative::Relative;
use super::rope::{RopeCache, RopeTables};
use super::saving::Saving;
use super::top::Top;
use super::weights::Weights;

/// What a pass with gradients is to do.
#[derive(Clone, Copy, Debug, Default)]
pub struct PassOptions<'a> {
    /// Key of the dropout masks; `None`: nothing is dropped.
    pub dropout_key: Option<u64>,
    /// What the blocks keep for the backward.
    pub saving: Saving,
    /// How the factors of the blocks' products are read, and those of the head's gradients.
    pub compute_dtype: ComputeDType,
    /// What is done between the parts of blocks, forward and backward, and between chunks of the head.
    pub pauses: Pauses<'a>,
}

/// Rows of a batch that is to have gradients use an adapter that is not the trained one, which is the first of its set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "rows {}..{} of a batch use adapter {adapter} of its set, and only the first one is trained; give it a pass of its own",
    rows.start,
    rows.end
)]
pub struct ForeignAdapter {
    /// The rows.
    pub rows: std::ops::Range<usize>,
    /// The adapter that they use.
    pub adapter: usize,
}

/// A base model: immutable weights and what is derived from the config.
pub struct Decoder {
    weights: Weights,
    ropes: RopeCache,
    hash: OnceLock<String>,
    is_exact: AtomicBool,
}

impl Decoder {
    /// Wraps loaded weights.
    pub fn new(weights: Weights) -> Arc<Self> {
        let config = weights.config();
        let ropes: &[Rope] = match &config.position {
            Position::Rope(ropes) => ropes,
            Position::Learned { .. } | Position::None => &[],
        };
        let ropes = RopeCache::new(ropes, config.max_position_embeddings);
        let hash = OnceLock::new();
        Arc::new(Self {
            weights,
            ropes,
            hash,
            is_exact: AtomicBool::new(false),
        })
    }

    /// Whether generation multiplies weights in blocks with the f32 numbers that it has. By default generated rows are rounded to 16 bits
    /// there, and prompts and what the blocks stand for to bf16 where the processor gains by it: both are several times as fast. Weights in
    /// f32, f16 and bf16 are always multiplied with f32 numbers.
    pub fn set_exact(&self, is_exact: bool) {
        self.is_exact.store(is_exact, Ordering::Relaxed);
    }

    /// The model's shapes and choices.
    pub fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    /// The base's tensors.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// [`Weights::hash`], which reads all of them the first time.
    pub fn weights_hash(&self) -> &str {
        self.hash.get_or_init(|| self.weights.hash())
    }

    /// Lets a stage of a model know the hash of all of it.
    pub(crate) fn set_weights_hash(&self, hash: String) {
        drop(self.hash.set(hash));
    }

    /// Factor of the embedding's rows.
    pub(crate) fn table_scale(&self) -> Option<f32> {
        let EmbeddingScale::Table(factor) = self.config().embedding_scale? else {
            return None;
        };
        match self.weights.dtype() {
            DType::F32 => Some(factor),
            DType::Bf16 => Some(half::bf16::from_f32(factor).to_f32()),
        }
    }

    /// The hidden rows of a batch that are supervised; nothing is kept for a backward.
    ///
    /// # Panics
    /// If the batch has not the virtual tokens of its rows' adapters.
    pub fn forward<'a>(
        &'a self,
        batch: &'a Batch,
        adapters: AdapterSet<'a>,
        ws: &'a Workspace,
    ) -> Forward<'a> {
        self.forward_with(batch, adapters, Pauses::NONE, ws)
    }

    /// The same with pauses between the parts of blocks.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_with<'a>(
        &'a self,
        batch: &'a Batch,
        adapters: AdapterSet<'a>,
        pauses: Pauses<'a>,
        ws: &'a Workspace,
    ) -> Forward<'a> {
        check_virtual(batch, adapters);
        let pass = Pass {
            pauses,
            ..self.pass(batch, adapters, ws)
        };
        let run = self.run(batch, &batch.supervised, pass);
        let x = run.blocks(None);
        Forward::new(run, x, None)
    }

    /// The rows [T, C] behind the blocks of a stage of a pipeline that is not the last one; `below` has those behind the blocks of the
    /// stage below, where there is one. Nothing is kept.
    ///
    /// # Panics
    /// As [`forward`](Self::forward); if the stage is the last one.
    pub fn pass_on(
        &self,
        batch: &Batch,
        adapters: AdapterSet,
        below: Option<Tensor>,
        ws: &Workspace,
    ) -> Tensor {
        check_virtual(batch, adapters);
        assert!(!self.weights.stage().is_last, "the last stage scores");
        let run = self.run(batch, &batch.supervised, self.pass(batch, adapters, ws));
        let x = run.blocks(below);
        run.finish();
        x
    }

    /// [`forward`](Self::forward) of the last stage of a pipeline from the rows of the stage below.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_from<'a>(
        &'a self,
        batch: &'a Batch,
        adapters: AdapterSet<'a>,
        below: Option<Tensor>,
        ws: &'a Workspace,
    ) -> Forward<'a> {
        check_virtual(batch, adapters);
        let run = self.run(batch, &batch.supervised, self.pass(batch, adapters, ws));
        let x = run.blocks(below);
        Forward::new(run, x, None)
    }

    /// The same, keeping what [`Forward::backward`] needs. The first adapter of the set is the one that is trained.
    ///
    /// # Errors
    /// If rows use another adapter, of which no gradient could be computed.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn forward_keeping<'a>(
        &'a self,
        batch: &'a Batch,
        adapters: AdapterSet<'a>,
        options: &PassOptions<'a>,
        ws: &'a Workspace,
    ) -> Result<Forward<'a>, ForeignAdapter> {
        let stage = self.stage_keeping(batch, adapters, None, options, ws)?;
        Ok(stage.to_top())
    }

    /// The same of a stage of a pipeline; `below` has the rows [T, C] behind the blocks of the stage below, where there is one.
    ///
    /// # Errors
    /// As [`forward_keeping`](Self::forward_keeping).
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn stage_keeping<'a>(
        &'a self,
        batch: &'a Batch,
        adapters: AdapterSet<'a>,
        below: Option<Tensor>,
        options: &PassOptions<'a>,
        ws: &'a Workspace,
    ) -> Result<StageForward<'a>, ForeignAdapter> {
        let foreign =
            |(rows, adapter): &&(std::ops::Range<usize>, usize)| *adapter != 0 && !rows.is_empty();
        if let Some((rows, adapter)) = batch.adapters.iter().find(foreign) {
            return Err(ForeignAdapter {
                rows: rows.clone(),
                adapter: *adapter,
            });
        }
        check_virtual(batch, adapters);
        let pass = Pass {
            dropout_key: options.dropout_key,
            compute_dtype: options.compute_dtype,
            pauses: options.pauses,
            ..self.pass(batch, adapters, ws)
        };
        let run = self.run(batch, &batch.supervised, pass);
        let layers = self.config().num_hidden_layers;
        let lowest = adapters.first().and_then(Adapter::lowest_layer);
        let from = lowest.unwrap_or(layers);
        let mut blocks = Vec::with_capacity(layers);
        let (mut x, mut embedded) = run.enter(below);
        let to_input = |adapter: &Adapter| adapter.reach(0) == Reach::Input;
        if !adapters.first().is_some_and(to_input) {
            run.give_embedded(embedded.take());
        }
        for layer in self.weights.stage().blocks.clone() {
            let block = run.block(layer);
            x = if layer < from {
                block.forward(x, None)
            } else {
                let (x_out, saved) = block.forward_keeping(x, options.saving);
                blocks.push(saved);
                x_out
            };
        }
        let kept = Kept {
            embedded,
            blocks,
            from,
        };
        Ok(StageForward { run, x, kept })
    }

    /// Logits [rows, V] of the given rows of a batch, in ascending order. With a cache, the batch's keys and values are appended to
    /// it first, and its segments refer to cache rows; products with weights in blocks are then rounded as [`set_exact`](Self::set_exact)
    /// says.
    ///
    /// # Panics
    /// Without a cache as [`forward`](Self::forward).
    pub fn logits(
        &self,
        batch: &Batch,
        adapters: AdapterSet,
        rows: &[u32],
        mut cache: Option<&mut KvCache>,
        ws: &Workspace,
    ) -> Tensor {
        if cache.is_none() {
            check_virtual(batch, adapters);
        }
        in_pool(|| {
            let rounds = cache.is_some() && !self.is_exact.load(Ordering::Relaxed);
            let pass = self.pass(batch, adapters, ws);
            let pass = Pass {
                classes: pass.classes.rounding(rounds),
                ..pass
            };
            let run = self.run(batch, rows, pass);
            let (mut x, embedded) = run.enter(None);
            run.give_embedded(embedded);
            for layer in 0..self.config().num_hidden_layers {
                x = run.block(layer).forward(x, cache.as_deref_mut());
            }
            let forward = Forward::new(run, x, None);
            let mut logits = ws.take(rows.len(), self.config().vocab_size);
            let (hidden, top) = (forward.hidden(), forward.top());
            let head = top.head_of(rows);
            let HeadWeight { weight, own } = head.weight();
            let (scaling, classes) = (head.scaling, batch.classes_of(rows).rounding(rounds));
            head_logits(logits.view_mut(), hidden, weight, scaling, classes);
            head_own_logits(logits.view_mut(), hidden, own, scaling, classes, ws);
            forward.finish();
            logits
        })
    }

    /// Appends the keys and values of a batch to a cache, in the blocks that are here: the rows [T, C] behind these. `below` has the
    /// rows of the stage of a pipeline below, where there is one. No adapter is used.
    pub(crate) fn fill_cache(
        &self,
        batch: &Batch,
        below: Option<Tensor>,
        cache: &mut KvCache,
        ws: &Workspace,
    ) -> Tensor {
        in_pool(|| {
            let adapters = AdapterSet::none();
            // All rows go on to the last block: whoever reads them may be another stage.
            let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
            let run = self.run(batch, &rows, self.pass(batch, adapters, ws));
            let (mut x, embedded) = run.enter(below);
            run.give_embedded(embedded);
            for layer in self.weights.stage().blocks.clone() {
                x = run.block(layer).forward(x, Some(cache));
            }
            run.finish();
            x
        })
    }

    /// Logits [pools, labels] of a classifier.
    ///
    /// # Panics
    /// As [`forward`](Self::forward); if the model has no classifier.
    pub fn classify(&self, batch: &Batch, adapters: AdapterSet, ws: &Workspace) -> Tensor {
        in_pool(|| {
            let forward = self.forward(batch, adapters, ws);
            let top = forward.top();
            let (logits, saved) = top.classify(forward.hidden());
            top.give(saved);
            forward.finish();
            logits
        })
    }

    /// The hidden states [pools, C] behind the final norm, each the mean of a pool's rows.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn pooled(&self, batch: &Batch, adapters: AdapterSet, ws: &Workspace) -> Tensor {
        in_pool(|| {
            let forward = self.forward(batch, adapters, ws);
            let pooled = forward.top().pooled(forward.hidden());
            forward.finish();
            pooled
        })
    }

    fn pass<'a>(
        &'a self,
        batch: &'a Batch,
        adapters: AdapterSet<'a>,
        ws: &'a Workspace,
    ) -> Pass<'a> {
        Pass {
            weights: &self.weights,
            adapters,
            rows_of_adapters: &batch.adapters,
            classes: batch.classes(),
            ws,
            dropout_key: None,
            compute_dtype: ComputeDType::F32,
            pauses: Pauses::NONE,
        }
    }

    /// A pass of which these rows are wanted. Where they are so few that picking them out pays, the last block goes on with them
    /// alone.
    fn run<'a>(&'a self, batch: &'a Batch, rows: &'a [u32], pass: Pass<'a>) -> Run<'a> {
        let few = Batch::goes_on_with(rows.len(), batch.tokens());
        let picked = (few && self.config().num_hidden_layers > 0).then(|| SomeRows {
            rows: rows.to_vec(),
            adapters: batch.adapters_of(rows),
            classes: batch.classes_of(rows).rounding(pass.classes.rounds()),
        });
        let last = batch.positions.iter().max();
        let positions = last.map_or(0, |last| *last as usize + 1);
        Run {
            decoder: self,
            batch,
            relative: Relative::of(&pass, batch),
            pass,
            rows,
            picked,
            ropes: self.ropes.tables(positions),
        }
    }
}

/// A pass through the decoder.
struct Run<'a> {
    decoder: &'a Decoder,
    batch: &'a Batch,
    /// Over all rows.
    pass: Pass<'a>,
    /// The wanted rows, ascending.
    rows: &'a [u32],
    /// The same where the last block computes these alone.
    picked: Option<SomeRows>,
    /// What scores know of distances.
    relative: Option<Relative>,
    /// The angles of the batch's positions, one table for each rotary embedding.
    ropes: Arc<Vec<RopeTables>>,
}

impl Run<'_> {
    fn block(&self, layer: usize) -> Block<'_> {
        let is_last = layer + 1 == self.decoder.config().num_hidden_layers;
        let wanted = self.picked.as_ref().filter(|_| is_last);
        let of_block = self.decoder.config().layers[layer].rope;
        let places = Places {
            rope: of_block.and_then(|rope| self.ropes.get(rope)),
            relative: self.relative.as_ref(),
        };
        Block::new(&self.pass, self.batch, layer, places, wanted)
    }

    /// The input of the first block that is here: the rows of the stage below, or the embeddings.
    fn enter(&self, below: Option<Tensor>) -> (Tensor, Embedded) {
        match below {
            Some(x) => (x, None),
            None => self.embed(),
        }
    }

    /// The output of the last block that is here.
    fn blocks(&self, below: Option<Tensor>) -> Tensor {
        let (mut x, embedded) = self.enter(below);
        self.give_embedded(embedded);
        for layer in self.decoder.weights.stage().blocks.clone() {
            x = self.block(layer).forward(x, None);
        }
        x
    }

    /// Back through the blocks that are here, `dx` being the gradient of the last one's output: the gradient of the first one's input,
    /// where a stage below goes on with it.
    fn blocks_backward(&self, mut dx: Tensor, kept: Kept, grads: &mut Arena) -> Option<Tensor> {
        let Kept {
            embedded,
            mut blocks,
            from,
        } = kept;
        let stage = self.decoder.weights.stage();
        let adapter = self.pass.adapters.first();
        for layer in (from.max(stage.blocks.start)..stage.blocks.end).rev() {
            let (Some(saved), Some(adapter)) = (blocks.pop(), adapter) else {
                break;
            };
            let reach = adapter.reach(layer);
            dx = self.block(layer).backward(dx, saved, reach, grads);
        }
        if !stage.is_first {
            return Some(dx);
        }
        self.embed_backward(dx, embedded, grads);
        None
    }

    /// The first block's input, and where a norm makes it, what that norm read and saved.
    fn embed(&self) -> (Tensor, Embedded) {
        let (pass, batch) = (&self.pass, self.batch);
        let mut x = pass.take(batch.tokens(), pass.config().hidden_size);
        let table = pass.weight(WeightId::Embedding);
        embedding_forward(x.view_mut(), &batch.ids, table, false);
        pass.embed_own(&batch.ids, &mut x);
        if let Some(factor) = self.decoder.table_scale() {
            scale(x.view_mut(), factor);
        }
        pass.embed_virtual(batch, &mut x);
        if let Some(EmbeddingScale::All(factor)) = pass.config().embedding_scale {
            scale(x.view_mut(), factor);
        }
        if let Position::Learned { first } = pass.config().position {
            let table = pass.weight(WeightId::Positions);
            let table = table.slice_rows(first..table.rows());
            embedding_forward(x.view_mut(), &batch.positions, table, true);
        }
        if pass.config().token_types > 0 {
            let table = pass.weight(WeightId::TokenTypes);
            embedding_forward(x.view_mut(), &batch.token_types(), table, true);
        }
        if !pass.config().embedding_norm {
            return (x, None);
        }
        let (normed, saved) = pass.norm(WeightId::EmbeddingNorm, x.view());
        (normed, Some((x, saved)))
    }

    fn give_embedded(&self, embedded: Embedded) {
        if let Some((sum, norm)) = embedded {
            self.pass.give([sum]);
            self.pass.give_norm(norm);
        }
    }

    /// Goes back through the embeddings, `dx` being the gradient of the first block's input.
    fn embed_backward(&self, mut dx: Tensor, embedded: Embedded, grads: &mut Arena) {
        let (pass, batch) = (&self.pass, self.batch);
        if let Some((sum, norm)) = &embedded {
            let mut d_sum = pass.take(dx.rows(), dx.cols());
            d_sum.view_mut().fill(0.0);
            let (id, out) = (WeightId::EmbeddingNorm, d_sum.view_mut());
            pass.norm_backward(id, out, dx.view(), sum.view(), norm, grads);
            pass.give([std::mem::replace(&mut dx, d_sum)]);
        }
        self.give_embedded(embedded);
        if let Some(EmbeddingScale::All(factor)) = pass.config().embedding_scale {
            scale(dx.view_mut(), factor);
        }
        pass.embed_virtual_backward(batch, dx.view(), grads);
        if let Position::Learned { first } = pass.config().position
            && let Some(slot) = pass.trained(WeightId::Positions)
        {
            let rows = first..grads.shape(slot).0;
            let table = grads.view_mut(slot).slice_rows(rows);
            embedding_backward(table, &batch.positions, dx.view());
        }
        if let Some(slot) = pass.trained(WeightId::TokenTypes) {
            embedding_backward(grads.view_mut(slot), &batch.token_types(), dx.view());
        }
        let factor = self.decoder.table_scale();
        pass.embed_own_backward(&batch.ids, dx.view(), factor, grads);
        if let Some(slot) = pass.trained(WeightId::Embedding) {
            if let Some(factor) = factor {
                scale(dx.view_mut(), factor);
            }
            embedding_backward(grads.view_mut(slot), &batch.ids, dx.view());
        }
        pass.give([dx]);
    }

    /// Gives back what the blocks have read together.
    fn finish(self) {
        if let Some(relative) = self.relative {
            relative.give(&self.pass);
        }
    }

    /// The wanted rows of what the last block gave, which is consumed.
    fn pick(&self, x: Tensor) -> Tensor {
        if self.picked.is_some() {
            return x;
        }
        let mut picked = self.pass.take(self.rows.len(), x.cols());
        embedding_forward(picked.view_mut(), self.rows, x.view(), false);
        self.pass.give([x]);
        picked
    }

    /// The gradient of what the last block gave from that of the wanted rows.
    fn spread(&self, d_rows: Tensor) -> Tensor {
        if self.picked.is_some() {
            return d_rows;
        }
        let mut dx = self.pass.take(self.batch.tokens(), d_rows.cols());
        dx.view_mut().fill(0.0);
        // rows = x[wanted]
        embedding_backward(dx.view_mut(), self.rows, d_rows.view());
        self.pass.give([d_rows]);
        dx
    }
}

/// What the norm behind the embeddings read and saved, where there is one.
type Embedded = Option<(Tensor, NormSaved)>;

/// What the blocks saved, from block `from` on.
struct Kept {
    embedded: Embedded,
    blocks: Vec<BlockSaved>,
    from: usize,
}

/// A forward through the blocks of one stage that was computed, and what its backward needs.
pub struct StageForward<'a> {
    run: Run<'a>,
    x: Tensor,
    kept: Kept,
}

impl<'a> StageForward<'a> {
    /// The rows [T, C] behind the stage's blocks.
    pub fn rows(&self) -> View<'_> {
        self.x.view()
    }

    /// What its blocks keep, from the lowest trained one up.
    #[cfg(test)]
    pub(crate) fn kept(&self) -> &[BlockSaved] {
        &self.kept.blocks
    }

    /// Goes on to what stands on the hidden rows; in the last stage alone.
    ///
    /// # Panics
    /// In another stage.
    pub fn to_top(self) -> Forward<'a> {
        assert!(self.run.decoder.weights.stage().is_last, "the last stage");
        Forward::new(self.run, self.x, Some(self.kept))
    }

    /// Whether its backward does anything: whether something is trained in this stage or below it.
    pub fn needs_gradient(&self) -> bool {
        self.kept.from < self.run.decoder.weights.stage().blocks.end
    }

    /// Gives the buffers back.
    pub fn finish(self) {
        let pass = &self.run.pass;
        self.run.give_embedded(self.kept.embedded);
        for saved in self.kept.blocks {
            saved.give(pass);
        }
        pass.give([self.x]);
        self.run.finish();
    }

    /// Adds to the gradients of what is trained in this stage, `dx` [T, C] being the gradient of its rows; the gradient of the rows
    /// of the stage below, where there is one.
    pub fn backward(self, dx: Tensor, grads: &mut Arena) -> Option<Tensor> {
        let Self { run, x, kept } = self;
        run.pass.give([x]);
        let below = run.blocks_backward(dx, kept, grads);
        run.finish();
        below
    }
}

/// A forward that was computed: hidden rows, and what its backward needs. It ends with [`finish`](Self::finish) or
/// [`backward`](Self::backward), which give its buffers back.
pub struct Forward<'a> {
    run: Run<'a>,
    /// The wanted rows, behind the final norm where there is one.
    hidden: Tensor,
    /// The same before that norm, and what it saved.
    norm: Option<(Tensor, NormSaved)>,
    kept: Option<Kept>,
}

impl<'a> Forward<'a> {
    fn new(run: Run<'a>, x: Tensor, kept: Option<Kept>) -> Self {
        let rows = run.pick(x);
        let (hidden, norm) = if run.pass.config().final_norm {
            let (hidden, saved) = run.pass.norm(WeightId::FinalNorm, rows.view());
            (hidden, Some((rows, saved)))
        } else {
            (rows, None)
        };
        Self {
            run,
            hidden,
            norm,
            kept,
        }
    }

    /// The wanted rows [n, C] behind the final norm.
    pub fn hidden(&self) -> View<'_> {
        self.hidden.view()
    }

    /// What stands on the hidden rows.
    pub fn top(&self) -> Top<'_> {
        Top::new(self.run.pass, self.run.batch)
    }

    /// Whether [`backward`](Self::backward) reads a gradient of the hidden rows: a head that is trained alone needs none.
    pub fn needs_gradient(&self) -> bool {
        let pass = &self.run.pass;
        let trains_norm = || {
            [Part::Weight, Part::Bias]
                .into_iter()
                .any(|part| pass.trained(WeightId::FinalNorm(part)).is_some())
        };
        let layers = pass.config().num_hidden_layers;
        self.kept
            .as_ref()
            .is_some_and(|kept| kept.from < layers || trains_norm())
    }

    /// Gives the buffers back.
    pub fn finish(self) {
        let pass = &self.run.pass;
        if let Some(kept) = self.kept {
            self.run.give_embedded(kept.embedded);
            for saved in kept.blocks {
                saved.give(pass);
            }
        }
        pass.give([self.hidden]);
        self.run.give_embedded(self.norm);
        self.run.finish();
    }

    /// Adds to the gradients of what is trained, `dh` [n, C] being the gradient of the hidden rows. Without [`Decoder::forward_keeping`] there is
    /// nothing to go back to. Where a stage of a pipeline lies below this one, it gets the gradient [T, C] of the rows that it gave.
    pub fn backward(self, dh: Tensor, grads: &mut Arena) -> Option<Tensor> {
        let Self {
            run,
            hidden,
            norm,
            kept,
        } = self;
        let pass = &run.pass;
        let d_rows = match norm {
            None => dh,
            Some((rows, norm)) => {
                let mut d_rows = pass.take(rows.rows(), rows.cols());
                d_rows.view_mut().fill(0.0);
                let (id, d_out) = (WeightId::FinalNorm, d_rows.view_mut());
                pass.norm_backward(id, d_out, dh.view(), rows.view(), &norm, grads);
                pass.give([rows, dh]);
                pass.give_norm(norm);
                d_rows
            }
        };
        pass.give([hidden]);
        let Some(kept) = kept else {
            pass.give([d_rows]);
            run.finish();
            return None;
        };
        let dx = run.blocks_backward(run.spread(d_rows), kept, grads);
        run.finish();
        dx
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
