//! Products of bf16 matrices on 64-bit Arm processors that have them (FEAT_BF16: Neoverse V1 and N2, Apple's since M2).
//!
//! Both factors are rounded to bf16, sums are in f32. `bfmmla` multiplies 2 × 4 numbers by 4 × 2 and adds what comes out to 2 × 2 sums; it
//! does four times the work of a vector of f32 (Arm, "Architecture Reference Manual for A-profile architecture", C7.2). It reads and
//! leaves zeros for numbers below the smallest normal one, and rounds to odd: a sum is off by one unit in the last place at most,
//! where it otherwise is by half of one. Rust has no stable name for it; it is written out.
//!
//! A block of 6 × 16 sums is in 24 of 32 registers. Steps of four inner indices lie one after the other: of the left factor those of 6 rows, of
//! the right one those of 16 columns. Every element is summed over the terms, and within a term over the inner index, in order, whatever
//! tile it lies in.

use std::arch::aarch64::{
    float32x4_t, uint16x4_t, uint16x8_t, uint16x8x4_t, vdupq_n_f32, vld1q_f32, vld1q_u16,
    vmulq_n_f32, vreinterpretq_f32_f64, vreinterpretq_f64_f32, vst1_u16, vst1q_f32, vst4q_u16,
    vtrn1q_f64, vtrn2q_f64,
};
use std::arch::asm;
use std::ops::Range;

use bytemuck::{Pod, cast_ref, cast_slice_mut};
use half::bf16;

use crate::cpu::engine::{Engine, engine};
use crate::cpu::product::layout::{MR, NR};
use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::product::panels::{Part, ROWS, runs};
use crate::cpu::product::term::{Left, Term};
use crate::cpu::scratch::with_scratch;
use crate::storage::{Numbers, Window};
use crate::types::compute::ComputeDType;

/// Inner indices that an instruction sums over.
const STEP: usize = 4;
/// Pairs of rows in a block of sums, and of columns.
const ROW_PAIRS: usize = MR / 2;
const COL_PAIRS: usize = NR / 2;

/// Four inner indices of some lines: rows of a left factor, or columns of a right one.
type Step<const LINES: usize> = [[u16; STEP]; LINES];

/// Whether this processor can.
#[inline]
pub(crate) fn supported() -> bool {
    engine() >= Engine::NeonBf16
}

/// Whether these terms, which are as wide as their output, are computed here: their columns, inner sizes and formats say so, and not
/// their rows.
pub(crate) fn is_worthwhile(terms: &[Term<'_>]) -> bool {
    /// From where on these products pay was not measured.
    const COLUMNS: usize = 32;
    const INNER: usize = 128;
    supported()
        && terms.iter().map(|term| term.a.cols()).sum::<usize>() >= INNER
        && terms.iter().all(|term| {
            term.compute == ComputeDType::Bf16
                && term.b.cols() >= COLUMNS
                && matches!(term.a, Left::Wide(a) if a.lies_in_lines())
        })
}

/// out (+)= Σ terms, each of the size of `out`, on one thread, with both factors (the right one times its scale) rounded to bf16.
///
/// # Panics
/// If the shapes do not match, neither rows nor columns of a left factor lie in one piece, or the processor is not [`supported`].
pub(crate) fn multiply(mut out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>]) {
    assert!(supported(), "a processor without products of bf16");
    for term in terms {
        assert_eq!(term.a.rows(), out.rows(), "rows of a product");
        assert_eq!(term.b.cols(), out.cols(), "columns of a product");
        assert_eq!(term.a.cols(), term.b.rows(), "inner size of a product");
    }
    let sizes: Vec<usize> = terms.iter().map(|term| term.a.cols()).collect();
    let mut add = accumulate;
    for run in runs(&sizes) {
        multiply_run(&mut out, add, terms, &run);
        add = true;
    }
    if !add {
        out.fill_zero();
    }
}

fn steps(part: &Part) -> usize {
    part.range.len().div_ceil(STEP)
}

