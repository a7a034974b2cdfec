//! What attention is given beside matrices.

use std::ops::Range;

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
    /// How many keys there are.
    pub(crate) fn total_keys(&self) -> usize {
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
    /// Scores s become c · tanh(s / c) (`attn_logit_softcapping`).
    pub softcap: Option<f32>,
    /// How many keys back a query sees, its own included; without `causal` as many forward. The
    /// own key of query i of n is number `total_keys - n + i`.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Query heads that share a key/value head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// What a segment's queries see.
#[derive(Clone, Copy)]
pub(crate) struct Sight<'a> {
    pub(crate) segment: &'a Segment,
    pub(crate) total_keys: usize,
    pub(crate) window: usize,
}

impl<'a> Sight<'a> {
    pub(crate) fn new(segment: &'a Segment, shape: &AttentionShape) -> Self {
        Self {
            segment,
            total_keys: segment.total_keys(),
            window: shape.window.unwrap_or(usize::MAX),
        }
    }

    /// The keys that query `i` of the segment sees, as positions in the concatenated list.
    pub(crate) fn keys(&self, i: usize) -> Range<usize> {
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
    pub(crate) fn span(&self, queries: &Range<usize>) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        self.keys(queries.start).start..self.keys(queries.end - 1).end
    }
}
