//! Blocks of 256 numbers in runs with scales of their own, which the block's scale multiplies.

use bytemuck::{Pod, Zeroable};

use super::plain::IQ4_BYTES;
use super::vectors::Vectors;
use super::{Block, IntegerBlock, RUN, Scale, sixteen, thirty_two};

/// The scales and minima of `N` parts of a block.
#[derive(Clone, Copy)]
pub(super) struct Scales<const N: usize> {
    d: [f32; N],
    min: [f32; N],
}

impl<const N: usize> Scales<N> {
    /// Integers times the scale of the block, and others times that of its minima.
    #[inline(always)]
    fn of(d: f32, scales: [u8; N], dmin: f32, mins: [u8; N]) -> Self {
        let mut all = Self {
            d: [0.0; N],
            min: [0.0; N],
        };
        for (to, scale) in all.d.iter_mut().zip(scales) {
            *to = d * f32::from(scale);
        }
        for (to, min) in all.min.iter_mut().zip(mins) {
            *to = dmin * f32::from(min);
        }
        all
    }

    /// Integers around zero times the scale of the block.
    #[inline(always)]
    fn around_zero(d: f32, scales: [i8; N]) -> Self {
        let mut all = Self {
            d: [0.0; N],
            min: [0.0; N],
        };
        for (to, scale) in all.d.iter_mut().zip(scales) {
            *to = d * f32::from(scale);
        }
        all
    }

    #[inline(always)]
    fn at(&self, part: usize, zero: f32) -> Scale {
        Scale {
            zero,
            min: self.min[part],
            ..Scale::factor(self.d[part])
        }
    }

    /// Of either half of a group, where each has a scale.
    #[inline(always)]
    fn halves(&self, group: usize, zero: f32) -> [Scale; 2] {
        [self.at(2 * group, zero), self.at(2 * group + 1, zero)]
    }

    /// The same where they share one.
    #[inline(always)]
    fn whole(&self, group: usize, zero: f32) -> [Scale; 2] {
        [self.at(group, zero); 2]
    }
}

/// Two bits of each number of a group: 128 numbers take 32 bytes, whose pairs of bits are 32 numbers each.
#[inline(always)]
fn two_bits<V: Vectors>(bytes: &[u8; 64], group: usize, vectors: V) -> V::Bytes {
    let bytes = vectors.load(thirty_two(bytes, group / 4));
    vectors.bits(bytes, group % 4 * 2, 3)
}

/// Four bits of each number of a group: 64 numbers take 32 bytes, first their low halves.
#[inline(always)]
fn four_bits<V: Vectors>(bytes: &[u8; 128], group: usize, vectors: V) -> V::Bytes {
    let bytes = vectors.load(thirty_two(bytes, group / 2));
    vectors.bits(bytes, group % 2 * 4, 15)
}

/// A bit of each number of a group: 32 bytes have those of a block, a bit a group.
#[inline(always)]
fn one_bit<V: Vectors>(bytes: &[u8; 32], group: usize, vectors: V) -> V::Bytes {
    vectors.bits(vectors.load(bytes), group, 1)
}

/// Scales and minima of eight sub-blocks, six bits each in twelve bytes: four low parts of scales, four of minima, whose top two bits
/// complete the last four pairs.
#[inline(always)]
fn scales_and_mins(bytes: [u8; 12]) -> [[u8; 8]; 2] {
    let four =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let (scales, mins, rest) = (four(0), four(4), four(8));
    // What is done with a byte is done with four of them.
    let (six, low, top) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
    let last_scales = rest & low | (scales >> 6 & top) << 4;
    let last_mins = rest >> 4 & low | (mins >> 6 & top) << 4;
    [
        (u64::from(scales & six) | u64::from(last_scales) << 32).to_le_bytes(),
        (u64::from(mins & six) | u64::from(last_mins) << 32).to_le_bytes(),
    ]
}

