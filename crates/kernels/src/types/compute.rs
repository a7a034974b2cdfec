//! What the factors of a product are read as.

use crate::cpu::engine::{Engine, engine};

/// The number format that the factors of a product are read in, which is not the one that they are stored in; sums are in f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ComputeDType {
    /// As they are.
    #[default]
    F32,
    /// An f32 number may be read as the sum of two bf16 numbers, off by 2⁻¹⁷ of itself at most, where the processor is faster with these.
    /// oneMKL calls it `float_to_bf16x2`.
    Bf16x2,
    /// They may be rounded to bf16, off by 2⁻⁸ of themselves at most, where the processor is faster with these, as PyTorch's autocast to bf16 does.
    Bf16,
}

impl ComputeDType {
    /// How this processor reads factors when it is told so: as f32 numbers unless it is faster otherwise.
    #[must_use]
    pub fn here(self) -> Self {
        let is_faster = match self {
            Self::F32 => true,
            #[cfg(target_arch = "x86_64")]
            Self::Bf16x2 => engine() >= Engine::Amx,
            #[cfg(target_arch = "x86_64")]
            Self::Bf16 => engine() >= Engine::Avx512Bf16,
            #[cfg(target_arch = "aarch64")]
            Self::Bf16 => engine() >= Engine::NeonBf16,
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        };
        if is_faster { self } else { Self::F32 }
    }

    /// Whether this processor rounds the factors of the larger products to bf16, those of attention's among them. It rounds a number once
    /// only, so whatever is a factor and nothing else may be written, or kept, as bf16.
    pub fn rounds_here(self) -> bool {
        cfg!(target_arch = "x86_64") && self.here() == Self::Bf16
    }
}
