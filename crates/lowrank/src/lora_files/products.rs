//! Figures of products B·A, and singular vectors as A and B.

use lowrank_kernels::Tensor;

use crate::svd::{Decomposition, Matrix, product_norm};

/// ‖B₁·A₁ − B₂·A₂‖_F.
pub(super) fn difference_norm(one: (&Matrix, &Matrix), other: (&Matrix, &Matrix)) -> f64 {
    let ((b, a), (other_b, other_a)) = (one, other);
    let (r, more) = (a.nrows(), other_a.nrows());
    let mut left = b.clone().resize_horizontally(r + more, 0.0);
    left.columns_mut(r, more).copy_from(&-other_b);
    let mut right = a.clone().resize_vertically(r + more, 0.0);
    right.rows_mut(r, more).copy_from(other_a);
    product_norm(&left, &right)
}

/// Whether all numbers are such that f32 holds them; with larger ones, squares would be infinite.
pub(super) fn fits(matrix: &Matrix) -> bool {
    matrix
        .iter()
        .all(|value| value.abs() <= f64::from(f32::MAX))
}

/// √(Σ error² / Σ size²), where all modules have both.
pub(super) fn total(squares: impl Iterator<Item = Option<[f64; 2]>>) -> Option<f64> {
    let (mut error, mut size) = (0.0, 0.0);
    for pair in squares {
        let [e, s] = pair?;
        error += e;
        size += s;
    }
    (size > 0.0).then(|| (error / size).sqrt())
}

/// The first `rank` directions as A [rank, in] and B [out, rank] with B·A their part of ΔW.
pub(super) fn split(
    found: &Decomposition,
    rank: usize,
    [outputs, inputs]: [usize; 2],
) -> (Matrix, Matrix) {
    let (mut a, mut b) = (Matrix::zeros(rank, inputs), Matrix::zeros(outputs, rank));
    for (k, value) in found.values.iter().enumerate().take(rank) {
        a.row_mut(k).tr_copy_from(&found.right.column(k));
        b.column_mut(k).copy_from(&(found.left.column(k) * *value));
    }
    (a, b)
}

/// A matrix as a tensor of f32.
pub(super) fn tensor(matrix: &Matrix) -> Tensor {
    // nalgebra's matrices lie column by column.
    let turned = matrix.transpose();
    let values = turned.iter().map(|value| *value as f32).collect();
    Tensor::from_f32(matrix.nrows(), matrix.ncols(), values)
}
