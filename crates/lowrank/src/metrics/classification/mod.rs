//! Figures for classifiers: predicted labels, numbers and tags against the gold ones of the data.
//!
//! | what is predicted | accumulator | figures |
//! | --- | --- | --- |
//! | one label a row | [`SingleLabel`] | [`SingleLabelMetrics`] |
//! | any number of labels a row | [`MultiLabel`] | [`MultiLabelMetrics`] |
//! | one or more numbers a row | [`Regression`] | [`RegressionMetrics`] |
//! | a tag for each token of a row | [`Tags`] | [`TagMetrics`] |
//!
//! An accumulator takes batches one after the other, and its `metrics` are those of all rows so far. Figures serialize to JSON
//! without NaN (what is undefined is `null`), and display as a table. They equal those of scikit-learn, scipy and seqeval;
//! `scripts/goldens_classification.py` writes what the tests compare with.
//!
//! Of a label, with its true positives tp, false positives fp and false negatives fn:
//!
//! ```text
//! precision = tp / (tp + fp)      recall = tp / (tp + fn)      F1 = 2 tp / (2 tp + fp + fn)
//! ```
//!
//! Each of them is 0 where its denominator is 0 (scikit-learn's `zero_division=0`). Micro figures use the sums of tp, fp and fn over
//! the labels, macro figures are means over labels, and weighted ones are means in which a label counts as often as it is in
//! the gold rows (its support).

mod confusion;
mod multi_label;
mod regression;
mod single_label;
mod tags;
#[cfg(test)]
mod tests;
mod text;

use std::iter::Sum;

use serde::Serialize;

pub use confusion::Confusion;
pub use multi_label::{MultiLabel, MultiLabelMetrics, is_predicted};
pub use regression::{OutputScores, Regression, RegressionMetrics};
pub use single_label::{SingleLabel, SingleLabelMetrics, top_label};
pub use tags::{TagMetrics, Tags};

/// Precision, recall and F1 of one label, or of one type of entity. All are 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LabelScores {
    /// The label's name.
    pub label: String,
    /// The share of its predictions that are right.
    pub precision: f64,
    /// The share of its gold occurrences that are predicted.
    pub recall: f64,
    /// The harmonic mean of both.
    pub f1: f64,
    /// Its gold occurrences.
    pub support: u64,
}

/// Predictions that cannot be scored. Rows are counted from 1, over all batches.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClassificationError {
    /// No rows, or no tokens in them.
    #[error("there are no predictions to score")]
    Empty,
    /// Slices of a batch that do not fit each other.
    #[error("a batch has {found} {what}, but its {rows} rows need {expected}")]
    Shape {
        /// What there is too much or too little of.
        what: &'static str,
        /// How many values there are.
        found: usize,
        /// Rows of the batch, by its gold values.
        rows: usize,
        /// How many values there should be.
        expected: usize,
    },
    /// A gold label outside of the label map.
    #[error("row {row}: gold label {found} is not in the label map, which has labels 0 to {last}")]
    Label {
        /// Which row.
        row: usize,
        /// The label.
        found: u32,
        /// The largest label.
        last: usize,
    },
    /// A probability that is none.
    #[error(
        "row {row}: the probability of label {label:?} is {value}, and must be from 0 to 1; \
         NaN or infinity comes from weights that are damaged or have diverged"
    )]
    Probability {
        /// Which row.
        row: usize,
        /// The label's name.
        label: String,
        /// What was found.
        value: f32,
    },
    /// Probabilities of a row that are no distribution.
    #[error("row {row}: the probabilities of its labels add up to {sum:.4}, and must add up to 1")]
    Sum {
        /// Which row.
        row: usize,
        /// What they add up to.
        sum: f64,
    },
    /// A number that is NaN or infinite.
    #[error("row {row}: the {side} value of output {output:?} is {value}, and must be finite")]
    Value {
        /// Which row.
        row: usize,
        /// "gold" or "predicted".
        side: &'static str,
        /// The output's name.
        output: String,
        /// What was found.
        value: f32,
    },
    /// A row with more or fewer predicted tags than tokens.
    #[error("row {row}: {gold} gold tags but {predicted} predicted ones; each token needs both")]
    Tags {
        /// Which row.
        row: usize,
        /// Number of gold tags.
        gold: usize,
        /// Number of predicted tags.
        predicted: usize,
    },
}

/// How often a label was predicted, was gold, and was both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counts {
    /// tp
    correct: u64,
    /// tp + fp
    predicted: u64,
    /// tp + fn
    gold: u64,
}

impl Counts {
    fn precision(self) -> f64 {
        share(self.correct, self.predicted)
    }

    fn recall(self) -> f64 {
        share(self.correct, self.gold)
    }

    fn f1(self) -> f64 {
        share(2 * self.correct, self.predicted + self.gold)
    }

    /// Whether the label is in a gold row or in a prediction.
    fn occurs(self) -> bool {
        self.predicted + self.gold > 0
    }

    fn scores(self, label: &str) -> LabelScores {
        LabelScores {
            label: label.to_owned(),
            precision: self.precision(),
            recall: self.recall(),
            f1: self.f1(),
            support: self.gold,
        }
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |sum, counts| Self {
            correct: sum.correct + counts.correct,
            predicted: sum.predicted + counts.predicted,
            gold: sum.gold + counts.gold,
        })
    }
}

/// `part / whole`, or 0 where `whole` is 0.
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// The mean, or nothing where there are no values.
fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0_usize);
    for value in values {
        sum += value;
        count += 1;
    }
    (count > 0).then(|| sum / count as f64)
}

/// The mean F1 of labels that count as often as they are gold; 0 where none is gold.
fn weighted_f1(counts: &[Counts]) -> f64 {
    let gold: u64 = counts.iter().map(|counts| counts.gold).sum();
    counts
        .iter()
        .map(|counts| share(counts.gold, gold) * counts.f1())
        .sum()
}

/// Refuses a batch whose `found` values are not `width` a row.
fn check_shape(
    what: &'static str,
    found: usize,
    rows: usize,
    width: usize,
) -> Result<(), ClassificationError> {
    let expected = rows.saturating_mul(width);
    if found == expected {
        return Ok(());
    }
    Err(ClassificationError::Shape {
        what,
        found,
        rows,
        expected,
    })
}

/// Refuses the probabilities of a row, one a label, where one is no probability. Sums of rounded parts may be a little above 1.
fn check_probabilities(
    row: usize,
    labels: &[String],
    probabilities: &[f32],
) -> Result<(), ClassificationError> {
    let bad = |p: &f32| !(0.0..=1.0 + TOLERANCE).contains(&f64::from(*p));
    match probabilities.iter().position(bad) {
        None => Ok(()),
        Some(label) => Err(ClassificationError::Probability {
            row,
            label: labels[label].clone(),
            value: probabilities[label],
        }),
    }
}

/// How far rounding may take a probability above 1, or a sum of probabilities away from it.
const TOLERANCE: f64 = 1e-3;
