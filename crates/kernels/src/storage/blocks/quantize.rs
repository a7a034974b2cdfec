//! Numbers to blocks, as llama.cpp makes them without an importance matrix.
//!
//! Each quantizer does the f32 operations of ggml's `quantize_row_*_ref` in their order, each rounded by itself, so that its blocks have the
//! bits of a ggml whose compiler does not fuse products and sums. On x86-64 that is how ggml's base library is built: the quantizers are in
//! a part of it that is compiled for processors without FMA. On Arm compilers fuse, and the last bits of the search for a scale may differ
//! from these.
//!
//! The parts of a block with scales of their own are fitted together, side by side in vectors. A part's sums keep their order.

use super::k_quants::{Q4K, Q6K};
use super::plain::{Q4_0, Q5_0, Q8_0};
use super::{Block, RUN};
use crate::cpu::simd::dispatch;
use crate::storage::f16::{self, rounded};
use bytemuck::Zeroable;
use pulp::{Simd, WithSimd};

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
fn largest(numbers: &[f32]) -> f32 {
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
    let shifted = x + 12_582_912.0;
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
        let (low, high) = numbers.split_at(16);
        let q = |x: &f32| (truncated(x * factor + 16.5) as i8).min(31).cast_unsigned();
        let mut fifth_bits = 0_u32;
        for (i, (low, high)) in low.iter().zip(high).enumerate() {
            let (low, high) = (q(low), q(high));
            block.qs[i] = low & 15 | high << 4;
            fifth_bits |= u32::from(low >> 4 & 1) << i | u32::from(high >> 4 & 1) << (i + 16);
        }
        block.qh = fifth_bits.to_le_bytes();
        Some(block)
    }
}

/// Numbers of a block with a part in each column.
#[inline(always)]
fn columns<const LEN: usize, const PARTS: usize>(numbers: &[f32]) -> [[f32; PARTS]; LEN] {
    std::array::from_fn(
        #[inline(always)]
        |i| {
            std::array::from_fn(
                #[inline(always)]
                |part| numbers[part * LEN + i],
            )
        },
    )
}

/// Parts of a Q4_K block, and numbers of a part.
const Q4K_PARTS: usize = 8;
const Q4K_LEN: usize = 32;
type Eight = [f32; Q4K_PARTS];

/// Numbers x ≈ scale · q - min of each part, q from 0 to 15.
struct WithMinimum {
    scale: Eight,
    min: Eight,
    q: [[i32; Q4K_PARTS]; Q4K_LEN],
}

/// [`fit_with_minimum`], to be compiled for vectors.
struct FitWithMinimum<'a>(&'a [Eight; Q4K_LEN]);

impl WithSimd for FitWithMinimum<'_> {
    type Output = WithMinimum;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> WithMinimum {
        fit_with_minimum(self.0)
    }
}

/// ggml's `make_qkx2_quants` with the weights of Q4_K: of 21 divisions of the range the one whose least squares are least.
#[inline(always)]
fn fit_with_minimum(x: &[Eight; Q4K_LEN]) -> WithMinimum {
    let weights = Weights::of(x);
    let (mut low, mut high) = (x[0], x[0]);
    for x in x {
        for p in 0..Q4K_PARTS {
            low[p] = if x[p] < low[p] { x[p] } else { low[p] };
            high[p] = if x[p] > high[p] { x[p] } else { high[p] };
        }
    }
    let low = low.map(|low| if low > 0.0 { 0.0 } else { low });
    let mut min = low;

    let mut q = [[0; Q4K_PARTS]; Q4K_LEN];
    let (mut scale, mut least) = ([0.0_f32; Q4K_PARTS], [0.0_f32; Q4K_PARTS]);
    let factor: Eight = std::array::from_fn(|p| 15.0 / (high[p] - min[p]));
    for p in 0..Q4K_PARTS {
        scale[p] = 1.0 / factor[p];
    }
    for ((q, x), w) in q.iter_mut().zip(x).zip(&weights.each) {
        for p in 0..Q4K_PARTS {
            q[p] = nearest(factor[p] * (x[p] - min[p])).clamp(0, 15);
            let off = scale[p] * q[p] as f32 + min[p] - x[p];
            least[p] += w[p] * (off * off);
        }
    }
    for step in 0..=20 {
        let range = -1.0 + 0.1 * step as f32 + 15.0;
        let factor = std::array::from_fn(|p| range / (high[p] - min[p]));
        let tried = Division::of(x, &weights, &min, &factor);
        // All ones where the division is better than those before.
        let better: [i32; Q4K_PARTS] =
            std::array::from_fn(|p| -i32::from(tried.error[p] < least[p]));
        for (q, tried) in q.iter_mut().zip(&tried.q) {
            for p in 0..Q4K_PARTS {
                q[p] = tried[p] & better[p] | q[p] & !better[p];
            }
        }
        for p in 0..Q4K_PARTS {
            if better[p] != 0 {
                (least[p], scale[p], min[p]) = (tried.error[p], tried.scale[p], tried.min[p]);
            }
        }
    }
    for p in (0..Q4K_PARTS).filter(|p| high[*p] == low[*p]) {
        (scale[p], min[p]) = (0.0, low[p]);
        for q in &mut q {
            q[p] = 0;
        }
    }
    WithMinimum {
        scale,
        min: min.map(|min| -min),
        q,
    }
}

