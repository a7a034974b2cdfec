//! The linear hook: frozen (or trained) linears and the low-rank branches beside them.
//!
//! ```text
//! y = x Wᵀ (+ b)                                   x [T, in], y [T, out]
//! y[rows, cols] += scale · (dropout(x[rows]) Aᵀ) Bᵀ     for every branch
//! y[rows, cols] −= scale · (x[rows] A₀ᵀ) B₀ᵀ            where it began as a part of the weight
//! ```
//! Where an adapter has factors of the linear's columns, its rows of x are multiplied with them before all that, or its rows of y
//! behind it (`scales`). Where it has magnitudes, its rows of y have them in place of the norms of W + ΔW (`magnitude`).
//!
//! Linears that read the same input go together: threads meet once for all of them, and the gradient of the input is
//! written once. Gradients of parameters accumulate; no gradient is computed for what is frozen.

use std::ops::Range;

use lowrank_kernels::{
    Arena, BranchGradient, BranchOutput, DType, Dropout, LinearGradient, LinearOutput, LowRank,
    Tensor, View, ViewMut, Weight, bias_backward, linear_backward_weight, linears_backward_input,
    linears_forward, low_rank_backward_hidden, low_rank_backward_input, low_rank_backward_weights,
};

use super::adapter::{Adapter, LowRankSite};
use super::config::{LinearId, Part, WeightId};
use super::magnitude::either;
use super::pass::Pass;
use crate::random::mix;

/// A branch of the batch's adapters at a linear.
struct BranchAt<'a> {
    rows: Range<usize>,
    branch: LowRank<'a>,
    /// `None`: a branch that takes off what another one began with, and is frozen.
    site: Option<&'a LowRankSite>,
}

/// What a linear saves for its backward; nothing by default.
#[derive(Default)]
pub(crate) struct LinearSaved {
    /// `x Aᵀ` [rows, r] of each branch that is not frozen.
    branches: Vec<Tensor>,
    /// The output [rows, out] before it was multiplied with an adapter's factors.
    pub(super) unscaled: Vec<Tensor>,
    /// The output [rows, out] without its bias, before it had an adapter's magnitudes; none where the backward has the output. It may
    /// be kept as bf16.
    pub(super) without_magnitude: Vec<Tensor>,
}

impl LinearSaved {
    /// Bytes of all of it.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        let all = [&self.branches, &self.unscaled, &self.without_magnitude];
        all.into_iter().flatten().map(Tensor::nbytes).sum()
    }
}

/// A linear on the way back: the gradient of its output, and what it saved.
#[derive(Clone, Copy)]
pub(crate) struct LinearBack<'a> {
    pub(crate) id: LinearId,
    pub(crate) dy: View<'a>,
    pub(crate) saved: &'a LinearSaved,
    /// The output as it was put out, which [`keeps_output`](super::magnitude::keeps_output) promises.
    pub(crate) y: Option<View<'a>>,
}

