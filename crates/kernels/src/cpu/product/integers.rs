//! y = x·wᵀ for generated rows and weights in blocks, by products of integers.
//!
//! Rows of x are rounded to integers: 32 numbers share a scale, as in llama.cpp's Q8_0, but have two bytes each, the second for what the
//! first leaves. One byte costs SmolLM2 0.3 % of its perplexity, which two do not; they take a few percent more time, since most of it goes
//! into reading and unpacking the weights. The products of 32 numbers are then integers, which are summed exactly, and only the scales of
//! both sides make them floats: a sum of d·(s·Σq·x + o·Σx) over the groups of a row, in their order.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::parallel::{ForEachPart, for_runs};
use crate::cpu::product::mat::{MatMut, Shared};
use crate::cpu::product::term::Start;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::vectorize;
use crate::storage::{BlockVisitor, GROUP, IntegerBlock, OneByOne};
use crate::view::{View, ViewMut};

/// Weights, and rows of them, that a task takes at least.
const BLOCK: usize = 16 * 1024;
const ROWS: usize = 32;
/// Rows of x that meet a group of a weight while its integers are in registers.
const TOGETHER: usize = 4;

/// A weight, the rows of x that it is for, and where their product goes.
pub(crate) struct IntegerJob<'a> {
    /// [rows, N].
    pub(crate) y: ViewMut<'a>,
    /// [N, K].
    pub(crate) w: View<'a>,
    pub(crate) start: Start<'a>,
}

/// 32 numbers of x: each is (256 · high + low) · scale.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Rounded {
    high: [i8; GROUP],
    low: [i8; GROUP],
    scale: f32,
    /// The sum of all, times the scale.
    sum: f32,
    /// The sums of either half, times the scale.
    sums: [f32; 2],
}

/// Numbers of f32 that a group takes.
const ROOM: usize = size_of::<Rounded>() / size_of::<f32>();

/// y (+)= x·wᵀ for each job, whose rows are all of x [T, K]; K is a multiple of 32.
pub(crate) fn multiply(x: View<'_>, jobs: Vec<IntegerJob<'_>>) {
    let (tokens, ins) = (x.rows(), x.cols());
    assert!(ins.is_multiple_of(GROUP), "rows of whole groups");
    let groups = ins / GROUP;
    let jobs: Vec<(Shared<'_>, View<'_>, Start<'_>)> = jobs
        .into_iter()
        .map(|job| (Shared::from(job.y), job.w, job.start))
        .collect();
    with_scratch(tokens * groups * ROOM, |scratch| {
        let rounded: &mut [Rounded] = bytemuck::cast_slice_mut(scratch);
        let rows = rounded
            .chunks_exact_mut(groups.max(1))
            .zip(x.f32s().chunks_exact(ins.max(1)));
        if tokens <= 2 {
            rows.for_each(|(to, from)| round(to, from));
        } else {
            let rows: Vec<_> = rows.collect();
            rows.into_par_iter()
                .for_each_part(|(to, from)| round(to, from));
        }
        let rounded = &*rounded;
        let block = BLOCK.div_ceil(ins.max(1)).max(ROWS);
        let tasks = |w: &View<'_>| w.rows().div_ceil(block);
        for_runs(jobs.iter().map(|(_, w, _)| tasks(w)).sum(), |mut task| {
            for (y, w, start) in &jobs {
                if task < tasks(w) {
                    let outs = task * block..((task + 1) * block).min(w.rows());
                    #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
                    // SAFETY: each task of a job has other columns, and each job another matrix.
                    let mut tile = unsafe { y.block(0..tokens, outs.clone()) };
                    let add = start.prepare(&mut tile, &outs);
                    w.slice_rows(outs).numbers().visit_blocks(Products {
                        tile,
                        add,
                        x: rounded,
                        groups,
                    });
                    return;
                }
                task -= tasks(w);
            }
        });
    });
}

/// Rounds numbers group by group: to the nearest of 255, and what that leaves to the nearest of 255 parts of a step.
fn round(to: &mut [Rounded], from: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from.as_chunks::<GROUP>().0) {
                let mut lanes = [0.0_f32; 8];
                for from in from.as_chunks::<8>().0 {
                    for (most, x) in lanes.iter_mut().zip(from) {
                        *most = most.max(x.abs());
                    }
                }
                let largest = lanes.iter().fold(0.0_f32, |most, x| most.max(*x));
                let step = largest / 127.0;
                let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
                let mut sums = [0; 2];
                for (half, sum) in sums.iter_mut().enumerate() {
                    for i in half * GROUP / 2..(half + 1) * GROUP / 2 {
                        let steps = from[i] * inverse;
                        let high = steps.round_ties_even();
                        // Half a step is 128 parts, of which a byte has 127.
                        let low = ((steps - high) * 256.0)
                            .round_ties_even()
                            .clamp(-127.0, 127.0);
                        to.high[i] = high as i8;
                        to.low[i] = low as i8;
                        *sum += 256 * high as i32 + low as i32;
                    }
                }
                let scale = step / 256.0;
                to.scale = scale;
                to.sum = scale * (sums[0] + sums[1]) as f32;
                to.sums = [scale * sums[0] as f32, scale * sums[1] as f32];
            }
        },
    );
}

