//! Blocks of 32 numbers with one scale, or a scale and an offset, in half precision.

use bytemuck::{Pod, Zeroable};

use super::vectors::Vectors;
use super::{Block, GROUP, Group, IntegerBlock, Quants, RUN, sixteen};

/// The values of IQ4_NL and IQ4_XS.
pub(super) const IQ4_BYTES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// The same as floats.
pub(super) const IQ4_VALUES: [f32; 16] = {
    let (mut values, mut i) = ([0.0; 16], 0);
    while i < 16 {
        values[i] = IQ4_BYTES[i] as f32;
        i += 1;
    }
    values
};

/// The four low bits of each byte for the first run, the four high ones for the second.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8; RUN], run: usize) -> [u8; RUN] {
    let shift = 4 * run as u32;
    bytes.map(
        #[inline(always)]
        |byte| byte >> shift & 15,
    )
}

/// As [`nibbles`], with a fifth bit for each number.
#[inline(always)]
fn fives(fifth: [u8; 4], bytes: &[u8; RUN], run: usize) -> [u8; RUN] {
    let fifth = u32::from_le_bytes(fifth) >> (RUN * run);
    let low = nibbles(bytes, run);
    std::array::from_fn(
        #[inline(always)]
        |i| low[i] | (fifth >> i << 4 & 16) as u8,
    )
}

/// Integers from 0 on of two runs.
#[inline(always)]
pub(super) fn unsigned(q: [[u8; RUN]; 2], scale: [f32; 2], offset: [f32; 2]) -> Group {
    Group {
        q: Quants::Unsigned(bytemuck::cast(q)),
        scale,
        offset,
    }
}

/// Integers around 0.
#[inline(always)]
pub(super) fn signed(q: [i8; GROUP], scale: [f32; 2]) -> Group {
    Group {
        q: Quants::Signed(q),
        scale,
        offset: [0.0; 2],
    }
}

/// Each number as an f32.
#[inline(always)]
pub(super) fn each(numbers: [u8; RUN], value: impl Fn(f32) -> f32) -> [f32; RUN] {
    numbers.map(
        #[inline(always)]
        |q| value(f32::from(q)),
    )
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4_0 {
    pub(super) d: [u8; 2],
    pub(super) qs: [u8; 16],
}

impl Block for Q4_0 {
    const NAME: &'static str = "Q4_0";
    const LEN: usize = 32;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let d = vectors.half(self.d);
        each(nibbles(&self.qs, run), |q| d * (q - 8.0))
    }
}

impl IntegerBlock for Q4_0 {
    #[inline(always)]
    fn group(&self, _: usize, vectors: impl Vectors) -> Group {
        let d = vectors.half(self.d);
        unsigned(
            [nibbles(&self.qs, 0), nibbles(&self.qs, 1)],
            [d; 2],
            [-8.0 * d; 2],
        )
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4_1 {
    d: [u8; 2],
    m: [u8; 2],
    qs: [u8; 16],
}

impl Block for Q4_1 {
    const NAME: &'static str = "Q4_1";
    const LEN: usize = 32;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let (d, m) = (vectors.half(self.d), vectors.half(self.m));
        each(nibbles(&self.qs, run), |q| d * q + m)
    }
}

impl IntegerBlock for Q4_1 {
    #[inline(always)]
    fn group(&self, _: usize, vectors: impl Vectors) -> Group {
        let (d, m) = (vectors.half(self.d), vectors.half(self.m));
        unsigned([nibbles(&self.qs, 0), nibbles(&self.qs, 1)], [d; 2], [m; 2])
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5_0 {
    pub(super) d: [u8; 2],
    pub(super) qh: [u8; 4],
    pub(super) qs: [u8; 16],
}

impl Block for Q5_0 {
    const NAME: &'static str = "Q5_0";
    const LEN: usize = 32;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let d = vectors.half(self.d);
        each(fives(self.qh, &self.qs, run), |q| d * (q - 16.0))
    }
}

impl IntegerBlock for Q5_0 {
    #[inline(always)]
    fn group(&self, _: usize, vectors: impl Vectors) -> Group {
        let d = vectors.half(self.d);
        let q = [0, 1].map(|run| fives(self.qh, &self.qs, run));
        unsigned(q, [d; 2], [-16.0 * d; 2])
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5_1 {
    d: [u8; 2],
    m: [u8; 2],
    qh: [u8; 4],
    qs: [u8; 16],
}

impl Block for Q5_1 {
    const NAME: &'static str = "Q5_1";
    const LEN: usize = 32;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let (d, m) = (vectors.half(self.d), vectors.half(self.m));
        each(fives(self.qh, &self.qs, run), |q| d * q + m)
    }
}

impl IntegerBlock for Q5_1 {
    #[inline(always)]
    fn group(&self, _: usize, vectors: impl Vectors) -> Group {
        let (d, m) = (vectors.half(self.d), vectors.half(self.m));
        let q = [0, 1].map(|run| fives(self.qh, &self.qs, run));
        unsigned(q, [d; 2], [m; 2])
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q8_0 {
    pub(super) d: [u8; 2],
    pub(super) qs: [u8; 32],
}

impl Block for Q8_0 {
    const NAME: &'static str = "Q8_0";
    const LEN: usize = 32;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let d = vectors.half(self.d);
        sixteen(&self.qs, run).map(
            #[inline(always)]
            |q| f32::from(q.cast_signed()) * d,
        )
    }
}

impl IntegerBlock for Q8_0 {
    #[inline(always)]
    fn group(&self, _: usize, vectors: impl Vectors) -> Group {
        signed(bytemuck::cast(self.qs), [vectors.half(self.d); 2])
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Iq4Nl {
    d: [u8; 2],
    qs: [u8; 16],
}

impl Block for Iq4Nl {
    const NAME: &'static str = "IQ4_NL";
    const LEN: usize = 32;

    #[inline(always)]
    fn run(&self, run: usize, vectors: impl Vectors) -> [f32; RUN] {
        let d = vectors.half(self.d);
        vectors.at(&IQ4_VALUES, nibbles(&self.qs, run)).map(
            #[inline(always)]
            |value| d * value,
        )
    }
}

impl IntegerBlock for Iq4Nl {
    #[inline(always)]
    fn group(&self, _: usize, vectors: impl Vectors) -> Group {
        let q = [0, 1].map(|run| nibbles(&self.qs, run));
        signed(
            vectors.bytes_at(&IQ4_BYTES, bytemuck::cast(q)),
            [vectors.half(self.d); 2],
        )
    }
}
