//! The norms of the residual stream (RMSNorm or LayerNorm) and of q and k (RMSNorm).
//!
//! The backward passes accumulate into `dx` and into the gradients of trained weights.

use lowrank_kernels::{
    Arena, Tensor, View, ViewMut, layer_norm_apply, layer_norm_backward, layer_norm_forward,
    rms_norm_apply, rms_norm_backward, rms_norm_forward,
};

use super::config::{LinearId, NormKind, Part, WeightId};
use super::pass::{NormSaved, Pass};

impl Pass<'_> {
    /// Normalised rows [T, C] and the statistics that recompute them. `id` names the norm's tensors.
    pub(crate) fn norm(&self, id: impl Fn(Part) -> WeightId, x: View) -> (Tensor, NormSaved) {
        self.norm_for(&[], id, x)
    }

    /// The same for these linears alone, where there are some.
    pub(crate) fn norm_for(
        &self,
        readers: &[LinearId],
        id: impl Fn(Part) -> WeightId,
        x: View,
    ) -> (Tensor, NormSaved) {
        let mut y = self.take_for(readers, x.rows(), x.cols());
        let mut rstd = self.take(x.rows(), 1);
        let (weight, eps) = (self.weight(id(Part::Weight)), self.config().norm_eps);
        match self.config().norm {
            NormKind::Rms | NormKind::RmsOnePlus => {
                let rstd_out = rstd.view_mut();
                rms_norm_forward(&mut y, rstd_out, x, weight, self.norm_offset(), eps, 1);
                (y, NormSaved { mean: None, rstd })
            }
            NormKind::Layer | NormKind::LayerWithoutBias => {
                let mut mean = self.take(x.rows(), 1);
                let bias = self.norm_bias(&id);
                layer_norm_forward(
                    &mut y,
                    mean.view_mut(),
                    rstd.view_mut(),
                    x,
                    weight,
                    bias,
                    eps,
                );
                (
                    y,
                    NormSaved {
                        mean: Some(mean),
                        rstd,
                    },
                )
            }
        }
    }

    /// The normalised rows again, from the saved statistics, for these linears.
    pub(crate) fn norm_again(
        &self,
        readers: &[LinearId],
        id: impl Fn(Part) -> WeightId,
        x: View,
        saved: &NormSaved,
    ) -> Tensor {
        let mut y = self.take_for(readers, x.rows(), x.cols());
        let weight = self.weight(id(Part::Weight));
        match &saved.mean {
            None => {
                let rstd = saved.rstd.view();
                rms_norm_apply(&mut y, x, rstd, weight, self.norm_offset(), 1);
            }
            Some(mean) => {
                layer_norm_apply(
                    &mut y,
                    x,
                    mean.view(),
                    saved.rstd.view(),
                    weight,
                    self.norm_bias(&id),
                );
            }
        }
        y
    }

    /// dx += norm's share of dy.
    pub(crate) fn norm_backward(
        &self,
        id: impl Fn(Part) -> WeightId,
        dx: ViewMut,
        dy: View,
        x: View,
        saved: &NormSaved,
        grads: &mut Arena,
    ) {
        let weight = self.weight(id(Part::Weight));
        let (dw, db) = (self.trained(id(Part::Weight)), self.trained(id(Part::Bias)));
        let rstd = saved.rstd.view();
        match (&saved.mean, dw, db) {
            (None, dw, _) => {
                let dw = dw.map(|slot| grads.view_mut(slot));
                rms_norm_backward(dx, dw, dy, x, rstd, weight, self.norm_offset(), 1, true);
            }
            (Some(mean), Some(dw), Some(db)) => {
                let (dw, db) = grads.pair_mut(dw, db);
                layer_norm_backward(
                    dx,
                    Some(dw),
                    Some(db),
                    dy,
                    x,
                    mean.view(),
                    rstd,
                    weight,
                    true,
                );
            }
            (Some(mean), dw, db) => {
                // At most one of the two is trained, so one borrow of the arena is enough.
                let (dw, db) = match (dw, db) {
                    (Some(slot), _) => (Some(grads.view_mut(slot)), None),
                    (None, Some(slot)) => (None, Some(grads.view_mut(slot))),
                    (None, None) => (None, None),
                };
                layer_norm_backward(dx, dw, db, dy, x, mean.view(), rstd, weight, true);
            }
        }
    }

    fn norm_offset(&self) -> f32 {
        self.config().norm.weight_offset()
    }

    /// RMSNorm of q or k, in pieces of the weight's size: (normalised [T, n·D], rstd [T, pieces]).
    pub(crate) fn head_norm(&self, id: WeightId, x: View) -> (Tensor, Tensor) {
        let pieces = x.cols() / self.weight(id).cols();
        let mut y = self.take(x.rows(), x.cols());
        let mut rstd = self.take(x.rows(), pieces);
        rms_norm_forward(
            y.view_mut(),
            rstd.view_mut(),
            x,
            self.weight(id),
            self.norm_offset(),
            self.config().norm_eps,
            pieces,
        );
        (y, rstd)
    }

    /// The gradient of a head norm's input, in a new buffer.
    pub(crate) fn head_norm_backward(
        &self,
        id: WeightId,
        dy: View,
        x: View,
        rstd: View,
        grads: &mut Arena,
    ) -> Tensor {
        let pieces = x.cols() / self.weight(id).cols();
        let mut dx = self.take(x.rows(), x.cols());
        let dw = self.trained(id).map(|slot| grads.view_mut(slot));
        rms_norm_backward(
            dx.view_mut(),
            dw,
            dy,
            x,
            rstd,
            self.weight(id),
            self.norm_offset(),
            pieces,
            false,
        );
        dx
    }
}
