//! From rows of sequences to the rows of a batch, with their places in the cache and what they see there.

use std::ops::Range;

use lowrank_kernels::Segment;

use crate::model::{Batch, CacheRows, VirtualPart};

/// A batch under construction: rows of prompts first, then the rows that are new tokens.
#[derive(Default)]
pub(super) struct Layout {
    pub(super) batch: Batch,
    /// Rows whose logits are wanted, ascending.
    pub(super) wanted: Vec<u32>,
}

/// A prompt that is read, maybe in pieces.
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    /// Trained embeddings behind it.
    infix: usize,
    /// Rows that were read.
    filled: usize,
}

impl Prompt {
    pub(super) fn new(ids: Vec<u32>, infix: usize) -> Self {
        Self {
            ids,
            infix,
            filled: 0,
        }
    }

    /// Its first rows are in the cache already.
    pub(super) fn skip(&mut self, rows: usize) {
        self.filled = rows;
    }

    /// Rows that were read.
    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// Its rows, those of trained embeddings among them.
    pub(super) fn len(&self) -> usize {
        self.ids.len() + self.infix
    }

    /// Whether there is more to read.
    pub(super) fn is_unread(&self) -> bool {
        self.filled < self.len()
    }

    /// Adds the next rows, which are the first of `rows`: `most` tokens, and the trained embeddings behind the last one. The logits of
    /// the last row are wanted, or of `every` row. Gives the number of rows.
    pub(super) fn read(
        &mut self,
        layout: &mut Layout,
        sight: &Sight<'_>,
        rows: &CacheRows,
        (most, every): (usize, bool),
    ) -> usize {
        let first = self.filled;
        let tokens = (self.ids.len() - first).min(most);
        let is_last = first + tokens == self.ids.len();
        self.filled += tokens + if is_last { self.infix } else { 0 };
        let ids = &self.ids[first..first + tokens];
        let new = layout.push(sight, rows, first..self.filled, ids);
        if every {
            (new.start..new.end - 1).for_each(|row| layout.want(row));
        }
        if is_last || every {
            layout.want(new.end - 1);
        }
        new.len()
    }
}

/// What comes before a sequence's own rows, and the adapter that these use.
pub(super) struct Sight<'a> {
    /// What the sequence's adapter puts before it.
    pub(super) before: &'a CacheRows,
    /// Index of the adapter in the pass's set.
    pub(super) adapter: Option<usize>,
}

impl Layout {
    /// Adds rows `own` of a sequence whose rows are `rows`: they see what is before the sequence, its earlier rows and themselves.
    pub(super) fn push(
        &mut self,
        sight: &Sight<'_>,
        rows: &CacheRows,
        own: Range<usize>,
        ids: &[u32],
    ) -> Range<usize> {
        let keys = rows.places(0..own.end);
        let position = sight.before.len() + own.start;
        self.push_seeing(sight, keys, (rows, own), position, ids)
    }

    /// Adds rows that are written to `own` rows of `rows`, stand at the positions from `position` on, and see what is before their
    /// sequence and then these keys, their own among them. Of `ids` there may be fewer: trained embeddings follow them.
    pub(super) fn push_seeing(
        &mut self,
        sight: &Sight<'_>,
        keys: impl Iterator<Item = Range<usize>>,
        (rows, own): (&CacheRows, Range<usize>),
        position: usize,
        ids: &[u32],
    ) -> Range<usize> {
        let batch = &mut self.batch;
        let start = batch.tokens();
        let new = start..start + own.len();
        batch.ids.extend_from_slice(ids);
        if ids.len() < own.len() {
            let embedded = batch.tokens()..new.end;
            batch.ids.resize(new.end, 0);
            batch.embedded.push((embedded, VirtualPart::Infix));
        }
        let positions = position..position + new.len();
        batch.positions.extend(positions.map(|p| p as u32));
        batch.appends.extend(rows.appends(start, own));
        let before = sight.before.places(0..sight.before.len());
        batch.segments.push(Segment {
            queries: new.clone(),
            keys: before.chain(keys).collect(),
            causal: true,
        });
        if let Some(adapter) = sight.adapter {
            match batch.adapters.last_mut() {
                Some((rows, last)) if *last == adapter && rows.end == new.start => {
                    rows.end = new.end;
                }
                _ => batch.adapters.push((new.clone(), adapter)),
            }
        }
        new
    }

    /// Adds an adapter's trained embeddings that stand before its sequences.
    pub(super) fn push_prefix(&mut self, rows: &CacheRows, adapter: usize) {
        let nothing = CacheRows::default();
        let sight = Sight {
            before: &nothing,
            adapter: Some(adapter),
        };
        let new = self.push(&sight, rows, 0..rows.len(), &vec![0; rows.len()]);
        self.batch.embedded.push((new, VirtualPart::Prefix));
    }

    /// Asks for the logits of a row.
    pub(super) fn want(&mut self, row: usize) {
        self.wanted.push(row as u32);
    }
}
