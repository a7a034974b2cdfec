//! Which rows of a batch are prompts and which are generated.
//!
//! What multiplies a row is chosen by its class and by the weight, never by how many rows there are. So the bits
//! of a row are those that it has alone, whatever else is in the batch and however a prompt is cut into pieces.

use std::ops::Range;

/// Which rows of a batch are which: all rows of prompts come first, then the generated ones.
///
/// Rows of prompts, of training and of evaluation go through what is fast for many rows. A generated row is the one new
/// token of its sequence; such rows go through what is fast where reading the weights takes the time, and a weight is read once for all
/// of them. The default is a batch without generated rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowClasses {
    first_generated: usize,
    /// Whether rows may be rounded beside weights in blocks.
    rounds: bool,
}

impl RowClasses {
    /// No row is generated.
    pub const PROMPT: Self = Self {
        first_generated: usize::MAX,
        rounds: false,
    };

    /// Every row is generated.
    pub const GENERATED: Self = Self::generated_from(0);

    /// The rows from this one on are generated.
    pub const fn generated_from(row: usize) -> Self {
        Self {
            first_generated: row,
            rounds: false,
        }
    }

    /// The same, with leave to round a row where it is multiplied with a weight in blocks of integers: a generated one to 16 bits, so that
    /// products are those of integers; another one, and what the blocks stand for, to bf16, where the processor gains by that. Both are
    /// several times as fast.
    #[must_use]
    pub const fn rounding(self, rounds: bool) -> Self {
        Self { rounds, ..self }
    }

    /// Whether there is leave to.
    pub const fn rounds(self) -> bool {
        self.rounds
    }

    /// Whether a row is generated.
    pub const fn is_generated(self, row: usize) -> bool {
        row >= self.first_generated
    }

    /// The classes of the rows behind so many, counted from the first of them.
    #[must_use]
    pub const fn skip(self, rows: usize) -> Self {
        Self::generated_from(self.first_generated.saturating_sub(rows)).rounding(self.rounds)
    }

    /// Of some rows, those of prompts and the generated ones.
    pub(crate) fn split(self, rows: &Range<usize>) -> (Range<usize>, Range<usize>) {
        let first = self
            .first_generated
            .clamp(rows.start, rows.end.max(rows.start));
        (rows.start..first, first..rows.end.max(first))
    }
}

impl Default for RowClasses {
    fn default() -> Self {
        Self::PROMPT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_split_where_the_first_is_generated() {
        let rows = 3..8;
        assert_eq!(RowClasses::PROMPT.split(&rows), (3..8, 8..8));
        assert_eq!(RowClasses::GENERATED.split(&rows), (3..3, 3..8));
        assert_eq!(RowClasses::generated_from(5).split(&rows), (3..5, 5..8));
        assert_eq!(RowClasses::generated_from(8).split(&rows), (3..8, 8..8));
        assert!(RowClasses::generated_from(5).is_generated(5));
        assert!(!RowClasses::default().is_generated(5));
        let skipped = RowClasses::generated_from(5).skip(3);
        assert_eq!(skipped, RowClasses::generated_from(2));
        assert_eq!(skipped.skip(3), RowClasses::GENERATED);
    }
}
