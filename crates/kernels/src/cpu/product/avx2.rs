//! Blocks of sums for processors with AVX2 and FMA: up to 6 rows by one panel of 16 columns, in registers.

use std::arch::x86_64::{
    __m256, _MM_HINT_T0, _mm_prefetch, _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use crate::cpu::engine::{Engine, engine};
use crate::cpu::product::layout::{Block, Left, MR, NR};
use crate::cpu::product::mat::{Mat, MatMut};

/// Whether this processor can.
#[inline]
pub(crate) fn supported() -> bool {
    engine() >= Engine::Avx2
}

/// The rows and 16 columns of a block of out (+)= Σ lefts · panel.
///
/// # Safety
/// The processor is [`supported`].
///
/// # Panics
/// If a left factor or the output is too small, or the panel too short.
#[expect(unsafe_code, reason = "kernels take pointers")]
#[inline]
pub(crate) unsafe fn block<const COL: usize>(
    out: &mut MatMut<'_>,
    block: Block,
    lefts: &[Left<'_>],
    b: &[f32],
) {
    let Block {
        row,
        height,
        col,
        first,
        add,
    } = block;
    let inner: usize = lefts.iter().map(|left| left.inner).sum();
    assert!((1..=MR).contains(&height) && row + height <= out.rows() && col + NR <= out.cols());
    assert!(first.is_multiple_of(MR) && b.len() >= inner * NR);
    for left in lefts {
        left.check::<COL>(first + height);
    }
    let kernel = match height {
        1 => kernel::<1, COL>,
        2 => kernel::<2, COL>,
        3 => kernel::<3, COL>,
        4 => kernel::<4, COL>,
        5 => kernel::<5, COL>,
        _ => kernel::<6, COL>,
    };
    let (start, stride) = out.pointer(row, col);
    // SAFETY: the processor has AVX2 and FMA by the contract of this function. The assertions show that the rows of the left
    // factors lie within their data, that the panel has as many rows of 16 as these have inner indices, and that the output
    // has 16 columns in each of `height` rows.
    unsafe { kernel(lefts, first, b.as_ptr(), start, stride, add) }
}

/// c (+)= Σ lefts · b for `M` rows and one panel of 16 columns.
///
/// # Safety
/// The processor has AVX2 and FMA. The rows `first..first + M` of each left factor lie within its data, as [`Left`] says
/// for `COL`; `b` has as many rows of 16 as they have inner indices; 16 numbers of c can be written at `i·c_row` for i < M.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel<const M: usize, const COL: usize>(
    lefts: &[Left<'_>],
    first: usize,
    mut b: *const f32,
    c: *mut f32,
    c_row: usize,
    add: bool,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        fetch::<M>(c, c_row);
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        for left in lefts {
            let a = left.data.as_ptr().add(first * left.row_stride);
            let a_row = if COL == 1 { left.row_stride } else { 1 };
            b = add_products(&mut sums, left.inner, a, (a_row, COL), (b, NR));
        }
        store(sums, c, c_row, add);
    }
}

/// c (+)= a·b for `M` rows and 16 columns, with any strides.
///
/// # Safety
/// The processor has AVX2 and FMA. `a` can be read at `i·a_row + p·a_col` and `b` at `p·b_row + j` for
/// i < M, p < inner, j < 16, and `c` written at `i·c_row + j`.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2,fma")]
unsafe fn thin_kernel<const M: usize>(
    inner: usize,
    a: *const f32,
    a_strides: (usize, usize),
    b: (*const f32, usize),
    c: *mut f32,
    c_row: usize,
    add: bool,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        fetch::<M>(c, c_row);
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        add_products(&mut sums, inner, a, a_strides, b);
        store(sums, c, c_row, add);
    }
}

/// Asks for `M` rows of 16 numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn fetch<const M: usize>(c: *const f32, c_row: usize) {
    for i in 0..M {
        let row = c.wrapping_add(i * c_row);
        _mm_prefetch::<_MM_HINT_T0>(row.cast());
        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(NR - 1).cast());
    }
}

/// sums += a·b; gives the place behind b.
///
/// # Safety
/// As [`thin_kernel`].
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline(always)] // Else the sums would go through memory.
unsafe fn add_products<const M: usize>(
    sums: &mut [[__m256; 2]; M],
    inner: usize,
    mut a: *const f32,
    (a_row, a_col): (usize, usize),
    (mut b, b_row): (*const f32, usize),
) -> *const f32 {
    // SAFETY: by the contract of this function.
    unsafe {
        for _ in 0..inner / 4 {
            for p in 0..4 {
                step(sums, a.add(p * a_col), a_row, b.add(p * b_row));
            }
            a = a.add(4 * a_col);
            b = b.add(4 * b_row);
        }
        for _ in 0..inner % 4 {
            step(sums, a, a_row, b);
            a = a.add(a_col);
            b = b.add(b_row);
        }
    }
    b
}

