//! Attention with factors rounded to bf16, on processors that multiply these faster.
//!
//! What is multiplied lies in tiles ([`bf16`]). The columns of a pair of panels are 32 columns of a matrix here: scores are
//! [keys][32], results [D][32]. Products are summed in f32, and the softmax is taken in f32.
//!
//! What a pair sees of a tile of keys is rounded up to steps of 32 keys; scores of keys that a query does not see are -∞, so that these
//! add zeros, and a query's bits do not depend on the others.

use std::arch::x86_64::{_mm512_loadu_ps, _mm512_permutexvar_epi16, _mm512_storeu_si512};
use std::ops::{Range, RangeFrom};

use super::backward::{KEPT_TILES, Task as BackwardTask};
use super::columns::{Columns, cap_scores, cap_scores_with_slopes, finite_or_zero};
use super::forward::Task as ForwardTask;
use super::sight::{KeyTile, QueryTile, TILE_KEYS};
use crate::cpu::product::bf16::layout::{SIDE, STEP, TILE};
use crate::cpu::product::bf16::pack::{
    Right, halves_by_turns, pack_wide, round_columns, round_rows, rounded, split_rows, turn_square,
};
use crate::cpu::product::bf16::{LeftTiles, RightTiles, Unit, multiply_rounded, with_unit};
use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::exp;
use crate::view::View;

/// Columns of a pair of panels.
const PAIR: usize = 2 * SIDE;
/// Steps of keys of a tile.
const KEY_STEPS: usize = TILE_KEYS / STEP;
/// Rows of keys of a tile, 16 at a time.
const KEY_ROWS: usize = TILE_KEYS / SIDE;
/// Scores of a pair of panels and a tile of keys.
const SCORES: usize = TILE_KEYS * PAIR;

/// Sizes of what lies in tiles.
#[derive(Clone, Copy)]
struct Sizes {
    /// D.
    head: usize,
    pairs: usize,
}

impl Sizes {
    fn new(columns: &Columns, head: usize) -> Self {
        Self {
            head,
            pairs: columns.len().div_ceil(PAIR),
        }
    }

    /// Steps of D.
    fn steps(self) -> usize {
        self.head.div_ceil(STEP)
    }

    /// D, 16 at a time.
    fn down(self) -> usize {
        self.head.div_ceil(SIDE)
    }

    /// Numbers of a pair's columns as a right factor, [steps][2] tiles; in all [pairs].
    fn turned(self) -> usize {
        self.steps() * 2 * TILE
    }

    /// Numbers of a pair's columns as rows of a right factor, [down] tiles; in all [pairs].
    fn straight(self) -> usize {
        self.down() * TILE
    }

    /// Numbers of a tile of keys as a left factor, [keys / 16][steps] tiles.
    fn keys(self) -> usize {
        KEY_ROWS * self.steps() * TILE
    }

    /// Numbers of a tile of keys turned round, [down][keys / 32] tiles.
    fn keys_turned(self) -> usize {
        self.down() * KEY_STEPS * TILE
    }

    /// f32 numbers of a result of a pair, [down · 16][32]; in all [pairs].
    fn result(self) -> usize {
        self.down() * SIDE * PAIR
    }
}

/// Cuts what is left of a scratch memory.
struct Cut<'a>(&'a mut [f32]);

impl<'a> Cut<'a> {
    fn f32s(&mut self, len: usize) -> &'a mut [f32] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        part
    }

    /// An even number of them.
    fn u16s(&mut self, len: usize) -> &'a mut [u16] {
        bytemuck::cast_slice_mut(self.f32s(len / 2))
    }
}

/// The output and its log-sum-exp of a tile of queries and a key/value head.
pub(super) fn forward(task: &ForwardTask<'_>, tile: &QueryTile<'_>, kv_head: usize) {
    let columns = Columns::new(tile, kv_head, task.shape);
    let sizes = Sizes::new(&columns, task.shape.head_size);
    let tiles = sizes.pairs * sizes.turned() + sizes.keys() + sizes.keys_turned() + SCORES;
    let numbers = sizes.pairs * (sizes.result() + 2 * PAIR) + SCORES;
    with_scratch(tiles / 2 + numbers, |scratch| {
        let mut cut = Cut(scratch);
        let buffers = ForwardBuffers {
            queries: cut.u16s(sizes.pairs * sizes.turned()),
            keys: cut.u16s(sizes.keys()),
            values: cut.u16s(sizes.keys_turned()),
            weights: cut.u16s(SCORES),
            out: cut.f32s(sizes.pairs * sizes.result()),
            max: cut.f32s(sizes.pairs * PAIR),
            sum: cut.f32s(sizes.pairs * PAIR),
            scores: cut.f32s(SCORES),
        };
        with_unit(|unit| run_forward(unit, task, tile, kv_head, (columns, sizes), buffers));
    });
}

