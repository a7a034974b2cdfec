//! The first half of a block: o = attention(rope(q), rope(k), v), with q, k and v of norm(x), over all rows.

use std::borrow::Cow;

use lowrank_kernels::{
    Arena, AttentionShape, Tensor, View, ViewMut, add_assign, attention_backward,
    attention_forward, copy_cols, rope_backward, rope_forward,
};

use super::Places;
use crate::model::adapter::Reach;
use crate::model::batch::Batch;
use crate::model::cache::KvCache;
use crate::model::config::{BlockNorm, LinearId, LinearKind, Part, QkNorm, WeightId};
use crate::model::linear::{LinearBack, LinearSaved};
use crate::model::pass::{NormSaved, Pass};
use crate::model::relative::RelativeSaved;

/// The first half of a block, of a pass over all rows.
pub(crate) struct AttentionHalf<'a> {
    pub(super) pass: Pass<'a>,
    pub(super) batch: &'a Batch,
    pub(super) layer: usize,
    pub(super) places: Places<'a>,
}

/// The values of its forward. Matrices may be kept as bf16.
pub(crate) struct AttentionValues {
    /// The block's input [T, C].
    pub(super) x: Tensor,
    /// Of the norm before the linears, where there is one.
    pub(super) norm: Option<NormSaved>,
    pub(super) heads: HeadsSaved,
    /// The log-sum-exp of each row and head; attention's backward does without its output.
    pub(super) lse: Tensor,
    /// Of the linears of q, k and v, or of the fused one.
    pub(super) linears: Vec<LinearSaved>,
    /// Of the relative positions, where scores have terms of them.
    pub(super) relative: Option<RelativeSaved>,
}

/// q and k as attention reads them, v, and what the head norms read.
pub(super) struct HeadsSaved {
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) raw: Option<RawHeads>,
}

impl HeadsSaved {
    fn all(&self) -> [View<'_>; 3] {
        [self.q.view(), self.k.view(), self.v.view()]
    }
}

/// q and k before the head norms.
pub(super) struct RawHeads {
    pub(super) q: Tensor,
    pub(super) q_rstd: Tensor,
    pub(super) k: Tensor,
    pub(super) k_rstd: Tensor,
}

const PARTS: [LinearKind; 3] = [LinearKind::Q, LinearKind::K, LinearKind::V];

