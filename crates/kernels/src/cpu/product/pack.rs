//! Right factors in panels of 16 columns, packed with AVX2 or what vectors there are.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(any(test, not(target_arch = "x86_64")))]
mod vectors;

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use self::avx2 as own;
#[cfg(target_arch = "x86_64")]
pub(crate) use self::avx2::transpose;
#[cfg(not(target_arch = "x86_64"))]
use self::vectors as own;
use crate::cpu::product::layout::NR;
use crate::cpu::product::term::Factor;
use crate::storage::{Number, NumberVisitor};

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
    window.read(
        b.view.numbers(),
        Pack {
            to,
            transposed: b.transposed,
            cols,
        },
    );
}

struct Pack<'a, 'p> {
    to: &'a mut Panels<'p>,
    transposed: bool,
    cols: usize,
}

impl NumberVisitor for Pack<'_, '_> {
    type Output = ();

    fn visit<N: Number>(self, numbers: &[N], stride: usize) {
        if self.transposed {
            pack_turned(self.to, numbers, stride, self.cols);
        } else {
            pack_straight(self.to, numbers, stride, self.cols);
        }
    }
}

/// Panels of b as it lies: its rows start `stride` apart.
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
        own::pack_straight(to, from, stride, whole);
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

/// Panels of b from its transpose: row j of `from` becomes column j; rows start `stride` apart.
pub(crate) fn pack_turned<N: Number>(to: &mut Panels<'_>, from: &[N], stride: usize, cols: usize) {
    let inner = to.part.len();
    for panel in 0..cols.div_ceil(NR) {
        let from = &from[panel * NR * stride..];
        let width = NR.min(cols - panel * NR);
        let to = to.panel(panel);
        let whole = if width == NR {
            inner / own::STEP * own::STEP
        } else {
            0
        };
        if whole > 0 {
            own::pack_turned(to, from, stride, whole);
        }
        for (p, to) in to.chunks_exact_mut(NR).enumerate().skip(whole) {
            to[width..].fill(0.0);
            for (j, to) in to[..width].iter_mut().enumerate() {
                *to = from[j * stride + p].wide();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::engine::{engines, with_engine};
    use crate::cpu::product::panels::supported;
    use crate::storage::{NumberFormat, matrix_of};
    use crate::tensor::Tensor;

    /// Formats that are widened first come out like those that are read where they lie.
    #[test]
    fn any_format_can_be_packed() {
        for engine in engines() {
            with_engine(engine, || {
                if supported() {
                    check_formats();
                } else {
                    eprintln!("{engine:?} has no code for panels");
                }
            });
        }
    }

    fn check_formats() {
        for format in NumberFormat::ALL {
            let [stored, wide] = matrix_of(format, 48, 256);
            for transposed in [false, true] {
                // 21 inner indices, from the seventh of 24 on, of 37 columns.
                let (inner, columns) = (24, 37);
                let packed = |matrix: &Tensor| {
                    let factor = if transposed {
                        Factor::turned(matrix.view())
                    } else {
                        Factor::straight(matrix.view())
                    };
                    let factor = factor.block(5..5 + inner, 3..3 + columns);
                    let mut numbers = vec![7.0; 3 * NR * inner];
                    let mut panels = Panels {
                        numbers: &mut numbers,
                        inner,
                        part: 3..inner,
                    };
                    pack(&mut panels, factor, 2, columns);
                    numbers
                };
                let found = packed(&stored);
                assert_eq!(found, packed(&wide), "{format}");
                let (p, j) = (20, 36);
                let (inner_index, column) = (5 + 2 + p, 3 + j);
                let at = (j / NR * inner + 3 + p) * NR + j % NR;
                let expected = if transposed {
                    wide.view().get(column, inner_index)
                } else {
                    wide.view().get(inner_index, column)
                };
                assert_eq!(found[at], expected, "{format}");
            }
        }
    }
}
