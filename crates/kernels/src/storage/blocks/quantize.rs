//! Numbers to blocks, as llama.cpp makes them without an importance matrix.
//!
//! Each quantizer does the f32 operations of ggml's `quantize_row_*_ref` in their order, each rounded by itself. Its blocks have the bits of
//! ggml where the compiler does not fuse products and sums. On x86-64 it does not: the quantizers are in ggml's base library, which is
//! compiled for any processor. Where it is compiled for one that fuses, as on Arm, another scale may win a search: with gcc 12 for x86-64 with
//! FMA, 4 % of the blocks of SmolLM2-135M are others in Q4_K, 0.3 % in Q6_K, 0.01 % in Q4_0 and none in Q8_0.
//!
//! The parts of a block that have a scale each are fitted side by side in vectors, and every sum keeps its order. So these bits are the same
//! on every processor.

use bytemuck::Zeroable;
use pulp::{Simd, WithSimd};

use super::k_quants::{Q4K, Q5K, Q6K, set_scale_and_min};
use super::lanes::{Columns, Lanes, SHIFT, columns};
use super::plain::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use super::{Block, RUN};
use crate::cpu::simd::dispatch;
use crate::storage::f16::{self, rounded};

/// A block that can be made of numbers.
pub(super) trait Quantize: Block {
    /// The block of [`Block::LEN`] finite numbers; nothing if a scale would not be finite.
    fn quantized(numbers: &[f32]) -> Option<Self>;
}

fn wide(half: [u8; 2]) -> f32 {
    f16::wide(u16::from_le_bytes(half))
}

/// The number with the largest magnitude, the first of them; zero if all are.
#[inline(always)]
pub(super) fn largest(numbers: &[f32]) -> f32 {
    let mut largest = 0.0_f32;
    for &x in numbers {
        if x.abs() > largest.abs() {
            largest = x;
        }
    }
    largest
}

/// 1/x, or zero for zero.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// A float's integer part as x86-64 makes it, whose low byte is zero where the number is none or is too large. C does not define those
/// cases; they are those of a block whose largest magnitude is below 2⁻¹²⁰, which is all zeros whatever its integers are.
#[inline(always)]
fn truncated(x: f32) -> i32 {
    if x.abs() < 2_147_483_648.0 {
        x as i32
    } else {
        i32::MIN
    }
}

/// The nearest integer, ties to even, of numbers below 2²². What it makes of others, ggml's does, too.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    let shifted = x + SHIFT;
    (shifted.to_bits() & 0x007f_ffff).cast_signed() - 0x0040_0000
}

impl Quantize for Q8_0 {
    /// `quantize_row_q8_0_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let scale = largest(numbers).abs() / 127.0;
        let factor = inverse(scale);
        let mut block = Self {
            d: rounded(scale)?,
            qs: [0; 32],
        };
        for (q, x) in block.qs.iter_mut().zip(numbers) {
            *q = truncated((x * factor).round()) as u8;
        }
        Some(block)
    }
}

impl Quantize for Q4_0 {
    /// `quantize_row_q4_0_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let scale = largest(numbers) / -8.0;
        let factor = inverse(scale);
        let mut block = Self {
            d: rounded(scale)?,
            qs: [0; 16],
        };
        let (low, high) = numbers.split_at(16);
        let q = |x: &f32| (truncated(x * factor + 8.5) as i8).min(15).cast_unsigned();
        for ((qs, low), high) in block.qs.iter_mut().zip(low).zip(high) {
            *qs = q(low) | q(high) << 4;
        }
        Some(block)
    }
}

impl Quantize for Q5_0 {
    /// `quantize_row_q5_0_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let scale = largest(numbers) / -16.0;
        let factor = inverse(scale);
        let mut block = Self {
            d: rounded(scale)?,
            ..Self::zeroed()
        };
        let q = |x: &f32| (truncated(x * factor + 16.5) as i8).min(31).cast_unsigned();
        (block.qs, block.qh) = five_bits(numbers, q);
        Some(block)
    }
}

