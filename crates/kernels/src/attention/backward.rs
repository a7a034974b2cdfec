//! The backward pass, a task for each part of a group of segments and key/value head.
//!
//! With p = exp(s - lse), the gradient of the scores is ds = p · (dp - δ), where dp = do·vᵀ and
//! δ = Σ p·dp over the keys of a query. The scores are computed again, tile by tile.
//!
//! δ is also Σ do·o, which needs the output but no sum over the keys first. The sum is taken all the
//! same: it belongs to the very p and dp that it is subtracted from, and nothing has to keep o.

use std::ops::Range;

use rayon::prelude::*;

use super::forward::finite_or_zero;
use super::{
    AttentionShape, KeyTile, QueryTile, Segment, TILE_KEYS, check, pack_rows, pack_transposed,
    padded, query_tiles, seen_pairs, unpack_transposed,
};
use crate::elementwise::{add_assign, set_zero};
use crate::matmul::{Mat, MatMut, Shared, product};
use crate::profile::op;
use crate::scratch::with_scratch;
use crate::simd::{exp, vectorize};
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// The gradients of [`attention_forward`](super::attention_forward); all three are overwritten.
///
/// dq, do_ and q [Tq, H·D], dk, dv, k and v [Tk, KV·D], lse [Tq, H] as the forward saved it.
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
    lse: View<'_>,
    segments: &[Segment],
    shape: &AttentionShape,
    ws: &Workspace,
) {
    let _op = op("attention backward", || 10.0 * seen_pairs(segments, shape));
    check(q, k, v, segments, shape);
    let (q_rows, q_cols, k_rows, k_cols) = (q.rows(), q.cols(), k.rows(), k.cols());
    dq.assert_shape("dq", q_rows, q_cols);
    dk.assert_shape("dk", k_rows, k_cols);
    dv.assert_shape("dv", k_rows, k_cols);
    do_.assert_shape("the output gradient of attention", q_rows, q_cols);
    lse.assert_shape("lse", q_rows, shape.heads);
    let groups = groups_that_share_keys(segments);
    let tiles: Vec<Vec<QueryTile<'_>>> = groups
        .iter()
        .map(|group| {
            let segments = group.iter().map(|&i| &segments[i]);
            query_tiles(segments, shape)
        })
        .collect();
    let parts = cut(&tiles, shape);
    let extra = parts.iter().map(|part| part.sum).max().unwrap_or(0);
    // Part 0 of each group adds to dk and dv themselves, the others to sums of their own.
    let mut sums = ws.take(2 * extra * k_rows, k_cols);
    set_zero(dq.reborrow());
    set_zero(dk.reborrow());
    set_zero(dv.reborrow());
    set_zero(sums.view_mut());
    {
        let mut outputs = vec![(dk.reborrow(), dv.reborrow())];
        let mut rest = sums.view_mut();
        for _ in 0..extra {
            let (keys, others) = rest.split_rows(k_rows);
            let (values, others) = others.split_rows(k_rows);
            outputs.push((keys, values));
            rest = others;
        }
        let task = Task {
            dq: Shared::from(dq),
            sums: outputs
                .into_iter()
                .map(|(dk, dv)| (Shared::from(dk), Shared::from(dv)))
                .collect(),
            do_,
            q,
            k,
            v,
            lse,
            shape,
        };
        (0..parts.len() * shape.kv_heads)
            .into_par_iter()
            .for_each(|i| {
                let part = &parts[i / shape.kv_heads];
                for tile in part.tiles {
                    task.run(tile, i % shape.kv_heads, part.sum);
                }
            });
    }
    let sums_view = sums.view();
    for part in 0..extra {
        let first = 2 * part * k_rows;
        let keys = sums_view.slice_rows(first..first + k_rows);
        let values = sums_view.slice_rows(first + k_rows..first + 2 * k_rows);
        add_assign(dk.reborrow(), keys);
        add_assign(dv.reborrow(), values);
    }
    ws.give(sums);
}

/// Tasks, for all key/value heads together, from which a group need not be cut in parts.
const ENOUGH_TASKS: usize = 16;
/// Parts that a group is cut in, at most: each but the first needs memory like dk and dv.
const PARTS: usize = 4;
/// Tiles of keys whose scores a task keeps until δ is known: with a whole tile of queries 512 KiB.
const KEPT_TILES: usize = 4;
/// Tiles of queries of a part, at least.
const PART_TILES: usize = 4;

