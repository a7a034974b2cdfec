//! The upper half of an f32.

use half::bf16;
use pulp::Simd;

use super::{CHUNK, Number};
use crate::cpu::simd;

impl Number for bf16 {
    const EVEN_FIRST: bool = true;

    #[inline(always)]
    fn widened<S: Simd>(simd: S, from: &[Self; CHUNK], i: usize) -> [S::f32s; 2] {
        // Two numbers lie in 32 bits, and the upper half of an f32 is a bf16: one operation widens
        // those at even places, and one those at odd places, without moving any between lanes.
        let from = &from[2 * S::F32_LANES * i..2 * S::F32_LANES * (i + 1)];
        let pairs: S::u32s = bytemuck::pod_read_unaligned(bytemuck::cast_slice(from));
        let even = simd.wrapping_dyn_shl_u32s(pairs, simd.splat_u32s(16));
        let odd = simd.and_u32s(pairs, simd.splat_u32s(0xffff_0000));
        [
            simd.transmute_f32s_u32s(even),
            simd.transmute_f32s_u32s(odd),
        ]
    }

    #[inline]
    fn wide(self) -> f32 {
        simd::wide(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "vector loads take pointers")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{
            _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_slli_epi32,
        };
        // SAFETY: by the contract of this function.
        let narrow = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow)))
    }
}
