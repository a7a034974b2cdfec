//! The path for very few queries, which is what generating text needs: no tiles, each key and
//! value is read once.

use super::{AttentionShape, QueryTile};
use crate::matmul::MatMut;
use crate::scratch::with_scratch;
use crate::simd::{self, exp, lane_max, lane_sum, vectorize};
use crate::view::View;

/// Queries times heads up to which this path is the faster one.
pub(super) const MAX_ROWS: usize = 8;

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
    let longest = tile.sight.total_keys;
    with_scratch(longest, |scratch| {
        for (i, row) in tile.rows().enumerate() {
            let seen = tile.sight.keys(tile.queries.start + i);
            let scores = &mut scratch[..seen.len()];
            for head in 0..group {
                let query = &q[row * q_width + (kv_head * group + head) * size..][..size];
                tile.sight.for_key_tiles(seen.clone(), |keys| {
                    let to = &mut scores[keys.position - seen.start..];
                    for (score, key) in to.iter_mut().zip(keys.rows) {
                        let key = &k[key * k_width + kv_head * size..][..size];
                        *score = simd::dot(query, key);
                    }
                });
                let (max, sum) = softmax(scores, shape.scale);
                let out = &mut o.row(i)[head * size..(head + 1) * size];
                out.fill(0.0);
                let factor = if sum == 0.0 { 0.0 } else { 1.0 / sum };
                tile.sight.for_key_tiles(seen.clone(), |keys| {
                    let from = &scores[keys.position - seen.start..];
                    for (score, value) in from.iter().zip(keys.rows) {
                        let value = &v[value * k_width + kv_head * size..][..size];
                        simd::axpy(out, score * factor, value);
                    }
                });
                lse.row(i)[head] = max + sum.ln();
            }
        }
    });
}

/// Scales the scores and replaces them by exp(score - max); returns the maximum and the sum.
fn softmax(scores: &mut [f32], scale: f32) -> (f32, f32) {
    vectorize(
        #[inline(always)]
        || {
            for score in scores.iter_mut() {
                *score *= scale;
            }
            let max = lane_max(scores);
            for score in scores.iter_mut() {
                *score = exp(*score - max);
            }
            (max, lane_sum(scores.len(), |i| scores[i]))
        },
    )
}