/// The least number, and how much the largest is above it.
#[inline(always)]
fn range(numbers: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = (f32::MAX, f32::MIN);
    for &x in numbers {
        low = if x < low { x } else { low };
        high = if x > high { x } else { high };
    }
    (low, high - low)
}

impl Quantize for Q4_1 {
    /// `quantize_row_q4_1_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let (min, range) = range(numbers);
        let scale = range / 15.0;
        let factor = inverse(scale);
        let mut block = Self {
            d: rounded(scale)?,
            m: rounded(min)?,
            qs: [0; 16],
        };
        let (low, high) = numbers.split_at(16);
        let q = |x: &f32| {
            (truncated((x - min) * factor + 0.5) as i8)
                .min(15)
                .cast_unsigned()
        };
        for ((qs, low), high) in block.qs.iter_mut().zip(low).zip(high) {
            *qs = q(low) | q(high) << 4;
        }
        Some(block)
    }
}

impl Quantize for Q5_1 {
    /// `quantize_row_q5_1_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let (min, range) = range(numbers);
        let scale = range / 31.0;
        let factor = inverse(scale);
        let mut block = Self {
            d: rounded(scale)?,
            m: rounded(min)?,
            ..Self::zeroed()
        };
        let q = |x: &f32| truncated((x - min) * factor + 0.5) as u8;
        (block.qs, block.qh) = five_bits(numbers, q);
        Some(block)
    }
}

/// Integers of five bits: the lower four of the first 16 numbers beside those of the others, and the fifth bits in their order.
#[inline(always)]
fn five_bits(numbers: &[f32], q: impl Fn(&f32) -> u8) -> ([u8; 16], [u8; 4]) {
    let (low, high) = numbers.split_at(16);
    let (mut lower, mut fifths) = ([0; 16], 0_u32);
    for (i, (low, high)) in low.iter().zip(high).enumerate() {
        let (low, high) = (q(low), q(high));
        lower[i] = low & 15 | high << 4;
        fifths |= u32::from(low >> 4 & 1) << i | u32::from(high >> 4 & 1) << (i + 16);
    }
    (lower, fifths.to_le_bytes())
}

/// Parts of a block whose parts have a minimum each, and numbers of a part.
const MIN_PARTS: usize = 8;
const MIN_LEN: usize = 32;

/// Numbers x ≈ scale · q - min of each part.
struct WithMinimum {
    scale: [f32; MIN_PARTS],
    min: [f32; MIN_PARTS],
    q: Columns<MIN_LEN, MIN_PARTS>,
}

/// How a range is divided: q is from 0 to `most`, and so many divisions are tried, of a tenth of a step more each, from `most` + `first` steps
/// on.
#[derive(Clone, Copy)]
struct Divisions {
    most: f32,
    first: f32,
    tried: usize,
}

const OF_Q4K: Divisions = Divisions {
    most: 15.0,
    first: -1.0,
    tried: 21,
};
const OF_Q5K: Divisions = Divisions {
    most: 31.0,
    first: -0.5,
    tried: 16,
};

/// ggml's `make_qkx2_quants` with the weights of Q4_K and Q5_K.
struct FitWithMinimum<'a>(&'a Columns<MIN_LEN, MIN_PARTS>, Divisions);

impl WithSimd for FitWithMinimum<'_> {
    type Output = WithMinimum;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> WithMinimum {
        let mut fit = WithMinimum {
            scale: [0.0; MIN_PARTS],
            min: [0.0; MIN_PARTS],
            q: [[0.0; MIN_PARTS]; MIN_LEN],
        };
        for at in (0..MIN_PARTS).step_by(S::F32_LANES) {
            let (division, q) = best_division(simd, &Lanes::columns(simd, self.0, at), self.1);
            division.scale.store(&mut fit.scale[at..]);
            (-division.min).store(&mut fit.min[at..]);
            for (to, q) in fit.q.iter_mut().zip(&q) {
                q.store(&mut to[at..]);
            }
        }
        fit
    }
}

/// A scale and a minimum, and the weighted squares of what they leave.
#[derive(Clone, Copy)]
struct Division<S: Simd> {
    scale: Lanes<S>,
    min: Lanes<S>,
    error: Lanes<S>,
}

