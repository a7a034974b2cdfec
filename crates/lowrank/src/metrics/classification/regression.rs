//! Numbers: correlations and errors.
//!
//! ```text
//! Pearson = Σ (x − x̄)(y − ȳ) / √( Σ (x − x̄)² · Σ (y − ȳ)² )
//! ```
//!
//! Spearman is Pearson of the ranks, where equal values share the mean of their ranks. Neither is defined for one row, nor where
//! all gold values or all predictions are the same.

use std::fmt;

use serde::Serialize;

use super::text;
use super::{ClassificationError, check_shape, mean};
use crate::units::short;

/// Keeps the numbers of rows; ranks need them all.
#[derive(Debug, Clone)]
pub struct Regression {
    outputs: Vec<String>,
    /// [rows × outputs]
    gold: Vec<f32>,
    /// [rows × outputs]
    predicted: Vec<f32>,
}

/// How well numbers are predicted. Errors are in the unit of the gold values, or in its square.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RegressionMetrics {
    /// Number of rows.
    pub rows: u64,
    /// The mean of the outputs' Pearson correlations; nothing where one of them is undefined.
    pub pearson: Option<f64>,
    /// The mean of the outputs' Spearman correlations; nothing where one of them is undefined.
    pub spearman: Option<f64>,
    /// The mean of the outputs' mean squared errors.
    pub mean_squared_error: f64,
    /// The mean of the outputs' mean absolute errors.
    pub mean_absolute_error: f64,
    /// The figures of each output.
    pub outputs: Vec<OutputScores>,
}

/// How well one output is predicted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OutputScores {
    /// The output's name.
    pub output: String,
    /// Pearson correlation, −1 to 1.
    pub pearson: Option<f64>,
    /// Spearman correlation, −1 to 1.
    pub spearman: Option<f64>,
    /// The mean of squared differences.
    pub mean_squared_error: f64,
    /// The mean of absolute differences.
    pub mean_absolute_error: f64,
    /// Why there are no correlations, where there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undefined_because: Option<String>,
}

impl Regression {
    /// No rows yet. `outputs` are the names of the numbers of a row.
    pub fn new(outputs: Vec<String>) -> Self {
        Self {
            outputs,
            gold: Vec::new(),
            predicted: Vec::new(),
        }
    }

    /// Adds a batch: gold values and predictions, both `[n × outputs]`.
    ///
    /// # Errors
    /// If the sizes differ, or a value is not finite. The batch is then not counted.
    pub fn add(&mut self, gold: &[f32], predicted: &[f32]) -> Result<(), ClassificationError> {
        let width = self.outputs.len().max(1);
        let rows = gold.len().div_ceil(width);
        check_shape("gold values", gold.len(), rows, self.outputs.len())?;
        check_shape("predictions", predicted.len(), rows, width)?;
        for (side, values) in [("gold", gold), ("predicted", predicted)] {
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                return Err(ClassificationError::Value {
                    row: self.gold.len() / width + index / width + 1,
                    side,
                    output: self.outputs[index % width].clone(),
                    value: values[index],
                });
            }
        }
        self.gold.extend(gold);
        self.predicted.extend(predicted);
        Ok(())
    }

    /// The figures of all rows so far.
    ///
    /// # Errors
    /// If there are none.
    pub fn metrics(&self) -> Result<RegressionMetrics, ClassificationError> {
        if self.gold.is_empty() {
            return Err(ClassificationError::Empty);
        }
        let width = self.outputs.len();
        let outputs: Vec<OutputScores> = (0..width)
            .map(|output| {
                let column = |values: &[f32]| -> Vec<f64> {
                    let column = values.iter().skip(output).step_by(width);
                    column.map(|&value| f64::from(value)).collect()
                };
                scores(
                    &self.outputs[output],
                    &column(&self.gold),
                    &column(&self.predicted),
                )
            })
            .collect();
        let sum = |value: fn(&OutputScores) -> Option<f64>| {
            let values: Option<Vec<f64>> = outputs.iter().map(value).collect();
            values.and_then(mean)
        };
        Ok(RegressionMetrics {
            rows: (self.gold.len() / width) as u64,
            pearson: sum(|output| output.pearson),
            spearman: sum(|output| output.spearman),
            mean_squared_error: sum(|output| Some(output.mean_squared_error)).unwrap_or(0.0),
            mean_absolute_error: sum(|output| Some(output.mean_absolute_error)).unwrap_or(0.0),
            outputs,
        })
    }
}

