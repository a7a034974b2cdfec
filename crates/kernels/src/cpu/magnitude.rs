//! Norms of a linear's outputs, and factors of them.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, rows_per_task};
use crate::cpu::simd::vectorize;
use crate::types::linear::{Layout, Weight};
use crate::types::low_rank::LowRank;
use crate::view::{View, ViewMut};

/// Lanes of a sum in f64.
const LANES: usize = 8;
/// Rows of a weight [in, out] whose squares are summed by one task.
const ROWS: usize = 64;
/// Outputs whose norms one task computes.
const OUTPUTS: usize = 64;
/// The fewest rows whose products are one partial sum of a gradient.
const FEWEST_ROWS: usize = 32;

pub(crate) fn output_squares(w: Weight<'_>) -> Vec<f64> {
    let (rows, cols) = (w.view.rows(), w.view.cols());
    if rows == 0 || cols == 0 {
        return vec![0.0; w.outputs()];
    }
    let strips = |height: usize| {
        let starts = (0..rows).step_by(height).collect::<Vec<_>>();
        starts
            .into_par_iter()
            .map(move |start| start * cols..(start + height).min(rows) * cols)
    };
    match w.layout {
        Layout::OutIn => {
            let of_strip = |strip: Range<usize>| {
                w.view.with_part(strip, |numbers| {
                    let lines = numbers.chunks_exact(cols);
                    lines.map(|line| dot(line, line)).collect::<Vec<_>>()
                })
            };
            strips(rows_per_task(cols)).map_parts(of_strip).concat()
        }
        Layout::InOut => {
            let of_strip = |strip: Range<usize>| {
                let mut sums = vec![0.0; cols];
                w.view.with_part(strip, |numbers| {
                    for line in numbers.chunks_exact(cols) {
                        add_squares(&mut sums, line);
                    }
                });
                sums
            };
            let mut sums = vec![0.0; cols];
            for part in strips(ROWS).map_parts(of_strip) {
                for (sum, part) in sums.iter_mut().zip(part) {
                    *sum += part;
                }
            }
            sums
        }
    }
}

fn add_squares(sums: &mut [f64], line: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (sum, &x) in sums.iter_mut().zip(line) {
                *sum += f64::from(x) * f64::from(x);
            }
        },
    );
}

/// Σ x·y in f64.
fn dot<X: Copy + Into<f64>>(x: &[X], y: &[X]) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            let mut lanes = [0.0_f64; LANES];
            let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
            for (x, y) in xs.iter().zip(ys) {
                for i in 0..LANES {
                    lanes[i] += x[i].into() * y[i].into();
                }
            }
            let rest = x_rest.iter().zip(y_rest);
            let rest = rest.map(|(&x, &y)| x.into() * y.into());
            lanes.iter().sum::<f64>() + rest.sum::<f64>()
        },
    )
}

pub(crate) fn adapted_squares(squares: &mut [f64], wa: View<'_>, lr: &LowRank<'_>) {
    let (rank, inputs, outputs) = (lr.rank(), lr.a.cols(), squares.len());
    let scale = f64::from(lr.scale);
    let (a, b, wa) = (lr.a.f32s(), lr.b.f32s(), wa.f32s());
    // s²·A·Aᵀ [r, r]
    let gram: Vec<f64> = (a.par_chunks(inputs.max(1)))
        .map_parts(|row| {
            let all = a.chunks_exact(inputs);
            all.map(|other| scale * scale * dot(row, other))
                .collect::<Vec<_>>()
        })
        .concat();
    let own = lr.out_offset..lr.out_offset + lr.b.rows();
    squares[own]
        .par_chunks_mut(OUTPUTS)
        .zip(b.par_chunks(OUTPUTS * rank))
        .enumerate()
        .for_each_part(|(part, (squares, b))| {
            let mut wide = vec![0.0_f64; rank];
            for (i, (square, b)) in squares.iter_mut().zip(b.chunks_exact(rank)).enumerate() {
                let output = lr.out_offset + part * OUTPUTS + i;
                for (wide, &b) in wide.iter_mut().zip(b) {
                    *wide = f64::from(b);
                }
                for (k, of_gram) in gram.chunks_exact(rank).enumerate() {
                    let beside = 2.0 * scale * f64::from(wa[k * outputs + output]);
                    *square += wide[k] * (beside + dot(of_gram, &wide));
                }
            }
        });
}

