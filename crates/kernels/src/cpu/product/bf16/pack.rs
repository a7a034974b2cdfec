//! Factors in the order in which tiles are loaded.
//!
//! An f32 number is the sum of three bf16 numbers, exactly: each has 8 of its 24 bits. They are cut off, not rounded. Two, where
//! they have to do, are rounded. One is the nearest bf16 number.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _CMP_ORD_Q, _MM_HINT_T0, _mm_prefetch, _mm512_and_si512,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtne2ps_pbh,
    _mm512_mask_add_epi32, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_mul_ps,
    _mm512_or_si512, _mm512_permutex2var_epi16, _mm512_permutexvar_epi16, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_srli_epi32,
    _mm512_storeu_si512, _mm512_sub_ps, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use half::bf16;

use super::dots::supported;
use super::layout::{SIDE, STEP, TILE};
use crate::cpu::product::mat::Mat;

/// Up to 16 rows of a left factor, in one to three parts: [steps][parts] tiles of 16 rows of 32 numbers. What there is not is zero.
///
/// # Panics
/// If neither rows nor columns lie in one piece each, `to` has not the size of its steps, or there is another number of parts.
#[expect(unsafe_code, reason = "vector code")]
pub(crate) fn split_rows(to: &mut [u16], a: Mat<'_>, parts: usize) {
    let (rows, cols) = (a.rows(), a.cols());
    assert!(supported() && (1..=SIDE).contains(&rows) && cols > 0);
    assert_eq!(
        to.len(),
        cols.div_ceil(STEP) * parts * TILE,
        "tiles of a left factor"
    );
    let turned = a.col_stride() != 1;
    let stride = if turned {
        a.col_stride()
    } else {
        a.row_stride()
    };
    let (lines, width) = if turned { (cols, rows) } else { (rows, cols) };
    assert!(
        !turned || a.row_stride() == 1,
        "rows or columns in one piece"
    );
    assert!((lines - 1) * stride + width <= a.data().len());
    let split = match (turned, parts) {
        (false, 1) => split_straight::<1>,
        (true, 1) => split_turned::<1>,
        (false, 2) => split_straight::<2>,
        (false, 3) => split_straight::<3>,
        (true, 2) => split_turned::<2>,
        (true, 3) => split_turned::<3>,
        _ => panic!("{parts} parts"),
    };
    // SAFETY: the processor is `supported`; the assertions show that the numbers lie within the data and that `to` has room.
    unsafe { split(to.as_mut_ptr(), a.data().as_ptr(), stride, rows, cols) }
}

/// Up to 16 rows of a left factor that is rounded already: [steps] tiles. What there is not is zero.
///
/// # Panics
/// If a row does not lie in one piece, or the tiles do not suffice.
pub(crate) fn copy_rows(to: &mut [u16], a: Mat<'_, bf16>) {
    let (rows, cols) = (a.rows(), a.cols());
    assert!(a.col_stride() == 1 && rows <= SIDE);
    let tiles = to.as_chunks_mut::<TILE>().0;
    for (step, tile) in tiles[..cols.div_ceil(STEP)].iter_mut().enumerate() {
        let across = step * STEP..((step + 1) * STEP).min(cols);
        for (row, to) in tile.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
            let (numbers, rest) = to.split_at_mut(if row < rows { across.len() } else { 0 });
            if row < rows {
                let from = &a.data()[row * a.row_stride()..][across.clone()];
                numbers.copy_from_slice(bytemuck::cast_slice(from));
            }
            rest.fill(0);
        }
    }
}

/// Rows that lie in one piece each, `stride` apart.
///
/// # Safety
/// The processor has AVX-512 F, BW and BF16; `rows` rows of `cols` numbers can be read, `stride` apart, and the tiles of [`split_rows`]
/// written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn split_straight<const PARTS: usize>(
    to: *mut u16,
    from: *const f32,
    stride: usize,
    rows: usize,
    cols: usize,
) {
    // SAFETY: by the contract of this function.
    unsafe {
        // A row after the other: rows are often a multiple of a page apart, and would take each other's places in the L1 cache.
        for row in 0..SIDE {
            let from = from.wrapping_add(row * stride);
            for step in 0..cols.div_ceil(STEP) {
                let to = to.add(step * PARTS * TILE + row * STEP);
                let mut parts = [_mm512_setzero_si512(); PARTS];
                if row < rows {
                    let from = from.wrapping_add(step * STEP);
                    let left = cols - step * STEP;
                    let next = load(from.wrapping_add(SIDE), left.saturating_sub(SIDE));
                    parts = parts_of_row(load(from, left), next);
                }
                for (part, numbers) in parts.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add(part * TILE).cast(), numbers);
                }
            }
        }
    }
}

