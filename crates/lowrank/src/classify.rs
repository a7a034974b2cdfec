//! What classifiers say of rows, and vectors of texts.

use std::ops::ControlFlow;

use lowrank_kernels::{Tensor, Workspace};

use crate::data::{Example, Label, Labels, ProblemType, Word};
use crate::metrics::classification::top_label;
use crate::model::{Adapter, AdapterSet, Batch, Decoder, Pooling};
use crate::train::{batch_for, classified, passes};

/// Probabilities from logits `[labels]`, in place: their softmax where one label is right, each one's sigmoid where several may be; numbers
/// stay as they are.
pub fn probabilities(problem_type: ProblemType, logits: &mut [f32]) {
    match problem_type {
        ProblemType::SingleLabelClassification => {
            let max = logits.iter().fold(f32::NEG_INFINITY, |max, z| max.max(*z));
            let exp = |z: f32| (f64::from(z) - f64::from(max)).exp();
            let sum: f64 = logits.iter().map(|z| exp(*z)).sum();
            for z in logits.iter_mut() {
                *z = (exp(*z) / sum) as f32;
            }
        }
        ProblemType::MultiLabelClassification => {
            for z in logits {
                *z = (1.0 / (1.0 + (-f64::from(*z)).exp())) as f32;
            }
        }
        ProblemType::Regression => {}
    }
}

/// The likeliest label of each word and its probability, from the logits `[tokens · labels]` of a row that a model of words has read; none where no token
/// speaks for the word.
///
/// # Panics
/// If the logits are another row's.
pub fn tags<'l>(labels: &'l Labels, words: &[Word], logits: &[f32]) -> Vec<Option<(&'l str, f32)>> {
    let width = labels.names.len();
    let words = words.iter().map(|word| {
        let token = word.token? as usize;
        let mut values = logits[token * width..][..width].to_vec();
        probabilities(ProblemType::SingleLabelClassification, &mut values);
        let top = top_label(&values);
        Some((labels.names[top].as_str(), values[top]))
    });
    words.collect()
}

/// Logits of rows, a pass at a time: `each` is given the rows of a pass and for each of them its logits, `[labels]` or, of tokens,
/// `[tokens that are read · labels]`; it may end the work there.
///
/// # Panics
/// If the model has no classifier.
pub fn predict(
    model: &Decoder,
    adapter: Option<&Adapter>,
    rows: &[Example],
    ws: &Workspace,
    mut each: impl FnMut(&[Example], Vec<Vec<f32>>) -> ControlFlow<()>,
) {
    let virtual_tokens = adapter.map(Adapter::virtual_tokens).unwrap_or_default();
    let of_tokens = model
        .config()
        .classifier()
        .is_some_and(|classifier| classifier.pooling == Pooling::Each);
    for rows in passes(rows, virtual_tokens) {
        let batch = batch_for(model.config(), rows, virtual_tokens);
        let logits = with_adapter(batch, adapter, |batch, set| model.classify(batch, set, ws));
        let width = logits.cols();
        let mut left = logits.to_vec().into_iter();
        ws.give(logits);
        let outputs = rows.iter().map(|row| {
            let read = match (&row.label, of_tokens) {
                (_, false) => 1,
                (Some(Label::Tags(tags)), true) => tags.len(),
                (_, true) => row.ids.len(),
            };
            left.by_ref().take(read * width).collect()
        });
        if each(rows, outputs.collect()).is_break() {
            return;
        }
    }
}

/// Vectors `[C]` of rows: the mean of a row's hidden states, or its first or last one; `normalize` makes them as long as one.
pub fn embed(
    model: &Decoder,
    adapter: Option<&Adapter>,
    rows: &[Example],
    pooling: Pooling,
    normalize: bool,
    ws: &Workspace,
) -> Vec<Vec<f32>> {
    let virtual_tokens = adapter.map(Adapter::virtual_tokens).unwrap_or_default();
    let mut vectors = Vec::with_capacity(rows.len());
    for rows in passes(rows, virtual_tokens) {
        let batch = classified(model.config(), pooling, rows, virtual_tokens).with_adapter(0);
        let pooled: Tensor =
            with_adapter(batch, adapter, |batch, set| model.pooled(batch, set, ws));
        for vector in pooled.to_vec().chunks_exact(pooled.cols()) {
            let square: f64 = vector.iter().map(|x| f64::from(*x).powi(2)).sum();
            let by = if normalize {
                // As torch.nn.functional.normalize, a zero vector stays one.
                1.0 / square.sqrt().max(1e-12)
            } else {
                1.0
            };
            let scaled = vector.iter().map(|x| (f64::from(*x) * by) as f32);
            vectors.push(scaled.collect());
        }
        ws.give(pooled);
    }
    vectors
}

/// Runs a pass with the adapter, or the base alone.
fn with_adapter<T>(
    batch: Batch,
    adapter: Option<&Adapter>,
    pass: impl FnOnce(&Batch, AdapterSet) -> T,
) -> T {
    match adapter {
        Some(adapter) => pass(&batch.with_adapter(0), AdapterSet::new(&[adapter])),
        None => pass(&batch.without_adapter(), AdapterSet::none()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_problem() {
        let mut logits = [1.0, 1.0, 1.0 + 2.0_f32.ln()];
        probabilities(ProblemType::SingleLabelClassification, &mut logits);
        assert!((logits[2] - 0.5).abs() < 1e-6 && (logits[0] - 0.25).abs() < 1e-6);
        let mut logits = [1000.0, -1000.0];
        probabilities(ProblemType::SingleLabelClassification, &mut logits);
        assert_eq!(logits, [1.0, 0.0]);
        let mut logits = [0.0, 3.0_f32.ln()];
        probabilities(ProblemType::MultiLabelClassification, &mut logits);
        assert!((logits[0] - 0.5).abs() < 1e-6 && (logits[1] - 0.75).abs() < 1e-6);
    }
}
