//! The product under every linear and under attention: a tile of y (+)= Σ a·b on one thread, for processors with NEON, or AVX2 and FMA.
//!
//! `gemm-f32` reads two f32 matrices and packs both for every call. Here one factor is a frozen
//! weight, often bf16, and the other is read where it lies: a strip of b is widened once into panels of
//! 16 columns, blocks of rows of a pass by one panel before the next one's turn, and a block of
//! 6 × 16 sums stays in registers, or a larger one where there are wider registers ([`blocks`](crate::cpu::product::blocks); Goto and van de Geijn,
//! "Anatomy of High-Performance Matrix Multiplication", 2008).
//!
//! Every element of y is summed over the terms, and within a term over the inner index, in order,
//! whatever tile it lies in. So the bits do not depend on how an output is cut.

use std::ops::Range;

use crate::cpu::engine::{Engine, engine};
use crate::cpu::product::blocks::{add_panels, pack_rows};
use crate::cpu::product::layout::{Left, MR, NR};
use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::product::pack::{Panels, pack, pack_straight, pack_turned};
use crate::cpu::product::term::Term;
#[cfg(not(target_arch = "x86_64"))]
use crate::cpu::product::vectors::thin as narrow;
#[cfg(target_arch = "x86_64")]
use crate::cpu::product::{avx2 as narrow, avx512};
use crate::cpu::scratch::with_scratch;

/// Inner indices of a panel, at most: with 16 columns 36 KiB. More than the L1 cache holds, but it is read in
/// order, and fewer parts mean fewer passes over the output; measured, 320 was about 1 % slower.
const DEPTH: usize = 576;
/// Rows of `a` that pass by a panel before the next panel's turn, so that they stay in the L2 cache.
pub(crate) const ROWS: usize = 8 * MR;

/// Rows of `a` that are a multiple of so many numbers apart would all lie in the same few places of the
/// caches; they are copied.
const CONFLICT: usize = 1024;

/// Inner indices that panels may hold on top of [`DEPTH`], so that a low-rank branch goes with its linear.
const SLACK: usize = 64;

/// Whether this processor has code for it.
#[inline]
pub(crate) fn supported() -> bool {
    engine() != Engine::Portable
}

/// out (+)= Σ terms, each of the size of `out`, on one thread. With `accumulate` they are added to what is there.
///
/// # Panics
/// If the shapes do not match, or the processor is not [`supported`].
pub(crate) fn multiply(mut out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>]) {
    assert!(supported(), "a processor without code for panels");
    let cols = out.cols();
    for term in terms {
        assert_eq!(term.a.rows(), out.rows(), "rows of a product");
        assert_eq!(term.b.cols(), cols, "columns of a product");
        assert_eq!(term.a.cols(), term.b.rows(), "inner size of a product");
    }
    let lefts: Vec<Mat<'_>> = terms.iter().map(|term| term.a.wide()).collect();
    for_runs(&mut out, accumulate, &lefts, |panels, i, part| {
        let Term { b, scale, .. } = terms[i];
        pack(panels, b, part.start, cols);
        panels.scale(cols, scale);
    });
}

/// out (+)= alpha·a·b on one thread, for two matrices in f32.
///
/// # Panics
/// If the shapes do not match, or the processor is not [`supported`].
pub(crate) fn multiply_mats(
    mut out: MatMut<'_>,
    accumulate: bool,
    alpha: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    assert!(supported(), "a processor without code for panels");
    let (cols, inner) = (out.cols(), a.cols());
    assert_eq!(a.rows(), out.rows(), "rows of a product");
    assert_eq!(b.cols(), cols, "columns of a product");
    assert_eq!(b.rows(), inner, "inner size of a product");
    for_runs(&mut out, accumulate, &[a], |panels, _, part| {
        let b = b.block(part, 0..cols);
        if b.col_stride() == 1 {
            pack_straight(panels, b.data(), b.row_stride(), cols);
        } else {
            assert_eq!(
                b.row_stride(),
                1,
                "a matrix that lies in rows or in columns"
            );
            pack_turned(panels, b.data(), b.col_stride(), cols);
        }
        panels.scale(cols, alpha);
    });
}

/// Some inner indices of a term that share panels with others.
pub(crate) struct Part {
    pub(crate) term: usize,
    pub(crate) range: Range<usize>,
}

/// Cuts the inner indices of terms of these sizes into runs, whose panels exist at the same time.
pub(crate) fn runs(sizes: &[usize]) -> Vec<Vec<Part>> {
    let mut runs: Vec<Vec<Part>> = Vec::new();
    let mut room = 0;
    for (term, &inner) in sizes.iter().enumerate() {
        // Parts of about one size, multiples of 8 for the sake of transposing.
        let depth = inner
            .div_ceil(inner.div_ceil(DEPTH).max(1))
            .next_multiple_of(8);
        for start in (0..inner).step_by(depth.max(1)) {
            let range = start..(start + depth).min(inner);
            if range.len() > room {
                runs.push(Vec::new());
                room = DEPTH + SLACK;
            }
            room -= range.len();
            if let Some(run) = runs.last_mut() {
                run.push(Part { term, range });
            }
        }
    }
    runs
}

