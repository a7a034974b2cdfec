//! What one pass computes on: examples laid end to end, without padding.

use std::ops::Range;

use lowrank_kernels::{RowClasses, Segment};

use super::config::ModelConfig;

/// What an adapter puts where tokens would stand. A sequence is then: trained keys and values, prefix, prompt, infix,
/// completion, and its positions count all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtualTokens {
    /// Trained keys and values before every sequence, in each block.
    pub keys: usize,
    /// Trained embeddings before every sequence.
    pub prefix: usize,
    /// Trained embeddings between a sequence's prompt and what follows.
    pub infix: usize,
}

impl VirtualTokens {
    /// Positions that a sequence has less for its own tokens.
    pub fn total(self) -> usize {
        self.keys + self.prefix + self.infix
    }
}

/// Which tokens of a sequence are scored by a classifier.
#[derive(Clone, Copy, Debug)]
pub enum Scored<'a> {
    /// The first row, be it a virtual token.
    First,
    /// The last token.
    Last,
    /// The mean of the tokens.
    Mean,
    /// Each of these tokens, ascending.
    Tokens(&'a [u32]),
}

/// Which trained embeddings a row stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtualPart {
    /// Those before a sequence.
    Prefix,
    /// Those behind a prompt.
    Infix,
}

/// T tokens of one or more sequences, concatenated.
///
/// Where the batch begins with [virtual tokens](Self::with_virtual), its sequences share the rows of the prefix, and the
/// keys and values that attention reads are `virtual_tokens.keys` trained rows with the batch's own rows behind them.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, `[T]`; 0 where a trained embedding stands.
    pub ids: Vec<u32>,
    /// The place of each token in its own sequence, `[T]`.
    pub positions: Vec<u32>,
    /// Which of two texts each row belongs to, `[T]`; empty where none is the second one's.
    pub token_types: Vec<u32>,
    /// Which rows attend to which.
    pub segments: Vec<Segment>,
    /// Rows whose output is scored, in ascending order; row `t` predicts `targets` of the same index. A row that several
    /// sequences share comes once for each label that it predicts.
    pub supervised: Vec<u32>,
    /// The token that each supervised row must predict; empty where a classifier scores them.
    pub targets: Vec<u32>,
    /// For each row that a classifier reads, the supervised rows that it is the mean of.
    pub pools: Vec<Range<usize>>,
    /// Which adapter of the [`AdapterSet`](super::AdapterSet) a range of rows uses; rows in no range use none.
    pub adapters: Vec<(Range<usize>, usize)>,
    /// With a KV cache: rows of this batch and the cache row that the first of them is written to.
    pub appends: Vec<(Range<usize>, usize)>,
    /// With a KV cache: how many of the last rows are generated, each the one new token of its sequence. They are computed as if each
    /// were alone.
    pub generated: usize,
    /// What the adapter of these rows puts before and between their tokens.
    pub virtual_tokens: VirtualTokens,
    /// Rows whose embeddings are the adapter's.
    pub embedded: Vec<(Range<usize>, VirtualPart)>,
}

impl Batch {
    /// A batch whose sequences all have these virtual tokens. The rows of the prefix come first.
    pub fn with_virtual(virtual_tokens: VirtualTokens) -> Self {
        let mut batch = Self {
            virtual_tokens,
            ..Self::default()
        };
        batch.append_virtual(&[], VirtualPart::Prefix);
        batch
    }

    /// Number of rows T.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Rows that are tokens, the virtual ones left out.
    pub fn real_tokens(&self) -> usize {
        let embedded = self.embedded.iter().map(|(rows, _)| rows.len());
        self.tokens() - embedded.sum::<usize>()
    }

    /// A batch for an encoder, whose sequences have these virtual tokens. Each has rows of the prefix for itself, since those see it.
    pub fn bidirectional(virtual_tokens: VirtualTokens) -> Self {
        Self {
            virtual_tokens,
            ..Self::default()
        }
    }