/// What an error of a number counts, and sums over the part.
struct Weights<S: Simd> {
    each: [Lanes<S>; MIN_LEN],
    sum: Lanes<S>,
    sum_x: Lanes<S>,
}

impl<S: Simd> Weights<S> {
    /// The numbers' magnitudes, and their mean square's root.
    #[inline(always)]
    fn of(simd: S, x: &[Lanes<S>; MIN_LEN]) -> Self {
        let lanes = Lanes::of(simd);
        let mut squares = lanes(0.0);
        for &x in x {
            squares = squares + x * x;
        }
        let size = (squares / lanes(32.0)).sqrt();
        let mut weights = Self {
            each: [size; MIN_LEN],
            sum: lanes(0.0),
            sum_x: lanes(0.0),
        };
        for (w, &x) in weights.each.iter_mut().zip(x) {
            *w = size + x.abs();
            weights.sum = weights.sum + *w;
            weights.sum_x = weights.sum_x + *w * x;
        }
        weights
    }

    /// The weighted squares of x - (scale · q + min).
    #[inline(always)]
    fn error(
        &self,
        x: &[Lanes<S>; MIN_LEN],
        q: &[Lanes<S>; MIN_LEN],
        scale: Lanes<S>,
        min: Lanes<S>,
    ) -> Lanes<S> {
        let mut sum = scale.same(0.0);
        for ((&x, &q), &w) in x.iter().zip(q).zip(&self.each) {
            let off = scale * q + min - x;
            sum = sum + w * (off * off);
        }
        sum
    }
}

/// Of some divisions of the range, and that into as many steps as there are, the one that leaves least; and its integers.
#[inline(always)]
fn best_division<S: Simd>(
    simd: S,
    x: &[Lanes<S>; MIN_LEN],
    divisions: Divisions,
) -> (Division<S>, [Lanes<S>; MIN_LEN]) {
    let Divisions { most, first, tried } = divisions;
    let lanes = Lanes::of(simd);
    let weights = Weights::of(simd, x);
    let (mut low, mut high) = (x[0], x[0]);
    for &x in x {
        low = x.below(low).select(x, low);
        high = high.below(x).select(x, high);
    }
    low = lanes(0.0).below(low).select(lanes(0.0), low);
    let factor = lanes(most) / (high - low);
    let mut q = [low; MIN_LEN];
    for (q, &x) in q.iter_mut().zip(x) {
        *q = (factor * (x - low)).nearest(0.0, most);
    }
    let scale = lanes(1.0) / factor;
    let mut best = Division {
        scale,
        min: low,
        error: weights.error(x, &q, scale, low),
    };
    for step in 0..tried {
        let range = lanes(first + 0.1 * step as f32 + most);
        let factor = range / (high - best.min);
        let (tried, integers) = division(x, &weights, best.min, factor, most);
        let better = tried.error.below(best.error);
        for (q, tried) in q.iter_mut().zip(&integers) {
            *q = better.select(*tried, *q);
        }
        best = Division {
            scale: better.select(tried.scale, best.scale),
            min: better.select(tried.min, best.min),
            error: better.select(tried.error, best.error),
        };
    }
    // Parts whose numbers are all the same.
    let several = low.below(high);
    best.scale = several.select(best.scale, lanes(0.0));
    best.min = several.select(best.min, low);
    for q in &mut q {
        *q = several.select(*q, lanes(0.0));
    }
    (best, q)
}

