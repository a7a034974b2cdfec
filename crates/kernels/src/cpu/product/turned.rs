//! out += factor·a·bᵀ for few rows and a small inner size, which is what the second factor of a low-rank branch does to generated rows.
//!
//! Each sum goes over the inner indices in their order and is then added to the output, so a row's bits do not depend on the others. For a few
//! rows with AVX2, 8 rows of b are turned in registers; for more, b is packed once and meets all of them in larger blocks.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m256i, _MM_HINT_T0, _mm_prefetch, _mm256_add_ps, _mm256_broadcast_ss,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_maskload_ps, _mm256_maskstore_ps,
    _mm256_setzero_ps, _mm256_storeu_ps,
};

use crate::cpu::product::blocks::add_panels;
use crate::cpu::product::layout::{Left, NR};
use crate::cpu::product::mat::{Mat, MatMut};
#[cfg(target_arch = "x86_64")]
use crate::cpu::product::{
    avx2,
    pack::{Panels, pack_turned, transpose},
};
use crate::cpu::scratch::with_scratch;

/// out += factor·a·bᵀ on one thread: a [rows, inner], and b [columns, inner], whose rows lie in one piece each.
///
/// # Panics
/// If a shape does not fit.
pub(crate) fn add_turned(mut out: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, factor: f32) {
    let (rows, cols, inner) = (out.rows(), out.cols(), a.cols());
    assert!((a.rows(), b.rows(), b.cols()) == (rows, cols, inner) && b.col_stride() == 1);
    if rows == 0 || cols == 0 || inner == 0 {
        return;
    }
    with_scratch(rows * inner, |scaled| {
        for (i, to) in scaled.chunks_exact_mut(inner).enumerate() {
            for (p, to) in to.iter_mut().enumerate() {
                *to = factor * a.data()[i * a.row_stride() + p * a.col_stride()];
            }
        }
        #[cfg(target_arch = "x86_64")]
        if rows <= IN_REGISTERS && avx2::supported() {
            return add_in_registers(&mut out, scaled, b);
        }
        add_packed(&mut out, Mat::new(scaled, rows, inner), b);
    });
}

/// Rows up to which turning b for each pair of them costs less than packing it.
#[cfg(target_arch = "x86_64")]
const IN_REGISTERS: usize = 2;

/// out += a·bᵀ, with all of b packed at once.
fn add_packed(out: &mut MatMut<'_>, a: Mat<'_>, b: Mat<'_>) {
    let (rows, cols, inner) = (a.rows(), b.rows(), a.cols());
    with_scratch(cols.next_multiple_of(NR) * inner, |panels| {
        pack_columns(panels, b);
        add_panels::<1>(out, 0, rows, true, &[Left::in_place(a)], panels);
    });
}

/// bᵀ in panels [columns / 16][inner][16]; columns past the last are zero.
fn pack_columns(to: &mut [f32], b: Mat<'_>) {
    #[cfg(target_arch = "x86_64")]
    if avx2::supported() {
        let mut panels = Panels {
            numbers: to,
            inner: b.cols(),
            part: 0..b.cols(),
        };
        return pack_turned(&mut panels, b.data(), b.row_stride(), b.rows());
    }
    pack_anywhere(to, b);
}

/// [`pack_columns`] for processors without AVX2.
fn pack_anywhere(to: &mut [f32], b: Mat<'_>) {
    let inner = b.cols();
    for (panel, to) in to.chunks_exact_mut(NR * inner).enumerate() {
        let first = panel * NR;
        let width = NR.min(b.rows() - first);
        let rows = b.block(first..first + width, 0..inner);
        for (p, to) in to.as_chunks_mut::<NR>().0.iter_mut().enumerate() {
            to[width..].fill(0.0);
            for (j, to) in to[..width].iter_mut().enumerate() {
                *to = rows.data()[j * rows.row_stride() + p];
            }
        }
    }
}

/// out += a·bᵀ with AVX2, for one row or two at a time. `a` has no gaps.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "kernels take pointers")]
fn add_in_registers(out: &mut MatMut<'_>, a: &[f32], b: Mat<'_>) {
    let (rows, cols, inner) = (out.rows(), out.cols(), b.cols());
    assert!(avx2::supported() && a.len() >= rows * inner && b.rows() == cols);
    assert!((cols - 1) * b.row_stride() + inner <= b.data().len());
    let b = (b.data().as_ptr(), b.row_stride());
    for row in (0..rows).step_by(2) {
        let kernel = if row + 1 < rows {
            kernel::<2>
        } else {
            kernel::<1>
        };
        let a = a[row * inner..].as_ptr();
        // SAFETY: the processor has AVX2 and FMA, a and out have as many rows from `row` on as the kernel is for, each of a's has `inner` numbers,
        // and b has as many rows as out has columns.
        unsafe { kernel(out.pointer(row, 0), cols, a, b, inner) }
    }
}

/// Numbers of b that are asked for ahead: memory takes as long as some rows of work.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 256;

