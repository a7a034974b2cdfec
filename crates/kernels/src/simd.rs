//! Loops that use the widest vectors of the processor they run on.
//!
//! Code inside [`vectorize`] is compiled once for each level of the instruction set, and the best
//! that the processor has is chosen at run time; `target-cpu=native` is not needed. Everything that
//! is called inside must be inlined into it.
//!
//! Sums keep several lanes and add them in a fixed order, so the bits depend on the length and the
//! kind of processor alone.

use half::bf16;
use pulp::{Arch, Simd, WithSimd};

/// Runs a closure compiled for this processor's vectors.
#[inline(always)]
pub(crate) fn vectorize<R>(work: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(work)
}

/// Lanes that plain loops use for sums.
const LANES: usize = 16;

/// Σ a·b.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let [[sum]] = dots([a], [b]);
    sum
}

/// Products of each row of `a` with each row of `b`, all of one length.
pub(crate) fn dots<const I: usize, const J: usize>(
    a: [&[f32]; I],
    b: [&[f32]; J],
) -> [[f32; J]; I] {
    Arch::new().dispatch(Dots { a, b })
}

struct Dots<'a, const I: usize, const J: usize> {
    a: [&'a [f32]; I],
    b: [&'a [f32]; J],
}

impl<const I: usize, const J: usize> WithSimd for Dots<'_, I, J> {
    type Output = [[f32; J]; I];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let len = self.a[0].len();
        let a = self.a.map(|row| S::as_simd_f32s(&row[..len]));
        let b = self.b.map(|row| S::as_simd_f32s(&row[..len]));
        let vectors = a[0].0.len();
        let tail = a[0].1.len();
        let mut sums = [[simd.splat_f32s(0.0); J]; I];
        let heads = a.map(|row| &row.0[..vectors]);
        let others = b.map(|row| &row.0[..vectors]);
        for k in 0..vectors {
            let b = others.map(|row| row[k]);
            for i in 0..I {
                for j in 0..J {
                    sums[i][j] = simd.mul_add_e_f32s(heads[i][k], b[j], sums[i][j]);
                }
            }
        }
        let mut out = [[0.0; J]; I];
        for i in 0..I {
            for j in 0..J {
                let mut sum = simd.reduce_sum_f32s(sums[i][j]);
                for k in 0..tail {
                    sum += a[i].1[k] * b[j].1[k];
                }
                out[i][j] = sum;
            }
        }
        out
    }
}

/// Widens bf16 to f32.
pub(crate) fn widen(to: &mut [f32], from: &[bf16]) {
    vectorize(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                *to = f32::from_bits(u32::from(from.to_bits()) << 16);
            }
        },
    );
}

/// Adds in lanes, then the lanes pairwise, then what is left over.
#[inline(always)]
pub(crate) fn lane_sum(len: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    let mut sum = lanes[0];
    for i in whole..len {
        sum += term(i);
    }
    sum
}

/// The largest number; `-inf` if there is none, NaN if one is NaN.
#[inline(always)]
pub(crate) fn lane_max(x: &[f32]) -> f32 {
    // `if !(a >= b) { b }` keeps a NaN of either side.
    let keep = |a: f32, b: f32| if a >= b || a.is_nan() { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = keep(*lane, x);
        }
    }
    let mut max = lanes[0];
    for &x in lanes[1..].iter().chain(chunks.remainder()) {
        max = keep(max, x);
    }
    max
}

/// eˣ with a relative error of about 1e-7: 0 below -86.6, infinity above 88.7, NaN for NaN.
///
/// Without branches or calls, so that loops over it become vector code.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOW: f32 = -86.6;
    const HIGH: f32 = 89.0;
    // Adding and taking away 1.5·2²³ rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; products of the first with integers up to 2¹⁰ are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;

    // These comparisons are false for NaN, which so goes through.
    let clamped = if x > HIGH { HIGH } else { x };
    let clamped = if clamped < LOW { LOW } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    // Taylor's polynomial with its last terms bent to spread the error over |r| <= ln2 / 2.
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    // 2ⁿ⁻¹ and then 2, because 2¹²⁸ is not an f32.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(126) << 23);
    let scaled = y * power * 2.0;
    if x < LOW { 0.0 } else { scaled }
}

/// y += x.
pub(crate) fn add(y: &mut [f32], x: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (y, x) in y.iter_mut().zip(x) {
                *y += x;
            }
        },
    );
}

/// y += a·x.
pub(crate) fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (y, x) in y.iter_mut().zip(x) {
                *y += a * x;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0.0_f64;
        for i in -86_500..=88_700 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        // One unit in the last place is at most 1.2e-7.
        assert!(worst < 2.4e-7, "relative error {worst}");
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn exp_has_its_limits() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(-90.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(1e30), f32::INFINITY);
        assert_eq!(exp(89.5), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for len in [0, 1, 15, 16, 17, 40] {
            let x: Vec<f32> = (0..len).map(|i| (i * 7 % 5) as f32 - 9.0).collect();
            assert_eq!(lane_sum(len, |i| x[i]), x.iter().sum::<f32>());
            let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(lane_max(&x), max);
            for at in 0..len {
                let mut x = x.clone();
                x[at] = f32::NAN;
                assert!(lane_max(&x).is_nan());
            }
        }
    }

    #[test]
    fn widening_is_exact() {
        let numbers: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut wide = vec![0.0; numbers.len()];
        widen(&mut wide, &numbers);
        for (wide, number) in wide.iter().zip(&numbers) {
            assert!(wide.to_bits() == number.to_f32().to_bits() || number.is_nan());
        }
    }
}
