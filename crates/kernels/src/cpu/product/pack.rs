//! Right factors in panels of 16 columns, packed with AVX2.

use std::arch::x86_64::{
    __m256, _MM_HINT_T0, _mm_prefetch, _mm256_permute2f128_ps, _mm256_setzero_ps,
    _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};
use std::ops::Range;

use crate::cpu::product::avx2::supported;
use crate::cpu::product::layout::NR;
use crate::cpu::product::term::Factor;
use crate::storage::{Number, Storage, UnitVisitor, Window};

/// Panels that are being filled: [cols / 16][inner][16], of which a part of the inner indices is meant.
pub(crate) struct Panels<'a> {
    pub(crate) numbers: &'a mut [f32],
    pub(crate) inner: usize,
    pub(crate) part: Range<usize>,
}

impl Panels<'_> {
    /// The part of a panel: rows of 16.
    fn panel(&mut self, index: usize) -> &mut [f32] {
        let start = (index * self.inner + self.part.start) * NR;
        &mut self.numbers[start..][..self.part.len() * NR]
    }

    pub(crate) fn scale(&mut self, cols: usize, factor: f32) {
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

/// Rows of b from `first` on in panels of 16 columns; columns past the last are zero.
pub(crate) fn pack(to: &mut Panels<'_>, b: Factor<'_>, first: usize, cols: usize) {
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
pub(crate) fn pack_straight<N: Number>(
    to: &mut Panels<'_>,
    from: &[N],
    stride: usize,
    cols: usize,
) {
    let (whole, inner) = (cols / NR, to.part.len());
    if inner == 0 {
        return;
    }
    if whole > 0 {
        assert!(supported() && (inner - 1) * stride + whole * NR <= from.len());
        assert!(to.part.end <= to.inner && to.numbers.len() >= whole * to.inner * NR);
        let start = &raw mut to.numbers[to.part.start * NR];
        // SAFETY: the assertions show that the processor has AVX2, that `inner` rows of
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
pub(crate) fn pack_turned<N: Number>(to: &mut Panels<'_>, from: &[N], stride: usize, cols: usize) {
    let inner = to.part.len();
    for panel in 0..cols.div_ceil(NR) {
        let from = &from[panel * NR * stride..];
        let width = NR.min(cols - panel * NR);
        let to = to.panel(panel);
        let whole = if width == NR { inner / 8 * 8 } else { 0 };
        if whole > 0 {
            assert!(supported());
            assert!((NR - 1) * stride + inner <= from.len() && to.len() >= inner * NR);
            // SAFETY: the assertions show that the processor has AVX2, that 16 rows of `inner`
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
pub(crate) fn transpose(rows: [__m256; 8]) -> [__m256; 8] {
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
    use crate::storage::blocks_for_tests::Block;

    /// Formats that are widened first come out like those that are read where they lie.
    #[test]
    fn any_format_can_be_packed() {
        if !supported() {
            eprintln!("skipped: this processor has no AVX2 with FMA");
            return;
        }
        let (units, wide) = Block::numbers(48 * 40);
        for transposed in [false, true] {
            // 21 inner indices of 37 columns.
            let (rows, cols) = if transposed {
                (3..40, 5..26)
            } else {
                (5..26, 2..39)
            };
            let (inner, columns) = (21, 37);
            let mut found = [vec![7.0; 3 * NR * inner], vec![8.0; 3 * NR * inner]];
            for (which, numbers) in found.iter_mut().enumerate() {
                let mut panels = Panels {
                    numbers,
                    inner,
                    part: 0..inner,
                };
                let pack = Pack {
                    to: &mut panels,
                    window: Window {
                        stride: 40,
                        rows: rows.clone(),
                        cols: cols.clone(),
                    },
                    transposed,
                    cols: columns,
                };
                if which == 0 {
                    pack.visit(&units);
                } else {
                    pack.visit(&wide);
                }
            }
            assert_eq!(found[0], found[1]);
            let (p, j) = (20, 36);
            let (row, col) = if transposed {
                (3 + j, 5 + p)
            } else {
                (5 + p, 2 + j)
            };
            let at = (j / NR * inner + p) * NR + j % NR;
            assert_eq!(found[0][at], wide[row * 40 + col]);
        }
    }
}
