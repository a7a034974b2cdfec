//! Numbers about a matrix: norms, finite checks, differences, the largest of each row.

use rayon::prelude::*;

use crate::profile::op;
use crate::simd::vectorize;
use crate::view::View;

/// Numbers that one partial sum covers.
const BLOCK: usize = 16 * 1024;
/// Lanes of a sum in f64.
const LANES: usize = 8;

/// Σ x², in f64 and in a fixed order.
pub fn sum_squares(x: View<'_>) -> f64 {
    let _op = op("sum of squares", || 0.0);
    let partial: Vec<f64> = x
        .f32s()
        .par_chunks(BLOCK)
        .map(|x| {
            vectorize(
                #[inline(always)]
                || {
                    let mut lanes = [0.0_f64; LANES];
                    let mut chunks = x.chunks_exact(LANES);
                    for chunk in &mut chunks {
                        for (sum, &x) in lanes.iter_mut().zip(chunk) {
                            *sum += f64::from(x) * f64::from(x);
                        }
                    }
                    let rest = chunks.remainder().iter();
                    lanes.iter().sum::<f64>()
                        + rest.map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
                },
            )
        })
        .collect();
    partial.iter().sum()
}

/// √(Σ x²).
pub fn frobenius_norm(x: View<'_>) -> f64 {
    sum_squares(x).sqrt()
}

/// Whether no element is infinite or NaN.
pub fn all_finite(x: View<'_>) -> bool {
    x.f32s().par_chunks(BLOCK).all(chunk_is_finite)
}

/// Position, in row order, of the first element that is infinite or NaN.
pub fn first_non_finite(x: View<'_>) -> Option<usize> {
    let x = x.f32s();
    let block = x
        .par_chunks(BLOCK)
        .position_first(|chunk| !chunk_is_finite(chunk))?;
    let start = block * BLOCK;
    let within = x[start..].iter().position(|x| !x.is_finite())?;
    Some(start + within)
}

fn chunk_is_finite(chunk: &[f32]) -> bool {
    vectorize(
        #[inline(always)]
        || {
            // Without an early exit, so that the loop becomes vector code.
            let mut finite = true;
            for x in chunk {
                finite &= x.is_finite();
            }
            finite
        },
    )
}

/// The column of the largest element of each row; the first of equals. NaN is never the largest.
///
/// # Panics
/// If there are rows but no columns.
pub fn argmax_rows(x: View<'_>) -> Vec<usize> {
    let _op = op("argmax", || 0.0);
    if x.rows() == 0 {
        return Vec::new();
    }
    assert!(x.cols() > 0, "rows without columns have no largest element");
    x.f32s().par_chunks(x.cols()).map(argmax).collect()
}

/// The position of the first of the largest numbers, zero if there is none.
pub(crate) fn argmax(row: &[f32]) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, &x) in row.iter().enumerate() {
        if x > best.1 {
            best = (i, x);
        }
    }
    best.0
}

/// The largest |a - b|; NaN if a difference is.
///
/// # Panics
/// If the shapes differ.
pub fn max_abs_diff(a: View<'_>, b: View<'_>) -> f32 {
    b.assert_shape("the matrix to compare with", a.rows(), a.cols());
    let (a, b) = (a.to_vec(), b.to_vec());
    a.iter().zip(&b).fold(0.0, |largest, (a, b)| {
        let difference = (a - b).abs();
        if difference > largest || difference.is_nan() {
            difference
        } else {
            largest
        }
    })
}
