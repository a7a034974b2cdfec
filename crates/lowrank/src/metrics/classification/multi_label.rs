//! Any number of labels a row: exact matches and F1.

use std::fmt;

use serde::Serialize;

use super::text;
use super::{
    ClassificationError, Counts, LabelScores, check_probabilities, check_shape, mean, share,
    weighted_f1,
};

/// Counts rows that have any number of labels.
#[derive(Debug, Clone)]
pub struct MultiLabel {
    labels: Vec<String>,
    counts: Vec<Counts>,
    rows: usize,
    exact: u64,
}

/// How well sets of labels are predicted. All figures are 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MultiLabelMetrics {
    /// Number of rows.
    pub rows: u64,
    /// The share of rows of which every label is right, present or absent (scikit-learn's `accuracy_score`).
    pub exact_match: f64,
    /// The mean F1 of all labels.
    pub f1_macro: f64,
    /// F1 of the counts of all labels together.
    pub f1_micro: f64,
    /// The mean F1 of labels that count as often as they are gold.
    pub f1_weighted: f64,
    /// Precision, recall and F1 of every label, in the label map's order.
    pub labels: Vec<LabelScores>,
}

/// Whether a label of this probability is predicted: above 0.5, so that its logit is above 0.
pub fn is_predicted(probability: f32) -> bool {
    probability > 0.5
}

impl MultiLabel {
    /// No rows yet. `labels` are the names of labels 0, 1, …, all different.
    pub fn new(labels: Vec<String>) -> Self {
        Self {
            counts: vec![Counts::default(); labels.len()],
            labels,
            rows: 0,
            exact: 0,
        }
    }

    /// Adds a batch: whether each label is gold `[n × labels]`, and its probability `[n × labels]`. The predicted labels are
    /// those that [`is_predicted`] says.
    ///
    /// # Errors
    /// If the sizes differ, or a probability is none. The batch is then not counted.
    pub fn add(&mut self, gold: &[bool], probabilities: &[f32]) -> Result<(), ClassificationError> {
        let width = self.labels.len().max(1);
        let rows = gold.len().div_ceil(width);
        check_shape("gold values", gold.len(), rows, self.labels.len())?;
        check_shape("probabilities", probabilities.len(), rows, width)?;
        for (index, probabilities) in probabilities.chunks(width).enumerate() {
            check_probabilities(self.rows + index + 1, &self.labels, probabilities)?;
        }
        for (gold, probabilities) in gold.chunks(width).zip(probabilities.chunks(width)) {
            let mut exact = true;
            for ((counts, &gold), &probability) in
                self.counts.iter_mut().zip(gold).zip(probabilities)
            {
                let predicted = is_predicted(probability);
                counts.gold += u64::from(gold);
                counts.predicted += u64::from(predicted);
                counts.correct += u64::from(gold && predicted);
                exact &= gold == predicted;
            }
            self.exact += u64::from(exact);
        }
        self.rows += rows;
        Ok(())
    }

    /// The figures of all rows so far.
    ///
    /// # Errors
    /// If there are none.
    pub fn metrics(&self) -> Result<MultiLabelMetrics, ClassificationError> {
        if self.rows == 0 {
            return Err(ClassificationError::Empty);
        }
        let f1 = self.counts.iter().map(|counts| counts.f1());
        Ok(MultiLabelMetrics {
            rows: self.rows as u64,
            exact_match: share(self.exact, self.rows as u64),
            f1_macro: mean(f1).unwrap_or(0.0),
            f1_micro: self.counts.iter().copied().sum::<Counts>().f1(),
            f1_weighted: weighted_f1(&self.counts),
            labels: self
                .labels
                .iter()
                .zip(&self.counts)
                .map(|(name, counts)| counts.scores(name))
                .collect(),
        })
    }
}

impl MultiLabelMetrics {
    /// The figures of all rows together, by their names in JSON.
    pub fn figures(&self) -> Vec<(&'static str, Option<f64>)> {
        vec![
            ("exact_match", Some(self.exact_match)),
            ("f1_macro", Some(self.f1_macro)),
            ("f1_micro", Some(self.f1_micro)),
            ("f1_weighted", Some(self.f1_weighted)),
        ]
    }
}

impl fmt::Display for MultiLabelMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::figures("rows", self.rows, &self.figures()))?;
        f.write_str("\n")?;
        f.write_str(&text::label_table("label", &self.labels))
    }
}
