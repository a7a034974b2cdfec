//! Rows of the embedding, and of the output projection, that are an adapter's own.
//!
//! ```text
//! embedding    x[t] = R[i] where ids[t] is the i-th of the adapter's tokens     dR[i] += dx[t]
//! head         logits[:, the adapter's tokens] = h · Rᵀ                         dR += dlogitsᵀ · h
//! ```
//! They stand for the table's rows of these tokens wherever the adapter is used; where the two are tied, R is the same in both, and
//! its gradient the sum.

use std::ops::Range;

use lowrank_kernels::{Arena, OwnRows, Tensor, View, embedding_backward, embedding_forward, scale};

use super::adapter::TokenRows;
use super::pass::Pass;

impl<'a> Pass<'a> {
    /// Overwrites the rows of tokens whose embeddings are their adapter's; x [T, C] are those of the table.
    pub(super) fn embed_own(&self, ids: &[u32], x: &mut Tensor) {
        for (rows, index) in self.rows_of_adapters {
            let adapter = self.adapters.get(*index);
            let Some(own) = &adapter.token_rows.embedding else {
                continue;
            };
            for row in rows.clone() {
                if let Some(place) = own.place(ids[row]) {
                    let place = place as usize;
                    let from = adapter.params.view(own.slot());
                    let mut to = x.view_mut().slice_rows(row..row + 1);
                    to.copy_from(from.slice_rows(place..place + 1));
                }
            }
        }
    }

    /// Adds to the gradients of trained rows; dx [T, C] is the gradient of what the table gave times `factor`.
    pub(super) fn embed_own_backward(
        &self,
        ids: &[u32],
        dx: View,
        factor: Option<f32>,
        grads: &mut Arena,
    ) {
        let Some(own) = self
            .adapters
            .first()
            .and_then(|a| a.token_rows.embedding.as_ref())
        else {
            return;
        };
        let trained = self.rows_of_adapters.iter();
        let trained = trained.filter(|(_, index)| *index == 0);
        let (rows, places): (Vec<u32>, Vec<u32>) = trained
            .flat_map(|(rows, _)| rows.clone())
            .filter_map(|row| Some((row as u32, own.place(ids[row])?)))
            .unzip();
        let mut picked = self.take(rows.len(), dx.cols());
        embedding_forward(picked.view_mut(), &rows, dx, false);
        if let Some(factor) = factor {
            scale(picked.view_mut(), factor);
        }
        embedding_backward(grads.view_mut(own.slot()), &places, picked.view());
        self.give([picked]);
    }

    /// The rows of the output projection that are an adapter's own, for each range of hidden rows and the adapter that it uses.
    pub(super) fn own_of_head(&self, ranges: &[(Range<usize>, usize)]) -> Vec<OwnRows<'a>> {
        let with_rows = ranges.iter().filter_map(|(rows, index)| {
            let adapter = self.adapters.get(*index);
            let own: &TokenRows = adapter.token_rows.head.as_ref()?;
            Some(OwnRows {
                rows: rows.clone(),
                ids: own.ids(),
                values: adapter.params.view(own.slot()),
            })
        });
        with_rows.collect()
    }
}
