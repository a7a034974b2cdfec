//! Scaled dot-product attention over segments, without padding and without a T×T matrix.
//!
//! For a query head h and its key/value head, o = softmax(scale · q·kᵀ) · v over the keys that the
//! query sees. The work is cut into tiles of queries × keys, with the softmax taken as the tiles
//! come (Dao et al., "FlashAttention", 2022); only the log-sum-exp of each query and head is saved.
//!
//! All queries of the heads that share a key/value head are put side by side, as columns of panels
//! (see [`blocks`](crate::cpu::product::blocks)), and a panel goes through all it sees of a tile of keys at once:
//! its scores are [keys, 16], so the maximum and the sum over the keys are plain vector operations, and
//! products read them where they lie.
//!
//! Everything here overwrites.

mod backward;
mod columns;
mod forward;
mod single;

use std::ops::Range;

pub use backward::attention_backward;
pub use forward::attention_forward;

use crate::classes::RowClasses;
use crate::cpu::product::blocks::{add_pair, add_rows};
use crate::cpu::product::layout::{Left, NR};
use crate::cpu::product::mat::MatMut;
use crate::view::View;

/// Queries that see the same list of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Rows of q and o. Segments of one call must not share queries.
    pub queries: Range<usize>,
    /// Rows of k and v, concatenated in this order. Segments may share keys.
    pub keys: Vec<Range<usize>>,
    /// Whether query i of n sees only the first `total_keys - n + i + 1` keys.
    pub causal: bool,
}

impl Segment {
    fn total_keys(&self) -> usize {
        self.keys.iter().map(ExactSizeIterator::len).sum()
    }
}

/// The heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// H, the number of query heads.
    pub heads: usize,
    /// KV, the number of key/value heads; it divides H.
    pub kv_heads: usize,
    /// D, the size of a head.
    pub head_size: usize,
    /// Factor of the scores, usually 1/√D.
    pub scale: f32,
    /// How many keys back a query sees, its own included; without `causal` as many forward. The
    /// own key of query i of n is number `total_keys - n + i`.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Query heads that share a key/value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// Queries times heads of a tile, at most, where a query has fewer heads.
const TILE_COLUMNS: usize = 192;
/// Keys of a tile.
const TILE_KEYS: usize = 128;

/// What a segment's queries see.
#[derive(Clone, Copy)]
struct Sight<'a> {
    segment: &'a Segment,
    total_keys: usize,
    window: usize,
}

impl<'a> Sight<'a> {
    fn new(segment: &'a Segment, shape: &AttentionShape) -> Self {
        Self {
            segment,
            total_keys: segment.total_keys(),
            window: shape.window.unwrap_or(usize::MAX),
        }
    }

    /// The keys that query `i` of the segment sees, as positions in the concatenated list.
    fn keys(&self, i: usize) -> Range<usize> {
        // The position after the query's own; its own may be before the first key.
        let next = (self.total_keys + i + 1).saturating_sub(self.segment.queries.len());
        let first = next.saturating_sub(self.window);
        let last = if self.segment.causal {
            next
        } else {
            next.saturating_sub(1).saturating_add(self.window)
        };
        let last = last.min(self.total_keys);
        first.min(last)..last
    }

