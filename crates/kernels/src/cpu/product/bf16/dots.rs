//! Blocks of sums in the registers of AVX-512, for processors that multiply pairs of bf16 numbers (`vdpbf16ps` of AVX512-BF16).
//!
//! The instruction multiplies 16 pairs with 16 others and adds both products of a pair to one f32 number. That is twice the
//! multiplications of an f32 instruction. The right factor's pairs of 16 columns are a register; a pair of the left one stands in all
//! places of another.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::ahead::Ahead;
use super::layout::{Parts, Run, SIDE, STEP, TILE};
use crate::cpu::engine::{Engine, engine};

/// Tiles of columns whose sums are in registers together.
pub(crate) const TOGETHER: usize = 3;
/// Rows of a block of sums: with three registers of columns 24 of the 32 there are.
pub(super) const ROWS: usize = 8;

/// Whether this processor can.
#[inline]
pub(crate) fn supported() -> bool {
    engine() >= Engine::Avx512Bf16
}

/// c (+)= Σ over the runs of a · b for some of 16 rows and up to 3 tiles of columns; both factors have one part. Meanwhile what comes next
/// is asked for, a step's share at each step.
///
/// # Safety
/// The runs are as [`Run`] says for `columns` tiles. `c` has `rows` rows, rounded up to a multiple of 8, of 16 · `columns` numbers, `row_stride` numbers apart.
///
/// # Panics
/// If a factor has several parts, there are not 1 to 3 columns, or the processor is not [`supported`].
#[expect(unsafe_code, reason = "kernels take pointers")]
pub(crate) unsafe fn multiply(
    runs: &[Run],
    columns: usize,
    rows: usize,
    c: *mut f32,
    row_stride: usize,
    add: bool,
    ahead: &mut Ahead,
) {
    assert!(supported(), "a processor without products of bf16");
    assert!(runs.iter().all(|run| run.parts == Parts::OneByOne));
    let kernel = match columns {
        1 => block::<1>,
        2 => block::<2>,
        3 => block::<3>,
        _ => panic!("{columns} tiles of columns"),
    };
    for first in (0..rows.min(SIDE)).step_by(ROWS) {
        // SAFETY: the processor is `supported`; the rest is by the contract of this function.
        unsafe {
            kernel(
                runs,
                first,
                c.add(first * row_stride),
                row_stride,
                add,
                ahead,
            );
        }
    }
}

/// 8 rows of sums, from row `first` of the left tiles on.
///
/// # Safety
/// The processor has AVX512-BF16. The runs are as [`Run`] says for `N` tiles of columns; `c` has 8 rows of 16 · `N` numbers.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn block<const N: usize>(
    runs: &[Run],
    first: usize,
    c: *mut f32,
    row_stride: usize,
    add: bool,
    ahead: &mut Ahead,
) {
    let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
    // SAFETY: by the contract of this function.
    unsafe {
        if add {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(i * row_stride + j * SIDE));
                }
            }
        }
        for run in runs {
            let (mut a, mut b) = (run.a.byte_add(first * run.a_row), run.b);
            let mut left = run.pairs;
            while left >= SIDE {
                ahead.fetch();
                for pair in 0..SIDE {
                    let (a, b) = (a.add(2 * pair), b.add(pair * STEP));
                    add_pair(&mut sums, (a, run.a_row), b);
                }
                (a, b) = (a.byte_add(run.a_step), b.byte_add(run.b_step));
                left -= SIDE;
            }
            for pair in 0..left {
                let (a, b) = (a.add(2 * pair), b.add(pair * STEP));
                add_pair(&mut sums, (a, run.a_row), b);
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(c.add(i * row_stride + j * SIDE), *sum);
            }
        }
    }
}

/// The products of a pair of inner indices.
///
/// # Safety
/// The processor has AVX512-BF16; `a` has the pair of 8 rows, which begin `a_row` bytes apart, and `b` that of `N` tiles of columns.
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_pair<const N: usize>(
    sums: &mut [[__m512; N]; ROWS],
    (a, a_row): (*const u16, usize),
    b: *const u16,
) {
    // SAFETY: by the contract of this function; a `__m512bh` has any bits.
    unsafe {
        let columns: [__m512bh; N] =
            std::array::from_fn(|j| b.add(j * TILE).cast::<__m512bh>().read_unaligned());
        for (i, sums) in sums.iter_mut().enumerate() {
            let pair = a.byte_add(i * a_row).cast::<i32>().read_unaligned();
            let pair = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair));
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = _mm512_dpbf16_ps(*sum, pair, column);
            }
        }
    }
}
