//! The block: every family is this one, with its choices read from [`ModelConfig`](super::ModelConfig).
//!
//! ```text
//! x_mid = x     + o(attention(rope(q), rope(k), v)),   q, k, v of norm(x)
//! x_out = x_mid + mlp(norm(x_mid))
//! ```
//! Adapter layers stand where the residual stream is added (`bottleneck`).
//! The forward saves what the backward needs and nothing that it can cheaply compute again: the norms' outputs and the
//! MLP's hidden activation are recomputed, and more where [`Recompute`] says so.
//!
//! In the last block only some rows are wanted: those that are scored. Behind its attention the block then goes on with
//! these alone.

use std::borrow::Cow;

use lowrank_kernels::{
    ActivationDType, Arena, AttentionShape, RopeTable, Tensor, View, ViewMut, activation_backward,
    activation_forward, attention_backward, attention_forward, copy_cols, embedding_backward,
    embedding_forward, gated_backward, gated_forward, rope_backward, rope_forward,
};

use super::bottleneck::BottleneckSaved;
use super::config::{BlockNorm, LinearId, LinearKind, MlpKind, Part, WeightId};
use super::decoder::{Keep, KvCache};
use super::linear::LinearBack;
use super::pass::{NormSaved, Pass};
use super::saving::Recompute;
use crate::tuning::{Reach, Sublayer};

/// What one block saves for its backward.
pub(crate) enum BlockSaved {
    /// Everything that is not cheap.
    Values(Box<Values>),
    /// The input [T, C] alone, in f32.
    Input(Tensor),
}

/// The values of a block's forward. Matrices may be kept as bf16.
pub(crate) struct Values {
    x: Tensor,
    attention_norm: NormSaved,
    heads: HeadsSaved,
    /// Attention's output, where the gradients of trained values read it; attention's own backward does without.
    o: Option<Tensor>,
    lse: Tensor,
    x_mid: Tensor,
    mlp_norm: NormSaved,
    /// Outputs of the MLP's first linears, unless they are computed again.
    mlp: Option<MlpSaved>,
    /// Of the adapter layers behind attention and MLP.
    attention_bottlenecks: Vec<BottleneckSaved>,
    mlp_bottlenecks: Vec<BottleneckSaved>,
    /// `x Aᵀ` of the branches at each linear, in [`ModelConfig::linear_kinds`](super::ModelConfig::linear_kinds)' order.
    branches: Vec<Vec<Tensor>>,
}

/// The MLP before its activation.
struct MlpSaved {
    gate: Option<Tensor>,
    up: Tensor,
}

/// q and k as attention reads them, v, and what the head norms read.
struct HeadsSaved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw: Option<RawHeads>,
}

struct RawHeads {
    q: Tensor,
    q_rstd: Tensor,
    k: Tensor,
    k_rstd: Tensor,
}

/// The index of a block, the rotary table, and the rows that are wanted of its output.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) layer: usize,
    pub(crate) rope: Option<&'a RopeTable>,
    /// Ascending; `None`: all.
    pub(crate) wanted: Option<Wanted<'a>>,
}

/// Some of the rows.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) rows: &'a [u32],
    /// Which adapter a range of them uses.
    pub(crate) adapters: &'a [(std::ops::Range<usize>, usize)],
}

impl Place<'_> {
    fn linear(self, kind: LinearKind) -> LinearId {
        LinearId {
            layer: self.layer,
            kind,
        }
    }

    fn norm(self, norm: BlockNorm) -> impl Fn(Part) -> WeightId {
        move |part| WeightId::Norm(self.layer, norm, part)
    }
}

