//! Tables of 16 values, in vectors where the processor has them.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m256i, _mm_loadu_si128, _mm_srli_si128, _mm256_blendv_ps, _mm256_castsi256_ps,
    _mm256_cvtepu8_epi32, _mm256_loadu_ps, _mm256_permutevar8x32_ps, _mm256_slli_epi32,
};

#[cfg(target_arch = "x86_64")]
use pulp::x86::V3;

#[cfg(target_arch = "x86_64")]
use crate::cpu::engine::{Engine, engine};
use crate::cpu::simd::dispatch;

use super::RUN;

/// How a table is looked up.
pub(super) trait Lookup: Copy {
    /// The values at these places, each below 16.
    fn at(self, table: &[f32; 16], places: [u8; RUN]) -> [f32; RUN];
}

/// Work that is compiled for each way.
pub(super) trait Work {
    fn with(self, lookup: impl Lookup);
}

/// Does work with vectors of the processor.
pub(super) fn with_lookup(work: impl Work) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = V3::try_new().filter(|_| engine() >= Engine::Avx2) {
        return pulp::Simd::vectorize(
            simd,
            #[inline(always)]
            || work.with(simd),
        );
    }
    dispatch(
        #[inline(always)]
        || work.with(OneByOne),
    );
}

/// Values are read one by one.
#[derive(Clone, Copy)]
struct OneByOne;

impl Lookup for OneByOne {
    #[inline(always)]
    fn at(self, table: &[f32; 16], places: [u8; RUN]) -> [f32; RUN] {
        places.map(
            #[inline(always)]
            |place| table[usize::from(place & 15)],
        )
    }
}

#[cfg(target_arch = "x86_64")]
impl Lookup for V3 {
    #[inline(always)]
    #[expect(unsafe_code, reason = "vector code")]
    fn at(self, table: &[f32; 16], places: [u8; RUN]) -> [f32; RUN] {
        // SAFETY: there is a `V3`, so the processor has AVX2.
        unsafe { permuted(table, &places) }
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
