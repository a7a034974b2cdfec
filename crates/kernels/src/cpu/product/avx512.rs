//! Blocks of sums for processors with AVX-512: up to 12 rows by one panel of 16 columns, or by two panels.
//!
//! Twice the numbers of [`panels`](crate::cpu::product::avx2) in a register and twice the registers. Every element is summed in the same order
//! as there, so the bits are the same.

use std::arch::x86_64::{
    __m512, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use crate::cpu::engine::{Engine, engine};
use crate::cpu::product::layout::{Left, MR, NR};
use crate::cpu::product::mat::{Mat, MatMut};

/// Rows of a block: two groups of those that are packed side by side.
pub(crate) const ROWS: usize = 2 * MR;

/// Whether this processor can.
#[inline]
pub(crate) fn supported() -> bool {
    engine() >= Engine::Avx512
}

/// `height` rows of up to `P` outputs of 16 columns, each (+)= Σ lefts · its panel; `first` is the first row of the left factors.
///
/// # Safety
/// The processor is [`supported`].
///
/// # Panics
/// If a left factor or an output is too small, a panel too short, or rows of the outputs are not as far apart in each.
#[expect(unsafe_code, reason = "kernels take pointers")]
#[inline]
pub(crate) unsafe fn block<const P: usize, const COL: usize>(
    outs: [MatMut<'_>; P],
    (first, height): (usize, usize),
    add: bool,
    lefts: &[Left<'_>],
    panels: [&[f32]; P],
) {
    let inner: usize = lefts.iter().map(|left| left.inner).sum();
    assert!((1..=ROWS).contains(&height) && first.is_multiple_of(MR));
    assert!(panels.iter().all(|panel| panel.len() >= inner * NR));
    for left in lefts {
        left.check::<COL>(first + height);
    }
    let kernel = match height {
        1 => kernel::<1, P, COL>,
        2 => kernel::<2, P, COL>,
        3 => kernel::<3, P, COL>,
        4 => kernel::<4, P, COL>,
        5 => kernel::<5, P, COL>,
        6 => kernel::<6, P, COL>,
        7 => kernel::<7, P, COL>,
        8 => kernel::<8, P, COL>,
        9 => kernel::<9, P, COL>,
        10 => kernel::<10, P, COL>,
        11 => kernel::<11, P, COL>,
        _ => kernel::<12, P, COL>,
    };
    let (mut starts, mut stride) = ([std::ptr::null_mut(); P], None);
    for (start, mut out) in starts.iter_mut().zip(outs) {
        assert!(height <= out.rows() && NR <= out.cols());
        let (pointer, own) = out.pointer(0, 0);
        assert_eq!(*stride.get_or_insert(own), own, "how far rows are apart");
        *start = pointer;
    }
    let panels = panels.map(<[f32]>::as_ptr);
    // SAFETY: the processor has AVX-512 by the contract of this function. The assertions show that the rows of the left
    // factors lie within their data, that the panels have as many rows of 16 as these have inner indices, and that each
    // output has 16 columns in each of `height` rows.
    unsafe { kernel(lefts, first, panels, starts, stride.unwrap_or(0), add) }
}

/// c (+)= Σ lefts · b for `M` rows and each of `P` panels of 16 columns.
///
/// # Safety
/// The processor has AVX-512. The rows `first..first + M` of each left factor lie within its data, as [`Left`] says for
/// `COL`; each of `b` has as many rows of 16 as they have inner indices; 16 numbers of each of c can be written at `i·c_row` for
/// i < M.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f")]
unsafe fn kernel<const M: usize, const P: usize, const COL: usize>(
    lefts: &[Left<'_>],
    first: usize,
    mut b: [*const f32; P],
    c: [*mut f32; P],
    c_row: usize,
    add: bool,
) {
    // SAFETY: by the contract of this function; a prefetch may name any address.
    unsafe {
        for c in c {
            for i in 0..M {
                let row = c.wrapping_add(i * c_row);
                _mm_prefetch::<_MM_HINT_T0>(row.cast());
                _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(NR - 1).cast());
            }
        }
        let mut sums = [[_mm512_setzero_ps(); P]; M];
        for left in lefts {
            // Rows in groups of three, each with a place of its own: few enough places for the registers.
            let mut a = [left.data.as_ptr().add(first * left.row_stride); 4];
            for (group, a) in a.iter_mut().enumerate() {
                *a = a.wrapping_add(offset::<COL>(left.row_stride, 3 * group));
            }
            for _ in 0..left.inner / 4 {
                for p in 0..4 {
                    step::<M, P, COL>(&mut sums, a, left.row_stride, b, p);
                }
                for a in &mut a {
                    *a = a.wrapping_add(4 * COL);
                }
                for b in &mut b {
                    *b = b.add(4 * NR);
                }
            }
            for p in 0..left.inner % 4 {
                step::<M, P, COL>(&mut sums, a, left.row_stride, b, p);
            }
            for b in &mut b {
                *b = b.add(left.inner % 4 * NR);
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (mut sum, c) in sums.into_iter().zip(c) {
                let c = c.add(i * c_row);
                if add {
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(c));
                }
                _mm512_storeu_ps(c, sum);
            }
        }
    }
}

/// Where row `i` of a block begins, as [`Left`] says.
#[inline(always)]
fn offset<const COL: usize>(row_stride: usize, i: usize) -> usize {
    if COL == 1 {
        i * row_stride
    } else {
        i / MR * MR * row_stride + i % MR
    }
}

/// Inner index `p` from the places on.
///
/// # Safety
/// As [`kernel`].
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline(always)] // Else the sums would go through memory.
unsafe fn step<const M: usize, const P: usize, const COL: usize>(
    sums: &mut [[__m512; P]; M],
    a: [*const f32; 4],
    row_stride: usize,
    b: [*const f32; P],
    p: usize,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        let mut row = [_mm512_setzero_ps(); P];
        for (row, b) in row.iter_mut().zip(b) {
            *row = _mm512_loadu_ps(b.add(p * NR));
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            // Three rows of a group never lie in two groups of those packed side by side.
            let place = if COL == 1 { i % 3 * row_stride } else { i % 3 };
            let x = _mm512_set1_ps(*a[i / 3].add(place + p * COL));
            for (sum, &row) in sums.iter_mut().zip(&row) {
                *sum = _mm512_fmadd_ps(x, row, *sum);
            }
        }
    }
}

/// Rows of a thin product that are summed together.
pub(crate) const THIN: usize = 8;
/// Rows of its right factor ahead of the one that is read, whose way from memory begins: they lie too far apart for the processor
/// to guess.
const AHEAD: usize = 16;

/// out (+)= a·b for up to [`THIN`] rows and `P` times 16 columns; b is read where it lies.
///
/// # Panics
/// If the shapes do not match, rows of b do not lie in one piece, or the processor is not [`supported`].
#[expect(unsafe_code, reason = "kernels take pointers")]
pub(crate) fn thin<const P: usize>(mut out: MatMut<'_>, add: bool, a: Mat<'_>, b: Mat<'_>) {
    let (rows, cols, inner) = (out.rows(), out.cols(), a.cols());
    assert!(supported() && (1..=THIN).contains(&rows) && cols == P * NR && inner > 0);
    assert!(a.rows() == rows && (b.rows(), b.cols()) == (inner, cols) && b.col_stride() == 1);
    assert!((rows - 1) * a.row_stride() + (inner - 1) * a.col_stride() < a.data().len());
    assert!((inner - 1) * b.row_stride() + cols <= b.data().len());
    let kernel = match rows {
        1 => thin_kernel::<1, P>,
        2 => thin_kernel::<2, P>,
        3 => thin_kernel::<3, P>,
        4 => thin_kernel::<4, P>,
        5 => thin_kernel::<5, P>,
        6 => thin_kernel::<6, P>,
        7 => thin_kernel::<7, P>,
        _ => thin_kernel::<8, P>,
    };
    let c = out.pointer(0, 0);
    let a = (a.data().as_ptr(), a.row_stride(), a.col_stride());
    // SAFETY: the processor is supported; the assertions show that reads of both factors lie within their data, and that the output
    // has so many rows and columns.
    unsafe { kernel(inner, a, (b.data().as_ptr(), b.row_stride()), c, add) }
}

/// # Safety
/// The processor has AVX-512. `a` can be read at `i·a_row + p·a_col` and `b` at `p·b_row + j` for i < M, p < inner and j < 16·P, and
/// `c` written at `i·c_row + j`.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f")]
unsafe fn thin_kernel<const M: usize, const P: usize>(
    inner: usize,
    (mut a, a_row, a_col): (*const f32, usize, usize),
    (mut b, b_row): (*const f32, usize),
    (c, c_row): (*mut f32, usize),
    add: bool,
) {
    // SAFETY: by the contract of this function; a prefetch may name any address.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); P]; M];
        for _ in 0..inner {
            let mut row = [_mm512_setzero_ps(); P];
            for (j, row) in row.iter_mut().enumerate() {
                let from = b.wrapping_add(j * NR);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD * b_row).cast());
                *row = _mm512_loadu_ps(from);
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*a.add(i * a_row));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = _mm512_fmadd_ps(x, row, *sum);
                }
            }
            a = a.wrapping_add(a_col);
            b = b.wrapping_add(b_row);
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (j, mut sum) in sums.into_iter().enumerate() {
                let c = c.add(i * c_row + j * NR);
                if add {
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(c));
                }
                _mm512_storeu_ps(c, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thin_products_are_sums_of_products() {
        if !supported() {
            eprintln!("skipped: this processor has no AVX-512");
            return;
        }
        let number = |i: usize, seed: usize| (i * seed % 17) as f32 - 8.0;
        let (inner, stride) = (41, 37);
        let b: Vec<f32> = (0..inner * stride).map(|i| number(i, 7)).collect();
        for rows in 1..=THIN {
            let a: Vec<f32> = (0..inner * rows).map(|i| number(i, 5)).collect();
            for add in [false, true] {
                let before: Vec<f32> = (0..rows * 40).map(|i| number(i, 3)).collect();
                let (mut one, mut two) = (before.clone(), before.clone());
                let a = Mat::new(&a, inner, rows).t();
                let b = Mat::strided(&b, inner, 2 * NR, stride);
                let left = b.block(0..inner, 0..NR);
                thin::<1>(MatMut::strided(&mut one, rows, NR, 40), add, a, left);
                thin::<2>(MatMut::strided(&mut two, rows, 2 * NR, 40), add, a, b);
                for (at, &start) in before.iter().enumerate() {
                    let (i, j) = (at / 40, at % 40);
                    let product = |p: usize| a.data()[p * rows + i] * b.data()[p * stride + j];
                    let sum =
                        || (0..inner).map(product).sum::<f32>() + if add { start } else { 0.0 };
                    assert_eq!(one[at], if j < NR { sum() } else { start });
                    assert_eq!(two[at], if j < 2 * NR { sum() } else { start });
                }
            }
        }
    }
}
