//! The forward pass, a task for each tile of queries and key/value head.

use super::columns::{Columns, cap_scores, finite_or_zero};
#[cfg(target_arch = "x86_64")]
use super::rounded;
use super::sight::{PAIR, Panels, QueryTile, TILE_KEYS, multiply_pair, query_tiles};
use super::single;
use crate::cpu::parallel::for_runs;
use crate::cpu::product::blocks::pack_rows;
use crate::cpu::product::layout::{Left, MR, NR};
use crate::cpu::product::mat::{MatMut, Shared};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{exp, vectorize};
use crate::types::attention::{AttentionShape, Segment};
use crate::types::classes::RowClasses;
use crate::types::compute::ComputeDType;
use crate::view::{View, ViewMut};

/// Products of numbers below which handing work to another thread costs more than it saves.
const SMALL: usize = 32 * 1024;

pub(crate) fn attention_forward(
    o: ViewMut<'_>,
    lse: ViewMut<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    segments: &[Segment],
    shape: &AttentionShape,
    classes: RowClasses,
    compute: ComputeDType,
) {
    let task = Task {
        o: Shared::from(o),
        lse: Shared::from(lse),
        q,
        k,
        v,
        shape,
    };
    let rounds = compute.rounds_here();
    let tiles = query_tiles(segments, shape);
    let tasks = tiles.len() * shape.kv_heads;
    let run = |i: usize| {
        let tile = &tiles[i / shape.kv_heads];
        let kv_head = i % shape.kv_heads;
        if tile.is_generated(classes) {
            task.run_single(tile, kv_head);
        } else if rounds {
            #[cfg(target_arch = "x86_64")]
            rounded::forward(&task, tile, kv_head);
        } else {
            task.run(tile, kv_head);
        }
    };
    let pairs = |tile: &QueryTile<'_>| tile.queries.len() * tile.sight.total_keys;
    let products = tiles.iter().map(pairs).sum::<usize>() * q.cols();
    if products < SMALL {
        (0..tasks).for_each(run);
    } else {
        for_runs(tasks, run);
    }
}

pub(super) struct Task<'a> {
    pub(super) o: Shared<'a>,
    pub(super) lse: Shared<'a>,
    pub(super) q: View<'a>,
    pub(super) k: View<'a>,
    pub(super) v: View<'a>,
    pub(super) shape: &'a AttentionShape,
}

