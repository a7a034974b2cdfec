//! The path for generated queries, one a sequence: no tiles, each key and value is read once.

use std::ops::Range;

use super::sight::QueryTile;
use crate::cpu::product::mat::MatMut;
use crate::cpu::product::rows::{products_of_rows, with_packed};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{self, LANES, Weights, exp, fetch, lane_max, lane_sum, tanh, vectorize};
use crate::types::attention::AttentionShape;
use crate::view::View;

/// Attention of a tile of queries and one key/value head; `o` and `lse` are their blocks.
pub(super) fn forward(
    o: &mut MatMut<'_>,
    lse: &mut MatMut<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    tile: &QueryTile<'_>,
    kv_head: usize,
    shape: &AttentionShape,
) {
    let (group, size) = (shape.group(), shape.head_size);
    let (q_width, k_width) = (q.cols(), k.cols());
    let (q, k, v) = (q.f32s(), k.f32s(), v.f32s());
    // From the first number of the first of these rows' heads to the last of the last one's.
    let heads = |rows: &Range<usize>| {
        let first = rows.start * k_width + kv_head * size;
        first..first + rows.len().saturating_sub(1) * k_width + size
    };
    with_scratch(group * tile.sight.total_keys, |scratch| {
        for (i, row) in tile.rows().enumerate() {
            let seen = tile.sight.keys(tile.queries.start + i);
            let count = seen.len();
            let scores = &mut scratch[..group * count];
            let query = &q[row * q_width + kv_head * group * size..][..group * size];
            with_packed::<f32, _>(query, size, |query| {
                tile.sight.for_key_tiles(seen.clone(), |keys| {
                    let scores = &mut scores[keys.position - seen.start..];
                    let (rows, values) = (&k[heads(&keys.rows)], &v[heads(&keys.rows)]);
                    products_of_rows(
                        query,
                        rows,
                        k_width,
                        #[inline(always)]
                        |first, key, sums, more| {
                            for (head, sum) in (first..).zip(sums) {
                                let score = &mut scores[head * count + key];
                                *score = if more { *score + sum } else { *sum };
                            }
                            // Keys and values come from memory at the same time.
                            let value = &values[key * k_width..][..size];
                            for line in value.chunks(LANES) {
                                fetch(line.as_ptr());
                            }
                        },
                    );
                });
            });
            let out = o.row(i);
            out.fill(0.0);
            if seen.is_empty() {
                lse.row(i).fill(f32::NEG_INFINITY);
                continue;
            }
            for (scores, lse) in scores.chunks_exact_mut(count).zip(lse.row(i)) {
                *lse = softmax(scores, shape.scale, shape.softcap);
            }
            tile.sight.for_key_tiles(seen.clone(), |keys| {
                let at = keys.position - seen.start;
                let weights = Weights {
                    all: scores,
                    of_head: count,
                    rows: at..at + keys.rows.len(),
                };
                let rows = &v[heads(&keys.rows)];
                simd::add_weighted_rows(out, size, weights, rows, k_width);
            });
        }
    });
}

/// Replaces scores by their softmax after scaling and capping; returns the log-sum-exp.
fn softmax(scores: &mut [f32], scale: f32, cap: Option<f32>) -> f32 {
    vectorize(
        #[inline(always)]
        || {
            for score in scores.iter_mut() {
                *score *= scale;
            }
            if let Some(cap) = cap {
                let inverse = 1.0 / cap;
                for score in scores.iter_mut() {
                    *score = cap * tanh(*score * inverse);
                }
            }
            let max = lane_max(scores);
            for score in scores.iter_mut() {
                *score = exp(*score - max);
            }
            let sum = lane_sum([scores], |[x]| x);
            let factor = 1.0 / sum;
            for score in scores.iter_mut() {
                *score *= factor;
            }
            max + sum.ln()
        },
    )
}
