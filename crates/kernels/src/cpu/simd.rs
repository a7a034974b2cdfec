//! Loops that use the widest vectors of the processor they run on.
//!
//! Code inside [`vectorize`] is compiled once for each level of the instruction set, and the best
//! that the processor has is chosen at run time; `target-cpu=native` is not needed. Everything that
//! is called inside must be inlined into it.
//!
//! Sums keep several lanes and add them in a fixed order, so the bits depend on the length and the
//! kind of processor alone.

use std::ops::Range;

use half::bf16;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
use pulp::Arch;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use pulp::Scalar;
#[cfg(target_arch = "aarch64")]
use pulp::aarch64::Neon as Vectors;
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3 as Vectors, V4};
use pulp::{Simd, WithSimd};

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::cpu::engine::{Engine, engine};

/// Runs a closure compiled for this processor's vectors.
#[inline(always)]
pub(crate) fn vectorize<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = V4::try_new().filter(|_| engine() >= Engine::Avx512) {
        return Simd::vectorize(simd, work);
    }
    dispatch(work)
}

/// Runs an operation compiled for this processor's vectors: those of NEON, or of AVX2 at most. What is generic in its vectors is large; of
/// that only [`rows`](crate::cpu::product::rows) is compiled for AVX-512, too.
#[inline(always)]
pub(crate) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    match Vectors::try_new().filter(|_| engine() != Engine::Portable) {
        Some(simd) => Simd::vectorize(simd, op),
        None => op.with_simd(Scalar),
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Arch::new().dispatch(op)
}

/// Lanes that sums use, a multiple of every vector's.
pub(crate) const LANES: usize = 16;

/// Asks for a cache line that will be read soon; there need not be anything at the address.
#[inline(always)]
pub(crate) fn fetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        #[expect(unsafe_code, reason = "a hint to the processor")]
        // SAFETY: a prefetch reads nothing, and has no effect on memory whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(address.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// out[h] += Σ over k of weights[h][k] · row k of `b`, for heads h of `size` numbers.
///
/// The rows of `b` start `stride` apart and are added in their order.
pub(crate) fn add_weighted_rows(
    out: &mut [f32],
    size: usize,
    weights: Weights<'_>,
    b: &[f32],
    stride: usize,
) {
    dispatch(AddWeightedRows {
        out,
        size,
        weights,
        b,
        stride,
    });
}

/// Weights of some rows for several heads.
pub(crate) struct Weights<'a> {
    /// Those of the first head, of the second, and so on.
    pub(crate) all: &'a [f32],
    /// How many a head has in `all`.
    pub(crate) of_head: usize,
    /// Which of them are meant.
    pub(crate) rows: Range<usize>,
}

impl Weights<'_> {
    #[inline(always)]
    fn head(&self, head: usize) -> &[f32] {
        &self.all[head * self.of_head..][self.rows.clone()]
    }
}

struct AddWeightedRows<'a> {
    out: &'a mut [f32],
    size: usize,
    weights: Weights<'a>,
    b: &'a [f32],
    stride: usize,
}

impl WithSimd for AddWeightedRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let weights = &self.weights;
        let (pairs, last) = self
            .out
            .split_at_mut(self.out.len() / self.size / 2 * 2 * self.size);
        let mut head = 0;
        for pair in pairs.chunks_exact_mut(2 * self.size) {
            let (first, second) = pair.split_at_mut(self.size);
            let weights = [weights.head(head), weights.head(head + 1)];
            weighted(simd, [first, second], weights, self.b, self.stride);
            head += 2;
        }
        if !last.is_empty() {
            weighted(simd, [last], [weights.head(head)], self.b, self.stride);
        }
    }
}

/// For `G` heads, whose sums stay in registers while the rows go by.
#[inline(always)]
fn weighted<S: Simd, const G: usize>(
    simd: S,
    mut out: [&mut [f32]; G],
    weights: [&[f32]; G],
    b: &[f32],
    stride: usize,
) {
    /// Vectors of each head that are summed at once.
    const VECTORS: usize = 4;
    let size = out[0].len();
    let rows = || b.chunks(stride).map(|row| &row[..size]).enumerate();
    let lanes = S::F32_LANES;
    let vectors = size / lanes;
    let blocks = vectors / VECTORS;
    for block in 0..blocks {
        let at = block * VECTORS * lanes..(block + 1) * VECTORS * lanes;
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; G];
        for (k, row) in rows() {
            let row = S::as_simd_f32s(&row[at.clone()]).0;
            let row: [S::f32s; VECTORS] = std::array::from_fn(
                #[inline(always)]
                |v| row[v],
            );
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let weight = simd.splat_f32s(weights[k]);
                for (sum, &x) in sums.iter_mut().zip(&row) {
                    *sum = simd.mul_add_e_f32s(weight, x, *sum);
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            let out = S::as_mut_simd_f32s(&mut out[at.clone()]).0;
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = simd.add_f32s(*out, sum);
            }
        }
    }
    let done = blocks * VECTORS * lanes;
    if done < size {
        for (k, row) in rows() {
            for (out, weights) in out.iter_mut().zip(weights) {
                for (out, x) in out[done..].iter_mut().zip(&row[done..]) {
                    *out += weights[k] * x;
                }
            }
        }
    }
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

