//! The relative positions of one pass: the rows of their table that the batch's distances reach, behind their norm.
//!
//! ```text
//! r = norm(table[rows])              once a pass
//! kr, qr = k(r), q(r)                in each block, with what adapters have beside or in place of its linears
//! s(i, j) = scale · (q_i·k_j + q_i·kr[i - j] + k_j·qr[i - j])
//! ```
//! Rows that use another adapter get other kr and qr, so each adapter of a batch has a copy of r: a *group*. On the way back each block
//! adds its part to the gradients of table and norm, which so are those of a sum over blocks.

use std::ops::Range;

use lowrank_kernels::{
    Arena, RelativeGradients, RelativePositions, RelativeSegment, RelativeShape, RowClasses,
    Tensor, View, embedding_backward, embedding_forward, relative_attention_backward,
    relative_attention_forward,
};

use super::batch::Batch;
use super::config::{LinearId, LinearKind, Part, RelativeAttention, WeightId};
use super::linear::{LinearBack, LinearSaved};
use super::pass::{NormSaved, Pass};
use crate::random::mix;

/// Sets the dropout of the table's rows apart from that of tokens.
const DROPOUT: u64 = 0x7265_6c61_7469_7665;

impl RelativeAttention {
    /// The table's row for a query that stands `distance` behind a key.
    ///
    /// Half of the buckets are distances by themselves, and the others grow as the logarithm of the distance does.
    fn row(&self, distance: i64) -> usize {
        let bucket = match self.buckets {
            Some(buckets) => bucket(distance, buckets, self.max_distance),
            None => distance,
        };
        let span = self.span as i64;
        (bucket + span).clamp(0, 2 * span - 1) as usize
    }

    /// Terms of a score.
    pub(crate) fn terms(self) -> usize {
        usize::from(self.keys) + usize::from(self.queries)
    }

    /// Whether a linear makes keys or queries of the table's rows.
    pub(crate) fn is_read_by(self, kind: LinearKind) -> bool {
        match kind {
            LinearKind::Q => self.queries,
            LinearKind::K => self.keys,
            _ => false,
        }
    }

    /// The rows that sequences of up to so many tokens reach.
    pub(crate) fn reached(&self, longest: usize) -> Range<usize> {
        let most = longest.max(1) as i64 - 1;
        self.row(-most)..self.row(most) + 1
    }
}

/// As transformers computes it in f32 (`make_log_bucket_position`).
fn bucket(distance: i64, buckets: usize, max_distance: usize) -> i64 {
    let middle = buckets / 2;
    let size = distance.unsigned_abs() as usize;
    if size <= middle {
        return distance;
    }
    let grown = (size as f32 / middle as f32).ln();
    let most = ((max_distance - 1) as f64 / middle as f64) as f32;
    let behind = (grown / most.ln() * (middle - 1) as f32).ceil() as i64;
    distance.signum() * (behind + middle as i64)
}

/// What the blocks of one pass read.
pub(crate) struct Relative {
    config: RelativeAttention,
    /// The table's rows, for each group.
    ids: Vec<u32>,
    /// r [groups · R, C].
    rows: Tensor,
    /// What its norm read, and saved.
    norm: Option<(Tensor, NormSaved)>,
    /// Which adapter a range of r uses.
    adapters: Vec<(Range<usize>, usize)>,
    segments: Vec<RelativeSegment>,
    /// The row, counted from a group's first, for every distance.
    places: Vec<u32>,
}

/// What a block saves of them.
pub(crate) struct RelativeSaved {
    /// kr and qr [groups · R, H·D] with what their linears saved, each where scores have the term.
    keys: Option<(Tensor, LinearSaved)>,
    queries: Option<(Tensor, LinearSaved)>,
}

