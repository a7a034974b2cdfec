//! The backward pass, a task for each part of a group of segments and key/value head.
//!
//! With p = exp(s - lse), the gradient of the scores is ds = p · (dp - δ), where dp = do·vᵀ and
//! δ = Σ p·dp over the keys of a query. The scores are computed again, tile by tile. Where they are capped, ds is multiplied with
//! the cap's slope.
//!
//! δ is also Σ do·o, which needs the output but no sum over the keys first. The sum is taken all the
//! same: it belongs to the very p and dp that it is subtracted from, and nothing has to keep o.

use std::ops::Range;

use rayon::prelude::*;

use super::columns::{Columns, cap_scores_with_slopes, finite_or_zero};
#[cfg(target_arch = "x86_64")]
use super::rounded;
use super::sight::{KeyTile, PAIR, Panels, QueryTile, TILE_KEYS, multiply_pair, query_tiles};
use crate::cpu::elementwise::{add_assign, set_zero};
use crate::cpu::parallel::ForEachPart;
use crate::cpu::product::blocks::{add_pair, add_rows, pack_rows};
use crate::cpu::product::layout::{Left, MR, NR};
use crate::cpu::product::mat::{Mat, MatMut, Shared};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{exp, vectorize};
use crate::types::attention::{AttentionShape, Segment};
use crate::types::compute::ComputeDType;
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