/// c (+)= sums.
///
/// # Safety
/// The processor has AVX2 and FMA; 16 numbers of c can be written at `i·c_row` for i < M.
#[expect(unsafe_code, reason = "vector stores take pointers")]
#[inline(always)]
unsafe fn store<const M: usize>(sums: [[__m256; 2]; M], c: *mut f32, c_row: usize, add: bool) {
    // SAFETY: by the contract of this function.
    unsafe {
        for (i, [mut low, mut high]) in sums.into_iter().enumerate() {
            let c = c.add(i * c_row);
            if add {
                low = _mm256_add_ps(low, _mm256_loadu_ps(c));
                high = _mm256_add_ps(high, _mm256_loadu_ps(c.add(8)));
            }
            _mm256_storeu_ps(c, low);
            _mm256_storeu_ps(c.add(8), high);
        }
    }
}

/// One inner index.
///
/// # Safety
/// As [`thin_kernel`].
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn step<const M: usize>(
    sums: &mut [[__m256; 2]; M],
    a: *const f32,
    a_row: usize,
    b: *const f32,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        let (low, high) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
        for (i, sum) in sums.iter_mut().enumerate() {
            let a = _mm256_broadcast_ss(&*a.add(i * a_row));
            sum[0] = _mm256_fmadd_ps(a, low, sum[0]);
            sum[1] = _mm256_fmadd_ps(a, high, sum[1]);
        }
    }
}

/// Rows of a thin product that are summed together.
pub(crate) const THIN: usize = 4;

/// A block of a thin product: up to 4 rows and 16 columns.
#[expect(unsafe_code, reason = "kernels take pointers")]
pub(crate) fn thin(
    out: &mut MatMut<'_>,
    (row, height): (usize, usize),
    col: usize,
    add: bool,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    let inner = a.cols();
    let a = a.block(row..row + height, 0..inner);
    let b = b.block(0..inner, col..col + NR);
    assert!(supported(), "a processor without AVX2 and FMA");
    assert!(row + height <= out.rows() && col + NR <= out.cols() && inner > 0);
    assert!((height - 1) * a.row_stride() + (inner - 1) * a.col_stride() < a.data().len());
    assert!((inner - 1) * b.row_stride() + NR <= b.data().len());
    let kernel = match height {
        1 => thin_kernel::<1>,
        2 => thin_kernel::<2>,
        3 => thin_kernel::<3>,
        _ => thin_kernel::<4>,
    };
    let (start, stride) = out.pointer(row, col);
    // SAFETY: the assertions above show that the processor has AVX2 and FMA,
    // that reads of both factors lie within their data, and that the output has 16 columns in each row.
    unsafe {
        kernel(
            inner,
            a.data().as_ptr(),
            (a.row_stride(), a.col_stride()),
            (b.data().as_ptr(), b.row_stride()),
            start,
            stride,
            add,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor with AVX-512 does not come by this code otherwise.
    #[test]
    fn thin_blocks_are_sums_of_products() {
        if !supported() {
            eprintln!("skipped: this processor has no AVX2 with FMA");
            return;
        }
        let numbers = |len: usize, seed: usize| -> Vec<f32> {
            (0..len).map(|i| (i * seed % 17) as f32 - 8.0).collect()
        };
        let (inner, stride) = (41, 37);
        let b = numbers(inner * stride, 7);
        for height in 1..=THIN {
            let a = numbers(inner * height, 5);
            for add in [false, true] {
                let mut out = numbers(height * NR, 3);
                let before = out.clone();
                let left = Mat::new(&a, inner, height).t();
                let right = Mat::strided(&b, inner, NR, stride);
                let mut whole = MatMut::new(&mut out, height, NR);
                thin(&mut whole, (0, height), 0, add, left, right);
                for (at, (found, start)) in out.iter().zip(before).enumerate() {
                    let (i, j) = (at / NR, at % NR);
                    let product = |p: usize| a[p * height + i] * b[p * stride + j];
                    let sum: f32 = (0..inner).map(product).sum();
                    assert_eq!(*found, if add { start + sum } else { sum });
                }
            }
        }
    }
}
