//! The output head and the losses on it: logits = h·Wᵀ for hidden rows h [n, C] and V tokens.
//!
//! Rows are taken in chunks, so a T×V matrix never exists. dh overwrites; dW accumulates.
//!
//! The loss of a row with target t, following Hugging Face's label smoothing ε, is
//! (1 - ε) · (lse - logit_t) + ε · (lse - mean(logit)).

use std::ops::Range;

use rayon::prelude::*;

use crate::classes::RowClasses;
use crate::compute::ComputeDType;
use crate::cpu::parallel::ForEachPart;
use crate::cpu::simd::{exp, lane_max, lane_sum, vectorize};
use crate::ops::linear::{Weight, linear_backward_input, linear_backward_weight, linear_forward};
use crate::ops::measure::argmax;
use crate::profile::op;
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

/// Numbers of a chunk of logits, at most, unless that is less than a few rows: 24 MiB.
const CHUNK: usize = 6 * 1024 * 1024;
/// Rows of a chunk, at least and at most. Fewer would widen a bf16 table too often; more gain
/// nothing.
const CHUNK_ROWS: Range<usize> = 32..256;
/// Numbers that are summed in f32 before the sum goes on in f64.
const SUM: usize = 1024;

/// logits = h·Wᵀ, overwritten; logits [n, V], h [n, C], whose rows are of these classes.
///
/// # Panics
/// If the shapes do not match.
pub fn head_logits(logits: ViewMut<'_>, h: View<'_>, w: Weight<'_>, classes: RowClasses) {
    linear_forward(logits, h, w, None, classes);
}

/// For each row the logarithm of the target's probability, the log-sum-exp, the mean logit, and
/// whether the target has the largest logit; all overwritten.
///
/// h [n, C]; all slices hold n elements.
///
/// # Panics
/// If the shapes do not match or a target is not below V.
pub fn head_log_probs(
    log_prob: &mut [f64],
    lse: &mut [f64],
    mean_logit: &mut [f64],
    correct: &mut [bool],
    h: View<'_>,
    w: Weight<'_>,
    targets: &[u32],
    ws: &Workspace,
) {
    let _op = op("cross-entropy", || 0.0);
    check(h, w, targets);
    let n = h.rows();
    assert_eq!(log_prob.len(), n, "log probabilities and rows");
    assert_eq!(lse.len(), n, "log-sum-exps and rows");
    assert_eq!(mean_logit.len(), n, "mean logits and rows");
    assert_eq!(correct.len(), n, "correct flags and rows");
    for_chunks(h, w, ws, |rows, logits| {
        let vocabulary = logits.cols();
        logits
            .into_f32s()
            .par_chunks(vocabulary)
            .zip(&targets[rows.clone()])
            .zip(&mut log_prob[rows.clone()])
            .zip(&mut lse[rows.clone()])
            .zip(&mut mean_logit[rows.clone()])
            .zip(&mut correct[rows])
            .for_each_part(|(((((row, &target), log_prob), lse), mean), correct)| {
                let stats = RowStats::of(row, target);
                *lse = stats.lse(sum_of_exps(row, stats.max));
                *log_prob = stats.target - *lse;
                *mean = stats.mean;
                *correct = stats.correct;
            });
    });
}

/// The gradient of Σ over rows of coef · loss; dh [n, C] is overwritten, dw (in w's layout) added to.
///
/// h [n, C], lse as [`head_log_probs`] gave it. The logits are computed again, as they are; `compute` is that of the gradients.
///
/// # Panics
/// If the shapes do not match or a target is not below V.
pub fn head_backward(
    dh: ViewMut<'_>,
    dw: Option<ViewMut<'_>>,
    h: View<'_>,
    w: Weight<'_>,
    targets: &[u32],
    lse: &[f64],
    coef: &[f32],
    label_smoothing: f32,
    compute: ComputeDType,
    ws: &Workspace,
) {
    let _op = op("cross-entropy", || 0.0);
    check(h, w, targets);
    assert_eq!(lse.len(), h.rows(), "log-sum-exps and rows");
    assert_eq!(coef.len(), h.rows(), "coefficients and rows");
    let mut grads = Gradients {
        dh: Some(dh),
        dw,
        h,
        w,
        compute,
    };
    grads.check();
    for_chunks(h, w, ws, |rows, mut logits| {
        let vocabulary = logits.cols();
        logits
            .reborrow()
            .into_f32s()
            .par_chunks_mut(vocabulary)
            .zip(&targets[rows.clone()])
            .zip(&lse[rows.clone()])
            .zip(&coef[rows.clone()])
            .for_each_part(|(((row, &target), &lse), &coef)| {
                loss_gradient(row, target, lse, coef, label_smoothing);
            });
        grads.add(rows, logits.as_view());
    });
}