/// The integers of a division from `min` on, and the scale and minimum that suit them best. The error is infinite where the integers define
/// no scale.
#[inline(always)]
fn division<S: Simd>(
    x: &[Lanes<S>; MIN_LEN],
    weights: &Weights<S>,
    min: Lanes<S>,
    factor: Lanes<S>,
    most: f32,
) -> (Division<S>, [Lanes<S>; MIN_LEN]) {
    let zero = min.same(0.0);
    let mut integers = [zero; MIN_LEN];
    let (mut sum_q, mut sum_qq, mut sum_xq) = (zero, zero, zero);
    for ((to, &x), &w) in integers.iter_mut().zip(x).zip(&weights.each) {
        let q = (factor * (x - min)).nearest(0.0, most);
        *to = q;
        let wq = w * q;
        sum_q = sum_q + wq;
        sum_qq = sum_qq + wq * q;
        sum_xq = sum_xq + wq * x;
    }
    let determinant = weights.sum * sum_qq - sum_q * sum_q;
    let scale = (weights.sum * sum_xq - weights.sum_x * sum_q) / determinant;
    let offset = (sum_qq * weights.sum_x - sum_q * sum_xq) / determinant;
    let positive = zero.below(offset);
    let scale = positive.select(sum_xq / sum_qq, scale);
    let min = positive.select(zero, offset);
    let error = weights.error(x, &integers, scale, min);
    let error = zero
        .below(determinant)
        .select(error, zero.same(f32::INFINITY));
    (Division { scale, min, error }, integers)
}

/// What the blocks with minimums have: scale and minimum of the parts' own, those, and the integers.
struct InParts {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; 12],
    q: [u8; 256],
}

impl InParts {
    /// What `quantize_row_q4_K_ref` and `quantize_row_q5_K_ref` do but for the places of bits.
    fn of(numbers: &[f32], divisions: Divisions) -> Option<Self> {
        let WithMinimum { scale, min, q } = dispatch(FitWithMinimum(&columns(numbers), divisions));
        if !scale.iter().chain(&min).all(|x| x.is_finite()) {
            return None;
        }
        // Not `f32::max`, which may take -0.
        let most = |of: &[f32]| of.iter().fold(0.0, |m, x| if *x > m { *x } else { m });
        let (max_scale, max_min) = (most(&scale), most(&min));
        let six_bits = |x: f32, most: f32| {
            let factor = if most > 0.0 { 63.0 / most } else { 0.0 };
            (nearest(factor * x) as u8).min(63)
        };
        let mut made = Self {
            d: rounded(max_scale / 63.0)?,
            dmin: rounded(max_min / 63.0)?,
            scales: [0; 12],
            q: [0; 256],
        };
        for part in 0..MIN_PARTS {
            let of_scale = six_bits(scale[part], max_scale);
            let of_min = six_bits(min[part], max_min);
            set_scale_and_min(&mut made.scales, part, of_scale, of_min);
            let step = wide(made.d) * f32::from(of_scale);
            let offset = wide(made.dmin) * f32::from(of_min);
            let range = part * MIN_LEN..(part + 1) * MIN_LEN;
            let to = made.q[range.clone()].iter_mut();
            for (i, (to, x)) in to.zip(&numbers[range]).enumerate() {
                *to = if step == 0.0 {
                    q[i][part] as u8
                } else {
                    nearest((x + offset) / step).clamp(0, divisions.most as i32) as u8
                };
            }
        }
        Some(made)
    }

    /// The lower four bits, two parts beside each other.
    fn lower(&self) -> [u8; 128] {
        let mut lower = [0; 128];
        for (to, from) in lower.chunks_exact_mut(32).zip(self.q.chunks_exact(64)) {
            for (i, to) in to.iter_mut().enumerate() {
                *to = from[i] & 15 | from[i + 32] << 4;
            }
        }
        lower
    }
}

impl Quantize for Q4K {
    /// `quantize_row_q4_K_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let made = InParts::of(numbers, OF_Q4K)?;
        Some(Self {
            d: made.d,
            dmin: made.dmin,
            scales: made.scales,
            qs: made.lower(),
        })
    }
}

impl Quantize for Q5K {
    /// `quantize_row_q5_K_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let made = InParts::of(numbers, OF_Q5K)?;
        let mut qh = [0; 32];
        for (part, of_part) in made.q.chunks_exact(MIN_LEN).enumerate() {
            for (to, q) in qh.iter_mut().zip(of_part) {
                *to |= q >> 4 << part;
            }
        }
        Some(Self {
            d: made.d,
            dmin: made.dmin,
            scales: made.scales,
            qh,
            qs: made.lower(),
        })
    }
}

/// Parts of a Q6_K block, each of a run.
const Q6K_PARTS: usize = 16;

/// ggml's `GROUP_MAX_EPS`: magnitudes that count as zero.
const NOTHING: f32 = 1e-15;

