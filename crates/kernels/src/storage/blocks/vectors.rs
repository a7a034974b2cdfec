//! What loops over blocks do with the 32 numbers of a group, and how processors with AVX2 do it.
//!
//! Every step is a function that is always inlined: what is left as a call would be compiled without the vectors, and is many times as slow.

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128, __m128i, __m256, __m256i, _mm_cvtsi32_si128, _mm_cvtss_f32, _mm_loadu_si128,
    _mm_srli_si128, _mm256_and_si256, _mm256_blendv_ps, _mm256_broadcastsi128_si256,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmpeq_epi8, _mm256_cvtepi8_epi32,
    _mm256_cvtepi32_ps, _mm256_cvtepu8_epi32, _mm256_extracti128_si256, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_mul_ps, _mm256_or_si256, _mm256_permutevar8x32_ps, _mm256_set_epi8,
    _mm256_set_m128i, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_set1_ps,
    _mm256_shuffle_epi8, _mm256_sll_epi16, _mm256_slli_epi32, _mm256_srl_epi16, _mm256_storeu_ps,
    _mm256_sub_ps,
};

#[cfg(target_arch = "x86_64")]
use pulp::x86::V3;

use super::{GROUP, RUN, Scale};
#[cfg(target_arch = "x86_64")]
use crate::cpu::engine::{Engine, engine};
use crate::storage::f16;

/// A way to do it.
pub(crate) trait Vectors: Copy {
    /// A byte for each number of a group.
    type Bytes: Copy;

    fn load(self, bytes: &[u8; GROUP]) -> Self::Bytes;

    /// The four low bits of 16 bytes, then their four high ones.
    fn halves(self, bytes: &[u8; RUN]) -> Self::Bytes;

    /// The bits of each byte that are in `mask` once they are `shift` places lower.
    fn bits(self, bytes: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes;

    /// `low`, and `high` that many bits higher, where there is room for it.
    fn join(self, low: Self::Bytes, high: Self::Bytes, shift: usize) -> Self::Bytes;

    /// For each of 32 bits, the lowest first, a byte that is 0 or 1.
    fn spread(self, bits: [u8; 4]) -> Self::Bytes;

    /// The bytes of a table at these places, each below 16.
    fn bytes_at(self, table: &[i8; 16], places: Self::Bytes) -> Self::Bytes;

    /// A number in half precision.
    fn half(self, bytes: [u8; 2]) -> f32;

    /// Writes the numbers of these integers, with a scale for either half of them.
    fn widen<const SIGNED: bool>(self, to: &mut [f32; GROUP], q: Self::Bytes, scales: [Scale; 2]);

    /// Writes the values of a table at these places, each below 16, times a factor.
    fn widen_at(self, to: &mut [f32; GROUP], table: &[f32; 16], places: Self::Bytes, factor: f32);
}

/// Work that is compiled for each way.
pub(super) trait Work {
    fn with(self, vectors: impl Vectors);
}

/// Does work with the processor's vectors.
pub(super) fn with_vectors(work: impl Work) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = V3::try_new().filter(|_| engine() >= Engine::Avx2) {
        return pulp::Simd::vectorize(
            simd,
            #[inline(always)]
            || work.with(simd),
        );
    }
    // What there is besides AVX2 on x86-64 is not worth another copy of every format's code.
    #[cfg(target_arch = "x86_64")]
    work.with(OneByOne);
    #[cfg(not(target_arch = "x86_64"))]
    crate::cpu::simd::dispatch(
        #[inline(always)]
        || work.with(OneByOne),
    );
}

/// Numbers are taken one by one, in loops that the compiler may turn into vectors.
#[derive(Clone, Copy)]
pub(crate) struct OneByOne;

impl Vectors for OneByOne {
    type Bytes = [u8; GROUP];

