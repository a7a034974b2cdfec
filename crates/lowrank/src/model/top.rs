//! What stands on the hidden rows: the output projection of a language model, or a classifier.
//!
//! ```text
//! language model    logits = h · Wᵀ, divided and capped where the config says so
//! classifier        logits = out(norm(act(dense(h)))),  or out(h) without the dense linear
//! ```
//! A classifier's linears are linears of the model as any other: an adapter may stand beside the first one, and their values may be
//! an adapter's own.

use std::ops::Range;

use lowrank_kernels::{
    Arena, ComputeDType, HeadWeight, Layout, LogitScaling, OwnRows, Pauses, RowClasses, Tensor,
    View, ViewMut, Weight, activation_backward, activation_forward, pool_backward, pool_forward,
};

use super::batch::Batch;
use super::config::{Classifier, LinearId, LinearKind, WeightId};
use super::linear::{LinearBack, LinearSaved};
use super::pass::{NormSaved, Pass};

/// The output projection: logits = hidden · Wᵀ, and what becomes of them.
pub struct Head<'a> {
    weight: Weight<'a>,
    own: Vec<OwnRows<'a>>,
    /// What becomes of the product.
    pub scaling: LogitScaling,
    /// Slot of its gradient, where it is trained: of its own rows where there are any.
    pub slot: Option<usize>,
    /// How exactly gradients are computed that go through it.
    pub compute_dtype: ComputeDType,
    /// What is done between its chunks.
    pub pauses: Pauses<'a>,
}

impl Head<'_> {
    /// The weight [V, C], the embedding's where the two are tied, with the rows that adapters have in place of its own.
    pub fn weight(&self) -> HeadWeight<'_> {
        HeadWeight {
            weight: self.weight,
            own: &self.own,
        }
    }
}

/// What stands on the hidden rows of one pass.
pub struct Top<'a> {
    pass: Pass<'a>,
    batch: &'a Batch,
}

/// What a classifier saves for its backward.
pub struct ClassifierSaved {
    /// What it read [n, C].
    input: Tensor,
    dense: Option<DenseSaved>,
    /// What the last linear read, unless that is `input`.
    features: Option<Tensor>,
    out: LinearSaved,
}

struct DenseSaved {
    linear: LinearSaved,
    /// Before the nonlinearity [n, C].
    u: Tensor,
    /// Behind it, and what the norm saved.
    norm: Option<(Tensor, NormSaved)>,
}

impl<'a> Top<'a> {
    pub(super) fn new(pass: Pass<'a>, batch: &'a Batch) -> Self {
        Self { pass, batch }
    }

