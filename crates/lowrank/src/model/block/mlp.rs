//! The second half of a block, over the rows that go on behind attention:
//!
//! ```text
//! x_mid = x + out(o·Wᵀ)
//! n     = norm(x_mid)
//! x_out = x_mid + out(down(act(gate(n), up(n))))       where norms stand before the sublayers, or behind their outputs
//! x_out = norm(n + down(act(gate(n), up(n))))          where they stand behind the sums
//! ```
//! The norm between the two sublayers is the MLP's in the first case, and attention's in the second; there may be none. `out` is the
//! norm of a sublayer's output, where there is one, and a factor.

use std::borrow::Cow;

use lowrank_kernels::{
    Arena, Tensor, View, activation_backward, activation_forward, add_assign, copy_cols,
    gated_backward, gated_forward, scale,
};

use crate::model::adapter::Reach;
use crate::model::bottleneck::BottleneckSaved;
use crate::model::config::{
    BlockNorm, LinearId, LinearKind, MlpKind, NormPlacement, Part, Sublayer, WeightId,
};
use crate::model::linear::{LinearBack, LinearSaved};
use crate::model::pass::{NormSaved, Pass};

/// The second half of a block, of a pass over the rows that go on.
pub(crate) struct MlpHalf<'a> {
    pub(super) pass: Pass<'a>,
    pub(super) layer: usize,
}

/// The values of its forward. Matrices may be kept as bf16.
pub(crate) struct MlpValues {
    /// Attention's output [rows, H·D], where the output projection's trained values read it.
    pub(super) o: Option<Tensor>,
    /// The residual stream between attention and MLP, before the norm that stands there.
    pub(super) x_mid: Tensor,
    pub(super) norm: Option<NormSaved>,
    /// What the norms of the sublayers' outputs read and saved, where there are such norms.
    pub(super) attention_output: Option<(Tensor, NormSaved)>,
    pub(super) mlp_output: Option<(Tensor, NormSaved)>,
    /// The sum behind the MLP and what its norm saved, where norms stand behind the sums.
    pub(super) last_sum: Option<(Tensor, NormSaved)>,
    /// Outputs of the MLP's first linears, unless they are computed again.
    pub(super) inputs: Option<MlpInputs>,
    /// Of the adapter layers behind attention and MLP.
    pub(super) attention_bottlenecks: Vec<BottleneckSaved>,
    pub(super) mlp_bottlenecks: Vec<BottleneckSaved>,
    /// Of the output projection, of gate and up, and of the last linear once it was computed.
    pub(super) output_linear: LinearSaved,
    pub(super) input_linears: Vec<LinearSaved>,
    pub(super) last_linear: LinearSaved,
}

/// The MLP before its activation.
pub(super) struct MlpInputs {
    pub(super) gate: Option<Tensor>,
    pub(super) up: Tensor,
}

impl MlpInputs {
    /// What a linear put out, where that is one of them.
    fn output_of(&self, kind: LinearKind) -> Option<View<'_>> {
        match kind {
            LinearKind::Gate => self.gate.as_ref().map(Tensor::view),
            LinearKind::Up => Some(self.up.view()),
            _ => None,
        }
    }
}

