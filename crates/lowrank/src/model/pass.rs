//! What every layer of one forward or backward pass reads: the base, the adapters and the buffers.

use std::ops::Range;

use lowrank_kernels::{ComputeDType, Pauses, RowClasses, Tensor, View, Workspace};

use super::adapter::AdapterSet;
use super::config::{ModelConfig, Part, WeightId};
use super::weights::Weights;

/// One pass over the rows of a batch, or over some of them.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) weights: &'a Weights,
    pub(crate) adapters: AdapterSet<'a>,
    /// Which adapter a range of the pass's rows uses.
    pub(crate) rows_of_adapters: &'a [(Range<usize>, usize)],
    /// Which of the rows are generated.
    pub(crate) classes: RowClasses,
    pub(crate) ws: &'a Workspace,
    /// Key of the dropout masks; `None` outside training.
    pub(crate) dropout_key: Option<u64>,
    /// How exactly the blocks' linears multiply, and the gradients of the rest.
    pub(crate) compute_dtype: ComputeDType,
    /// What is done between the parts of blocks.
    pub(crate) pauses: Pauses<'a>,
}

/// What a norm's backward needs of its forward.
pub(crate) struct NormSaved {
    pub(crate) mean: Option<Tensor>,
    pub(crate) rstd: Tensor,
}

impl<'a> Pass<'a> {
    /// The same over other rows, of which ranges use these adapters.
    pub(crate) fn over(
        &self,
        rows_of_adapters: &'a [(Range<usize>, usize)],
        classes: RowClasses,
    ) -> Self {
        Self {
            rows_of_adapters,
            classes,
            ..*self
        }
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    /// The values of a base weight, or what stands in for them.
    pub(crate) fn weight(&self, id: WeightId) -> View<'_> {
        self.adapters
            .replacement(id)
            .unwrap_or_else(|| self.weights.view(id))
    }

    /// The values of a weight that the base may lack, or what stands in for them.
    pub(crate) fn find(&self, id: WeightId) -> Option<View<'_>> {
        self.adapters
            .replacement(id)
            .or_else(|| self.weights.get(id))
    }

    /// The gradient slot of a base weight that is trained.
    pub(crate) fn trained(&self, id: WeightId) -> Option<usize> {
        if self.adapters.is_empty() {
            None
        } else {
            self.adapters.get(0).replaced.get(&id).copied()
        }
    }

    /// The head: the embedding where the two are tied, and no adapter unties them.
    pub(crate) fn head_id(&self) -> WeightId {
        if self.find(WeightId::Head).is_some() {
            WeightId::Head
        } else {
            WeightId::Embedding
        }
    }

    pub(crate) fn take(&self, rows: usize, cols: usize) -> Tensor {
        self.ws.take(rows, cols)
    }

    pub(crate) fn give(&self, tensors: impl IntoIterator<Item = Tensor>) {
        for tensor in tensors {
            self.ws.give(tensor);
        }
    }

    pub(crate) fn give_norm(&self, saved: NormSaved) {
        self.give(saved.mean);
        self.ws.give(saved.rstd);
    }

    pub(crate) fn norm_bias(&self, id: impl Fn(Part) -> WeightId) -> Option<View<'_>> {
        let parts = self.config().norm.parts();
        parts
            .contains(&Part::Bias)
            .then(|| self.weight(id(Part::Bias)))
    }
}
