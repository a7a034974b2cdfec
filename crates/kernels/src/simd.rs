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

/// Lanes that sums use, a multiple of every vector's.
pub(crate) const LANES: usize = 16;

/// Σ a·b.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    Arch::new().dispatch(Dot { a, b })
}

struct Dot<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let [sum] = dots_with(simd, self.a, [self.b]);
        sum
    }
}

/// Products of a row with each of several others, all of one length.
#[inline(always)]
fn dots_with<S: Simd, const J: usize>(simd: S, a: &[f32], b: [&[f32]; J]) -> [f32; J] {
    let len = a.len();
    let (a, a_rest) = a.as_chunks::<LANES>();
    let b = b.map(|row| row[..len].as_chunks::<LANES>());
    let b_chunks = b.map(|row| &row.0[..a.len()]);
    let mut sums = [simd.splat_f32s(0.0); J];
    for k in 0..a.len() {
        let (a, _) = S::as_simd_f32s(&a[k]);
        for j in 0..J {
            let (b, _) = S::as_simd_f32s(&b_chunks[j][k]);
            for (&a, &b) in a.iter().zip(b) {
                sums[j] = simd.mul_add_e_f32s(a, b, sums[j]);
            }
        }
    }
    std::array::from_fn(|j| {
        let mut sum = simd.reduce_sum_f32s(sums[j]);
        for (a, b) in a_rest.iter().zip(b[j].1) {
            sum += a * b;
        }
        sum
    })
}

/// out[k] = a · row k of `b`, whose rows start `stride` apart.
pub(crate) fn dot_rows(out: &mut [f32], a: &[f32], b: &[f32], stride: usize) {
    Arch::new().dispatch(DotRows { out, a, b, stride });
}

struct DotRows<'a> {
    out: &'a mut [f32],
    a: &'a [f32],
    b: &'a [f32],
    stride: usize,
}

impl WithSimd for DotRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let row = |k: usize| &self.b[k * self.stride..][..self.a.len()];
        let (fours, rest) = self.out.as_chunks_mut::<4>();
        let done = 4 * fours.len();
        for (i, four) in fours.iter_mut().enumerate() {
            let rows = [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3].map(row);
            *four = dots_with(simd, self.a, rows);
        }
        for (i, out) in rest.iter_mut().enumerate() {
            [*out] = dots_with(simd, self.a, [row(done + i)]);
        }
    }
}

/// out += Σ over k of weights[k] · row k of `b`, whose rows start `stride` apart.
pub(crate) fn add_weighted_rows(out: &mut [f32], weights: &[f32], b: &[f32], stride: usize) {
    /// Numbers that stay in registers while the rows go by.
    const WIDTH: usize = 2 * LANES;
    vectorize(
        #[inline(always)]
        || {
            let (chunks, rest) = out.as_chunks_mut::<WIDTH>();
            let done = WIDTH * chunks.len();
            for (i, out) in chunks.iter_mut().enumerate() {
                let mut sums = *out;
                for (k, &weight) in weights.iter().enumerate() {
                    let row = &b[k * stride + i * WIDTH..][..WIDTH];
                    for (sum, x) in sums.iter_mut().zip(row) {
                        *sum += weight * x;
                    }
                }
                *out = sums;
            }
            for (k, &weight) in weights.iter().enumerate() {
                for (sum, x) in rest.iter_mut().zip(&b[k * stride + done..]) {
                    *sum += weight * x;
                }
            }
        },
    );
}

/// A bf16 is the upper half of an f32.
#[inline(always)]
pub(crate) fn wide(number: bf16) -> f32 {
    f32::from_bits(u32::from(number.to_bits()) << 16)
}

/// Widens bf16 to f32.
pub(crate) fn widen(to: &mut [f32], from: &[bf16]) {
    vectorize(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                *to = wide(*from);
            }
        },
    );
}

/// Widens a block of a matrix: rows of `width` numbers that start `stride` apart.
pub(crate) fn widen_rows(to: &mut [f32], width: usize, from: &[bf16], stride: usize) {
    vectorize(
        #[inline(always)]
        || {
            for (to, from) in to.chunks_exact_mut(width).zip(from.chunks(stride)) {
                for (to, from) in to.iter_mut().zip(&from[..width]) {
                    *to = wide(*from);
                }
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
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    // Taylor's polynomial with its last terms bent to spread the error over |r| <= ln2 / 2.
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = (p * r).mul_add(r, r + 1.0);
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

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        let small = |i: usize| (i * seed % 13) as f32 - 6.0;
        (0..len).map(small).collect()
    }

    /// Products of small integers are exact in whatever order they are added.
    fn exact(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn products_are_exact() {
        for len in [0, 1, 7, 15, 16, 17, 33, 100] {
            let (a, b) = (numbers(len, 3), numbers(len, 4));
            assert_eq!(dot(&a, &b), exact(&a, &b));
        }
    }

    #[test]
    fn rows_with_gaps_are_multiplied_and_added() {
        for (len, rows) in [(1, 1), (5, 3), (16, 4), (64, 9), (70, 6)] {
            let stride = len + 3;
            let a = numbers(len, 5);
            let b = numbers(stride * rows - 3, 7);
            let row = |k: usize| &b[k * stride..k * stride + len];
            let mut products = vec![9.0; rows];
            dot_rows(&mut products, &a, &b, stride);
            for k in 0..rows {
                assert_eq!(products[k], exact(&a, row(k)));
            }
            let weights = numbers(rows, 11);
            let mut sums = a.clone();
            add_weighted_rows(&mut sums, &weights, &b, stride);
            for i in 0..len {
                let column: Vec<f32> = (0..rows).map(|k| row(k)[i]).collect();
                assert_eq!(sums[i], a[i] + exact(&weights, &column));
            }
        }
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
        let mut block = [0.0; 6];
        widen_rows(&mut block, 3, &numbers[1000..1008], 5);
        let expected = [1000, 1001, 1002, 1005, 1006, 1007].map(|i| wide[i]);
        assert_eq!(block, expected);
    }
}
