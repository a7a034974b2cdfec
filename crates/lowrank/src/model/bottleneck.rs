//! Adapter layers behind a block's attention and MLP, each for its adapter's rows.
//!
//! ```text
//! y       += U·act(D·y + b) + c;    x += y              y [T, C], the sublayer's output
//! x += y;  x += U·act(D·norm(x) + b) + c                where the layer has a norm
//! ```
//! Gradients of parameters accumulate.

use std::ops::Range;

use lowrank_kernels::{
    Arena, DType, Layout, Tensor, View, Weight, activation_backward, activation_forward,
    add_assign, bias_backward, layer_norm_apply, layer_norm_backward, layer_norm_forward,
    linear_backward_input, linear_backward_weight, linear_forward,
};

use super::adapter::{Adapter, BottleneckSite};
use super::config::Sublayer;
use super::pass::{NormSaved, Pass};

/// What one adapter layer saves for its backward.
pub(super) struct BottleneckSaved {
    /// What it reads [rows, C], before the norm. Maybe bf16.
    h: Tensor,
    norm: Option<NormSaved>,
    /// Before the nonlinearity [rows, r].
    u: Tensor,
}

/// A layer of the batch's adapters.
struct BottleneckAt<'a> {
    rows: Range<usize>,
    site: &'a BottleneckSite,
    adapter: &'a Adapter,
}

impl<'a> BottleneckAt<'a> {
    fn weight(&self, slot: usize) -> Weight<'a> {
        Weight {
            view: self.value(slot),
            layout: Layout::OutIn,
        }
    }

    fn value(&self, slot: usize) -> View<'a> {
        self.adapter.params.view(slot)
    }
}