/// What is left to do of a task once the format of the weight is known.
struct Products<'a> {
    tile: MatMut<'a>,
    add: bool,
    x: &'a [Rounded],
    groups: usize,
}

impl BlockVisitor for Products<'_> {
    fn visit<B: IntegerBlock>(mut self, blocks: &[B]) {
        let of_row = self.groups * GROUP / B::LEN;
        let tokens = self.x.len() / self.groups.max(1);
        for (out, row) in blocks.chunks_exact(of_row.max(1)).enumerate() {
            for first in (0..tokens).step_by(TOGETHER) {
                let count = TOGETHER.min(tokens - first);
                let rows = first..first + count;
                if count == TOGETHER {
                    self.row::<B, TOGETHER>(row, out, rows);
                } else {
                    // Fewer are taken one by one: code for each number of them is large.
                    rows.for_each(|i| self.row::<B, 1>(row, out, i..i + 1));
                }
            }
        }
    }
}

impl Products<'_> {
    /// A row of the weight with `I` rows of x.
    #[inline]
    fn row<B: IntegerBlock, const I: usize>(
        &mut self,
        blocks: &[B],
        out: usize,
        rows: Range<usize>,
    ) {
        let x: [&[Rounded]; I] =
            std::array::from_fn(|i| &self.x[(rows.start + i) * self.groups..][..self.groups]);
        let sums = sums(blocks, x);
        self.tile.put_column(rows.start, out, &sums, self.add);
    }
}

fn sums<B: IntegerBlock, const I: usize>(blocks: &[B], x: [&[Rounded]; I]) -> [f32; I] {
    #[cfg(target_arch = "x86_64")]
    if let Some(sums) = x86::sums(blocks, x) {
        return sums;
    }
    x.map(|x| portable(blocks, x))
}

