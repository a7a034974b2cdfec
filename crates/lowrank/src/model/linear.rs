//! The linear hook: a frozen (or trained) linear and the low-rank branches beside it.
//!
//! ```text
//! y = x Wᵀ (+ b)                                   x [T, in], y [T, out]
//! y[rows, cols] += scale · (dropout(x[rows]) Aᵀ) Bᵀ     for every branch
//! ```
//! Gradients of parameters accumulate; no gradient is computed for what is frozen.

use lowrank_kernels::{
    Arena, Dropout, LowRank, Tensor, View, ViewMut, Weight, bias_backward, linear_backward_input,
    linear_backward_weight, linear_forward_each, low_rank_backward, low_rank_forward,
};

use super::config::{LinearId, Part, WeightId};
use super::pass::Pass;
use crate::random::mix;
use crate::tuning::LowRankSite;

impl Pass<'_> {
    /// The weight of a linear in the base's layout, or what stands in for it.
    pub(crate) fn linear_weight(&self, id: LinearId) -> Weight<'_> {
        Weight {
            view: self.weight(WeightId::Linear(id, Part::Weight)),
            layout: self.config().layout,
        }
    }

    /// Output [T, out] and, for each branch, `x Aᵀ` [rows, r], which its backward needs.
    pub(crate) fn linear(&self, id: LinearId, x: View) -> (Tensor, Vec<Tensor>) {
        let [output] = self.linears([id], x);
        output
    }

    /// The same for several linears of one input.
    pub(crate) fn linears<const N: usize>(
        &self,
        ids: [LinearId; N],
        x: View,
    ) -> [(Tensor, Vec<Tensor>); N] {
        let config = self.config();
        let mut ys = ids.map(|id| self.ws.take(x.rows(), config.linear_shape(id.kind).1));
        let weights = ids.map(|id| self.linear_weight(id));
        let biases = ids.map(|id| {
            let has_bias = config.linear_bias(id.kind);
            has_bias.then(|| self.weight(WeightId::Linear(id, Part::Bias)))
        });
        linear_forward_each(ys.each_mut().map(Tensor::view_mut), x, weights, biases);
        let mut index = 0;
        ys.map(|mut y| {
            let mut branches = Vec::new();
            self.each_branch(ids[index], |rows, branch, _| {
                let mut u = self.ws.take(rows.len(), branch.a.rows());
                low_rank_forward(y.view_mut(), u.view_mut(), x, rows, &branch, self.ws);
                branches.push(u);
            });
            index += 1;
            (y, branches)
        })
    }

    /// Adds dy's share to `dx` (or overwrites it where `accumulate` is false) and to the gradients of what is trained.
    /// `x` is only read where [`Pass::reads_input`] says so. With `dx` absent only parameters get gradients.
    pub(crate) fn linear_backward(
        &self,
        id: LinearId,
        dy: View,
        x: Option<View>,
        branches: &[Tensor],
        mut dx: Option<ViewMut>,
        accumulate: bool,
        grads: &mut Arena,
    ) {
        if let Some(dx) = dx.as_mut() {
            // y = x Wᵀ
            linear_backward_input(dx.reborrow(), dy, self.linear_weight(id), accumulate);
        }
        if let Some(slot) = self.trained(WeightId::Linear(id, Part::Weight))
            && let Some(x) = x
        {
            linear_backward_weight(grads.view_mut(slot), dy, x, self.config().layout);
        }
        if let Some(slot) = self.trained(WeightId::Linear(id, Part::Bias)) {
            bias_backward(grads.view_mut(slot), dy);
        }
        let Some(x) = x else { return };
        let mut index = 0;
        self.each_branch(id, |rows, branch, site| {
            // y += scale · u Bᵀ, u = x Aᵀ
            let (da, db) = grads.pair_mut(site.a, site.b);
            let dx = dx.as_mut().map(ViewMut::reborrow);
            low_rank_backward(
                dx,
                Some(da),
                Some(db),
                dy,
                x,
                branches[index].view(),
                rows,
                &branch,
                self.ws,
            );
            index += 1;
        });
    }

    /// Whether the backward of a linear reads its input.
    pub(crate) fn reads_input(&self, id: LinearId) -> bool {
        self.trained(WeightId::Linear(id, Part::Weight)).is_some()
            || self
                .batch
                .adapters
                .iter()
                .any(|(_, a)| self.adapters.get(*a).low_rank.contains_key(&id))
    }

    fn each_branch(
        &self,
        id: LinearId,
        mut f: impl FnMut(std::ops::Range<usize>, LowRank, &LowRankSite),
    ) {
        for (rows, index) in &self.batch.adapters {
            let adapter = self.adapters.get(*index);
            for (i, site) in adapter.low_rank.get(&id).into_iter().flatten().enumerate() {
                let place = ((id.layer as u64) << 16) | ((id.kind as u64) << 8) | i as u64;
                let dropout = self
                    .dropout_key
                    .filter(|_| site.dropout > 0.0)
                    .map(|key| Dropout {
                        p: site.dropout,
                        key: mix(key, place),
                    });
                let branch = LowRank {
                    a: adapter.params.view(site.a),
                    b: adapter.params.view(site.b),
                    scale: site.scale,
                    out_offset: site.out_offset,
                    dropout,
                };
                f(rows.clone(), branch, site);
            }
        }
    }
}
