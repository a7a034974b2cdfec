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
