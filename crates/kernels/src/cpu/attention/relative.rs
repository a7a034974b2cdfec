//! Attention with terms of relative positions, a task for each segment and head.
//!
//! A term q_i·kr[b(i - j)] is read from q·krᵀ, which has a column for each position that the segment's distances reach; those are at
//! most 2n - 1 for n rows, and at most all there are. Rows of queries come a tile at a time, so that no n × n matrix exists.
//!
//! The backward computes the scores again. With ds = p · (dp - δ) as in attention without positions, the gradient of q·krᵀ is the
//! sum of ds over the keys that share a position, and from there on everything is a product.

use std::ops::Range;

use rayon::prelude::*;

use super::columns::finite_or_zero;
use crate::cpu::elementwise::{add_assign, set_zero};
use crate::cpu::parallel::{ForEachPart, for_runs};
use crate::cpu::product::mat::{Mat, MatMut, Shared};
use crate::cpu::product::multiply::product;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{exp, lane_max, lane_sum, vectorize};
use crate::types::relative::{
    RelativeGradients, RelativePositions, RelativeSegment, RelativeShape,
};
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// Rows of queries of a tile.
const TILE: usize = 64;
/// Products of numbers below which handing work to another thread costs more than it saves.
const SMALL: usize = 32 * 1024;
/// Tasks, for all heads together, from which segments need not be cut in parts.
const ENOUGH_TASKS: usize = 16;
/// Parts that segments are cut in, at most: each but the first needs memory like the positions.
const PARTS: usize = 4;

pub(crate) fn relative_attention_forward(
    o: ViewMut<'_>,
    lse: ViewMut<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    positions: RelativePositions<'_>,
    segments: &[RelativeSegment],
    shape: &RelativeShape<'_>,
) {
    let inputs = Inputs {
        q,
        k,
        v,
        positions,
        shape,
    };
    let (o, lse) = (Shared::from(o), Shared::from(lse));
    let run = |i: usize| {
        let (segment, head) = (&segments[i / shape.heads], i % shape.heads);
        if segment.rows.is_empty() {
            return;
        }
        let across = inputs.across(head);
        #[expect(unsafe_code, reason = "tasks write disjoint blocks of the outputs")]
        // SAFETY: each task has another segment or another head; segments do not overlap because `check` found that they share no
        // rows.
        let (o, lse) = unsafe {
            (
                o.block(segment.rows.clone(), across),
                lse.block(segment.rows.clone(), head..head + 1),
            )
        };
        forward(&inputs.part(segment, head), o, lse);
    };
    let tasks = segments.len() * shape.heads;
    let pairs = segments.iter().map(|s| s.rows.len() * s.rows.len());
    if pairs.sum::<usize>() * q.cols() < SMALL {
        (0..tasks).for_each(run);
    } else {
        for_runs(tasks, run);
    }
}

pub(crate) fn relative_attention_backward(
    mut dq: ViewMut<'_>,
    mut dk: ViewMut<'_>,
    mut dv: ViewMut<'_>,
    d_positions: RelativeGradients<'_>,
    do_: View<'_>,
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    positions: RelativePositions<'_>,
    lse: View<'_>,
    segments: &[RelativeSegment],
    shape: &RelativeShape<'_>,
    ws: &Workspace,
) {
    set_zero(dq.reborrow());
    set_zero(dk.reborrow());
    set_zero(dv.reborrow());
    // The gradients of positions are sums over segments. Those of a part come one after the other; how they are cut depends on the
    // sizes alone, and so do the sums.
    let parts = if shape.heads >= ENOUGH_TASKS {
        1
    } else {
        PARTS
    };
    let parts: Vec<&[RelativeSegment]> = segments
        .chunks(segments.len().div_ceil(parts).max(1))
        .collect();
    let mut keys = Sums::new(d_positions.keys, parts.len(), ws);
    let mut queries = Sums::new(d_positions.queries, parts.len(), ws);
    {
        let inputs = Inputs {
            q,
            k,
            v,
            positions,
            shape,
        };
        let (dq, dk, dv) = (Shared::from(dq), Shared::from(dk), Shared::from(dv));
        let (d_keys, d_queries) = (keys.shared(), queries.shared());
        let run = |i: usize| {
            let (part, head) = (i / shape.heads, i % shape.heads);
            for segment in parts[part].iter().filter(|s| !s.rows.is_empty()) {
                let across = inputs.across(head);
                let rows = segment.rows.clone();
                #[expect(unsafe_code, reason = "tasks write disjoint blocks of the gradients")]
                // SAFETY: a task has the columns of its head to itself in the sums of its part, and no other part has its segments,
                // which do not overlap because `check` found that they share no rows. Its segments come one after the other.
                let grads = unsafe {
                    Gradients {
                        q: dq.block(rows.clone(), across.clone()),
                        k: dk.block(rows.clone(), across.clone()),
                        v: dv.block(rows.clone(), across.clone()),
                        keys: positions
                            .keys
                            .map(|keys| d_keys[part].block(0..keys.rows(), across.clone())),
                        queries: positions.queries.map(|queries| {
                            d_queries[part].block(0..queries.rows(), across.clone())
                        }),
                    }
                };
                let lse = lse.as_mat().block(rows.clone(), head..head + 1);
                let do_ = do_.as_mat().block(rows, across);
                backward(&inputs.part(segment, head), do_, lse, grads);
            }
        };
        (0..parts.len() * shape.heads)
            .into_par_iter()
            .for_each_part(run);
    }
    keys.finish(ws);
    queries.finish(ws);
}