/// Rows whose numbers lie `stride` apart, side by side.
///
/// # Safety
/// The processor has AVX-512 F, BW and BF16; `cols` times `rows` numbers can be read, `stride` apart, and the tiles of [`split_rows`]
/// written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn split_turned<const PARTS: usize>(
    to: *mut u16,
    from: *const f32,
    stride: usize,
    rows: usize,
    cols: usize,
) {
    let one = _mm512_set1_ps(1.0);
    for step in 0..cols.div_ceil(STEP) {
        let mut tiles = [[_mm512_setzero_si512(); SIDE]; PARTS];
        for pair in 0..SIDE {
            let p = step * STEP + 2 * pair;
            let left = cols.saturating_sub(p);
            let from = from.wrapping_add(p * stride);
            // SAFETY: by the contract of this function.
            let both = unsafe { pair_of_rows(from, stride, left, rows, one) };
            for (tile, both) in tiles.iter_mut().zip::<[_; PARTS]>(both) {
                tile[pair] = both;
            }
        }
        for (part, tile) in tiles.iter().enumerate() {
            // SAFETY: by the contract of this function.
            unsafe { store_turned(to.add((step * PARTS + part) * TILE), tile) };
        }
    }
}

/// A right factor in bf16 or f32, some steps and up to 64 columns of it.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, N> {
    /// From the first number that is meant.
    pub(crate) data: &'a [N],
    pub(crate) stride: usize,
    /// Whether a column of the factor lies in one piece, and not a row.
    pub(crate) turned: bool,
    pub(crate) inner: usize,
    pub(crate) cols: usize,
}

impl<N> Right<'_, N> {
    /// Panics unless the numbers lie within their data, and `to` has room for so many tiles of a step and 16 columns.
    fn check(&self, to: &[u16], tiles: usize) {
        let (rows, width) = if self.turned {
            (self.cols, self.inner)
        } else {
            (self.inner, self.cols)
        };
        assert!(supported() && rows > 0 && width > 0);
        assert!((rows - 1) * self.stride + width <= self.data.len());
        assert!(self.inner.div_ceil(STEP) * self.across() * tiles * TILE <= to.len());
    }

    /// Tiles of columns.
    fn across(&self) -> usize {
        self.cols.div_ceil(SIDE)
    }

    /// Of a tile: how many inner indices are left from its first on, and how many columns; and whether the factor is turned, the
    /// first number.
    fn place(&self, step: usize, column: usize) -> (*const N, usize, usize) {
        let (p, j) = (step * STEP, column * SIDE);
        let at = if self.turned {
            j * self.stride + p
        } else {
            p * self.stride + j
        };
        (
            self.data.as_ptr().wrapping_add(at),
            self.inner - p,
            self.cols - j,
        )
    }
}

/// A right factor of up to 16 columns in f32 times a number, rounded; each column lies in one piece, and an empty one is zero. A step's
/// tile is `apart` tiles from the next one's.
///
/// # Panics
/// If the columns differ in length, or the tiles do not suffice.
#[expect(unsafe_code, reason = "vector code")]
pub(crate) fn round_columns(to: &mut [u16], apart: usize, columns: &[&[f32]; SIDE], scale: f32) {
    let inner = columns[0].len();
    let steps = inner.div_ceil(STEP);
    assert!(supported() && steps > 0 && ((steps - 1) * apart + 1) * TILE <= to.len());
    assert!(columns.iter().all(|c| c.is_empty() || c.len() == inner));
    // SAFETY: the processor is `supported`; the assertions show that the columns have `inner` numbers, and that `to` has room.
    unsafe { columns_rounded(to.as_mut_ptr(), apart, columns, inner, scale) }
}

