//! Numbers about a matrix: norms, finite checks, differences, the largest of each row.

use crate::cpu;
use crate::profile::op;
use crate::view::View;

/// Σ x², in f64 and in a fixed order.
pub fn sum_squares(x: View<'_>) -> f64 {
    let _op = op("sum of squares", || 0.0);
    cpu::measure::sum_squares(x)
}

/// Bytes a second that all threads together read from memory, the best of `repeats` runs.
///
/// `bytes` must be far more than the caches hold. A weight that is used once a token cannot come
/// faster.
pub fn read_bandwidth(bytes: usize, repeats: usize) -> f64 {
    cpu::measure::read_bandwidth(bytes, repeats)
}

/// √(Σ x²).
pub fn frobenius_norm(x: View<'_>) -> f64 {
    sum_squares(x).sqrt()
}

/// Whether no element is infinite or NaN.
pub fn all_finite(x: View<'_>) -> bool {
    cpu::measure::all_finite(x)
}

/// Position, in row order, of the first element that is infinite or NaN.
pub fn first_non_finite(x: View<'_>) -> Option<usize> {
    cpu::measure::first_non_finite(x)
}

/// The column of the largest element of each row; the first of equals. NaN is never the largest.
///
/// # Panics
/// If there are rows but no columns.
pub fn argmax_rows(x: View<'_>) -> Vec<usize> {
    let _op = op("argmax", || 0.0);
    cpu::measure::argmax_rows(x)
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