impl Task<'_> {
    /// The blocks of o and lse that belong to a tile of queries and a key/value head.
    #[expect(unsafe_code, reason = "tasks write disjoint blocks of the outputs")]
    pub(super) fn outputs(&self, tile: &QueryTile<'_>, kv_head: usize) -> (MatMut<'_>, MatMut<'_>) {
        let (group, size) = (self.shape.group(), self.shape.head_size);
        let heads = kv_head * group..(kv_head + 1) * group;
        // SAFETY: each task has another tile of queries or another key/value head; tiles do not
        // overlap because `check` found that segments share no queries; a task calls this once.
        unsafe {
            (
                self.o
                    .block(tile.rows(), heads.start * size..heads.end * size),
                self.lse.block(tile.rows(), heads),
            )
        }
    }

    fn run_single(&self, tile: &QueryTile<'_>, kv_head: usize) {
        let (mut o, mut lse) = self.outputs(tile, kv_head);
        single::forward(
            &mut o, &mut lse, self.q, self.k, self.v, tile, kv_head, self.shape,
        );
    }

    fn run(&self, tile: &QueryTile<'_>, kv_head: usize) {
        let size = self.shape.head_size;
        let columns = Columns::new(tile, kv_head, self.shape);
        let panels = columns.panels();
        let across = kv_head * size..(kv_head + 1) * size;
        let (keys, values) = (self.k.as_mat(), self.v.as_mat());
        let packed = size.next_multiple_of(MR) * TILE_KEYS;
        let len = panels * (2 * size + 2) * NR + PAIR * TILE_KEYS * NR + packed;
        with_scratch(len, |scratch| {
            let (queries, scratch) = scratch.split_at_mut(panels * size * NR);
            let (out, scratch) = scratch.split_at_mut(panels * size * NR);
            let (max, scratch) = scratch.split_at_mut(panels * NR);
            let (sum, scratch) = scratch.split_at_mut(panels * NR);
            let (scores, packed) = scratch.split_at_mut(PAIR * TILE_KEYS * NR);
            columns.pack_turned(queries, self.q, &tile.rows(), self.shape.scale);
            max.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            let mut begun = vec![false; columns.pairs()];
            tile.sight
                .for_key_tiles(tile.sight.span(&tile.queries), |key_tile| {
                    let rows = key_tile.rows.clone();
                    let count = rows.len();
                    let keys = keys.block(rows.clone(), across.clone());
                    let values = values.block(rows, across.clone());
                    let packed = &mut packed[..size.next_multiple_of(MR) * count];
                    pack_rows(packed, &std::iter::once(values.t()), count);
                    for (pair, begun) in begun.iter_mut().enumerate() {
                        let seen = columns.sees(pair, tile, &key_tile);
                        if seen.all.is_empty() {
                            continue;
                        }
                        let pair = columns.pair(pair);
                        let part = pair.start * size * NR..pair.end * size * NR;
                        // s = (scale·q)·kᵀ
                        let count_seen = seen.all.len();
                        let scores = &mut scores[..pair.len() * TILE_KEYS * NR];
                        let left = Left::in_place(keys.block(seen.all.clone(), 0..size));
                        let right = Panels {
                            numbers: &queries[part.clone()],
                            apart: size * NR,
                        };
                        let to = (&mut *scores, TILE_KEYS * NR);
                        multiply_pair::<1>(to, count_seen, false, left, &right);
                        for (i, panel) in pair.enumerate() {
                            let scores = &mut scores[i * TILE_KEYS * NR..][..count_seen * NR];
                            if let Some(cap) = self.shape.softcap {
                                cap_scores(scores, cap);
                            }
                            seen.mask(i, scores.as_chunks_mut().0);
                            let stats = panel * NR..(panel + 1) * NR;
                            let shrink =
                                online_softmax(scores, &mut max[stats.clone()], &mut sum[stats]);
                            if *begun {
                                scale_columns(&mut out[panel * size * NR..][..size * NR], &shrink);
                            }
                        }
                        // o += p·v
                        let left = Left {
                            data: &packed[seen.all.start * MR..],
                            row_stride: count,
                            inner: count_seen,
                        };
                        let right = Panels {
                            numbers: scores,
                            apart: TILE_KEYS * NR,
                        };
                        let to = (&mut out[part], size * NR);
                        multiply_pair::<MR>(to, size, *begun, left, &right);
                        *begun = true;
                    }
                });
            for (pair, _) in begun.iter().enumerate().filter(|(_, begun)| !**begun) {
                let pair = columns.pair(pair);
                out[pair.start * size * NR..pair.end * size * NR].fill(0.0);
            }
            let (mut o, mut lse) = self.outputs(tile, kv_head);
            for column in 0..columns.len() {
                let (query, head) = columns.at(column);
                lse.row(query)[head] = max[column] + sum[column].ln();
            }
            for sum in sum.iter_mut() {
                // Zero if no key was seen.
                *sum = if *sum == 0.0 { 0.0 } else { 1.0 / *sum };
            }
            columns.unpack(&mut o, out, sum);
        });
    }
}

/// Turns scores [keys, 16] into exp(score - max) with the maximum so far, and updates the maximum and the sum of each column;
/// gives what earlier results are to be multiplied by.
fn online_softmax(scores: &mut [f32], max: &mut [f32], sum: &mut [f32]) -> [f32; NR] {
    let mut shrink = [0.0; NR];
    vectorize(
        #[inline(always)]
        || {
            let scores = scores.as_chunks_mut::<NR>().0;
            let mut largest = [0.0; NR];
            largest.copy_from_slice(max);
            for row in scores.iter() {
                for (max, &score) in largest.iter_mut().zip(row) {
                    // The other way round from `max`, so that NaN goes through.
                    *max = if score <= *max { *max } else { score };
                }
            }
            let mut base = [0.0; NR];
            for (base, &max) in base.iter_mut().zip(&largest) {
                *base = finite_or_zero(max);
            }
            let mut sums = [0.0; NR];
            for row in scores.iter_mut() {
                for ((score, &base), sum) in row.iter_mut().zip(&base).zip(&mut sums) {
                    *score = exp(*score - base);
                    *sum += *score;
                }
            }
            for j in 0..NR {
                shrink[j] = exp(max[j] - base[j]);
                sum[j] = sum[j] * shrink[j] + sums[j];
                max[j] = largest[j];
            }
        },
    );
    shrink
}

/// Multiplies each column of a panel by a factor.
fn scale_columns(panel: &mut [f32], factors: &[f32; NR]) {
    vectorize(
        #[inline(always)]
        || {
            for row in panel.as_chunks_mut::<NR>().0 {
                for (x, factor) in row.iter_mut().zip(factors) {
                    *x *= factor;
                }
            }
        },
    );
}