/// out += a·bᵀ for `M` rows.
///
/// # Safety
/// The processor has AVX2 and FMA. `a` can be read as [M, inner], b as [cols, inner] with its rows as far apart as it says, and out, whose rows are as
/// far apart as it says, be written as [M, cols].
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel<const M: usize>(
    (out, out_stride): (*mut f32, usize),
    cols: usize,
    a: *const f32,
    (b, b_stride): (*const f32, usize),
    inner: usize,
) {
    // SAFETY: by the contract of this function; a prefetch may name any address.
    unsafe {
        for col in (0..cols).step_by(8) {
            let width = 8.min(cols - col);
            let b = b.add(col * b_stride);
            let mut sums = [_mm256_setzero_ps(); M];
            for p in (0..inner).step_by(8) {
                let depth = 8.min(inner - p);
                let mut rows = [_mm256_setzero_ps(); 8];
                for (j, row) in rows.iter_mut().enumerate().take(width) {
                    let from = b.add(j * b_stride + p);
                    if j % 2 == 0 {
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
                    }
                    *row = load(from, depth);
                }
                let columns = transpose(rows);
                for (i, sum) in sums.iter_mut().enumerate() {
                    let a = a.add(i * inner + p);
                    for (q, column) in columns.iter().enumerate().take(depth) {
                        *sum = _mm256_fmadd_ps(_mm256_broadcast_ss(&*a.add(q)), *column, *sum);
                    }
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                let to = out.add(i * out_stride + col);
                let sum = _mm256_add_ps(load(to, width), sum);
                if width == 8 {
                    _mm256_storeu_ps(to, sum);
                } else {
                    _mm256_maskstore_ps(to, mask(width), sum);
                }
            }
        }
    }
}

/// The first `count` numbers from `from` on, at most 8, with zeros behind them.
///
/// # Safety
/// The processor has AVX2, and so many numbers can be read.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(from: *const f32, count: usize) -> __m256 {
    // SAFETY: by the contract of this function; numbers outside the mask are not read.
    unsafe {
        if count == 8 {
            _mm256_loadu_ps(from)
        } else {
            _mm256_maskload_ps(from, mask(count))
        }
    }
}

/// The first `count` of 8 numbers.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx2")]
fn mask(count: usize) -> __m256i {
    const ONES_AND_ZEROS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    let from = &ONES_AND_ZEROS[8 - count.min(8)..][..8];
    // SAFETY: the slice has 8 numbers.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * seed) as f32).sin()).collect()
    }

    #[test]
    fn columns_are_packed_the_same_on_any_processor() {
        for (cols, inner) in [(16, 8), (37, 19), (5, 3)] {
            let b = numbers(cols * (inner + 1), 5);
            let b = Mat::strided(&b, cols, inner, inner + 1);
            let mut packed = [vec![7.0; 48 * inner], vec![8.0; 48 * inner]];
            let len = cols.next_multiple_of(NR) * inner;
            pack_columns(&mut packed[0][..len], b);
            pack_anywhere(&mut packed[1][..len], b);
            assert_eq!(packed[0][..len], packed[1][..len]);
        }
    }

    /// Rows in registers and rows that meet packed columns sum in the same order; what is beside the output stays as it was.
    #[test]
    fn sums_are_the_same_in_any_company() {
        for (rows, cols, inner) in [(1, 64, 8), (8, 40, 8), (7, 21, 4), (11, 13, 19), (3, 5, 1)] {
            let a = numbers(rows * (inner + 2), 3);
            let b = numbers(cols * (inner + 1), 5);
            let a = Mat::strided(&a, rows, inner, inner + 2);
            let b = Mat::strided(&b, cols, inner, inner + 1);
            let before = numbers(rows * (cols + 3), 7);
            let run = |work: &dyn Fn(MatMut<'_>)| {
                let mut out = before.clone();
                work(MatMut::strided(&mut out, rows, cols, cols + 3));
                out
            };
            let together = run(&|out| add_turned(out, a, b, 0.5));
            let some_at_a_time = |count: usize| {
                run(&|mut out| {
                    for row in (0..rows).step_by(count) {
                        let some = row..(row + count).min(rows);
                        let a = a.block(some.clone(), 0..inner);
                        add_turned(out.window(some, 0..cols), a, b, 0.5);
                    }
                })
            };
            assert_eq!(together, some_at_a_time(1));
            assert_eq!(together, some_at_a_time(2));
            for (row, (before, after)) in before
                .chunks(cols + 3)
                .zip(together.chunks(cols + 3))
                .enumerate()
            {
                for col in 0..cols {
                    let of_a = &a.data()[row * a.row_stride()..][..inner];
                    let of_b = &b.data()[col * b.row_stride()..][..inner];
                    let sum: f32 = of_a.iter().zip(of_b).map(|(a, b)| a * b).sum();
                    assert!((after[col] - before[col] - 0.5 * sum).abs() < 1e-5);
                }
                assert_eq!(before[cols..], after[cols..]);
            }
        }
    }
}
