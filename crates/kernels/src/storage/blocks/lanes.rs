//! f32 numbers side by side in a vector, and formulas of them.
//!
//! Each operation is rounded by itself: none is fused with another.

use std::ops::{Add, Div, Mul, Neg, Sub};

use pulp::Simd;

/// Numbers of a block whose parts stand in columns: number `i` of part `p` at `[i][p]`.
pub(super) type Columns<const LEN: usize, const PARTS: usize> = [[f32; PARTS]; LEN];

/// The columns of a block's numbers.
#[inline(always)]
pub(super) fn columns<const LEN: usize, const PARTS: usize>(
    numbers: &[f32],
) -> Columns<LEN, PARTS> {
    let mut columns = [[0.0; PARTS]; LEN];
    for (part, numbers) in numbers.chunks_exact(LEN).enumerate() {
        for (row, x) in columns.iter_mut().zip(numbers) {
            row[part] = *x;
        }
    }
    columns
}

/// A vector.
#[derive(Clone, Copy)]
pub(super) struct Lanes<S: Simd> {
    simd: S,
    x: S::f32s,
}

/// For each lane, whether something holds.
#[derive(Clone, Copy)]
pub(super) struct Choice<S: Simd> {
    simd: S,
    mask: S::m32s,
}

impl<S: Simd> Choice<S> {
    /// The one where it holds, the other elsewhere.
    #[inline(always)]
    pub(super) fn select(self, one: Lanes<S>, other: Lanes<S>) -> Lanes<S> {
        // pulp's own for f32 is not inlined everywhere.
        let selected = self.simd.select_u32s(self.mask, one.bits(), other.bits());
        one.with_bits(selected)
    }

    /// Whether both hold.
    #[inline(always)]
    pub(super) fn and(self, other: Self) -> Self {
        let mask = self.simd.and_m32s(self.mask, other.mask);
        Self { mask, ..self }
    }
}

impl<S: Simd> Lanes<S> {
    /// What makes vectors of a number.
    #[inline(always)]
    pub(super) fn of(simd: S) -> impl Fn(f32) -> Self + Copy {
        #[inline(always)]
        move |x| Self {
            simd,
            x: simd.splat_f32s(x),
        }
    }

    /// Some columns, from column `at` on.
    #[inline(always)]
    pub(super) fn columns<const LEN: usize, const PARTS: usize>(
        simd: S,
        columns: &Columns<LEN, PARTS>,
        at: usize,
    ) -> [Self; LEN] {
        let mut lanes = [Self::of(simd)(0.0); LEN];
        for (lanes, columns) in lanes.iter_mut().zip(columns) {
            let numbers = bytemuck::cast_slice(&columns[at..at + S::F32_LANES]);
            lanes.x = bytemuck::pod_read_unaligned(numbers);
        }
        lanes
    }

    /// Writes the first numbers.
    #[inline(always)]
    pub(super) fn store(self, to: &mut [f32]) {
        let numbers = bytemuck::cast_slice(std::slice::from_ref(&self.x));
        to[..S::F32_LANES].copy_from_slice(numbers);
    }

    #[inline(always)]
    fn with(self, x: S::f32s) -> Self {
        Self { x, ..self }
    }

    #[inline(always)]
    fn bits(self) -> S::u32s {
        self.simd.transmute_u32s_f32s(self.x)
    }

    #[inline(always)]
    fn with_bits(self, bits: S::u32s) -> Self {
        self.with(self.simd.transmute_f32s_u32s(bits))
    }

    /// This number in each lane.
    #[inline(always)]
    pub(super) fn same(self, x: f32) -> Self {
        self.with(self.simd.splat_f32s(x))
    }

    #[inline(always)]
    pub(super) fn abs(self) -> Self {
        let bits = self.simd.splat_u32s(0x7fff_ffff);
        self.with_bits(self.simd.and_u32s(self.bits(), bits))
    }

    #[inline(always)]
    pub(super) fn sqrt(self) -> Self {
        self.with(self.simd.sqrt_f32s(self.x))
    }

    /// Where a number is smaller than the other.
    #[inline(always)]
    pub(super) fn below(self, other: Self) -> Choice<S> {
        Choice {
            simd: self.simd,
            mask: self.simd.less_than_f32s(self.x, other.x),
        }
    }

    /// Where a number is the other.
    #[inline(always)]
    pub(super) fn equals(self, other: Self) -> Choice<S> {
        Choice {
            simd: self.simd,
            mask: self.simd.equal_f32s(self.x, other.x),
        }
    }

    /// [`nearest`](super::quantize) between bounds.
    #[inline(always)]
    pub(super) fn nearest(self, low: f32, high: f32) -> Self {
        let (simd, shift) = (self.simd, self.same(SHIFT));
        // Of a sum that is in another binade, or is none, the lower bits count alone.
        let bits = simd.and_u32s((self + shift).bits(), simd.splat_u32s(0x007f_ffff));
        let bits = simd.or_u32s(bits, simd.splat_u32s(0x4b00_0000));
        let shifted = self.with_bits(bits).x;
        let shifted = simd.max_f32s(shifted, simd.splat_f32s(SHIFT + low));
        let shifted = simd.min_f32s(shifted, simd.splat_f32s(SHIFT + high));
        self.with(shifted) - shift
    }
}

/// 1.5 · 2²³, whose sum with a number is the nearest integer with this on top.
pub(super) const SHIFT: f32 = 12_582_912.0;

macro_rules! operator {
    ($trait:ident, $name:ident, $operation:ident) => {
        impl<S: Simd> $trait for Lanes<S> {
            type Output = Self;

            #[inline(always)]
            fn $name(self, other: Self) -> Self {
                self.with(self.simd.$operation(self.x, other.x))
            }
        }
    };
}

operator!(Add, add, add_f32s);
operator!(Sub, sub, sub_f32s);
operator!(Mul, mul, mul_f32s);
operator!(Div, div, div_f32s);

impl<S: Simd> Neg for Lanes<S> {
    type Output = Self;

    #[inline(always)]
    fn neg(self) -> Self {
        let sign = self.simd.splat_u32s(0x8000_0000);
        self.with_bits(self.simd.xor_u32s(self.bits(), sign))
    }
}