/// What an error of a number counts, and sums over each part.
struct Weights {
    each: [Eight; Q4K_LEN],
    sum: Eight,
    sum_x: Eight,
}

impl Weights {
    /// The numbers' magnitudes, and their mean square's root.
    #[inline(always)]
    fn of(x: &[Eight; Q4K_LEN]) -> Self {
        let mut squares = [0.0_f32; Q4K_PARTS];
        for x in x {
            for p in 0..Q4K_PARTS {
                squares[p] += x[p] * x[p];
            }
        }
        let size = squares.map(|sum| (sum / 32.0).sqrt());
        let mut weights = Self {
            each: [[0.0; Q4K_PARTS]; Q4K_LEN],
            sum: [0.0; Q4K_PARTS],
            sum_x: [0.0; Q4K_PARTS],
        };
        for (w, x) in weights.each.iter_mut().zip(x) {
            for p in 0..Q4K_PARTS {
                w[p] = size[p] + x[p].abs();
                weights.sum[p] += w[p];
                weights.sum_x[p] += w[p] * x[p];
            }
        }
        weights
    }
}

/// Integers of a division, and the scale and minimum that suit them best.
struct Division {
    q: [[i32; Q4K_PARTS]; Q4K_LEN],
    scale: Eight,
    min: Eight,
    /// The weighted squares of what is off; infinite where the integers define no scale.
    error: Eight,
}

impl Division {
    #[inline(always)]
    fn of(x: &[Eight; Q4K_LEN], weights: &Weights, from: &Eight, factor: &Eight) -> Self {
        let mut q = [[0; Q4K_PARTS]; Q4K_LEN];
        let (mut sum_q, mut sum_qq, mut sum_xq) = (
            [0.0_f32; Q4K_PARTS],
            [0.0_f32; Q4K_PARTS],
            [0.0_f32; Q4K_PARTS],
        );
        for ((q, x), w) in q.iter_mut().zip(x).zip(&weights.each) {
            for p in 0..Q4K_PARTS {
                q[p] = nearest(factor[p] * (x[p] - from[p])).clamp(0, 15);
                let wq = w[p] * q[p] as f32;
                sum_q[p] += wq;
                sum_qq[p] += wq * q[p] as f32;
                sum_xq[p] += wq * x[p];
            }
        }
        let (mut scale, mut min) = ([0.0_f32; Q4K_PARTS], [0.0_f32; Q4K_PARTS]);
        let mut defined = [false; Q4K_PARTS];
        for p in 0..Q4K_PARTS {
            let (sum_w, sum_x) = (weights.sum[p], weights.sum_x[p]);
            let determinant = sum_w * sum_qq[p] - sum_q[p] * sum_q[p];
            defined[p] = determinant > 0.0;
            let with_min = (sum_w * sum_xq[p] - sum_x * sum_q[p]) / determinant;
            let offset = (sum_qq[p] * sum_x - sum_q[p] * sum_xq[p]) / determinant;
            let positive = offset > 0.0;
            scale[p] = if positive {
                sum_xq[p] / sum_qq[p]
            } else {
                with_min
            };
            min[p] = if positive { 0.0 } else { offset };
        }
        let mut error = [0.0_f32; Q4K_PARTS];
        for ((q, x), w) in q.iter().zip(x).zip(&weights.each) {
            for p in 0..Q4K_PARTS {
                let off = scale[p] * q[p] as f32 + min[p] - x[p];
                error[p] += w[p] * (off * off);
            }
        }
        for p in 0..Q4K_PARTS {
            error[p] = if defined[p] { error[p] } else { f32::INFINITY };
        }
        Self {
            q,
            scale,
            min,
            error,
        }
    }
}

