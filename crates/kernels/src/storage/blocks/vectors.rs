//! What a loop over blocks does otherwise on processors with vectors for it: tables of 16 values, and numbers in half precision.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m256i, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32, _mm_loadu_si128,
    _mm_srli_si128, _mm256_blendv_ps, _mm256_broadcastsi128_si256, _mm256_castsi256_ps,
    _mm256_cvtepu8_epi32, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_permutevar8x32_ps,
    _mm256_shuffle_epi8, _mm256_slli_epi32,
};

#[cfg(target_arch = "x86_64")]
use pulp::x86::V3;

use super::{GROUP, RUN};
#[cfg(target_arch = "x86_64")]
use crate::cpu::engine::{Engine, engine};
use crate::storage::f16;

/// A way to do it.
pub(crate) trait Vectors: Copy {
    /// The values at these places, each below 16.
    fn at(self, table: &[f32; 16], places: [u8; RUN]) -> [f32; RUN];

    /// The bytes at these places, each below 16.
    fn bytes_at(self, table: &[i8; 16], places: [u8; GROUP]) -> [i8; GROUP];

    /// A number in half precision.
    fn half(self, bytes: [u8; 2]) -> f32;
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

/// Values are read one by one.
#[derive(Clone, Copy)]
pub(crate) struct OneByOne;

impl Vectors for OneByOne {
    #[inline(always)]
    fn at(self, table: &[f32; 16], places: [u8; RUN]) -> [f32; RUN] {
        places.map(
            #[inline(always)]
            |place| table[usize::from(place & 15)],
        )
    }

    #[inline(always)]
    fn bytes_at(self, table: &[i8; 16], places: [u8; GROUP]) -> [i8; GROUP] {
        places.map(
            #[inline(always)]
            |place| table[usize::from(place & 15)],
        )
    }

    #[inline(always)]
    fn half(self, bytes: [u8; 2]) -> f32 {
        f16::wide(u16::from_le_bytes(bytes))
    }
}

#[cfg(target_arch = "x86_64")]
impl Vectors for V3 {
    #[inline(always)]
    #[expect(unsafe_code, reason = "vector code")]
    fn at(self, table: &[f32; 16], places: [u8; RUN]) -> [f32; RUN] {
        // SAFETY: there is a `V3`, so the processor has AVX2.
        unsafe { permuted(table, &places) }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "vector code")]
    fn bytes_at(self, table: &[i8; 16], places: [u8; GROUP]) -> [i8; GROUP] {
        // SAFETY: there is a `V3`, so the processor has AVX2.
        unsafe { permuted_bytes(table, &places) }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "vector code")]
    fn half(self, bytes: [u8; 2]) -> f32 {
        // SAFETY: there is a `V3`, so the processor converts half precision.
        unsafe { widened(u16::from_le_bytes(bytes)) }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widened(half: u16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(half))))
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
#[expect(unsafe_code, reason = "vector loads take pointers")]
fn permuted_bytes(table: &[i8; 16], places: &[u8; GROUP]) -> [i8; GROUP] {
    // SAFETY: the table has 16 bytes, and there are 32 places, as many as a vector has bytes.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        let places = _mm256_loadu_si256(places.as_ptr().cast());
        std::mem::transmute::<__m256i, [i8; GROUP]>(_mm256_shuffle_epi8(table, places))
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
#[expect(unsafe_code, reason = "vector loads take pointers")]
fn permuted(table: &[f32; 16], places: &[u8; RUN]) -> [f32; RUN] {
    // SAFETY: the table has twice eight numbers, and there are 16 places.
    let (low, high, places) = unsafe {
        (
            _mm256_loadu_ps(table.as_ptr()),
            _mm256_loadu_ps(table.as_ptr().add(8)),
            _mm_loadu_si128(places.as_ptr().cast()),
        )
    };
    let halves = [places, _mm_srli_si128::<8>(places)].map(|places| {
        let places = _mm256_cvtepu8_epi32(places);
        eight(low, high, places)
    });
    // SAFETY: two vectors of eight numbers are 16 of them.
    unsafe { std::mem::transmute::<[__m256; 2], [f32; RUN]>(halves) }
}

/// The values at eight places, of which three bits say where in a half of the table, and the fourth in which.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn eight(low: __m256, high: __m256, places: __m256i) -> __m256 {
    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(places));
    _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(low, places),
        _mm256_permutevar8x32_ps(high, places),
        upper,
    )
}