/// A sum of losses and how many targets had the largest logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Σ over rows of the loss.
    pub loss_sum: f64,
    /// Rows whose target has the largest logit.
    pub correct: usize,
}

/// The sum of the losses of all rows and its gradient in one pass.
///
/// dh [n, C] is overwritten, dw (in w's layout) added to; h [n, C]. `compute` is that of the gradients, not of the logits.
///
/// # Panics
/// If the shapes do not match or a target is not below V.
pub fn cross_entropy_forward_backward(
    dh: Option<ViewMut<'_>>,
    dw: Option<ViewMut<'_>>,
    h: View<'_>,
    w: Weight<'_>,
    targets: &[u32],
    label_smoothing: f32,
    compute: ComputeDType,
    ws: &Workspace,
) -> CrossEntropy {
    let _op = op("cross-entropy", || 0.0);
    check(h, w, targets);
    let mut grads = Gradients {
        dh,
        dw,
        h,
        w,
        compute,
    };
    grads.check();
    let wanted = grads.dh.is_some() || grads.dw.is_some();
    let smoothing = f64::from(label_smoothing);
    let mut total = CrossEntropy {
        loss_sum: 0.0,
        correct: 0,
    };
    for_chunks(h, w, ws, |rows, mut logits| {
        let vocabulary = logits.cols();
        let results: Vec<(f64, bool)> = logits
            .reborrow()
            .into_f32s()
            .par_chunks_mut(vocabulary)
            .zip(&targets[rows.clone()])
            .map_parts(|(row, &target)| {
                let stats = RowStats::of(row, target);
                let exps = exponentiate(row, stats.max);
                let lse = stats.lse(exps);
                let loss =
                    (1.0 - smoothing) * (lse - stats.target) + smoothing * (lse - stats.mean);
                if wanted {
                    loss_gradient_of_exps(row, target, exps, label_smoothing);
                }
                (loss, stats.correct)
            });
        // In the order of the rows, whatever thread computed them.
        for (loss, correct) in results {
            total.loss_sum += loss;
            total.correct += usize::from(correct);
        }
        grads.add(rows, logits.as_view());
    });
    total
}

fn check(h: View<'_>, w: Weight<'_>, targets: &[u32]) {
    assert_eq!(h.cols(), w.inputs(), "hidden size and inputs of the head");
    assert_eq!(targets.len(), h.rows(), "targets and rows");
    if let Some(largest) = targets.iter().max() {
        assert!(
            (*largest as usize) < w.outputs(),
            "target {largest} is past the vocabulary of {}",
            w.outputs()
        );
    }
}

/// Rows whose logits exist at the same time, at most.
pub fn head_chunk_rows(vocabulary: usize) -> usize {
    (CHUNK / vocabulary.max(1)).clamp(CHUNK_ROWS.start, CHUNK_ROWS.end)
}

/// Calls `work` with the logits of each chunk of rows, one chunk after the other.
fn for_chunks(
    h: View<'_>,
    w: Weight<'_>,
    ws: &Workspace,
    mut work: impl FnMut(Range<usize>, ViewMut<'_>),
) {
    let vocabulary = w.outputs();
    let step = head_chunk_rows(vocabulary).min(h.rows());
    if step == 0 {
        return;
    }
    let mut buffer = ws.take(step, vocabulary);
    for start in (0..h.rows()).step_by(step) {
        let rows = start..(start + step).min(h.rows());
        let mut logits = buffer.view_mut().slice_rows(0..rows.len());
        let h = h.slice_rows(rows.clone());
        head_logits(logits.reborrow(), h, w, RowClasses::PROMPT);
        work(rows, logits);
    }
    ws.give(buffer);
}

/// Where the gradients of a chunk's logits go.
struct Gradients<'a> {
    dh: Option<ViewMut<'a>>,
    dw: Option<ViewMut<'a>>,
    h: View<'a>,
    w: Weight<'a>,
    compute: ComputeDType,
}