impl Quantize for Q4K {
    /// `quantize_row_q4_K_ref`.
    fn quantized(numbers: &[f32]) -> Option<Self> {
        let WithMinimum { scale, min, q } = dispatch(FitWithMinimum(&columns(numbers)));
        if !scale.iter().chain(&min).all(|x| x.is_finite()) {
            return None;
        }
        // Not `f32::max`, which may take -0.
        let most = |of: &Eight| of.iter().fold(0.0, |m, x| if *x > m { *x } else { m });
        let (max_scale, max_min) = (most(&scale), most(&min));
        let six_bits = |x: f32, most: f32| {
            let factor = if most > 0.0 { 63.0 / most } else { 0.0 };
            (nearest(factor * x) as u8).min(63)
        };
        let (d, dmin) = (rounded(max_scale / 63.0)?, rounded(max_min / 63.0)?);
        let mut block = Self::zeroed();
        (block.d, block.dmin) = (d, dmin);
        let mut nibbles = [0_u8; 256];
        for part in 0..Q4K_PARTS {
            let of_scale = six_bits(scale[part], max_scale);
            let of_min = six_bits(min[part], max_min);
            block.set_scale_and_min(part, of_scale, of_min);
            let step = wide(d) * f32::from(of_scale);
            let offset = wide(dmin) * f32::from(of_min);
            let range = part * Q4K_LEN..(part + 1) * Q4K_LEN;
            let to = nibbles[range.clone()].iter_mut();
            for (i, (to, x)) in to.zip(&numbers[range]).enumerate() {
                *to = if step == 0.0 {
                    q[i][part]
                } else {
                    nearest((x + offset) / step).clamp(0, 15)
                } as u8;
            }
        }
        for (to, from) in block.qs.chunks_exact_mut(32).zip(nibbles.chunks_exact(64)) {
            for (i, to) in to.iter_mut().enumerate() {
                *to = from[i] | from[i + 32] << 4;
            }
        }
        Some(block)
    }
}

/// Parts of a Q6_K block, as many as a part has numbers.
const Q6K_PARTS: usize = 16;
type Sixteen = [f32; Q6K_PARTS];

/// ggml's `GROUP_MAX_EPS`: magnitudes that count as zero.
const NOTHING: f32 = 1e-15;

/// Numbers x ≈ scale · (q - 32) of each part, q from 0 to 63.
struct Symmetric {
    scale: Sixteen,
    q: [[i32; Q6K_PARTS]; RUN],
}

/// [`fit_symmetric`], to be compiled for vectors.
struct FitSymmetric<'a>(&'a [Sixteen; RUN]);

impl WithSimd for FitSymmetric<'_> {
    type Output = Symmetric;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Symmetric {
        fit_symmetric(self.0)
    }
}

/// ggml's `make_qx_quants` with squares as weights: of 19 scales about the one of the largest number, that whose least squares are least.
#[inline(always)]
fn fit_symmetric(x: &[Sixteen; RUN]) -> Symmetric {
    let mut largest = [0.0_f32; Q6K_PARTS];
    for x in x {
        for p in 0..Q6K_PARTS {
            if x[p].abs() > largest[p].abs() {
                largest[p] = x[p];
            }
        }
    }
    let mut q = [[0; Q6K_PARTS]; RUN];
    let (mut scale, mut best) = ([0.0_f32; Q6K_PARTS], [0.0_f32; Q6K_PARTS]);
    // The scale of the largest number itself comes first.
    for step in std::iter::once(0).chain(-9..=-1).chain(1..=9) {
        let range = -(32.0 + 0.1 * step as f32);
        let factor = largest.map(|largest| range / largest);
        let mut tried = [[0; Q6K_PARTS]; RUN];
        let (mut sum_xq, mut sum_qq) = ([0.0_f32; Q6K_PARTS], [0.0_f32; Q6K_PARTS]);
        for (tried, x) in tried.iter_mut().zip(x) {
            for p in 0..Q6K_PARTS {
                let signed = nearest(factor[p] * x[p]).clamp(-32, 31);
                tried[p] = signed + 32;
                let (w, q) = (x[p] * x[p], signed as f32);
                sum_xq[p] += w * x[p] * q;
                sum_qq[p] += w * q * q;
            }
        }
        let better: [i32; Q6K_PARTS] = std::array::from_fn(|p| {
            let positive = sum_qq[p] > 0.0;
            let closer = sum_xq[p] * sum_xq[p] > best[p] * sum_qq[p];
            -i32::from(step == 0 || positive & closer)
        });
        for (q, tried) in q.iter_mut().zip(&tried) {
            for p in 0..Q6K_PARTS {
                q[p] = tried[p] & better[p] | q[p] & !better[p];
            }
        }
        for p in 0..Q6K_PARTS {
            if better[p] != 0 {
                let nothing = sum_qq[p] == 0.0;
                scale[p] = if nothing { 0.0 } else { sum_xq[p] / sum_qq[p] };
                best[p] = scale[p] * sum_xq[p];
            }
        }
    }
    for p in (0..Q6K_PARTS).filter(|p| largest[*p].abs() < NOTHING) {
        scale[p] = 0.0;
        for q in &mut q {
            q[p] = 0;
        }
    }
    Symmetric { scale, q }
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
                    q[i][part]
                } else {
                    nearest(x / step).clamp(-32, 31) + 32
                } as u8;
            }
        }
        block.set_numbers(&sixes);
        Some(block)
    }
}
