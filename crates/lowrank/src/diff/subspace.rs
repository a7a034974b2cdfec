//! What the subspaces of two adapters have in common, and what a weight has in them. Singular vectors are those of [`crate::svd`].

use nalgebra::DMatrix;

use crate::random::mix;
use crate::svd::{Matrix, decompose};

/// The left singular vectors of a tall matrix.
pub(super) fn left_vectors(tall: &Matrix) -> Matrix {
    let size = tall.nrows().max(tall.ncols());
    let (q, r) = tall.clone().qr().unpack();
    let decomposed = decompose(r, size);
    q * decomposed.left
}

/// φ(i, j) = ‖U_iᵀ V_j‖²_F / min(i, j) for the first i columns of one orthonormal set and the first j of another
/// (Hu et al., 2021, section 7.2): 1 where one span holds the other, 0 where they are orthogonal.
pub(super) fn similarity(u: &Matrix, v: &Matrix) -> Vec<Vec<f64>> {
    let products = u.tr_mul(v);
    let mut above = vec![0.0; v.ncols()];
    (0..u.ncols())
        .map(|i| {
            let mut row = 0.0;
            for (j, sum) in above.iter_mut().enumerate() {
                row += products[(i, j)].powi(2);
                *sum += row;
            }
            let shared = |(j, sum): (usize, &f64)| (sum / (i.min(j) + 1) as f64).clamp(0.0, 1.0);
            above.iter().enumerate().map(shared).collect()
        })
        .collect()
}

/// exp of the entropy of the singular values' shares of their sum (Roy and Vetterli, 2007): k where k values are equal,
/// near 1 where one outweighs the others, 0 where there are none.
pub(super) fn effective_rank(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    if sum <= 0.0 {
        return 0.0;
    }
    let entropy: f64 = values
        .iter()
        .map(|value| value / sum)
        .filter(|share| *share > 0.0)
        .map(|share| -share * share.ln())
        .sum();
    entropy.exp()
}

/// Columns beyond the wanted ones that the iteration carries, so that it settles fast.
const SPARE: usize = 8;
/// It ends where the values' norm changes by less than this share, or after so many rounds.
const SETTLED: f64 = 1e-6;
const ROUNDS: usize = 60;

/// The norm of a matrix's `count` largest singular values, by block power iteration from a fixed start.
pub(super) fn norm_of_largest(w: &DMatrix<f32>, count: usize) -> f64 {
    let (rows, cols) = w.shape();
    let norm = |values: &[f32]| {
        let values = values.iter().take(count);
        values.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
    };
    let width = count + SPARE;
    if width >= rows.min(cols) {
        return norm(w.clone().svd(false, false).singular_values.as_slice());
    }
    let start = |i: usize, j: usize| {
        let bits = mix(mix(17, i as u64), j as u64);
        (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut x = DMatrix::from_fn(cols, width, start);
    let mut last = 0.0;
    for _ in 0..ROUNDS {
        let q = (w * x).qr().q();
        let (next, r) = w.tr_mul(&q).qr().unpack();
        let found = norm(r.svd(false, false).singular_values.as_slice());
        if (found - last).abs() <= SETTLED * found {
            return found;
        }
        last = found;
        x = next;
    }
    last
}

/// ‖UᵀWV‖_F, W [out, in], U [out, k], V [in, k].
pub(super) fn projected_norm(w: &DMatrix<f32>, u: &Matrix, v: &Matrix) -> f64 {
    let narrow = |m: &Matrix| m.map(|value| value as f32);
    (narrow(u).transpose() * (w * narrow(v)))
        .iter()
        .map(|value| f64::from(*value).powi(2))
        .sum::<f64>()
        .sqrt()
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

    #[test]
    fn directions_without_a_value_are_left_out() {
        let mut b = random(9, 3, 1);
        let twin = b.column(0).into_owned();
        b.set_column(2, &(twin * 3.0));
        assert_eq!(left_vectors(&b).ncols(), 2);
    }

    #[test]
    fn a_rank_above_the_width_is_cut_to_it() {
        let a = random(5, 3, 4);
        assert_eq!(left_vectors(&a.transpose()).shape(), (3, 3));
    }

    #[test]
    fn equal_spans_are_alike_and_orthogonal_ones_are_not() {
        let u = left_vectors(&random(20, 4, 3));
        for row in similarity(&u, &u) {
            for value in row {
                close(value, 1.0, 1e-12);
            }
        }
        let eye = Matrix::identity(8, 8);
        let (first, second) = (
            eye.columns(0, 3).into_owned(),
            eye.columns(3, 5).into_owned(),
        );
        let none = similarity(&first, &second);
        assert!(none.iter().flatten().all(|value| *value == 0.0));
        assert_eq!((none.len(), none[0].len()), (3, 5));
    }

    #[test]
    fn similarity_is_what_its_formula_says() {
        let (u, v) = (
            left_vectors(&random(12, 4, 5)),
            left_vectors(&random(12, 6, 6)),
        );
        for (i, row) in similarity(&u, &v).iter().enumerate() {
            for (j, value) in row.iter().enumerate() {
                let product = u.columns(0, i + 1).transpose() * v.columns(0, j + 1);
                let naive = product.norm_squared() / (i.min(j) + 1) as f64;
                close(*value, naive, 1e-12);
            }
        }
    }

    #[test]
    fn the_effective_rank_counts_what_matters() {
        assert_eq!(effective_rank(&[]), 0.0);
        close(effective_rank(&[3.0, 3.0, 3.0, 3.0]), 4.0, 1e-12);
        close(effective_rank(&[1.0, 1e-9]), 1.0, 1e-6);
    }

    #[test]
    fn the_largest_values_are_found_without_the_others() {
        let w = random(60, 40, 7).map(|value| value as f32);
        let all = w.map(f64::from).svd(false, false).singular_values;
        let naive = all.rows(0, 5).norm();
        close(norm_of_largest(&w, 5), naive, 1e-3 * naive);
        let all = all.norm();
        close(norm_of_largest(&w, 40), all, 1e-4 * all);
        let (u, v) = (
            left_vectors(&random(60, 3, 8)),
            left_vectors(&random(40, 3, 9)),
        );
        let naive = (u.transpose() * w.map(f64::from) * &v).norm();
        close(projected_norm(&w, &u, &v), naive, 1e-4 * naive);
    }
}
