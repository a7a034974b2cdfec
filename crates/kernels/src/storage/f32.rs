//! IEEE single precision: what everything is computed in.

use pulp::Simd;

use super::{CHUNK, Number};

impl Number for f32 {
    const EVEN_FIRST: bool = false;

    #[inline(always)]
    fn widened<S: Simd>(_: S, from: &[Self; CHUNK], i: usize) -> [S::f32s; 2] {
        let (vectors, _) = S::as_simd_f32s(from);
        [vectors[i], vectors[i + vectors.len() / 2]]
    }

    #[inline]
    fn wide(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "vector loads take pointers")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: by the contract of this function.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }
}