pub(crate) fn magnitude_forward(
    y: ViewMut<'_>,
    u: Option<ViewMut<'_>>,
    c: View<'_>,
    bias: Option<View<'_>>,
) {
    let cols = y.cols();
    if cols == 0 {
        return;
    }
    let (c, bias) = (c.f32s(), bias.map(|bias| bias.f32s()));
    let Some(u) = u else {
        return magnitude_alone(y, c, bias);
    };
    let rows = rows_per_task(cols) * cols;
    y.into_f32s()
        .par_chunks_mut(rows)
        .zip(u.into_f32s().par_chunks_mut(rows))
        .for_each_part(|(y, u)| {
            vectorize(
                #[inline(always)]
                || {
                    for (y, u) in y.chunks_exact_mut(cols).zip(u.chunks_exact_mut(cols)) {
                        let numbers = y.iter_mut().zip(u).zip(c);
                        match bias {
                            None => {
                                for ((y, u), c) in numbers {
                                    *u = *y;
                                    *y *= c;
                                }
                            }
                            Some(bias) => {
                                for (((y, u), c), b) in numbers.zip(bias) {
                                    *u = *y - b;
                                    *y = *u * c + b;
                                }
                            }
                        }
                    }
                },
            );
        });
}

fn magnitude_alone(y: ViewMut<'_>, c: &[f32], bias: Option<&[f32]>) {
    let cols = y.cols();
    let rows = rows_per_task(cols) * cols;
    y.into_f32s().par_chunks_mut(rows).for_each_part(|y| {
        vectorize(
            #[inline(always)]
            || {
                for y in y.chunks_exact_mut(cols) {
                    let numbers = y.iter_mut().zip(c);
                    match bias {
                        None => numbers.for_each(|(y, c)| *y *= c),
                        Some(bias) => {
                            numbers
                                .zip(bias)
                                .for_each(|((y, c), b)| *y = (*y - b) * c + b);
                        }
                    }
                }
            },
        );
    });
}

pub(crate) fn magnitude_backward(
    du: ViewMut<'_>,
    dm: ViewMut<'_>,
    dy: View<'_>,
    u: View<'_>,
    (c, divisors): (View<'_>, View<'_>),
) {
    let cols = du.cols();
    if cols == 0 {
        return;
    }
    let rows = rows_per_task(cols).max(FEWEST_ROWS) * cols;
    let c = c.f32s();
    // u/norm is the direction, so dm += Σ dy ⊙ u / norm; u = y / c, and c · norm = m.
    let sums = du
        .into_f32s()
        .par_chunks_mut(rows)
        .zip(dy.f32s().par_chunks(rows))
        .enumerate()
        .map_parts(|(part, (du, dy))| {
            let mut sums = vec![0.0_f32; cols];
            let start = part * rows;
            u.with_part(start..start + du.len(), |u| {
                vectorize(
                    #[inline(always)]
                    || {
                        let lines = dy.chunks_exact(cols).zip(u.chunks_exact(cols));
                        for (du, (dy, u)) in du.chunks_exact_mut(cols).zip(lines) {
                            let numbers = du.iter_mut().zip(dy).zip(u).zip(c).zip(&mut sums);
                            for ((((du, dy), u), c), sum) in numbers {
                                *du = dy * c;
                                *sum += dy * u;
                            }
                        }
                    },
                );
            });
            sums
        });
    let dm = dm.into_f32s();
    for (i, (dm, divisor)) in dm.iter_mut().zip(divisors.f32s()).enumerate() {
        *dm += sums.iter().map(|sums| sums[i]).sum::<f32>() / divisor;
    }
}
