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
    /// Rows whose output is scored, in ascending order; row `t` predicts `targets` of the same index. A row that several
    /// sequences share comes once for each label that it predicts.
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
        self.push_shared(0, &[(ids, supervised)]);
    }

    /// Adds sequences, given as for [`push`](Self::push), whose first `prefix` tokens are the same. These are rows of the
    /// batch once; what follows them in a sequence sees them and itself. Labels are scored for every sequence that has
    /// them, so losses and gradients are those of the sequences pushed one by one, up to rounding.
    ///
    /// # Panics
    /// If a sequence is shorter than `prefix`.
    pub fn push_shared(&mut self, prefix: usize, sequences: &[(&[u32], &[bool])]) {
        let Some((first, _)) = sequences.first() else {
            return;
        };
        let shared = self.append(0..0, &first[..prefix]);
        // The last shared row predicts what each sequence goes on with.
        for i in 1..=prefix {
            for (ids, supervised) in sequences {
                self.score(shared.start + i - 1, i, ids, supervised);
            }
        }
        for (ids, supervised) in sequences {
            debug_assert_eq!(ids[..prefix], first[..prefix], "the prefix is the same");
            let own = self.append(shared.clone(), &ids[prefix..]);
            for i in prefix + 1..ids.len() {
                self.score(own.start + i - prefix - 1, i, ids, supervised);
            }
        }
    }

    /// Adds rows that go on after the rows `before`, and see these and themselves.
    fn append(&mut self, before: Range<usize>, ids: &[u32]) -> Range<usize> {
        let rows = self.ids.len()..self.ids.len() + ids.len();
        if rows.is_empty() {
            return rows;
        }
        let position = before.len() as u32;
        self.ids.extend_from_slice(ids);
        self.positions.extend(position..position + ids.len() as u32);
        let mut keys = vec![before, rows.clone()];
        keys.retain(|keys| !keys.is_empty());
        self.segments.push(Segment {
            queries: rows.clone(),
            keys,
            causal: true,
        });
        rows
    }

    /// Scores `row` on token `i` of a sequence, if that is a label.
    fn score(&mut self, row: usize, i: usize, ids: &[u32], supervised: &[bool]) {
        if supervised.get(i) == Some(&true) {
            self.supervised.push(row as u32);
            self.targets.push(ids[i]);
        }
    }

    /// Whether so few rows are scored that the last block goes on with these alone: picking them out must pay off.
    pub(crate) fn goes_on_with(scored: usize, tokens: usize) -> bool {
        10 * scored < 9 * tokens
    }

    /// Which adapter a range of these ascending rows uses, counted among them.
    pub(crate) fn adapters_of(&self, rows: &[u32]) -> Vec<(Range<usize>, usize)> {
        let before = |row: usize| rows.partition_point(|r| (*r as usize) < row);
        self.adapters
            .iter()
            .map(|(range, index)| (before(range.start)..before(range.end), *index))
            .collect()
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

    #[test]
    fn a_shared_prefix_is_there_once_and_scored_for_each_sequence() {
        let mut batch = Batch::default();
        batch.push(&[1, 2], &[false, true]);
        let mask = [false, true, true, true, true];
        // The second sequence has nothing of its own, and the third has no label in the prefix.
        batch.push_shared(
            3,
            &[
                (&[5, 6, 7, 8, 9], &mask),
                (&[5, 6, 7], &mask[..3]),
                (&[5, 6, 7, 4], &[false, false, false, true]),
            ],
        );
        assert_eq!(batch.ids, [1, 2, 5, 6, 7, 8, 9, 4]);
        assert_eq!(batch.positions, [0, 1, 0, 1, 2, 3, 4, 3]);
        assert_eq!(batch.supervised, [0, 2, 2, 3, 3, 4, 4, 5]);
        assert_eq!(batch.targets, [2, 6, 6, 7, 7, 8, 4, 9]);
        let segments = [
            (0..2, None),
            (2..5, None),
            (5..7, Some(2..5)),
            (7..8, Some(2..5)),
        ];
        let expected = segments.map(|(queries, before)| Segment {
            keys: before.into_iter().chain([queries.clone()]).collect(),
            queries,
            causal: true,
        });
        assert_eq!(batch.segments, expected);
    }
}
