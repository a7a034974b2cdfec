//! Blocks of sums for processors with AVX-512: up to 12 rows by one panel of 16 columns, or by two panels.
//!
//! Twice the numbers of [`panels`](crate::panels) in a register and twice the registers. Every element is summed in the same order
//! as there, so the bits are the same.

use std::arch::x86_64::{
    __m512, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use crate::blocks::{Left, MR, NR};
use crate::matmul::MatMut;

/// Rows of a block: two groups of those that are packed side by side.
pub(crate) const ROWS: usize = 2 * MR;

/// Whether this processor can.
pub(crate) fn supported() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
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
