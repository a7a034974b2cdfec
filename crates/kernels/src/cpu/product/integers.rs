//! y = x·wᵀ for generated rows and weights in blocks, by products of integers.
//!
//! Rows of x are rounded to 8 bits: 32 numbers share a scale, as in llama.cpp's Q8_0, though it is an f32 here. The products of 32 numbers
//! are then integers, which are summed exactly, and only the scales of both sides make them floats: a sum of d·(s·Σq·x + o·Σx) over the
//! groups of a row, in their order.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use pulp::x86::V3;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::cpu::engine::{Engine, engine};
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

/// 32 numbers of x.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Rounded {
    q: [i8; GROUP],
    /// What they are multiplied with.
    scale: f32,
    /// The sums of either half, times the scale.
    sums: [f32; 2],
    /// To a multiple of 16 bytes.
    rest: u32,
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

/// Rounds numbers to the nearest of 255, group by group.
fn round(to: &mut [Rounded], from: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from.as_chunks::<GROUP>().0) {
                let largest = from.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                let scale = largest / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                let q = from.map(
                    #[inline(always)]
                    |x| (x * inverse).round_ties_even() as i8,
                );
                let sum = |half: &[i8]| half.iter().map(|q| i32::from(*q)).sum::<i32>() as f32;
                let (first, second) = q.split_at(GROUP / 2);
                *to = Rounded {
                    q,
                    scale,
                    sums: [scale * sum(first), scale * sum(second)],
                    rest: 0,
                };
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
    if let Some(simd) = V3::try_new().filter(|_| engine() >= Engine::Avx2) {
        #[expect(unsafe_code, reason = "code for a processor that has AVX2")]
        // SAFETY: there is a `V3`, so the processor has AVX2, FMA and F16C.
        return unsafe { avx2::sums(simd, blocks, x) };
    }
    x.map(|x| portable(blocks, x))
}

