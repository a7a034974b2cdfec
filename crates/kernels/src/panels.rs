//! The product under every linear and under attention: a tile of y (+)= Σ a·b on one thread, for AVX2 with FMA.
//!
//! `gemm-f32` reads two f32 matrices and packs both for every call. Here one factor is a frozen
//! weight, often bf16, and the other is read where it lies: a strip of b is widened once into panels of
//! 16 columns, blocks of rows of a pass by one panel before the next one's turn, and a block of
//! 6 × 16 sums stays in registers (Goto and van de Geijn, "Anatomy of High-Performance Matrix
//! Multiplication", 2008).
//!
//! Every element of y is summed over the terms, and within a term over the inner index, in order,
//! whatever tile it lies in. So the bits do not depend on how an output is cut.

use std::arch::x86_64::{
    __m256, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_add_ps, _mm256_broadcast_ss,
    _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_slli_epi32,
    _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use half::bf16;

use crate::matmul::{Mat, MatMut};
use crate::scratch::with_scratch;
use crate::strips::{Factor, Term};
use crate::view::Data;

/// Rows of a block of sums.
const MR: usize = 6;
/// Columns of a panel: two vectors.
const NR: usize = 16;
/// Inner indices of a panel, at most: with 16 columns 36 KiB. More than the L1 cache holds, but it is read in
/// order, and fewer parts mean fewer passes over the output; measured, 320 was about 1 % slower.
const DEPTH: usize = 576;
/// Rows of `a` that pass by a panel before the next panel's turn, so that they stay in the L2 cache.
const ROWS: usize = 8 * MR;

/// Rows of `a` that are a multiple of so many numbers apart would all lie in the same few places of the
/// caches; they are copied.
const CONFLICT: usize = 1024;

/// Whether this processor can.
pub(crate) fn supported() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

/// out (+)= a term, on one thread. With `accumulate` it is added to what is there.
///
/// # Panics
/// If the shapes do not match, or the processor is not [`supported`].
pub(crate) fn multiply(mut out: MatMut<'_>, accumulate: bool, term: &Term<'_>) {
    assert!(supported(), "a processor without AVX2 and FMA");
    let (rows, cols, inner) = (out.rows(), out.cols(), term.a.cols());
    assert_eq!(term.a.rows(), rows, "rows of a product");
    assert_eq!(term.b.cols(), cols, "columns of a product");
    assert_eq!(term.b.rows(), inner, "inner size of a product");
    if inner == 0 {
        if !accumulate {
            out.fill_zero();
        }
        return;
    }
    for_parts(&mut out, accumulate, term.a, term.scale, |panels, part| {
        pack(panels, term.b, part, cols);
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
    if inner == 0 {
        if !accumulate {
            out.fill_zero();
        }
        return;
    }
    for_parts(&mut out, accumulate, a, alpha, |panels, part| {
        let b = b.block(part.clone(), 0..cols);
        let (data, inner) = (b.data(), part.len());
        if b.col_stride() == 1 {
            return pack_straight(panels, data, b.row_stride(), cols, inner);
        }
        assert_eq!(
            b.row_stride(),
            1,
            "a matrix that lies in rows or in columns"
        );
        for (panel, to) in panels.chunks_exact_mut(NR * inner).enumerate() {
            let width = NR.min(cols - panel * NR);
            let from = &data[panel * NR * b.col_stride()..];
            pack_turned(to, from, b.col_stride(), width, inner);
        }
    });
}

/// Multiplies a part of the inner index at a time with what `pack` makes of that part.
fn for_parts(
    out: &mut MatMut<'_>,
    accumulate: bool,
    a: Mat<'_>,
    scale: f32,
    pack: impl Fn(&mut [f32], std::ops::Range<usize>),
) {
    let (rows, inner) = (a.rows(), a.cols());
    let panels = out.cols().div_ceil(NR);
    // Parts of about one size, multiples of 8 for the sake of transposing.
    let parts = inner.div_ceil(DEPTH);
    let depth = inner.div_ceil(parts).next_multiple_of(8);
    for start in (0..inner).step_by(depth) {
        let part = start..(start + depth).min(inner);
        with_scratch(panels * NR * part.len(), |scratch| {
            pack(scratch, part.clone());
            if scale != 1.0 {
                for x in scratch.iter_mut() {
                    *x *= scale;
                }
            }
            let a = a.block(0..rows, part);
            multiply_part(out, accumulate || start > 0, a, scratch);
        });
    }
}

/// One part of the inner index; `panels` hold b.
fn multiply_part(out: &mut MatMut<'_>, add: bool, a: Mat<'_>, panels: &[f32]) {
    let (rows, inner) = (out.rows(), a.cols());
    for start in (0..rows).step_by(ROWS) {
        let block = start..(start + ROWS).min(rows);
        let a = a.block(block.clone(), 0..inner);
        if a.col_stride() == 1 && !a.row_stride().is_multiple_of(CONFLICT) {
            multiply_block(out, start, add, a, panels);
        } else if a.col_stride() == 1 {
            let stride = inner.next_multiple_of(NR) + NR;
            with_scratch(block.len() * stride, |scratch| {
                for (i, to) in scratch.chunks_exact_mut(stride).enumerate() {
                    to[..inner].copy_from_slice(&a.data()[i * a.row_stride()..][..inner]);
                }
                let a = Mat::strided(scratch, block.len(), inner, stride);
                multiply_block(out, start, add, a, panels);
            });
        } else {
            // Rows that do not lie in one piece are copied: 6 at a time side by side.
            with_scratch(block.len().next_multiple_of(MR) * inner, |scratch| {
                pack_rows(scratch, a);
                multiply_packed(out, start, block.len(), add, inner, scratch, panels);
            });
        }
    }
}

fn multiply_block(out: &mut MatMut<'_>, first: usize, add: bool, a: Mat<'_>, panels: &[f32]) {
    let (rows, inner) = (a.rows(), a.cols());
    for (panel, b) in panels.chunks_exact(NR * inner).enumerate() {
        for i in (0..rows).step_by(MR) {
            let height = MR.min(rows - i);
            let block = a.block(i..i + height, 0..inner);
            let a = Rows {
                data: block.data(),
                row_stride: block.row_stride(),
                col_stride: 1,
            };
            sums(out, first + i, height, panel * NR, add, inner, a, b);
        }
    }
}

fn multiply_packed(
    out: &mut MatMut<'_>,
    first: usize,
    rows: usize,
    add: bool,
    inner: usize,
    packed: &[f32],
    panels: &[f32],
) {
    for (panel, b) in panels.chunks_exact(NR * inner).enumerate() {
        for (i, block) in packed.chunks_exact(MR * inner).enumerate() {
            let height = MR.min(rows - i * MR);
            let a = Rows {
                data: block,
                row_stride: 1,
                col_stride: MR,
            };
            sums(out, first + i * MR, height, panel * NR, add, inner, a, b);
        }
    }
}

/// Up to 6 rows of the left factor.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    row_stride: usize,
    col_stride: usize,
}

/// A block of sums: `height` rows from `row` on and up to 16 columns from `col` on.
#[expect(unsafe_code, reason = "kernels take pointers")]
fn sums(
    out: &mut MatMut<'_>,
    row: usize,
    height: usize,
    col: usize,
    add: bool,
    inner: usize,
    a: Rows<'_>,
    b: &[f32],
) {
    let width = NR.min(out.cols() - col);
    assert!(height <= MR && row + height <= out.rows());
    assert!(b.len() >= inner * NR && inner > 0 && height > 0);
    let last = (height - 1) * a.row_stride + (inner - 1) * a.col_stride;
    assert!(last < a.data.len(), "rows reach past their data");
    let kernel = match (height, a.col_stride) {
        (1, 1) => kernel::<1, true>,
        (2, 1) => kernel::<2, true>,
        (3, 1) => kernel::<3, true>,
        (4, 1) => kernel::<4, true>,
        (5, 1) => kernel::<5, true>,
        (6, 1) => kernel::<6, true>,
        (1, _) => kernel::<1, false>,
        (2, _) => kernel::<2, false>,
        (3, _) => kernel::<3, false>,
        (4, _) => kernel::<4, false>,
        (5, _) => kernel::<5, false>,
        _ => kernel::<6, false>,
    };
    let run = |start: *mut f32, stride: usize| {
        // SAFETY: `multiply` has checked that the processor has AVX2 and FMA. The assertions above
        // show that the kernel's reads of `a` and `b` lie within their data; the caller gives 16
        // columns of each of `height` rows to write.
        unsafe {
            kernel(
                inner,
                a.data.as_ptr(),
                a.row_stride,
                a.col_stride,
                (b.as_ptr(), NR),
                start,
                stride,
                add,
            );
        }
    };
    if width == NR {
        let (start, stride) = out.pointer(row, col);
        run(start, stride);
        return;
    }
    let mut tile = [0.0_f32; MR * NR];
    if add {
        for (i, tile) in tile.chunks_exact_mut(NR).take(height).enumerate() {
            tile[..width].copy_from_slice(&out.row(row + i)[col..]);
        }
    }
    run(tile.as_mut_ptr(), NR);
    for (i, tile) in tile.chunks_exact(NR).take(height).enumerate() {
        out.row(row + i)[col..].copy_from_slice(&tile[..width]);
    }
}

/// c (+)= a·b for `M` rows and one panel of 16 columns.
///
/// # Safety
/// The processor has AVX2 and FMA. `a` can be read at `i·a_row + p·a_col` and `b` at `p·b_row + j` for
/// i < M, p < inner, j < 16, and `c` written at `i·c_row + j`.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel<const M: usize, const UNIT: bool>(
    inner: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    (b, b_row): (*const f32, usize),
    c: *mut f32,
    c_row: usize,
    add: bool,
) {
    let (a_col, b_row) = if UNIT { (1, NR) } else { (a_col, b_row) };
    // SAFETY: by the contract of this function.
    unsafe {
        for i in 0..M {
            _mm_prefetch::<_MM_HINT_T0>(c.add(i * c_row).cast());
            _mm_prefetch::<_MM_HINT_T0>(c.add(i * c_row + NR - 1).cast());
        }
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        let (mut at, mut panel) = (a, b);
        for _ in 0..inner / 4 {
            for p in 0..4 {
                step(&mut sums, at.add(p * a_col), a_row, panel.add(p * b_row));
            }
            at = at.add(4 * a_col);
            panel = panel.add(4 * b_row);
        }
        for _ in 0..inner % 4 {
            step(&mut sums, at, a_row, panel);
            at = at.add(a_col);
            panel = panel.add(b_row);
        }
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
/// As [`kernel`].
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn step<const M: usize>(
    sums: &mut [[__m256; 2]; M],
    a: *const f32,
    a_row: usize,
    b: *const f32,
) {
    // SAFETY: by the contract of `kernel`.
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
    for col in (0..whole).step_by(NR) {
        for row in (0..rows).step_by(THIN) {
            let height = THIN.min(rows - row);
            thin(&mut out, (row, height), col, accumulate, a, b);
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
        1 => kernel::<1, false>,
        2 => kernel::<2, false>,
        3 => kernel::<3, false>,
        _ => kernel::<4, false>,
    };
    let (start, stride) = out.pointer(row, col);
    // SAFETY: `multiply_thin` has checked that the processor has AVX2 and FMA; the assertions above show
    // that reads of both factors lie within their data, and that the output has 16 columns in each row.
    unsafe {
        kernel(
            inner,
            a.data().as_ptr(),
            a.row_stride(),
            a.col_stride(),
            (b.data().as_ptr(), b.row_stride()),
            start,
            stride,
            add,
        );
    }
}

/// Rows of `a`, 6 side by side: [rows / 6][inner][6]; rows past the last are zero.
fn pack_rows(to: &mut [f32], a: Mat<'_>) {
    let (rows, inner) = (a.rows(), a.cols());
    for (block, to) in to.chunks_exact_mut(MR * inner).enumerate() {
        let height = MR.min(rows - block * MR);
        let a = a.block(block * MR..block * MR + height, 0..inner);
        let (data, row_stride, col_stride) = (a.data(), a.row_stride(), a.col_stride());
        if row_stride == 1 && height == MR {
            for (p, to) in to.as_chunks_mut::<MR>().0.iter_mut().enumerate() {
                to.copy_from_slice(&data[p * col_stride..][..MR]);
            }
            continue;
        }
        for (p, to) in to.chunks_exact_mut(MR).enumerate() {
            to[height..].fill(0.0);
            for (i, to) in to[..height].iter_mut().enumerate() {
                *to = data[i * row_stride + p * col_stride];
            }
        }
    }
}

/// Rows `part` of b in panels of 16 columns: [cols / 16][part][16]; columns past the last are zero.
fn pack(to: &mut [f32], b: Factor<'_>, part: std::ops::Range<usize>, cols: usize) {
    match b.view.data() {
        Data::F32(data) => pack_numbers(to, data, b, part, cols),
        Data::Bf16(data) => pack_numbers(to, data, b, part, cols),
    }
}

fn pack_numbers<N: Number>(
    to: &mut [f32],
    data: &[N],
    b: Factor<'_>,
    part: std::ops::Range<usize>,
    cols: usize,
) {
    let inner = part.len();
    let stride = b.view.cols();
    if !b.transposed {
        let start = (b.first_row + part.start) * stride + b.first_col;
        return pack_straight(to, &data[start..], stride, cols, inner);
    }
    for (panel, to) in to.chunks_exact_mut(NR * inner).enumerate() {
        let first = b.first_col + panel * NR;
        let start = first * stride + b.first_row + part.start;
        let width = NR.min(cols - panel * NR);
        pack_turned(to, &data[start..], stride, width, inner);
    }
}

/// A number that panels are made of.
trait Number: Copy {
    /// Eight numbers, widened.
    ///
    /// # Safety
    /// The processor has AVX2; eight numbers can be read.
    #[expect(unsafe_code, reason = "vector loads take pointers")]
    unsafe fn load(from: *const Self) -> __m256;

    fn wide(self) -> f32;
}

#[expect(unsafe_code, reason = "vector loads take pointers")]
impl Number for f32 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: by the contract of this function.
        unsafe { _mm256_loadu_ps(from) }
    }

    fn wide(self) -> f32 {
        self
    }
}

#[expect(unsafe_code, reason = "vector loads take pointers")]
impl Number for bf16 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: by the contract of this function.
        let narrow = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow)))
    }

    fn wide(self) -> f32 {
        self.to_f32()
    }
}