/// What all tasks read.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    positions: RelativePositions<'a>,
    shape: &'a RelativeShape<'a>,
}

impl<'a> Inputs<'a> {
    /// The columns of a head.
    fn across(&self, head: usize) -> Range<usize> {
        let size = self.shape.head_size;
        head * size..(head + 1) * size
    }

    /// What the task of a segment, which is not empty, and of a head reads.
    fn part(&self, segment: &RelativeSegment, head: usize) -> Part<'a> {
        let across = self.across(head);
        let places = self.shape.of(segment.rows.len());
        let least = places.iter().min().copied().unwrap_or(0);
        let most = places.iter().max().copied().unwrap_or(0);
        let first = segment.first + least as usize;
        let reached = first..segment.first + most as usize + 1;
        let block =
            |view: View<'a>, rows: &Range<usize>| view.as_mat().block(rows.clone(), across.clone());
        Part {
            q: block(self.q, &segment.rows),
            k: block(self.k, &segment.rows),
            v: block(self.v, &segment.rows),
            keys: self.positions.keys.map(|view| block(view, &reached)),
            queries: self.positions.queries.map(|view| block(view, &reached)),
            reached,
            least,
            places,
            scale: self.shape.scale,
        }
    }
}

/// A segment of n rows and a head.
struct Part<'a> {
    /// [n, D] each.
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    /// The positions that its distances reach [R, D], as keys and as queries.
    keys: Option<Mat<'a>>,
    queries: Option<Mat<'a>>,
    /// Their rows among all positions.
    reached: Range<usize>,
    /// The place of the first of them.
    least: u32,
    /// Of the distances 1 - n to n - 1.
    places: &'a [u32],
    scale: f32,
}

impl Part<'_> {
    fn rows(&self) -> usize {
        self.q.rows()
    }

    /// Numbers of scores of a tile, of a term of a tile's queries, and of a term of all keys.
    fn sizes(&self) -> (usize, usize, usize) {
        let tile = TILE.min(self.rows());
        let reached = self.reached.len();
        let width = |term: Option<Mat<'_>>| if term.is_some() { reached } else { 0 };
        (
            tile * self.rows(),
            tile * width(self.keys),
            self.rows() * width(self.queries),
        )
    }

    /// scale · k·qrᵀ [n, R], if the scores have that term.
    fn of_keys(&self, to: &mut [f32]) {
        if let Some(queries) = self.queries {
            let to = MatMut::new(to, self.rows(), self.reached.len());
            product(to, false, self.scale, self.k, queries.t());
        }
    }

    /// The scores [queries, n] of a tile of queries. `of_queries` is for their term, `of_keys` is that of all keys.
    fn scores(
        &self,
        tile: &Range<usize>,
        scores: &mut [f32],
        of_queries: &mut [f32],
        of_keys: &[f32],
    ) {
        let (count, rows) = (tile.len(), self.rows());
        let q = some(self.q, tile);
        let to = MatMut::new(&mut scores[..count * rows], count, rows);
        product(to, false, self.scale, q, self.k.t());
        if let Some(keys) = self.keys {
            let reached = self.reached.len();
            let to = MatMut::new(&mut of_queries[..count * reached], count, reached);
            product(to, false, self.scale, q, keys.t());
            self.for_places(tile, |at, query, _, place| {
                scores[at] += of_queries[query * reached + place];
            });
        }
        if self.queries.is_some() {
            let reached = self.reached.len();
            self.for_places(tile, |at, _, key, place| {
                scores[at] += of_keys[key * reached + place];
            });
        }
    }

    /// Calls `work` with the index of each score [queries, n] of a tile, its query (numbered from the tile's first), its key, and which
    /// of the reached positions is theirs. In squares, whose scores and positions all lie in a few lines of memory.
    #[inline(always)]
    fn for_places(&self, tile: &Range<usize>, mut work: impl FnMut(usize, usize, usize, usize)) {
        const SIDE: usize = 16;
        let rows = self.rows();
        for first in (0..tile.len()).step_by(SIDE) {
            for first_key in (0..rows).step_by(SIDE) {
                let keys = first_key..(first_key + SIDE).min(rows);
                for query in first..(first + SIDE).min(tile.len()) {
                    // Number n - 1 + i - j, the last key first.
                    let begin = rows + tile.start + query - keys.end;
                    let places = &self.places[begin..begin + keys.len()];
                    for (key, place) in keys.clone().zip(places.iter().rev()) {
                        let place = (place - self.least) as usize;
                        work(query * rows + key, query, key, place);
                    }
                }
            }
        }
    }
}