/// Multiplies a run after the other with what `pack` makes of each of its parts.
fn for_runs(
    out: &mut MatMut<'_>,
    accumulate: bool,
    lefts: &[Mat<'_>],
    pack: impl Fn(&mut Panels<'_>, usize, Range<usize>),
) {
    let rows = out.rows();
    let panels = out.cols().div_ceil(NR);
    let sizes: Vec<usize> = lefts.iter().map(Mat::cols).collect();
    let mut add = accumulate;
    for run in runs(&sizes) {
        let inner: usize = run.iter().map(|part| part.range.len()).sum();
        with_scratch(panels * NR * inner, |scratch| {
            let mut first = 0;
            for Part { term, range } in &run {
                let mut panels = Panels {
                    numbers: &mut *scratch,
                    inner,
                    part: first..first + range.len(),
                };
                pack(&mut panels, *term, range.clone());
                first += range.len();
            }
            let lefts: Vec<Mat<'_>> = run
                .iter()
                .map(|part| lefts[part.term].block(0..rows, part.range.clone()))
                .collect();
            multiply_run(out, add, &lefts, inner, scratch);
        });
        add = true;
    }
    if !add {
        out.fill_zero();
    }
}

/// One run of inner indices, of `inner` in all; `panels` hold its right factors.
fn multiply_run(out: &mut MatMut<'_>, add: bool, lefts: &[Mat<'_>], inner: usize, panels: &[f32]) {
    let rows = out.rows();
    let mut in_place = Vec::with_capacity(lefts.len());
    for start in (0..rows).step_by(ROWS) {
        let block = start..(start + ROWS).min(rows);
        let count = block.len();
        let lefts = (lefts.iter()).map(|a| a.block(start..start + count, 0..a.cols()));
        if lefts.clone().any(|a| a.col_stride() != 1) {
            // Rows that do not lie in one piece are copied: 6 at a time side by side.
            with_scratch(count.next_multiple_of(MR) * inner, |scratch| {
                pack_rows(scratch, &lefts, inner);
                let left = Left {
                    data: scratch,
                    row_stride: inner,
                    inner,
                };
                add_panels::<MR>(out, block.start, count, add, &[left], panels);
            });
        } else if lefts
            .clone()
            .any(|a| a.row_stride().is_multiple_of(CONFLICT))
        {
            let stride = inner.next_multiple_of(NR) + NR;
            with_scratch(count * stride, |scratch| {
                let mut first = 0;
                for a in lefts {
                    for (i, to) in scratch.chunks_exact_mut(stride).enumerate() {
                        to[first..first + a.cols()]
                            .copy_from_slice(&a.data()[i * a.row_stride()..][..a.cols()]);
                    }
                    first += a.cols();
                }
                let left = Left {
                    data: scratch,
                    row_stride: stride,
                    inner,
                };
                add_panels::<1>(out, block.start, count, add, &[left], panels);
            });
        } else {
            in_place.clear();
            in_place.extend(lefts.map(Left::in_place));
            add_panels::<1>(out, block.start, count, add, &in_place, panels);
        }
    }
}

/// out (+)= a·b on one thread, for few rows of `a`, each used once with each number of `b`: nothing is
/// packed.
///
/// # Panics
/// If the shapes do not match, or the processor is not [`supported`].
pub(crate) fn multiply_thin(mut out: MatMut<'_>, accumulate: bool, a: Mat<'_>, b: Mat<'_>) {
    assert!(supported(), "a processor without code for panels");
    let (rows, cols, inner) = (out.rows(), out.cols(), a.cols());
    assert_eq!(a.rows(), rows, "rows of a product");
    assert_eq!(b.cols(), cols, "columns of a product");
    assert_eq!(b.rows(), inner, "inner size of a product");
    assert_eq!(
        b.col_stride(),
        1,
        "rows of the right factor lie in one piece"
    );
    if inner == 0 {
        if !accumulate {
            out.fill_zero();
        }
        return;
    }
    let whole = cols / NR * NR;
    thin_columns(&mut out, whole, accumulate, a, b);
    for row in 0..rows {
        let out = out.row(row);
        for col in whole..cols {
            let sum: f32 = (0..inner)
                .map(|p| {
                    a.data()[row * a.row_stride() + p * a.col_stride()]
                        * b.data()[p * b.row_stride() + col]
                })
                .sum();
            out[col] = if accumulate { out[col] + sum } else { sum };
        }
    }
}

/// The first `whole` columns, a multiple of 16.
fn thin_columns(out: &mut MatMut<'_>, whole: usize, accumulate: bool, a: Mat<'_>, b: Mat<'_>) {
    let rows = out.rows();
    #[cfg(target_arch = "x86_64")]
    if avx512::supported() {
        for col in (0..whole).step_by(2 * NR) {
            let across = col..(col + 2 * NR).min(whole);
            for row in (0..rows).step_by(avx512::THIN) {
                let down = row..(row + avx512::THIN).min(rows);
                let (a, b) = (
                    a.block(down.clone(), 0..a.cols()),
                    b.block(0..a.cols(), across.clone()),
                );
                let out = out.window(down, across.clone());
                if across.len() == NR {
                    avx512::thin::<1>(out, accumulate, a, b);
                } else {
                    avx512::thin::<2>(out, accumulate, a, b);
                }
            }
        }
        return;
    }
    for col in (0..whole).step_by(NR) {
        for row in (0..rows).step_by(narrow::THIN) {
            let height = narrow::THIN.min(rows - row);
            narrow::thin(out, (row, height), col, accumulate, a, b);
        }
    }
}
