//! Loops of RMS norm.

use rayon::prelude::*;

use super::COLUMNS;
use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::product::mat::for_tiles;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{lane_sum, vectorize};
use crate::view::{OutputMut, View, ViewMut};

pub(crate) fn rms_norm_forward(
    y: OutputMut<'_>,
    rstd: ViewMut<'_>,
    x: View<'_>,
    weight: View<'_>,
    offset: f32,
    eps: f32,
    groups: usize,
) {
    let size = x.cols() / groups;
    let block = rows_per_task(x.cols());
    let width = block * x.cols();
    with_factors(weight, offset, |weight| {
        y.par_chunks_mut(width)
            .zip(rstd.into_f32s().par_chunks_mut(block * groups))
            .zip(x.f32s().par_chunks(width))
            .for_each_part(|((y, rstd), x)| {
                y.write(|y| {
                    vectorize(
                        #[inline(always)]
                        || {
                            let pieces = y.chunks_exact_mut(size).zip(x.chunks_exact(size));
                            for ((y, x), rstd) in pieces.zip(rstd) {
                                let squares = lane_sum([x], |[x]| x * x);
                                *rstd = 1.0 / (squares / size as f32 + eps).sqrt();
                                scale_piece(y, x, *rstd, weight);
                            }
                        },
                    );
                });
            });
    });
}

pub(crate) fn rms_norm_apply(
    y: OutputMut<'_>,
    x: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    offset: f32,
    groups: usize,
) {
    let size = x.cols() / groups;
    let block = rows_per_task(x.cols());
    let width = block * x.cols();
    with_factors(weight, offset, |weight| {
        y.par_chunks_mut(width)
            .zip(rstd.f32s().par_chunks(block * groups))
            .enumerate()
            .for_each_part(|(i, (y, rstd))| {
                let part = i * width..i * width + y.len();
                x.with_part(part, |x| {
                    y.write(|y| {
                        vectorize(
                            #[inline(always)]
                            || {
                                let pieces = y.chunks_exact_mut(size).zip(x.chunks_exact(size));
                                for ((y, x), rstd) in pieces.zip(rstd) {
                                    scale_piece(y, x, *rstd, weight);
                                }
                            },
                        );
                    });
                });
            });
    });
}

pub(crate) fn rms_norm_backward(
    dx: ViewMut<'_>,
    dweight: Option<ViewMut<'_>>,
    dy: View<'_>,
    x: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    offset: f32,
    groups: usize,
    accumulate: bool,
) {
    let size = x.cols() / groups;
    let block = rows_per_task(x.cols());
    let width = block * x.cols();
    let (dy, rstd) = (dy.f32s(), rstd.f32s());
    if let Some(dweight) = dweight {
        // y = x · rstd · w, so dw += Σ over tokens and groups of dy · x · rstd
        x.with_f32s(|x| {
            for_tiles(dweight, (1, COLUMNS), |mut sums, _, columns| {
                let sums = sums.row(0);
                vectorize(
                    #[inline(always)]
                    || {
                        let pieces = dy.chunks_exact(size).zip(x.chunks_exact(size));
                        for ((dy, x), &rstd) in pieces.zip(rstd) {
                            let (dy, x) = (&dy[columns.clone()], &x[columns.clone()]);
                            for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
                                *sum += dy * x * rstd;
                            }
                        }
                    },
                );
            });
        });
    }
    // y = x · rstd · w and rstd = (Σx²/n + ε)^-½, so with g = dy · w:
    // dx = rstd · (g - x · rstd² · Σ(g·x) / n)
    with_factors(weight, offset, |weight| {
        dx.into_f32s()
            .par_chunks_mut(width)
            .zip(dy.par_chunks(width))
            .zip(rstd.par_chunks(block * groups))
            .enumerate()
            .for_each_part(|(i, ((dx, dy), rstd))| {
                let part = i * width..i * width + dx.len();
                x.with_part(part, |x| {
                    vectorize(
                        #[inline(always)]
                        || {
                            let pieces = dx.chunks_exact_mut(size).zip(dy.chunks_exact(size));
                            let pieces = pieces.zip(x.chunks_exact(size));
                            for (((dx, dy), x), &rstd) in pieces.zip(rstd) {
                                let sum = lane_sum([dy, weight, x], |[dy, w, x]| dy * w * x);
                                let mean = sum / size as f32 * rstd * rstd;
                                let values = dx.iter_mut().zip(dy).zip(x).zip(weight);
                                for (((dx, dy), x), w) in values {
                                    let before = if accumulate { *dx } else { 0.0 };
                                    *dx = before + rstd * (dy * w - x * mean);
                                }
                            }
                        },
                    );
                });
            });
    });
}

/// Calls `work` with what the pieces are multiplied with: offset + w.
fn with_factors<R>(weight: View<'_>, offset: f32, work: impl FnOnce(&[f32]) -> R) -> R {
    weight.with_f32s(|weight| {
        if offset == 0.0 {
            return work(weight);
        }
        with_scratch(weight.len(), |factors| {
            for (factor, w) in factors.iter_mut().zip(weight) {
                *factor = offset + w;
            }
            work(factors)
        })
    })
}

#[inline(always)]
fn scale_piece(y: &mut [f32], x: &[f32], rstd: f32, weight: &[f32]) {
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = x * rstd * weight;
    }
}