/// Some of the rows.
fn some<'a>(of: Mat<'a>, rows: &Range<usize>) -> Mat<'a> {
    of.block(rows.clone(), 0..of.cols())
}

/// Tiles of `rows` rows.
fn tiles(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (0..rows).step_by(TILE);
    starts.map(move |start| start..(start + TILE).min(rows))
}

/// o [n, D] and lse [n, 1] of a segment and a head.
fn forward(part: &Part<'_>, mut o: MatMut<'_>, mut lse: MatMut<'_>) {
    let rows = part.rows();
    let (of_tile, of_queries, of_keys) = part.sizes();
    with_scratch(of_tile + of_queries + of_keys, |scratch| {
        let (scores, scratch) = scratch.split_at_mut(of_tile);
        let (of_queries, of_keys) = scratch.split_at_mut(of_queries);
        part.of_keys(of_keys);
        for tile in tiles(rows) {
            part.scores(&tile, scores, of_queries, of_keys);
            let scores = &mut scores[..tile.len() * rows];
            let mut sums = [0.0; TILE];
            let each = scores.chunks_exact_mut(rows).zip(&mut sums);
            for ((row, sum), query) in each.zip(tile.clone()) {
                let max;
                (max, *sum) = softmax(row);
                lse.row(query)[0] = max + sum.ln();
            }
            let size = o.cols();
            let p = Mat::new(scores, tile.len(), rows);
            product(o.window(tile.clone(), 0..size), false, 1.0, p, part.v);
            for (query, sum) in tile.zip(sums) {
                let inverse = 1.0 / sum;
                o.row(query).iter_mut().for_each(|o| *o *= inverse);
            }
        }
    });
}

/// Turns scores into exp(score - max); gives the maximum and the sum.
fn softmax(row: &mut [f32]) -> (f32, f32) {
    vectorize(
        #[inline(always)]
        || {
            let max = lane_max(row);
            let base = finite_or_zero(max);
            for score in row.iter_mut() {
                *score = exp(*score - base);
            }
            (
                max,
                lane_sum(
                    [row],
                    #[inline(always)]
                    |[p]| p,
                ),
            )
        },
    )
}

/// Where the gradients of a segment and a head go: of q, k and v [n, D], which are overwritten, and of all positions [S, D], which
/// grow.
struct Gradients<'a> {
    q: MatMut<'a>,
    k: MatMut<'a>,
    v: MatMut<'a>,
    keys: Option<MatMut<'a>>,
    queries: Option<MatMut<'a>>,
}

