//! The product under every linear and under attention: a tile of y (+)= Σ a·b on one thread, for AVX2 with FMA.
//!
//! `gemm-f32` reads two f32 matrices and packs both for every call. Here one factor is a frozen
//! weight, often bf16, and the other is read where it lies: a strip of b is widened once into panels of
//! 16 columns, blocks of rows of a pass by one panel before the next one's turn, and a block of
//! 6 × 16 sums stays in registers, or one of [`wide`](crate::cpu::product::avx512) where there are wider ones (Goto and van de Geijn, "Anatomy of High-Performance Matrix
//! Multiplication", 2008).
//!
//! Every element of y is summed over the terms, and within a term over the inner index, in order,
//! whatever tile it lies in. So the bits do not depend on how an output is cut.

use std::arch::x86_64::{
    __m256, _MM_HINT_T0, _mm_prefetch, _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps,
    _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use crate::cpu::engine::{Engine, engine};
use crate::cpu::product::avx512;
use crate::cpu::product::blocks::{Block, Left, MR, NR, add_panels, pack_rows};
use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::product::strips::{Factor, Term};
use crate::cpu::scratch::with_scratch;
use crate::storage::{Number, Storage, UnitVisitor, Window};

/// Inner indices of a panel, at most: with 16 columns 36 KiB. More than the L1 cache holds, but it is read in
/// order, and fewer parts mean fewer passes over the output; measured, 320 was about 1 % slower.
const DEPTH: usize = 576;
/// Rows of `a` that pass by a panel before the next panel's turn, so that they stay in the L2 cache.
const ROWS: usize = 8 * MR;

/// Rows of `a` that are a multiple of so many numbers apart would all lie in the same few places of the
/// caches; they are copied.
const CONFLICT: usize = 1024;

/// Whether this processor can.
#[inline]
pub(crate) fn supported() -> bool {
    engine() >= Engine::Avx2
}

/// Inner indices that panels may hold on top of [`DEPTH`], so that a low-rank branch goes with its linear.
const SLACK: usize = 64;

/// out (+)= Σ terms, each of the size of `out`, on one thread. With `accumulate` they are added to what is there.
///
/// # Panics
/// If the shapes do not match, or the processor is not [`supported`].
pub(crate) fn multiply(mut out: MatMut<'_>, accumulate: bool, terms: &[Term<'_>]) {
    assert!(supported(), "a processor without AVX2 and FMA");
    let cols = out.cols();
    for term in terms {
        assert_eq!(term.a.rows(), out.rows(), "rows of a product");
        assert_eq!(term.b.cols(), cols, "columns of a product");
        assert_eq!(term.a.cols(), term.b.rows(), "inner size of a product");
    }
    let lefts: Vec<Mat<'_>> = terms.iter().map(|term| term.a).collect();
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
    assert!(supported(), "a processor without AVX2 and FMA");
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

/// factor·bᵀ in panels [columns / 16][inner][16]; columns past the last are zero. Rows of b lie in one piece each.
///
/// # Panics
/// If `to` has not that size, or the processor is not [`supported`].
pub(crate) fn pack_columns(to: &mut [f32], b: Mat<'_>, factor: f32) {
    assert!(supported(), "a processor without AVX2 and FMA");
    let (cols, inner) = (b.rows(), b.cols());
    assert_eq!(b.col_stride(), 1, "rows that lie in one piece");
    assert_eq!(to.len(), cols.next_multiple_of(NR) * inner, "panels");
    let mut panels = Panels {
        numbers: to,
        inner,
        part: 0..inner,
    };
    pack_turned(&mut panels, b.data(), b.row_stride(), cols);
    panels.scale(cols, factor);
}

/// Some inner indices of a term that share panels with others.
struct Part {
    term: usize,
    range: std::ops::Range<usize>,
}

/// Cuts the inner indices of terms of these sizes into runs, whose panels exist at the same time.
fn runs(sizes: &[usize]) -> Vec<Vec<Part>> {
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
    pack: impl Fn(&mut Panels<'_>, usize, std::ops::Range<usize>),
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

/// Panels that are being filled: [cols / 16][inner][16], of which a part of the inner indices is meant.
struct Panels<'a> {
    numbers: &'a mut [f32],
    inner: usize,
    part: std::ops::Range<usize>,
}

impl Panels<'_> {
    /// The part of a panel: rows of 16.
    fn panel(&mut self, index: usize) -> &mut [f32] {
        let start = (index * self.inner + self.part.start) * NR;
        &mut self.numbers[start..][..self.part.len() * NR]
    }

    fn scale(&mut self, cols: usize, factor: f32) {
        if factor == 1.0 {
            return;
        }
        for panel in 0..cols.div_ceil(NR) {
            for x in self.panel(panel) {
                *x *= factor;
            }
        }
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

/// The rows and 16 columns of a block of out (+)= Σ lefts · panel.
///
/// # Safety
/// The processor is [`supported`].
///
/// # Panics
/// If a left factor or the output is too small, or the panel too short.
#[expect(unsafe_code, reason = "kernels take pointers")]
#[inline]
pub(crate) unsafe fn block<const COL: usize>(
    out: &mut MatMut<'_>,
    block: Block,
    lefts: &[Left<'_>],
    b: &[f32],
) {
    let Block {
        row,
        height,
        col,
        first,
        add,
    } = block;
    let inner: usize = lefts.iter().map(|left| left.inner).sum();
    assert!((1..=MR).contains(&height) && row + height <= out.rows() && col + NR <= out.cols());
    assert!(first.is_multiple_of(MR) && b.len() >= inner * NR);
    for left in lefts {
        left.check::<COL>(first + height);
    }
    let kernel = match height {
        1 => kernel::<1, COL>,
        2 => kernel::<2, COL>,
        3 => kernel::<3, COL>,
        4 => kernel::<4, COL>,
        5 => kernel::<5, COL>,
        _ => kernel::<6, COL>,
    };
    let (start, stride) = out.pointer(row, col);
    // SAFETY: the processor has AVX2 and FMA by the contract of this function. The assertions show that the rows of the left
    // factors lie within their data, that the panel has as many rows of 16 as these have inner indices, and that the output
    // has 16 columns in each of `height` rows.
    unsafe { kernel(lefts, first, b.as_ptr(), start, stride, add) }
}

/// c (+)= Σ lefts · b for `M` rows and one panel of 16 columns.
///
/// # Safety
/// The processor has AVX2 and FMA. The rows `first..first + M` of each left factor lie within its data, as [`Left`] says
/// for `COL`; `b` has as many rows of 16 as they have inner indices; 16 numbers of c can be written at `i·c_row` for i < M.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel<const M: usize, const COL: usize>(
    lefts: &[Left<'_>],
    first: usize,
    mut b: *const f32,
    c: *mut f32,
    c_row: usize,
    add: bool,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        fetch::<M>(c, c_row);
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        for left in lefts {
            let a = left.data.as_ptr().add(first * left.row_stride);
            let a_row = if COL == 1 { left.row_stride } else { 1 };
            b = add_products(&mut sums, left.inner, a, (a_row, COL), (b, NR));
        }
        store(sums, c, c_row, add);
    }
}

/// c (+)= a·b for `M` rows and 16 columns, with any strides.
///
/// # Safety
/// The processor has AVX2 and FMA. `a` can be read at `i·a_row + p·a_col` and `b` at `p·b_row + j` for
/// i < M, p < inner, j < 16, and `c` written at `i·c_row + j`.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2,fma")]
unsafe fn thin_kernel<const M: usize>(
    inner: usize,
    a: *const f32,
    a_strides: (usize, usize),
    b: (*const f32, usize),
    c: *mut f32,
    c_row: usize,
    add: bool,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        fetch::<M>(c, c_row);
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        add_products(&mut sums, inner, a, a_strides, b);
        store(sums, c, c_row, add);
    }
}

/// Asks for `M` rows of 16 numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn fetch<const M: usize>(c: *const f32, c_row: usize) {
    for i in 0..M {
        let row = c.wrapping_add(i * c_row);
        _mm_prefetch::<_MM_HINT_T0>(row.cast());
        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(NR - 1).cast());
    }
}

