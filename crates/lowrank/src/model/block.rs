//! The block: every family is this one, with its choices read from [`ModelConfig`](super::ModelConfig).
//!
//! ```text
//! x_mid = x     + o(attention(rope(q), rope(k), v)),   q, k, v of norm(x)
//! x_out = x_mid + mlp(norm(x_mid))
//! ```
//! The forward saves what the backward needs and nothing that it can cheaply compute again: the norms' outputs and the
//! MLP's hidden activation are recomputed.

use lowrank_kernels::{
    Arena, AttentionShape, RopeTable, Tensor, View, ViewMut, activation_backward,
    activation_forward, add_assign, attention_backward, attention_forward, copy_cols,
    gated_backward, gated_forward, rope_backward, rope_forward,
};

use super::config::{BlockNorm, LinearId, LinearKind, Part, WeightId};
use super::decoder::{Keep, KvCache};
use super::pass::{NormSaved, Pass};

/// What one block saves for its backward.
pub(crate) struct BlockSaved {
    x: Tensor,
    attention_norm: NormSaved,
    heads: HeadsSaved,
    o: Tensor,
    lse: Tensor,
    x_mid: Tensor,
    mlp_norm: NormSaved,
    gate: Option<Tensor>,
    up: Tensor,
    /// `x Aᵀ` of the branches at each linear, in [`ModelConfig::linear_kinds`](super::ModelConfig::linear_kinds)' order.
    branches: Vec<Vec<Tensor>>,
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

/// The index of a block and the rotary table.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) layer: usize,
    pub(crate) rope: Option<&'a RopeTable>,
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

    /// x_out [T, C] of a block; consumes x.
    pub(crate) fn block(&self, place: Place, x: Tensor, keep: &mut Keep) -> Tensor {
        let tokens = x.rows();
        let config = self.config();
        let mut branches = Vec::new();
        let (normed, attention_norm) = self.norm(place.norm(BlockNorm::Attention), x.view());
        let heads = self.heads(place, normed.view(), &mut branches);
        self.ws.give(normed);

        let mut o = self.take(tokens, config.q_size());
        let mut lse = self.take(tokens, config.num_attention_heads);
        let shape = &self.attention_shape();
        let (o_out, lse_out, q) = (o.view_mut(), lse.view_mut(), heads.q.view());
        let segments = &self.batch.segments;
        if let Keep::Cache(cache) = keep {
            cache.append(
                place.layer,
                heads.k.view(),
                heads.v.view(),
                &self.batch.appends,
            );
            let (k, v) = cache.layer(place.layer);
            attention_forward(o_out, lse_out, q, k, v, segments, shape, self.ws);
        } else {
            attention_forward(
                o_out,
                lse_out,
                q,
                heads.k.view(),
                heads.v.view(),
                segments,
                shape,
                self.ws,
            );
        }
        let (mut x_mid, b) = self.linear(place.linear(LinearKind::O), o.view());
        branches.push(b);
        add_assign(x_mid.view_mut(), x.view());

        let (normed, mlp_norm) = self.norm(place.norm(BlockNorm::Mlp), x_mid.view());
        let gated = config.linear_kinds().contains(&LinearKind::Gate);
        let up = place.linear(LinearKind::Up);
        let (gate, (up, b)) = if gated {
            let ids = [place.linear(LinearKind::Gate), up];
            let [(gate, b), up] = self.linears(ids, normed.view());
            branches.push(b);
            (Some(gate), up)
        } else {
            (None, self.linear(up, normed.view()))
        };
        branches.push(b);
        self.ws.give(normed);
        let h = self.mlp_activation(gate.as_ref(), &up);
        let (mut x_out, b) = self.linear(place.linear(LinearKind::Down), h.view());
        branches.push(b);
        self.ws.give(h);
        add_assign(x_out.view_mut(), x_mid.view());

        let saved = BlockSaved {
            x,
            attention_norm,
            heads,
            o,
            lse,
            x_mid,
            mlp_norm,
            gate,
            up,
            branches,
        };
        match keep {
            Keep::Saved { blocks, from } if place.layer >= *from => blocks.push(saved),
            _ => self.give_block(saved),
        }
        x_out
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
            let kinds = [LinearKind::Q, LinearKind::K, LinearKind::V];
            self.linears(kinds.map(|kind| place.linear(kind)), normed)
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
        HeadsSaved { q, k, v, raw }
    }

