//! What queries see, in tiles of queries and of keys.

use std::ops::Range;

use crate::cpu::product::blocks::{add_pair, add_rows};
use crate::cpu::product::layout::{Left, NR};
use crate::cpu::product::mat::MatMut;
use crate::types::attention::{AttentionShape, Segment, Sight};
use crate::types::classes::RowClasses;

/// Queries times heads of a tile, at most, where a query has fewer heads.
pub(super) const TILE_COLUMNS: usize = 192;
/// Keys of a tile.
pub(super) const TILE_KEYS: usize = 128;

impl Sight<'_> {
    /// Calls `work` for tiles of the keys at these positions: runs of consecutive rows.
    ///
    /// A tile begins at a multiple of its size from the start of its range, or where the span does. So the sums over what a
    /// query sees are cut in the same places whichever queries are beside it, and however long the last range has grown.
    pub(super) fn for_key_tiles(&self, span: Range<usize>, work: impl FnMut(KeyTile)) {
        self.for_key_steps(span, 1, work);
    }

    /// The same, where a tile may begin up to a step before the span, so that it begins at a multiple of one, too.
    pub(super) fn for_key_steps(
        &self,
        span: Range<usize>,
        step: usize,
        mut work: impl FnMut(KeyTile),
    ) {
        let mut at = 0;
        for range in &self.segment.keys {
            let first = span.start.clamp(at, at + range.len());
            let last = span.end.clamp(at, at + range.len());
            let mut start = first - (first - at) % step;
            while first < last && start < last {
                let end = (start + TILE_KEYS - (start - at) % TILE_KEYS).min(last);
                work(KeyTile {
                    rows: range.start + start - at..range.start + end - at,
                    position: start,
                });
                start = end;
            }
            at += range.len();
        }
    }
}

/// A run of rows of k and v.
pub(super) struct KeyTile {
    pub(super) rows: Range<usize>,
    /// Position of the first of them in the segment's list of keys.
    pub(super) position: usize,
}

/// Queries of one segment that one task takes.
pub(super) struct QueryTile<'a> {
    pub(super) sight: Sight<'a>,
    /// Numbered from the segment's first query.
    pub(super) queries: Range<usize>,
}

impl QueryTile<'_> {
    /// Whether its query is a generated one.
    pub(super) fn is_generated(&self, classes: RowClasses) -> bool {
        classes.is_generated(self.rows().start)
    }

    /// Rows of q and o.
    pub(super) fn rows(&self) -> Range<usize> {
        let start = self.sight.segment.queries.start;
        start + self.queries.start..start + self.queries.end
    }
}

/// Queries of a tile: whole pairs of panels where that is possible.
pub(super) fn tile_queries(group: usize) -> usize {
    let most = (TILE_COLUMNS / group).max(1);
    let whole = (1..=most)
        .rev()
        .find(|n| (n * group).is_multiple_of(PAIR * NR));
    whole.unwrap_or(most)
}

/// Panels that are multiplied at once: what they see of the keys is read once for both.
pub(super) const PAIR: usize = 2;

/// Panels that lie so many numbers apart.
pub(super) struct Panels<'a> {
    pub(super) numbers: &'a [f32],
    pub(super) apart: usize,
}

/// `rows` rows of a pair of outputs of 16 columns, which lie `apart`, (+)= Σ lefts · panel of a pair. Of a pair there may be but one.
pub(super) fn multiply_pair<const COL: usize>(
    (to, apart): (&mut [f32], usize),
    rows: usize,
    add: bool,
    left: Left<'_>,
    panels: &Panels<'_>,
) {
    let Some((low, high)) = to
        .split_at_mut_checked(apart)
        .filter(|(_, high)| !high.is_empty())
    else {
        let mut out = MatMut::new(&mut to[..rows * NR], rows, NR);
        return add_rows::<COL>(&mut out, 0, rows, 0, add, &[left], panels.numbers);
    };
    let out = |to| MatMut::new(to, rows, NR);
    let outs = (out(&mut low[..rows * NR]), out(&mut high[..rows * NR]));
    add_pair::<COL>(outs, add, &[left], panels.numbers.split_at(panels.apart));
}

/// Cuts segments into tiles of queries.
pub(super) fn query_tiles<'a>(
    segments: impl IntoIterator<Item = &'a Segment>,
    shape: &AttentionShape,
) -> Vec<QueryTile<'a>> {
    let step = tile_queries(shape.group());
    let mut tiles = Vec::new();
    for segment in segments {
        let count = segment.queries.len();
        let sight = Sight::new(segment, shape);
        tiles.extend((0..count).step_by(step).map(|start| QueryTile {
            sight,
            queries: start..(start + step).min(count),
        }));
    }
    tiles
}
