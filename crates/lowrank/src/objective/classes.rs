//! The losses of classifiers, as transformers has them (`ForSequenceClassificationLoss`): cross-entropy where one label is right, binary
//! cross-entropy where each is by itself, and squared error where the outputs are numbers.
//!
//! A mean is that of the rows in the first case, and of all outputs of all rows in the others. With class weights it is PyTorch's: the
//! weighted sum divided by the sum of the rows' weights.

use std::borrow::Cow;

use lowrank_kernels::{Tensor, View, Workspace};

use super::{Gradients, LossSum, Objective};
use crate::model::Top;

/// What the outputs of a classifier should be, for each row that it reads.
#[derive(Clone, Debug, PartialEq)]
pub enum ClassTargets {
    /// The number of the label, `[n]`.
    One(Vec<u32>),
    /// 1 where a label is right and 0 where it is not, `[n · labels]`.
    Several(Vec<f32>),
    /// The numbers, `[n · labels]`.
    Values(Vec<f32>),
}

/// The loss of a classifier.
#[derive(Clone, Debug)]
pub struct Classes<'a> {
    /// What the outputs should be.
    pub targets: ClassTargets,
    /// Share of a target's probability that is spread over all labels, where one is right.
    pub label_smoothing: f32,
    /// Weights of the labels `[labels]`, where one is right.
    pub class_weights: Option<Cow<'a, [f32]>>,
}

impl Classes<'_> {
    /// Targets without smoothing or weights.
    pub fn of(targets: ClassTargets) -> Self {
        Self {
            targets,
            label_smoothing: 0.0,
            class_weights: None,
        }
    }

    /// The losses of logits [n, labels] of so many outputs, whose gradients stand in their place afterwards.
    pub fn score_logits(&self, logits: &mut [f32], labels: usize) -> LossSum {
        let mut sums = LossSum::default();
        for (n, row) in logits.chunks_exact_mut(labels.max(1)).enumerate() {
            sums.add(self.row(n, row));
        }
        sums
    }

    /// The loss of one row of logits, whose gradient stands in their place afterwards.
    fn row(&self, n: usize, logits: &mut [f32]) -> LossSum {
        let width = logits.len();
        let outputs = n * width..(n + 1) * width;
        match &self.targets {
            ClassTargets::One(labels) => self.one(labels[n] as usize, logits),
            ClassTargets::Several(targets) => {
                let mut sum = LossSum::default();
                for (logit, target) in logits.iter_mut().zip(&targets[outputs]) {
                    let (z, t) = (f64::from(*logit), f64::from(*target));
                    // log(1 + exp(-|z|)) neither overflows nor cancels.
                    sum.loss += z.max(0.0) - z * t + (-z.abs()).exp().ln_1p();
                    sum.correct += usize::from((z > 0.0) == (t > 0.5));
                    *logit = (1.0 / (1.0 + (-z).exp()) - t) as f32;
                }
                counted(sum, width)
            }
            ClassTargets::Values(targets) => {
                let mut sum = LossSum::default();
                for (logit, target) in logits.iter_mut().zip(&targets[outputs]) {
                    let off = f64::from(*logit) - f64::from(*target);
                    sum.loss += off * off;
                    *logit = (2.0 * off) as f32;
                }
                counted(sum, width)
            }
        }
    }

    /// Cross-entropy with one right label.
    fn one(&self, label: usize, logits: &mut [f32]) -> LossSum {
        let max = logits.iter().fold(f32::NEG_INFINITY, |max, z| max.max(*z));
        let shifted = |z: f32| f64::from(z) - f64::from(max);
        let log_sum = logits.iter().map(|z| shifted(*z).exp()).sum::<f64>().ln();
        let spread = f64::from(self.label_smoothing);
        let each = spread / logits.len() as f64;
        let weight = |class: usize| {
            let weights = self.class_weights.as_ref();
            f64::from(weights.map_or(1.0, |weights| weights[class]))
        };
        let best = (0..logits.len())
            .rev()
            .max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        let mut loss = 0.0;
        // The smoothed label's share of each class, times that class's weight.
        let share = |class: usize| {
            let right = if class == label { 1.0 - spread } else { 0.0 };
            weight(class) * (right + each)
        };
        let total: f64 = (0..logits.len()).map(share).sum();
        for (class, logit) in logits.iter_mut().enumerate() {
            let log_p = shifted(*logit) - log_sum;
            loss -= share(class) * log_p;
            *logit = (total * log_p.exp() - share(class)) as f32;
        }
        LossSum {
            loss,
            correct: usize::from(best == Some(label)),
            tokens: 1,
            weight: weight(label),
        }
    }
}

/// A sum over so many outputs.
fn counted(sum: LossSum, outputs: usize) -> LossSum {
    LossSum {
        tokens: outputs,
        weight: outputs as f64,
        ..sum
    }
}

impl Objective for Classes<'_> {
    fn score(
        &self,
        top: &Top<'_>,
        hidden: View<'_>,
        gradients: Option<Gradients<'_>>,
        ws: &Workspace,
    ) -> LossSum {
        let (mut logits, saved) = top.classify(hidden);
        // They are few, and the loss is summed up in f64.
        let mut values = logits.to_vec();
        let sums = self.score_logits(&mut values, logits.cols());
        let gradient = Tensor::from_f32(logits.rows(), logits.cols(), values);
        logits.view_mut().copy_from(gradient.view());
        match gradients {
            None => {
                top.give(saved);
                ws.give(logits);
            }
            Some(Gradients { dh, trained }) => top.classify_backward(saved, logits, dh, trained),
        }
        sums
    }
}