/// # Safety
/// The processor has AVX-512 F, BW and BF16; each column has `inner` numbers or none, and the tiles can be written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn columns_rounded(
    to: *mut u16,
    apart: usize,
    columns: &[&[f32]; SIDE],
    inner: usize,
    scale: f32,
) {
    let scale = _mm512_set1_ps(scale);
    for step in 0..inner.div_ceil(STEP) {
        let mut rows = [_mm512_setzero_si512(); SIDE];
        let left = inner - step * STEP;
        for (row, column) in rows.iter_mut().zip(columns) {
            if column.is_empty() {
                continue;
            }
            let from = column.as_ptr().wrapping_add(step * STEP);
            // SAFETY: by the contract of this function.
            let (low, high) = unsafe {
                (
                    load(from, left),
                    load(from.wrapping_add(SIDE), left.saturating_sub(SIDE)),
                )
            };
            *row = rounded(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
        }
        // SAFETY: by the contract of this function.
        unsafe { store_turned(to.add(step * apart * TILE), &rows) };
    }
}

/// A step of a right factor of 32 rows in f32 times a number, rounded: [columns / 16] tiles. Each row lies in one piece, and an empty one
/// is zero.
///
/// # Panics
/// If a row has not `cols` numbers, or the tiles do not suffice.
#[expect(unsafe_code, reason = "vector code")]
pub(crate) fn round_rows(to: &mut [u16], rows: &[&[f32]; STEP], cols: usize, scale: f32) {
    assert!(supported() && cols.div_ceil(SIDE) * TILE <= to.len());
    assert!(rows.iter().all(|row| row.is_empty() || row.len() == cols));
    // SAFETY: the processor is `supported`; the assertions show that the rows have `cols` numbers, and that `to` has room.
    unsafe { rows_rounded(to.as_mut_ptr(), rows, cols, scale) }
}

/// # Safety
/// The processor has AVX-512 F, BW and BF16; each row has `cols` numbers or none, and the tiles can be written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn rows_rounded(to: *mut u16, rows: &[&[f32]; STEP], cols: usize, scale: f32) {
    let scale = _mm512_set1_ps(scale);
    for (pair, rows) in rows.as_chunks::<2>().0.iter().enumerate() {
        for column in 0..cols.div_ceil(SIDE) {
            let mut numbers = [_mm512_set1_ps(0.0); 2];
            for (numbers, row) in numbers.iter_mut().zip(rows) {
                if row.is_empty() {
                    continue;
                }
                let from = row.as_ptr().wrapping_add(column * SIDE);
                // SAFETY: by the contract of this function.
                *numbers = _mm512_mul_ps(unsafe { load(from, cols - column * SIDE) }, scale);
            }
            let [low, high] = numbers;
            let both = _mm512_permutexvar_epi16(halves_by_turns(), rounded(low, high));
            // SAFETY: by the contract of this function.
            unsafe { _mm512_storeu_si512(to.add(column * TILE + pair * STEP).cast(), both) };
        }
    }
}

/// A matrix of 16 × 16 numbers turned round: its rows are `stride` apart.
///
/// # Panics
/// If the numbers do not suffice.
#[expect(unsafe_code, reason = "vector code")]
pub(crate) fn turn_square(to: &mut [f32; SIDE * SIDE], from: &[f32], stride: usize) {
    assert!(supported() && (SIDE - 1) * stride + SIDE <= from.len());
    // SAFETY: the processor is `supported`; the assertion shows that 16 rows of 16 numbers lie within the data, and `to` has the size of
    // a tile.
    unsafe { square_turned(to.as_mut_ptr(), from.as_ptr(), stride) }
}

/// # Safety
/// The processor has AVX-512 F, BW and BF16; 16 rows of 16 numbers can be read and 256 numbers written.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn square_turned(to: *mut f32, from: *const f32, stride: usize) {
    let mut rows = [_mm512_setzero_si512(); SIDE];
    // SAFETY: by the contract of this function.
    unsafe {
        for (i, row) in rows.iter_mut().enumerate() {
            *row = _mm512_castps_si512(load(from.add(i * stride), SIDE));
        }
        store_turned(to.cast(), &rows);
    }
}