    #[inline(always)]
    fn load(self, bytes: &[u8; GROUP]) -> Self::Bytes {
        *bytes
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; RUN]) -> Self::Bytes {
        let mut halves = [0; GROUP];
        for (i, byte) in bytes.iter().enumerate() {
            halves[i] = byte & 15;
            halves[RUN + i] = byte >> 4;
        }
        halves
    }

    #[inline(always)]
    fn bits(self, mut bytes: Self::Bytes, shift: usize, mask: u8) -> Self::Bytes {
        for byte in &mut bytes {
            *byte = *byte >> shift & mask;
        }
        bytes
    }

    #[inline(always)]
    fn join(self, mut low: Self::Bytes, high: Self::Bytes, shift: usize) -> Self::Bytes {
        for (low, high) in low.iter_mut().zip(high) {
            *low |= high << shift;
        }
        low
    }

    #[inline(always)]
    fn spread(self, bits: [u8; 4]) -> Self::Bytes {
        let mut spread = [0; GROUP];
        for (i, byte) in spread.iter_mut().enumerate() {
            *byte = bits[i / 8] >> (i % 8) & 1;
        }
        spread
    }

    #[inline(always)]
    fn bytes_at(self, table: &[i8; 16], mut places: Self::Bytes) -> Self::Bytes {
        for place in &mut places {
            *place = table[usize::from(*place & 15)].cast_unsigned();
        }
        places
    }

    #[inline(always)]
    fn half(self, bytes: [u8; 2]) -> f32 {
        f16::wide(u16::from_le_bytes(bytes))
    }

    #[inline(always)]
    fn widen<const SIGNED: bool>(self, to: &mut [f32; GROUP], q: Self::Bytes, scales: [Scale; 2]) {
        let halves = to.chunks_exact_mut(RUN).zip(q.chunks_exact(RUN));
        for ((to, q), scale) in halves.zip(scales) {
            for (to, q) in to.iter_mut().zip(q) {
                let q = if SIGNED {
                    f32::from(q.cast_signed())
                } else {
                    f32::from(*q)
                };
                *to = scale.of(q);
            }
        }
    }

    #[inline(always)]
    fn widen_at(self, to: &mut [f32; GROUP], table: &[f32; 16], places: Self::Bytes, factor: f32) {
        for (to, place) in to.iter_mut().zip(places) {
            *to = table[usize::from(place & 15)] * factor;
        }
    }
}

/// Byte `i` of each quarter of 32 bits that are repeated is the quarter's bit `i`.
#[cfg(target_arch = "x86_64")]
const BIT_OF_BYTE: i64 = 0x8040_2010_0804_0201_u64.cast_signed();

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector code")]
impl Vectors for V3 {
    type Bytes = __m256i;

    #[inline(always)]
    fn load(self, bytes: &[u8; GROUP]) -> __m256i {
        // SAFETY: there is a `V3`, so the processor has AVX2; there are 32 bytes.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; RUN]) -> __m256i {
        // SAFETY: there is a `V3`, so the processor has AVX2; there are 16 bytes.
        unsafe {
            let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
            let high = std::arch::x86_64::_mm_srli_epi16::<4>(bytes);
            _mm256_and_si256(_mm256_set_m128i(high, bytes), _mm256_set1_epi8(15))
        }
    }

    #[inline(always)]
    fn bits(self, bytes: __m256i, shift: usize, mask: u8) -> __m256i {
        // SAFETY: there is a `V3`, so the processor has AVX2.
        unsafe {
            let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
            _mm256_and_si256(shifted, _mm256_set1_epi8(mask.cast_signed()))
        }
    }

    #[inline(always)]
    fn join(self, low: __m256i, high: __m256i, shift: usize) -> __m256i {
        // SAFETY: there is a `V3`, so the processor has AVX2.
        unsafe { _mm256_or_si256(low, _mm256_sll_epi16(high, _mm_cvtsi32_si128(shift as i32))) }
    }

