//! What attention with relative positions is given beside matrices.

use std::ops::Range;

use crate::view::{View, ViewMut};

/// A sequence whose rows all see each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelativeSegment {
    /// Rows of q, k, v and o. Segments of one call must not share rows.
    pub rows: Range<usize>,
    /// Where its rows of the positions begin, from which [`places`](RelativeShape::places) are counted. Segments may share them.
    pub first: usize,
}

/// The heads of an attention layer, and which relative position stands for which distance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RelativeShape<'a> {
    /// H, the number of heads.
    pub heads: usize,
    /// D, the size of a head.
    pub head_size: usize,
    /// Factor of the sum of a score's terms.
    pub scale: f32,
    /// The row of the positions for every distance i - j of a query from a key, the smallest distance first: 2n - 1 numbers for segments
    /// of up to n rows.
    pub places: &'a [u32],
}

impl<'a> RelativeShape<'a> {
    /// The longest segment that it has places for.
    pub(crate) fn reach(&self) -> usize {
        self.places.len().div_ceil(2)
    }

    /// The places of a segment of `count` rows, at least one: number `count - 1 + i - j` is that of query i and key j.
    pub(crate) fn of(&self, count: usize) -> &'a [u32] {
        let middle = self.reach() - 1;
        &self.places[middle + 1 - count..middle + count]
    }
}

/// Relative positions [S, H·D], as the scores read them; an absent one takes no part.
#[derive(Clone, Copy)]
pub struct RelativePositions<'a> {
    /// Positions as keys, which queries are multiplied with.
    pub keys: Option<View<'a>>,
    /// Positions as queries, which keys are multiplied with.
    pub queries: Option<View<'a>>,
}

/// The gradients of [`RelativePositions`]; those are there that the positions are.
pub struct RelativeGradients<'a> {
    /// Of the positions as keys.
    pub keys: Option<ViewMut<'a>>,
    /// Of the positions as queries.
    pub queries: Option<ViewMut<'a>>,
}