pub(crate) fn attention_backward(
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
    compute: ComputeDType,
    ws: &Workspace,
) {
    let (k_rows, k_cols) = (k.rows(), k.cols());
    let rounds = compute.rounds_here();
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
            .for_each_part(|i| {
                let part = &parts[i / shape.kv_heads];
                for tile in part.tiles {
                    if rounds {
                        #[cfg(target_arch = "x86_64")]
                        rounded::backward(&task, tile, i % shape.kv_heads, part.sum);
                    } else {
                        task.run(tile, i % shape.kv_heads, part.sum);
                    }
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
/// Tiles of keys whose scores a task keeps until δ is known: with a whole tile of queries 3 MiB. Computing them again takes several
/// times as long as reading them, even from the L3 cache.
pub(super) const KEPT_TILES: usize = 16;
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

pub(super) struct Task<'a> {
    pub(super) dq: Shared<'a>,
    /// Where dk and dv are summed.
    pub(super) sums: Vec<(Shared<'a>, Shared<'a>)>,
    pub(super) do_: View<'a>,
    pub(super) q: View<'a>,
    pub(super) k: View<'a>,
    pub(super) v: View<'a>,
    pub(super) lse: View<'a>,
    pub(super) shape: &'a AttentionShape,
}

/// The packed inputs and the temporaries of a tile of queries and a key/value head.
struct Buffers<'a> {
    columns: Columns,
    /// scale·q and do as panels [panels][D][16].
    queries: &'a mut [f32],
    grads: &'a mut [f32],
    /// The same as panels [⌈D / 16⌉][columns][16].
    query_rows: &'a mut [f32],
    grad_rows: &'a mut [f32],
    /// d(scale·q), panels [panels][D][16].
    query_grads: &'a mut [f32],
    /// p of up to `kept` tiles, each [panels][keys][16].
    weights: &'a mut [f32],
    /// dp and then ds, likewise.
    score_grads: &'a mut [f32],
    /// The cap's slope at each score, likewise; empty where scores have no cap.
    slopes: &'a mut [f32],
    /// kᵀ of a tile, as [`pack_rows`] lays it.
    keys: &'a mut [f32],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    /// Numbers of a part of each kind.
    fn lens(columns: &Columns, size: usize, kept: usize, is_capped: bool) -> [usize; 11] {
        let width = columns.panels() * NR;
        let (turned, straight) = (width * size, width * size.next_multiple_of(NR));
        let scores = kept * TILE_KEYS * width;
        let slopes = if is_capped { scores } else { 0 };
        let keys = size.next_multiple_of(MR) * TILE_KEYS;
        [
            turned, turned, straight, straight, turned, scores, scores, slopes, keys, width, width,
        ]
    }

    fn new(mut scratch: &'a mut [f32], columns: Columns, lens: [usize; 11]) -> Self {
        let [
            queries,
            grads,
            query_rows,
            grad_rows,
            query_grads,
            weights,
            score_grads,
            slopes,
            keys,
            lse,
            delta,
        ] = lens.map(|len| {
            let (part, rest) = std::mem::take(&mut scratch).split_at_mut(len);
            scratch = rest;
            part
        });
        Self {
            columns,
            queries,
            grads,
            query_rows,
            grad_rows,
            query_grads,
            weights,
            score_grads,
            slopes,
            keys,
            lse,
            delta,
        }
    }
}

impl Task<'_> {
    /// The block of dq that belongs to the queries of a tile and a key/value head. A task calls this once.
    #[expect(unsafe_code, reason = "tasks write disjoint blocks of dq")]
    pub(super) fn query_output(&self, rows: Range<usize>, kv_head: usize) -> MatMut<'_> {
        let (group, size) = (self.shape.group(), self.shape.head_size);
        let first = kv_head * group;
        // SAFETY: each task has other tiles of queries or another key/value head; tiles do not overlap because `check` found that
        // segments share no queries.
        unsafe { self.dq.block(rows, first * size..(first + group) * size) }
    }

    /// The blocks of dk and dv that a tile of keys adds to. A task has these of one tile at a time.
    #[expect(unsafe_code, reason = "tasks write disjoint blocks of dk and dv")]
    pub(super) fn key_outputs(
        &self,
        rows: Range<usize>,
        kv_head: usize,
        sum: usize,
    ) -> (MatMut<'_>, MatMut<'_>) {
        let size = self.shape.head_size;
        let across = kv_head * size..(kv_head + 1) * size;
        let (dk, dv) = &self.sums[sum];
        // SAFETY: a task has its key/value head to itself; of the tasks with the same head, no two of one group have the same sum, and
        // groups share no keys; a task's tiles come one after the other.
        unsafe {
            (
                dk.block(rows.clone(), across.clone()),
                dv.block(rows, across),
            )
        }
    }

    fn run(&self, tile: &QueryTile<'_>, kv_head: usize, sum: usize) {
        let size = self.shape.head_size;
        let columns = Columns::new(tile, kv_head, self.shape);
        let mut keys = Vec::new();
        let span = tile.sight.span(&tile.queries);
        tile.sight.for_key_tiles(span, |tile| keys.push(tile));
        let kept = keys.len().clamp(1, KEPT_TILES);
        let lens = Buffers::lens(&columns, size, kept, self.shape.softcap.is_some());
        with_scratch(lens.iter().sum(), |scratch| {
            let buffers = Buffers::new(scratch, columns, lens);
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
        let (columns, rows, scale) = (buffers.columns, tile.rows(), self.shape.scale);
        columns.pack_turned(buffers.queries, self.q, &rows, scale);
        columns.pack_turned(buffers.grads, self.do_, &rows, 1.0);
        columns.pack_straight(buffers.query_rows, self.q, &rows, scale);
        columns.pack_straight(buffers.grad_rows, self.do_, &rows, 1.0);
        buffers.query_grads.fill(0.0);
        self.pack_lse(&rows, kv_head, &columns, buffers.lse);
        buffers.delta.fill(0.0);
        // Where not all tiles can be kept until δ is known, they are computed once more.
        let all_kept = keys.len() <= KEPT_TILES;
        for (i, key_tile) in keys.iter().enumerate() {
            let slot = if all_kept { i } else { 0 };
            self.weights(tile, key_tile, kv_head, slot, &mut buffers);
            for pair in 0..columns.pairs() {
                let seen = columns.sees(pair, tile, key_tile).all;
                for panel in columns.pair(pair) {
                    let part = columns.scores(slot, panel);
                    add_products(
                        &mut buffers.delta[panel * NR..][..NR],
                        &buffers.weights[part.clone()][..seen.len() * NR],
                        &buffers.score_grads[part][..seen.len() * NR],
                    );
                }
            }
        }
        for (i, key_tile) in keys.iter().enumerate() {
            let slot = if all_kept { i } else { 0 };
            if !all_kept {
                self.weights(tile, key_tile, kv_head, slot, &mut buffers);
            }
            self.run_keys(tile, key_tile, kv_head, sum, slot, &mut buffers);
        }
        let mut dq = self.query_output(rows, kv_head);
        // The scores were (scale·q)·kᵀ, so dq = scale·ds·k
        buffers.delta.fill(scale);
        columns.unpack(&mut dq, buffers.query_grads, buffers.delta);
    }

    /// lse of each column; zero past the last.
    pub(super) fn pack_lse(
        &self,
        rows: &Range<usize>,
        kv_head: usize,
        columns: &Columns,
        to: &mut [f32],
    ) {
        let heads = self.shape.heads;
        let saved = self.lse.f32s();
        let first = kv_head * self.shape.group();
        to.fill(0.0);
        for (column, lse) in to[..columns.len()].iter_mut().enumerate() {
            let (query, head) = columns.at(column);
            *lse = finite_or_zero(saved[(rows.start + query) * heads + first + head]);
        }
    }

    /// p and dp of a tile of keys: for each panel those that it sees.
    fn weights(
        &self,
        tile: &QueryTile<'_>,
        key_tile: &KeyTile,
        kv_head: usize,
        slot: usize,
        buffers: &mut Buffers<'_>,
    ) {
        let (columns, size) = (buffers.columns, self.shape.head_size);
        let across = kv_head * size..(kv_head + 1) * size;
        let keys = self.k.as_mat().block(key_tile.rows.clone(), across.clone());
        let values = self.v.as_mat().block(key_tile.rows.clone(), across);
        for pair in 0..columns.pairs() {
            let seen = columns.sees(pair, tile, key_tile);
            let pair = columns.pair(pair);
            let count = seen.all.len();
            if count == 0 {
                continue;
            }
            let part = columns.scores(slot, pair.start).start;
            let part = part..part + pair.len() * TILE_KEYS * NR;
            let times = |to: &mut [f32], left: Mat<'_>, panels: &[f32]| {
                let left = Left::in_place(left.block(seen.all.clone(), 0..size));
                let right = Panels {
                    numbers: &panels[pair.start * size * NR..pair.end * size * NR],
                    apart: size * NR,
                };
                multiply_pair::<1>((to, TILE_KEYS * NR), count, false, left, &right);
            };
            // s = (scale·q)·kᵀ
            let weights = &mut buffers.weights[part.clone()];
            times(weights, keys, buffers.queries);
            // o = p·v, so dp = do·vᵀ
            times(
                &mut buffers.score_grads[part.clone()],
                values,
                buffers.grads,
            );
            for (i, weights) in weights.chunks_exact_mut(TILE_KEYS * NR).enumerate() {
                let weights = &mut weights[..count * NR];
                if let Some(cap) = self.shape.softcap {
                    let at = part.start + i * TILE_KEYS * NR;
                    let slopes = &mut buffers.slopes[at..at + count * NR];
                    cap_scores_with_slopes(weights, slopes, cap);
                }
                seen.mask(i, weights.as_chunks_mut().0);
                exp_scores(weights, &buffers.lse[(pair.start + i) * NR..][..NR]);
            }
        }
    }

    /// What a tile of keys adds to all gradients, from its p and dp.
    fn run_keys(
        &self,
        tile: &QueryTile<'_>,
        key_tile: &KeyTile,
        kv_head: usize,
        sum: usize,
        slot: usize,
        buffers: &mut Buffers<'_>,
    ) {
        let size = self.shape.head_size;
        let across = kv_head * size..(kv_head + 1) * size;
        let rows = key_tile.rows.clone();
        let count = rows.len();
        let (mut dk, mut dv) = self.key_outputs(rows.clone(), kv_head, sum);
        let columns = buffers.columns;
        let panels = columns.panels();
        let seen: Vec<Range<usize>> = (0..columns.pairs())
            .map(|pair| columns.sees(pair, tile, key_tile).all)
            .collect();
        let keys = self.k.as_mat().block(rows, across);
        let packed = &mut buffers.keys[..size.next_multiple_of(MR) * count];
        pack_rows(packed, &std::iter::once(keys.t()), count);
        for (pair, seen) in seen.iter().enumerate().filter(|(_, seen)| !seen.is_empty()) {
            let pair = columns.pair(pair);
            for panel in pair.clone() {
                let part = columns.scores(slot, panel);
                let grads = &mut buffers.score_grads[part.clone()][..seen.len() * NR];
                let weights = &buffers.weights[part.clone()][..seen.len() * NR];
                // p = exp(s - lse), so ds = p · (dp - δ)
                softmax_backward(grads, weights, &buffers.delta[panel * NR..][..NR]);
                if self.shape.softcap.is_some() {
                    multiply(grads, &buffers.slopes[part][..seen.len() * NR]);
                }
            }
            // s = (scale·q)·kᵀ, so d(scale·q) += ds·k
            let left = Left {
                data: &packed[seen.start * MR..],
                row_stride: count,
                inner: seen.len(),
            };
            let part = columns.scores(slot, pair.start);
            let right = Panels {
                numbers: &buffers.score_grads[part][..pair.len() * TILE_KEYS * NR],
                apart: TILE_KEYS * NR,
            };
            let to = &mut buffers.query_grads[pair.start * size * NR..pair.end * size * NR];
            multiply_pair::<MR>((to, size * NR), size, true, left, &right);
        }
        // o = p·v, so dv += pᵀ·do, and s = (scale·q)·kᵀ, so dk += dsᵀ·(scale·q)
        let mut lefts = Vec::with_capacity(panels);
        for (to, scores, grads) in [
            (&mut dv, &*buffers.weights, &*buffers.grad_rows),
            (&mut dk, &*buffers.score_grads, &*buffers.query_rows),
        ] {
            let mut first = 0;
            while first < count {
                // Rows that the same panels see.
                let sees = |seen: &Range<usize>| seen.contains(&first);
                let Some(from) = seen.iter().position(sees) else {
                    first += 1;
                    continue;
                };
                let some = seen[from..].iter().take_while(|seen| sees(seen)).count();
                let edges = seen.iter().flat_map(|seen| [seen.start, seen.end]);
                let end = edges.filter(|edge| *edge > first).min().unwrap_or(count);
                let some = PAIR * from..(PAIR * (from + some)).min(panels);
                lefts.clear();
                lefts.extend(some.clone().map(|panel| {
                    let start = (slot * panels + panel) * TILE_KEYS + first;
                    Left {
                        data: &scores[(start - seen[panel / PAIR].start) * NR..],
                        row_stride: NR,
                        inner: NR,
                    }
                }));
                let right = |col: usize| {
                    let first = col / NR * panels;
                    &grads[(first + some.start) * NR * NR..(first + some.end) * NR * NR]
                };
                for col in (0..size).step_by(2 * NR) {
                    if col + 2 * NR <= size {
                        let outs = to.window(first..end, col..col + 2 * NR).split_columns(NR);
                        add_pair::<1>(outs, true, &lefts, (right(col), right(col + NR)));
                        continue;
                    }
                    for col in (col..size).step_by(NR) {
                        add_rows::<1>(to, first, end - first, col, true, &lefts, right(col));
                    }
                }
                first = end;
            }
        }
    }
}

/// δ += Σ over the keys of p · dp; both [keys, 16].
fn add_products(delta: &mut [f32], weights: &[f32], grads: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            let mut sums = [0.0; NR];
            let rows = weights.as_chunks::<NR>().0.iter();
            for (weights, grads) in rows.zip(grads.as_chunks::<NR>().0) {
                for ((sum, weight), grad) in sums.iter_mut().zip(weights).zip(grads) {
                    *sum += weight * grad;
                }
            }
            for (delta, sum) in delta.iter_mut().zip(sums) {
                *delta += sum;
            }
        },
    );
}

/// p = exp(s - lse) in place; scores [keys, 16].
fn exp_scores(scores: &mut [f32], lse: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            let mut base = [0.0; NR];
            base.copy_from_slice(lse);
            for row in scores.as_chunks_mut::<NR>().0 {
                for (score, lse) in row.iter_mut().zip(&base) {
                    *score = exp(*score - lse);
                }
            }
        },
    );
}

/// grads *= slopes.
fn multiply(grads: &mut [f32], slopes: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (grad, slope) in grads.iter_mut().zip(slopes) {
                *grad *= slope;
            }
        },
    );
}

/// dp becomes ds = p · (dp - δ); both [keys, 16].
fn softmax_backward(grads: &mut [f32], weights: &[f32], delta: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            let mut deltas = [0.0; NR];
            deltas.copy_from_slice(delta);
            let rows = grads.as_chunks_mut::<NR>().0.iter_mut();
            for (grads, weights) in rows.zip(weights.as_chunks::<NR>().0) {
                for ((grad, weight), delta) in grads.iter_mut().zip(weights).zip(&deltas) {
                    *grad = weight * (*grad - delta);
                }
            }
        },
    );
}
