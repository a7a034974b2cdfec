//! The backward pass, a task for each group of segments and key/value head.
//!
//! With p = exp(s - lse), the gradient of the scores is ds = p · (dp - δ), where dp = do·vᵀ and
//! δ = Σ do·o for each query. The scores are computed again, tile by tile.

use std::ops::Range;

use rayon::prelude::*;

use super::forward::finite_or_zero;
use super::{
    AttentionShape, KeyTile, QueryTile, Segment, Sight, TILE_KEYS, check, pack_transposed, padded,
    queries_per_tile,
};
use crate::linear::matrix;
use crate::matmul::{Mat, MatMut, Shared, product};
use crate::scratch::with_scratch;
use crate::simd::{exp, vectorize};
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// The gradients of [`attention_forward`](super::attention_forward); all three are overwritten.
///
/// dq, do_, q and o [Tq, H·D], dk, dv, k and v [Tk, KV·D], lse [Tq, H] as the forward saved it.
/// Rows of no segment get zeros.
///
/// # Panics
/// If the shapes do not match, if a range does not lie within them, or if segments share queries.
pub fn attention_backward(
    mut dq: ViewMut<'_>,
    mut dk: ViewMut<'_>,
    mut dv: ViewMut<'_>,
    do_: View<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    o: View<'_>,
    lse: View<'_>,
    segments: &[Segment],
    shape: &AttentionShape,
    _ws: &Workspace,
) {
    check(q, k, v, segments, shape);
    let (q_rows, q_cols, k_rows, k_cols) = (q.rows(), q.cols(), k.rows(), k.cols());
    dq.assert_shape("dq", q_rows, q_cols);
    dk.assert_shape("dk", k_rows, k_cols);
    dv.assert_shape("dv", k_rows, k_cols);
    do_.assert_shape("the output gradient of attention", q_rows, q_cols);
    o.assert_shape("the output of attention", q_rows, q_cols);
    lse.assert_shape("lse", q_rows, shape.heads);
    dq.fill(0.0);
    dk.fill(0.0);
    dv.fill(0.0);
    let task = Task {
        dq: Shared::new(dq.into_f32s(), q_rows, q_cols),
        dk: Shared::new(dk.into_f32s(), k_rows, k_cols),
        dv: Shared::new(dv.into_f32s(), k_rows, k_cols),
        do_,
        q,
        k,
        v,
        o,
        lse,
        shape,
    };
    let groups = groups_that_share_keys(segments);
    let tasks = groups.len() * shape.kv_heads;
    (0..tasks).into_par_iter().for_each(|i| {
        for &segment in &groups[i / shape.kv_heads] {
            task.run(&segments[segment], i % shape.kv_heads);
        }
    });
}

/// Segments in groups, such that segments of different groups share no key.
///
/// The gradients of shared keys are sums over segments; those run one after the other.
fn groups_that_share_keys(segments: &[Segment]) -> Vec<Vec<usize>> {
    let mut ranges: Vec<(&Range<usize>, usize)> = segments
        .iter()
        .enumerate()
        .flat_map(|(i, segment)| segment.keys.iter().map(move |keys| (keys, i)))
        .filter(|(keys, _)| !keys.is_empty())
        .collect();
    ranges.sort_unstable_by_key(|(keys, i)| (keys.start, *i));
    // Union-find; the root of a group is its smallest segment.
    let mut parent: Vec<usize> = (0..segments.len()).collect();
    let mut reach: Option<(usize, usize)> = None;
    for (keys, i) in ranges {
        if let Some((end, owner)) = reach
            && keys.start < end
        {
            let (a, b) = (root(&parent, owner), root(&parent, i));
            parent[a.max(b)] = a.min(b);
            reach = Some((end.max(keys.end), i));
        } else {
            reach = Some((keys.end, i));
        }
    }
    let mut groups = vec![Vec::new(); segments.len()];
    for i in 0..segments.len() {
        groups[root(&parent, i)].push(i);
    }
    groups.retain(|group| !group.is_empty());
    groups
}

fn root(parent: &[usize], mut i: usize) -> usize {
    while parent[i] != i {
        i = parent[i];
    }
    i
}