    /// All keys that some of these queries see.
    fn span(&self, queries: &Range<usize>) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        self.keys(queries.start).start..self.keys(queries.end - 1).end
    }

    /// Calls `work` for tiles of the keys at these positions: runs of consecutive rows.
    ///
    /// A tile begins at a multiple of its size from the start of its range, or where the span does. So the sums over what a
    /// query sees are cut in the same places whichever queries are beside it, and however long the last range has grown.
    fn for_key_tiles(&self, span: Range<usize>, mut work: impl FnMut(KeyTile)) {
        let mut at = 0;
        for range in &self.segment.keys {
            let first = span.start.clamp(at, at + range.len());
            let last = span.end.clamp(at, at + range.len());
            let mut start = first;
            while start < last {
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
struct KeyTile {
    rows: Range<usize>,
    /// Position of the first of them in the segment's list of keys.
    position: usize,
}

/// Queries of one segment that one task takes.
struct QueryTile<'a> {
    sight: Sight<'a>,
    /// Numbered from the segment's first query.
    queries: Range<usize>,
}

impl QueryTile<'_> {
    /// Whether its query is a generated one.
    fn is_generated(&self, classes: RowClasses) -> bool {
        classes.is_generated(self.rows().start)
    }

    /// Rows of q and o.
    fn rows(&self) -> Range<usize> {
        let start = self.sight.segment.queries.start;
        start + self.queries.start..start + self.queries.end
    }
}

/// Queries of a tile: whole pairs of panels where that is possible.
fn tile_queries(group: usize) -> usize {
    let most = (TILE_COLUMNS / group).max(1);
    let whole = (1..=most)
        .rev()
        .find(|n| (n * group).is_multiple_of(PAIR * NR));
    whole.unwrap_or(most)
}

/// Panels that are multiplied at once: what they see of the keys is read once for both.
const PAIR: usize = 2;

/// Panels that lie so many numbers apart.
struct Panels<'a> {
    numbers: &'a [f32],
    apart: usize,
}

/// `rows` rows of a pair of outputs of 16 columns, which lie `apart`, (+)= Σ lefts · panel of a pair. Of a pair there may be but one.
fn multiply_pair<const COL: usize>(
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
fn query_tiles<'a>(
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

/// Multiplications of one product over everything that is seen: Σ keys seen, times heads, times D.
fn seen_pairs(segments: &[Segment], shape: &AttentionShape) -> f64 {
    let seen: usize = segments
        .iter()
        .map(|segment| {
            let sight = Sight::new(segment, shape);
            (0..segment.queries.len())
                .map(|i| sight.keys(i).len())
                .sum::<usize>()
        })
        .sum();
    (seen * shape.heads * shape.head_size) as f64
}

/// Panics unless each segment is of one class, and a generated one has one query.
fn check_classes(segments: &[Segment], classes: RowClasses) {
    for Segment { queries, .. } in segments.iter().filter(|s| !s.queries.is_empty()) {
        assert!(
            !classes.is_generated(queries.end - 1) || queries.len() == 1,
            "generated rows are one a sequence, but queries {queries:?} are of one segment"
        );
    }
}

/// Panics unless all shapes fit, all ranges lie within them, and no two segments share a query.
fn check(q: View<'_>, k: View<'_>, v: View<'_>, segments: &[Segment], shape: &AttentionShape) {
    assert!(
        shape.kv_heads > 0 && shape.heads > 0 && shape.heads.is_multiple_of(shape.kv_heads),
        "{} query heads cannot share {} key/value heads",
        shape.heads,
        shape.kv_heads
    );
    assert!(shape.head_size > 0, "heads have at least one element");
    assert!(shape.window != Some(0), "a window holds at least one key");
    q.assert_shape("q", q.rows(), shape.heads * shape.head_size);
    k.assert_shape("k", k.rows(), shape.kv_heads * shape.head_size);
    v.assert_shape("v", k.rows(), shape.kv_heads * shape.head_size);
    let mut starts: Vec<&Range<usize>> = Vec::with_capacity(segments.len());
    for segment in segments {
        let queries = &segment.queries;
        assert!(
            queries.start <= queries.end && queries.end <= q.rows(),
            "queries {queries:?} do not lie within the {} there are",
            q.rows()
        );
        for keys in &segment.keys {
            assert!(
                keys.start <= keys.end && keys.end <= k.rows(),
                "keys {keys:?} do not lie within the {} there are",
                k.rows()
            );
        }
        assert!(
            !segment.causal || segment.total_keys() >= queries.len(),
            "{} causal queries see only {} keys",
            queries.len(),
            segment.total_keys()
        );
        if !queries.is_empty() {
            starts.push(queries);
        }
    }
    starts.sort_unstable_by_key(|queries| queries.start);
    for pair in starts.windows(2) {
        assert!(
            pair[0].end <= pair[1].start,
            "segments share the queries from {} on",
            pair[1].start
        );
    }
}