    /// Adds a whole sequence that a classifier scores. Its rows see what is before them, or all of it where they are not `causal`.
    pub fn push_scored(&mut self, ids: &[u32], token_types: &[u8], scored: Scored, causal: bool) {
        let before = if causal {
            self.virtual_tokens.prefix
        } else {
            0
        };
        let own = if causal {
            0
        } else {
            self.virtual_tokens.prefix
        };
        let begin = self.tokens();
        let shared = 0..before;
        let rows = self.append(std::slice::from_ref(&shared), &vec![0; own + ids.len()]);
        if let Some(segment) = self.segments.last_mut() {
            segment.causal = causal;
        }
        if own > 0 {
            self.embedded
                .push((begin..begin + own, VirtualPart::Prefix));
        }
        let tokens = rows.start + own;
        self.ids[tokens..].copy_from_slice(ids);
        if !token_types.is_empty() {
            self.token_types.resize(tokens, 0);
            let types = token_types.iter().map(|token_type| u32::from(*token_type));
            self.token_types.extend(types);
        }
        let first = self.supervised.len();
        let row = |at: usize| (tokens + at) as u32;
        match scored {
            Scored::First => self.supervised.push(rows.start as u32),
            Scored::Last => self.supervised.push(row(ids.len().saturating_sub(1))),
            Scored::Mean => self.supervised.extend((0..ids.len()).map(row)),
            Scored::Tokens(at) => self
                .supervised
                .extend(at.iter().map(|at| row(*at as usize))),
        }
        let own = first..self.supervised.len();
        match scored {
            Scored::Mean => self.pools.push(own),
            _ => self.pools.extend(own.map(|row| row..row + 1)),
        }
    }

    /// Which of two texts each row belongs to, for all rows.
    pub(crate) fn token_types(&self) -> Vec<u32> {
        let mut types = self.token_types.clone();
        types.resize(self.tokens(), 0);
        types
    }

    /// Adds a whole sequence that sees only itself. `supervised[i]` says that token `i` is a label, so that row `i - 1`
    /// is scored; the first token never is.
    pub fn push(&mut self, ids: &[u32], supervised: &[bool]) {
        self.push_shared(0, &[(ids, supervised)]);
    }

    /// Adds a whole sequence whose first `prompt` tokens are its prompt: an infix stands behind them.
    ///
    /// # Panics
    /// If the sequence is shorter than `prompt`.
    pub fn push_with_prompt(&mut self, prompt: usize, ids: &[u32], supervised: &[bool]) {
        if self.virtual_tokens.infix > 0 {
            self.push_shared(prompt, &[(ids, supervised)]);
        } else {
            self.push(ids, supervised);
        }
    }

    /// Adds sequences, given as for [`push`](Self::push), whose first `prefix` tokens are the same. These are rows of the
    /// batch once; what follows them in a sequence sees them and itself. Labels are scored for every sequence that has
    /// them, so losses and gradients are those of the sequences pushed one by one, up to rounding. An infix stands behind
    /// the shared tokens and is shared with them.
    ///
    /// # Panics
    /// If a sequence is shorter than `prefix`.
    pub fn push_shared(&mut self, prefix: usize, sequences: &[(&[u32], &[bool])]) {
        let Some((first, _)) = sequences.first() else {
            return;
        };
        let before = 0..self.virtual_tokens.prefix;
        let shared = self.append(std::slice::from_ref(&before), &first[..prefix]);
        let infix = self.append_virtual(&[before.clone(), shared.clone()], VirtualPart::Infix);
        // The last shared row predicts what each sequence goes on with.
        for i in 1..=prefix {
            let row = if i == prefix && !infix.is_empty() {
                infix.end - 1
            } else {
                shared.start + i - 1
            };
            for (ids, supervised) in sequences {
                self.score(row, i, ids, supervised);
            }
        }
        for (ids, supervised) in sequences {
            debug_assert_eq!(ids[..prefix], first[..prefix], "the prefix is the same");
            let before = [before.clone(), shared.start..infix.end];
            let own = self.append(&before, &ids[prefix..]);
            for i in prefix + 1..ids.len() {
                self.score(own.start + i - prefix - 1, i, ids, supervised);
            }
        }
    }

    /// Adds the rows of trained embeddings that go on after the rows `before`.
    fn append_virtual(&mut self, before: &[Range<usize>], part: VirtualPart) -> Range<usize> {
        let count = match part {
            VirtualPart::Prefix => self.virtual_tokens.prefix,
            VirtualPart::Infix => self.virtual_tokens.infix,
        };
        let rows = self.append(before, &vec![0; count]);
        if !rows.is_empty() {
            self.embedded.push((rows.clone(), part));
        }
        rows
    }

