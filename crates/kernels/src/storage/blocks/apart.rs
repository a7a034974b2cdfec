//! Blocks of integers whose files keep scales apart from them: those of bitsandbytes' int8, and of GPTQ and AWQ.
//!
//! Each block here has its own scale; [`EightBit`](crate::EightBit) and [`Grouped`](crate::Grouped) bring them together.

use bytemuck::{Pod, Zeroable};

use super::plain::{each, nibbles, signed, unsigned};
use super::vectors::Vectors;
use super::{Block, GROUP, Group, IntegerBlock, RUN, sixteen};

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

    #[inline(always)]
    fn run(&self, run: usize, _: impl Vectors) -> [f32; RUN] {
        let d = f32::from_le_bytes(self.d);
        sixteen(&self.qs, run).map(
            #[inline(always)]
            |q| f32::from(q.cast_signed()) * d * INT8_STEP,
        )
    }
}

impl IntegerBlock for Int8 {
    #[inline(always)]
    fn group(&self, group: usize, _: impl Vectors) -> Group {
        let d = f32::from_le_bytes(self.d) * INT8_STEP;
        signed(
            bytemuck::cast(self.qs.as_chunks::<GROUP>().0[group]),
            [d; 2],
        )
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

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let (d, z) = (vectors.half(self.d), f32::from(self.z));
        each(nibbles(&self.qs, run), |q| d * (q - z))
    }
}

impl IntegerBlock for Int4 {
    #[inline(always)]
    fn group(&self, _: usize, vectors: impl Vectors) -> Group {
        let (d, z) = (vectors.half(self.d), f32::from(self.z));
        unsigned(
            [nibbles(&self.qs, 0), nibbles(&self.qs, 1)],
            [d; 2],
            [-z * d; 2],
        )
    }
}
