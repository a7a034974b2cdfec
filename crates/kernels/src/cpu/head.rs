//! Softmax and its losses over rows of logits.

use half::bf16;
use rayon::prelude::*;

use crate::cpu::measure::argmax;
use crate::cpu::parallel::ForEachPart;
use crate::cpu::product::mat::Mat;
use crate::cpu::simd::{exp, lane_max, lane_sum, narrow, tanh, vectorize};
use crate::types::head::LogitScaling;
use crate::view::{View, ViewMut};

/// Numbers that are summed in f32 before the sum goes on in f64.
const SUM: usize = 1024;

/// l / divisor, then c · tanh(l / c) where there is a cap c.
pub(crate) fn scale_logits(logits: ViewMut<'_>, scaling: LogitScaling) {
    let vocabulary = logits.cols();
    let rows = logits.into_f32s().par_chunks_mut(vocabulary.max(1));
    rows.for_each_part(|row| {
        vectorize(
            #[inline(always)]
            || {
                if scaling.divisor != 1.0 {
                    for logit in row.iter_mut() {
                        *logit /= scaling.divisor;
                    }
                }
                if let Some(cap) = scaling.softcap {
                    let inverse = 1.0 / cap;
                    for logit in row.iter_mut() {
                        *logit = cap * tanh(*logit * inverse);
                    }
                }
            },
        );
    });
}

/// The gradients of logits from those of what [`scale_logits`] made of them, which is `scaled` where there is a cap.
pub(crate) fn scale_gradients(
    gradients: ViewMut<'_>,
    scaled: Option<View<'_>>,
    scaling: LogitScaling,
) {
    let vocabulary = gradients.cols().max(1);
    let factor = 1.0 / scaling.divisor;
    let rows = gradients.into_f32s().par_chunks_mut(vocabulary);
    let (Some(scaled), Some(cap)) = (scaled, scaling.softcap) else {
        rows.for_each_part(|row| {
            vectorize(
                #[inline(always)]
                || row.iter_mut().for_each(|gradient| *gradient *= factor),
            );
        });
        return;
    };
    let inverse = 1.0 / cap;
    let scaled = scaled.f32s().par_chunks(vocabulary);
    rows.zip(scaled).for_each_part(|(row, scaled)| {
        vectorize(
            #[inline(always)]
            || {
                for (gradient, scaled) in row.iter_mut().zip(scaled) {
                    // tanh is scaled / c, and its slope 1 - tanh²
                    let capped = scaled * inverse;
                    *gradient *= factor * (1.0 - capped * capped);
                }
            },
        );
    });
}

/// y[:, columns[i]] = x[:, i]
pub(crate) fn set_columns(y: ViewMut<'_>, columns: &[u32], x: View<'_>) {
    let width = y.cols().max(1);
    let values = x.f32s().par_chunks(columns.len().max(1));
    let rows = y.into_f32s().par_chunks_mut(width).zip(values);
    rows.for_each_part(|(y, x)| {
        for (&column, &value) in columns.iter().zip(x) {
            y[column as usize] = value;
        }
    });
}

/// x[:, i] = y[:, columns[i]], which is zero afterwards.
pub(crate) fn take_columns(x: ViewMut<'_>, y: ViewMut<'_>, columns: &[u32]) {
    let width = y.cols().max(1);
    let values = x.into_f32s().par_chunks_mut(columns.len().max(1));
    let rows = y.into_f32s().par_chunks_mut(width).zip(values);
    rows.for_each_part(|(y, x)| {
        for (&column, value) in columns.iter().zip(x) {
            *value = std::mem::take(&mut y[column as usize]);
        }
    });
}

/// For each row of logits the logarithm of the target's probability, the log-sum-exp, the mean, and whether the target has the
/// largest.
pub(crate) fn log_probs(
    logits: View<'_>,
    targets: &[u32],
    log_prob: &mut [f64],
    lse: &mut [f64],
    mean_logit: &mut [f64],
    correct: &mut [bool],
) {
    logits
        .f32s()
        .par_chunks(logits.cols())
        .zip(targets)
        .zip(log_prob)
        .zip(lse)
        .zip(mean_logit)
        .zip(correct)
        .for_each_part(|(((((row, &target), log_prob), lse), mean), correct)| {
            let stats = RowStats::of(row, target);
            *lse = stats.lse(sum_of_exps(row, stats.max));
            *log_prob = stats.target - *lse;
            *mean = stats.mean;
            *correct = stats.correct;
        });
}

/// Replaces logits by the gradient of coef · loss.
pub(crate) fn loss_gradients(
    logits: ViewMut<'_>,
    targets: &[u32],
    lse: &[f64],
    coef: &[f32],
    label_smoothing: f32,
) {
    let vocabulary = logits.cols();
    logits
        .into_f32s()
        .par_chunks_mut(vocabulary)
        .zip(targets)
        .zip(lse)
        .zip(coef)
        .for_each_part(|(((row, &target), &lse), &coef)| {
            loss_gradient(row, target, lse, coef, label_smoothing);
        });
}

/// What logits are replaced by, once their losses are known.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replacement {
    /// Anything.
    Anything,
    /// Their gradients.
    Gradients,
    /// Their gradients in bf16, which [`rounded_gradients`] finds: a row begins where it did, and takes half of its place.
    RoundedGradients,
}

/// The gradients that [`losses`] wrote in bf16.
pub(crate) fn rounded_gradients(logits: View<'_>) -> Mat<'_, bf16> {
    let (rows, cols) = (logits.rows(), logits.cols());
    Mat::strided(bytemuck::cast_slice(logits.f32s()), rows, cols, 2 * cols)
}

/// The loss of each row and whether its target has the largest logit. Replaces the logits.
pub(crate) fn losses(
    logits: ViewMut<'_>,
    targets: &[u32],
    label_smoothing: f32,
    by: Replacement,
) -> Vec<(f64, bool)> {
    let vocabulary = logits.cols();
    let smoothing = f64::from(label_smoothing);
    logits
        .into_f32s()
        .par_chunks_mut(vocabulary)
        .zip(targets)
        .map_parts(|(row, &target)| {
            let stats = RowStats::of(row, target);
            let exps = exponentiate(row, stats.max);
            let lse = stats.lse(exps);
            let loss = (1.0 - smoothing) * (lse - stats.target) + smoothing * (lse - stats.mean);
            if by != Replacement::Anything {
                loss_gradient_of_exps(row, target, exps, label_smoothing);
            }
            if by == Replacement::RoundedGradients {
                round_in_place(row);
            }
            (loss, stats.correct)
        })
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

/// Replaces numbers by themselves in bf16, in the first half of their memory.
fn round_in_place(numbers: &mut [f32]) {
    let mut part = [0.0; SUM];
    for start in (0..numbers.len()).step_by(SUM) {
        let end = numbers.len().min(start + SUM);
        let part = &mut part[..end - start];
        part.copy_from_slice(&numbers[start..end]);
        // What this overwrites has been rounded before, or is the part.
        narrow(&mut bytemuck::cast_slice_mut(numbers)[start..end], part);
    }
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
