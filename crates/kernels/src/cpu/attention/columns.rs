//! The columns of a tile: its queries, each once for every head of the group, 16 to a panel.
//!
//! Column `query · group + head`; columns past the last are zero. So the 16 columns of a panel are a few neighbouring queries, and
//! what a causal panel computes in vain is little.

use std::ops::{Range, RangeFrom};

use super::sight::{KeyTile, PAIR, QueryTile, TILE_KEYS};
use crate::cpu::product::layout::NR;
use crate::cpu::product::mat::MatMut;
use crate::cpu::simd::{tanh, vectorize};
use crate::types::attention::AttentionShape;
use crate::view::View;

/// The heads of a tile that share a key/value head.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    /// Queries.
    count: usize,
    /// Heads of each.
    group: usize,
    /// D.
    size: usize,
    /// The first head.
    first: usize,
}

impl Columns {
    pub(super) fn new(tile: &QueryTile<'_>, kv_head: usize, shape: &AttentionShape) -> Self {
        let group = shape.group();
        Self {
            count: tile.queries.len(),
            group,
            size: shape.head_size,
            first: kv_head * group,
        }
    }

    /// Panels of a pair.
    pub(super) fn pair(&self, pair: usize) -> Range<usize> {
        PAIR * pair..(PAIR * pair + PAIR).min(self.panels())
    }

    pub(super) fn pairs(&self) -> usize {
        self.panels().div_ceil(PAIR)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count * self.group
    }

    pub(super) fn panels(&self) -> usize {
        self.len().div_ceil(NR)
    }

    /// The query and the head, counted from the first, of a column.
    pub(super) fn at(&self, column: usize) -> (usize, usize) {
        (column / self.group, column % self.group)
    }

    /// Where the scores of a panel lie, of tile of keys number `slot` of those that are kept.
    pub(super) fn scores(&self, slot: usize, panel: usize) -> RangeFrom<usize> {
        ((slot * self.panels() + panel) * TILE_KEYS * NR)..
    }

    /// factor · rows of q, one a column: panels [panels][D][16].
    pub(super) fn pack_turned(
        &self,
        to: &mut [f32],
        from: View<'_>,
        rows: &Range<usize>,
        factor: f32,
    ) {
        let size = self.size;
        for (panel, to) in to.chunks_exact_mut(size * NR).enumerate() {
            let sources: [&[f32]; NR] =
                std::array::from_fn(|j| self.source(from, rows, panel * NR + j));
            vectorize(
                #[inline(always)]
                || turn_in(to, &sources, size, factor),
            );
        }
    }

    /// factor · rows of q, one a column: panels of 16 of the D numbers, [⌈D / 16⌉][panels · 16][16]; what is past the last is
    /// zero.
    pub(super) fn pack_straight(
        &self,
        to: &mut [f32],
        from: View<'_>,
        rows: &Range<usize>,
        factor: f32,
    ) {
        let width = self.panels() * NR;
        for (block, to) in to.chunks_exact_mut(width * NR).enumerate() {
            let part = block * NR..((block + 1) * NR).min(self.size);
            for (column, to) in to.as_chunks_mut::<NR>().0.iter_mut().enumerate() {
                let from = self.source(from, rows, column);
                if from.is_empty() {
                    to.fill(0.0);
                    continue;
                }
                let (to, past) = to.split_at_mut(part.len());
                past.fill(0.0);
                for (to, from) in to.iter_mut().zip(&from[part.clone()]) {
                    *to = factor * from;
                }
            }
        }
    }

    /// The D numbers of a column; none past the last.
    pub(super) fn source<'a>(
        &self,
        from: View<'a>,
        rows: &Range<usize>,
        column: usize,
    ) -> &'a [f32] {
        if column >= self.len() {
            return &[];
        }
        let (query, head) = self.at(column);
        let start = (rows.start + query) * from.cols() + (self.first + head) * self.size;
        &from.f32s()[start..][..self.size]
    }

    /// Rows of one block of heads from panels [panels][D][16], each column times its factor.
    pub(super) fn unpack(&self, to: &mut MatMut<'_>, from: &[f32], factors: &[f32]) {
        let size = self.size;
        for (panel, from) in from.chunks_exact(size * NR).enumerate() {
            let first = panel * NR;
            for j in 0..NR.min(self.len().saturating_sub(first)) {
                let (query, head) = self.at(first + j);
                let to = &mut to.row(query)[head * size..][..size];
                let factor = factors[first + j];
                for (to, from) in to.iter_mut().zip(from.as_chunks::<NR>().0) {
                    *to = factor * from[j];
                }
            }
        }
    }

    /// From where to where a column sees a tile of keys; columns past the last see what it does.
    pub(super) fn sees_keys(
        &self,
        column: usize,
        tile: &QueryTile<'_>,
        keys: &KeyTile,
    ) -> (usize, usize) {
        let end = keys.position + keys.rows.len();
        let query = (column / self.group).min(self.count - 1);
        let seen = tile.sight.keys(tile.queries.start + query);
        let from = seen.start.clamp(keys.position, end) - keys.position;
        let to = seen.end.clamp(keys.position, end) - keys.position;
        (from, to)
    }

    /// What the queries of a pair of panels see of a tile of keys.
    pub(super) fn sees(&self, pair: usize, tile: &QueryTile<'_>, keys: &KeyTile) -> Seen {
        let first = pair * PAIR * NR;
        let of = |column: usize| self.sees_keys(first + column, tile, keys);
        // Both ends move on with the query.
        let (first, last) = (of(0), of(PAIR * NR - 1));
        let all = first.0..last.1.max(first.0);
        let whole = first == last;
        Seen {
            all,
            each: (!whole).then(|| std::array::from_fn(of)),
        }
    }
}

