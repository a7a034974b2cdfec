//! Blocks of thin products, whose factors are both read where they lie.

use pulp::{Simd, WithSimd};

use super::{add_product, store};
use crate::cpu::product::layout::{MR, NR};
use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::simd::dispatch;

/// Rows of a thin product that are summed together.
pub(crate) const THIN: usize = MR;

/// A block of a thin product: up to 6 rows and 16 columns from `col` on, (+)= a·b, which is read where it lies.
///
/// # Panics
/// If a shape does not fit, or rows of b do not lie in one piece.
pub(crate) fn thin(
    out: &mut MatMut<'_>,
    (row, height): (usize, usize),
    col: usize,
    add: bool,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    let inner = a.cols();
    assert_eq!(
        b.col_stride(),
        1,
        "rows of the right factor lie in one piece"
    );
    dispatch(Thin {
        out: out.window(row..row + height, col..col + NR),
        add,
        a: a.block(row..row + height, 0..inner),
        b: b.block(0..inner, col..col + NR),
    });
}

/// What [`thin`] computes.
struct Thin<'a> {
    out: MatMut<'a>,
    add: bool,
    a: Mat<'a>,
    b: Mat<'a>,
}

impl WithSimd for Thin<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for_shape!(simd: S, self.out.rows(), self.sum);
    }
}

impl Thin<'_> {
    /// For `M` rows and `V` vectors of each.
    #[inline(always)]
    fn sum<S: Simd, const V: usize, const M: usize>(self, simd: S) {
        let Self { out, add, a, b } = self;
        let mut sums = [[simd.splat_f32s(0.0); V]; M];
        let rows: [&[f32]; M] = std::array::from_fn(
            #[inline(always)]
            |i| &a.data()[i * a.row_stride()..],
        );
        for p in 0..a.cols() {
            let a: [f32; M] = std::array::from_fn(
                #[inline(always)]
                |i| rows[i][p * a.col_stride()],
            );
            let (b, _) = b.data()[p * b.row_stride()..][..NR].as_chunks();
            add_product(simd, &mut sums, a, &b[0]);
        }
        store(simd, sums, out, add);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{for_all, numbers};
    use super::*;

    /// The factors of a thin product, and the output before.
    #[derive(Clone, Copy)]
    struct RunThin<'a> {
        a: Mat<'a>,
        b: Mat<'a>,
        add: bool,
        before: &'a [f32],
    }

    impl WithSimd for RunThin<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut data = self.before.to_vec();
            let thin = Thin {
                out: MatMut::new(&mut data, self.a.rows(), NR),
                add: self.add,
                a: self.a,
                b: self.b,
            };
            thin.with_simd(simd);
            data
        }
    }

    #[test]
    fn thin_blocks_have_the_same_bits_with_any_vectors() {
        let (inner, stride) = (41, 37);
        let b = numbers((inner - 1) * stride + NR, 7);
        let b = Mat::strided(&b, inner, NR, stride);
        for rows in 1..=THIN {
            let a = numbers(inner * rows, 5);
            for a in [Mat::new(&a, rows, inner), Mat::new(&a, inner, rows).t()] {
                for add in [false, true] {
                    let before = numbers(rows * NR, 3);
                    let mut expected = before.clone();
                    for (at, out) in expected.iter_mut().enumerate() {
                        let (i, j) = (at / NR, at % NR);
                        let sum = (0..inner).fold(0.0_f32, |sum, p| {
                            let x = a.data()[i * a.row_stride() + p * a.col_stride()];
                            x.mul_add(b.data()[p * stride + j], sum)
                        });
                        *out = if add { *out + sum } else { sum };
                    }
                    let run = RunThin {
                        a,
                        b,
                        add,
                        before: &before,
                    };
                    for_all(|| run, |found| assert_eq!(found, expected));
                    let mut found = before.clone();
                    let mut out = MatMut::new(&mut found, rows, NR);
                    thin(&mut out, (0, rows), 0, add, a, b);
                    assert_eq!(found, expected);
                }
            }
        }
    }
}
