//! Attention with factors rounded to bf16, on processors that multiply these faster.
//!
//! What is multiplied lies in tiles ([`bf16`]). The columns of a pair of panels are 32 columns of a matrix here: scores are
//! [keys][32], results [D][32]. Products are summed in f32, and the softmax is taken in f32.
//!
//! What a pair sees of a tile of keys is rounded up to steps of 32 keys; scores of keys that a query does not see are -∞, so that these
//! add zeros, and a query's bits do not depend on the others.

use std::ops::Range;

use super::columns::{Columns, cap_scores, finite_or_zero};
use super::forward::Task;
use super::sight::{KeyTile, QueryTile, TILE_KEYS};
use crate::cpu::product::bf16::layout::{SIDE, STEP, TILE};
use crate::cpu::product::bf16::pack::{
    Right, pack_wide, round_columns, round_rows, split_rows, turn_square,
};
use crate::cpu::product::bf16::rounded::{LeftTiles, RightTiles, multiply_rounded};
use crate::cpu::product::bf16::{Unit, with_unit};
use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::exp;
use crate::view::View;

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

mod backward;

pub(super) use backward::backward;

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
pub(super) fn forward(task: &Task<'_>, tile: &QueryTile<'_>, kv_head: usize) {
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
    task: &Task<'_>,
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
