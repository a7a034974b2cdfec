//! Blocks of 256 numbers in runs with scales of their own, which the block's scale multiplies.

use bytemuck::{Pod, Zeroable};

use super::plain::{IQ4_BYTES, IQ4_VALUES, each, nibbles, signed, unsigned};
use super::vectors::Vectors;
use super::{Block, Group, IntegerBlock, RUN, sixteen};

/// Two bits of each byte.
#[inline(always)]
fn two_bits(bytes: &[u8; RUN], shift: usize) -> [u8; RUN] {
    bytes.map(
        #[inline(always)]
        |byte| byte >> shift & 3,
    )
}

/// Where run `run` of 16 lies among 64 bytes of numbers with two bits: 128 numbers take 32 bytes, whose pairs of bits are 32 numbers each.
#[inline(always)]
fn place_of_two_bits(run: usize) -> (usize, usize) {
    (run / 8 * 2 + run % 2, run % 8 / 2 * 2)
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

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let scale = self.scales[run];
        let d = vectors.half(self.d) * f32::from(scale & 15);
        let min = vectors.half(self.dmin) * f32::from(scale >> 4);
        let (place, shift) = place_of_two_bits(run);
        each(two_bits(sixteen(&self.qs, place), shift), |q| d * q - min)
    }
}

