//! Blocks of 32 numbers with one scale, or a scale and an offset, in half precision.

use bytemuck::{Pod, Zeroable};

use super::vectors::Vectors;
use super::{Block, IntegerBlock, Scale};

/// The values of IQ4_NL and IQ4_XS.
pub(super) const IQ4_BYTES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Says how the blocks of 32 numbers are read, whose scale is that of all of them.
macro_rules! plain {
    ($type:ident, $name:literal, signed $signed:literal, offset $offset:literal,
     |$block:ident, $vectors:ident| $scale:expr, $integers:expr) => {
        impl Block for $type {
            const NAME: &'static str = $name;
            const LEN: usize = 32;
        }

        impl IntegerBlock for $type {
            const SIGNED: bool = $signed;
            const HAS_OFFSET: bool = $offset;
            type Scales = Scale;

            #[inline(always)]
            fn scales(&self, $vectors: impl Vectors) -> Scale {
                let $block = self;
                $scale
            }

            #[inline(always)]
            fn scale(scales: &Scale, _: usize) -> [Scale; 2] {
                [*scales; 2]
            }

            #[inline(always)]
            fn integers<V: Vectors>(&self, _: usize, $vectors: V) -> V::Bytes {
                let $block = self;
                $integers
            }
        }
    };
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4_0 {
    pub(super) d: [u8; 2],
    pub(super) qs: [u8; 16],
}

plain!(Q4_0, "Q4_0", signed false, offset true, |block, vectors|
    Scale { zero: 8.0, ..Scale::factor(vectors.half(block.d)) },
    vectors.halves(&block.qs));

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4_1 {
    pub(super) d: [u8; 2],
    pub(super) m: [u8; 2],
    pub(super) qs: [u8; 16],
}

plain!(Q4_1, "Q4_1", signed false, offset true, |block, vectors|
    Scale { min: -vectors.half(block.m), ..Scale::factor(vectors.half(block.d)) },
    vectors.halves(&block.qs));

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5_0 {
    pub(super) d: [u8; 2],
    pub(super) qh: [u8; 4],
    pub(super) qs: [u8; 16],
}

plain!(Q5_0, "Q5_0", signed false, offset true, |block, vectors|
    Scale { zero: 16.0, ..Scale::factor(vectors.half(block.d)) },
    vectors.join(vectors.halves(&block.qs), vectors.spread(block.qh), 4));

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5_1 {
    pub(super) d: [u8; 2],
    pub(super) m: [u8; 2],
    pub(super) qh: [u8; 4],
    pub(super) qs: [u8; 16],
}

plain!(Q5_1, "Q5_1", signed false, offset true, |block, vectors|
    Scale { min: -vectors.half(block.m), ..Scale::factor(vectors.half(block.d)) },
    vectors.join(vectors.halves(&block.qs), vectors.spread(block.qh), 4));

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q8_0 {
    pub(super) d: [u8; 2],
    pub(super) qs: [u8; 32],
}

plain!(Q8_0, "Q8_0", signed true, offset false, |block, vectors|
    Scale::factor(vectors.half(block.d)),
    vectors.load(&block.qs));

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Iq4Nl {
    d: [u8; 2],
    qs: [u8; 16],
}

plain!(Iq4Nl, "IQ4_NL", signed true, offset false, |block, vectors|
    Scale::factor(vectors.half(block.d)),
    vectors.bytes_at(&IQ4_BYTES, vectors.halves(&block.qs)));