/// sums += a·b; gives the place behind b.
///
/// # Safety
/// As [`thin_kernel`].
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline(always)] // Else the sums would go through memory.
unsafe fn add_products<const M: usize>(
    sums: &mut [[__m256; 2]; M],
    inner: usize,
    mut a: *const f32,
    (a_row, a_col): (usize, usize),
    (mut b, b_row): (*const f32, usize),
) -> *const f32 {
    // SAFETY: by the contract of this function.
    unsafe {
        for _ in 0..inner / 4 {
            for p in 0..4 {
                step(sums, a.add(p * a_col), a_row, b.add(p * b_row));
            }
            a = a.add(4 * a_col);
            b = b.add(4 * b_row);
        }
        for _ in 0..inner % 4 {
            step(sums, a, a_row, b);
            a = a.add(a_col);
            b = b.add(b_row);
        }
    }
    b
}

/// c (+)= sums.
///
/// # Safety
/// The processor has AVX2 and FMA; 16 numbers of c can be written at `i·c_row` for i < M.
#[expect(unsafe_code, reason = "vector stores take pointers")]
#[inline(always)]
unsafe fn store<const M: usize>(sums: [[__m256; 2]; M], c: *mut f32, c_row: usize, add: bool) {
    // SAFETY: by the contract of this function.
    unsafe {
        for (i, [mut low, mut high]) in sums.into_iter().enumerate() {
            let c = c.add(i * c_row);
            if add {
                low = _mm256_add_ps(low, _mm256_loadu_ps(c));
                high = _mm256_add_ps(high, _mm256_loadu_ps(c.add(8)));
            }
            _mm256_storeu_ps(c, low);
            _mm256_storeu_ps(c.add(8), high);
        }
    }
}