impl MlpHalf<'_> {
    /// Everything before the last linear, from the residual stream [rows, C] and attention's output [rows, H·D].
    pub(super) fn forward(&self, stream: Cow<Tensor>, o: Tensor) -> MlpValues {
        let pass = &self.pass;
        let id = self.linear_id(LinearKind::O);
        let (output, output_linear) = pass.linear(id, o.view());
        let (mut x_mid, attention_output) = self.finish_output(BlockNorm::AttentionOutput, output);
        let attention_bottlenecks =
            pass.join_stream(self.layer, Sublayer::Attention, &mut x_mid, stream.view());
        pass.give_widened(stream);
        let o = if pass.reads_input(id) {
            Some(o)
        } else {
            pass.give([o]);
            None
        };

        pass.pauses.pause();
        let readers = self.readers_of_norm();
        let normed = self
            .norm()
            .map(|id| pass.norm_for(&readers, id, x_mid.view()));
        let (normed, norm) = normed.unzip();
        let (inputs, input_linears) = self.inputs(normed.as_ref().unwrap_or(&x_mid).view());
        pass.give(normed);
        MlpValues {
            o,
            x_mid,
            norm,
            attention_output,
            mlp_output: None,
            last_sum: None,
            inputs: Some(inputs),
            attention_bottlenecks,
            mlp_bottlenecks: Vec::new(),
            output_linear,
            input_linears,
            last_linear: LinearSaved::default(),
        }
    }

    /// The block's output from its values, to which those of the last linear and of what stands behind it are added.
    pub(super) fn output(&self, values: &mut MlpValues) -> Tensor {
        let Some(inputs) = &values.inputs else {
            unreachable!("values that were just computed are whole")
        };
        let pass = &self.pass;
        pass.pauses.pause();
        let h = self.activation(inputs);
        let (output, saved) = pass.linear(self.linear_id(LinearKind::Down), h.view());
        pass.give([h]);
        values.last_linear = saved;
        let (mut x_out, mlp_output) = self.finish_output(BlockNorm::MlpOutput, output);
        values.mlp_output = mlp_output;
        let x_mid = values.x_mid.view();
        if !self.norms_sums() {
            values.mlp_bottlenecks = pass.join_stream(self.layer, Sublayer::Mlp, &mut x_out, x_mid);
            return x_out;
        }
        let n = self.norm_again(x_mid, values);
        let stream = n.as_ref().map_or(x_mid, Tensor::view);
        values.mlp_bottlenecks = pass.join_stream(self.layer, Sublayer::Mlp, &mut x_out, stream);
        pass.give(n);
        let (normed, norm) = pass.norm(self.last_norm(), x_out.view());
        values.last_sum = Some((x_out, norm));
        normed
    }

    /// Whether a backward reads what [`output`](Self::output) saves.
    pub(super) fn reads_output(&self) -> bool {
        self.norms_sums()
            || self.pass.config().norm_placement.has_output()
            || self.pass.reads_input(self.linear_id(LinearKind::Down))
            || self.pass.has_bottleneck(self.layer, Sublayer::Mlp)
    }

    /// From the gradient of the output, which becomes that of the residual stream, to that of attention's output, if the backward
    /// goes on to there; gives all values back.
    pub(super) fn backward(
        &self,
        dx: &mut Tensor,
        saved: MlpValues,
        reach: Reach,
        grads: &mut Arena,
    ) -> Option<Tensor> {
        self.mlp_backward(dx, &saved, reach, grads);
        let d_o = (reach > Reach::Mlp)
            .then(|| self.projection_backward(dx, &saved, reach, grads))
            .flatten();
        saved.give(&self.pass);
        d_o
    }

    /// From the gradient of x_out to that of x_mid.
    fn mlp_backward(&self, dx: &mut Tensor, saved: &MlpValues, reach: Reach, grads: &mut Arena) {
        let pass = &self.pass;
        if let Some((sum, norm)) = &saved.last_sum {
            self.norm_of_sum_backward(self.last_norm(), dx, sum.view(), norm, grads);
        }
        let finish = reach > Reach::MlpBottleneck;
        let bottlenecks = &saved.mlp_bottlenecks;
        let d_out =
            pass.join_stream_backward(self.layer, Sublayer::Mlp, dx, bottlenecks, finish, grads);
        if !finish {
            return;
        }
        let d_out = self.output_backward(
            BlockNorm::MlpOutput,
            dx,
            d_out,
            saved.mlp_output.as_ref(),
            grads,
        );
        // A norm reads it as it is kept.
        let x_mid = match self.norm() {
            Some(_) => Cow::Borrowed(&saved.x_mid),
            None => pass.widened(&saved.x_mid),
        };
        let reads = self.input_ids().into_iter().any(|id| pass.reads_input(id));
        let mut normed = None;
        let again = saved.inputs.is_none().then(|| {
            normed = self.norm_again(x_mid.view(), saved);
            let n = normed.as_ref().map_or(x_mid.view(), Tensor::view);
            self.inputs(n)
        });
        let (mut again, linears_again) = again.unzip();
        if !reads {
            pass.give(normed.take());
        }
        let Some(inputs) = again.as_ref().or(saved.inputs.as_ref()) else {
            unreachable!("computed above where they were not saved")
        };
        let d_inputs =
            self.last_linear_backward(d_out.as_ref().unwrap_or(dx), inputs, saved, grads);
        let mut ids = self.input_ids().into_iter();
        let read = ids.any(|id| pass.magnitudes_read_output(id));
        if let Some(inputs) = again.take_if(|_| !read) {
            inputs.give(pass);
        }
        pass.give(d_out);
        pass.pauses.pause();

        if reads && normed.is_none() {
            normed = self.norm_again(x_mid.view(), saved);
        }
        let fused = (pass.config().mlp == MlpKind::GatedFused).then(|| self.fused(&d_inputs));
        let apart = d_inputs.gate.iter().chain([&d_inputs.up]);
        let dys = fused.iter().chain(apart);
        let linears = self.input_ids().into_iter().zip(dys);
        let inputs = again.as_ref().or(saved.inputs.as_ref());
        let linears: Vec<LinearBack> = linears
            .zip(linears_again.as_ref().unwrap_or(&saved.input_linears))
            .map(|((id, dy), saved)| LinearBack {
                id,
                dy: dy.view(),
                saved,
                y: inputs.and_then(|inputs| inputs.output_of(id.kind)),
            })
            .collect();
        let mut dn = pass.take(dx.rows(), dx.cols());
        let n = reads.then(|| normed.as_ref().map_or(x_mid.view(), Tensor::view));
        pass.linears_backward(&linears, n, Some(dn.view_mut()), grads);
        drop(linears);
        if let Some(inputs) = again {
            inputs.give(pass);
        }
        pass.give_linears(linears_again.into_iter().flatten());
        match self.norm().zip(saved.norm.as_ref()) {
            Some((id, norm)) if self.norms_sums() => {
                add_assign(dx.view_mut(), dn.view());
                self.norm_of_sum_backward(id, dx, x_mid.view(), norm, grads);
            }
            Some((id, norm)) => {
                let (dx, x) = (dx.view_mut(), x_mid.view());
                pass.norm_backward(id, dx, dn.view(), x, norm, grads);
            }
            None => add_assign(dx.view_mut(), dn.view()),
        }
        pass.give_widened(x_mid);
        pass.give([dn]);
        pass.give(normed);
        pass.give(fused);
        d_inputs.give(pass);
    }

    /// Gate and up side by side, as their one linear has them.
    fn fused(&self, MlpInputs { gate, up }: &MlpInputs) -> Tensor {
        let width = up.cols();
        let mut both = self.pass.take(up.rows(), 2 * width);
        for (at, part) in gate.iter().chain([up]).enumerate() {
            copy_cols(both.view_mut(), at * width, part.view(), 0..width);
        }
        both
    }

    /// Through the last linear and the activation: the gradients of gate and up.
    fn last_linear_backward(
        &self,
        dy: &Tensor,
        inputs: &MlpInputs,
        saved: &MlpValues,
        grads: &mut Arena,
    ) -> MlpInputs {
        let pass = &self.pass;
        let id = self.linear_id(LinearKind::Down);
        let h = pass.reads_input(id).then(|| self.activation(inputs));
        let mut dh = pass.take(dy.rows(), inputs.up.cols());
        let back = LinearBack {
            id,
            dy: dy.view(),
            saved: &saved.last_linear,
            y: None,
        };
        let (x, dx) = (h.as_ref().map(Tensor::view), dh.view_mut());
        pass.linears_backward(&[back], x, Some(dx), grads);
        pass.give(h);
        let d_inputs = self.activation_backward(&dh, inputs);
        pass.give([dh]);
        d_inputs
    }

    /// The gradient of the attention's output, if the backward goes on to there.
    fn projection_backward(
        &self,
        dx: &mut Tensor,
        saved: &MlpValues,
        reach: Reach,
        grads: &mut Arena,
    ) -> Option<Tensor> {
        let pass = &self.pass;
        let (place, bottlenecks) = (Sublayer::Attention, &saved.attention_bottlenecks);
        let finish = reach > Reach::AttentionBottleneck;
        let d_out = pass.join_stream_backward(self.layer, place, dx, bottlenecks, finish, grads);
        if !finish {
            return None;
        }
        let d_out = self.output_backward(
            BlockNorm::AttentionOutput,
            dx,
            d_out,
            saved.attention_output.as_ref(),
            grads,
        );
        let mut d_o = (reach > Reach::Output).then(|| pass.take(dx.rows(), pass.config().q_size()));
        let back = LinearBack {
            id: self.linear_id(LinearKind::O),
            dy: d_out.as_ref().unwrap_or(dx).view(),
            saved: &saved.output_linear,
            y: None,
        };
        let o = saved.o.as_ref().map(|o| pass.widened(o));
        let (x, d_x) = (
            o.as_ref().map(|o| o.view()),
            d_o.as_mut().map(Tensor::view_mut),
        );
        pass.linears_backward(&[back], x, d_x, grads);
        if let Some(o) = o {
            pass.give_widened(o);
        }
        pass.give(d_out);
        d_o
    }

    /// Goes back through a norm that the residual stream itself goes through: `dx` becomes the gradient of its input.
    fn norm_of_sum_backward(
        &self,
        id: impl Fn(Part) -> WeightId,
        dx: &mut Tensor,
        sum: View,
        saved: &NormSaved,
        grads: &mut Arena,
    ) {
        let pass = &self.pass;
        let mut d_sum = pass.take(dx.rows(), dx.cols());
        d_sum.view_mut().fill(0.0);
        pass.norm_backward(id, d_sum.view_mut(), dx.view(), sum, saved, grads);
        pass.give([std::mem::replace(dx, d_sum)]);
    }

    /// Whether norms stand behind the sums.
    fn norms_sums(&self) -> bool {
        self.pass.config().norm_placement == NormPlacement::Sum
    }

    /// What is added to the residual stream, from a sublayer's output, and what the norm between them read and saved.
    fn finish_output(
        &self,
        norm: BlockNorm,
        output: Tensor,
    ) -> (Tensor, Option<(Tensor, NormSaved)>) {
        let (pass, config) = (&self.pass, self.pass.config());
        let (mut added, saved) = if config.norm_placement.has_output() {
            let (normed, saved) = pass.norm(self.norm_id(norm), output.view());
            (normed, Some((output, saved)))
        } else {
            (output, None)
        };
        if config.residual_scale != 1.0 {
            scale(added.view_mut(), config.residual_scale);
        }
        (added, saved)
    }

    /// Back from the gradient of what is added to the residual stream to that of the sublayer's output. Either is `dx` where there
    /// is none.
    fn output_backward(
        &self,
        norm: BlockNorm,
        dx: &Tensor,
        mut d_out: Option<Tensor>,
        saved: Option<&(Tensor, NormSaved)>,
        grads: &mut Arena,
    ) -> Option<Tensor> {
        let pass = &self.pass;
        let factor = pass.config().residual_scale;
        if factor != 1.0 {
            let d_out = d_out.get_or_insert_with(|| {
                let mut copy = pass.take(dx.rows(), dx.cols());
                copy.view_mut().copy_from(dx.view());
                copy
            });
            scale(d_out.view_mut(), factor);
        }
        let Some((output, statistics)) = saved else {
            return d_out;
        };
        let mut d_output = pass.take(dx.rows(), dx.cols());
        d_output.view_mut().fill(0.0);
        pass.norm_backward(
            self.norm_id(norm),
            d_output.view_mut(),
            d_out.as_ref().unwrap_or(dx).view(),
            output.view(),
            statistics,
            grads,
        );
        pass.give(d_out);
        Some(d_output)
    }

    /// What the norm between the sublayers gives, again, where there is one.
    fn norm_again(&self, x_mid: View, values: &MlpValues) -> Option<Tensor> {
        let (id, saved) = self.norm().zip(values.norm.as_ref())?;
        Some(
            self.pass
                .norm_again(&self.readers_of_norm(), id, x_mid, saved),
        )
    }

    /// The linears that read what the norm between the sublayers gives, where nothing else does.
    fn readers_of_norm(&self) -> Vec<LinearId> {
        if self.norms_sums() {
            return Vec::new();
        }
        self.input_ids()
    }

    /// The norm between the two sublayers.
    fn norm(&self) -> Option<impl Fn(Part) -> WeightId + use<>> {
        let norm = match self.pass.config().norm_placement {
            NormPlacement::Sum => BlockNorm::Attention,
            NormPlacement::Input | NormPlacement::InputAndOutput => BlockNorm::Mlp,
            NormPlacement::Output => return None,
        };
        Some(self.norm_id(norm))
    }

    /// The norm behind the sum of the MLP.
    fn last_norm(&self) -> impl Fn(Part) -> WeightId + use<> {
        self.norm_id(BlockNorm::Mlp)
    }

    fn norm_id(&self, norm: BlockNorm) -> impl Fn(Part) -> WeightId + use<> {
        let layer = self.layer;
        move |part| WeightId::Norm(layer, norm, part)
    }

    fn linear_id(&self, kind: LinearKind) -> LinearId {
        LinearId {
            layer: self.layer,
            kind,
        }
    }

    /// The linears that read the normed rows.
    fn input_ids(&self) -> Vec<LinearId> {
        let kinds: &[LinearKind] = match self.pass.config().mlp {
            MlpKind::Gated => &[LinearKind::Gate, LinearKind::Up],
            MlpKind::GatedFused => &[LinearKind::GateUp],
            MlpKind::Plain => &[LinearKind::Up],
        };
        kinds.iter().map(|&kind| self.linear_id(kind)).collect()
    }

    /// Gate and up of the normed rows, and what their linears save.
    fn inputs(&self, normed: View) -> (MlpInputs, Vec<LinearSaved>) {
        let (pass, up) = (&self.pass, self.linear_id(LinearKind::Up));
        match pass.config().mlp {
            MlpKind::Gated => {
                let gate = self.linear_id(LinearKind::Gate);
                let [(gate, of_gate), (up, of_up)] = pass.linears([gate, up], normed);
                let gate = Some(gate);
                (MlpInputs { gate, up }, vec![of_gate, of_up])
            }
            MlpKind::GatedFused => {
                let (both, saved) = pass.linear(self.linear_id(LinearKind::GateUp), normed);
                let width = pass.config().intermediate_size;
                let [gate, up] = [0..width, width..2 * width].map(|columns| {
                    let mut part = pass.take(normed.rows(), width);
                    copy_cols(part.view_mut(), 0, both.view(), columns);
                    part
                });
                pass.give([both]);
                let gate = Some(gate);
                (MlpInputs { gate, up }, vec![saved])
            }
            MlpKind::Plain => {
                let (up, saved) = pass.linear(up, normed);
                (MlpInputs { gate: None, up }, vec![saved])
            }
        }
    }

    /// What the last linear reads.
    fn activation(&self, MlpInputs { gate, up }: &MlpInputs) -> Tensor {
        let activation = self.pass.config().activation;
        let readers = [self.linear_id(LinearKind::Down)];
        let mut h = self.pass.take_for(&readers, up.rows(), up.cols());
        match gate {
            Some(gate) => gated_forward(&mut h, gate.view(), up.view(), activation),
            None => activation_forward(&mut h, up.view(), activation),
        }
        h
    }

    /// The gradients of gate and up from that of what the last linear reads.
    fn activation_backward(&self, dh: &Tensor, MlpInputs { gate, up }: &MlpInputs) -> MlpInputs {
        let pass = &self.pass;
        let activation = pass.config().activation;
        // One linear of both reads a copy.
        let readers = if pass.config().mlp == MlpKind::GatedFused {
            Vec::new()
        } else {
            self.input_ids()
        };
        let take = || pass.take_for(&readers, dh.rows(), dh.cols());
        let mut d_up = take();
        let d_gate = gate.as_ref().map(|gate| {
            let mut d_gate = take();
            let (gate, up) = (gate.view(), up.view());
            gated_backward(&mut d_gate, &mut d_up, dh.view(), gate, up, activation);
            d_gate
        });
        if d_gate.is_none() {
            activation_backward(&mut d_up, dh.view(), up.view(), activation);
        }
        MlpInputs {
            gate: d_gate,
            up: d_up,
        }
    }
}