impl AttentionHalf<'_> {
    /// Values, and attention's output [T, H·D]; consumes x.
    pub(super) fn forward(
        &self,
        x: Tensor,
        cache: Option<&mut KvCache>,
    ) -> (AttentionValues, Tensor) {
        let pass = &self.pass;
        let config = pass.config();
        let (normed, norm) = self
            .has_norm()
            .then(|| pass.norm_for(&self.linear_ids(), self.norm(), x.view()))
            .unzip();
        let (heads, linears) = self.heads(normed.as_ref().unwrap_or(&x).view());
        pass.give(normed);

        let mut o = pass.take(x.rows(), config.q_size());
        let mut lse = pass.take(x.rows(), config.num_attention_heads);
        let relative = self
            .places
            .relative
            .map(|relative| relative.attention(pass, self.layer, heads.all(), &mut o, &mut lse));
        if relative.is_none() {
            let (k, v) = if let Some(cache) = cache {
                let (k, v) = (heads.k.view(), heads.v.view());
                cache.append(self.layer, k, v, &self.batch.appends);
                cache.layer(self.layer)
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
                &self.shape(),
                pass.classes,
                pass.compute_dtype,
                pass.ws,
            );
        }
        let values = AttentionValues {
            x,
            norm,
            heads,
            lse,
            linears,
            relative,
        };
        (values, o)
    }

    /// From the gradient of attention's output to that of the input, which is added to `dx`; gives all values back.
    pub(super) fn backward(
        &self,
        dx: &mut Tensor,
        d_o: Tensor,
        saved: AttentionValues,
        reach: Reach,
        grads: &mut Arena,
    ) {
        let pass = &self.pass;
        let heads = self.heads_backward(&saved, d_o.view(), grads);
        pass.give([d_o]);

        let id = self.norm();
        let ids = self.linear_ids();
        let reads = ids.iter().any(|&id| pass.reads_input(id));
        let trains_norm = self.has_norm()
            && [Part::Weight, Part::Bias]
                .into_iter()
                .any(|part| pass.trained(id(part)).is_some());
        let finish = reach == Reach::Input || trains_norm;
        // A norm reads it as it is kept.
        let x = (reads || (finish && self.has_norm())).then(|| {
            if self.has_norm() {
                Cow::Borrowed(&saved.x)
            } else {
                pass.widened(&saved.x)
            }
        });
        let read = x.as_ref().filter(|_| reads);
        let normed = read
            .zip(saved.norm.as_ref())
            .map(|(x, norm)| pass.norm_again(&ids, &id, x.view(), norm));
        let n = normed
            .as_ref()
            .or(read.map(AsRef::as_ref))
            .map(Tensor::view);
        let mut dn = finish.then(|| pass.take(dx.rows(), pass.config().hidden_size));
        let dn_out = dn.as_mut().map(Tensor::view_mut);
        self.linears_backward(&heads, n, &saved, dn_out, grads);
        match (&dn, &x, &saved.norm) {
            (Some(dn), Some(x), Some(norm)) => {
                pass.norm_backward(&id, dx.view_mut(), dn.view(), x.view(), norm, grads);
            }
            (Some(dn), _, None) => add_assign(dx.view_mut(), dn.view()),
            _ => {}
        }
        if let Some(x) = x {
            pass.give_widened(x);
        }
        pass.give(heads);
        pass.give(dn);
        pass.give(normed);
        saved.give(pass);
    }

    fn shape(&self) -> AttentionShape {
        let config = self.pass.config();
        AttentionShape {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_size: config.head_size,
            scale: config.attention_scale(),
            softcap: config.attention_softcap,
            window: config.layers[self.layer].window,
        }
    }

    /// Whether a norm stands before the linears.
    fn has_norm(&self) -> bool {
        let config = self.pass.config();
        config.norm_placement.has_input() && config.has_attention_norm(self.layer)
    }

    fn norm(&self) -> impl Fn(Part) -> WeightId + use<> {
        let layer = self.layer;
        move |part| WeightId::Norm(layer, BlockNorm::Attention, part)
    }

    fn head_norm_id(&self, norm: BlockNorm) -> WeightId {
        WeightId::Norm(self.layer, norm, Part::Weight)
    }

    fn linear_id(&self, kind: LinearKind) -> LinearId {
        LinearId {
            layer: self.layer,
            kind,
        }
    }

    /// The linears that read the normed rows.
    fn linear_ids(&self) -> Vec<LinearId> {
        let kinds: &[LinearKind] = if self.pass.config().fused_qkv {
            &[LinearKind::Qkv]
        } else {
            &PARTS
        };
        kinds.iter().map(|&kind| self.linear_id(kind)).collect()
    }

    /// q, k and v of the normed rows, as attention reads them, and what their linears save.
    fn heads(&self, normed: View) -> (HeadsSaved, Vec<LinearSaved>) {
        let pass = &self.pass;
        let config = pass.config();
        let ([q, k, v], linears) = if config.fused_qkv {
            let (qkv, saved) = pass.linear(self.linear_id(LinearKind::Qkv), normed);
            let parts = PARTS.map(|kind| {
                let columns = config.fused_columns(kind);
                let mut part = pass.take(normed.rows(), columns.len());
                copy_cols(part.view_mut(), 0, qkv.view(), columns);
                part
            });
            pass.give([qkv]);
            (parts, vec![saved])
        } else {
            let outputs = pass.linears(PARTS.map(|kind| self.linear_id(kind)), normed);
            let mut saved = Vec::with_capacity(outputs.len());
            let parts = outputs.map(|(y, of_linear)| {
                saved.push(of_linear);
                y
            });
            (parts, saved)
        };
        let (mut q, mut k, raw) = if config.qk_norm == QkNorm::None {
            (q, k, None)
        } else {
            let (q_normed, q_rstd) = pass.head_norm(self.head_norm_id(BlockNorm::Q), q.view());
            let (k_normed, k_rstd) = pass.head_norm(self.head_norm_id(BlockNorm::K), k.view());
            let raw = RawHeads {
                q,
                q_rstd,
                k,
                k_rstd,
            };
            (q_normed, k_normed, Some(raw))
        };
        if let Some(tables) = self.places.rope {
            for (x, table) in [(&mut q, tables.queries()), (&mut k, tables.keys())] {
                let positions = &self.batch.positions;
                rope_forward(x.view_mut(), positions, table, config.head_size);
            }
        }
        let (k, v) = pass.with_trained_keys(self.batch, self.layer, k, v);
        (HeadsSaved { q, k, v, raw }, linears)
    }

    /// Gradients of q, k and v as the linears gave them, from that of the attention's output.
    fn heads_backward(&self, saved: &AttentionValues, d_o: View, grads: &mut Arena) -> [Tensor; 3] {
        let pass = &self.pass;
        let config = pass.config();
        let HeadsSaved { q, k, v, raw } = &saved.heads;
        let [q, k, v] = [q, k, v].map(|head| pass.widened(head));
        let mut dq = pass.take(d_o.rows(), config.q_size());
        let mut dk = pass.take(k.rows(), config.kv_size());
        let mut dv = pass.take(v.rows(), config.kv_size());
        if let Some((relative, saved_of)) = self.places.relative.zip(saved.relative.as_ref()) {
            let inputs = [q.view(), k.view(), v.view()];
            let lse = saved.lse.view();
            let outputs = [&mut dq, &mut dk, &mut dv];
            relative
                .attention_backward(pass, self.layer, outputs, d_o, inputs, lse, saved_of, grads);
        } else {
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
                &self.shape(),
                pass.compute_dtype,
                pass.ws,
            );
        }
        for head in [q, k, v] {
            pass.give_widened(head);
        }
        let (mut dk, dv) = pass.trained_keys_backward(self.batch, self.layer, dk, dv, grads);
        if let Some(tables) = self.places.rope {
            for (dx, table) in [(&mut dq, tables.queries()), (&mut dk, tables.keys())] {
                let positions = &self.batch.positions;
                rope_backward(dx.view_mut(), positions, table, config.head_size);
            }
        }
        if let Some(raw) = raw {
            let (q, k) = (pass.widened(&raw.q), pass.widened(&raw.k));
            let (q_rstd, k_rstd) = (raw.q_rstd.view(), raw.k_rstd.view());
            let (q_id, k_id) = (
                self.head_norm_id(BlockNorm::Q),
                self.head_norm_id(BlockNorm::K),
            );
            let dq_raw = pass.head_norm_backward(q_id, dq.view(), q.view(), q_rstd, grads);
            let dk_raw = pass.head_norm_backward(k_id, dk.view(), k.view(), k_rstd, grads);
            pass.give_widened(q);
            pass.give_widened(k);
            pass.give([
                std::mem::replace(&mut dq, dq_raw),
                std::mem::replace(&mut dk, dk_raw),
            ]);
        }
        [dq, dk, dv]
    }

    /// Through the linears of q, k and v: their input's gradient overwrites `dn`.
    fn linears_backward(
        &self,
        parts: &[Tensor; 3],
        n: Option<View>,
        saved: &AttentionValues,
        dn: Option<ViewMut>,
        grads: &mut Arena,
    ) {
        let pass = &self.pass;
        let config = pass.config();
        let fused = config.fused_qkv.then(|| {
            let columns = config.fused_columns(LinearKind::Qkv).len();
            let mut dqkv = pass.take(parts[0].rows(), columns);
            for (kind, part) in PARTS.into_iter().zip(parts) {
                let at = config.fused_columns(kind).start;
                copy_cols(dqkv.view_mut(), at, part.view(), 0..part.cols());
            }
            dqkv
        });
        let outputs = fused.as_ref().map_or(&parts[..], std::slice::from_ref);
        let linears = self.linear_ids().into_iter().zip(outputs);
        let linears = linears.zip(&saved.linears);
        let linears: Vec<LinearBack> = linears
            .map(|((id, dy), of_linear)| LinearBack {
                id,
                dy: dy.view(),
                saved: of_linear,
                y: (id.kind == LinearKind::V).then(|| saved.heads.v.view()),
            })
            .collect();
        pass.linears_backward(&linears, n, dn, grads);
        drop(linears);
        pass.give(fused);
    }
}
