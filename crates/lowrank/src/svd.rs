//! Singular value decompositions of ΔW = scale·B·A and of dense matrices, without more work than the wanted values need.
//!
//! A tall [n, r] matrix is QR; the singular values of R [r, r] are its own, and Q times R's left vectors are its left
//! vectors. With B = Q_b R_b and Aᵀ = Q_a R_a, ΔW = Q_b (scale·R_b R_aᵀ) Q_aᵀ, and only the r×r core is decomposed.
//!
//! The largest values of a dense matrix M come from block Krylov iteration (Musco and Musco, 2015): the span of X, MᵀM·X,
//! (MᵀM)²·X, … holds M's strongest directions, and the small matrix M·basis is decomposed. [`sketched`] is the randomized way of Halko,
//! Martinsson and Tropp (2011), which is faster and less exact.

use lowrank_kernels::{
    ComputeDType, Layout, RowClasses, Tensor, Weight, fill_normal, linear_backward_input,
    linear_forward, sum_squares,
};
use nalgebra::DMatrix;

use crate::random::mix;

pub(crate) type Matrix = DMatrix<f64>;

/// Singular values in descending order, with their vectors as columns. Values that are nought but for rounding are left
/// out, since their directions mean nothing.
pub(crate) struct Decomposition {
    /// [out, k]
    pub(crate) left: Matrix,
    /// k values.
    pub(crate) values: Vec<f64>,
    /// [in, k]
    pub(crate) right: Matrix,
}

/// A tensor as a matrix of f64.
pub(crate) fn matrix(tensor: &Tensor) -> Matrix {
    let values = tensor.to_vec().into_iter().map(f64::from);
    Matrix::from_row_iterator(tensor.rows(), tensor.cols(), values)
}

/// The decomposition of scale·B·A, B [out, r] and A [r, in].
pub(crate) fn decompose_product(b: &Matrix, a: &Matrix, scale: f64) -> Decomposition {
    let size = b.nrows().max(a.ncols());
    let (q_b, r_b) = b.clone().qr().unpack();
    let (q_a, r_a) = a.transpose().qr().unpack();
    let core = decompose(r_b * r_a.transpose() * scale, size);
    Decomposition {
        left: q_b * core.left,
        values: core.values,
        right: q_a * core.right,
    }
}

/// ‖B·A‖_F, B [out, r] and A [r, in].
pub(crate) fn product_norm(b: &Matrix, a: &Matrix) -> f64 {
    (b.clone().qr().r() * a.transpose().qr().r().transpose()).norm()
}

/// The decomposition of a small matrix that stands for one of `size` rows or columns.
pub(crate) fn decompose(small: Matrix, size: usize) -> Decomposition {
    let svd = small.svd(true, true);
    let (Some(left), Some(right)) = (svd.u, svd.v_t) else {
        unreachable!("both kinds of vectors were asked for")
    };
    let values: Vec<f64> = svd.singular_values.iter().copied().collect();
    let largest = values.first().copied().unwrap_or(0.0);
    // What is decomposed was stored in f32.
    let least = largest * size as f64 * f64::from(f32::EPSILON);
    let rank = values.iter().take_while(|value| **value > least).count();
    Decomposition {
        left: left.columns(0, rank).into_owned(),
        right: right.rows(0, rank).transpose(),
        values: values[..rank].to_vec(),
    }
}

/// A matrix whose smaller side is not longer is decomposed as a whole.
const WHOLE: usize = 192;
/// Columns beyond the wanted ones that every block of the iteration has, so that it settles fast.
const SPARE: usize = 8;
/// When an iteration ends, and how what it has found is decomposed.
#[derive(Clone, Copy)]
struct End {
    /// It ends where ‖Mᵀu − σv‖ of every wanted triple is below this share of the largest value,
    settled: f64,
    /// or where what is found has grown by less than this share of ‖M‖² since it was last looked at, as it does where many values are
    /// nearly equal.
    growth: f64,
    /// Whether what is found is decomposed by way of its Gram matrix, which is several times as fast: values below about 1e-8 of the largest
    /// one are lost so, and these are noise of f32 in any case.
    by_gram: bool,
}

/// How much of a matrix is found matters, and not so much along which directions.
const ROUGH: End = End {
    settled: 1e-5,
    growth: 1e-7,
    by_gram: false,
};
/// The same, faster.
const FAST: End = End {
    by_gram: true,
    ..ROUGH
};
/// The directions matter. Products of f32 numbers come no nearer than a tenth of it.
const FINE: End = End {
    settled: 1e-6,
    growth: 0.0,
    by_gram: true,
};
/// It ends in any case where the basis has so many columns, or blocks if that is more.
const MOST_COLUMNS: usize = 1024;
const LEAST_BLOCKS: usize = 4;