/// One inner index.
///
/// # Safety
/// As [`thin_kernel`].
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn step<const M: usize>(
    sums: &mut [[__m256; 2]; M],
    a: *const f32,
    a_row: usize,
    b: *const f32,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        let (low, high) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
        for (i, sum) in sums.iter_mut().enumerate() {
            let a = _mm256_broadcast_ss(&*a.add(i * a_row));
            sum[0] = _mm256_fmadd_ps(a, low, sum[0]);
            sum[1] = _mm256_fmadd_ps(a, high, sum[1]);
        }
    }
}

/// out (+)= a·b on one thread, for few rows of `a`, each used once with each number of `b`: nothing is
/// packed.
///
/// # Panics
/// If the shapes do not match, or the processor is not [`supported`].
pub(crate) fn multiply_thin(mut out: MatMut<'_>, accumulate: bool, a: Mat<'_>, b: Mat<'_>) {
    assert!(supported(), "a processor without AVX2 and FMA");
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
    if avx512::supported() {
        for col in (0..whole).step_by(2 * NR) {
            let across = col..(col + 2 * NR).min(whole);
            for row in (0..rows).step_by(avx512::THIN) {
                let down = row..(row + avx512::THIN).min(rows);
                let (a, b) = (
                    a.block(down.clone(), 0..inner),
                    b.block(0..inner, across.clone()),
                );
                let out = out.window(down, across.clone());
                if across.len() == NR {
                    avx512::thin::<1>(out, accumulate, a, b);
                } else {
                    avx512::thin::<2>(out, accumulate, a, b);
                }
            }
        }
    } else {
        for col in (0..whole).step_by(NR) {
            for row in (0..rows).step_by(THIN) {
                let height = THIN.min(rows - row);
                thin(&mut out, (row, height), col, accumulate, a, b);
            }
        }
    }
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

/// Rows of a thin product that are summed together.
const THIN: usize = 4;

/// A block of a thin product: up to 4 rows and 16 columns.
#[expect(unsafe_code, reason = "kernels take pointers")]
fn thin(
    out: &mut MatMut<'_>,
    (row, height): (usize, usize),
    col: usize,
    add: bool,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    let inner = a.cols();
    let a = a.block(row..row + height, 0..inner);
    let b = b.block(0..inner, col..col + NR);
    assert!(row + height <= out.rows() && col + NR <= out.cols() && inner > 0);
    assert!((height - 1) * a.row_stride() + (inner - 1) * a.col_stride() < a.data().len());
    assert!((inner - 1) * b.row_stride() + NR <= b.data().len());
    let kernel = match height {
        1 => thin_kernel::<1>,
        2 => thin_kernel::<2>,
        3 => thin_kernel::<3>,
        _ => thin_kernel::<4>,
    };
    let (start, stride) = out.pointer(row, col);
    // SAFETY: `multiply_thin` has checked that the processor has AVX2 and FMA; the assertions above show
    // that reads of both factors lie within their data, and that the output has 16 columns in each row.
    unsafe {
        kernel(
            inner,
            a.data().as_ptr(),
            (a.row_stride(), a.col_stride()),
            (b.data().as_ptr(), b.row_stride()),
            start,
            stride,
            add,
        );
    }
}

/// Rows of b from `first` on in panels of 16 columns; columns past the last are zero.
fn pack(to: &mut Panels<'_>, b: Factor<'_>, first: usize, cols: usize) {
    let window = b.window(first..first + to.part.len(), 0..cols);
    b.view.numbers().visit(Pack {
        to,
        window,
        transposed: b.transposed,
        cols,
    });
}

struct Pack<'a, 'p> {
    to: &'a mut Panels<'p>,
    window: Window,
    transposed: bool,
    cols: usize,
}

impl UnitVisitor for Pack<'_, '_> {
    type Output = ();

    fn visit<S: Storage>(self, units: &[S]) {
        self.window.read(units, |numbers, stride| {
            if self.transposed {
                pack_turned(self.to, numbers, stride, self.cols);
            } else {
                pack_straight(self.to, numbers, stride, self.cols);
            }
        });
    }
}

/// Panels of b as it lies: its rows start `stride` apart.
#[expect(unsafe_code, reason = "vector code")]
fn pack_straight<N: Number>(to: &mut Panels<'_>, from: &[N], stride: usize, cols: usize) {
    let (whole, inner) = (cols / NR, to.part.len());
    if inner == 0 {
        return;
    }
    if whole > 0 {
        assert!((inner - 1) * stride + whole * NR <= from.len());
        assert!(to.part.end <= to.inner && to.numbers.len() >= whole * to.inner * NR);
        let start = &raw mut to.numbers[to.part.start * NR];
        // SAFETY: `multiply` has checked the processor; the assertions show that `inner` rows of
        // `whole` times 16 numbers lie within `from`, and that `to` has room for them.
        unsafe { straight(start, to.inner, from.as_ptr(), stride, whole, inner) }
    }
    let width = cols - whole * NR;
    if width > 0 {
        for (p, to) in to.panel(whole).chunks_exact_mut(NR).enumerate() {
            to[width..].fill(0.0);
            let from = &from[p * stride + whole * NR..][..width];
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.wide();
            }
        }
    }
}