/// A right factor in bf16: [steps][columns / 16] tiles. What there is not is zero.
///
/// # Panics
/// If a size does not fit.
#[expect(unsafe_code, reason = "vector code")]
pub(crate) fn pack_narrow(to: &mut [u16], from: Right<'_, bf16>) {
    from.check(to, 1);
    // SAFETY: the processor is `supported`; `check` has shown that all numbers lie within their data, and that `to` has room.
    unsafe {
        if from.turned {
            narrow_turned(to.as_mut_ptr(), from);
        } else {
            narrow_straight(to.as_mut_ptr(), from);
        }
    }
}

/// # Safety
/// The processor has AVX-512 F, BW and BF16; `from` is checked.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn narrow_turned(to: *mut u16, from: Right<'_, bf16>) {
    let (stride, across) = (from.stride, from.across());
    for column in 0..across {
        for step in 0..from.inner.div_ceil(STEP) {
            let (start, inner, cols) = from.place(step, column);
            let mut rows = [_mm512_setzero_si512(); SIDE];
            // SAFETY: by the contract of this function; a prefetch may name any address.
            unsafe {
                for (j, row) in rows.iter_mut().enumerate().take(cols) {
                    let from = start.wrapping_add(j * stride);
                    // The same place of the next 16 columns.
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SIDE * stride).cast());
                    *row = load_narrow(from.cast(), inner);
                }
                store_turned(to.add((step * across + column) * TILE), &rows);
            }
        }
    }
}

/// # Safety
/// The processor has AVX-512 F, BW and BF16; `from` is checked.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn narrow_straight(to: *mut u16, from: Right<'_, bf16>) {
    let (stride, across) = (from.stride, from.across());
    let (low, high) = (both_halves(0), both_halves(SIDE as u16));
    for step in 0..from.inner.div_ceil(STEP) {
        for pair in 0..SIDE {
            // Two tiles of columns are a cache line of either row.
            for column in (0..across).step_by(2) {
                let (start, inner, cols) = from.place(step, column);
                let start = start.wrapping_add(2 * pair * stride);
                // SAFETY: by the contract of this function; a prefetch may name any address.
                unsafe {
                    let mut rows = [_mm512_setzero_si512(); 2];
                    for (i, row) in rows.iter_mut().enumerate() {
                        let from = start.wrapping_add(i * stride);
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(STEP * stride).cast());
                        if 2 * pair + i < inner {
                            *row = load_narrow(from.cast(), cols);
                        }
                    }
                    let to = to.add((step * across + column) * TILE + pair * STEP);
                    let first = _mm512_permutex2var_epi16(rows[0], low, rows[1]);
                    _mm512_storeu_si512(to.cast(), first);
                    if column + 1 < across {
                        let second = _mm512_permutex2var_epi16(rows[0], high, rows[1]);
                        _mm512_storeu_si512(to.add(TILE).cast(), second);
                    }
                }
            }
        }
    }
}

/// A right factor in f32 times a number, in one to three parts: [steps][columns / 16][parts] tiles. What there is not is zero.
///
/// # Panics
/// If a size does not fit, or there is another number of parts.
#[expect(unsafe_code, reason = "vector code")]
pub(crate) fn pack_wide(to: &mut [u16], from: Right<'_, f32>, scale: f32, parts: usize) {
    from.check(to, parts);
    let wide = match parts {
        1 => wide::<1>,
        2 => wide::<2>,
        3 => wide::<3>,
        _ => panic!("{parts} parts"),
    };
    // SAFETY: the processor is `supported`; `check` has shown that all numbers lie within their data, and that `to` has room.
    unsafe { wide(to.as_mut_ptr(), from, scale) }
}

