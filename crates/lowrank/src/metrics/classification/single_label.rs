//! One label a row: accuracy, F1, Matthews' coefficient and calibration.
//!
//! Matthews' correlation coefficient for any number of labels (Gorodkin, 2004, who calls it R_K), with n rows of which c are
//! right, label k gold t_k times and predicted p_k times:
//!
//! ```text
//! R_K = (c·n − Σ t_k p_k) / √( (n² − Σ p_k²) · (n² − Σ t_k²) )
//! ```
//!
//! It is 0 where the denominator is, as for a model that predicts one label only.
//!
//! The expected calibration error (Guo et al., 2017, "On Calibration of Modern Neural Networks") sorts the rows by the probability
//! of the predicted label into 15 bins of equal width, B_m = ((m − 1)/15, m/15]:
//!
//! ```text
//! ECE = Σ_m |B_m| / n · | accuracy(B_m) − mean probability(B_m) |
//! ```

use std::fmt;

use serde::Serialize;

use super::confusion::Confusion;
use super::text;
use super::{
    ClassificationError, Counts, LabelScores, TOLERANCE, check_probabilities, check_shape, mean,
    share, weighted_f1,
};

const BINS: usize = 15;

/// Counts rows that have one label each.
#[derive(Debug, Clone)]
pub struct SingleLabel {
    confusion: Confusion,
    bins: [Bin; BINS],
    rows: usize,
}

/// Rows whose predicted label has about the same probability.
#[derive(Debug, Clone, Copy, Default)]
struct Bin {
    rows: u64,
    correct: u64,
    /// Sum of the predicted labels' probabilities.
    confidence: f64,
}

/// How well single labels are predicted. All figures but Matthews' coefficient (−1 to 1) are 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SingleLabelMetrics {
    /// Number of rows.
    pub rows: u64,
    /// The share of rows whose label is predicted.
    pub accuracy: f64,
    /// F1 of label 1, where there are two labels.
    pub f1_binary: Option<f64>,
    /// The mean F1 of the labels that are gold or predicted somewhere, as scikit-learn chooses them.
    pub f1_macro: f64,
    /// F1 of the counts of all labels together, which is the accuracy.
    pub f1_micro: f64,
    /// The mean F1 of labels that count as often as they are gold.
    pub f1_weighted: f64,
    /// Matthews' correlation coefficient.
    pub matthews: f64,
    /// Expected calibration error, with 15 bins.
    pub expected_calibration_error: f64,
    /// Precision, recall and F1 of every label, in the label map's order.
    pub labels: Vec<LabelScores>,
    /// How often each label was predicted for each gold label.
    pub confusion: Confusion,
}

/// The likeliest label of a row: the first of those with the highest probability, as numpy's `argmax` has it.
/// A row without labels has label 0.
pub fn top_label(probabilities: &[f32]) -> usize {
    let mut top = 0;
    for (label, &probability) in probabilities.iter().enumerate() {
        if probability > probabilities[top] {
            top = label;
        }
    }
    top
}

impl SingleLabel {
    /// No rows yet. `labels` are the names of labels 0, 1, …, all different.
    pub fn new(labels: Vec<String>) -> Self {
        Self {
            confusion: Confusion::new(labels),
            bins: [Bin::default(); BINS],
            rows: 0,
        }
    }