/// Puts scale and minimum of sub-block `j`, each below 64, where there are none yet; see [`scales_and_mins`].
pub(super) fn set_scale_and_min(scales: &mut [u8; 12], j: usize, scale: u8, min: u8) {
    if j < 4 {
        scales[j] |= scale;
        scales[j + 4] |= min;
    } else {
        scales[j + 4] |= scale & 15 | min << 4;
        scales[j - 4] |= scale >> 4 << 6;
        scales[j] |= min >> 4 << 6;
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q2K {
    scales: [u8; 16],
    qs: [u8; 64],
    d: [u8; 2],
    dmin: [u8; 2],
}

impl Block for Q2K {
    const NAME: &'static str = "Q2_K";
    const LEN: usize = 256;
}

impl IntegerBlock for Q2K {
    const SIGNED: bool = false;
    const HALVES: bool = true;
    const HAS_OFFSET: bool = true;
    type Scales = Scales<16>;

    #[inline(always)]
    fn scales(&self, vectors: impl Vectors) -> Self::Scales {
        let (mut scales, mut mins) = (self.scales, self.scales);
        for (scale, min) in scales.iter_mut().zip(&mut mins) {
            (*scale, *min) = (*scale & 15, *min >> 4);
        }
        Scales::of(vectors.half(self.d), scales, vectors.half(self.dmin), mins)
    }

    #[inline(always)]
    fn scale(scales: &Self::Scales, group: usize) -> [Scale; 2] {
        scales.halves(group, 0.0)
    }

    #[inline(always)]
    fn integers<V: Vectors>(&self, group: usize, vectors: V) -> V::Bytes {
        two_bits(&self.qs, group, vectors)
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q3K {
    hmask: [u8; 32],
    qs: [u8; 64],
    scales: [u8; 12],
    d: [u8; 2],
}

impl Block for Q3K {
    const NAME: &'static str = "Q3_K";
    const LEN: usize = 256;
}

impl IntegerBlock for Q3K {
    const SIGNED: bool = false;
    const HALVES: bool = true;
    const HAS_OFFSET: bool = true;
    type Scales = Scales<16>;

    #[inline(always)]
    fn scales(&self, vectors: impl Vectors) -> Self::Scales {
        // Four low bits of 16 scales are in eight bytes, and two high ones in the four behind them.
        let mut scales = [0; 16];
        for (run, scale) in scales.iter_mut().enumerate() {
            let low = self.scales[run % 8] >> (run / 8 * 4) & 15;
            let high = self.scales[8 + run % 4] >> (run / 4 * 2) & 3;
            *scale = (low | high << 4).cast_signed() - 32;
        }
        Scales::around_zero(vectors.half(self.d), scales)
    }

    #[inline(always)]
    fn scale(scales: &Self::Scales, group: usize) -> [Scale; 2] {
        scales.halves(group, 4.0)
    }

    #[inline(always)]
    fn integers<V: Vectors>(&self, group: usize, vectors: V) -> V::Bytes {
        // The integers are four too large: a bit that is not set takes four away.
        let low = two_bits(&self.qs, group, vectors);
        vectors.join(low, one_bit(&self.hmask, group, vectors), 2)
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4K {
    pub(super) d: [u8; 2],
    pub(super) dmin: [u8; 2],
    pub(super) scales: [u8; 12],
    pub(super) qs: [u8; 128],
}

impl Block for Q4K {
    const NAME: &'static str = "Q4_K";
    const LEN: usize = 256;
}

impl IntegerBlock for Q4K {
    const SIGNED: bool = false;
    const HAS_OFFSET: bool = true;
    type Scales = Scales<8>;

    #[inline(always)]
    fn scales(&self, vectors: impl Vectors) -> Self::Scales {
        let [scales, mins] = scales_and_mins(self.scales);
        Scales::of(vectors.half(self.d), scales, vectors.half(self.dmin), mins)
    }

    #[inline(always)]
    fn scale(scales: &Self::Scales, group: usize) -> [Scale; 2] {
        scales.whole(group, 0.0)
    }

    #[inline(always)]
    fn integers<V: Vectors>(&self, group: usize, vectors: V) -> V::Bytes {
        four_bits(&self.qs, group, vectors)
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5K {
    pub(super) d: [u8; 2],
    pub(super) dmin: [u8; 2],
    pub(super) scales: [u8; 12],
    pub(super) qh: [u8; 32],
    pub(super) qs: [u8; 128],
}

impl Block for Q5K {
    const NAME: &'static str = "Q5_K";
    const LEN: usize = 256;
}

impl IntegerBlock for Q5K {
    const SIGNED: bool = false;
    const HAS_OFFSET: bool = true;
    type Scales = Scales<8>;

    #[inline(always)]
    fn scales(&self, vectors: impl Vectors) -> Self::Scales {
        let [scales, mins] = scales_and_mins(self.scales);
        Scales::of(vectors.half(self.d), scales, vectors.half(self.dmin), mins)
    }

    #[inline(always)]
    fn scale(scales: &Self::Scales, group: usize) -> [Scale; 2] {
        scales.whole(group, 0.0)
    }

    #[inline(always)]
    fn integers<V: Vectors>(&self, group: usize, vectors: V) -> V::Bytes {
        let low = four_bits(&self.qs, group, vectors);
        vectors.join(low, one_bit(&self.qh, group, vectors), 4)
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q6K {
    ql: [u8; 128],
    qh: [u8; 64],
    pub(super) scales: [u8; 16],
    pub(super) d: [u8; 2],
}

impl Q6K {
    /// Puts the numbers, each below 64, where there are none yet; as they are read.
    pub(super) fn set_numbers(&mut self, numbers: &[u8; 256]) {
        for (run, numbers) in numbers.as_chunks::<RUN>().0.iter().enumerate() {
            let low = self.ql.as_chunks_mut::<RUN>().0[run / 8 * 4 + run % 4].iter_mut();
            for (low, number) in low.zip(numbers) {
                *low |= (number & 15) << (run % 8 / 4 * 4);
            }
            let (place, shift) = (run / 8 * 2 + run % 2, run % 8 / 2 * 2);
            let high = self.qh.as_chunks_mut::<RUN>().0[place].iter_mut();
            for (high, number) in high.zip(numbers) {
                *high |= number >> 4 << shift;
            }
        }
    }
}

impl Block for Q6K {
    const NAME: &'static str = "Q6_K";
    const LEN: usize = 256;
}

impl IntegerBlock for Q6K {
    const SIGNED: bool = false;
    const HALVES: bool = true;
    const HAS_OFFSET: bool = true;
    type Scales = Scales<16>;

    #[inline(always)]
    fn scales(&self, vectors: impl Vectors) -> Self::Scales {
        Scales::around_zero(vectors.half(self.d), bytemuck::cast(self.scales))
    }

    #[inline(always)]
    fn scale(scales: &Self::Scales, group: usize) -> [Scale; 2] {
        scales.halves(group, 32.0)
    }

    #[inline(always)]
    fn integers<V: Vectors>(&self, group: usize, vectors: V) -> V::Bytes {
        // Of 128 numbers, 64 bytes have the low halves: of numbers 0 to 63 in their low bits, of the others in their high ones.
        let low = vectors.load(thirty_two(&self.ql, group / 4 * 2 + group % 2));
        let low = vectors.bits(low, group % 4 / 2 * 4, 15);
        vectors.join(low, two_bits(&self.qh, group, vectors), 4)
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Iq4Xs {
    d: [u8; 2],
    scales_h: [u8; 2],
    scales_l: [u8; 4],
    qs: [u8; 128],
}

impl Block for Iq4Xs {
    const NAME: &'static str = "IQ4_XS";
    const LEN: usize = 256;
}

impl IntegerBlock for Iq4Xs {
    const SIGNED: bool = true;
    const HAS_OFFSET: bool = false;
    type Scales = Scales<8>;

    #[inline(always)]
    fn scales(&self, vectors: impl Vectors) -> Self::Scales {
        let high = u16::from_le_bytes(self.scales_h);
        let mut scales = [0; 8];
        for (group, scale) in scales.iter_mut().enumerate() {
            let low = self.scales_l[group / 2] >> (group % 2 * 4) & 15;
            let high = (high >> (2 * group) & 3) as u8;
            *scale = (low | high << 4).cast_signed() - 32;
        }
        Scales::around_zero(vectors.half(self.d), scales)
    }

    #[inline(always)]
    fn scale(scales: &Self::Scales, group: usize) -> [Scale; 2] {
        scales.whole(group, 0.0)
    }

    #[inline(always)]
    fn integers<V: Vectors>(&self, group: usize, vectors: V) -> V::Bytes {
        let places = vectors.halves(sixteen(&self.qs, group));
        vectors.bytes_at(&IQ4_BYTES, places)
    }
}