/// One run of inner indices. The right factors are put in order once, and meet some rows of the left ones after the other.
fn multiply_run(out: &mut MatMut<'_>, add: bool, terms: &[Term<'_>], run: &[Part]) {
    let (rows, cols) = (out.rows(), out.cols());
    let inner: usize = run.iter().map(steps).sum();
    with_steps::<NR, _>(cols.div_ceil(NR) * inner, |right| {
        let mut first = 0;
        for part in run {
            let Term { b, scale, .. } = terms[part.term];
            let pack = PackRight {
                to: &mut *right,
                inner,
                part: first..first + steps(part),
                window: b.window(part.range.clone(), 0..cols),
                turned: b.transposed,
                scale,
            };
            pack.pack_numbers(b.view.numbers());
            first += steps(part);
        }
        for start in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - start);
            with_steps::<MR, _>(count.div_ceil(MR) * inner, |left| {
                for (block, mut to) in left.chunks_exact_mut(inner).enumerate() {
                    let first = start + block * MR;
                    for part in run {
                        let (own, rest) = to.split_at_mut(steps(part));
                        to = rest;
                        let rows = first..(first + MR).min(start + count);
                        pack_left(
                            own,
                            terms[part.term].a.wide().block(rows, part.range.clone()),
                        );
                    }
                }
                let out = out.window(start..start + count, 0..cols);
                multiply_packed(out, add, left, right, inner);
            });
        }
    });
}

/// Calls `work` with room for so many steps.
fn with_steps<const LINES: usize, R>(len: usize, work: impl FnOnce(&mut [Step<LINES>]) -> R) -> R
where
    Step<LINES>: Pod,
{
    let numbers = len * size_of::<Step<LINES>>() / size_of::<f32>(); // a step is a multiple
    with_scratch(numbers, |scratch| work(cast_slice_mut(scratch)))
}

/// out (+)= left · right, of `inner` steps.
fn multiply_packed(
    mut out: MatMut<'_>,
    add: bool,
    left: &[Step<MR>],
    right: &[Step<NR>],
    inner: usize,
) {
    assert!(supported(), "a processor without products of bf16");
    let (rows, cols) = (out.rows(), out.cols());
    for (panel, b) in right.chunks_exact(inner).enumerate() {
        let across = panel * NR..((panel + 1) * NR).min(cols);
        for (block, a) in left.chunks_exact(inner).enumerate() {
            let down = block * MR..((block + 1) * MR).min(rows);
            let kernel = match down.len() {
                1 | 2 => sum::<1>,
                3 | 4 => sum::<2>,
                _ => sum::<ROW_PAIRS>,
            };
            let mut sums = [[0.0; NR]; MR];
            #[expect(unsafe_code, reason = "code for one kind of processor")]
            // SAFETY: the processor is supported.
            unsafe {
                kernel(&mut sums, a, b);
            }
            for (row, sums) in down.zip(&sums) {
                let out = &mut out.row(row)[across.clone()];
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = if add { *out + sum } else { *sum };
                }
            }
        }
    }
}

/// `to` = a · b, of as many pairs of rows.
///
/// # Safety
/// The processor has products of bf16.
#[expect(unsafe_code, reason = "an instruction that Rust has no name for")]
#[target_feature(enable = "neon,bf16")]
unsafe fn sum<const PAIRS: usize>(to: &mut [[f32; NR]; MR], a: &[Step<MR>], b: &[Step<NR>]) {
    let mut sums = [[vdupq_n_f32(0.0); COL_PAIRS]; PAIRS];
    for (a, b) in a.iter().zip(b) {
        let a: &[[u16; 2 * STEP]; ROW_PAIRS] = cast_ref(a);
        let b: &[[u16; 2 * STEP]; COL_PAIRS] = cast_ref(b);
        for (j, b) in b.iter().enumerate() {
            for (sums, a) in sums.iter_mut().zip(a) {
                // SAFETY: by the contract of this function; eight numbers are read of either.
                unsafe {
                    let (a, b) = (vld1q_u16(a.as_ptr()), vld1q_u16(b.as_ptr()));
                    sums[j] = bfmmla(sums[j], a, b);
                }
            }
        }
    }
    for (sums, to) in sums.iter().zip(to.as_chunks_mut::<2>().0) {
        let [above, below] = to;
        let to = (above.as_chunks_mut::<4>().0.iter_mut()).zip(below.as_chunks_mut::<4>().0);
        for (sums, (above, below)) in sums.as_chunks::<2>().0.iter().zip(to) {
            // Two sums of the upper row and two of the lower one, of either pair of columns.
            let [one, two] = [
                vreinterpretq_f64_f32(sums[0]),
                vreinterpretq_f64_f32(sums[1]),
            ];
            // SAFETY: four numbers can be written at both places.
            unsafe {
                let row = vreinterpretq_f32_f64(vtrn1q_f64(one, two));
                vst1q_f32(above.as_mut_ptr(), row);
                let row = vreinterpretq_f32_f64(vtrn2q_f64(one, two));
                vst1q_f32(below.as_mut_ptr(), row);
            }
        }
    }
}