fn portable<B: IntegerBlock>(blocks: &[B], x: &[Rounded]) -> f32 {
    use crate::storage::Quants;
    let of_block = B::LEN / GROUP;
    let mut sum = 0.0;
    for (at, x) in x.iter().enumerate() {
        let group = blocks[at / of_block].group(at % of_block, OneByOne);
        let w: [i16; GROUP] = match group.q {
            Quants::Unsigned(q) => q.map(i16::from),
            Quants::Signed(q) => q.map(i16::from),
        };
        let half = |half: usize| {
            let range = half * GROUP / 2..(half + 1) * GROUP / 2;
            let products = w[range.clone()].iter().zip(&x.q[range]);
            let products = products.map(|(w, x)| i32::from(*w) * i32::from(*x));
            products.sum::<i32>() as f32
        };
        let scaled = group.scale[0] * half(0) + group.scale[1] * half(1);
        sum += x.scale * scaled + group.offset[0] * x.sums[0] + group.offset[1] * x.sums[1];
    }
    sum
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! With AVX2: bytes times bytes, summed in pairs, and these in pairs.

    use std::arch::x86_64::{
        __m256, __m256i, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_fmadd_ps, _mm_hadd_ps,
        _mm_movehdup_ps, _mm_set_ps, _mm_set1_ps, _mm_setzero_ps, _mm256_abs_epi8,
        _mm256_castps128_ps256, _mm256_castps256_ps128, _mm256_cvtepi32_ps, _mm256_extractf128_ps,
        _mm256_fmadd_ps, _mm256_insertf128_ps, _mm256_loadu_si256, _mm256_madd_epi16,
        _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_sign_epi8,
    };

    use pulp::x86::V3;

    use super::Rounded;
    use crate::cpu::product::rows::{AHEAD, CACHE_LINE};
    use crate::cpu::simd::fetch;
    use crate::storage::{GROUP, Group, IntegerBlock, Quants};

    /// # Safety
    /// The processor has AVX2, FMA and F16C.
    #[expect(unsafe_code, reason = "code for a processor that has AVX2")]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn sums<B: IntegerBlock, const I: usize>(
        simd: V3,
        blocks: &[B],
        x: [&[Rounded]; I],
    ) -> [f32; I] {
        let mut sums = [_mm256_setzero_ps(); I];
        let mut offsets = [_mm_setzero_ps(); I];
        let mut at = 0;
        for block in blocks {
            let ahead = std::ptr::from_ref(block).cast::<u8>().wrapping_add(AHEAD);
            for line in (0..size_of::<B>()).step_by(CACHE_LINE) {
                fetch(ahead.wrapping_add(line));
            }
            for group in 0..B::LEN / GROUP {
                let Group { q, scale, offset } = block.group(group, simd);
                let scale = both(scale);
                let offset = _mm_set_ps(0.0, 0.0, offset[1], offset[0]);
                for i in 0..I {
                    let x = &x[i][at];
                    let dots = match q {
                        Quants::Unsigned(q) => dots(load(&q), load(bytemuck::cast_ref(&x.q))),
                        Quants::Signed(q) => {
                            let (w, x) =
                                (load(bytemuck::cast_ref(&q)), load(bytemuck::cast_ref(&x.q)));
                            dots(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                        }
                    };
                    let scaled = _mm256_mul_ps(scale, _mm256_set1_ps(x.scale));
                    sums[i] = _mm256_fmadd_ps(dots, scaled, sums[i]);
                    let of_x = _mm_set_ps(0.0, 0.0, x.sums[1], x.sums[0]);
                    offsets[i] = _mm_fmadd_ps(offset, of_x, offsets[i]);
                }
                at += 1;
            }
        }
        let mut all = [0.0; I];
        for i in 0..I {
            let offset = _mm_add_ss(offsets[i], _mm_movehdup_ps(offsets[i]));
            all[i] = lane_sum(sums[i]) + _mm_cvtss_f32(offset);
        }
        all
    }

    /// Eight sums of four products of neighbours.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn dots(unsigned: __m256i, signed: __m256i) -> __m256 {
        // 127 · 127 · 2 fits in 16 bits.
        let pairs = _mm256_maddubs_epi16(unsigned, signed);
        _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    #[expect(unsafe_code, reason = "vector loads take pointers")]
    fn load(bytes: &[u8; GROUP]) -> __m256i {
        // SAFETY: there are 32 bytes.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    /// The scale of the first run for the lower lanes, and that of the second for the upper ones.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn both(scale: [f32; 2]) -> __m256 {
        let low = _mm256_castps128_ps256(_mm_set1_ps(scale[0]));
        _mm256_insertf128_ps::<1>(low, _mm_set1_ps(scale[1]))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn lane_sum(lanes: __m256) -> f32 {
        let four = _mm_add_ps(
            _mm256_castps256_ps128(lanes),
            _mm256_extractf128_ps::<1>(lanes),
        );
        let two = _mm_hadd_ps(four, four);
        _mm_cvtss_f32(_mm_hadd_ps(two, two))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::engine::{engines, with_engine};
    use crate::storage::{NumberFormat, matrix_of};
    use crate::tensor::Tensor;

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
                    f64::from(group.scale) * f64::from(group.q[i % GROUP])
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
    fn numbers_are_rounded_to_a_hundredth_of_the_largest() {
        let numbers: Vec<f32> = (0..96)
            .map(|i| (i as f32 * 0.37).sin() * i as f32)
            .collect();
        let mut rounded = vec![bytemuck::Zeroable::zeroed(); 3];
        round(&mut rounded, &numbers);
        for (group, numbers) in rounded.iter().zip(numbers.chunks(32)) {
            let group: &Rounded = group;
            let largest = numbers.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            for (q, x) in group.q.iter().zip(numbers) {
                let off = (f32::from(*q) * group.scale - x).abs();
                assert!(off <= largest / 253.0, "{off}");
            }
        }
        round(&mut rounded, &[0.0; 96]);
        assert!(
            rounded
                .iter()
                .all(|group: &Rounded| group.scale == 0.0 && group.q == [0; 32])
        );
    }
}