    fn mlp_activation(&self, gate: Option<&Tensor>, up: &Tensor) -> Tensor {
        let mut h = self.take(up.rows(), up.cols());
        match gate {
            Some(gate) => gated_forward(
                h.view_mut(),
                gate.view(),
                up.view(),
                self.config().activation,
            ),
            None => activation_forward(h.view_mut(), up.view(), self.config().activation),
        }
        h
    }

    /// dx of the block's input from the gradient of its output, in place; consumes what was saved. With `stop` the block
    /// is the lowest that trains anything, and `dx` is not worth finishing.
    pub(crate) fn block_backward(
        &self,
        place: Place,
        mut dx: Tensor,
        saved: BlockSaved,
        stop: bool,
        grads: &mut Arena,
    ) -> Tensor {
        self.mlp_backward(place, &mut dx, &saved, grads);
        self.attention_part_backward(place, &mut dx, &saved, stop, grads);
        self.give_block(saved);
        dx
    }

    fn branches<'s>(&self, saved: &'s BlockSaved, kind: LinearKind) -> &'s [Tensor] {
        let index = self.config().linear_kinds().iter().position(|k| *k == kind);
        index.map_or(&[], |i| &saved.branches[i])
    }

    /// x_out = x_mid + down(act(gate(n), up(n))), n = norm(x_mid)
    fn mlp_backward(&self, place: Place, dx: &mut Tensor, saved: &BlockSaved, grads: &mut Arena) {
        let config = self.config();
        let (tokens, width) = (dx.rows(), config.intermediate_size);
        let down = place.linear(LinearKind::Down);
        let h = self
            .reads_input(down)
            .then(|| self.mlp_activation(saved.gate.as_ref(), &saved.up));
        let mut dh = self.take(tokens, width);
        self.linear_backward(
            down,
            dx.view(),
            h.as_ref().map(Tensor::view),
            self.branches(saved, LinearKind::Down),
            Some(dh.view_mut()),
            false,
            grads,
        );
        self.give(h);

        let mut dup = self.take(tokens, width);
        let dgate = if let Some(gate) = &saved.gate {
            let mut dgate = self.take(tokens, width);
            let (g, u) = (gate.view(), saved.up.view());
            gated_backward(
                dgate.view_mut(),
                dup.view_mut(),
                dh.view(),
                g,
                u,
                config.activation,
            );
            Some(dgate)
        } else {
            activation_backward(
                dup.view_mut(),
                dh.view(),
                saved.up.view(),
                config.activation,
            );
            None
        };
        self.ws.give(dh);

        let norm = place.norm(BlockNorm::Mlp);
        let (up, gate) = (place.linear(LinearKind::Up), place.linear(LinearKind::Gate));
        let reads = self.reads_input(up) || (dgate.is_some() && self.reads_input(gate));
        let normed = reads.then(|| self.norm_again(&norm, saved.x_mid.view(), &saved.mlp_norm));
        let n = normed.as_ref().map(Tensor::view);
        let mut dn = self.take(tokens, config.hidden_size);
        self.linear_backward(
            up,
            dup.view(),
            n,
            self.branches(saved, LinearKind::Up),
            Some(dn.view_mut()),
            false,
            grads,
        );
        if let Some(dgate) = &dgate {
            let branches = self.branches(saved, LinearKind::Gate);
            self.linear_backward(
                gate,
                dgate.view(),
                n,
                branches,
                Some(dn.view_mut()),
                true,
                grads,
            );
        }
        self.norm_backward(
            &norm,
            dx.view_mut(),
            dn.view(),
            saved.x_mid.view(),
            &saved.mlp_norm,
            grads,
        );
        self.give([dup, dn]);
        self.give(dgate);
        self.give(normed);
    }

    /// x_mid = x + o(attention(q, k, v)), q, k, v of norm(x)
    fn attention_part_backward(
        &self,
        place: Place,
        dx: &mut Tensor,
        saved: &BlockSaved,
        stop: bool,
        grads: &mut Arena,
    ) {
        let config = self.config();
        let tokens = dx.rows();
        let mut d_o = self.take(tokens, config.q_size());
        let o_branches = self.branches(saved, LinearKind::O);
        let o_id = place.linear(LinearKind::O);
        self.linear_backward(
            o_id,
            dx.view(),
            Some(saved.o.view()),
            o_branches,
            Some(d_o.view_mut()),
            false,
            grads,
        );

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
        let normed = reads.then(|| self.norm_again(&norm, saved.x.view(), &saved.attention_norm));
        let n = normed.as_ref().map(Tensor::view);
        let trains_norm =
            self.trained(norm(Part::Weight)).is_some() || self.trained(norm(Part::Bias)).is_some();
        let mut dn = (!stop || trains_norm).then(|| self.take(tokens, config.hidden_size));
        self.qkv_backward(place, &heads, n, saved, dn.as_mut(), grads);
        if let Some(dn) = &dn {
            self.norm_backward(
                &norm,
                dx.view_mut(),
                dn.view(),
                saved.x.view(),
                &saved.attention_norm,
                grads,
            );
        }
        self.give(heads);
        self.give(dn);
        self.give(normed);
    }

    /// Gradients of q, k and v as the linears gave them, from that of the attention's output.
    fn heads_backward(
        &self,
        place: Place,
        saved: &BlockSaved,
        d_o: View,
        grads: &mut Arena,
    ) -> [Tensor; 3] {
        let config = self.config();
        let tokens = d_o.rows();
        let HeadsSaved { q, k, v, raw } = &saved.heads;
        let mut dq = self.take(tokens, config.q_size());
        let mut dk = self.take(tokens, config.kv_size());
        let mut dv = self.take(tokens, config.kv_size());
        attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            d_o,
            q.view(),
            k.view(),
            v.view(),
            saved.o.view(),
            saved.lse.view(),
            &self.batch.segments,
            &self.attention_shape(),
            self.ws,
        );
        if let Some(table) = place.rope {
            rope_backward(
                dq.view_mut(),
                &self.batch.positions,
                table,
                config.head_size,
            );
            rope_backward(
                dk.view_mut(),
                &self.batch.positions,
                table,
                config.head_size,
            );
        }
        if let Some(raw) = raw {
            let id = |norm| WeightId::Norm(place.layer, norm, Part::Weight);
            let dq_raw = self.head_norm_backward(
                id(BlockNorm::Q),
                dq.view(),
                raw.q.view(),
                raw.q_rstd.view(),
                grads,
            );
            let dk_raw = self.head_norm_backward(
                id(BlockNorm::K),
                dk.view(),
                raw.k.view(),
                raw.k_rstd.view(),
                grads,
            );
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
        saved: &BlockSaved,
        mut dn: Option<&mut Tensor>,
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
            let branches = self.branches(saved, LinearKind::Qkv);
            let dn = dn.map(Tensor::view_mut);
            self.linear_backward(
                place.linear(LinearKind::Qkv),
                dqkv.view(),
                n,
                branches,
                dn,
                false,
                grads,
            );
            self.ws.give(dqkv);
        } else {
            for (i, (kind, dy)) in parts.into_iter().enumerate() {
                let branches = self.branches(saved, kind);
                let dn = dn.as_deref_mut().map(Tensor::view_mut);
                self.linear_backward(place.linear(kind), dy.view(), n, branches, dn, i > 0, grads);
            }
        }
    }

    fn give_block(&self, saved: BlockSaved) {
        let BlockSaved {
            x,
            attention_norm,
            heads,
            o,
            lse,
            x_mid,
            mlp_norm,
            gate,
            up,
            branches,
        } = saved;
        self.give([x, o, lse, x_mid, up, heads.q, heads.k, heads.v]);
        self.give(gate);
        self.give(branches.into_iter().flatten());
        self.give_norm(attention_norm);
        self.give_norm(mlp_norm);
        if let Some(raw) = heads.raw {
            self.give([raw.q, raw.q_rstd, raw.k, raw.k_rstd]);
        }
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
