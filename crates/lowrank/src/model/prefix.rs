//! The virtual tokens of an adapter: rows whose embeddings are trained, and trained keys and values before every sequence.
//!
//! ```text
//! x[rows] = E                      E [n, C], before positions are added
//! K = [P_k; rope(k)], V = [P_v; v]     P [n, KV·D], as they are: their positions are part of what is learned
//! ```
//! Gradients accumulate: sequences share the trained rows.

use lowrank_kernels::{Arena, Tensor, View, add_assign};

use super::batch::Batch;
use super::pass::Pass;

impl Pass<'_> {
    /// Overwrites the rows whose embeddings are the adapter's.
    pub(super) fn embed_virtual(&self, batch: &Batch, x: &mut Tensor) {
        for (rows, part) in &batch.embedded {
            let Some(index) = batch.adapter_of(rows.start) else {
                continue;
            };
            let adapter = self.adapters.get(index);
            if let Some(slot) = adapter.virtual_tokens.embedding(*part) {
                let mut x = x.view_mut().slice_rows(rows.clone());
                x.copy_from(adapter.params.view(slot));
            }
        }
    }

    /// Adds to the gradients of trained embeddings.
    pub(super) fn embed_virtual_backward(&self, batch: &Batch, dx: View, grads: &mut Arena) {
        for (rows, part) in &batch.embedded {
            let sites = &self.adapters.get(0).virtual_tokens;
            if let Some(slot) = sites.embedding(*part) {
                add_assign(grads.view_mut(slot), dx.slice_rows(rows.clone()));
            }
        }
    }

    /// Slots of the trained keys and values that stand before this batch's own, and the adapter they belong to.
    fn trained_keys(&self, batch: &Batch, layer: usize) -> Option<(usize, (usize, usize))> {
        if batch.virtual_tokens.keys == 0 {
            return None;
        }
        let index = batch.adapter_of(0)?;
        let sites = &self.adapters.get(index).virtual_tokens;
        Some((index, *sites.key_values.get(layer)?))
    }

    /// k and v [n + T, KV·D] with the trained rows before the batch's own.
    pub(super) fn with_trained_keys(
        &self,
        batch: &Batch,
        layer: usize,
        k: Tensor,
        v: Tensor,
    ) -> (Tensor, Tensor) {
        let Some((index, slots)) = self.trained_keys(batch, layer) else {
            return (k, v);
        };
        let join = |slot: usize, own: Tensor| {
            let trained = self.adapters.get(index).params.view(slot);
            let n = trained.rows();
            let mut all = self.take(n + own.rows(), own.cols());
            let (mut before, mut behind) = all.view_mut().split_rows(n);
            before.copy_from(trained);
            behind.copy_from(own.view());
            self.ws.give(own);
            all
        };
        (join(slots.0, k), join(slots.1, v))
    }

    /// Adds to the gradients of trained keys and values; what is left are those of the batch's own rows [T, KV·D].
    pub(super) fn trained_keys_backward(
        &self,
        batch: &Batch,
        layer: usize,
        dk: Tensor,
        dv: Tensor,
        grads: &mut Arena,
    ) -> (Tensor, Tensor) {
        let Some((_, slots)) = self.trained_keys(batch, layer) else {
            return (dk, dv);
        };
        let mut cut = |slot: usize, all: Tensor| {
            let n = grads.shape(slot).0;
            add_assign(grads.view_mut(slot), all.view().slice_rows(0..n));
            let mut own = self.take(all.rows() - n, all.cols());
            own.view_mut()
                .copy_from(all.view().slice_rows(n..all.rows()));
            self.ws.give(all);
            own
        };
        (cut(slots.0, dk), cut(slots.1, dv))
    }
}