/// The `count` largest singular values of a dense f32 matrix [out, in], with their vectors; fewer where there are fewer.
///
/// Products are computed in f32, so values below about 1e-6 of the largest one are noise.
pub(crate) fn largest(dense: &Tensor, count: usize) -> Decomposition {
    largest_until(dense, count, ROUGH)
}

/// [`largest`] where small values do not matter, which is faster.
pub(crate) fn strongest(dense: &Tensor, count: usize) -> Decomposition {
    largest_until(dense, count, FAST)
}

/// [`largest`] with the vectors as exact as LAPACK makes them in f32, or more so: on weights of models to about 1e-6.
pub(crate) fn most_accurate(dense: &Tensor, count: usize) -> Decomposition {
    largest_until(dense, count, FINE)
}

fn largest_until(dense: &Tensor, count: usize, end: End) -> Decomposition {
    let (outputs, inputs) = (dense.rows(), dense.cols());
    let (shorter, width) = (outputs.min(inputs), count + SPARE);
    if shorter <= WHOLE || 3 * width >= shorter {
        let dense = matrix(dense);
        let found = if end.by_gram {
            whole_by_gram(&dense, count)
        } else {
            whole(&dense)
        };
        return found.cut_to(count);
    }
    let start = |i: usize, j: usize| {
        (mix(mix(17, i as u64), j as u64) >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    };
    let mut basis = Matrix::zeros(inputs, 0);
    let mut image = Matrix::zeros(outputs, 0);
    let mut block = Matrix::from_fn(inputs, width, start).qr().q();
    let most = LEAST_BLOCKS.max(MOST_COLUMNS / width);
    let least_growth = end.growth * sum_squares(dense.view());
    let (mut next_look, mut before) = (3, 0.0);
    for blocks in 1.. {
        let product = times(dense, &block);
        let columns = basis.ncols();
        basis = basis.resize_horizontally(columns + width, 0.0);
        basis.columns_mut(columns, width).copy_from(&block);
        image = image.resize_horizontally(columns + width, 0.0);
        image.columns_mut(columns, width).copy_from(&product);
        let is_last = blocks == most || columns + 2 * width > shorter;
        if blocks == next_look || is_last {
            let found = if end.by_gram {
                refined(dense, &strongest_of(&basis, &image, width))
            } else {
                of_image(&basis, &image)
            };
            let found = found.cut_to(count);
            let squares = found.values.iter().map(|value| value * value).sum();
            let has_grown = squares - before > least_growth;
            if is_last || !has_grown || is_settled(dense, &found, end.settled) {
                return found;
            }
            before = squares;
            // Looking costs more the more there is, so it is done less and less often.
            next_look += 1 + blocks / 2;
        }
        let mut next = times_transposed(dense, &product);
        // Once leaves the rounding of the first time behind.
        for _ in 0..2 {
            next -= &basis * basis.tr_mul(&next);
            next = next.qr().q();
        }
        block = next;
    }
    unreachable!("the last block returns")
}

/// The `count` largest singular values with their vectors, of M restricted to the span of (M Mᵀ)ⁿ M·G, G random [in, count] (Halko et al.,
/// 2011, algorithm 4.4).
pub(crate) fn sketched(
    dense: &Tensor,
    count: usize,
    iterations: usize,
    seed: u64,
) -> Decomposition {
    let mut random = Tensor::zeros(count, dense.cols());
    fill_normal(random.view_mut(), 1.0, seed);
    let mut basis = times(dense, &columns_of(&random)).qr().q();
    for _ in 0..iterations {
        let back = times_transposed(dense, &basis).qr().q();
        basis = times(dense, &back).qr().q();
    }
    // Mᵀ·basis = V S Uᵀ, and M's left vectors are basis·U.
    let found = whole(&times_transposed(dense, &basis));
    Decomposition {
        left: basis * found.right,
        values: found.values,
        right: found.left,
    }
}

/// The first `count` columns of Q [out, count] and rows of R [count, in] of a dense matrix M = Q R, `count` at most its shorter side.
pub(crate) fn orthogonal_part(dense: &Tensor, count: usize) -> (Matrix, Matrix) {
    let view = dense.view();
    let first = Matrix::from_fn(dense.rows(), count, |i, j| f64::from(view.get(i, j)));
    let q = first.qr().q();
    let r = times_transposed(dense, &q).transpose();
    (q, r)
}

impl Decomposition {
    fn cut_to(self, count: usize) -> Self {
        let count = count.min(self.values.len());
        Self {
            left: self.left.columns(0, count).into_owned(),
            values: self.values[..count].to_vec(),
            right: self.right.columns(0, count).into_owned(),
        }
    }
}

/// The decomposition of a matrix as a whole, by way of the square one of its shorter side.
fn whole(dense: &Matrix) -> Decomposition {
    let size = dense.nrows().max(dense.ncols());
    if dense.nrows() >= dense.ncols() {
        let (q, r) = dense.clone().qr().unpack();
        let core = decompose(r, size);
        return Decomposition {
            left: q * core.left,
            ..core
        };
    }
    let turned = whole(&dense.transpose());
    Decomposition {
        left: turned.right,
        values: turned.values,
        right: turned.left,
    }
}

/// What M = image·basisᵀ, restricted to an orthonormal basis [in, n], decomposes to; image [out, n] is M·basis.
fn of_image(basis: &Matrix, image: &Matrix) -> Decomposition {
    let found = whole(image);
    Decomposition {
        right: basis * found.right,
        ..found
    }
}

/// The `count` largest of the same by way of imageᵀ·image = V S² Vᵀ.
fn strongest_of(basis: &Matrix, image: &Matrix, count: usize) -> Decomposition {
    let found = by_gram(image, count);
    Decomposition {
        right: basis * found.right,
        ..found
    }
}

/// The `count` largest values of a matrix M [n, k] by way of MᵀM = V S² Vᵀ.
fn by_gram(m: &Matrix, count: usize) -> Decomposition {
    let (values, right) = eigen_of_gram(m, count);
    let inverse: Vec<f64> = values.iter().map(|value| 1.0 / value).collect();
    Decomposition {
        left: m * &right * Matrix::from_diagonal(&inverse.into()),
        values,
        right,
    }
}

/// The roots of the `count` largest eigenvalues of MᵀM, M [n, k], and their vectors [k, count]; without those that are nought but for
/// rounding.
fn eigen_of_gram(m: &Matrix, count: usize) -> (Vec<f64>, Matrix) {
    let eigen = m.tr_mul(m).symmetric_eigen();
    let mut order: Vec<usize> = (0..eigen.eigenvalues.len()).collect();
    order.sort_by(|one, other| eigen.eigenvalues[*other].total_cmp(&eigen.eigenvalues[*one]));
    let root = |at: &usize| eigen.eigenvalues[*at].max(0.0).sqrt();
    let size = m.nrows().max(m.ncols()) as f64;
    let least = order.first().map_or(0.0, root) * size * f64::from(f32::EPSILON);
    order.truncate(count);
    order.retain(|at| root(at) > least);
    let values = order.iter().map(root).collect();
    (values, eigen.eigenvectors.select_columns(&order))
}

/// The `count` largest values of a matrix as a whole, by way of the Gram matrix of its shorter side.
fn whole_by_gram(dense: &Matrix, count: usize) -> Decomposition {
    if dense.nrows() < dense.ncols() {
        let turned = whole_by_gram(&dense.transpose(), count);
        return Decomposition {
            left: turned.right,
            values: turned.values,
            right: turned.left,
        };
    }
    by_gram(dense, count)
}

/// What a matrix of zeros decomposes to.
fn of_nothing(dense: &Tensor) -> Decomposition {
    Decomposition {
        left: Matrix::zeros(dense.rows(), 0),
        values: Vec::new(),
        right: Matrix::zeros(dense.cols(), 0),
    }
}

/// The same directions, told apart by products of f64 numbers: those of nearly equal values are mixed by the rounding of f32.
fn refined(dense: &Tensor, found: &Decomposition) -> Decomposition {
    // So many rows of the matrix are widened at a time.
    const ROWS: usize = 256;
    if found.values.is_empty() {
        return of_nothing(dense);
    }
    let basis = found.right.clone().qr().q();
    let mut image = Matrix::zeros(dense.rows(), basis.ncols());
    for first in (0..dense.rows()).step_by(ROWS) {
        let rows = first..dense.rows().min(first + ROWS);
        let part = dense.view().slice_rows(rows.clone()).to_vec();
        let part =
            Matrix::from_row_iterator(rows.len(), dense.cols(), part.into_iter().map(f64::from));
        image
            .rows_mut(first, rows.len())
            .copy_from(&(part * &basis));
    }
    of_image(&basis, &image)
}

fn is_settled(dense: &Tensor, found: &Decomposition, settled: f64) -> bool {
    let Some(largest) = found.values.first() else {
        return true;
    };
    let back = times_transposed(dense, &found.left);
    let distance = |k: usize| (back.column(k) - found.right.column(k) * found.values[k]).norm();
    (0..found.values.len()).all(|k| distance(k) <= settled * largest)
}

/// M·X, M [out, in], X [in, n].
fn times(dense: &Tensor, x: &Matrix) -> Matrix {
    let mut y = Tensor::zeros(x.ncols(), dense.rows());
    let (x, weight) = (rows_of(x), weight(dense));
    linear_forward(y.view_mut(), x.view(), weight, None, RowClasses::PROMPT);
    columns_of(&y)
}

/// Mᵀ·Y, M [out, in], Y [out, n].
fn times_transposed(dense: &Tensor, y: &Matrix) -> Matrix {
    let mut x = Tensor::zeros(y.ncols(), dense.cols());
    let (y, weight) = (rows_of(y), weight(dense));
    linear_backward_input(x.view_mut(), y.view(), weight, false, ComputeDType::F32);
    columns_of(&x)
}

fn weight(dense: &Tensor) -> Weight<'_> {
    Weight {
        view: dense.view(),
        layout: Layout::OutIn,
    }
}