    #[inline(always)]
    fn spread(self, bits: [u8; 4]) -> __m256i {
        // SAFETY: there is a `V3`, so the processor has AVX2.
        unsafe {
            // Each byte four times in eight places, of which every one keeps a bit of its own.
            let quarters = _mm256_set_epi8(
                3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0,
                0, 0, 0, 0,
            );
            let bits = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(bits)), quarters);
            let own = _mm256_set1_epi64x(BIT_OF_BYTE);
            let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, own), own);
            _mm256_and_si256(is_set, _mm256_set1_epi8(1))
        }
    }

    #[inline(always)]
    fn bytes_at(self, table: &[i8; 16], places: __m256i) -> __m256i {
        // SAFETY: there is a `V3`, so the processor has AVX2; the table has 16 bytes.
        unsafe {
            let table = _mm_loadu_si128(table.as_ptr().cast());
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), places)
        }
    }

    #[inline(always)]
    fn half(self, bytes: [u8; 2]) -> f32 {
        let bits = u32::from(u16::from_le_bytes(bytes));
        let number: __m128;
        // SAFETY: there is a `V3`, so the processor converts half precision.
        unsafe {
            // As intrinsics, LLVM makes `vpinsrw` of the move, which keeps the upper part of whatever its register had, often the sums of
            // a product. It would wait for them.
            asm!(
                "vmovd {number}, {bits:e}",
                "vcvtph2ps {number}, {number}",
                number = lateout(xmm_reg) number,
                bits = in(reg) bits,
                options(pure, nomem, nostack, preserves_flags),
            );
            _mm_cvtss_f32(number)
        }
    }

    #[inline(always)]
    fn widen<const SIGNED: bool>(self, to: &mut [f32; GROUP], q: __m256i, scales: [Scale; 2]) {
        let to = to.as_mut_ptr();
        for i in 0..4 {
            let scale = scales[i / 2];
            // SAFETY: there is a `V3`, so the processor has AVX2; there is room for four times eight numbers.
            unsafe {
                let q = quarter(q, i);
                let q = if SIGNED {
                    _mm256_cvtepi8_epi32(q)
                } else {
                    _mm256_cvtepu8_epi32(q)
                };
                let q = _mm256_sub_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(scale.zero));
                let scaled = _mm256_mul_ps(q, _mm256_set1_ps(scale.d));
                let scaled = _mm256_mul_ps(scaled, _mm256_set1_ps(scale.step));
                let number = _mm256_sub_ps(scaled, _mm256_set1_ps(scale.min));
                _mm256_storeu_ps(to.add(8 * i), number);
            }
        }
    }

    #[inline(always)]
    fn widen_at(self, to: &mut [f32; GROUP], table: &[f32; 16], places: __m256i, factor: f32) {
        let to = to.as_mut_ptr();
        for i in 0..4 {
            // SAFETY: there is a `V3`, so the processor has AVX2; the table has twice eight numbers, and there is room for four times
            // as many.
            unsafe {
                let low = _mm256_loadu_ps(table.as_ptr());
                let high = _mm256_loadu_ps(table.as_ptr().add(8));
                let values = eight_at(low, high, _mm256_cvtepu8_epi32(quarter(places, i)));
                let factor = _mm256_set1_ps(factor);
                _mm256_storeu_ps(to.add(8 * i), _mm256_mul_ps(values, factor));
            }
        }
    }
}

/// Eight of 32 bytes: a quarter of them, as the lowest of what comes out.
///
/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[expect(unsafe_code, reason = "vector code")]
unsafe fn quarter(bytes: __m256i, i: usize) -> __m128i {
    // SAFETY: as is asked for.
    unsafe {
        let half = if i < 2 {
            _mm256_castsi256_si128(bytes)
        } else {
            _mm256_extracti128_si256::<1>(bytes)
        };
        if i.is_multiple_of(2) {
            half
        } else {
            _mm_srli_si128::<8>(half)
        }
    }
}

/// The values at eight places, of which three bits say where in a half of the table, and the fourth in which.
///
/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[expect(unsafe_code, reason = "vector code")]
unsafe fn eight_at(low: __m256, high: __m256, places: __m256i) -> __m256 {
    // SAFETY: as is asked for.
    unsafe {
        let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(places));
        _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(low, places),
            _mm256_permutevar8x32_ps(high, places),
            upper,
        )
    }
}