struct Task<'a> {
    dq: Shared<'a>,
    dk: Shared<'a>,
    dv: Shared<'a>,
    do_: View<'a>,
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    o: View<'a>,
    lse: View<'a>,
    shape: &'a AttentionShape,
}

/// The packed inputs and the temporaries of a tile of queries.
struct Buffers<'a> {
    /// scale·q and do, [D, width] and [width, D].
    queries: &'a mut [f32],
    queries_by_row: &'a mut [f32],
    grads: &'a mut [f32],
    grads_by_row: &'a mut [f32],
    /// [D, width].
    query_grads: &'a mut [f32],
    /// p and then ds, [keys, width].
    scores: &'a mut [f32],
    /// dp, [keys, width].
    score_grads: &'a mut [f32],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    fn len(size: usize, width: usize) -> usize {
        (5 * size + 2 * TILE_KEYS + 2) * width
    }

    fn new(scratch: &'a mut [f32], size: usize, width: usize) -> Self {
        let (queries, scratch) = scratch.split_at_mut(size * width);
        let (queries_by_row, scratch) = scratch.split_at_mut(size * width);
        let (grads, scratch) = scratch.split_at_mut(size * width);
        let (grads_by_row, scratch) = scratch.split_at_mut(size * width);
        let (query_grads, scratch) = scratch.split_at_mut(size * width);
        let (scores, scratch) = scratch.split_at_mut(TILE_KEYS * width);
        let (score_grads, scratch) = scratch.split_at_mut(TILE_KEYS * width);
        let (lse, delta) = scratch.split_at_mut(width);
        Self {
            queries,
            queries_by_row,
            grads,
            grads_by_row,
            query_grads,
            scores,
            score_grads,
            lse,
            delta,
        }
    }
}

