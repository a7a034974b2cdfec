//! IEEE single precision: what everything is computed in.

use pulp::Simd;

use super::{CHUNK, Number, Storage};

impl Storage for f32 {
    const NAME: &'static str = "f32";
    const UNIT: usize = 1;
    type Read = Self;

    fn widen(to: &mut [f32], from: &[Self], first: usize) {
        to.copy_from_slice(&from[first..first + to.len()]);
    }

    fn narrow(to: &mut [Self], from: &[f32]) {
        to.copy_from_slice(from);
    }

    #[inline]
    fn in_place(units: &[Self]) -> Option<&[Self]> {
        Some(units)
    }

    #[inline]
    fn as_f32s(units: &[Self]) -> Option<&[f32]> {
        Some(units)
    }
}

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