impl IntegerBlock for Q2K {
    #[inline(always)]
    fn group(&self, group: usize, vectors: impl Vectors) -> Group {
        let runs = [2 * group, 2 * group + 1];
        let q = runs.map(|run| {
            let (place, shift) = place_of_two_bits(run);
            two_bits(sixteen(&self.qs, place), shift)
        });
        let (d, min) = (vectors.half(self.d), vectors.half(self.dmin));
        let scales = runs.map(|run| self.scales[run]);
        unsigned(
            q,
            scales.map(|scale| d * f32::from(scale & 15)),
            scales.map(|scale| -min * f32::from(scale >> 4)),
        )
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

impl Q3K {
    /// The scale of a run. Four low bits of 16 scales are in eight bytes, and two high ones in the four behind them.
    #[inline(always)]
    fn scale(&self, run: usize, vectors: impl Vectors) -> f32 {
        let low = self.scales[run % 8] >> (run / 8 * 4) & 15;
        let high = self.scales[8 + run % 4] >> (run / 4 * 2) & 3;
        vectors.half(self.d) * (f32::from(low | high << 4) - 32.0)
    }

    /// The numbers of a run, four too large: a bit that is not set takes four away.
    #[inline(always)]
    fn numbers(&self, run: usize) -> [u8; RUN] {
        let (place, shift) = place_of_two_bits(run);
        let low = two_bits(sixteen(&self.qs, place), shift);
        let (masks, bit) = (sixteen(&self.hmask, run % 2), run / 2);
        std::array::from_fn(
            #[inline(always)]
            |i| low[i] | (masks[i] >> bit & 1) << 2,
        )
    }
}

impl Block for Q3K {
    const NAME: &'static str = "Q3_K";
    const LEN: usize = 256;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let d = self.scale(run, vectors);
        each(self.numbers(run), |q| d * (q - 4.0))
    }
}

impl IntegerBlock for Q3K {
    #[inline(always)]
    fn group(&self, group: usize, vectors: impl Vectors) -> Group {
        let runs = [2 * group, 2 * group + 1];
        let scale = runs.map(|run| self.scale(run, vectors));
        unsigned(
            runs.map(|run| self.numbers(run)),
            scale,
            scale.map(|scale| -4.0 * scale),
        )
    }
}

/// Scale and minimum of sub-block `j` of eight, six bits each in twelve bytes: four low parts of scales, four of minima, whose top two bits
/// complete the last four pairs.
#[inline(always)]
fn scale_and_min(scales: &[u8; 12], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let (low, high) = (j - 4, scales[j + 4]);
        (
            high & 15 | scales[low] >> 6 << 4,
            high >> 4 | scales[low + 4] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

/// Where run `run` of 16 lies among 128 bytes of numbers with four bits: 64 numbers take 32 bytes, first their low halves.
#[inline(always)]
fn place_of_four_bits(run: usize) -> (usize, usize) {
    (run / 4 * 2 + run % 2, run / 2 % 2)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4K {
    pub(super) d: [u8; 2],
    pub(super) dmin: [u8; 2],
    scales: [u8; 12],
    pub(super) qs: [u8; 128],
}

impl Q4K {
    /// Puts scale and minimum of sub-block `j`, each below 64, where there are none yet; see [`scale_and_min`].
    pub(super) fn set_scale_and_min(&mut self, j: usize, scale: u8, min: u8) {
        if j < 4 {
            self.scales[j] |= scale;
            self.scales[j + 4] |= min;
        } else {
            self.scales[j + 4] |= scale & 15 | min << 4;
            self.scales[j - 4] |= scale >> 4 << 6;
            self.scales[j] |= min >> 4 << 6;
        }
    }
}

impl Block for Q4K {
    const NAME: &'static str = "Q4_K";
    const LEN: usize = 256;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let (scale, min) = scale_and_min(&self.scales, run / 2);
        let (d, min) = (vectors.half(self.d) * scale, vectors.half(self.dmin) * min);
        let (place, part) = place_of_four_bits(run);
        each(nibbles(sixteen(&self.qs, place), part), |q| d * q - min)
    }
}

impl IntegerBlock for Q4K {
    #[inline(always)]
    fn group(&self, group: usize, vectors: impl Vectors) -> Group {
        let (scale, min) = scale_and_min(&self.scales, group);
        let (d, min) = (vectors.half(self.d) * scale, vectors.half(self.dmin) * min);
        let q = [2 * group, 2 * group + 1].map(|run| {
            let (place, part) = place_of_four_bits(run);
            nibbles(sixteen(&self.qs, place), part)
        });
        unsigned(q, [d; 2], [-min; 2])
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5K {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; 12],
    qh: [u8; 32],
    qs: [u8; 128],
}

impl Q5K {
    /// The numbers of a run.
    #[inline(always)]
    fn numbers(&self, run: usize) -> [u8; RUN] {
        let (place, part) = place_of_four_bits(run);
        let low = nibbles(sixteen(&self.qs, place), part);
        let (high, bit) = (sixteen(&self.qh, run % 2), run / 2);
        std::array::from_fn(
            #[inline(always)]
            |i| low[i] | (high[i] >> bit & 1) << 4,
        )
    }
}

impl Block for Q5K {
    const NAME: &'static str = "Q5_K";
    const LEN: usize = 256;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let (scale, min) = scale_and_min(&self.scales, run / 2);
        let (d, min) = (vectors.half(self.d) * scale, vectors.half(self.dmin) * min);
        each(self.numbers(run), |q| d * q - min)
    }
}

impl IntegerBlock for Q5K {
    #[inline(always)]
    fn group(&self, group: usize, vectors: impl Vectors) -> Group {
        let (scale, min) = scale_and_min(&self.scales, group);
        let (d, min) = (vectors.half(self.d) * scale, vectors.half(self.dmin) * min);
        let q = [2 * group, 2 * group + 1].map(|run| self.numbers(run));
        unsigned(q, [d; 2], [-min; 2])
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
    /// Puts the numbers, each below 64, where there are none yet; see [`Self::numbers`].
    pub(super) fn set_numbers(&mut self, numbers: &[u8; 256]) {
        for (run, numbers) in numbers.as_chunks::<RUN>().0.iter().enumerate() {
            let low = self.ql.as_chunks_mut::<RUN>().0[run / 8 * 4 + run % 4].iter_mut();
            for (low, number) in low.zip(numbers) {
                *low |= (number & 15) << (run % 8 / 4 * 4);
            }
            let (place, shift) = place_of_two_bits(run);
            let high = self.qh.as_chunks_mut::<RUN>().0[place].iter_mut();
            for (high, number) in high.zip(numbers) {
                *high |= number >> 4 << shift;
            }
        }
    }

    /// The numbers of a run, 32 too large. Of 128 numbers, 64 bytes have the low halves: of numbers 0 to 63 in their low bits, of the
    /// others in their high ones.
    #[inline(always)]
    fn numbers(&self, run: usize) -> [u8; RUN] {
        let low = nibbles(sixteen(&self.ql, run / 8 * 4 + run % 4), run % 8 / 4);
        let (place, shift) = place_of_two_bits(run);
        let high = two_bits(sixteen(&self.qh, place), shift);
        std::array::from_fn(
            #[inline(always)]
            |i| low[i] | high[i] << 4,
        )
    }
}

impl Block for Q6K {
    const NAME: &'static str = "Q6_K";
    const LEN: usize = 256;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let d = vectors.half(self.d) * f32::from(self.scales[run].cast_signed());
        each(self.numbers(run), |q| d * (q - 32.0))
    }
}

impl IntegerBlock for Q6K {
    #[inline(always)]
    fn group(&self, group: usize, vectors: impl Vectors) -> Group {
        let runs = [2 * group, 2 * group + 1];
        let d = vectors.half(self.d);
        let scale = runs.map(|run| d * f32::from(self.scales[run].cast_signed()));
        unsigned(
            runs.map(|run| self.numbers(run)),
            scale,
            scale.map(|scale| -32.0 * scale),
        )
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

impl Iq4Xs {
    /// The scale of a group.
    #[inline(always)]
    fn scale(&self, group: usize, vectors: impl Vectors) -> f32 {
        let low = self.scales_l[group / 2] >> (group % 2 * 4) & 15;
        let high = (u16::from_le_bytes(self.scales_h) >> (2 * group) & 3) as u8;
        vectors.half(self.d) * (f32::from(low | high << 4) - 32.0)
    }
}

impl Block for Iq4Xs {
    const NAME: &'static str = "IQ4_XS";
    const LEN: usize = 256;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let (group, d) = (run / 2, self.scale(run / 2, vectors));
        vectors
            .at(&IQ4_VALUES, nibbles(sixteen(&self.qs, group), run % 2))
            .map(
                #[inline(always)]
                |value| d * value,
            )
    }
}

impl IntegerBlock for Iq4Xs {
    #[inline(always)]
    fn group(&self, group: usize, vectors: impl Vectors) -> Group {
        let qs = sixteen(&self.qs, group);
        let q = [0, 1].map(|run| nibbles(qs, run));
        signed(
            vectors.bytes_at(&IQ4_BYTES, bytemuck::cast(q)),
            [self.scale(group, vectors); 2],
        )
    }
}
