//! Factors of a linear's columns, each for its adapter's rows.
//!
//! ```text
//! y[rows] = ((x[rows] ⊙ l_in) Wᵀ + b, and the branches) ⊙ l_out
//! ```
//! Such a linear is computed by itself. Gradients of the factors accumulate.

use std::ops::Range;

use lowrank_kernels::{
    Arena, Tensor, View, ViewMut, add_assign, scale_columns, scale_columns_backward,
};

use super::adapter::Adapter;
use super::config::LinearId;
use super::linear::{LinearBack, LinearSaved};
use super::pass::Pass;

/// Factors of an adapter at a linear.
struct ScaleAt<'a> {
    rows: Range<usize>,
    slot: usize,
    adapter: &'a Adapter,
}

impl<'a> ScaleAt<'a> {
    fn factors(&self) -> View<'a> {
        self.adapter.params.view(self.slot)
    }
}

/// Which side of a linear factors belong to.
#[derive(Clone, Copy)]
enum Side {
    Input,
    Output,
}

impl Pass<'_> {
    /// Whether any adapter of the pass has factors at one of these linears.
    pub(super) fn are_scaled(&self, ids: &[LinearId]) -> bool {
        let mut adapters = self.rows_of_adapters.iter();
        adapters.any(|(_, index)| {
            let scaled = &self.adapters.get(*index).scaled;
            !scaled.is_empty() && ids.iter().any(|id| scaled.contains_key(id))
        })
    }

    fn scales_at(&self, id: LinearId, side: Side) -> Vec<ScaleAt<'_>> {
        let ranges = self.rows_of_adapters.iter();
        ranges
            .filter_map(|(rows, index)| {
                let adapter = self.adapters.get(*index);
                let site = adapter.scaled.get(&id)?;
                let slot = match side {
                    Side::Input => site.input,
                    Side::Output => site.output,
                }?;
                Some(ScaleAt {
                    rows: rows.clone(),
                    slot,
                    adapter,
                })
            })
            .collect()
    }

    /// A matrix whose rows are multiplied with their factors.
    fn scaled<'t>(&self, scales: &[ScaleAt], x: View<'t>) -> Scaled<'t> {
        if scales.is_empty() {
            return Scaled::Same(x);
        }
        let mut copy = self.take(x.rows(), x.cols());
        copy.view_mut().copy_from(x);
        scale_rows(&mut copy, scales);
        Scaled::Copy(copy)
    }

    fn give_scaled(&self, scaled: Scaled) {
        if let Scaled::Copy(copy) = scaled {
            self.give([copy]);
        }
    }

    /// Output [T, out] of a linear with factors, and what its backward needs.
    pub(super) fn scaled_linear(&self, id: LinearId, x: View) -> (Tensor, LinearSaved) {
        let x = self.scaled(&self.scales_at(id, Side::Input), x);
        let [(mut y, mut saved)] = self.plain_linears([id], x.view());
        self.give_scaled(x);
        let scales = self.scales_at(id, Side::Output);
        for at in &scales {
            let mut unscaled = self.take(at.rows.len(), y.cols());
            let rows = y.view().slice_rows(at.rows.clone());
            unscaled.view_mut().copy_from(rows);
            saved.unscaled.push(unscaled);
        }
        scale_rows(&mut y, &scales);
        (y, saved)
    }

    /// [`linears_backward`](Pass::linears_backward) of linears of which some have factors.
    pub(super) fn scaled_linears_backward(
        &self,
        linears: &[LinearBack],
        x: Option<View>,
        mut dx: Option<ViewMut>,
        grads: &mut Arena,
    ) {
        if let Some(dx) = dx.as_mut() {
            dx.reborrow().fill(0.0);
        }
        for linear in linears {
            let outputs = self.scales_at(linear.id, Side::Output);
            for (at, unscaled) in outputs.iter().zip(&linear.saved.unscaled) {
                // y = l ⊙ u, so dl += Σ dy ⊙ u
                let dy = linear.dy.slice_rows(at.rows.clone());
                scale_columns_backward(grads.view_mut(at.slot), dy, unscaled.view());
            }
            // du = l ⊙ dy
            let dy = self.scaled(&outputs, linear.dy);
            let inputs = self.scales_at(linear.id, Side::Input);
            let read = x.map(|x| self.scaled(&inputs, x));
            let needed = dx.is_some() || !inputs.is_empty();
            let (width, _) = self.config().linear_shape(linear.id.kind);
            let mut d_read = needed.then(|| self.take(linear.dy.rows(), width));
            let back = LinearBack {
                y: None,
                dy: dy.view(),
                ..*linear
            };
            self.plain_linears_backward(
                &[back],
                read.as_ref().map(Scaled::view),
                d_read.as_mut().map(Tensor::view_mut),
                grads,
            );
            if let (Some(d_read), Some(x)) = (&d_read, x) {
                for at in &inputs {
                    // r = l ⊙ x, so dl += Σ dr ⊙ x
                    let dr = d_read.view().slice_rows(at.rows.clone());
                    let x = x.slice_rows(at.rows.clone());
                    scale_columns_backward(grads.view_mut(at.slot), dr, x);
                }
            }
            if let (Some(d_read), Some(dx)) = (d_read.as_mut(), dx.as_mut()) {
                // dx += l ⊙ dr
                scale_rows(d_read, &inputs);
                add_assign(dx.reborrow(), d_read.view());
            }
            self.give(d_read);
            self.give_scaled(dy);
            if let Some(read) = read {
                self.give_scaled(read);
            }
        }
    }
}

/// A matrix, or a copy of it that was multiplied with factors.
enum Scaled<'t> {
    Same(View<'t>),
    Copy(Tensor),
}

impl Scaled<'_> {
    fn view(&self) -> View<'_> {
        match self {
            Self::Same(view) => *view,
            Self::Copy(tensor) => tensor.view(),
        }
    }
}

fn scale_rows(x: &mut Tensor, scales: &[ScaleAt]) {
    for at in scales {
        scale_columns(x.view_mut().slice_rows(at.rows.clone()), at.factors());
    }
}