impl Relative {
    /// Of a model that has them.
    ///
    /// # Panics
    /// Unless every segment is a whole sequence, whose rows see all of it and nothing else.
    pub(super) fn of(pass: &Pass, batch: &Batch) -> Option<Self> {
        let config = pass.config().relative?;
        let lengths = batch.segments.iter().map(|segment| segment.queries.len());
        let longest = lengths.max().unwrap_or(0).max(1);
        let reached = config.reached(longest);
        let farthest = longest as i64 - 1;
        let places = (-farthest..=farthest).map(|at| (config.row(at) - reached.start) as u32);

        let mut groups: Vec<Option<usize>> = Vec::new();
        let segments = batch.segments.iter().map(|segment| {
            assert!(
                !segment.causal && segment.keys == [segment.queries.clone()],
                "scores of relative positions are those of whole sequences of an encoder"
            );
            let adapter = batch.adapter_of(segment.queries.start);
            let known = groups.iter().position(|group| *group == adapter);
            let group = known.unwrap_or_else(|| {
                groups.push(adapter);
                groups.len() - 1
            });
            RelativeSegment {
                rows: segment.queries.clone(),
                first: group * reached.len(),
            }
        });
        let segments = segments.collect();
        let adapters = groups.iter().enumerate().filter_map(|(group, adapter)| {
            let first = group * reached.len();
            Some((first..first + reached.len(), (*adapter)?))
        });
        let adapters = adapters.collect();

        let once = reached.clone().map(|row| row as u32);
        let ids: Vec<u32> = groups.iter().flat_map(|_| once.clone()).collect();
        let mut rows = pass.take(ids.len(), pass.config().hidden_size);
        embedding_forward(
            rows.view_mut(),
            &ids,
            pass.weight(WeightId::Relative),
            false,
        );
        let norm = config.norm.then(|| {
            let (normed, saved) = pass.norm(WeightId::RelativeNorm, rows.view());
            (std::mem::replace(&mut rows, normed), saved)
        });
        Some(Self {
            config,
            ids,
            rows,
            norm,
            adapters,
            segments,
            places: places.collect(),
        })
    }

    /// Gives everything back.
    pub(super) fn give(self, pass: &Pass) {
        pass.give([self.rows]);
        if let Some((read, norm)) = self.norm {
            pass.give([read]);
            pass.give_norm(norm);
        }
    }

    /// The pass over r.
    fn pass<'p>(&'p self, pass: &Pass<'p>) -> Pass<'p> {
        Pass {
            dropout_key: pass.dropout_key.map(|key| mix(key, DROPOUT)),
            ..pass.over(&self.adapters, RowClasses::PROMPT)
        }
    }

    fn shape<'p>(&'p self, pass: &Pass) -> RelativeShape<'p> {
        let config = pass.config();
        RelativeShape {
            heads: config.num_attention_heads,
            head_size: config.head_size,
            scale: config.attention_scale(),
            places: &self.places,
        }
    }

    /// Attention's output [T, H·D] and log-sum-exp [T, H] of a block.
    pub(super) fn attention(
        &self,
        pass: &Pass,
        layer: usize,
        [q, k, v]: [View; 3],
        o: &mut Tensor,
        lse: &mut Tensor,
    ) -> RelativeSaved {
        let own = self.pass(pass);
        let through = |kind| own.linear(LinearId { layer, kind }, self.rows.view());
        let saved = RelativeSaved {
            keys: self.config.keys.then(|| through(LinearKind::K)),
            queries: self.config.queries.then(|| through(LinearKind::Q)),
        };
        relative_attention_forward(
            o.view_mut(),
            lse.view_mut(),
            q,
            k,
            v,
            saved.positions(),
            &self.segments,
            &self.shape(pass),
            pass.ws,
        );
        saved
    }

    /// The gradients of q, k and v, which are overwritten, from that of attention's output; adds to those of what is trained in the
    /// linears, and of the table and its norm.
    pub(super) fn attention_backward(
        &self,
        pass: &Pass,
        layer: usize,
        [dq, dk, dv]: [&mut Tensor; 3],
        d_o: View,
        [q, k, v]: [View; 3],
        lse: View,
        saved: &RelativeSaved,
        grads: &mut Arena,
    ) {
        let gradient = |of: &Option<(Tensor, LinearSaved)>| {
            let (tensor, _) = of.as_ref()?;
            Some(pass.take(tensor.rows(), tensor.cols()))
        };
        let mut d_keys = gradient(&saved.keys);
        let mut d_queries = gradient(&saved.queries);
        relative_attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            RelativeGradients {
                keys: d_keys.as_mut().map(Tensor::view_mut),
                queries: d_queries.as_mut().map(Tensor::view_mut),
            },
            d_o,
            q,
            k,
            v,
            saved.positions(),
            lse,
            &self.segments,
            &self.shape(pass),
            pass.ws,
        );
        let terms = [
            (LinearKind::Q, &d_queries, &saved.queries),
            (LinearKind::K, &d_keys, &saved.keys),
        ];
        let linears = terms.into_iter().filter_map(|(kind, dy, saved)| {
            Some(LinearBack {
                y: None,
                id: LinearId { layer, kind },
                dy: dy.as_ref()?.view(),
                saved: &saved.as_ref()?.1,
            })
        });
        let linears: Vec<LinearBack> = linears.collect();
        let own = self.pass(pass);
        let mut d_rows = is_trained(pass).then(|| own.take(self.rows.rows(), self.rows.cols()));
        let d_out = d_rows.as_mut().map(Tensor::view_mut);
        own.linears_backward(&linears, Some(self.rows.view()), d_out, grads);
        drop(linears);
        pass.give(d_keys);
        pass.give(d_queries);
        if let Some(d_rows) = d_rows {
            self.rows_backward(pass, d_rows, grads);
        }
    }

    /// Adds the part of a block to the gradients of the table and its norm.
    fn rows_backward(&self, pass: &Pass, mut d_rows: Tensor, grads: &mut Arena) {
        if let Some((read, norm)) = &self.norm {
            let mut d_read = pass.take(d_rows.rows(), d_rows.cols());
            d_read.view_mut().fill(0.0);
            let (id, out) = (WeightId::RelativeNorm, d_read.view_mut());
            pass.norm_backward(id, out, d_rows.view(), read.view(), norm, grads);
            pass.give([std::mem::replace(&mut d_rows, d_read)]);
        }
        if let Some(slot) = pass.trained(WeightId::Relative) {
            embedding_backward(grads.view_mut(slot), &self.ids, d_rows.view());
        }
        pass.give([d_rows]);
    }
}