impl Pass<'_> {
    fn attention_shape(&self) -> AttentionShape {
        let config = self.config();
        AttentionShape {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_size: config.head_size,
            scale: 1.0 / (config.head_size as f32).sqrt(),
            window: config.sliding_window,
        }
    }

    /// The output [T, C] of a block, or its wanted rows; consumes x.
    pub(crate) fn block(&self, place: Place, x: Tensor, keep: &mut Keep) -> Tensor {
        let mut values = match keep {
            Keep::Cache(cache) => self.block_values(place, x, Some(cache)),
            _ => self.block_values(place, x, None),
        };
        let x_out = self.block_output(place, &mut values);
        match keep {
            Keep::Saved {
                blocks,
                from,
                saving,
            } if place.layer >= *from => {
                blocks.push(self.save(values, saving.recompute, saving.dtype));
            }
            _ => self.give_values(values),
        }
        x_out
    }

    /// What a block computes before its last linear.
    fn block_values(&self, place: Place, x: Tensor, cache: Option<&mut KvCache>) -> Values {
        let tokens = x.rows();
        let config = self.config();
        let mut branches = Vec::new();
        let (normed, attention_norm) = self.norm(place.norm(BlockNorm::Attention), x.view());
        let heads = self.heads(place, normed.view(), &mut branches);
        self.ws.give(normed);

        let mut o = self.take(tokens, config.q_size());
        let mut lse = self.take(tokens, config.num_attention_heads);
        let (k, v) = if let Some(cache) = cache {
            let (k, v) = (heads.k.view(), heads.v.view());
            cache.append(place.layer, k, v, &self.batch.appends);
            cache.layer(place.layer)
        } else {
            (heads.k.view(), heads.v.view())
        };
        attention_forward(
            o.view_mut(),
            lse.view_mut(),
            heads.q.view(),
            k,
            v,
            &self.batch.segments,
            &self.attention_shape(),
            self.classes,
            self.ws,
        );

        let pass = behind_attention(self, place);
        let (x_rows, o_rows) = (pass.wanted(place, &x), pass.wanted(place, &o));
        let (mut x_mid, b) = pass.linear(place.linear(LinearKind::O), o_rows.view());
        branches.push(b);
        let attention_bottlenecks =
            pass.join_stream(place.layer, Sublayer::Attention, &mut x_mid, x_rows.view());
        self.give_widened(x_rows);
        self.give_widened(o_rows);
        let o = if pass.reads_input(place.linear(LinearKind::O)) {
            Some(o)
        } else {
            self.ws.give(o);
            None
        };

        let (normed, mlp_norm) = pass.norm(place.norm(BlockNorm::Mlp), x_mid.view());
        let (mlp, b) = pass.mlp_inputs(place, normed.view());
        branches.extend(b);
        self.ws.give(normed);
        Values {
            x,
            attention_norm,
            heads,
            o,
            lse,
            x_mid,
            mlp_norm,
            mlp: Some(mlp),
            attention_bottlenecks,
            mlp_bottlenecks: Vec::new(),
            branches,
        }
    }

    /// The block's output from its values, to which those of the last linear and of what stands behind it are added.
    fn block_output(&self, place: Place, values: &mut Values) -> Tensor {
        let Some(mlp) = &values.mlp else {
            unreachable!("values that were just computed are whole")
        };
        let pass = behind_attention(self, place);
        let h = pass.mlp_activation(mlp);
        let (mut x_out, branches) = pass.linear(place.linear(LinearKind::Down), h.view());
        self.ws.give(h);
        values.branches.push(branches);
        values.mlp_bottlenecks =
            pass.join_stream(place.layer, Sublayer::Mlp, &mut x_out, values.x_mid.view());
        x_out
    }

    /// Rows of a matrix that the block goes on with behind its attention.
    fn wanted<'t>(&self, place: Place, x: &'t Tensor) -> Cow<'t, Tensor> {
        let Some(Wanted { rows, .. }) = place.wanted else {
            return Cow::Borrowed(x);
        };
        let mut gathered = self.take(rows.len(), x.cols());
        embedding_forward(gathered.view_mut(), rows, x.view(), false);
        Cow::Owned(gathered)
    }

    /// The gradient of all rows from that of the wanted ones.
    fn spread(&self, place: Place, dx: Tensor) -> Tensor {
        let Some(Wanted { rows, .. }) = place.wanted else {
            return dx;
        };
        let mut all = self.take(self.batch.tokens(), dx.cols());
        all.view_mut().fill(0.0);
        embedding_backward(all.view_mut(), rows, dx.view());
        self.ws.give(dx);
        all
    }

    /// What is kept of a block's values until its backward.
    fn save(&self, values: Values, recompute: Recompute, dtype: ActivationDType) -> BlockSaved {
        if recompute == Recompute::Full {
            return BlockSaved::Input(self.give_all_but_input(values));
        }
        let keep = |tensor| self.keep(tensor, dtype);
        let Values {
            x,
            attention_norm,
            heads,
            o,
            lse,
            x_mid,
            mlp_norm,
            mlp,
            attention_bottlenecks,
            mlp_bottlenecks,
            branches,
        } = values;
        let mlp = mlp.and_then(|MlpSaved { gate, up }| {
            if recompute == Recompute::Selective {
                self.give(gate);
                self.ws.give(up);
                return None;
            }
            Some(MlpSaved {
                gate: gate.map(keep),
                up: keep(up),
            })
        });
        let raw = heads.raw.map(|raw| RawHeads {
            q: keep(raw.q),
            k: keep(raw.k),
            ..raw
        });
        BlockSaved::Values(Box::new(Values {
            x: keep(x),
            attention_norm,
            heads: HeadsSaved {
                // The gradients of scores are small differences of large numbers: rounding what they are computed from
                // again costs several times as much precision as rounding everything else.
                q: heads.q,
                k: heads.k,
                v: heads.v,
                raw,
            },
            o: o.map(keep),
            lse,
            // What the MLP is computed from again.
            x_mid: if recompute == Recompute::Selective {
                x_mid
            } else {
                keep(x_mid)
            },
            mlp_norm,
            mlp,
            attention_bottlenecks: self.keep_bottlenecks(attention_bottlenecks, dtype),
            mlp_bottlenecks: self.keep_bottlenecks(mlp_bottlenecks, dtype),
            branches,
        }))
    }

    /// Gate and up of the normalised rows, and their branches'.
    fn mlp_inputs(&self, place: Place, normed: View) -> (MlpSaved, Vec<Vec<Tensor>>) {
        let up = place.linear(LinearKind::Up);
        if self.config().mlp == MlpKind::Gated {
            let gate = place.linear(LinearKind::Gate);
            let [(gate, of_gate), (up, of_up)] = self.linears([gate, up], normed);
            let gate = Some(gate);
            (MlpSaved { gate, up }, vec![of_gate, of_up])
        } else {
            let (up, branches) = self.linear(up, normed);
            (MlpSaved { gate: None, up }, vec![branches])
        }
    }

    /// q, k and v of the normalised rows, as attention reads them.
    fn heads(&self, place: Place, normed: View, branches: &mut Vec<Vec<Tensor>>) -> HeadsSaved {
        let config = self.config();
        let (q, k, v) = if config.fused_qkv {
            let (qkv, b) = self.linear(place.linear(LinearKind::Qkv), normed);
            branches.push(b);
            let parts = [LinearKind::Q, LinearKind::K, LinearKind::V].map(|kind| {
                let columns = config.fused_columns(kind);
                let mut part = self.take(normed.rows(), columns.len());
                copy_cols(part.view_mut(), 0, qkv.view(), columns);
                part
            });
            self.ws.give(qkv);
            parts.into()
        } else {
            let ids = [LinearKind::Q, LinearKind::K, LinearKind::V].map(|kind| place.linear(kind));
            self.linears(ids, normed)
                .map(|(y, b)| {
                    branches.push(b);
                    y
                })
                .into()
        };
        let (mut q, mut k, raw) = if config.qk_norm {
            let (q_normed, q_rstd) = self.head_norm(
                WeightId::Norm(place.layer, BlockNorm::Q, Part::Weight),
                q.view(),
            );
            let (k_normed, k_rstd) = self.head_norm(
                WeightId::Norm(place.layer, BlockNorm::K, Part::Weight),
                k.view(),
            );
            (
                q_normed,
                k_normed,
                Some(RawHeads {
                    q,
                    q_rstd,
                    k,
                    k_rstd,
                }),
            )
        } else {
            (q, k, None)
        };
        if let Some(table) = place.rope {
            rope_forward(q.view_mut(), &self.batch.positions, table, config.head_size);
            rope_forward(k.view_mut(), &self.batch.positions, table, config.head_size);
        }
        let (k, v) = self.with_trained_keys(place.layer, k, v);
        HeadsSaved { q, k, v, raw }
    }

    fn mlp_activation(&self, mlp: &MlpSaved) -> Tensor {
        let (up, activation) = (&mlp.up, self.config().activation);
        let mut h = self.take(up.rows(), up.cols());
        match &mlp.gate {
            Some(gate) => gated_forward(h.view_mut(), gate.view(), up.view(), activation),
            None => activation_forward(h.view_mut(), up.view(), activation),
        }
        h
    }

    /// dx of the block's input from the gradient of its output; consumes what was saved. A `reach` short of the input says
    /// that the block is the lowest that trains anything, and how far back that is; the result is then not finished.
    pub(crate) fn block_backward(
        &self,
        place: Place,
        mut dx: Tensor,
        saved: BlockSaved,
        reach: Reach,
        grads: &mut Arena,
    ) -> Tensor {
        let values = match saved {
            BlockSaved::Values(values) => *values,
            BlockSaved::Input(x) => {
                let mut values = self.block_values(place, x, None);
                if self.reads_input(place.linear(LinearKind::Down))
                    || self.has_bottleneck(place.layer, Sublayer::Mlp)
                {
                    // Its branches' inner rows are read, or its output is.
                    let x_out = self.block_output(place, &mut values);
                    self.ws.give(x_out);
                }
                values
            }
        };
        let pass = behind_attention(self, place);
        pass.mlp_backward(place, &mut dx, &values, reach, grads);
        let d_o = (reach > Reach::Mlp)
            .then(|| pass.output_backward(place, &mut dx, &values, reach, grads))
            .flatten();
        if let Some(d_o) = d_o {
            let d_o = self.spread(place, d_o);
            dx = self.spread(place, dx);
            self.attention_part_backward(place, &mut dx, d_o, &values, reach, grads);
        }
        self.give_values(values);
        dx
    }

    fn branches<'s>(&self, saved: &'s Values, kind: LinearKind) -> &'s [Tensor] {
        let index = self.config().linear_kinds().iter().position(|k| *k == kind);
        index
            .and_then(|i| saved.branches.get(i))
            .map_or(&[], Vec::as_slice)
    }

    /// A linear of the block on the way back.
    fn back<'s>(&self, id: LinearId, dy: &'s Tensor, saved: &'s Values) -> LinearBack<'s> {
        LinearBack {
            id,
            dy: dy.view(),
            branches: self.branches(saved, id.kind),
        }
    }

    /// x_out = x_mid + down(act(gate(n), up(n))), n = norm(x_mid)
    fn mlp_backward(
        &self,
        place: Place,
        dx: &mut Tensor,
        saved: &Values,
        reach: Reach,
        grads: &mut Arena,
    ) {
        let finish = reach > Reach::MlpBottleneck;
        let d_out = self.join_stream_backward(
            place.layer,
            Sublayer::Mlp,
            dx,
            &saved.mlp_bottlenecks,
            finish,
            grads,
        );
        if !finish {
            return;
        }
        let config = self.config();
        let (tokens, width) = (dx.rows(), config.intermediate_size);
        let norm = place.norm(BlockNorm::Mlp);
        let (up, gate) = (place.linear(LinearKind::Up), place.linear(LinearKind::Gate));
        let down = place.linear(LinearKind::Down);
        let x_mid = self.widened(&saved.x_mid);
        let gated = config.mlp == MlpKind::Gated;
        let reads = self.reads_input(up) || (gated && self.reads_input(gate));
        let mut normed = None;
        let again = saved.mlp.is_none().then(|| {
            let n = normed.insert(self.norm_again(&norm, x_mid.view(), &saved.mlp_norm));
            let (mlp, branches) = self.mlp_inputs(place, n.view());
            self.give(branches.into_iter().flatten());
            mlp
        });
        if !reads {
            self.give(normed.take());
        }
        let dmlp = match again.as_ref().or(saved.mlp.as_ref()) {
            Some(mlp) => {
                let h = self.reads_input(down).then(|| self.mlp_activation(mlp));
                let mut dh = self.take(tokens, width);
                self.linears_backward(
                    &[self.back(down, d_out.as_ref().unwrap_or(dx), saved)],
                    h.as_ref().map(Tensor::view),
                    Some(dh.view_mut()),
                    grads,
                );
                self.give(h);
                let dmlp = self.activation_backward(&dh, mlp);
                self.ws.give(dh);
                dmlp
            }
            None => unreachable!("computed above where it was not saved"),
        };
        if let Some(MlpSaved { gate, up }) = again {
            self.give(gate);
            self.ws.give(up);
        }

        if reads && normed.is_none() {
            normed = Some(self.norm_again(&norm, x_mid.view(), &saved.mlp_norm));
        }
        let mut linears = vec![self.back(up, &dmlp.up, saved)];
        if let Some(dgate) = &dmlp.gate {
            linears.insert(0, self.back(gate, dgate, saved));
        }
        let mut dn = self.take(tokens, config.hidden_size);
        let n = normed.as_ref().map(Tensor::view);
        self.linears_backward(&linears, n, Some(dn.view_mut()), grads);
        self.norm_backward(
            &norm,
            dx.view_mut(),
            dn.view(),
            x_mid.view(),
            &saved.mlp_norm,
            grads,
        );
        self.give_widened(x_mid);
        self.give([dmlp.up, dn]);
        self.give(d_out);
        self.give(dmlp.gate);
        self.give(normed);
    }

    /// The gradients of gate and up from that of the hidden activation.
    fn activation_backward(&self, dh: &Tensor, mlp: &MlpSaved) -> MlpSaved {
        let activation = self.config().activation;
        let mut dup = self.take(dh.rows(), dh.cols());
        let dgate = if let Some(gate) = &mlp.gate {
            let mut dgate = self.take(dh.rows(), dh.cols());
            gated_backward(
                dgate.view_mut(),
                dup.view_mut(),
                dh.view(),
                gate.view(),
                mlp.up.view(),
                activation,
            );
            Some(dgate)
        } else {
            activation_backward(dup.view_mut(), dh.view(), mlp.up.view(), activation);
            None
        };
        MlpSaved {
            gate: dgate,
            up: dup,
        }
    }

    /// The gradient of the attention's output, of the rows that are left behind it, if the backward goes on to there.
    fn output_backward(
        &self,
        place: Place,
        dx: &mut Tensor,
        saved: &Values,
        reach: Reach,
        grads: &mut Arena,
    ) -> Option<Tensor> {
        let finish = reach > Reach::AttentionBottleneck;
        let d_out = self.join_stream_backward(
            place.layer,
            Sublayer::Attention,
            dx,
            &saved.attention_bottlenecks,
            finish,
            grads,
        );
        if !finish {
            return None;
        }
        let id = place.linear(LinearKind::O);
        let mut d_o = (reach > Reach::Output).then(|| self.take(dx.rows(), self.config().q_size()));
        let d_o_out = d_o.as_mut().map(Tensor::view_mut);
        let linears = [self.back(id, d_out.as_ref().unwrap_or(dx), saved)];
        if let Some(o) = &saved.o {
            let o = self.widened(o);
            let o_rows = self.wanted(place, &o);
            self.linears_backward(&linears, Some(o_rows.view()), d_o_out, grads);
            self.give_widened(o_rows);
            self.give_widened(o);
        } else {
            self.linears_backward(&linears, None, d_o_out, grads);
        }
        self.give(d_out);
        d_o
    }

    /// x_mid = x + o(attention(q, k, v)), q, k, v of norm(x)
    fn attention_part_backward(
        &self,
        place: Place,
        dx: &mut Tensor,
        d_o: Tensor,
        saved: &Values,
        reach: Reach,
        grads: &mut Arena,
    ) {
        let config = self.config();
        let tokens = dx.rows();
        let heads = self.heads_backward(place, saved, d_o.view(), grads);
        self.ws.give(d_o);

        let norm = place.norm(BlockNorm::Attention);
        let kinds: &[LinearKind] = if config.fused_qkv {
            &[LinearKind::Qkv]
        } else {
            &[LinearKind::Q, LinearKind::K, LinearKind::V]
        };
        let reads = kinds
            .iter()
            .any(|&kind| self.reads_input(place.linear(kind)));
        let trains_norm =
            self.trained(norm(Part::Weight)).is_some() || self.trained(norm(Part::Bias)).is_some();
        let finish = reach == Reach::Input || trains_norm;
        let x = (reads || finish).then(|| self.widened(&saved.x));
        let normed = x
            .as_ref()
            .filter(|_| reads)
            .map(|x| self.norm_again(&norm, x.view(), &saved.attention_norm));
        let n = normed.as_ref().map(Tensor::view);
        let mut dn = finish.then(|| self.take(tokens, config.hidden_size));
        let dn_out = dn.as_mut().map(Tensor::view_mut);
        self.qkv_backward(place, &heads, n, saved, dn_out, grads);
        if let (Some(dn), Some(x)) = (&dn, &x) {
            self.norm_backward(
                &norm,
                dx.view_mut(),
                dn.view(),
                x.view(),
                &saved.attention_norm,
                grads,
            );
        }
        if let Some(x) = x {
            self.give_widened(x);
        }
        self.give(heads);
        self.give(dn);
        self.give(normed);
    }

    /// Gradients of q, k and v as the linears gave them, from that of the attention's output.
    fn heads_backward(
        &self,
        place: Place,
        saved: &Values,
        d_o: View,
        grads: &mut Arena,
    ) -> [Tensor; 3] {
        let config = self.config();
        let tokens = d_o.rows();
        let HeadsSaved { q, k, v, raw } = &saved.heads;
        let mut dq = self.take(tokens, config.q_size());
        let mut dk = self.take(k.rows(), config.kv_size());
        let mut dv = self.take(v.rows(), config.kv_size());
        attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            d_o,
            q.view(),
            k.view(),
            v.view(),
            saved.lse.view(),
            &self.batch.segments,
            &self.attention_shape(),
            self.ws,
        );
        let (mut dk, dv) = self.trained_keys_backward(place.layer, dk, dv, grads);
        if let Some(table) = place.rope {
            for dx in [&mut dq, &mut dk] {
                let positions = &self.batch.positions;
                rope_backward(dx.view_mut(), positions, table, config.head_size);
            }
        }
        if let Some(raw) = raw {
            let id = |norm| WeightId::Norm(place.layer, norm, Part::Weight);
            let (q, k) = (self.widened(&raw.q), self.widened(&raw.k));
            let (q_rstd, k_rstd) = (raw.q_rstd.view(), raw.k_rstd.view());
            let dq_raw =
                self.head_norm_backward(id(BlockNorm::Q), dq.view(), q.view(), q_rstd, grads);
            let dk_raw =
                self.head_norm_backward(id(BlockNorm::K), dk.view(), k.view(), k_rstd, grads);
            self.give_widened(q);
            self.give_widened(k);
            self.ws.give(std::mem::replace(&mut dq, dq_raw));
            self.ws.give(std::mem::replace(&mut dk, dk_raw));
        }
        [dq, dk, dv]
    }

    /// Through the linears of q, k and v: their input's gradient overwrites `dn`.
    fn qkv_backward(
        &self,
        place: Place,
        [dq, dk, dv]: &[Tensor; 3],
        n: Option<View>,
        saved: &Values,
        dn: Option<ViewMut>,
        grads: &mut Arena,
    ) {
        let config = self.config();
        let parts = [
            (LinearKind::Q, dq),
            (LinearKind::K, dk),
            (LinearKind::V, dv),
        ];
        if config.fused_qkv {
            let mut dqkv = self.take(dq.rows(), config.fused_columns(LinearKind::Qkv).len());
            for (kind, part) in parts {
                copy_cols(
                    dqkv.view_mut(),
                    config.fused_columns(kind).start,
                    part.view(),
                    0..part.cols(),
                );
            }
            let linear = self.back(place.linear(LinearKind::Qkv), &dqkv, saved);
            self.linears_backward(&[linear], n, dn, grads);
            self.ws.give(dqkv);
        } else {
            let linears = parts.map(|(kind, dy)| self.back(place.linear(kind), dy, saved));
            self.linears_backward(&linears, n, dn, grads);
        }
    }

    /// Gives back everything but the block's input.
    fn give_all_but_input(&self, values: Values) -> Tensor {
        let Values {
            x,
            attention_norm,
            heads,
            o,
            lse,
            x_mid,
            mlp_norm,
            mlp,
            attention_bottlenecks,
            mlp_bottlenecks,
            branches,
        } = values;
        self.give_bottlenecks(attention_bottlenecks);
        self.give_bottlenecks(mlp_bottlenecks);
        self.give([lse, x_mid, heads.q, heads.k, heads.v]);
        self.give(o);
        if let Some(MlpSaved { gate, up }) = mlp {
            self.give(gate);
            self.ws.give(up);
        }
        self.give(branches.into_iter().flatten());
        self.give_norm(attention_norm);
        self.give_norm(mlp_norm);
        if let Some(raw) = heads.raw {
            self.give([raw.q, raw.q_rstd, raw.k, raw.k_rstd]);
        }
        x
    }

    fn give_values(&self, values: Values) {
        let x = self.give_all_but_input(values);
        self.ws.give(x);
    }
}

/// The pass over the rows that are left behind a block's attention.
fn behind_attention<'p>(pass: &Pass<'p>, place: Place<'p>) -> Pass<'p> {
    match place.wanted {
        None => *pass,
        Some(Wanted { adapters, .. }) => Pass {
            rows_of_adapters: adapters,
            ..*pass
        },
    }
}

impl KvCache {
    /// Writes new rows of k and v to their places.
    fn append(
        &mut self,
        layer: usize,
        k: View,
        v: View,
        appends: &[(std::ops::Range<usize>, usize)],
    ) {
        let (cache_k, cache_v) = self.layer_mut(layer);
        let write = |cache: &mut Tensor, new: View| {
            for (rows, place) in appends {
                let mut target: ViewMut = cache.view_mut().slice_rows(*place..place + rows.len());
                target.copy_from(new.slice_rows(rows.clone()));
            }
        };
        write(cache_k, k);
        write(cache_v, v);
    }
}