/// Keys of a tile that a pair of panels sees.
pub(super) struct Seen {
    /// Some query does.
    pub(super) all: Range<usize>,
    /// From where to where each column does; `None`: all the same.
    each: Option<[(usize, usize); PAIR * NR]>,
}

impl Seen {
    /// Sets scores [keys of `all`, 16] of one panel of the pair that a query does not see to -∞.
    pub(super) fn mask(&self, panel: usize, scores: &mut [[f32; NR]]) {
        let Some(each) = &self.each else { return };
        let each = &each[panel * NR..][..NR];
        let hide = |scores: &mut [[f32; NR]], keys: Range<usize>| {
            for key in keys {
                let row = &mut scores[key - self.all.start];
                for (score, (from, to)) in row.iter_mut().zip(each) {
                    if key < *from || key >= *to {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        };
        // What is between the last start and the first end is seen by all.
        let seen_from = each[NR - 1].0.clamp(self.all.start, self.all.end);
        let seen_to = each[0].1.clamp(seen_from, self.all.end);
        hide(scores, self.all.start..seen_from);
        hide(scores, seen_to..self.all.end);
    }
}

/// Where nothing has been seen the maximum is -∞, and -∞ - -∞ is NaN.
#[inline(always)]
pub(super) fn finite_or_zero(x: f32) -> f32 {
    if x == f32::NEG_INFINITY { 0.0 } else { x }
}

/// Scores s become cap · tanh(s / cap).
pub(super) fn cap_scores(scores: &mut [f32], cap: f32) {
    let inverse = 1.0 / cap;
    vectorize(
        #[inline(always)]
        || {
            for score in scores.iter_mut() {
                *score = cap * tanh(*score * inverse);
            }
        },
    );
}

/// The same, with the slope 1 - tanh² of each score.
pub(super) fn cap_scores_with_slopes(scores: &mut [f32], slopes: &mut [f32], cap: f32) {
    let inverse = 1.0 / cap;
    vectorize(
        #[inline(always)]
        || {
            for (score, slope) in scores.iter_mut().zip(slopes.iter_mut()) {
                let capped = tanh(*score * inverse);
                *score = cap * capped;
                *slope = 1.0 - capped * capped;
            }
        },
    );
}

/// A panel [D][16] from 16 rows of D numbers; empty ones stand for zeros.
#[inline(always)]
fn turn_in(to: &mut [f32], rows: &[&[f32]; NR], size: usize, factor: f32) {
    const SIDE: usize = 8;
    let whole = size / SIDE * SIDE;
    let to = to.as_chunks_mut::<NR>().0;
    for half in 0..NR / SIDE {
        let rows = &rows[half * SIDE..][..SIDE];
        if rows.iter().all(|row| !row.is_empty()) {
            for d in (0..whole).step_by(SIDE) {
                let mut square = [[0.0; SIDE]; SIDE];
                for (to, row) in square.iter_mut().zip(rows) {
                    to.copy_from_slice(&row[d..d + SIDE]);
                }
                for i in 0..SIDE {
                    for j in 0..SIDE {
                        to[d + i][half * SIDE + j] = factor * square[j][i];
                    }
                }
            }
        } else {
            for (d, to) in to.iter_mut().enumerate().take(whole) {
                for (to, row) in to[half * SIDE..].iter_mut().zip(rows) {
                    *to = row.get(d).map_or(0.0, |x| factor * x);
                }
            }
        }
        for (d, to) in to.iter_mut().enumerate().take(size).skip(whole) {
            for (to, row) in to[half * SIDE..].iter_mut().zip(rows) {
                *to = row.get(d).map_or(0.0, |x| factor * x);
            }
        }
    }
}
