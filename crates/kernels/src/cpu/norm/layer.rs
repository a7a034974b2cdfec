//! Loops of layer norm.

use rayon::prelude::*;

use super::COLUMNS;
use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::product::mat::for_tiles;
use crate::cpu::simd::{lane_sum, vectorize};
use crate::view::{OutputMut, View, ViewMut};

pub(crate) fn layer_norm_forward(
    y: OutputMut<'_>,
    mean: ViewMut<'_>,
    rstd: ViewMut<'_>,
    x: View<'_>,
    weight: View<'_>,
    bias: Option<View<'_>>,
    eps: f32,
) {
    let cols = x.cols();
    let block = rows_per_task(cols);
    with_affine(weight, bias, |weight, bias| {
        y.par_chunks_mut(block * cols)
            .zip(mean.into_f32s().par_chunks_mut(block))
            .zip(rstd.into_f32s().par_chunks_mut(block))
            .zip(x.f32s().par_chunks(block * cols))
            .for_each_part(|(((y, mean), rstd), x)| {
                y.write(|y| {
                    vectorize(
                        #[inline(always)]
                        || {
                            let rows = y.chunks_exact_mut(cols).zip(x.chunks_exact(cols));
                            for ((y, x), (mean, rstd)) in rows.zip(mean.iter_mut().zip(rstd)) {
                                let m = lane_sum([x], |[x]| x) / cols as f32;
                                let squares = lane_sum([x], |[x]| (x - m) * (x - m));
                                *mean = m;
                                *rstd = 1.0 / (squares / cols as f32 + eps).sqrt();
                                apply_row(y, x, m, *rstd, weight, bias);
                            }
                        },
                    );
                });
            });
    });
}

pub(crate) fn layer_norm_apply(
    y: OutputMut<'_>,
    x: View<'_>,
    mean: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    bias: Option<View<'_>>,
) {
    let cols = x.cols();
    let block = rows_per_task(cols);
    with_affine(weight, bias, |weight, bias| {
        y.par_chunks_mut(block * cols)
            .zip(mean.f32s().par_chunks(block))
            .zip(rstd.f32s().par_chunks(block))
            .enumerate()
            .for_each_part(|(i, ((y, mean), rstd))| {
                let part = i * block * cols..i * block * cols + y.len();
                x.with_part(part, |x| {
                    y.write(|y| {
                        vectorize(
                            #[inline(always)]
                            || {
                                let rows = y.chunks_exact_mut(cols).zip(x.chunks_exact(cols));
                                for ((y, x), (&mean, &rstd)) in rows.zip(mean.iter().zip(rstd)) {
                                    apply_row(y, x, mean, rstd, weight, bias);
                                }
                            },
                        );
                    });
                });
            });
    });
}

pub(crate) fn layer_norm_backward(
    dx: ViewMut<'_>,
    dweight: Option<ViewMut<'_>>,
    dy: View<'_>,
    x: View<'_>,
    mean: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    accumulate: bool,
) {
    let cols = x.cols();
    let (dy, mean, rstd) = (dy.f32s(), mean.f32s(), rstd.f32s());
    if let Some(dweight) = dweight {
        // y = (x - mean) · rstd · w + b, so dw += Σ over tokens of dy · (x - mean) · rstd
        x.with_f32s(|x| {
            for_tiles(dweight, (1, COLUMNS), |mut sums, _, columns| {
                let sums = sums.row(0);
                vectorize(
                    #[inline(always)]
                    || {
                        let rows = dy.chunks_exact(cols).zip(x.chunks_exact(cols));
                        for ((dy, x), (&mean, &rstd)) in rows.zip(mean.iter().zip(rstd)) {
                            let (dy, x) = (&dy[columns.clone()], &x[columns.clone()]);
                            for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
                                *sum += dy * (x - mean) * rstd;
                            }
                        }
                    },
                );
            });
        });
    }
    // y = n·w + b with n = (x - mean) · rstd, so with g = dy · w:
    // dx = rstd · (g - mean(g) - n · mean(g·n))
    let block = rows_per_task(cols);
    weight.with_f32s(|weight| {
        dx.into_f32s()
            .par_chunks_mut(block * cols)
            .zip(dy.par_chunks(block * cols))
            .zip(mean.par_chunks(block).zip(rstd.par_chunks(block)))
            .enumerate()
            .for_each_part(|(i, ((dx, dy), (mean, rstd)))| {
                let part = i * block * cols..i * block * cols + dx.len();
                x.with_part(part, |x| {
                    vectorize(
                        #[inline(always)]
                        || {
                            let rows = dx.chunks_exact_mut(cols).zip(dy.chunks_exact(cols));
                            let stats = mean.iter().zip(rstd);
                            for (((dx, dy), x), (&m, &rstd)) in
                                rows.zip(x.chunks_exact(cols)).zip(stats)
                            {
                                let n = cols as f32;
                                let sum = lane_sum([dy, weight], |[dy, w]| dy * w) / n;
                                let along =
                                    lane_sum([dy, weight, x], |[dy, w, x]| dy * w * (x - m) * rstd)
                                        / n;
                                let values = dx.iter_mut().zip(dy).zip(x).zip(weight);
                                for (((dx, dy), x), w) in values {
                                    let before = if accumulate { *dx } else { 0.0 };
                                    let normed = (x - m) * rstd;
                                    *dx = before + rstd * (dy * w - sum - normed * along);
                                }
                            }
                        },
                    );
                });
            });
    });
}

/// Calls `work` with the weight and the bias (empty if there is none) in f32.
fn with_affine(weight: View<'_>, bias: Option<View<'_>>, work: impl FnOnce(&[f32], &[f32])) {
    weight.with_f32s(|weight| match bias {
        Some(bias) => bias.with_f32s(|bias| work(weight, bias)),
        None => work(weight, &[]),
    });
}

#[inline(always)]
fn apply_row(y: &mut [f32], x: &[f32], mean: f32, rstd: f32, weight: &[f32], bias: &[f32]) {
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = (x - mean) * rstd * weight;
    }
    for (y, bias) in y.iter_mut().zip(bias) {
        *y += bias;
    }
}