impl Pass<'_> {
    /// The weight of a linear in the base's layout, or what stands in for it.
    pub(crate) fn linear_weight(&self, id: LinearId) -> Weight<'_> {
        Weight {
            view: self.weight(WeightId::Linear(id, Part::Weight)),
            layout: self.config().linear_layout(id.kind),
        }
    }

    /// Output [T, out], and what the backward needs.
    pub(crate) fn linear(&self, id: LinearId, x: View) -> (Tensor, LinearSaved) {
        let [output] = self.linears([id], x);
        output
    }

    /// [`linear`](Self::linear) for several that read the same input.
    pub(crate) fn linears<const N: usize>(
        &self,
        ids: [LinearId; N],
        x: View,
    ) -> [(Tensor, LinearSaved); N] {
        if self.are_scaled(&ids) {
            return ids.map(|id| self.scaled_linear(id, x));
        }
        self.plain_linears(ids, x)
    }

    /// Without factors of columns.
    pub(super) fn plain_linears<const N: usize>(
        &self,
        ids: [LinearId; N],
        x: View,
    ) -> [(Tensor, LinearSaved); N] {
        let branches = ids.map(|id| self.branches_at(id));
        let mut outputs = std::array::from_fn(|i| {
            let (_, out) = self.config().linear_shape(ids[i].kind);
            let hidden = branches[i]
                .iter()
                .map(|at| self.take(at.rows.len(), at.branch.a.rows()));
            let saved = LinearSaved {
                branches: hidden.collect(),
                ..LinearSaved::default()
            };
            (self.take(x.rows(), out), saved)
        });
        let jobs = ids.iter().zip(&branches).zip(&mut outputs);
        let jobs = jobs.map(|((&id, branches), (y, saved))| LinearOutput {
            y: y.view_mut(),
            w: self.linear_weight(id),
            bias: self.find(WeightId::Linear(id, Part::Bias)),
            branches: branches
                .iter()
                .zip(&mut saved.branches)
                .map(|(at, u)| BranchOutput {
                    u: u.view_mut(),
                    rows: at.rows.clone(),
                    branch: at.branch,
                })
                .collect(),
        });
        linears_forward(x, jobs.collect(), self.classes, self.compute_dtype, self.ws);
        for ((_, saved), branches) in outputs.iter_mut().zip(&branches) {
            if branches.iter().any(|at| at.site.is_none()) {
                // The backward of a frozen branch reads its factors alone.
                let hidden = std::mem::take(&mut saved.branches).into_iter();
                let (kept, read): (Vec<_>, Vec<_>) =
                    hidden.zip(branches).partition(|(_, at)| at.site.is_some());
                saved.branches = kept.into_iter().map(|(u, _)| u).collect();
                self.give(read.into_iter().map(|(u, _)| u));
            }
        }
        for (id, (y, saved)) in ids.into_iter().zip(&mut outputs) {
            saved.without_magnitude = self.magnitudes_forward(id, y);
        }
        outputs
    }

    /// Goes back through linears that read the same input `x`: adds to the gradients of what is trained, and overwrites
    /// `dx`. `x` is only read where [`Pass::reads_input`] says so. With `dx` absent only parameters get gradients.
    pub(crate) fn linears_backward(
        &self,
        linears: &[LinearBack],
        x: Option<View>,
        dx: Option<ViewMut>,
        grads: &mut Arena,
    ) {
        let ids: Vec<LinearId> = linears.iter().map(|linear| linear.id).collect();
        if self.are_scaled(&ids) {
            self.scaled_linears_backward(linears, x, dx, grads);
        } else {
            self.plain_linears_backward(linears, x, dx, grads);
        }
    }

    /// Without factors of columns.
    pub(super) fn plain_linears_backward(
        &self,
        linears: &[LinearBack],
        x: Option<View>,
        mut dx: Option<ViewMut>,
        grads: &mut Arena,
    ) {
        let made: Vec<Option<Tensor>> = linears
            .iter()
            .map(|linear| self.magnitudes_backward(linear, grads))
            .collect();
        let given = linears;
        let linears: Vec<LinearBack> = (given.iter().zip(&made))
            .map(|(linear, du)| LinearBack {
                dy: either(du.as_ref(), linear.dy),
                ..*linear
            })
            .collect();
        let branches: Vec<Vec<BranchAt>> = linears.iter().map(|l| self.branches_at(l.id)).collect();
        let hidden: Vec<Vec<Tensor>> = linears
            .iter()
            .zip(&branches)
            .map(|(linear, branches)| {
                let hidden = branches.iter().map(|at| {
                    let mut du = self.take(at.rows.len(), at.branch.a.rows());
                    low_rank_backward_hidden(du.view_mut(), linear.dy, at.rows.clone(), &at.branch);
                    du
                });
                hidden.collect()
            })
            .collect();
        if let Some(dx) = dx.as_mut() {
            let back = linears.iter().zip(&branches).zip(&hidden);
            let back = back.map(|((linear, branches), hidden)| LinearGradient {
                dy: linear.dy,
                w: self.linear_weight(linear.id),
                branches: branches
                    .iter()
                    .zip(hidden)
                    .filter(|(at, _)| !at.branch.drops())
                    .map(|(at, du)| BranchGradient {
                        du: du.view(),
                        rows: at.rows.clone(),
                        a: at.branch.a,
                    })
                    .collect(),
            });
            let back = back.collect::<Vec<_>>();
            linears_backward_input(dx.reborrow(), &back, self.compute_dtype);
        }
        for (((linear, given), branches), hidden) in
            linears.iter().zip(given).zip(&branches).zip(&hidden)
        {
            self.parameters_backward(linear, given.dy, x, grads);
            let trained = branches.iter().zip(hidden);
            let trained = trained.filter_map(|(at, du)| Some((at, du, at.site?)));
            for ((at, du, site), u) in trained.zip(&linear.saved.branches) {
                let Some(x) = x else { continue };
                let rows = at.rows.clone();
                if let Some(dx) = dx.as_mut().filter(|_| at.branch.drops()) {
                    low_rank_backward_input(dx.reborrow(), du.view(), rows.clone(), &at.branch);
                }
                let (da, db) = grads.pair_mut(site.a, site.b);
                let saved = (u.view(), du.view());
                low_rank_backward_weights(da, db, linear.dy, x, saved, rows, &at.branch);
            }
        }
        self.give(hidden.into_iter().flatten());
        self.give(made.into_iter().flatten());
    }

    /// What linears saved, as it is kept.
    pub(crate) fn keep_linear(&self, saved: LinearSaved, dtype: DType) -> LinearSaved {
        let without = saved.without_magnitude.into_iter();
        LinearSaved {
            without_magnitude: without.map(|u| self.keep(u, dtype)).collect(),
            ..saved
        }
    }

    /// Gives back what linears saved.
    pub(crate) fn give_linears(&self, saved: impl IntoIterator<Item = LinearSaved>) {
        for saved in saved {
            self.give(saved.branches);
            self.give(saved.unscaled);
            self.give(saved.without_magnitude);
        }
    }

    /// The gradients of a linear's own weight and bias, where they are trained; `dy` is that of its output, magnitudes and bias included.
    fn parameters_backward(
        &self,
        linear: &LinearBack,
        dy: View,
        x: Option<View>,
        grads: &mut Arena,
    ) {
        if let Some(slot) = self.trained(WeightId::Linear(linear.id, Part::Weight))
            && let Some(x) = x
        {
            let layout = self.config().linear_layout(linear.id.kind);
            let dw = grads.view_mut(slot);
            linear_backward_weight(dw, linear.dy, x, layout, self.compute_dtype);
        }
        if let Some(slot) = self.trained(WeightId::Linear(linear.id, Part::Bias)) {
            bias_backward(grads.view_mut(slot), dy);
        }
    }

    /// Whether the backward of a linear reads its input.
    pub(crate) fn reads_input(&self, id: LinearId) -> bool {
        let reads = |adapter: &Adapter| {
            let scales = adapter.scaled.get(&id);
            adapter.low_rank.contains_key(&id) || scales.is_some_and(|site| site.input.is_some())
        };
        self.trained(WeightId::Linear(id, Part::Weight)).is_some()
            || self
                .rows_of_adapters
                .iter()
                .any(|(_, index)| reads(self.adapters.get(*index)))
    }

    /// A matrix that nothing but these linears reads, forward or backward; bf16 where they round it anyway.
    pub(crate) fn take_for(&self, readers: &[LinearId], rows: usize, cols: usize) -> Tensor {
        let alone = |&id: &LinearId| {
            let bias = WeightId::Linear(id, Part::Bias);
            !self.reads_input(id) && self.trained(bias).is_none()
        };
        let rounds = self.compute_dtype.rounds_here()
            && !readers.is_empty()
            && readers.iter().all(alone)
            && !self.are_scaled(readers);
        let dtype = if rounds { DType::Bf16 } else { DType::F32 };
        self.ws.take_as(rows, cols, dtype)
    }

    fn branches_at(&self, id: LinearId) -> Vec<BranchAt<'_>> {
        let mut branches = Vec::new();
        for (rows, index) in self.rows_of_adapters {
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
                branches.push(BranchAt {
                    rows: rows.clone(),
                    branch,
                    site: Some(site),
                });
                let initial = adapter.initial_of(site);
                branches.extend(initial.map(|(a, b)| BranchAt {
                    rows: rows.clone(),
                    branch: LowRank {
                        a,
                        b,
                        scale: -site.scale,
                        dropout: None,
                        ..branch
                    },
                    site: None,
                }));
            }
        }
        branches
    }
}
