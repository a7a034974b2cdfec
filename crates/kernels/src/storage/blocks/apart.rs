//! Blocks of integers whose files keep scales apart from them: those of bitsandbytes' int8, and of GPTQ and AWQ.
//!
//! Each block here has its own scale; [`EightBit`](crate::EightBit) and [`Grouped`](crate::Grouped) bring them together.

use bytemuck::{Pod, Zeroable};

use super::vectors::Vectors;
use super::{Block, IntegerBlock, Scale, thirty_two};

/// Numbers of a block of int8.
pub(crate) const INT8_LEN: usize = 64;

/// What bitsandbytes multiplies with for a division by 127 (`int8_vectorwise_dequant`).
pub(crate) const INT8_STEP: f32 = 1.0 / 127.0;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Int8 {
    /// The largest magnitude of the row.
    pub(crate) d: [u8; 4],
    pub(crate) qs: [u8; INT8_LEN],
}

impl Block for Int8 {
    const NAME: &'static str = "int8";
    const LEN: usize = INT8_LEN;
}

impl IntegerBlock for Int8 {
    const SIGNED: bool = true;
    const HAS_OFFSET: bool = false;
    type Scales = Scale;

    #[inline(always)]
    fn scales(&self, _: impl Vectors) -> Scale {
        Scale {
            step: INT8_STEP,
            ..Scale::factor(f32::from_le_bytes(self.d))
        }
    }

    #[inline(always)]
    fn scale(scales: &Scale, _: usize) -> [Scale; 2] {
        [*scales; 2]
    }

    #[inline(always)]
    fn integers<V: Vectors>(&self, group: usize, vectors: V) -> V::Bytes {
        vectors.load(thirty_two(&self.qs, group))
    }
}

/// Numbers of a block of int4.
pub(crate) const INT4_LEN: usize = 32;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Int4 {
    /// In half precision.
    pub(crate) d: [u8; 2],
    pub(crate) z: u8,
    /// The first 16 numbers in the low halves, the others in the high ones.
    pub(crate) qs: [u8; INT4_LEN / 2],
}

impl Block for Int4 {
    const NAME: &'static str = "int4";
    const LEN: usize = INT4_LEN;
}

impl IntegerBlock for Int4 {
    const SIGNED: bool = false;
    const HAS_OFFSET: bool = true;
    type Scales = Scale;

    #[inline(always)]
    fn scales(&self, vectors: impl Vectors) -> Scale {
        Scale {
            zero: f32::from(self.z),
            ..Scale::factor(vectors.half(self.d))
        }
    }

    #[inline(always)]
    fn scale(scales: &Scale, _: usize) -> [Scale; 2] {
        [*scales; 2]
    }

    #[inline(always)]
    fn integers<V: Vectors>(&self, _: usize, vectors: V) -> V::Bytes {
        vectors.halves(&self.qs)
    }
}