    /// Adds a batch: gold labels `[n]`, and probabilities `[n × labels]` that add up to 1 in each row. The predicted label is
    /// the [`top_label`].
    ///
    /// # Errors
    /// If the sizes differ, a gold label is not in the label map, or a row's probabilities are none. The batch is then not
    /// counted.
    pub fn add(&mut self, gold: &[u32], probabilities: &[f32]) -> Result<(), ClassificationError> {
        let labels = self.confusion.labels();
        let width = labels.len();
        check_shape("probabilities", probabilities.len(), gold.len(), width)?;
        // A batch of rows fits its shape without labels too, but then no gold label is in the map.
        let rows = || gold.iter().zip(probabilities.chunks(width.max(1)));
        for (index, &label) in gold.iter().enumerate() {
            if label as usize >= width {
                return Err(ClassificationError::Label {
                    row: self.rows + index + 1,
                    found: label,
                    last: width.saturating_sub(1),
                });
            }
        }
        for (index, (_, probabilities)) in rows().enumerate() {
            let row = self.rows + index + 1;
            check_probabilities(row, labels, probabilities)?;
            let sum: f64 = probabilities.iter().map(|&p| f64::from(p)).sum();
            if (sum - 1.0).abs() > TOLERANCE {
                return Err(ClassificationError::Sum { row, sum });
            }
        }
        for (&gold, probabilities) in rows() {
            let predicted = top_label(probabilities);
            self.confusion.add(gold, predicted as u32);
            let confidence = f64::from(probabilities[predicted]);
            // The product of a 24-bit number and 15 is exact, so that bins have exact borders.
            let bin = (confidence * BINS as f64).ceil() as usize;
            let bin = &mut self.bins[bin.clamp(1, BINS) - 1];
            bin.rows += 1;
            bin.correct += u64::from(predicted == gold as usize);
            bin.confidence += confidence;
        }
        self.rows += gold.len();
        Ok(())
    }

    /// The figures of all rows so far.
    ///
    /// # Errors
    /// If there are none.
    pub fn metrics(&self) -> Result<SingleLabelMetrics, ClassificationError> {
        if self.rows == 0 {
            return Err(ClassificationError::Empty);
        }
        let counts = self.confusion.counts();
        let total: Counts = counts.iter().copied().sum();
        let names = self.confusion.labels();
        let occurring = counts.iter().filter(|counts| counts.occurs());
        Ok(SingleLabelMetrics {
            rows: total.gold,
            accuracy: share(total.correct, total.gold),
            f1_binary: (counts.len() == 2).then(|| counts[1].f1()),
            f1_macro: mean(occurring.map(|counts| counts.f1())).unwrap_or(0.0),
            f1_micro: total.f1(),
            f1_weighted: weighted_f1(&counts),
            matthews: matthews(&counts),
            expected_calibration_error: self.expected_calibration_error(),
            labels: names
                .iter()
                .zip(&counts)
                .map(|(name, counts)| counts.scores(name))
                .collect(),
            confusion: self.confusion.clone(),
        })
    }

    fn expected_calibration_error(&self) -> f64 {
        // |B| / n · |correct / |B| − confidence / |B|| is |correct − confidence| / n.
        let gaps = self.bins.iter();
        let gaps = gaps.map(|bin| (bin.correct as f64 - bin.confidence).abs());
        gaps.sum::<f64>() / self.rows as f64
    }
}

impl SingleLabelMetrics {
    /// The figures of all rows together, by their names in JSON.
    pub fn figures(&self) -> Vec<(&'static str, Option<f64>)> {
        let mut figures = vec![("accuracy", Some(self.accuracy))];
        if self.f1_binary.is_some() {
            figures.push(("f1_binary", self.f1_binary));
        }
        figures.extend([
            ("f1_macro", Some(self.f1_macro)),
            ("f1_micro", Some(self.f1_micro)),
            ("f1_weighted", Some(self.f1_weighted)),
            ("matthews", Some(self.matthews)),
            (
                "expected_calibration_error",
                Some(self.expected_calibration_error),
            ),
        ]);
        figures
    }
}

impl fmt::Display for SingleLabelMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::figures("rows", self.rows, &self.figures()))?;
        f.write_str("\n")?;
        f.write_str(&text::label_table("label", &self.labels))
    }
}

fn matthews(counts: &[Counts]) -> f64 {
    // Whole numbers, because differences of near squares would lose digits.
    let sum = |product: fn(&Counts) -> i128| counts.iter().map(product).sum::<i128>();
    let rows = sum(|counts| counts.gold.into());
    let correct = sum(|counts| counts.correct.into());
    let both = correct * rows - sum(|c| i128::from(c.gold) * i128::from(c.predicted));
    let predicted = rows * rows - sum(|c| i128::from(c.predicted).pow(2));
    let gold = rows * rows - sum(|c| i128::from(c.gold).pow(2));
    if predicted == 0 || gold == 0 {
        return 0.0;
    }
    both as f64 / ((predicted as f64).sqrt() * (gold as f64).sqrt())
}