/// sums + a · b, for two rows of sums and of a and two columns of b.
///
/// # Safety
/// The processor has products of bf16, and the function that this becomes a part of is compiled for them.
#[expect(unsafe_code, reason = "an instruction that Rust has no name for")]
#[inline(always)]
unsafe fn bfmmla(mut sums: float32x4_t, a: uint16x8_t, b: uint16x8_t) -> float32x4_t {
    // SAFETY: by the contract of this function; the instruction changes the sums alone.
    unsafe {
        asm!(
            "bfmmla {sums:v}.4s, {a:v}.8h, {b:v}.8h",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Up to 6 rows of a left factor; what there is not is zero.
fn pack_left(to: &mut [Step<MR>], a: Mat<'_>) {
    let along = a.col_stride() == 1;
    assert!(along || a.row_stride() == 1, "rows or columns in one piece");
    let lines = Lines {
        data: a.data(),
        stride: if along {
            a.row_stride()
        } else {
            a.col_stride()
        },
        along,
        count: a.rows(),
        inner: a.cols(),
    };
    pack(to, &lines, 1.0);
}

/// A part of the right factors, once its format is known: [cols / 16][inner] steps.
struct PackRight<'a> {
    to: &'a mut [Step<NR>],
    inner: usize,
    part: Range<usize>,
    window: Window,
    turned: bool,
    scale: f32,
}

impl PackRight<'_> {
    fn pack_numbers(self, numbers: Numbers<'_>) {
        let window = self.window.clone();
        match numbers.bf16s() {
            Some(numbers) if self.scale == 1.0 => {
                self.pack_panels(&numbers[window.first()..], window.stride);
            }
            _ => window.read_f32s(numbers, |numbers, stride| self.pack_panels(numbers, stride)),
        }
    }

    fn pack_panels<N: Narrow>(self, numbers: &[N], stride: usize) {
        let (down, across) = (self.window.rows.len(), self.window.cols.len());
        let (inner, cols) = if self.turned {
            (across, down)
        } else {
            (down, across)
        };
        for (panel, to) in self.to.chunks_exact_mut(self.inner).enumerate() {
            let first = panel * NR;
            let lines = Lines {
                data: &numbers[first * if self.turned { stride } else { 1 }..],
                stride,
                along: self.turned,
                count: NR.min(cols - first),
                inner,
            };
            pack(&mut to[self.part.clone()], &lines, self.scale);
        }
    }
}

/// Some lines of a factor: rows of a left one, or columns of a right one.
struct Lines<'a, N> {
    data: &'a [N],
    stride: usize,
    /// Whether a line lies in one piece, and the next `stride` behind it; else the lines lie side by side, and `stride` is that of their inner indices.
    along: bool,
    count: usize,
    inner: usize,
}

/// Lines times `scale` in bf16; what there is not is zero.
fn pack<N: Narrow, const LINES: usize>(to: &mut [Step<LINES>], lines: &Lines<'_, N>, scale: f32) {
    assert!(supported(), "a processor without products of bf16");
    #[expect(unsafe_code, reason = "code for one kind of processor")]
    // SAFETY: the processor is supported.
    unsafe {
        if lines.along {
            pack_along(to, lines, scale);
        } else {
            pack_across(to, lines, scale);
        }
    }
}

