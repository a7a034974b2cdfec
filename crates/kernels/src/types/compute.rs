//! What the factors of a product are read as.

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
    /// Whether this processor rounds the factors of the larger products to bf16, those of attention's among them. It rounds a number once
    /// only, so whatever is a factor and nothing else may be written, or kept, as bf16.
    pub fn rounds_here(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let is_faster = crate::cpu::product::bf16::supported();
        #[cfg(not(target_arch = "x86_64"))]
        let is_faster = false;
        self == Self::Bf16 && is_faster
    }
}