/// The columns of a matrix as rows of a tensor; nalgebra's matrices lie column by column.
fn rows_of(matrix: &Matrix) -> Tensor {
    let values = matrix.iter().map(|value| *value as f32).collect();
    Tensor::from_f32(matrix.ncols(), matrix.nrows(), values)
}

fn columns_of(tensor: &Tensor) -> Matrix {
    let values = tensor.to_vec().into_iter().map(f64::from);
    Matrix::from_iterator(tensor.cols(), tensor.rows(), values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, key: u64) -> Matrix {
        Matrix::from_fn(rows, cols, |i, j| {
            (mix(mix(key, i as u64), j as u64) >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
        })
    }

    fn close(one: f64, other: f64, tolerance: f64) {
        assert!((one - other).abs() < tolerance, "{one} {other}");
    }

    fn product(of: &Decomposition) -> Matrix {
        let diagonal = Matrix::from_diagonal(&of.values.clone().into());
        &of.left * diagonal * of.right.transpose()
    }

    #[test]
    fn a_product_decomposes_as_the_dense_matrix_does() {
        let (b, a) = (random(9, 3, 1), random(3, 7, 2));
        let dense = &b * &a * 2.5;
        let ours = decompose_product(&b, &a, 2.5);
        let theirs = dense.clone().svd(true, true);
        for k in 0..3 {
            close(ours.values[k], theirs.singular_values[k], 1e-12);
        }
        close((product(&ours) - &dense).norm(), 0.0, 1e-12);
        close(product_norm(&b, &a) * 2.5, dense.norm(), 1e-12);
    }

    #[test]
    fn nothing_has_no_directions_and_a_rank_above_the_width_is_cut_to_it() {
        let nothing = decompose_product(&Matrix::zeros(9, 3), &random(3, 7, 2), 1.0);
        assert_eq!((nothing.values.len(), nothing.left.ncols()), (0, 0));
        let wide = decompose_product(&random(4, 5, 5), &random(5, 3, 4), 1.0);
        assert_eq!(wide.right.shape(), (3, 3));
    }

    #[test]
    fn a_matrix_is_decomposed_whichever_side_is_longer() {
        for (rows, cols) in [(9, 5), (5, 9)] {
            let dense = random(rows, cols, 3);
            close((product(&whole(&dense)) - dense).norm(), 0.0, 1e-12);
        }
    }

    /// Values that fall off slowly, with more of them than one block holds.
    #[test]
    fn the_largest_values_are_found_without_the_others() {
        for (rows, cols) in [(300, 220), (220, 300)] {
            let (left, right) = (random(rows, 200, 4).qr().q(), random(cols, 200, 5).qr().q());
            let values: Vec<f64> = (0..200).map(|k| 3.0 * 0.97_f64.powi(k)).collect();
            let dense = left * Matrix::from_diagonal(&values.clone().into()) * right.transpose();
            let count = 6;
            let kept = dense.map(|value| value as f32).transpose();
            let tensor = Tensor::from_f32(rows, cols, kept.iter().copied().collect());
            assert!(rows.min(cols) > WHOLE && 3 * (count + SPARE) < rows.min(cols));
            let found = largest(&tensor, count);
            let best = whole(&dense).cut_to(count);
            for k in 0..count {
                close(found.values[k], values[k], 1e-5);
            }
            let distance = (product(&found) - product(&best)).norm();
            close(distance / product(&best).norm(), 0.0, 1e-4);
            let orthonormal = found.left.tr_mul(&found.left) - Matrix::identity(count, count);
            close(orthonormal.norm(), 0.0, 1e-9);
        }
    }

    /// Directions of values that are near to each other, through each of the ways.
    #[test]
    fn directions_are_found_as_exactly_as_f32_numbers_have_them() {
        for (rows, cols) in [(300, 420), (420, 300), (150, 90)] {
            let k = rows.min(cols);
            let (left, right) = (random(rows, k, 4).qr().q(), random(cols, k, 5).qr().q());
            let values: Vec<f64> = (0..k).map(|k| 3.0 * 0.995_f64.powi(k as i32)).collect();
            let dense = left * Matrix::from_diagonal(&values.into()) * right.transpose();
            let kept = dense.map(|value| value as f32).transpose();
            let tensor = Tensor::from_f32(rows, cols, kept.iter().copied().collect());
            let found = most_accurate(&tensor, 6);
            let best = whole(&matrix(&tensor)).cut_to(6);
            for k in 0..6 {
                close(found.values[k], best.values[k], 1e-6);
                let same = found.left.column(k).dot(&best.left.column(k)).abs();
                // A right angle less 1e-5.
                close(same, 1.0, 1e-10);
                let same = found.right.column(k).dot(&best.right.column(k)).abs();
                close(same, 1.0, 1e-10);
            }
        }
    }

    #[test]
    fn random_directions_find_nearly_as_much() {
        let dense = random(120, 40, 9) * random(40, 90, 10);
        let kept = dense.map(|value| value as f32).transpose();
        let tensor = Tensor::from_f32(120, 90, kept.iter().copied().collect());
        let norm = |found: &Decomposition| found.values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let best = norm(&whole(&dense).cut_to(5));
        let found: Vec<f64> = [0, 2, 16]
            .map(|iterations| norm(&sketched(&tensor, 5, iterations, 1)) / best)
            .to_vec();
        assert!(found[0] < found[1] && found[1] < found[2], "{found:?}");
        assert!(found[2] > 0.995 && found[2] <= 1.0 + 1e-6, "{found:?}");
    }

    #[test]
    fn the_first_part_of_q_r_is_that_of_the_whole() {
        let dense = random(30, 20, 11);
        let kept = dense.map(|value| value as f32).transpose();
        let tensor = Tensor::from_f32(30, 20, kept.iter().copied().collect());
        let (q, r) = orthogonal_part(&tensor, 4);
        let (all_q, all_r) = matrix(&tensor).qr().unpack();
        close((&q - all_q.columns(0, 4)).norm(), 0.0, 1e-9);
        close((&r - all_r.rows(0, 4)).norm(), 0.0, 1e-5);
    }

    /// Without any gap between the values the directions are arbitrary, but not how much of the matrix they hold.
    #[test]
    fn of_noise_as_much_is_found_as_there_is() {
        let (rows, cols, count) = (260, 400, 12);
        let dense = random(rows, cols, 8);
        let kept = dense.map(|value| value as f32).transpose();
        let tensor = Tensor::from_f32(rows, cols, kept.iter().copied().collect());
        let norm = |found: &Decomposition| found.values.iter().map(|v| v * v).sum::<f64>();
        let (found, best) = (largest(&tensor, count), whole(&dense).cut_to(count));
        let (found, best) = (norm(&found), norm(&best));
        assert!(
            found <= best * (1.0 + 1e-6) && found > best * 0.999,
            "{found} of {best}"
        );
    }

    #[test]
    fn a_matrix_of_low_rank_has_as_many_values_as_that() {
        let dense = (random(210, 2, 6) * random(2, 230, 7)).map(|value| value as f32);
        let tensor = Tensor::from_f32(210, 230, dense.transpose().iter().copied().collect());
        let found = largest(&tensor, 4);
        close(
            (product(&found) - dense.map(f64::from)).norm() / f64::from(dense.norm()),
            0.0,
            1e-6,
        );
        assert!(
            found.values.len() <= 4
                && found.values[1] > 1e4 * found.values.get(2).copied().unwrap_or(0.0)
        );
    }
}