struct ForwardBuffers<'a> {
    /// scale·q as right factors.
    queries: &'a mut [u16],
    keys: &'a mut [u16],
    values: &'a mut [u16],
    /// p of a pair as a right factor, [keys / 32][2] tiles.
    weights: &'a mut [u16],
    out: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    scores: &'a mut [f32],
}

fn run_forward(
    unit: Unit<'_>,
    task: &ForwardTask<'_>,
    tile: &QueryTile<'_>,
    kv_head: usize,
    (columns, sizes): (Columns, Sizes),
    buffers: ForwardBuffers<'_>,
) {
    let ForwardBuffers {
        queries,
        keys,
        values,
        weights,
        out,
        max,
        sum,
        scores,
    } = buffers;
    let across = kv_head * sizes.head..(kv_head + 1) * sizes.head;
    turn_columns(
        queries,
        &columns,
        sizes,
        (task.q, &tile.rows()),
        task.shape.scale,
    );
    max.fill(f32::NEG_INFINITY);
    sum.fill(0.0);
    let mut begun = vec![false; sizes.pairs];
    let span = tile.sight.span(&tile.queries);
    tile.sight.for_key_steps(span, STEP, |key_tile| {
        let rows = key_tile.rows.clone();
        let (k, v) = (task.k.as_mat(), task.v.as_mat());
        split_keys(keys, k.block(rows.clone(), across.clone()), sizes);
        turn_keys(values, v.block(rows, across.clone()), sizes);
        for (pair, begun) in begun.iter_mut().enumerate() {
            let seen = Seen::new(&columns, pair, tile, &key_tile);
            if seen.all.is_empty() {
                continue;
            }
            // s = (scale·q)·kᵀ
            let queries = &queries[pair * sizes.turned()..][..sizes.turned()];
            score(unit, scores, &seen.all, keys, queries, sizes);
            let seen_scores = &mut scores[seen.all.start * PAIR..seen.all.end * PAIR];
            if let Some(cap) = task.shape.softcap {
                cap_scores(seen_scores, cap);
            }
            seen.mask(seen_scores.as_chunks_mut().0);
            let stats = pair * PAIR..(pair + 1) * PAIR;
            let out = &mut out[pair * sizes.result()..][..sizes.result()];
            softmax(
                seen_scores,
                &mut max[stats.clone()],
                &mut sum[stats],
                begun.then_some(&mut *out),
            );
            // o += p·v
            let steps = seen.steps();
            let weights = &mut weights[..steps.len() * 2 * TILE];
            pack_scores(weights, seen_scores);
            let left = LeftTiles {
                tiles: &values[steps.start * TILE..],
                apart: KEY_STEPS,
                steps: steps.len(),
            };
            let mut out = MatMut::new(out, sizes.down() * SIDE, PAIR);
            multiply_rounded(unit, &mut out, *begun, left, pair_tiles(weights));
            *begun = true;
        }
    });
    for (pair, _) in begun.iter().enumerate().filter(|(_, begun)| !**begun) {
        out[pair * sizes.result()..][..sizes.result()].fill(0.0);
    }
    let (mut o, mut lse) = task.outputs(tile, kv_head);
    for column in 0..columns.len() {
        let (query, head) = columns.at(column);
        lse.row(query)[head] = max[column] + sum[column].ln();
    }
    for sum in sum.iter_mut() {
        // Zero if no key was seen.
        *sum = if *sum == 0.0 { 0.0 } else { 1.0 / *sum };
    }
    unpack(&mut o, out, sum, &columns, sizes);
}

/// What of a tile of keys a pair of panels sees.
struct Seen {
    /// Rounded up to steps.
    all: Range<usize>,
    /// From where to where each column does; `None`: exactly `all`.
    each: Option<[(usize, usize); PAIR]>,
}

