//! Magnitudes of a linear's outputs, as DoRA has them (Liu et al., 2024).
//!
//! ```text
//! y = (m / ‖W + Σ s·B·A‖) ⊙ (x Wᵀ, and the branches) + b          m [1, out], the norms those of the rows of an [out, in] matrix
//! ```
//! A linear has one m, even where its branches stand beside parts of it. The backward takes the norms as constants, as
//! PEFT's `DoraLinearLayer.forward` does. They are computed from W·Aᵀ and A·Aᵀ, never from W + s·B·A, and are kept until the
//! adapter's values change: [`Adapter::forget_norms`].
//!
//! The gradient of m needs the output without m and b, u. Where blocks keep y itself ([`keeps_output`]), they keep nothing else for it:
//! Σ dy ⊙ u / ‖…‖ is Σ dy ⊙ y / m there. Both are as exact, in bf16 too, since a factor moves the exponents of y alone; unless y is
//! nought because m is. A linear with such an output keeps its u after all.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lowrank_kernels::{
    Arena, LowRank, RowClasses, Tensor, View, Weight, adapted_squares, linear_forward,
    magnitude_backward, magnitude_forward, output_squares,
};

use super::adapter::{Adapter, LowRankSite};
use super::config::{LinearId, LinearKind, ModelConfig, Part, WeightId};
use super::linear::LinearBack;
use super::pass::Pass;
use super::weights::Weights;

/// A norm is at least this, so that an output whose weights are all zero stays zero.
const SMALLEST_NORM: f32 = 1e-30;

/// A factor m / ‖W + Σ s·B·A‖ below which the output says too little of u.
const SMALLEST_FACTOR: f32 = 1e-12;

/// Whether blocks have a linear's output in their backward just as it put it out, and without a bias that would have to be taken
/// off again: v, and what the MLP's activation reads.
pub(crate) fn keeps_output(config: &ModelConfig, kind: LinearKind) -> bool {
    let kept = matches!(kind, LinearKind::V | LinearKind::Gate | LinearKind::Up);
    kept && !config.linear_bias(kind)
}

/// ‖wᵢ‖² of the base's linears, each computed when it is first asked for.
#[derive(Clone, Default)]
pub(crate) struct BaseSquares(Arc<Mutex<HashMap<LinearId, Arc<[f64]>>>>);

/// Norms [1, out] of the linears that have magnitudes, with the branches beside them.
pub(crate) type Norms = HashMap<LinearId, Tensor>;

/// The norms of an adapter's linears beside the base that they were computed for.
#[derive(Default)]
pub(crate) struct KeptNorms(Mutex<Option<(BaseSquares, Arc<Norms>)>>);

/// What a mutex guards: nothing is left half done in there.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Weights {
    /// ‖wᵢ‖² of a linear's outputs.
    fn squares(&self, id: LinearId) -> Arc<[f64]> {
        let kept = &self.squares.0;
        if let Some(known) = locked(kept).get(&id) {
            return Arc::clone(known);
        }
        // Without the lock, so that threads of one pool never wait for each other. They compute the same bits.
        let made: Arc<[f64]> = output_squares(self.linear(id)).into();
        locked(kept).insert(id, Arc::clone(&made));
        made
    }

    fn linear(&self, id: LinearId) -> Weight<'_> {
        Weight {
            view: self.view(WeightId::Linear(id, Part::Weight)),
            layout: self.config().linear_layout(id.kind),
        }
    }
}

impl LowRankSite {
    /// Its factors, without dropout.
    fn factors<'a>(&self, adapter: &'a Adapter) -> LowRank<'a> {
        LowRank {
            a: adapter.params.view(self.a),
            b: adapter.params.view(self.b),
            scale: self.scale,
            out_offset: self.out_offset,
            dropout: None,
        }
    }
}

impl Adapter {
    /// Lets the magnitudes begin as the norms, so that the linears are what they are without them. Those of linears that a stage of
    /// a pipeline does not have stay as they are. PEFT's `DoraLinearLayer.update_layer`.
    pub fn begin_magnitudes(&mut self, weights: &Weights) {
        self.forget_norms();
        let norms = self.norms(weights);
        for (id, norms) in norms.iter() {
            let slot = self.magnitudes[id];
            self.params.view_mut(slot).copy_from(norms.view());
        }
    }

    /// Norms of W + Σ s·B·A of every linear with magnitudes whose weight and values are here. They are computed once, until they are
    /// [forgotten](Self::forget_norms).
    pub(super) fn norms(&self, weights: &Weights) -> Arc<Norms> {
        if self.magnitudes.is_empty() {
            return Arc::default();
        }
        let kept = locked(&self.norms.0).clone();
        if let Some((base, norms)) = kept
            && Arc::ptr_eq(&base.0, &weights.squares.0)
        {
            return norms;
        }
        let of = |(&id, &slot): (&LinearId, &usize)| {
            let here = self.params.is_held(slot)
                && weights.get(WeightId::Linear(id, Part::Weight)).is_some();
            here.then(|| (id, self.norms_of(weights, id)))
        };
        let made: Arc<Norms> = Arc::new(self.magnitudes.iter().filter_map(of).collect());
        *locked(&self.norms.0) = Some((weights.squares.clone(), Arc::clone(&made)));
        made
    }

    /// Computes the norms now where they are not known, so that a pass of several threads finds them.
    pub(crate) fn prepare_norms(&self, weights: &Weights) {
        drop(self.norms(weights));
    }