fn backward(part: &Part<'_>, do_: Mat<'_>, lse: Mat<'_>, mut grads: Gradients<'_>) {
    let (rows, size, reached) = (part.rows(), part.q.cols(), part.reached.len());
    let (of_tile, of_queries, of_keys) = part.sizes();
    with_scratch(2 * (of_tile + of_queries + of_keys), |scratch| {
        let (weights, scratch) = scratch.split_at_mut(of_tile);
        let (score_grads, scratch) = scratch.split_at_mut(of_tile);
        let (of_queries, scratch) = scratch.split_at_mut(2 * of_queries);
        let (of_queries, query_grads) = of_queries.split_at_mut(of_queries.len() / 2);
        let (of_keys, key_grads) = scratch.split_at_mut(of_keys);
        part.of_keys(of_keys);
        key_grads.fill(0.0);
        for tile in tiles(rows) {
            let count = tile.len();
            part.scores(&tile, weights, of_queries, of_keys);
            let (q, do_) = (some(part.q, &tile), some(do_, &tile));
            // o = p·v, so dp = do·vᵀ
            let weights = &mut weights[..count * rows];
            let score_grads = &mut score_grads[..count * rows];
            let to = MatMut::new(score_grads, count, rows);
            product(to, false, 1.0, do_, part.v.t());
            let each = weights.chunks_exact_mut(rows);
            for ((weights, grads), query) in each
                .zip(score_grads.chunks_exact_mut(rows))
                .zip(tile.clone())
            {
                let lse = lse.data()[query * lse.row_stride()];
                softmax_backward(weights, grads, finite_or_zero(lse));
            }
            let (p, ds) = (
                Mat::new(weights, count, rows),
                Mat::new(score_grads, count, rows),
            );
            let later = tile.start > 0;
            // dv += pᵀ·do; s = scale · q·kᵀ, so dq = scale · ds·k and dk += scale · dsᵀ·q
            product(grads.v.window(0..rows, 0..size), later, 1.0, p.t(), do_);
            product(
                grads.k.window(0..rows, 0..size),
                later,
                part.scale,
                ds.t(),
                q,
            );
            let mut dq = grads.q.window(tile.clone(), 0..size);
            product(dq.reborrow(), false, part.scale, ds, part.k);
            if let (Some(keys), Some(d_keys)) = (part.keys, grads.keys.as_mut()) {
                // c = scale · q·krᵀ, so dq += scale · dc·kr and dkr += scale · dcᵀ·q
                let query_grads = &mut query_grads[..count * reached];
                query_grads.fill(0.0);
                part.for_places(&tile, |at, query, _, place| {
                    query_grads[query * reached + place] += score_grads[at];
                });
                let dc = Mat::new(query_grads, count, reached);
                product(dq, true, part.scale, dc, keys);
                let to = d_keys.window(part.reached.clone(), 0..size);
                product(to, true, part.scale, dc.t(), q);
            }
            if part.queries.is_some() {
                part.for_places(&tile, |at, _, key, place| {
                    key_grads[key * reached + place] += score_grads[at];
                });
            }
        }
        if let (Some(queries), Some(d_queries)) = (part.queries, grads.queries.as_mut()) {
            // c = scale · k·qrᵀ, so dk += scale · dc·qr and dqr += scale · dcᵀ·k
            let dc = Mat::new(key_grads, rows, reached);
            product(grads.k, true, part.scale, dc, queries);
            let to = d_queries.window(part.reached.clone(), 0..size);
            product(to, true, part.scale, dc.t(), part.k);
        }
    });
}

/// Turns a row of scores into p = exp(s - lse), and dp into ds = p · (dp - δ) with δ = Σ p·dp.
fn softmax_backward(weights: &mut [f32], grads: &mut [f32], lse: f32) {
    vectorize(
        #[inline(always)]
        || {
            for weight in weights.iter_mut() {
                *weight = exp(*weight - lse);
            }
            let delta = lane_sum(
                [weights, grads],
                #[inline(always)]
                |[p, dp]| p * dp,
            );
            for (grad, weight) in grads.iter_mut().zip(weights.iter()) {
                *grad = *weight * (*grad - delta);
            }
        },
    );
}

/// The gradient of positions, and what the parts of segments but the first add to it.
struct Sums<'a> {
    gradient: Option<ViewMut<'a>>,
    others: Option<crate::tensor::Tensor>,
    parts: usize,
}

impl<'a> Sums<'a> {
    fn new(mut gradient: Option<ViewMut<'a>>, parts: usize, ws: &Workspace) -> Self {
        let others = gradient.as_mut().map(|gradient| {
            set_zero(gradient.reborrow());
            let extra = parts.saturating_sub(1);
            let mut others = ws.take(extra * gradient.rows(), gradient.cols());
            set_zero(others.view_mut());
            others
        });
        Self {
            gradient,
            others,
            parts,
        }
    }

    /// One for each part; none where there are no such positions.
    fn shared(&mut self) -> Vec<Shared<'_>> {
        let (Some(gradient), Some(others)) = (self.gradient.as_mut(), self.others.as_mut()) else {
            return Vec::new();
        };
        let rows = gradient.rows();
        let mut all = vec![Shared::from(gradient.reborrow())];
        let mut rest = others.view_mut();
        for _ in 1..self.parts {
            let (one, others) = rest.split_rows(rows);
            all.push(Shared::from(one));
            rest = others;
        }
        all
    }

    /// Adds what the other parts have found.
    fn finish(self, ws: &Workspace) {
        let (Some(mut gradient), Some(others)) = (self.gradient, self.others) else {
            return;
        };
        let rows = gradient.rows();
        for part in 1..self.parts {
            let part = others.view().slice_rows((part - 1) * rows..part * rows);
            add_assign(gradient.reborrow(), part);
        }
        ws.give(others);
    }
}