/// # Safety
/// The processor has products of bf16.
#[expect(unsafe_code, reason = "an instruction that Rust has no name for")]
#[target_feature(enable = "neon,bf16")]
unsafe fn pack_along<N: Narrow, const LINES: usize>(
    to: &mut [Step<LINES>],
    lines: &Lines<'_, N>,
    scale: f32,
) {
    for i in lines.count..LINES {
        for to in &mut *to {
            to[i] = [0; STEP];
        }
    }
    for i in 0..lines.count {
        let (whole, rest) = lines.data[i * lines.stride..][..lines.inner].as_chunks::<STEP>();
        let (to, last) = to.split_at_mut(whole.len());
        for (to, from) in to.iter_mut().zip(whole) {
            // SAFETY: by the contract of this function.
            unsafe { N::narrow(&mut to[i], from, scale) };
        }
        for to in last {
            let mut from = [N::zeroed(); STEP];
            from[..rest.len()].copy_from_slice(rest);
            // SAFETY: by the contract of this function.
            unsafe { N::narrow(&mut to[i], &from, scale) };
        }
    }
}

/// # Safety
/// The processor has products of bf16.
#[expect(unsafe_code, reason = "an instruction that Rust has no name for")]
#[target_feature(enable = "neon,bf16")]
unsafe fn pack_across<N: Narrow, const LINES: usize>(
    to: &mut [Step<LINES>],
    lines: &Lines<'_, N>,
    scale: f32,
) {
    for (step, to) in to.iter_mut().enumerate() {
        let mut rows = [[0; NR]; STEP];
        for (p, row) in (step * STEP..lines.inner).zip(&mut rows) {
            let from = &lines.data[p * lines.stride..][..lines.count];
            let (whole, rest) = from.as_chunks::<STEP>();
            let (row, last) = row.as_chunks_mut().0.split_at_mut(whole.len());
            for (to, from) in row.iter_mut().zip(whole) {
                // SAFETY: by the contract of this function.
                unsafe { N::narrow(to, from, scale) };
            }
            if !rest.is_empty() {
                let mut from = [N::zeroed(); STEP];
                from[..rest.len()].copy_from_slice(rest);
                // SAFETY: by the contract of this function.
                unsafe { N::narrow(&mut last[0], &from, scale) };
            }
        }
        let mut turned = [[0; STEP]; NR];
        for (half, to) in turned.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: 8 of 16 numbers of each row are read, and 8 times 4 written.
            unsafe {
                let [a, b, c, d] = rows
                    .each_ref()
                    .map(|row| vld1q_u16(row[8 * half..].as_ptr()));
                vst4q_u16(to.as_flattened_mut().as_mut_ptr(), uint16x8x4_t(a, b, c, d));
            }
        }
        to.copy_from_slice(&turned[..LINES]);
    }
}

/// What can be rounded to bf16, if it is not that.
trait Narrow: Pod {
    /// Numbers times `scale`, which is 1 for those that are bf16.
    ///
    /// # Safety
    /// The processor has products of bf16, and the function that this becomes a part of is compiled for them.
    #[expect(unsafe_code, reason = "an instruction that Rust has no name for")]
    unsafe fn narrow(to: &mut [u16; STEP], from: &[Self; STEP], scale: f32);
}

impl Narrow for bf16 {
    #[expect(unsafe_code, reason = "as for f32")]
    #[inline(always)]
    unsafe fn narrow(to: &mut [u16; STEP], from: &[Self; STEP], _: f32) {
        *to = *cast_ref(from);
    }
}