/// Rounds f32 to the nearest bf16, ties to even; NaN stays NaN.
pub(crate) fn narrow(to: &mut [bf16], from: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                let bits = from.to_bits();
                let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
                // The low bits alone could hold what makes it a NaN.
                let nan = bits >> 16 | 0x40;
                *to = bf16::from_bits(if from.is_nan() { nan } else { rounded } as u16);
            }
        },
    );
}

/// Σ term(x, y, …) over the numbers of rows of one length: added in lanes, then the lanes pairwise, then what is left over.
#[inline(always)]
pub(crate) fn lane_sum<const N: usize>(rows: [&[f32]; N], term: impl Fn([f32; N]) -> f32) -> f32 {
    let len = rows[0].len();
    let rows = rows.map(
        #[inline(always)]
        |row| row[..len].as_chunks::<LANES>(),
    );
    let mut lanes = [0.0_f32; LANES];
    for block in 0..len / LANES {
        let blocks: [&[f32; LANES]; N] = std::array::from_fn(
            #[inline(always)]
            |n| &rows[n].0[block],
        );
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(std::array::from_fn(
                #[inline(always)]
                |n| blocks[n][lane],
            ));
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
    for i in 0..len % LANES {
        sum += term(std::array::from_fn(
            #[inline(always)]
            |n| rows[n].1[i],
        ));
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

/// tanh(x), to about two units in the last place: a polynomial (Cephes) near zero, and beyond it 1 - 2 / (exp(2|x|) + 1).
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    let mut sum = -5.704_988_7e-3_f32;
    for factor in [
        2.063_908_8e-2,
        -5.373_971_6e-2,
        1.333_144_2e-1,
        -0.333_332_8,
    ] {
        sum = sum * square + factor;
    }
    let near = x + x * square * sum;
    let far = (1.0 - 2.0 / (exp(2.0 * size) + 1.0)).copysign(x);
    if size < 0.625 { near } else { far }
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
    fn tanh_is_close_everywhere() {
        for i in -40_000..40_000 {
            let x = i as f32 * 3e-4;
            let expected = f64::from(x).tanh();
            let off = (f64::from(tanh(x)) - expected).abs();
            assert!(
                off <= 2.5e-7 * expected.abs(),
                "tanh({x}) is off by {off:e}"
            );
        }
        assert_eq!(tanh(f32::INFINITY), 1.0);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(tanh(f32::NAN).is_nan());
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

    #[test]
    fn rows_with_gaps_are_added() {
        for (size, heads, rows) in [(1, 1, 1), (5, 2, 3), (16, 3, 4), (64, 3, 9), (70, 5, 6)] {
            let (stride, of_head) = (size + 3, rows + 2);
            let before = numbers(size * heads, 5);
            let b = numbers(stride * rows - 3, 7);
            let all = numbers(of_head * heads, 11);
            let mut sums = before.clone();
            let weights = Weights {
                all: &all,
                of_head,
                rows: 1..1 + rows,
            };
            add_weighted_rows(&mut sums, size, weights, &b, stride);
            for head in 0..heads {
                for i in 0..size {
                    let term = |k: usize| all[head * of_head + 1 + k] * b[k * stride + i];
                    let at = head * size + i;
                    assert_eq!(sums[at], before[at] + (0..rows).map(term).sum::<f32>());
                }
            }
        }
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for len in [0, 1, 15, 16, 17, 40] {
            let x: Vec<f32> = (0..len).map(|i| (i * 7 % 5) as f32 - 9.0).collect();
            assert_eq!(lane_sum([&x[..len]], |[x]| x), x.iter().sum::<f32>());
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
    fn narrowing_is_that_of_the_library() {
        let mut numbers: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| {
                [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| u32::from(high) << 16 | low)
            })
            .map(f32::from_bits)
            .collect();
        numbers.push(1.0);
        let mut narrowed = vec![bf16::ZERO; numbers.len()];
        narrow(&mut narrowed, &numbers);
        for (found, &number) in narrowed.iter().zip(&numbers) {
            let expected = bf16::from_f32(number);
            let same = found.to_bits() == expected.to_bits();
            assert!(same || found.is_nan() && number.is_nan(), "{number:e}");
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