impl Task<'_> {
    fn run(&self, segment: &Segment, kv_head: usize) {
        let count = segment.queries.len();
        let step = queries_per_tile(self.shape);
        let sight = Sight::new(segment, self.shape);
        for start in (0..count).step_by(step) {
            let tile = QueryTile {
                sight,
                queries: start..(start + step).min(count),
            };
            let width = padded(tile.queries.len(), self.shape);
            let size = self.shape.head_size;
            with_scratch(Buffers::len(size, width), |scratch| {
                self.run_tile(&tile, kv_head, Buffers::new(scratch, size, width));
            });
        }
    }

    fn run_tile(&self, tile: &QueryTile<'_>, kv_head: usize, mut buffers: Buffers<'_>) {
        let (group, size) = (self.shape.group(), self.shape.head_size);
        let count = tile.queries.len();
        let width = padded(count, self.shape);
        let first = kv_head * group;
        pack_transposed(
            buffers.queries,
            self.q,
            tile.rows(),
            first,
            self.shape,
            self.shape.scale,
        );
        pack_transposed(buffers.grads, self.do_, tile.rows(), first, self.shape, 1.0);
        transpose(buffers.queries_by_row, buffers.queries, size, width);
        transpose(buffers.grads_by_row, buffers.grads, size, width);
        buffers.query_grads.fill(0.0);
        self.pack_statistics(tile, kv_head, buffers.lse, buffers.delta);
        tile.sight
            .for_key_tiles(tile.sight.span(&tile.queries), |keys| {
                self.run_keys(tile, &keys, kv_head, &mut buffers);
            });
        #[expect(unsafe_code, reason = "tasks write disjoint blocks of dq")]
        // SAFETY: a task has its key/value head, and its group of segments, to itself; `check`
        // found that segments share no queries.
        let mut dq = unsafe {
            self.dq
                .block(tile.rows(), first * size..(first + group) * size)
        };
        // The scores were (scale·q)·kᵀ, so dq = scale·ds·k
        for i in 0..count {
            let dq = dq.row(i);
            for head in 0..group {
                for d in 0..size {
                    let grad = buffers.query_grads[d * width + head * count + i];
                    dq[head * size + d] = self.shape.scale * grad;
                }
            }
        }
    }

    /// lse and δ = Σ do·o of each query and head.
    fn pack_statistics(
        &self,
        tile: &QueryTile<'_>,
        kv_head: usize,
        lse: &mut [f32],
        delta: &mut [f32],
    ) {
        let (group, size) = (self.shape.group(), self.shape.head_size);
        let (heads, cols) = (self.shape.heads, self.q.cols());
        let count = tile.queries.len();
        let (o, do_, saved) = (self.o.f32s(), self.do_.f32s(), self.lse.f32s());
        lse.fill(0.0);
        delta.fill(0.0);
        for (i, row) in tile.rows().enumerate() {
            for head in 0..group {
                let h = kv_head * group + head;
                let at = row * cols + h * size;
                lse[head * count + i] = finite_or_zero(saved[row * heads + h]);
                delta[head * count + i] = crate::simd::dot(&o[at..at + size], &do_[at..at + size]);
            }
        }
    }

    fn run_keys(
        &self,
        tile: &QueryTile<'_>,
        key_tile: &KeyTile,
        kv_head: usize,
        buffers: &mut Buffers<'_>,
    ) {
        let size = self.shape.head_size;
        let width = padded(tile.queries.len(), self.shape);
        let columns = kv_head * size..(kv_head + 1) * size;
        let rows = key_tile.rows.clone();
        let count = rows.len();
        let keys = matrix(self.k).block(rows.clone(), columns.clone());
        let values = matrix(self.v).block(rows.clone(), columns.clone());
        let scores = &mut buffers.scores[..count * width];
        let score_grads = &mut buffers.score_grads[..count * width];
        // s = (scale·q)·kᵀ
        product(
            MatMut::new(scores, count, width),
            false,
            1.0,
            keys,
            Mat::new(buffers.queries, size, width),
        );
        tile.sight
            .mask(scores, width, key_tile, &tile.queries, self.shape.group());
        // o = p·v, so dp = do·vᵀ and dv += pᵀ·do
        product(
            MatMut::new(score_grads, count, width),
            false,
            1.0,
            values,
            Mat::new(buffers.grads, size, width),
        );
        exp_scores(scores, buffers.lse);
        #[expect(unsafe_code, reason = "tasks write disjoint blocks of dk and dv")]
        // SAFETY: a task has its key/value head to itself, and no other group of segments has a key
        // of this one; within a task tiles come one after the other.
        let (dk, dv) = unsafe {
            (
                self.dk.block(rows.clone(), columns.clone()),
                self.dv.block(rows, columns),
            )
        };
        product(
            dv,
            true,
            1.0,
            Mat::new(scores, count, width),
            Mat::new(buffers.grads_by_row, width, size),
        );
        // p = exp(s - lse), so ds = p · (dp - δ)
        softmax_backward(scores, score_grads, buffers.delta);
        // s = (scale·q)·kᵀ, so dk += dsᵀ·(scale·q) and d(scale·q) += ds·k
        product(
            dk,
            true,
            1.0,
            Mat::new(scores, count, width),
            Mat::new(buffers.queries_by_row, width, size),
        );
        product(
            MatMut::new(buffers.query_grads, size, width),
            true,
            1.0,
            keys.t(),
            Mat::new(scores, count, width),
        );
    }
}

/// p = exp(s - lse) in place; scores [keys, width], lse [width].
fn exp_scores(scores: &mut [f32], lse: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for row in scores.chunks_exact_mut(lse.len()) {
                for (score, lse) in row.iter_mut().zip(lse) {
                    *score = exp(*score - lse);
                }
            }
        },
    );
}

/// p becomes p · (dp - δ); both [keys, width], δ [width].
fn softmax_backward(scores: &mut [f32], score_grads: &[f32], delta: &[f32]) {
    let width = delta.len();
    vectorize(
        #[inline(always)]
        || {
            let rows = scores
                .chunks_exact_mut(width)
                .zip(score_grads.chunks_exact(width));
            for (scores, grads) in rows {
                for ((score, grad), delta) in scores.iter_mut().zip(grads).zip(delta) {
                    *score *= grad - delta;
                }
            }
        },
    );
}

/// to [cols, rows] = from [rows, cols]ᵀ.
fn transpose(to: &mut [f32], from: &[f32], rows: usize, cols: usize) {
    for (i, row) in from.chunks_exact(cols).take(rows).enumerate() {
        for (j, &x) in row.iter().enumerate() {
            to[j * rows + i] = x;
        }
    }
}