impl RegressionMetrics {
    /// The figures of all outputs together, by their names in JSON.
    pub fn figures(&self) -> Vec<(&'static str, Option<f64>)> {
        vec![
            ("pearson", self.pearson),
            ("spearman", self.spearman),
            ("mean_squared_error", Some(self.mean_squared_error)),
            ("mean_absolute_error", Some(self.mean_absolute_error)),
        ]
    }
}

impl fmt::Display for RegressionMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::figures("rows", self.rows, &self.figures()))?;
        if self.outputs.len() > 1 {
            f.write_str("\n")?;
            f.write_str(&output_table(&self.outputs))?;
        }
        for output in &self.outputs {
            if let Some(reason) = &output.undefined_because {
                let name = if self.outputs.len() > 1 {
                    format!(" of {}", text::shortened(&output.output, 30))
                } else {
                    String::new()
                };
                writeln!(f, "The correlations{name} are undefined: {reason}.")?;
            }
        }
        Ok(())
    }
}

fn output_table(outputs: &[OutputScores]) -> String {
    let mut rows = vec![
        [
            "output",
            "Pearson",
            "Spearman",
            "squared error",
            "absolute error",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    rows.extend(outputs.iter().map(|output| {
        vec![
            text::shortened(&output.output, 30),
            text::figure_or_undefined(output.pearson),
            text::figure_or_undefined(output.spearman),
            short(output.mean_squared_error),
            short(output.mean_absolute_error),
        ]
    }));
    text::columns(&rows, 1)
}

fn scores(name: &str, gold: &[f64], predicted: &[f64]) -> OutputScores {
    let differences = || gold.iter().zip(predicted).map(|(g, p)| p - g);
    let constant = |values: &[f64]| values.iter().all(|value| *value == values[0]);
    let undefined_because = if gold.len() < 2 {
        Some("there is one row".to_owned())
    } else if constant(gold) {
        Some(format!("every gold value is {}", gold[0]))
    } else if constant(predicted) {
        Some(format!("every prediction is {}", predicted[0]))
    } else {
        None
    };
    let defined = undefined_because.is_none();
    OutputScores {
        output: name.to_owned(),
        pearson: defined.then(|| pearson(gold, predicted)),
        spearman: defined.then(|| pearson(&average_ranks(gold), &average_ranks(predicted))),
        mean_squared_error: mean(differences().map(|d| d * d)).unwrap_or(0.0),
        mean_absolute_error: mean(differences().map(f64::abs)).unwrap_or(0.0),
        undefined_because,
    }
}

/// Pearson correlation of values of which some differ. Means are subtracted first, because sums of squares lose what little
/// values far from 0 differ by.
fn pearson(x: &[f64], y: &[f64]) -> f64 {
    let centre = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (x_mean, y_mean) = (centre(x), centre(y));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        let (dx, dy) = (x - x_mean, y - y_mean);
        xx += dx * dx;
        yy += dy * dy;
        xy += dx * dy;
    }
    (xy / (xx.sqrt() * yy.sqrt())).clamp(-1.0, 1.0)
}

/// Ranks from 1; equal values share the mean of theirs.
fn average_ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for equal in order.chunk_by(|&a, &b| values[a] == values[b]) {
        // The mean of before + 1 to before + |equal|.
        let rank = before as f64 + (equal.len() + 1) as f64 / 2.0;
        for &index in equal {
            ranks[index] = rank;
        }
        before += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_share_their_ranks() {
        assert_eq!(
            average_ranks(&[2.0, 1.0, 2.0, -0.0, 0.0, 2.0]),
            [5.0, 3.0, 5.0, 1.5, 1.5, 5.0]
        );
    }
}