/// Panels of b as it lies: its rows start `stride` apart.
#[expect(unsafe_code, reason = "vector code")]
fn pack_straight<N: Number>(to: &mut [f32], from: &[N], stride: usize, cols: usize, inner: usize) {
    let whole = cols / NR;
    if whole > 0 {
        assert!((inner - 1) * stride + whole * NR <= from.len());
        assert!(to.len() >= whole * inner * NR);
        // SAFETY: `multiply` has checked the processor; the assertions show that `inner` rows of
        // `whole` times 16 numbers lie within `from`, and that `to` has room for them.
        unsafe { straight(to.as_mut_ptr(), from.as_ptr(), stride, whole, inner) }
    }
    if let Some(to) = to.chunks_exact_mut(NR * inner).nth(whole) {
        let width = cols - whole * NR;
        for (p, to) in to.chunks_exact_mut(NR).enumerate() {
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
/// The processor has AVX2; `inner` rows of `panels` times 16 numbers can be read, and `panels` times
/// `inner` rows of 16 written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx2")]
unsafe fn straight<N: Number>(
    to: *mut f32,
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
                let to = to.add((panel * inner + p) * NR);
                _mm256_storeu_ps(to, N::load(from));
                _mm256_storeu_ps(to.add(8), N::load(from.add(8)));
            }
        }
    }
}

/// A panel of b from its transpose: row j of `from` becomes column j; rows start `stride` apart.
#[expect(unsafe_code, reason = "vector code")]
fn pack_turned<N: Number>(to: &mut [f32], from: &[N], stride: usize, width: usize, inner: usize) {
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