impl Pass<'_> {
    /// Whether any adapter of the pass has a layer here.
    pub(super) fn has_bottleneck(&self, layer: usize, place: Sublayer) -> bool {
        !self.bottlenecks_at(layer, place).is_empty()
    }

    /// Adds the residual stream to a sublayer's output, and the adapter layers to both.
    pub(super) fn join_stream(
        &self,
        layer: usize,
        place: Sublayer,
        y: &mut Tensor,
        stream: View,
    ) -> Vec<BottleneckSaved> {
        let all = self.bottlenecks_at(layer, place);
        let (on_stream, inside): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|at| at.site.norm.is_some());
        let mut saved: Vec<_> = inside.iter().map(|at| self.bottleneck(at, y)).collect();
        add_assign(y.view_mut(), stream);
        saved.extend(on_stream.iter().map(|at| self.bottleneck(at, y)));
        saved
    }

    fn bottleneck(&self, at: &BottleneckAt, y: &mut Tensor) -> BottleneckSaved {
        let (rows, c) = (at.rows.clone(), y.cols());
        let ((down, b), (up, bias)) = (at.site.down, at.site.up);
        let mut h = self.take(rows.len(), c);
        h.view_mut().copy_from(y.view().slice_rows(rows.clone()));
        let mut normed = None;
        let norm = at.site.norm.map(|(weight, bias)| {
            let [mut mean, mut rstd] = [(); 2].map(|()| self.take(rows.len(), 1));
            layer_norm_forward(
                normed.insert(self.take(rows.len(), c)).view_mut(),
                mean.view_mut(),
                rstd.view_mut(),
                h.view(),
                at.value(weight),
                Some(at.value(bias)),
                BottleneckSite::NORM_EPS,
            );
            NormSaved {
                mean: Some(mean),
                rstd,
            }
        });
        let mut u = self.take(rows.len(), at.value(b).cols());
        let input = normed.as_ref().unwrap_or(&h).view();
        let classes = self.classes.skip(rows.start);
        let (down, b) = (at.weight(down), at.value(b));
        linear_forward(u.view_mut(), input, down, Some(b), classes);
        self.give(normed);
        let z = self.activated(&u, at.site);
        let mut change = self.take(rows.len(), c);
        linear_forward(
            change.view_mut(),
            z.view(),
            at.weight(up),
            Some(at.value(bias)),
            classes,
        );
        add_assign(y.view_mut().slice_rows(rows), change.view());
        self.give([z, change]);
        BottleneckSaved { h, norm, u }
    }

    /// Goes back through the adapter layers of a sublayer, `dx` being the gradient of what [`join_stream`](Self::join_stream)
    /// made: it becomes the stream's. The sublayer's own output has that gradient too, or the one that is returned. Without
    /// `finish` only parameters get gradients.
    pub(super) fn join_stream_backward(
        &self,
        layer: usize,
        place: Sublayer,
        dx: &mut Tensor,
        saved: &[BottleneckSaved],
        finish: bool,
        grads: &mut Arena,
    ) -> Option<Tensor> {
        let all = self.bottlenecks_at(layer, place);
        let (on_stream, inside): (Vec<_>, Vec<_>) =
            all.iter().partition(|at| at.site.norm.is_some());
        let mut dy = None;
        let (of_inside, of_stream) = saved.split_at(inside.len());
        for (at, saved) in on_stream.into_iter().zip(of_stream) {
            let du = self.bottleneck_backward(at, dx, saved, grads);
            if let (Some((weight, bias)), Some(norm)) = (at.site.norm, &saved.norm) {
                // n = norm(h)
                let mut dn = self.take(du.rows(), dx.cols());
                linear_backward_input(
                    dn.view_mut(),
                    du.view(),
                    at.weight(at.site.down.0),
                    false,
                    self.compute_dtype,
                );
                let h = self.widened(&saved.h);
                let (dw, db) = grads.pair_mut(weight, bias);
                layer_norm_backward(
                    dx.view_mut().slice_rows(at.rows.clone()),
                    Some(dw),
                    Some(db),
                    dn.view(),
                    h.view(),
                    mean(norm),
                    norm.rstd.view(),
                    at.value(weight),
                    true,
                );
                self.give_widened(h);
                self.ws.give(dn);
            }
            self.ws.give(du);
        }
        for (at, saved) in inside.into_iter().zip(of_inside) {
            let du = self.bottleneck_backward(at, dx, saved, grads);
            if finish {
                let dy = dy.get_or_insert_with(|| {
                    let mut dy = self.take(dx.rows(), dx.cols());
                    dy.view_mut().copy_from(dx.view());
                    dy
                });
                let rows = dy.view_mut().slice_rows(at.rows.clone());
                linear_backward_input(
                    rows,
                    du.view(),
                    at.weight(at.site.down.0),
                    true,
                    self.compute_dtype,
                );
            }
            self.ws.give(du);
        }
        dy
    }

    /// Through U, the nonlinearity and D's parameters: the gradient of what D gives.
    fn bottleneck_backward(
        &self,
        at: &BottleneckAt,
        dx: &Tensor,
        saved: &BottleneckSaved,
        grads: &mut Arena,
    ) -> Tensor {
        let (rows, c) = (at.rows.clone(), dx.cols());
        let ((down, b), (up, bias)) = (at.site.down, at.site.up);
        let dy = dx.view().slice_rows(rows.clone());
        let r = saved.u.cols();
        // y += U·z + c
        let z = self.activated(&saved.u, at.site);
        linear_backward_weight(
            grads.view_mut(up),
            dy,
            z.view(),
            Layout::OutIn,
            self.compute_dtype,
        );
        bias_backward(grads.view_mut(bias), dy);
        let mut dz = z;
        linear_backward_input(dz.view_mut(), dy, at.weight(up), false, self.compute_dtype);
        // z = act(u)
        let mut du = self.take(rows.len(), r);
        activation_backward(du.view_mut(), dz.view(), saved.u.view(), at.site.activation);
        self.ws.give(dz);
        // u = D·n + b, n = norm(h)
        let h = self.widened(&saved.h);
        let normed = saved.norm.as_ref().zip(at.site.norm);
        let normed = normed.map(|(norm, (weight, bias))| {
            let mut n = self.take(rows.len(), c);
            layer_norm_apply(
                n.view_mut(),
                h.view(),
                mean(norm),
                norm.rstd.view(),
                at.value(weight),
                Some(at.value(bias)),
            );
            n
        });
        let n = normed.as_ref().unwrap_or(&h).view();
        linear_backward_weight(
            grads.view_mut(down),
            du.view(),
            n,
            Layout::OutIn,
            self.compute_dtype,
        );
        bias_backward(grads.view_mut(b), du.view());
        self.give(normed);
        self.give_widened(h);
        du
    }

    fn activated(&self, u: &Tensor, site: &BottleneckSite) -> Tensor {
        let mut z = self.take(u.rows(), u.cols());
        activation_forward(z.view_mut(), u.view(), site.activation);
        z
    }

    /// What is kept until the backward.
    pub(super) fn keep_bottlenecks(
        &self,
        saved: Vec<BottleneckSaved>,
        dtype: DType,
    ) -> Vec<BottleneckSaved> {
        let saved = saved.into_iter();
        let saved = saved.map(|one| BottleneckSaved {
            h: self.keep(one.h, dtype),
            ..one
        });
        saved.collect()
    }

    pub(super) fn give_bottlenecks(&self, saved: Vec<BottleneckSaved>) {
        for BottleneckSaved { h, norm, u } in saved {
            self.give([h, u]);
            if let Some(norm) = norm {
                self.give_norm(norm);
            }
        }
    }

    fn bottlenecks_at(&self, layer: usize, place: Sublayer) -> Vec<BottleneckAt<'_>> {
        let ranges = self.rows_of_adapters.iter();
        ranges
            .filter_map(|(rows, index)| {
                let adapter = self.adapters.get(*index);
                adapter
                    .bottleneck
                    .get(&(layer, place))
                    .map(|site| BottleneckAt {
                        rows: rows.clone(),
                        site,
                        adapter,
                    })
            })
            .collect()
    }
}

/// A layer norm always saves its mean.
fn mean(saved: &NormSaved) -> View<'_> {
    saved.mean.as_ref().unwrap_or(&saved.rstd).view()
}