/// # Safety
/// The processor has AVX-512 F, BW and BF16; `from` is checked.
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn wide<const PARTS: usize>(to: *mut u16, from: Right<'_, f32>, scale: f32) {
    let (stride, across) = (from.stride, from.across());
    let scale = _mm512_set1_ps(scale);
    for column in 0..across {
        for step in 0..from.inner.div_ceil(STEP) {
            let (start, inner, cols) = from.place(step, column);
            // SAFETY: by the contract of this function.
            unsafe {
                let to = to.add((step * across + column) * PARTS * TILE);
                if from.turned {
                    let mut rows = [[_mm512_setzero_si512(); SIDE]; PARTS];
                    for j in 0..cols.min(SIDE) {
                        let from = start.wrapping_add(j * stride);
                        let low = _mm512_mul_ps(load(from, inner), scale);
                        let next = load(from.wrapping_add(SIDE), inner.saturating_sub(SIDE));
                        let parts: [_; PARTS] = parts_of_row(low, _mm512_mul_ps(next, scale));
                        for (rows, part) in rows.iter_mut().zip(parts) {
                            rows[j] = part;
                        }
                    }
                    for (part, rows) in rows.iter().enumerate() {
                        store_turned(to.add(part * TILE), rows);
                    }
                } else {
                    for pair in 0..SIDE {
                        let from = start.wrapping_add(2 * pair * stride);
                        let left = inner.saturating_sub(2 * pair);
                        let both: [_; PARTS] = pair_of_rows(from, stride, left, cols, scale);
                        for (part, both) in both.into_iter().enumerate() {
                            _mm512_storeu_si512(to.add(part * TILE + pair * STEP).cast(), both);
                        }
                    }
                }
            }
        }
    }
}

/// Up to 16 numbers; the rest is zero.
///
/// # Safety
/// The processor has AVX-512 F; so many numbers can be read, 16 at most.
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const f32, count: usize) -> __m512 {
    let mask = if count >= SIDE {
        u16::MAX
    } else {
        (1 << count) - 1
    };
    // SAFETY: by the contract of this function; what is masked out is not read.
    unsafe { _mm512_maskz_loadu_ps(mask, from) }
}

/// Up to 32 numbers; the rest is zero.
///
/// # Safety
/// The processor has AVX-512 BW; so many numbers can be read, 32 at most.
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn load_narrow(from: *const u16, count: usize) -> __m512i {
    let mask = if count >= STEP {
        u32::MAX
    } else {
        (1 << count) - 1
    };
    // SAFETY: by the contract of this function; what is masked out is not read.
    unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) }
}

/// For a permutation of two vectors of 32: 16 numbers of either, from `first` on, side by side.
#[inline]
#[target_feature(enable = "avx512f")]
fn both_halves(first: u16) -> __m512i {
    indices(|i| first + i / 2 + i % 2 * 32)
}

#[expect(unsafe_code, reason = "32 numbers as a vector")]
#[inline]
#[target_feature(enable = "avx512f")]
fn indices(index: impl Fn(u16) -> u16) -> __m512i {
    let indices: [u16; STEP] = std::array::from_fn(|i| index(i as u16));
    // SAFETY: both have 64 bytes, and any bits are a vector.
    unsafe { std::mem::transmute::<[u16; STEP], __m512i>(indices) }
}

/// For a permutation of 32: the first number of either half, then the second, and so on.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn halves_by_turns() -> __m512i {
    indices(|i| i / 2 + i % 2 * SIDE as u16)
}

/// 32 numbers as the nearest bf16 ones.
#[expect(unsafe_code, reason = "32 numbers as a vector of integers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn rounded(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both have 64 bytes, and any bits are a vector.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) }
}

/// The parts of up to two rows of up to 16 numbers, `stride` apart, times a number: those of one column side by side.
///
/// # Safety
/// The processor has AVX-512 F; so many rows and numbers can be read.
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pair_of_rows<const PARTS: usize>(
    from: *const f32,
    stride: usize,
    rows: usize,
    cols: usize,
    scale: __m512,
) -> [__m512i; PARTS] {
    let mut both = [_mm512_setzero_si512(); PARTS];
    if PARTS == 1 {
        let zero = _mm512_set1_ps(0.0);
        // SAFETY: by the contract of this function.
        let [first, second] = std::array::from_fn(|i| unsafe {
            if i < rows {
                load(from.wrapping_add(i * stride), cols)
            } else {
                zero
            }
        });
        let [first, second] = [first, second].map(|row| _mm512_mul_ps(row, scale));
        both[0] = _mm512_permutexvar_epi16(halves_by_turns(), rounded(first, second));
        return both;
    }
    for i in 0..rows.min(2) {
        // SAFETY: by the contract of this function.
        let row = unsafe { load(from.wrapping_add(i * stride), cols) };
        for (both, part) in both
            .iter_mut()
            .zip::<[_; PARTS]>(parts(_mm512_mul_ps(row, scale)))
        {
            let part = if i == 0 {
                _mm512_srli_epi32::<16>(part)
            } else {
                part
            };
            *both = _mm512_or_si512(*both, part);
        }
    }
    both
}

