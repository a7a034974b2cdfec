//! What one pass computes on: examples laid end to end, without padding.

use std::ops::Range;

use lowrank_kernels::Segment;

/// T tokens of one or more sequences, concatenated.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, `[T]`.
    pub ids: Vec<u32>,
    /// The place of each token in its own sequence, `[T]`.
    pub positions: Vec<u32>,
    /// Which rows attend to which.
    pub segments: Vec<Segment>,
    /// Rows whose output is scored, ascending; row `t` predicts `targets` of the same index.
    pub supervised: Vec<u32>,
    /// The token that each supervised row must predict.
    pub targets: Vec<u32>,
    /// Which adapter of the [`AdapterSet`](crate::tuning::AdapterSet) a range of rows uses; rows in no range use none.
    pub adapters: Vec<(Range<usize>, usize)>,
    /// With a KV cache: rows of this batch and the cache row that the first of them is written to.
    pub appends: Vec<(Range<usize>, usize)>,
}

impl Batch {
    /// Number of tokens T.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Adds a whole sequence that sees only itself. `supervised[i]` says that token `i` is a label, so that row `i - 1`
    /// is scored; the first token never is.
    pub fn push(&mut self, ids: &[u32], supervised: &[bool]) {
        let start = self.ids.len();
        let rows = start..start + ids.len();
        self.ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        for (i, _) in supervised.iter().enumerate().skip(1).filter(|(_, s)| **s) {
            self.supervised.push((start + i - 1) as u32);
            self.targets.push(ids[i]);
        }
        self.segments.push(Segment {
            queries: rows.clone(),
            keys: vec![rows],
            causal: true,
        });
    }

    /// Lets every row use the adapter `index`.
    #[must_use]
    pub fn with_adapter(mut self, index: usize) -> Self {
        self.adapters = vec![(0..self.tokens(), index)];
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_scored_one_row_earlier() {
        let mut batch = Batch::default();
        batch.push(&[5, 6, 7], &[true, false, true]);
        batch.push(&[8, 9], &[false, true]);
        assert_eq!(batch.supervised, [1, 3]);
        assert_eq!(batch.targets, [7, 9]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.segments[1].queries, 3..5);
    }
}