/// Numbers x ≈ scale · (q - 32) of each part, q from 0 to 63.
struct Symmetric {
    scale: [f32; Q6K_PARTS],
    q: Columns<RUN, Q6K_PARTS>,
}

/// ggml's `make_qx_quants` with squares as weights.
struct FitSymmetric<'a>(&'a Columns<RUN, Q6K_PARTS>);

impl WithSimd for FitSymmetric<'_> {
    type Output = Symmetric;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Symmetric {
        let mut fit = Symmetric {
            scale: [0.0; Q6K_PARTS],
            q: [[0.0; Q6K_PARTS]; RUN],
        };
        for at in (0..Q6K_PARTS).step_by(S::F32_LANES) {
            let (scale, q) = best_scale(simd, &Lanes::columns(simd, self.0, at));
            scale.store(&mut fit.scale[at..]);
            for (to, q) in fit.q.iter_mut().zip(&q) {
                q.store(&mut to[at..]);
            }
        }
        fit
    }
}

/// Of 19 scales about that of the largest number, the one whose least squares are least; and its integers, 32 too large.
#[inline(always)]
fn best_scale<S: Simd>(simd: S, x: &[Lanes<S>; RUN]) -> (Lanes<S>, [Lanes<S>; RUN]) {
    let lanes = Lanes::of(simd);
    let zero = lanes(0.0);
    let mut largest = zero;
    for &x in x {
        largest = largest.abs().below(x.abs()).select(x, largest);
    }
    let mut q = [zero; RUN];
    let (mut scale, mut best) = (zero, zero);
    // The scale of the largest number itself comes first.
    for step in std::iter::once(0).chain(-9..=-1).chain(1..=9) {
        let factor = lanes(-(32.0 + 0.1 * step as f32)) / largest;
        let mut tried = [zero; RUN];
        let (mut sum_xq, mut sum_qq) = (zero, zero);
        for (to, &x) in tried.iter_mut().zip(x) {
            let signed = (factor * x).nearest(-32.0, 31.0);
            *to = signed + lanes(32.0);
            let w = x * x;
            sum_xq = sum_xq + w * x * signed;
            sum_qq = sum_qq + w * signed * signed;
        }
        let defined = zero.below(sum_qq);
        let this_scale = sum_qq.equals(zero).select(zero, sum_xq / sum_qq);
        let better = if step == 0 {
            zero.below(lanes(1.0))
        } else {
            defined.and((best * sum_qq).below(sum_xq * sum_xq))
        };
        for (q, tried) in q.iter_mut().zip(&tried) {
            *q = better.select(*tried, *q);
        }
        scale = better.select(this_scale, scale);
        best = better.select(this_scale * sum_xq, best);
    }
    let nothing = largest.abs().below(lanes(NOTHING));
    for q in &mut q {
        *q = nothing.select(zero, *q);
    }
    (nothing.select(zero, scale), q)
}

impl Quantize for Q6K {
    /// `quantize_row_q6_K_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let Symmetric { scale, q } = dispatch(FitSymmetric(&columns(numbers)));
        if !scale.iter().all(|x| x.is_finite()) {
            return None;
        }
        let mut block = Self::zeroed();
        let max_scale = largest(&scale);
        if max_scale.abs() < NOTHING {
            return Some(block);
        }
        let factor = -128.0 / max_scale;
        block.d = rounded(1.0 / factor)?;
        let mut sixes = [0_u8; 256];
        for part in 0..Q6K_PARTS {
            let of_part = nearest(factor * scale[part]).min(127) as i8;
            block.scales[part] = of_part.cast_unsigned();
            let step = wide(block.d) * f32::from(of_part);
            let range = part * RUN..(part + 1) * RUN;
            let to = sixes[range.clone()].iter_mut();
            for (i, (to, x)) in to.zip(&numbers[range]).enumerate() {
                *to = if step == 0.0 {
                    q[i][part] as u8
                } else {
                    (nearest(x / step).clamp(-32, 31) + 32) as u8
                };
            }
        }
        block.set_numbers(&sixes);
        Some(block)
    }
}