/// Rows ahead of the one that is copied, whose way from memory begins.
const AHEAD: usize = 8;

/// # Safety
/// The processor has AVX2; `inner` rows of `panels` times 16 numbers can be read, and as many rows of 16 written to
/// each panel; those start `depth` rows apart.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2")]
unsafe fn straight<N: Number>(
    to: *mut f32,
    depth: usize,
    from: *const N,
    stride: usize,
    panels: usize,
    inner: usize,
) {
    let line = 64 / size_of::<N>();
    // SAFETY: by the contract of this function; a prefetch may name any address.
    unsafe {
        for p in 0..inner {
            let from = from.add(p * stride);
            for col in (0..panels * NR).step_by(line) {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD * stride + col).cast());
            }
            for panel in 0..panels {
                let from = from.add(panel * NR);
                let to = to.add((panel * depth + p) * NR);
                _mm256_storeu_ps(to, N::load(from));
                _mm256_storeu_ps(to.add(8), N::load(from.add(8)));
            }
        }
    }
}

/// Panels of b from its transpose: row j of `from` becomes column j; rows start `stride` apart.
#[expect(unsafe_code, reason = "vector code")]
fn pack_turned<N: Number>(to: &mut Panels<'_>, from: &[N], stride: usize, cols: usize) {
    let inner = to.part.len();
    for panel in 0..cols.div_ceil(NR) {
        let from = &from[panel * NR * stride..];
        let width = NR.min(cols - panel * NR);
        let to = to.panel(panel);
        let whole = if width == NR { inner / 8 * 8 } else { 0 };
        if whole > 0 {
            assert!((NR - 1) * stride + inner <= from.len() && to.len() >= inner * NR);
            // SAFETY: `multiply` has checked the processor; the assertion shows that 16 rows of `inner`
            // numbers lie within `from`, and that `to` holds `inner` rows of 16.
            unsafe { turned(to.as_mut_ptr(), from.as_ptr(), stride, whole) }
        }
        for (p, to) in to.chunks_exact_mut(NR).enumerate().skip(whole) {
            to[width..].fill(0.0);
            for (j, to) in to[..width].iter_mut().enumerate() {
                *to = from[j * stride + p].wide();
            }
        }
    }
}