    /// The output projection of a language model, over the supervised rows.
    pub fn head(&self) -> Head<'_> {
        self.head_of(&self.batch.supervised)
    }

    /// The same over some of the batch's rows.
    pub(super) fn head_of(&self, rows: &[u32]) -> Head<'_> {
        let pass = &self.pass;
        let id = pass.head_id();
        let ranges = self.batch.adapters_of(rows);
        let first = pass.adapters.first();
        let trained = first.and_then(|adapter| adapter.token_rows.head.as_ref());
        let own = pass.own_of_head(&ranges);
        let slot = match trained {
            None => pass.trained(id),
            Some(rows) => (!own.is_empty()).then(|| rows.slot()),
        };
        Head {
            weight: Weight {
                view: pass.weight(id),
                layout: Layout::OutIn,
            },
            own,
            scaling: pass.config().logit_scaling,
            slot,
            compute_dtype: pass.compute_dtype,
            pauses: pass.pauses,
        }
    }

    /// The classifier, if the model has one.
    pub fn classifier(&self) -> Option<&Classifier> {
        self.pass.config().classifier()
    }

    /// Logits [n, labels] of what the batch's pools make of the hidden rows, and what the backward needs.
    ///
    /// # Panics
    /// If the model has no classifier.
    pub fn classify(&self, hidden: View) -> (Tensor, ClassifierSaved) {
        let ranges = self.ranges();
        let pass = self.pass_over(&ranges);
        let input = self.pooled(hidden);
        let Some(classifier) = self.classifier() else {
            panic!("the model has no classifier")
        };
        let mut features = None;
        let dense = classifier.dense.map(|dense| {
            let (u, linear) = pass.linear(self.id(LinearKind::Dense), input.view());
            let mut a = pass.take(u.rows(), u.cols());
            activation_forward(a.view_mut(), u.view(), dense.activation);
            let norm = if dense.norm {
                let (normed, saved) = pass.norm(WeightId::ClassifierNorm, a.view());
                features = Some(normed);
                Some((a, saved))
            } else {
                features = Some(a);
                None
            };
            DenseSaved { linear, u, norm }
        });
        let read = features.as_ref().unwrap_or(&input).view();
        let (logits, out) = pass.linear(self.id(LinearKind::Out), read);
        let saved = ClassifierSaved {
            input,
            dense,
            features,
            out,
        };
        (logits, saved)
    }

    /// From the gradient of the logits [n, labels] to that of the hidden rows, which overwrites `dh` if it is wanted; adds to the
    /// gradients of what is trained, and gives everything back.
    pub fn classify_backward(
        &self,
        saved: ClassifierSaved,
        d_logits: Tensor,
        dh: Option<ViewMut>,
        grads: &mut Arena,
    ) {
        let ranges = self.ranges();
        let pass = self.pass_over(&ranges);
        let wanted = dh.is_some();
        let shape = (saved.input.rows(), saved.input.cols());
        let take = || pass.take(shape.0, shape.1);
        let mut dx = (wanted || saved.dense.is_some()).then(take);
        let back = LinearBack {
            y: None,
            id: self.id(LinearKind::Out),
            dy: d_logits.view(),
            saved: &saved.out,
        };
        let read = saved.features.as_ref().unwrap_or(&saved.input).view();
        let dx_out = dx.as_mut().map(Tensor::view_mut);
        pass.linears_backward(&[back], Some(read), dx_out, grads);
        if let Some(dense) = &saved.dense
            && let Some(d_features) = dx.take()
        {
            let d_a = norm_backward(&pass, dense, d_features, grads);
            let activation = self.classifier().and_then(|classifier| classifier.dense);
            let mut du = take();
            if let Some(dense_config) = activation {
                let (out, u) = (du.view_mut(), dense.u.view());
                activation_backward(out, d_a.view(), u, dense_config.activation);
            }
            pass.give([d_a]);
            dx = wanted.then(take);
            let back = LinearBack {
                y: None,
                id: self.id(LinearKind::Dense),
                dy: du.view(),
                saved: &dense.linear,
            };
            let (x, dx_out) = (saved.input.view(), dx.as_mut().map(Tensor::view_mut));
            pass.linears_backward(&[back], Some(x), dx_out, grads);
            pass.give([du]);
        }
        pass.give([d_logits]);
        self.give(saved);
        if let Some((dx, dh)) = dx.as_ref().zip(dh) {
            pool_backward(dh, dx.view(), &self.batch.pools);
        }
        pass.give(dx);
    }

    /// The rows [n, C] that a classifier reads.
    pub fn pooled(&self, hidden: View) -> Tensor {
        let pools = &self.batch.pools;
        let mut pooled = self.pass.take(pools.len(), hidden.cols());
        pool_forward(pooled.view_mut(), hidden, pools);
        pooled
    }

    /// Which adapter a range of the pooled rows uses.
    fn ranges(&self) -> Vec<(Range<usize>, usize)> {
        let batch = self.batch;
        let first = |pool: &Range<usize>| batch.supervised[pool.start];
        let rows: Vec<u32> = batch.pools.iter().map(first).collect();
        batch.adapters_of(&rows)
    }

    /// Gives back what a classifier saved.
    pub fn give(&self, saved: ClassifierSaved) {
        let pass = &self.pass;
        pass.give([saved.input]);
        pass.give(saved.features);
        pass.give_linears([saved.out]);
        if let Some(DenseSaved { linear, u, norm }) = saved.dense {
            pass.give_linears([linear]);
            pass.give([u]);
            if let Some((a, norm)) = norm {
                pass.give([a]);
                pass.give_norm(norm);
            }
        }
    }

    /// The pass over rows that use these adapters. A classifier is small, and is always computed exactly.
    fn pass_over<'p>(&'p self, ranges: &'p [(Range<usize>, usize)]) -> Pass<'p> {
        Pass {
            rows_of_adapters: ranges,
            classes: RowClasses::PROMPT,
            compute_dtype: ComputeDType::F32,
            ..self.pass
        }
    }

    fn id(&self, kind: LinearKind) -> LinearId {
        self.pass.config().classifier_linear(kind)
    }
}

/// Through the classifier's norm, where it has one.
fn norm_backward(pass: &Pass, dense: &DenseSaved, d_features: Tensor, grads: &mut Arena) -> Tensor {
    let Some((a, norm)) = &dense.norm else {
        return d_features;
    };
    let mut d_a = pass.take(d_features.rows(), d_features.cols());
    d_a.view_mut().fill(0.0);
    let (id, out) = (WeightId::ClassifierNorm, d_a.view_mut());
    pass.norm_backward(id, out, d_features.view(), a.view(), norm, grads);
    pass.give([d_features]);
    d_a
}