fn portable<B: IntegerBlock>(blocks: &[B], x: &[Rounded]) -> f32 {
    let of_block = B::LEN / GROUP;
    let mut sum = 0.0;
    for (block, x) in blocks.iter().zip(x.chunks_exact(of_block)) {
        let scales = block.scales(OneByOne);
        for (group, x) in x.iter().enumerate() {
            let q = block.integers(group, OneByOne);
            for (half, scale) in B::scale(&scales, group).into_iter().enumerate() {
                let range = half * GROUP / 2..(half + 1) * GROUP / 2;
                let mut dot = 0;
                let of_x = x.high[range.clone()].iter().zip(&x.low[range.clone()]);
                for (q, (high, low)) in q[range].iter().zip(of_x) {
                    let q = if B::SIGNED {
                        i32::from(q.cast_signed())
                    } else {
                        i32::from(*q)
                    };
                    dot += q * (256 * i32::from(*high) + i32::from(*low));
                }
                let (factor, offset) = scale.linear();
                sum += x.scale * factor * dot as f32;
                if B::HAS_OFFSET {
                    sum += offset * x.sums[half];
                }
            }
        }
    }
    sum
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! With AVX2: bytes times bytes, and sums of four products, by the widest instruction for them that there is. The bits are those of
    //! any other, since sums of integers are exact.

    use std::arch::is_x86_feature_detected as has;
    use std::arch::x86_64::{
        __m256, __m256i, _mm_add_ps, _mm_cvtss_f32, _mm_hadd_ps, _mm_set1_ps, _mm256_abs_epi8,
        _mm256_add_epi32, _mm256_castps256_ps128, _mm256_cvtepi32_ps, _mm256_dpbusd_avx_epi32,
        _mm256_dpbusd_epi32, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_si256,
        _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set_m128, _mm256_set1_epi16,
        _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_sign_epi8,
        _mm256_slli_epi32,
    };

    use pulp::x86::V3;

    use super::Rounded;
    use crate::cpu::engine::{Engine, engine};
    use crate::cpu::product::rows::{AHEAD, CACHE_LINE};
    use crate::cpu::simd::fetch;
    use crate::storage::{GROUP, IntegerBlock};

    /// The sums of a row of the weight with rows of x, where the processor has what it takes.
    #[inline]
    #[expect(
        unsafe_code,
        reason = "code for a processor that was asked what it has"
    )]
    pub(super) fn sums<B: IntegerBlock, const I: usize>(
        blocks: &[B],
        x: [&[Rounded]; I],
    ) -> Option<[f32; I]> {
        let simd = V3::try_new().filter(|_| engine() >= Engine::Avx2)?;
        // SAFETY: there is a `V3`, so the processor has AVX2, FMA and F16C, and what else is called for it has just been asked for.
        Some(unsafe {
            if engine() >= Engine::Avx512 && has!("avx512vnni") && has!("avx512vl") {
                with_avx512_vnni(simd, blocks, x)
            } else if has!("avxvnni") {
                with_avx_vnni(simd, blocks, x)
            } else {
                with_avx2(simd, blocks, x)
            }
        })
    }

    /// # Safety
    /// The processor has AVX2, FMA and F16C.
    #[expect(unsafe_code, reason = "code for a processor that has AVX2")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn with_avx2<B: IntegerBlock, const I: usize>(
        simd: V3,
        blocks: &[B],
        x: [&[Rounded]; I],
    ) -> [f32; I] {
        // SAFETY: as is asked for.
        unsafe { sums_by::<B, Pairs, I>(simd, blocks, x) }
    }

    /// # Safety
    /// The processor has AVX2, FMA, F16C and AVX-VNNI.
    #[expect(unsafe_code, reason = "code for a processor that has AVX-VNNI")]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn with_avx_vnni<B: IntegerBlock, const I: usize>(
        simd: V3,
        blocks: &[B],
        x: [&[Rounded]; I],
    ) -> [f32; I] {
        // SAFETY: as is asked for.
        unsafe { sums_by::<B, AvxVnni, I>(simd, blocks, x) }
    }

    /// # Safety
    /// The processor has AVX2, FMA, F16C, AVX512-VNNI and AVX512-VL.
    #[expect(unsafe_code, reason = "code for a processor that has AVX512-VNNI")]
    #[target_feature(enable = "avx2,fma,f16c,avx512vnni,avx512vl")]
    unsafe fn with_avx512_vnni<B: IntegerBlock, const I: usize>(
        simd: V3,
        blocks: &[B],
        x: [&[Rounded]; I],
    ) -> [f32; I] {
        // SAFETY: as is asked for.
        unsafe { sums_by::<B, Avx512Vnni, I>(simd, blocks, x) }
    }

    /// Adds four products of neighbours to each of eight sums. An unsigned byte is below 128, and a signed one from -127 on.
    #[expect(unsafe_code, reason = "vector code")]
    trait FourByFour {
        /// # Safety
        /// The processor has AVX2, and what the type is named for.
        unsafe fn add(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i;
    }

    /// By AVX2: sums of two, which fit in 16 bits, and of these two.
    struct Pairs;

    #[expect(unsafe_code, reason = "vector code")]
    impl FourByFour for Pairs {
        #[inline(always)]
        unsafe fn add(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
            // SAFETY: as is asked for.
            unsafe {
                let pairs = _mm256_maddubs_epi16(unsigned, signed);
                _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }
        }
    }

    struct AvxVnni;

    #[expect(unsafe_code, reason = "vector code")]
    impl FourByFour for AvxVnni {
        #[inline(always)]
        unsafe fn add(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
            // SAFETY: as is asked for.
            unsafe { _mm256_dpbusd_avx_epi32(sums, unsigned, signed) }
        }
    }

    struct Avx512Vnni;

    #[expect(unsafe_code, reason = "vector code")]
    impl FourByFour for Avx512Vnni {
        #[inline(always)]
        unsafe fn add(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
            // SAFETY: as is asked for.
            unsafe { _mm256_dpbusd_epi32(sums, unsigned, signed) }
        }
    }

    /// # Safety
    /// The processor has AVX2, FMA, F16C and what `D` is named for.
    #[inline(always)]
    #[expect(unsafe_code, reason = "vector code")]
    unsafe fn sums_by<B: IntegerBlock, D: FourByFour, const I: usize>(
        simd: V3,
        blocks: &[B],
        x: [&[Rounded]; I],
    ) -> [f32; I] {
        let of_block = B::LEN / GROUP;
        // SAFETY: as is asked for.
        unsafe {
            let mut sums = [_mm256_setzero_ps(); I];
            let mut offsets = [[0.0_f32; 2]; I];
            for (at, block) in blocks.iter().enumerate() {
                let ahead = std::ptr::from_ref(block).cast::<u8>().wrapping_add(AHEAD);
                for line in (0..size_of::<B>()).step_by(CACHE_LINE) {
                    fetch(ahead.wrapping_add(line));
                }
                let scales = block.scales(simd);
                for group in 0..of_block {
                    let q = block.integers(group, simd);
                    let scales = B::scale(&scales, group);
                    let [(first, offset), (second, other)] =
                        [scales[0].linear(), scales[1].linear()];
                    let size = if B::SIGNED { _mm256_abs_epi8(q) } else { q };
                    for i in 0..I {
                        let x = &x[i][at * of_block + group];
                        // 256 times the sums of the high bytes, and those of the low ones, which fit in 32 bits together.
                        let mut dots = _mm256_setzero_si256();
                        for bytes in [&x.high, &x.low] {
                            let bytes = _mm256_loadu_si256(bytes.as_ptr().cast());
                            let signed = if B::SIGNED {
                                _mm256_sign_epi8(bytes, q)
                            } else {
                                bytes
                            };
                            dots = D::add(_mm256_slli_epi32::<8>(dots), size, signed);
                        }
                        let factor = if B::HALVES {
                            let (first, second) = (first * x.scale, second * x.scale);
                            _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first))
                        } else {
                            _mm256_set1_ps(first * x.scale)
                        };
                        sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), factor, sums[i]);
                        if B::HAS_OFFSET && B::HALVES {
                            offsets[i][0] = offset.mul_add(x.sums[0], offsets[i][0]);
                            offsets[i][1] = other.mul_add(x.sums[1], offsets[i][1]);
                        } else if B::HAS_OFFSET {
                            let lane = &mut offsets[i][group % 2];
                            *lane = offset.mul_add(x.sum, *lane);
                        }
                    }
                }
            }
            let mut all = [0.0; I];
            for i in 0..I {
                all[i] = lane_sum(sums[i]) + (offsets[i][0] + offsets[i][1]);
            }
            all
        }
    }

    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    #[expect(unsafe_code, reason = "vector code")]
    unsafe fn lane_sum(lanes: __m256) -> f32 {
        // SAFETY: as is asked for.
        unsafe {
            let four = _mm_add_ps(
                _mm256_castps256_ps128(lanes),
                _mm256_extractf128_ps::<1>(lanes),
            );
            let two = _mm_hadd_ps(four, four);
            _mm_cvtss_f32(_mm_hadd_ps(two, two))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::engine::{engines, with_engine};
    use crate::storage::{NumberFormat, matrix_of};
    use crate::tensor::Tensor;

    fn number(of: &Rounded, i: usize) -> f64 {
        256.0 * f64::from(of.high[i]) + f64::from(of.low[i])
    }

    /// Products are those of the weight's numbers and of x as it is rounded.
    #[test]
    fn products_are_those_of_what_is_rounded() {
        for engine in engines() {
            with_engine(engine, check_products);
        }
    }

    fn check_products() {
        for format in NumberFormat::ALL
            .into_iter()
            .filter(|format| format.has_integers())
        {
            for tokens in [1, 2, 3, 4, 6] {
                let (rows, ins) = (70, 512);
                let [stored, wide] = matrix_of(format, rows, ins);
                let numbers: Vec<f32> = (0..tokens * ins)
                    .map(|i| ((i * 7) as f32).sin() * ((i / 32) as f32 * 0.3).cos())
                    .collect();
                let x = Tensor::from_f32(tokens, ins, numbers.clone());
                let mut y = Tensor::zeros(tokens, rows);
                let bias: Vec<f32> = (0..rows).map(|i| i as f32).collect();
                let job = IntegerJob {
                    y: y.view_mut(),
                    w: stored.view(),
                    start: Start::Row(&bias),
                };
                multiply(x.view(), vec![job]);
                let mut rounded = vec![bytemuck::Zeroable::zeroed(); tokens * ins / GROUP];
                round(&mut rounded, &numbers);
                let of_x = |i: usize| {
                    let group: &Rounded = &rounded[i / GROUP];
                    f64::from(group.scale) * number(group, i % GROUP)
                };
                for token in 0..tokens {
                    for out in 0..rows {
                        let (mut sum, mut size) = (out as f64, out as f64);
                        for k in 0..ins {
                            let product =
                                f64::from(wide.view().get(out, k)) * of_x(token * ins + k);
                            sum += product;
                            size += product.abs();
                        }
                        let found = f64::from(y.view().get(token, out));
                        assert!((found - sum).abs() < 1e-5 * size, "{format}: {found} {sum}");
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_are_rounded_to_a_small_part_of_the_largest() {
        let numbers: Vec<f32> = (0..96)
            .map(|i| (i as f32 * 0.37).sin() * i as f32)
            .collect();
        let mut rounded = vec![bytemuck::Zeroable::zeroed(); 3];
        round(&mut rounded, &numbers);
        for (group, numbers) in rounded.iter().zip(numbers.chunks(32)) {
            let group: &Rounded = group;
            let largest = numbers.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            for (i, x) in numbers.iter().enumerate() {
                let off = (number(group, i) as f32 * group.scale - x).abs();
                assert!(off <= largest / 32_000.0, "{off}");
            }
        }
        round(&mut rounded, &[0.0; 96]);
        assert!(rounded.iter().all(|group: &Rounded| group.scale == 0.0
            && group.high == [0; 32]
            && group.low == [0; 32]));
    }
}