    /// Adds rows that go on after the rows `before`, and see the trained keys, these and themselves.
    fn append(&mut self, before: &[Range<usize>], ids: &[u32]) -> Range<usize> {
        let rows = self.ids.len()..self.ids.len() + ids.len();
        if rows.is_empty() {
            return rows;
        }
        let first = self.virtual_tokens.keys;
        let seen = before.iter().map(ExactSizeIterator::len).sum::<usize>();
        let position = (first + seen) as u32;
        self.ids.extend_from_slice(ids);
        self.positions.extend(position..position + ids.len() as u32);
        let own = before.iter().chain([&rows]);
        let keys = own.map(|keys| keys.start + first..keys.end + first);
        let mut keys: Vec<_> = std::iter::once(0..first).chain(keys).collect();
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

    /// Pieces that a micro-batch of so many tokens is cut into where `trained` values are trained: a power of two, so that they can be
    /// shared out evenly. It depends on the work alone, so that results do not depend on the machine.
    ///
    /// What the blocks keep is kept of a piece and not of the whole micro-batch. Products are a few percent slower on half as many rows, and
    /// each piece has a gradient of its own: it must be small beside what is kept.
    pub(crate) fn pieces(config: &ModelConfig, trained: usize, tokens: usize) -> usize {
        const UNCUT: usize = 256;
        let mut pieces = if tokens > UNCUT {
            (tokens.div_ceil(Self::PIECE_TOKENS).max(2)).next_power_of_two()
        } else {
            1
        };
        while pieces > 1 && !Self::has_small_gradient(config, trained, tokens / pieces) {
            pieces /= 2;
        }
        pieces
    }

    /// Tokens of a piece of several rows, at most, unless more than that are trained.
    const PIECE_TOKENS: usize = 512;

    /// Whether a gradient of so many values is small beside what the blocks keep of so many tokens.
    fn has_small_gradient(config: &ModelConfig, trained: usize, tokens: usize) -> bool {
        trained <= tokens * config.hidden_size * config.num_hidden_layers
    }

    /// Whether several passes at a time, each of which has a gradient, are worth their memory.
    pub(crate) fn go_side_by_side(config: &ModelConfig, trained: usize) -> bool {
        Self::has_small_gradient(config, trained, Self::PIECE_TOKENS)
    }

    /// Which adapter a range of these ascending rows uses, counted among them.
    pub(crate) fn adapters_of(&self, rows: &[u32]) -> Vec<(Range<usize>, usize)> {
        let before = |row: usize| rows.partition_point(|r| (*r as usize) < row);
        self.adapters
            .iter()
            .map(|(range, index)| (before(range.start)..before(range.end), *index))
            .collect()
    }

    /// Which rows are generated.
    pub(crate) fn classes(&self) -> RowClasses {
        RowClasses::generated_from(self.tokens() - self.generated)
    }

    /// Which of these ascending rows are generated.
    pub(crate) fn classes_of(&self, rows: &[u32]) -> RowClasses {
        let first = self.tokens() - self.generated;
        RowClasses::generated_from(rows.partition_point(|row| (*row as usize) < first))
    }

    /// The adapter that a row uses.
    pub(crate) fn adapter_of(&self, row: usize) -> Option<usize> {
        let mut of = self.adapters.iter();
        of.find(|(rows, _)| rows.contains(&row)).map(|(_, a)| *a)
    }

    /// Lets no row use an adapter.
    #[must_use]
    pub fn without_adapter(mut self) -> Self {
        self.adapters.clear();
        self
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
    fn virtual_tokens_stand_before_and_between() {
        let mut batch = Batch::with_virtual(VirtualTokens {
            keys: 0,
            prefix: 2,
            infix: 1,
        });
        batch.push_with_prompt(2, &[5, 6, 7], &[true, true, true]);
        batch.push(&[8, 9], &[false, true]);
        assert_eq!(batch.ids, [0, 0, 5, 6, 0, 7, 0, 8, 9]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 5, 2, 3, 4]);
        let parts = [
            (0..2, VirtualPart::Prefix),
            (4..5, VirtualPart::Infix),
            (6..7, VirtualPart::Infix),
        ];
        assert_eq!(batch.embedded, parts);
        assert_eq!(batch.real_tokens(), 5);
        // The infix predicts what comes behind it, and a first token is never scored.
        assert_eq!(batch.supervised, [2, 4, 7]);
        assert_eq!(batch.targets, [6, 7, 9]);
        let keys: Vec<_> = batch.segments.iter().map(|s| s.keys.clone()).collect();
        assert_eq!((keys[0].len(), &keys[0][0]), (1, &(0..2)));
        assert_eq!(keys[3], [0..2, 2..5, 5..6]);
        assert_eq!(keys[5], [0..2, 6..7, 7..9]);
    }

    #[test]
    fn trained_keys_come_before_every_row() {
        let mut batch = Batch::with_virtual(VirtualTokens {
            keys: 3,
            ..VirtualTokens::default()
        });
        batch.push(&[5, 6], &[false, true]);
        batch.push_shared(1, &[(&[7, 8], &[false, true]), (&[7, 9], &[false, true])]);
        assert_eq!(batch.positions, [3, 4, 3, 4, 4]);
        let keys: Vec<_> = batch.segments.iter().map(|s| s.keys.clone()).collect();
        assert_eq!(keys[0], [0..3, 3..5]);
        assert_eq!(keys[3], [0..3, 5..6, 7..8]);
        assert_eq!(batch.supervised, [0, 2, 2]);
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