impl Seen {
    fn new(columns: &Columns, pair: usize, tile: &QueryTile<'_>, keys: &KeyTile) -> Self {
        let of = |column: usize| columns.sees_keys(pair * PAIR + column, tile, keys);
        // Both ends move on with the query.
        let (first, last) = (of(0), of(PAIR - 1));
        let exact = first.0..last.1.max(first.0);
        if exact.is_empty() {
            return Self {
                all: 0..0,
                each: None,
            };
        }
        let all = exact.start / STEP * STEP..exact.end.next_multiple_of(STEP);
        let whole = first == last && all == exact;
        Self {
            all,
            each: (!whole).then(|| std::array::from_fn(of)),
        }
    }

    /// In steps.
    fn steps(&self) -> Range<usize> {
        self.all.start / STEP..self.all.end / STEP
    }

    /// Sets scores that a query does not see to -∞.
    fn mask(&self, scores: &mut [[f32; PAIR]]) {
        let Some(each) = &self.each else { return };
        // What is between the last start and the first end is seen by all.
        let seen_from = each[PAIR - 1].0.clamp(self.all.start, self.all.end);
        let seen_to = each[0].1.clamp(seen_from, self.all.end);
        for key in (self.all.start..seen_from).chain(seen_to..self.all.end) {
            let row = &mut scores[key - self.all.start];
            for (score, (from, to)) in row.iter_mut().zip(each) {
                if key < *from || key >= *to {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// factor · rows of q, one a column, as right factors: [pairs][steps][2] tiles.
fn turn_columns(
    to: &mut [u16],
    columns: &Columns,
    sizes: Sizes,
    (from, rows): (View<'_>, &Range<usize>),
    factor: f32,
) {
    for pair in 0..sizes.pairs {
        let to = &mut to[pair * sizes.turned()..][..sizes.turned()];
        for half in 0..2 {
            let first = pair * PAIR + half * SIDE;
            let to = &mut to[half * TILE..];
            let sources: [&[f32]; SIDE] =
                std::array::from_fn(|j| columns.source(from, rows, first + j));
            if sources[0].is_empty() {
                for step in 0..sizes.steps() {
                    to[step * 2 * TILE..][..TILE].fill(0);
                }
            } else {
                round_columns(to, 2, &sources, factor);
            }
        }
    }
}

/// factor · rows of q, one a column, as rows of a right factor: [pairs][down] tiles.
fn round_straight(
    to: &mut [u16],
    columns: &Columns,
    sizes: Sizes,
    (from, rows): (View<'_>, &Range<usize>),
    factor: f32,
) {
    for (pair, to) in to.chunks_exact_mut(sizes.straight()).enumerate() {
        let sources: [&[f32]; PAIR] =
            std::array::from_fn(|j| columns.source(from, rows, pair * PAIR + j));
        round_rows(to, &sources, sizes.head, factor);
    }
}

/// Keys or values [keys, D] of a tile as a left factor; what there is not of a step of keys is zero.
fn split_keys(to: &mut [u16], keys: Mat<'_>, sizes: Sizes) {
    let count = keys.rows();
    let tiles = to.chunks_exact_mut(sizes.steps() * TILE);
    for (i, to) in tiles.take(count.next_multiple_of(STEP) / SIDE).enumerate() {
        let rows = (i * SIDE).min(count)..((i + 1) * SIDE).min(count);
        if rows.is_empty() {
            to.fill(0);
        } else {
            split_rows(to, keys.block(rows, 0..sizes.head), 1);
        }
    }
}

/// Keys or values [keys, D] of a tile turned round as a left factor of D rows.
fn turn_keys(to: &mut [u16], keys: Mat<'_>, sizes: Sizes) {
    let count = keys.rows();
    let turned = keys.t();
    for (i, to) in to.chunks_exact_mut(KEY_STEPS * TILE).enumerate() {
        let rows = i * SIDE..((i + 1) * SIDE).min(sizes.head);
        let to = &mut to[..count.div_ceil(STEP) * TILE];
        split_rows(to, turned.block(rows, 0..count), 1);
    }
}

/// Scores [keys][32] of some of a tile's keys: rows of the left factor with the columns of a pair.
fn score(
    unit: Unit<'_>,
    scores: &mut [f32],
    keys: &Range<usize>,
    left: &[u16],
    right: &[u16],
    sizes: Sizes,
) {
    let steps = sizes.steps();
    let left = LeftTiles {
        tiles: &left[keys.start / SIDE * steps * TILE..],
        apart: steps,
        steps,
    };
    let scores = &mut scores[keys.start * PAIR..keys.end * PAIR];
    let mut to = MatMut::new(scores, keys.len(), PAIR);
    multiply_rounded(unit, &mut to, false, left, pair_tiles(right));
}

/// [steps][2] tiles.
fn pair_tiles(tiles: &[u16]) -> RightTiles<'_> {
    RightTiles { tiles, apart: 2 }
}

/// Numbers [keys][32] as a right factor, [keys / 32][2] tiles.
fn pack_scores(to: &mut [u16], scores: &[f32]) {
    let from = Right {
        data: scores,
        stride: PAIR,
        turned: false,
        inner: scores.len() / PAIR,
        cols: PAIR,
    };
    pack_wide(to, from, 1.0, 1);
}

/// Rows of one block of heads from results [pairs][D][32], each column times its factor.
fn unpack(to: &mut MatMut<'_>, from: &[f32], factors: &[f32], columns: &Columns, sizes: Sizes) {
    let mut square = [0.0; SIDE * SIDE];
    for (pair, from) in from.chunks_exact(sizes.result()).enumerate() {
        for half in 0..2 {
            let first = pair * PAIR + half * SIDE;
            for d in (0..sizes.head).step_by(SIDE) {
                let width = SIDE.min(sizes.head - d);
                turn_square(&mut square, &from[d * PAIR + half * SIDE..], PAIR);
                for j in 0..SIDE.min(columns.len().saturating_sub(first)) {
                    let (query, head) = columns.at(first + j);
                    let to = &mut to.row(query)[head * sizes.head + d..][..width];
                    let factor = factors[first + j];
                    for (to, from) in to.iter_mut().zip(&square[j * SIDE..]) {
                        *to = factor * from;
                    }
                }
            }
        }
    }
}

/// Calls code that is compiled for AVX-512.
macro_rules! wide {
    ($call:expr) => {{
        assert!(crate::cpu::product::bf16::supported());
        #[expect(unsafe_code, reason = "code for one kind of processor")]
        // SAFETY: the processor has AVX-512, as the line above has shown.
        unsafe {
            $call
        }
    }};
}

/// Turns scores [keys][32] into exp(score - max) with the maximum so far, and updates the maximum and the sum of each column; what
/// there is of the output [D][32] is multiplied accordingly.
fn softmax(scores: &mut [f32], max: &mut [f32], sum: &mut [f32], out: Option<&mut [f32]>) {
    wide!(softmax_wide(
        scores.as_chunks_mut().0,
        max,
        sum,
        out.map(|out| out.as_chunks_mut().0),
    ));
}

#[target_feature(enable = "avx512f")]
fn softmax_wide(
    scores: &mut [[f32; PAIR]],
    max: &mut [f32],
    sum: &mut [f32],
    out: Option<&mut [[f32; PAIR]]>,
) {
    let mut largest = [0.0; PAIR];
    largest.copy_from_slice(max);
    for row in scores.iter() {
        for (max, &score) in largest.iter_mut().zip(row) {
            // The other way round from `max`, so that NaN goes through.
            *max = if score <= *max { *max } else { score };
        }
    }
    let base = largest.map(finite_or_zero);
    let mut sums = [0.0; PAIR];
    for row in scores.iter_mut() {
        for ((score, &base), sum) in row.iter_mut().zip(&base).zip(&mut sums) {
            *score = exp(*score - base);
            *sum += *score;
        }
    }
    let mut shrink = [0.0; PAIR];
    for j in 0..PAIR {
        shrink[j] = exp(max[j] - base[j]);
        sum[j] = sum[j] * shrink[j] + sums[j];
        max[j] = largest[j];
    }
    for row in out.into_iter().flatten() {
        for (x, factor) in row.iter_mut().zip(&shrink) {
            *x *= factor;
        }
    }
}

/// The gradients of a tile of queries and a key/value head.
pub(super) fn backward(task: &BackwardTask<'_>, tile: &QueryTile<'_>, kv_head: usize, sum: usize) {
    let columns = Columns::new(tile, kv_head, task.shape);
    let sizes = Sizes::new(&columns, task.shape.head_size);
    let mut key_tiles = Vec::new();
    let span = tile.sight.span(&tile.queries);
    tile.sight
        .for_key_steps(span, STEP, |tile| key_tiles.push(tile));
    let kept = key_tiles.len().clamp(1, KEPT_TILES);
    let pairs = sizes.pairs;
    let scores = kept * pairs * SCORES;
    let slopes = task.shape.softcap.map_or(0, |_| scores);
    let tiles = pairs * (2 * (sizes.turned() + sizes.straight()) + SCORES)
        + scores
        + 2 * sizes.keys()
        + sizes.keys_turned()
        + SCORES;
    let numbers = pairs * (sizes.result() + 2 * PAIR) + SCORES + scores + slopes;
    with_scratch(tiles / 2 + numbers, |scratch| {
        let mut cut = Cut(scratch);
        let mut buffers = BackwardBuffers {
            queries: cut.u16s(pairs * sizes.turned()),
            grads: cut.u16s(pairs * sizes.turned()),
            query_rows: cut.u16s(pairs * sizes.straight()),
            grad_rows: cut.u16s(pairs * sizes.straight()),
            weights: cut.u16s(scores),
            score_rows: cut.u16s(pairs * SCORES),
            keys: cut.u16s(sizes.keys()),
            values: cut.u16s(sizes.keys()),
            keys_turned: cut.u16s(sizes.keys_turned()),
            score_columns: cut.u16s(SCORES),
            query_grads: cut.f32s(pairs * sizes.result()),
            lse: cut.f32s(pairs * PAIR),
            delta: cut.f32s(pairs * PAIR),
            scores: cut.f32s(SCORES),
            weight_grads: cut.f32s(scores),
            slopes: cut.f32s(slopes),
        };
        with_unit(|unit| {
            let part = Backward {
                unit,
                task,
                tile,
                kv_head,
                sum,
                columns,
                sizes,
            };
            part.run(&key_tiles, &mut buffers);
        });
    });
}

/// A tile of queries and a key/value head on the way back.
struct Backward<'a> {
    unit: Unit<'a>,
    task: &'a BackwardTask<'a>,
    tile: &'a QueryTile<'a>,
    kv_head: usize,
    /// Which sum of dk and dv it adds to.
    sum: usize,
    columns: Columns,
    sizes: Sizes,
}

struct BackwardBuffers<'a> {
    /// scale·q and do as right factors.
    queries: &'a mut [u16],
    grads: &'a mut [u16],
    /// The same as rows of right factors.
    query_rows: &'a mut [u16],
    grad_rows: &'a mut [u16],
    /// p of the tiles of keys that are kept, each a left factor, [keys / 16][pairs] tiles.
    weights: &'a mut [u16],
    /// ds of a tile of keys, likewise.
    score_rows: &'a mut [u16],
    /// A tile of keys and of values as left factors, and the keys turned round.
    keys: &'a mut [u16],
    values: &'a mut [u16],
    keys_turned: &'a mut [u16],
    /// ds of a pair as a right factor, [keys / 32][2] tiles.
    score_columns: &'a mut [u16],
    /// d(scale·q), [pairs][D][32].
    query_grads: &'a mut [f32],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    /// Scores of a pair.
    scores: &'a mut [f32],
    /// dp of the tiles of keys that are kept, each [pairs][keys][32].
    weight_grads: &'a mut [f32],
    /// The cap's slope at each score, likewise; empty where scores have no cap.
    slopes: &'a mut [f32],
}

impl Backward<'_> {
    fn run(&self, key_tiles: &[KeyTile], buffers: &mut BackwardBuffers<'_>) {
        let Self {
            task,
            tile,
            columns,
            sizes,
            ..
        } = self;
        let (rows, scale) = (tile.rows(), task.shape.scale);
        turn_columns(buffers.queries, columns, *sizes, (task.q, &rows), scale);
        turn_columns(buffers.grads, columns, *sizes, (task.do_, &rows), 1.0);
        round_straight(buffers.query_rows, columns, *sizes, (task.q, &rows), scale);
        round_straight(buffers.grad_rows, columns, *sizes, (task.do_, &rows), 1.0);
        buffers.query_grads.fill(0.0);
        task.pack_lse(&rows, self.kv_head, columns, buffers.lse);
        buffers.delta.fill(0.0);
        // Where not all tiles can be kept until δ is known, they are computed once more.
        let all_kept = key_tiles.len() <= KEPT_TILES;
        let slot = |i: usize| if all_kept { i } else { 0 };
        for (i, keys) in key_tiles.iter().enumerate() {
            let seen = self.seen(keys);
            self.weights(keys, &seen, slot(i), buffers);
            // o = p·v, so dv += pᵀ·do
            let (_, mut dv) = task.key_outputs(keys.rows.clone(), self.kv_head, self.sum);
            let weights = &buffers.weights[slot(i) * sizes.pairs * SCORES..];
            self.add_rows(&mut dv, &seen, weights, buffers.grad_rows);
        }
        let delta = buffers.delta.to_vec();
        for (i, keys) in key_tiles.iter().enumerate() {
            let seen = self.seen(keys);
            if !all_kept {
                self.weights(keys, &seen, slot(i), buffers);
            }
            self.score_gradients(keys, &seen, slot(i), &delta, buffers);
            // s = (scale·q)·kᵀ, so dk += dsᵀ·(scale·q)
            let (mut dk, _) = task.key_outputs(keys.rows.clone(), self.kv_head, self.sum);
            self.add_rows(&mut dk, &seen, buffers.score_rows, buffers.query_rows);
        }
        // The scores were (scale·q)·kᵀ, so dq = scale·ds·k
        buffers.delta.fill(scale);
        let mut dq = task.query_output(rows, self.kv_head);
        unpack(&mut dq, buffers.query_grads, buffers.delta, columns, *sizes);
    }

    /// What each pair sees of a tile of keys.
    fn seen(&self, keys: &KeyTile) -> Vec<Seen> {
        (0..self.sizes.pairs)
            .map(|pair| Seen::new(&self.columns, pair, self.tile, keys))
            .collect()
    }

    /// Where numbers of a pair lie, of the keys that it sees.
    fn scores(&self, slot: usize, pair: usize, seen: &Seen) -> Range<usize> {
        let first = (slot * self.sizes.pairs + pair) * SCORES;
        first + seen.all.start * PAIR..first + seen.all.end * PAIR
    }

    /// The tiles of a pair from the first key on that it sees, of [keys / 16][pairs].
    fn rows_from(&self, slot: usize, pair: usize, seen: &Seen) -> RangeFrom<usize> {
        let row = slot * KEY_ROWS + seen.all.start / SIDE;
        (row * self.sizes.pairs + pair) * TILE..
    }

    /// Rows of k or v of a tile.
    fn block<'v>(&self, view: View<'v>, keys: &KeyTile) -> Mat<'v> {
        let size = self.sizes.head;
        let across = self.kv_head * size..(self.kv_head + 1) * size;
        view.as_mat().block(keys.rows.clone(), across)
    }

    /// p and dp of a tile of keys, for each pair of panels those that it sees, and what they add to δ.
    fn weights(
        &self,
        keys: &KeyTile,
        seen: &[Seen],
        slot: usize,
        buffers: &mut BackwardBuffers<'_>,
    ) {
        let (task, sizes) = (self.task, self.sizes);
        split_keys(buffers.keys, self.block(task.k, keys), sizes);
        split_keys(buffers.values, self.block(task.v, keys), sizes);
        for (pair, seen) in seen.iter().enumerate().filter(|(_, s)| !s.all.is_empty()) {
            let turned = pair * sizes.turned()..(pair + 1) * sizes.turned();
            let part = self.scores(slot, pair, seen);
            // s = (scale·q)·kᵀ
            let right = &buffers.queries[turned.clone()];
            score(
                self.unit,
                buffers.scores,
                &seen.all,
                buffers.keys,
                right,
                sizes,
            );
            // o = p·v, so dp = do·vᵀ
            let grads = &mut buffers.weight_grads[(slot * sizes.pairs + pair) * SCORES..];
            let right = &buffers.grads[turned];
            score(self.unit, grads, &seen.all, buffers.values, right, sizes);
            let scores = &mut buffers.scores[seen.all.start * PAIR..seen.all.end * PAIR];
            if let Some(cap) = task.shape.softcap {
                cap_scores_with_slopes(scores, &mut buffers.slopes[part.clone()], cap);
            }
            seen.mask(scores.as_chunks_mut().0);
            let stats = pair * PAIR..(pair + 1) * PAIR;
            weigh(
                scores,
                &buffers.weight_grads[part],
                &buffers.lse[stats.clone()],
                &mut buffers.delta[stats],
                (
                    &mut buffers.weights[self.rows_from(slot, pair, seen)],
                    sizes.pairs,
                ),
            );
        }
    }

    /// ds of a tile of keys, and what it adds to d(scale·q).
    fn score_gradients(
        &self,
        keys: &KeyTile,
        seen: &[Seen],
        slot: usize,
        delta: &[f32],
        buffers: &mut BackwardBuffers<'_>,
    ) {
        let (task, sizes) = (self.task, self.sizes);
        turn_keys(buffers.keys_turned, self.block(task.k, keys), sizes);
        for (pair, seen) in seen.iter().enumerate().filter(|(_, s)| !s.all.is_empty()) {
            let part = self.scores(slot, pair, seen);
            let steps = seen.steps();
            let columns = &mut buffers.score_columns[..steps.len() * 2 * TILE];
            unweigh(
                &buffers.weights[self.rows_from(slot, pair, seen)],
                &buffers.weight_grads[part.clone()],
                (task.shape.softcap).map(|_| &buffers.slopes[part]),
                &delta[pair * PAIR..][..PAIR],
                (
                    &mut buffers.score_rows[self.rows_from(0, pair, seen)],
                    &mut *columns,
                ),
                sizes.pairs,
            );
            // s = (scale·q)·kᵀ, so d(scale·q) += ds·k
            let left = LeftTiles {
                tiles: &buffers.keys_turned[steps.start * TILE..],
                apart: KEY_STEPS,
                steps: steps.len(),
            };
            let to = &mut buffers.query_grads[pair * sizes.result()..][..sizes.result()];
            let mut to = MatMut::new(to, sizes.down() * SIDE, PAIR);
            multiply_rounded(self.unit, &mut to, true, left, pair_tiles(columns));
        }
    }

    /// Adds to dk or dv of a tile of keys: numbers [keys / 16][pairs] tiles times rows of the columns.
    fn add_rows(&self, to: &mut MatMut<'_>, seen: &[Seen], lefts: &[u16], rights: &[u16]) {
        let (sizes, count) = (self.sizes, to.rows());
        let mut first = 0;
        while first < count {
            // Neighbours see these keys, and the ones up to `end`.
            let sees = |seen: &&Seen| seen.all.contains(&first);
            let before = seen.iter().take_while(|seen| !sees(seen)).count();
            let steps = seen[before..].iter().take_while(sees).count();
            let edges = seen.iter().flat_map(|seen| [seen.all.start, seen.all.end]);
            let end = edges.filter(|edge| *edge > first).min();
            let end = end.unwrap_or(count).min(count);
            if steps > 0 {
                let left = LeftTiles {
                    tiles: &lefts[(first / SIDE * sizes.pairs + before) * TILE..],
                    apart: sizes.pairs,
                    steps,
                };
                let right = RightTiles {
                    tiles: &rights[before * sizes.straight()..],
                    apart: sizes.down(),
                };
                let mut to = to.window(first..end, 0..sizes.head);
                multiply_rounded(self.unit, &mut to, true, left, right);
            }
            first = end;
        }
    }
}

/// p = exp(s - lse) as rows of a left factor, whose tiles of 16 keys lie `apart` tiles from each other, and δ += Σ p · dp; scores and dp
/// [keys][32].
fn weigh(
    scores: &[f32],
    grads: &[f32],
    lse: &[f32],
    delta: &mut [f32],
    (to, apart): (&mut [u16], usize),
) {
    let keys = scores.len() / PAIR;
    assert!(grads.len() == scores.len() && keys.is_multiple_of(SIDE));
    assert!(((keys / SIDE).max(1) - 1) * apart * TILE + TILE <= to.len());
    wide!(weigh_wide(
        scores.as_chunks().0,
        grads.as_chunks().0,
        lse,
        delta,
        (to.as_mut_ptr(), apart),
    ));
}

/// # Safety
/// The processor has AVX-512 F and BF16; tiles for all keys can be written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn weigh_wide(
    scores: &[[f32; PAIR]],
    grads: &[[f32; PAIR]],
    lse: &[f32],
    delta: &mut [f32],
    (to, apart): (*mut u16, usize),
) {
    let (mut base, mut sums) = ([0.0; PAIR], [0.0; PAIR]);
    base.copy_from_slice(lse);
    for (key, (scores, grads)) in scores.iter().zip(grads).enumerate() {
        let mut weights = [0.0; PAIR];
        for j in 0..PAIR {
            weights[j] = exp(scores[j] - base[j]);
            sums[j] += weights[j] * grads[j];
        }
        // SAFETY: by the contract of this function.
        unsafe {
            let to = to.add(key / SIDE * apart * TILE + key % SIDE * STEP);
            store_rounded(to, &weights);
        }
    }
    for (delta, sum) in delta.iter_mut().zip(sums) {
        *delta += sum;
    }
}