/// The two or three parts of 16 numbers, each in the upper half of a word whose lower half is zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn parts<const PARTS: usize>(x: __m512) -> [__m512i; PARTS] {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let mut parts = [_mm512_setzero_si512(); PARTS];
    let mut rest = x;
    for (part, to) in parts.iter_mut().enumerate() {
        let mut bits = _mm512_castps_si512(rest);
        if PARTS == 2 {
            // Half a step more rounds. What is no number must not become one.
            let numbers = if part == 0 {
                _mm512_cmp_ps_mask::<_CMP_ORD_Q>(x, x)
            } else {
                u16::MAX
            };
            let half = _mm512_set1_epi32(0x8000);
            bits = _mm512_mask_add_epi32(bits, numbers, bits, half);
        }
        // Of a third part the lower half is zero, too, unless the number is next to the smallest that there are.
        *to = _mm512_and_si512(bits, upper);
        rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(*to));
    }
    parts
}

/// The parts of 32 numbers as 32 bf16 each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn parts_of_row<const PARTS: usize>(first: __m512, second: __m512) -> [__m512i; PARTS] {
    if PARTS == 1 {
        return [rounded(first, second); PARTS];
    }
    let odd = indices(|i| 2 * i + 1);
    let (first, second) = (parts::<PARTS>(first), parts::<PARTS>(second));
    let mut both = [_mm512_setzero_si512(); PARTS];
    for part in 0..PARTS {
        both[part] = _mm512_permutex2var_epi16(first[part], odd, second[part]);
    }
    both
}

/// A tile from its columns: row j has the 16 pairs of inner indices of column j.
///
/// # Safety
/// The processor has AVX-512 F; a tile can be written.
#[expect(unsafe_code, reason = "vector stores take pointers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn store_turned(to: *mut u16, rows: &[__m512i; SIDE]) {
    let zero = _mm512_setzero_si512();
    // Pairs of rows, then fours: fours[q][m] has in its lane l the words 4·l + m of rows 4·q to 4·q + 3.
    let mut fours = [[zero; 4]; 4];
    for (q, four) in fours.iter_mut().enumerate() {
        let rows = &rows[4 * q..4 * q + 4];
        let (low, high) = (
            _mm512_unpacklo_epi32(rows[0], rows[1]),
            _mm512_unpackhi_epi32(rows[0], rows[1]),
        );
        let (low2, high2) = (
            _mm512_unpacklo_epi32(rows[2], rows[3]),
            _mm512_unpackhi_epi32(rows[2], rows[3]),
        );
        *four = [
            _mm512_unpacklo_epi64(low, low2),
            _mm512_unpackhi_epi64(low, low2),
            _mm512_unpacklo_epi64(high, high2),
            _mm512_unpackhi_epi64(high, high2),
        ];
    }
    for m in 0..4 {
        let first = _mm512_shuffle_i32x4::<0b01_00_01_00>(fours[0][m], fours[1][m]);
        let second = _mm512_shuffle_i32x4::<0b11_10_11_10>(fours[0][m], fours[1][m]);
        let third = _mm512_shuffle_i32x4::<0b01_00_01_00>(fours[2][m], fours[3][m]);
        let fourth = _mm512_shuffle_i32x4::<0b11_10_11_10>(fours[2][m], fours[3][m]);
        let columns = [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(first, third),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(first, third),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(second, fourth),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(second, fourth),
        ];
        for (lane, column) in columns.into_iter().enumerate() {
            // SAFETY: a tile has 16 rows of 64 bytes, by the contract of this function.
            unsafe { _mm512_storeu_si512(to.add((4 * lane + m) * STEP).cast(), column) };
        }
    }
}