/// Tiles of queries that one task takes after the other, and which sum of dk and dv they add to.
struct Part<'a> {
    tiles: &'a [QueryTile<'a>],
    sum: usize,
}

/// Cuts groups into parts if there would be too few tasks otherwise.
///
/// That depends on the segments alone and not on the number of threads, and so do the sums.
fn cut<'a>(groups: &'a [Vec<QueryTile<'a>>], shape: &AttentionShape) -> Vec<Part<'a>> {
    let enough = groups.len() * shape.kv_heads >= ENOUGH_TASKS;
    let mut parts = Vec::new();
    for tiles in groups {
        let size = if enough {
            tiles.len().max(1)
        } else {
            tiles.len().div_ceil(PARTS).max(PART_TILES)
        };
        let cut = tiles.chunks(size).enumerate();
        parts.extend(cut.map(|(sum, tiles)| Part { tiles, sum }));
    }
    parts
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
    /// Where dk and dv are summed.
    sums: Vec<(Shared<'a>, Shared<'a>)>,
    do_: View<'a>,
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
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
    /// p and then ds of up to `kept` tiles, each [keys, width].
    scores: &'a mut [f32],
    /// dp, likewise.
    score_grads: &'a mut [f32],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    fn len(size: usize, width: usize, kept: usize) -> usize {
        (5 * size + 2 * kept * TILE_KEYS + 2) * width
    }

    fn new(scratch: &'a mut [f32], size: usize, width: usize, kept: usize) -> Self {
        let (queries, scratch) = scratch.split_at_mut(size * width);
        let (queries_by_row, scratch) = scratch.split_at_mut(size * width);
        let (grads, scratch) = scratch.split_at_mut(size * width);
        let (grads_by_row, scratch) = scratch.split_at_mut(size * width);
        let (query_grads, scratch) = scratch.split_at_mut(size * width);
        let (scores, scratch) = scratch.split_at_mut(kept * TILE_KEYS * width);
        let (score_grads, scratch) = scratch.split_at_mut(kept * TILE_KEYS * width);
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
    fn run(&self, tile: &QueryTile<'_>, kv_head: usize, sum: usize) {
        let width = padded(tile.queries.len(), self.shape);
        let size = self.shape.head_size;
        let mut keys = Vec::new();
        let span = tile.sight.span(&tile.queries);
        tile.sight.for_key_tiles(span, |tile| keys.push(tile));
        let kept = keys.len().clamp(1, KEPT_TILES);
        with_scratch(Buffers::len(size, width, kept), |scratch| {
            let buffers = Buffers::new(scratch, size, width, kept);
            self.run_with(tile, &keys, kv_head, sum, buffers);
        });
    }

    fn run_with(
        &self,
        tile: &QueryTile<'_>,
        keys: &[KeyTile],
        kv_head: usize,
        sum: usize,
        mut buffers: Buffers<'_>,
    ) {
        let (group, size) = (self.shape.group(), self.shape.head_size);
        let width = buffers.delta.len();
        let first = kv_head * group;
        let (shape, scale) = (self.shape, self.shape.scale);
        pack_transposed(buffers.queries, self.q, tile.rows(), first, shape, scale);
        pack_transposed(buffers.grads, self.do_, tile.rows(), first, shape, 1.0);
        pack_rows(
            buffers.queries_by_row,
            self.q,
            tile.rows(),
            first,
            shape,
            scale,
        );
        pack_rows(
            buffers.grads_by_row,
            self.do_,
            tile.rows(),
            first,
            shape,
            1.0,
        );
        buffers.query_grads.fill(0.0);
        self.pack_lse(tile, kv_head, buffers.lse);
        buffers.delta.fill(0.0);
        // Where not all tiles can be kept until δ is known, they are computed once more.
        let all_kept = keys.len() <= KEPT_TILES;
        for (i, key_tile) in keys.iter().enumerate() {
            let slot = if all_kept { i } else { 0 };
            self.weights(tile, key_tile, kv_head, slot, &mut buffers);
            let (scores, grads) = slot_of(
                (&mut *buffers.scores, &mut *buffers.score_grads),
                slot,
                key_tile.rows.len(),
                width,
            );
            add_products(buffers.delta, scores, grads);
        }
        for (i, key_tile) in keys.iter().enumerate() {
            let slot = if all_kept { i } else { 0 };
            if !all_kept {
                self.weights(tile, key_tile, kv_head, slot, &mut buffers);
            }
            self.run_keys(key_tile, kv_head, sum, slot, &mut buffers);
        }
        #[expect(unsafe_code, reason = "tasks write disjoint blocks of dq")]
        // SAFETY: each task has other tiles of queries or another key/value head; tiles do not
        // overlap because `check` found that segments share no queries.
        let mut dq = unsafe {
            self.dq
                .block(tile.rows(), first * size..(first + group) * size)
        };
        // The scores were (scale·q)·kᵀ, so dq = scale·ds·k
        unpack_transposed(&mut dq, buffers.query_grads, self.shape, self.shape.scale);
    }

    /// lse of each query and head.
    fn pack_lse(&self, tile: &QueryTile<'_>, kv_head: usize, lse: &mut [f32]) {
        let (group, heads) = (self.shape.group(), self.shape.heads);
        let count = tile.queries.len();
        let saved = self.lse.f32s();
        lse.fill(0.0);
        for (i, row) in tile.rows().enumerate() {
            for head in 0..group {
                let h = kv_head * group + head;
                lse[head * count + i] = finite_or_zero(saved[row * heads + h]);
            }
        }
    }

    /// p and dp of a tile of keys.
    fn weights(
        &self,
        tile: &QueryTile<'_>,
        key_tile: &KeyTile,
        kv_head: usize,
        slot: usize,
        buffers: &mut Buffers<'_>,
    ) {
        let size = self.shape.head_size;
        let columns = kv_head * size..(kv_head + 1) * size;
        let rows = key_tile.rows.clone();
        let (count, width) = (rows.len(), buffers.delta.len());
        let keys = self.k.as_mat().block(rows.clone(), columns.clone());
        let values = self.v.as_mat().block(rows, columns);
        let (scores, score_grads) = slot_of(
            (&mut *buffers.scores, &mut *buffers.score_grads),
            slot,
            count,
            width,
        );
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
        // o = p·v, so dp = do·vᵀ
        product(
            MatMut::new(score_grads, count, width),
            false,
            1.0,
            values,
            Mat::new(buffers.grads, size, width),
        );
        exp_scores(scores, buffers.lse);
    }

    /// What a tile of keys adds to all gradients, from its p and dp.
    fn run_keys(
        &self,
        key_tile: &KeyTile,
        kv_head: usize,
        sum: usize,
        slot: usize,
        buffers: &mut Buffers<'_>,
    ) {
        let size = self.shape.head_size;
        let columns = kv_head * size..(kv_head + 1) * size;
        let rows = key_tile.rows.clone();
        let (count, width) = (rows.len(), buffers.delta.len());
        let keys = self.k.as_mat().block(rows.clone(), columns.clone());
        let (scores, score_grads) = slot_of(
            (&mut *buffers.scores, &mut *buffers.score_grads),
            slot,
            count,
            width,
        );
        let (dk, dv) = &self.sums[sum];
        #[expect(unsafe_code, reason = "tasks write disjoint blocks of dk and dv")]
        // SAFETY: a task has its key/value head to itself; of the tasks with the same head, no two
        // of one group have the same sum, and groups share no keys; a task's tiles come one after
        // the other.
        let (dk, dv) = unsafe {
            (
                dk.block(rows.clone(), columns.clone()),
                dv.block(rows, columns),
            )
        };
        // o = p·v, so dv += pᵀ·do
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

/// Scores and their gradients of one of the tiles that are kept.
fn slot_of<'a>(
    (scores, grads): (&'a mut [f32], &'a mut [f32]),
    slot: usize,
    count: usize,
    width: usize,
) -> (&'a mut [f32], &'a mut [f32]) {
    let start = slot * TILE_KEYS * width;
    let part = start..start + count * width;
    (&mut scores[part.clone()], &mut grads[part])
}

/// δ += Σ over the keys of p · dp; both [keys, width], δ [width].
fn add_products(delta: &mut [f32], scores: &[f32], grads: &[f32]) {
    let width = delta.len();
    vectorize(
        #[inline(always)]
        || {
            let rows = scores.chunks_exact(width).zip(grads.chunks_exact(width));
            for (scores, grads) in rows {
                for ((delta, score), grad) in delta.iter_mut().zip(scores).zip(grads) {
                    *delta += score * grad;
                }
            }
        },
    );
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
