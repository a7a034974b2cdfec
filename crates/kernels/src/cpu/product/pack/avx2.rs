//! Panels packed with AVX2.

use std::arch::x86_64::{
    __m256, _MM_HINT_T0, _mm_prefetch, _mm256_permute2f128_ps, _mm256_setzero_ps,
    _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use super::Panels;
use crate::cpu::product::avx2::supported;
use crate::cpu::product::layout::NR;
use crate::storage::Number;

/// Inner indices that are turned at once.
pub(super) const STEP: usize = 8;

/// The first `whole` panels of b as it lies: its rows start `stride` apart.
///
/// # Panics
/// If there are no inner indices, a size does not fit, or the processor is not [`supported`].
#[expect(unsafe_code, reason = "vector code")]
pub(super) fn pack_straight<N: Number>(
    to: &mut Panels<'_>,
    from: &[N],
    stride: usize,
    whole: usize,
) {
    let inner = to.part.len();
    assert!(supported() && (inner - 1) * stride + whole * NR <= from.len());
    assert!(to.part.end <= to.inner && to.numbers.len() >= whole * to.inner * NR);
    let start = &raw mut to.numbers[to.part.start * NR];
    // SAFETY: the assertions show that the processor has AVX2, that `inner` rows of
    // `whole` times 16 numbers lie within `from`, and that `to` has room for them.
    unsafe { straight(start, to.inner, from.as_ptr(), stride, whole, inner) }
}

/// The first `inner` rows of a panel from 16 rows of `from`, which become columns; they start `stride` apart.
///
/// # Panics
/// If `inner` is not a multiple of [`STEP`], a size does not fit, or the processor is not [`supported`].
#[expect(unsafe_code, reason = "vector code")]
pub(super) fn pack_turned<N: Number>(to: &mut [f32], from: &[N], stride: usize, inner: usize) {
    assert!(supported() && inner.is_multiple_of(STEP));
    assert!((NR - 1) * stride + inner <= from.len() && to.len() >= inner * NR);
    // SAFETY: the assertions show that the processor has AVX2, that 16 rows of `inner`
    // numbers lie within `from`, and that `to` holds `inner` rows of 16.
    unsafe { turned(to.as_mut_ptr(), from.as_ptr(), stride, inner) }
}

/// Rows ahead of the one that is copied, whose way from memory begins.
const AHEAD: usize = 8;

/// # Safety
/// The processor has AVX2; `inner` rows of `panels` times 16 numbers can be read, and as many rows of 16 written to
/// each panel; those start `depth` rows apart.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2")]
unsafe fn straight<N: Number>(
    to: *mut f32,
    depth: usize,
    from: *const N,
    stride: usize,
    panels: usize,
    inner: usize,
) {
    let line = 64 / size_of::<N>();
    // SAFETY: by the contract of this function; a prefetch may name any address.
    unsafe {
        for p in 0..inner {
            let from = from.add(p * stride);
            for col in (0..panels * NR).step_by(line) {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD * stride + col).cast());
            }
            for panel in 0..panels {
                let from = from.add(panel * NR);
                let to = to.add((panel * depth + p) * NR);
                _mm256_storeu_ps(to, N::load(from));
                _mm256_storeu_ps(to.add(8), N::load(from.add(8)));
            }
        }
    }
}

/// # Safety
/// The processor has AVX2; 16 rows of `inner` numbers can be read, `inner` rows of 16 written, and
/// `inner` is a multiple of 8.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2")]
unsafe fn turned<N: Number>(to: *mut f32, from: *const N, stride: usize, inner: usize) {
    let line = 64 / size_of::<N>();
    // SAFETY: by the contract of this function; a prefetch may name any address.
    unsafe {
        for p in (0..inner).step_by(8) {
            for half in 0..2 {
                let from = from.add(8 * half * stride + p);
                let to = to.add(p * NR + 8 * half);
                let mut rows = [_mm256_setzero_ps(); 8];
                for (j, row) in rows.iter_mut().enumerate() {
                    *row = N::load(from.add(j * stride));
                    if p % line == 0 {
                        // The same place of the next panel.
                        let next = from.wrapping_add((NR + j) * stride);
                        _mm_prefetch::<_MM_HINT_T0>(next.cast());
                    }
                }
                for (i, row) in transpose(rows).into_iter().enumerate() {
                    _mm256_storeu_ps(to.add(i * NR), row);
                }
            }
        }
    }
}

/// Eight rows of eight numbers become eight columns.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn transpose(rows: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    let mut fours = [_mm256_setzero_ps(); 8];
    for half in 0..2 {
        let (a, b, c, d) = (
            pairs[4 * half],
            pairs[4 * half + 1],
            pairs[4 * half + 2],
            pairs[4 * half + 3],
        );
        fours[4 * half] = _mm256_shuffle_ps::<0b01_00_01_00>(a, c);
        fours[4 * half + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(a, c);
        fours[4 * half + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(b, d);
        fours[4 * half + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(b, d);
    }
    let mut columns = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        columns[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[4 + i]);
        columns[4 + i] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[4 + i]);
    }
    columns
}