/// # Safety
/// The processor has AVX2; 16 rows of `inner` numbers can be read, `inner` rows of 16 written, and
/// `inner` is a multiple of 8.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2")]
unsafe fn turned<N: Number>(to: *mut f32, from: *const N, stride: usize, inner: usize) {
    let line = 64 / size_of::<N>();
    // SAFETY: by the contract of this function; a prefetch may name any address.
    unsafe {
        for p in (0..inner).step_by(8) {
            for half in 0..2 {
                let from = from.add(8 * half * stride + p);
                let to = to.add(p * NR + 8 * half);
                let mut rows = [_mm256_setzero_ps(); 8];
                for (j, row) in rows.iter_mut().enumerate() {
                    *row = N::load(from.add(j * stride));
                    if p % line == 0 {
                        // The same place of the next panel.
                        let next = from.wrapping_add((NR + j) * stride);
                        _mm_prefetch::<_MM_HINT_T0>(next.cast());
                    }
                }
                for (i, row) in transpose(rows).into_iter().enumerate() {
                    _mm256_storeu_ps(to.add(i * NR), row);
                }
            }
        }
    }
}

/// Eight rows of eight numbers become eight columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    let mut fours = [_mm256_setzero_ps(); 8];
    for half in 0..2 {
        let (a, b, c, d) = (
            pairs[4 * half],
            pairs[4 * half + 1],
            pairs[4 * half + 2],
            pairs[4 * half + 3],
        );
        fours[4 * half] = _mm256_shuffle_ps::<0b01_00_01_00>(a, c);
        fours[4 * half + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(a, c);
        fours[4 * half + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(b, d);
        fours[4 * half + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(b, d);
    }
    let mut columns = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        columns[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[4 + i]);
        columns[4 + i] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[4 + i]);
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor with AVX-512 does not come by this code otherwise.
    #[test]
    fn thin_blocks_are_sums_of_products() {
        if !supported() {
            eprintln!("skipped: this processor has no AVX2 with FMA");
            return;
        }
        let numbers = |len: usize, seed: usize| -> Vec<f32> {
            (0..len).map(|i| (i * seed % 17) as f32 - 8.0).collect()
        };
        let (inner, stride) = (41, 37);
        let b = numbers(inner * stride, 7);
        for height in 1..=THIN {
            let a = numbers(inner * height, 5);
            for add in [false, true] {
                let mut out = numbers(height * NR, 3);
                let before = out.clone();
                let left = Mat::new(&a, inner, height).t();
                let right = Mat::strided(&b, inner, NR, stride);
                let mut whole = MatMut::new(&mut out, height, NR);
                thin(&mut whole, (0, height), 0, add, left, right);
                for (at, (found, start)) in out.iter().zip(before).enumerate() {
                    let (i, j) = (at / NR, at % NR);
                    let product = |p: usize| a[p * height + i] * b[p * stride + j];
                    let sum: f32 = (0..inner).map(product).sum();
                    assert_eq!(*found, if add { start + sum } else { sum });
                }
            }
        }
    }
}