    /// Forgets the norms, which belong to values of A and B that have changed.
    pub fn forget_norms(&mut self) {
        self.norms = KeptNorms::default();
    }

    fn norms_of(&self, weights: &Weights, id: LinearId) -> Tensor {
        let weight = weights.linear(id);
        let mut squares = weights.squares(id).to_vec();
        for site in self.low_rank.get(&id).into_iter().flatten() {
            let branch = site.factors(self);
            let mut wa = Tensor::zeros(branch.a.rows(), weight.outputs());
            let classes = RowClasses::PROMPT;
            linear_forward(wa.view_mut(), branch.a, weight, None, classes);
            adapted_squares(&mut squares, wa.view(), &branch);
        }
        let norms = squares.iter().map(|square| square.max(0.0).sqrt() as f32);
        let norms: Vec<f32> = norms.map(|norm| norm.max(SMALLEST_NORM)).collect();
        Tensor::from_f32(1, norms.len(), norms)
    }

    /// m / ‖W + Σ s·B·A‖ [1, out] of a linear that has magnitudes.
    pub(crate) fn magnitude_factors(&self, weights: &Weights, id: LinearId) -> Option<Tensor> {
        let slot = *self.magnitudes.get(&id)?;
        let norms = self.norms(weights);
        let norms = norms.get(&id)?.to_vec();
        let values = self.params.view(slot).to_vec();
        let factors = values.iter().zip(norms).map(|(m, norm)| m / norm);
        Some(Tensor::from_f32(1, values.len(), factors.collect()))
    }
}

/// Rows whose outputs have the magnitudes of one adapter.
struct MagnitudeAt {
    rows: Range<usize>,
    /// Its place among the adapters of the pass.
    adapter: usize,
    slot: usize,
    /// [1, out]
    factors: Tensor,
    norms: Arc<Norms>,
}

impl Pass<'_> {
    fn magnitudes_at(&self, id: LinearId) -> Vec<MagnitudeAt> {
        let mut found = Vec::new();
        for (rows, index) in self.rows_of_adapters {
            let adapter = self.adapters.get(*index);
            let Some(&slot) = adapter.magnitudes.get(&id) else {
                continue;
            };
            let Some(factors) = adapter.magnitude_factors(self.weights, id) else {
                continue;
            };
            found.push(MagnitudeAt {
                rows: rows.clone(),
                adapter: *index,
                slot,
                factors,
                norms: adapter.norms(self.weights),
            });
        }
        found
    }

    /// Whether the gradients of magnitudes are computed from a linear's output.
    pub(crate) fn magnitudes_read_output(&self, id: LinearId) -> bool {
        let has = |index: usize| self.adapters.get(index).magnitudes.contains_key(&id);
        keeps_output(self.config(), id.kind)
            && self.rows_of_adapters.iter().any(|(_, index)| has(*index))
    }

    /// Gives rows of a linear's output y [T, out], made with bias and branches, the magnitudes of their adapters. What they were before, without
    /// the bias, is what the backward needs: [rows, out] of each, unless it has y.
    pub(super) fn magnitudes_forward(&self, id: LinearId, y: &mut Tensor) -> Vec<Tensor> {
        let bias = self.find(WeightId::Linear(id, Part::Bias));
        let at_hand = keeps_output(self.config(), id.kind) && !self.are_scaled(&[id]);
        let mut saved = Vec::new();
        for at in self.magnitudes_at(id) {
            let factors = at.factors.to_vec();
            let tells = at_hand && factors.iter().all(|c| c.abs() >= SMALLEST_FACTOR);
            let mut u = (!tells).then(|| self.take(at.rows.len(), y.cols()));
            let rows = y.view_mut().slice_rows(at.rows);
            let to = u.as_mut().map(Tensor::view_mut);
            magnitude_forward(rows, to, at.factors.view(), bias);
            saved.extend(u);
        }
        saved
    }

    /// The gradient of what [`magnitudes_forward`](Self::magnitudes_forward) was given, where that is not `dy` itself; adds to the gradients of
    /// the magnitudes.
    pub(super) fn magnitudes_backward<'t>(
        &'t self,
        linear: &LinearBack<'t>,
        grads: &mut Arena,
    ) -> Option<Tensor> {
        let found = self.magnitudes_at(linear.id);
        if found.is_empty() {
            return None;
        }
        let dy = linear.dy;
        let mut du = self.take(dy.rows(), dy.cols());
        let covered: usize = found.iter().map(|at| at.rows.len()).sum();
        if covered < dy.rows() {
            du.view_mut().copy_from(dy);
        }
        // All rows of a gradient pass are of one adapter, so either all of them kept u or none.
        for (i, at) in found.iter().enumerate() {
            let Some(norms) = at.norms.get(&linear.id) else {
                continue;
            };
            let rows = |view: View<'t>| view.slice_rows(at.rows.clone());
            let (saved, divisors) = match (linear.saved.without_magnitude.get(i), linear.y) {
                (Some(u), _) => (u.view(), norms.view()),
                (None, Some(y)) => (rows(y), self.adapters.get(at.adapter).params.view(at.slot)),
                (None, None) => unreachable!("u is kept where y is not"),
            };
            magnitude_backward(
                du.view_mut().slice_rows(at.rows.clone()),
                grads.view_mut(at.slot),
                rows(dy),
                saved,
                (at.factors.view(), divisors),
            );
        }
        Some(du)
    }
}

/// A matrix, or what stands in for it.
pub(super) fn either<'t>(made: Option<&'t Tensor>, given: View<'t>) -> View<'t> {
    made.map_or(given, Tensor::view)
}