impl Gradients<'_> {
    fn check(&self) {
        if let Some(dh) = &self.dh {
            dh.assert_shape(
                "the gradient of the hidden rows",
                self.h.rows(),
                self.h.cols(),
            );
        }
        if let Some(dw) = &self.dw {
            let (rows, cols) = (self.w.view.rows(), self.w.view.cols());
            dw.assert_shape("the gradient of the head", rows, cols);
        }
    }

    fn add(&mut self, rows: Range<usize>, dlogits: View<'_>) {
        // logits = h·Wᵀ, so dh = dlogits·W and dW += dlogitsᵀ·h
        if let Some(dh) = &mut self.dh {
            let dh = dh.reborrow().slice_rows(rows.clone());
            linear_backward_input(dh, dlogits, self.w, false, self.compute);
        }
        if let Some(dw) = &mut self.dw {
            let h = self.h.slice_rows(rows);
            let dw = dw.reborrow();
            linear_backward_weight(dw, dlogits, h, self.w.layout, self.compute);
        }
    }
}

/// What the loss of a row needs of its logits, next to the sum of their exponentials.
struct RowStats {
    max: f32,
    mean: f64,
    target: f64,
    correct: bool,
}

impl RowStats {
    fn of(row: &[f32], target: u32) -> Self {
        let (max, sum) = vectorize(
            #[inline(always)]
            || {
                let mut sum = 0.0;
                for part in row.chunks(SUM) {
                    sum += f64::from(lane_sum([part], |[x]| x));
                }
                (lane_max(row), sum)
            },
        );
        let logit = row[target as usize];
        Self {
            max,
            mean: sum / row.len() as f64,
            target: f64::from(logit),
            // Only a row whose target has the largest logit needs the search for equals.
            correct: logit >= max && argmax(row) == target as usize,
        }
    }

    /// The log-sum-exp from the sum of exp(logit - max).
    fn lse(&self, exps: f64) -> f64 {
        f64::from(self.max) + exps.ln()
    }
}

/// Σ exp(logit - max) of a row.
fn sum_of_exps(row: &[f32], max: f32) -> f64 {
    let mut part = [0.0; SUM];
    let parts = row.chunks(SUM).map(|logits| {
        let part = &mut part[..logits.len()];
        part.copy_from_slice(logits);
        exponentiate(part, max)
    });
    parts.sum()
}

/// Replaces logits by exp(logit - max) and gives their sum.
fn exponentiate(row: &mut [f32], max: f32) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            let mut sum = 0.0;
            for part in row.chunks_mut(SUM) {
                for x in &mut *part {
                    *x = exp(*x - max);
                }
                sum += f64::from(lane_sum([part], |[x]| x));
            }
            sum
        },
    )
}

/// Replaces exp(logit - max) of a row, whose sum is `exps`, by the gradient of the loss.
fn loss_gradient_of_exps(row: &mut [f32], target: u32, exps: f64, label_smoothing: f32) {
    // As in `loss_gradient`, with softmax = exp(logit - max) / Σ.
    let uniform = label_smoothing / row.len() as f32;
    let factor = (1.0 / exps) as f32;
    vectorize(
        #[inline(always)]
        || {
            for x in row.iter_mut() {
                *x = *x * factor - uniform;
            }
        },
    );
    row[target as usize] -= 1.0 - label_smoothing;
}

/// Replaces the logits of a row by the gradient of coef · loss.
fn loss_gradient(row: &mut [f32], target: u32, lse: f64, coef: f32, label_smoothing: f32) {
    // loss = lse - (1 - ε) · logit_t - ε · mean(logit), so
    // dlogit = softmax - (1 - ε) · [is t] - ε / V
    let uniform = label_smoothing / row.len() as f32;
    // In two parts, because the rounding of a large one would be a factor of every probability.
    let high = lse as f32;
    let low = (lse - f64::from(high)) as f32;
    vectorize(
        #[inline(always)]
        || {
            for logit in row.iter_mut() {
                *logit = coef * (exp((*logit - high) - low) - uniform);
            }
        },
    );
    row[target as usize] -= coef * (1.0 - label_smoothing);
}