impl Narrow for f32 {
    #[expect(unsafe_code, reason = "an instruction that Rust has no name for")]
    #[inline(always)]
    unsafe fn narrow(to: &mut [u16; STEP], from: &[Self; STEP], scale: f32) {
        // SAFETY: by the contract of this function; four numbers are read and written. The instruction rounds to the nearest, ties to even,
        // as Rust lets a thread's rounding never be otherwise.
        unsafe {
            let wide = vmulq_n_f32(vld1q_f32(from.as_ptr()), scale);
            let narrow: uint16x4_t;
            asm!(
                "bfcvtn {narrow:v}.4h, {wide:v}.4s",
                narrow = out(vreg) narrow,
                wide = in(vreg) wide,
                options(pure, nomem, nostack, preserves_flags),
            );
            vst1_u16(to.as_mut_ptr(), narrow);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::product::term::Factor;
    use crate::random::fill_normal;
    use crate::storage::DType;
    use crate::storage::{NumberFormat, matrix_of};
    use crate::tensor::Tensor;

    fn random(rows: usize, cols: usize, dtype: DType, key: u64) -> Tensor {
        let mut numbers = Tensor::zeros(rows, cols);
        fill_normal(numbers.view_mut(), 1.0, key);
        Tensor::from_f32_as(rows, cols, &numbers.to_vec(), dtype)
    }

    fn skipped() -> bool {
        if !supported() {
            eprintln!("skipped: this processor has no products of bf16");
        }
        !supported()
    }

    fn rounded(x: f32) -> f64 {
        f64::from(bf16::from_f32(x).to_f32())
    }

    /// out + the product of the rounded factors, in f64.
    fn add_reference(out: &mut [f64], term: &Term<'_>) {
        let Term { a, b, scale, .. } = *term;
        let a = a.wide();
        let numbers = b.view.to_vec();
        for (i, out) in out.chunks_exact_mut(b.cols()).enumerate() {
            for p in 0..b.rows() {
                let x = rounded(a.data()[i * a.row_stride() + p * a.col_stride()]);
                for (j, out) in out.iter_mut().enumerate() {
                    let (row, col) = if b.transposed { (j, p) } else { (p, j) };
                    let y = numbers[(b.first_row + row) * b.view.cols() + b.first_col + col];
                    *out += x * rounded(scale * y);
                }
            }
        }
    }

    /// ‖y - expected‖ / ‖expected‖.
    fn error(y: &Tensor, expected: &[f64]) -> f64 {
        let y = y.to_vec();
        let off = y
            .iter()
            .zip(expected)
            .map(|(y, e)| (f64::from(*y) - e).powi(2));
        (off.sum::<f64>() / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
    }

    fn run(y: &mut Tensor, accumulate: bool, terms: &[Term<'_>]) {
        let (rows, cols) = (y.rows(), y.cols());
        let out = MatMut::new(y.view_mut().into_f32s(), rows, cols);
        multiply(out, accumulate, terms);
    }

    fn factor(b: &Tensor, turned: bool) -> Factor<'_> {
        if turned {
            Factor::turned(b.view())
        } else {
            Factor::straight(b.view())
        }
    }

    /// All orders, formats and edges, and sums of several terms.
    #[test]
    fn products_are_those_of_rounded_factors() {
        if skipped() {
            return;
        }
        for (rows, inner, cols) in [
            (1, 1, 1),
            (6, 4, 16),
            (33, 127, 32),
            (61, 150, 83),
            (100, 1700, 37),
        ] {
            for case in 0..16 {
                let [turned, narrow, sum, left_turned] = [1, 2, 4, 8].map(|bit| case & bit != 0);
                let dtype = if narrow { DType::Bf16 } else { DType::F32 };
                let a = if left_turned {
                    random(inner, rows, DType::F32, 1)
                } else {
                    random(rows, inner, DType::F32, 1)
                };
                let left = if left_turned {
                    a.view().as_mat().t()
                } else {
                    a.view().as_mat()
                };
                let b = if turned {
                    random(cols, inner, dtype, 2)
                } else {
                    random(inner, cols, dtype, 2)
                };
                let (u, v) = (
                    random(rows, 5, DType::F32, 3),
                    random(cols, 5, DType::F32, 4),
                );
                let terms = [
                    Term::new(left, factor(&b, turned)),
                    Term {
                        scale: 0.3,
                        ..Term::new(u.view().as_mat(), Factor::turned(v.view()))
                    },
                    Term {
                        scale: -1.5,
                        ..Term::new(left, factor(&b, turned))
                    },
                ];
                let mut y = random(rows, cols, DType::F32, 5);
                let mut expected = vec![0.0; rows * cols];
                if sum {
                    expected = y.to_vec().iter().map(|x| f64::from(*x)).collect();
                }
                for term in &terms {
                    add_reference(&mut expected, term);
                }
                run(&mut y, sum, &terms);
                let off = error(&y, &expected);
                assert!(off < 1e-5, "{rows}x{inner}x{cols}, case {case}: {off:e}");
            }
        }
    }

    /// The bits do not depend on which rows and columns are computed together.
    #[test]
    fn an_element_has_the_same_bits_in_any_piece() {
        if skipped() {
            return;
        }
        let (rows, inner, cols) = (110, 700, 70);
        let (x, w) = (
            random(rows, inner, DType::F32, 1),
            random(cols, inner, DType::Bf16, 2),
        );
        let (x, w) = (x.view().as_mat(), Factor::turned(w.view()));
        let mut all = Tensor::zeros(rows, cols);
        run(&mut all, false, &[Term::new(x, w)]);
        let all = all.to_vec();
        for (down, across) in [
            (13..61, 0..70),
            (0..1, 3..70),
            (50..110, 16..33),
            (7..12, 69..70),
        ] {
            let (a, b) = (
                x.block(down.clone(), 0..inner),
                w.block(0..inner, across.clone()),
            );
            let mut some = Tensor::zeros(down.len(), across.len());
            run(&mut some, false, &[Term::new(a, b)]);
            for (row, found) in down.zip(some.to_vec().chunks(across.len())) {
                assert_eq!(all[row * cols..][across.clone()], *found, "row {row}");
            }
        }
    }

    #[test]
    fn without_terms_there_is_nothing_to_add() {
        if skipped() {
            return;
        }
        let (a, b) = (Tensor::zeros(3, 0), Tensor::zeros(0, 5));
        let term = Term::new(a.view().as_mat(), Factor::straight(b.view()));
        let mut y = random(3, 5, DType::F32, 1);
        let before = y.to_vec();
        run(&mut y, true, &[term]);
        assert_eq!(y.to_vec(), before);
        run(&mut y, false, &[term]);
        assert_eq!(y.to_vec(), [0.0; 15]);
    }

    /// A format that is widened first is rounded like the f32 numbers that it stands for.
    #[test]
    fn any_format_can_be_packed() {
        if skipped() {
            return;
        }
        let [stored, wide] = matrix_of(NumberFormat::Q8_0, 48, 64);
        for turned in [false, true] {
            let mut found = [vec![[[7; STEP]; NR]; 12], vec![[[8; STEP]; NR]; 12]];
            for (which, to) in found.iter_mut().enumerate() {
                let (rows, cols) = if turned {
                    (3..23, 5..26)
                } else {
                    (5..26, 2..22)
                };
                let pack = PackRight {
                    to,
                    inner: 6, // 21 inner indices
                    part: 0..6,
                    window: Window {
                        stride: 64,
                        rows,
                        cols,
                    },
                    turned,
                    scale: 0.5,
                };
                let matrix = if which == 0 { &stored } else { &wide };
                pack.pack_numbers(matrix.view().numbers());
            }
            assert_eq!(found[0], found[1]);
            for (p, j) in [(0, 0), (20, 19), (13, 4), (21, 0), (3, 20)] {
                let (row, col) = if turned {
                    (3 + j, 5 + p)
                } else {
                    (5 + p, 2 + j)
                };
                let there = p < 21 && j < 20;
                let expected = if there {
                    0.5 * wide.view().get(row, col)
                } else {
                    0.0
                };
                let found = found[0][j / NR * 6 + p / STEP][j % NR][p % STEP];
                assert_eq!(found, bf16::from_f32(expected).to_bits(), "{p} {j}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        if skipped() {
            return;
        }
        for (x, w) in [
            (f32::INFINITY, 1.0),
            (1.0, f32::NEG_INFINITY),
            (f32::NAN, 1.0),
            (1.0, f32::NAN),
        ] {
            let a = Tensor::from_f32_as(7, 9, &[x; 63], DType::F32);
            let b = Tensor::from_f32_as(9, 3, &[w; 27], DType::F32);
            let mut y = Tensor::zeros(7, 3);
            run(
                &mut y,
                false,
                &[Term::new(a.view().as_mat(), Factor::straight(b.view()))],
            );
            let same = |y: &f32| {
                if (x * w).is_nan() {
                    y.is_nan()
                } else {
                    *y == x * w
                }
            };
            assert!(y.to_vec().iter().all(same), "{x} {w}");
        }
    }
}