/// ds = p · (dp - δ), times the slopes where there are some, as rows of a left factor and as a right factor [keys / 32][2] tiles. p and the
/// rows lie as [`weigh`] puts them.
fn unweigh(
    weights: &[u16],
    grads: &[f32],
    slopes: Option<&[f32]>,
    delta: &[f32],
    (rows, columns): (&mut [u16], &mut [u16]),
    apart: usize,
) {
    let keys = grads.len() / PAIR;
    let tiles = ((keys / SIDE).max(1) - 1) * apart * TILE + TILE;
    assert!(keys.is_multiple_of(STEP) && columns.len() >= keys / STEP * 2 * TILE);
    assert!(weights.len() >= tiles && rows.len() >= tiles);
    assert!(slopes.is_none_or(|slopes| slopes.len() == grads.len()));
    wide!(unweigh_wide(
        weights.as_ptr(),
        grads.as_chunks().0,
        slopes.map(|slopes| slopes.as_chunks().0),
        delta,
        (rows.as_mut_ptr(), columns.as_mut_ptr()),
        apart,
    ));
}

/// # Safety
/// The processor has AVX-512 F, BW and BF16; tiles of all keys can be read and written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn unweigh_wide(
    weights: *const u16,
    grads: &[[f32; PAIR]],
    slopes: Option<&[[f32; PAIR]]>,
    delta: &[f32],
    (rows, columns): (*mut u16, *mut u16),
    apart: usize,
) {
    let mut deltas = [0.0; PAIR];
    deltas.copy_from_slice(delta);
    let mut both = [[0.0; PAIR]; 2];
    for (key, grads) in grads.iter().enumerate() {
        let at = key / SIDE * apart * TILE + key % SIDE * STEP;
        // SAFETY: by the contract of this function; any bits are numbers.
        let weights = unsafe { weights.add(at).cast::<[u16; PAIR]>().read_unaligned() };
        let scores = &mut both[key % 2];
        for j in 0..PAIR {
            scores[j] = f32::from_bits(u32::from(weights[j]) << 16) * (grads[j] - deltas[j]);
        }
        if let Some(slopes) = slopes {
            for j in 0..PAIR {
                scores[j] *= slopes[key][j];
            }
        }
        // SAFETY: by the contract of this function.
        unsafe {
            store_rounded(rows.add(at), scores);
            if key % 2 == 1 {
                let to = columns.add(key / STEP * 2 * TILE + key % STEP / 2 * STEP);
                for half in 0..2 {
                    let [low, high] =
                        [0, 1].map(|i| _mm512_loadu_ps(both[i].as_ptr().add(half * SIDE)));
                    let turns = _mm512_permutexvar_epi16(halves_by_turns(), rounded(low, high));
                    _mm512_storeu_si512(to.add(half * TILE).cast(), turns);
                }
            }
        }
    }
}

/// Writes 32 numbers, rounded.
///
/// # Safety
/// The processor has AVX-512 F and BF16; 32 numbers can be written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn store_rounded(to: *mut u16, from: &[f32; PAIR]) {
    // SAFETY: by the contract of this function.
    unsafe {
        let low = _mm512_loadu_ps(from.as_ptr());
        let high = _mm512_loadu_ps(from.as_ptr().add(SIDE));
        _mm512_storeu_si512(to.cast(), rounded(low, high));
    }
}
