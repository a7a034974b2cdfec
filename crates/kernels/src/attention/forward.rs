//! The forward pass, a task for each tile of queries and key/value head.

use super::{
    AttentionShape, QueryTile, Segment, TILE_KEYS, check, pack_rows, padded, query_tiles,
    seen_pairs, single, unpack_transposed,
};
use crate::matmul::{Mat, MatMut, Shared, product};
use crate::parallel::for_runs;
use crate::profile::op;
use crate::scratch::with_scratch;
use crate::simd::{exp, vectorize};
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// Products of numbers below which handing work to another thread costs more than it saves.
const SMALL: usize = 32 * 1024;

/// o = softmax(scale · q·kᵀ) · v for every segment and head.
///
/// o and q [Tq, H·D], lse [Tq, H] saved for the backward, k and v [Tk, KV·D]. o and lse are
/// overwritten in the rows of the segments; other rows are left as they are. A query that sees no
/// key gets zeros and an lse of -∞. The workspace is for devices that need temporaries here; this
/// one does not.
///
/// # Panics
/// If the shapes do not match, if a range does not lie within them, or if segments share queries.
pub fn attention_forward(
    o: ViewMut<'_>,
    lse: ViewMut<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    segments: &[Segment],
    shape: &AttentionShape,
    _ws: &Workspace,
) {
    let _op = op("attention forward", || 4.0 * seen_pairs(segments, shape));
    check(q, k, v, segments, shape);
    o.assert_shape("the output of attention", q.rows(), q.cols());
    lse.assert_shape("lse", q.rows(), shape.heads);
    let task = Task {
        o: Shared::from(o),
        lse: Shared::from(lse),
        q,
        k,
        v,
        shape,
    };
    let tiles = query_tiles(segments, shape);
    let tasks = tiles.len() * shape.kv_heads;
    let run = |i: usize| {
        let tile = &tiles[i / shape.kv_heads];
        let kv_head = i % shape.kv_heads;
        if tile.queries.len() * shape.group() <= single::MAX_ROWS {
            task.run_single(tile, kv_head);
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

struct Task<'a> {
    o: Shared<'a>,
    lse: Shared<'a>,
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    shape: &'a AttentionShape,
}

impl Task<'_> {
    /// The blocks of o and lse that belong to a tile of queries and a key/value head.
    #[expect(unsafe_code, reason = "tasks write disjoint blocks of the outputs")]
    fn outputs(&self, tile: &QueryTile<'_>, kv_head: usize) -> (MatMut<'_>, MatMut<'_>) {
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
        let (group, size) = (self.shape.group(), self.shape.head_size);
        let count = tile.queries.len();
        let width = padded(count, self.shape);
        let columns = kv_head * size..(kv_head + 1) * size;
        let (keys, values) = (self.k.as_mat(), self.v.as_mat());
        with_scratch((2 * size + TILE_KEYS + 3) * width, |scratch| {
            let (queries, scratch) = scratch.split_at_mut(size * width);
            let (out, scratch) = scratch.split_at_mut(size * width);
            let (scores, scratch) = scratch.split_at_mut(TILE_KEYS * width);
            let (max, scratch) = scratch.split_at_mut(width);
            let (sum, shrink) = scratch.split_at_mut(width);
            pack_rows(
                queries,
                self.q,
                tile.rows(),
                kv_head * group,
                self.shape,
                self.shape.scale,
            );
            out.fill(0.0);
            max.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            let query_mat = Mat::new(queries, width, size).t();
            tile.sight
                .for_key_tiles(tile.sight.span(&tile.queries), |key_tile| {
                    let rows = key_tile.rows.clone();
                    let scores = &mut scores[..rows.len() * width];
                    product(
                        MatMut::new(scores, rows.len(), width),
                        false,
                        1.0,
                        keys.block(rows.clone(), columns.clone()),
                        query_mat,
                    );
                    tile.sight
                        .mask(scores, width, &key_tile, &tile.queries, group);
                    online_softmax(scores, max, sum, shrink);
                    scale_columns(out, shrink);
                    product(
                        MatMut::new(out, size, width),
                        true,
                        1.0,
                        values.block(rows.clone(), columns.clone()).t(),
                        Mat::new(scores, rows.len(), width),
                    );
                });
            let (mut o, mut lse) = self.outputs(tile, kv_head);
            for i in 0..count {
                for (head, lse) in lse.row(i).iter_mut().enumerate() {
                    let column = head * count + i;
                    *lse = max[column] + sum[column].ln();
                }
            }
            for sum in sum.iter_mut() {
                // Zero if no key was seen.
                *sum = if *sum == 0.0 { 0.0 } else { 1.0 / *sum };
            }
            scale_columns(out, sum);
            unpack_transposed(&mut o, out, self.shape, 1.0);
        });
    }
}

/// Turns scores [keys, width] into exp(score - max) with the maximum so far, and updates the
/// maximum and the sum of each column; `shrink` is what earlier results are to be multiplied by.
fn online_softmax(scores: &mut [f32], max: &mut [f32], sum: &mut [f32], shrink: &mut [f32]) {
    let width = max.len();
    vectorize(
        #[inline(always)]
        || {
            shrink.copy_from_slice(max);
            for row in scores.chunks_exact(width) {
                for (max, &score) in max.iter_mut().zip(row) {
                    // The other way round from `max`, so that NaN goes through.
                    *max = if score <= *max { *max } else { score };
                }
            }
            for ((shrink, &max), sum) in shrink.iter_mut().zip(&*max).zip(&mut *sum) {
                *shrink = exp(*shrink - finite_or_zero(max));
                *sum *= *shrink;
            }
            for row in scores.chunks_exact_mut(width) {
                for ((score, &max), sum) in row.iter_mut().zip(&*max).zip(&mut *sum) {
                    *score = exp(*score - finite_or_zero(max));
                    *sum += *score;
                }
            }
        },
    );
}

/// Where nothing has been seen the maximum is -∞, and -∞ - -∞ is NaN.
#[inline(always)]
pub(super) fn finite_or_zero(x: f32) -> f32 {
    if x == f32::NEG_INFINITY { 0.0 } else { x }
}

/// Multiplies each column of a matrix by a factor.
fn scale_columns(matrix: &mut [f32], factors: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for row in matrix.chunks_exact_mut(factors.len()) {
                for (x, factor) in row.iter_mut().zip(factors) {
                    *x *= factor;
                }
            }
        },
    );
}