/// Whether the table or its norm is.
fn is_trained(pass: &Pass) -> bool {
    let norm = WeightId::RelativeNorm;
    [WeightId::Relative, norm(Part::Weight), norm(Part::Bias)]
        .into_iter()
        .any(|id| pass.trained(id).is_some())
}

impl RelativeSaved {
    fn positions(&self) -> RelativePositions<'_> {
        RelativePositions {
            keys: self.keys.as_ref().map(|(tensor, _)| tensor.view()),
            queries: self.queries.as_ref().map(|(tensor, _)| tensor.view()),
        }
    }

    /// Gives everything back.
    pub(super) fn give(self, pass: &Pass) {
        for (tensor, linear) in [self.keys, self.queries].into_iter().flatten() {
            pass.give([tensor]);
            pass.give_linears([linear]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(buckets: Option<usize>, max_distance: usize) -> RelativeAttention {
        RelativeAttention {
            span: buckets.unwrap_or(max_distance),
            buckets,
            max_distance,
            keys: true,
            queries: true,
            norm: true,
        }
    }

    /// transformers' `make_log_bucket_position` of the distances below six times the largest one, as Σ bucket · 31ⁿ⁻ⁱ modulo a prime.
    #[test]
    fn buckets_are_those_of_transformers() {
        for (buckets, max_distance, expected) in [
            (256, 512, 66_189_565),
            (128, 256, 31_144_699),
            (32, 512, 691_837_167),
            (64, 4096, 322_105_555),
            (8, 32, 711_454_345),
            (6, 20, 548_209_586),
            (5, 40, 491_578_191),
            (2, 64, 442_721_711),
        ] {
            let mut sum = 0;
            for distance in 0..6 * max_distance as i64 {
                let found = bucket(distance, buckets, max_distance);
                assert_eq!(bucket(-distance, buckets, max_distance), -found);
                sum = (31 * sum + found) % 1_000_000_007;
            }
            assert_eq!(sum, expected, "{buckets} buckets up to {max_distance}");
        }
    }

    #[test]
    fn far_distances_share_the_last_rows() {
        let plain = of(None, 6);
        let rows: Vec<usize> = (-8..9).map(|distance| plain.row(distance)).collect();
        let expected = [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11, 11];
        assert_eq!(rows, expected);
        assert_eq!(plain.reached(1), 6..7);
        assert_eq!(plain.reached(3), 4..9);
        assert_eq!(plain.reached(100), 0..12);
        // One of each half for a distance by itself, and farther ones behind it.
        let released = of(Some(256), 512);
        assert_eq!(released.row(-128), 128);
        assert_eq!(released.row(511), 511);
        assert_eq!(released.row(100_000), 511);
        assert_eq!(released.reached(512), 1..512);
    }
}
