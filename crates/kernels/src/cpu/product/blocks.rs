//! Sums of products a block of 6 × 16 at a time, from factors that lie as the block reads them.
//!
//! The right factor is a panel: for each inner index the 16 numbers of its columns, one after the other. What makes panels, for
//! a linear or for attention, calls [`add_panels`] or [`add_rows`]; on processors with NEON, or AVX2 and FMA, the block stays in registers,
//! and with AVX-512 a larger one, of 12 × 32 or 12 × 16.

use crate::cpu::product::layout::{Block, Left, MR, NR, TALLEST};
use crate::cpu::product::mat::{Mat, MatMut};
use crate::cpu::product::vectors;
#[cfg(target_arch = "x86_64")]
use crate::cpu::product::{avx2, avx512};

/// Some rows of out, in all columns, (+)= Σ lefts · panels, which lie one after the other.
///
/// The first row of the left factors goes to row `row` of the output. A panel holds the inner indices of the left factors one
/// after the other.
///
/// # Panics
/// If a shape does not fit.
pub(crate) fn add_panels<const COL: usize>(
    out: &mut MatMut<'_>,
    row: usize,
    rows: usize,
    add: bool,
    lefts: &[Left<'_>],
    panels: &[f32],
) {
    let inner: usize = lefts.iter().map(|left| left.inner).sum();
    #[cfg(target_arch = "x86_64")]
    let pairs = if avx512::supported() {
        out.cols() / (2 * NR)
    } else {
        0
    };
    #[cfg(not(target_arch = "x86_64"))]
    let pairs = 0;
    let (twos, ones) = panels.split_at(pairs * 2 * NR * inner);
    for (pair, b) in twos.chunks_exact(2 * NR * inner).enumerate() {
        let col = pair * 2 * NR;
        let (low, high) = b.split_at(NR * inner);
        let pair = out.window(row..row + rows, col..col + 2 * NR);
        add_pair::<COL>(pair.split_columns(NR), add, lefts, (low, high));
    }
    for (panel, b) in ones.chunks_exact(NR * inner).enumerate() {
        let col = (2 * pairs + panel) * NR;
        add_rows::<COL>(out, row, rows, col, add, lefts, b);
    }
}

/// All rows of two outputs of 16 columns, each (+)= Σ lefts · its panel. Otherwise as [`add_panels`].
///
/// # Panics
/// If a shape does not fit.
pub(crate) fn add_pair<const COL: usize>(
    mut outs: (MatMut<'_>, MatMut<'_>),
    add: bool,
    lefts: &[Left<'_>],
    (low, high): (&[f32], &[f32]),
) {
    let rows = outs.0.rows();
    #[cfg(target_arch = "x86_64")]
    if avx512::supported() {
        for first in (0..rows).step_by(avx512::ROWS) {
            let height = avx512::ROWS.min(rows - first);
            let block = first..first + height;
            let outs = [
                outs.0.window(block.clone(), 0..NR),
                outs.1.window(block, 0..NR),
            ];
            #[expect(unsafe_code, reason = "code for one kind of processor")]
            // SAFETY: it is supported.
            unsafe {
                avx512::block::<2, COL>(outs, (first, height), add, lefts, [low, high]);
            }
        }
        return;
    }
    add_rows::<COL>(&mut outs.0, 0, rows, 0, add, lefts, low);
    add_rows::<COL>(&mut outs.1, 0, rows, 0, add, lefts, high);
}

/// Some rows of out, in 16 columns from `col` on (or as many as there are), (+)= Σ lefts · panel.
///
/// Otherwise as [`add_panels`].
///
/// # Panics
/// If a shape does not fit.
pub(crate) fn add_rows<const COL: usize>(
    out: &mut MatMut<'_>,
    row: usize,
    rows: usize,
    col: usize,
    add: bool,
    lefts: &[Left<'_>],
    b: &[f32],
) {
    let together = block_rows();
    for first in (0..rows).step_by(together) {
        let block = Block {
            row: row + first,
            height: together.min(rows - first),
            col,
            first,
            add,
        };
        add_block::<COL>(out, block, lefts, b);
    }
}

/// Rows of a block that stays in this processor's registers.
#[inline]
fn block_rows() -> usize {
    #[cfg(target_arch = "x86_64")]
    if avx512::supported() {
        return avx512::ROWS;
    }
    MR
}

#[inline]
fn add_block<const COL: usize>(out: &mut MatMut<'_>, block: Block, lefts: &[Left<'_>], b: &[f32]) {
    let Block {
        row, height, col, ..
    } = block;
    let width = NR.min(out.cols() - col);
    if width == NR {
        return whole_block::<COL>(out, block, lefts, b);
    }
    let mut tile = [0.0_f32; TALLEST * NR];
    if block.add {
        for (i, tile) in tile.chunks_exact_mut(NR).take(height).enumerate() {
            tile[..width].copy_from_slice(&out.row(row + i)[col..]);
        }
    }
    let mut whole = MatMut::new(&mut tile, TALLEST, NR);
    let aside = Block {
        row: 0,
        col: 0,
        ..block
    };
    whole_block::<COL>(&mut whole, aside, lefts, b);
    for (i, tile) in tile.chunks_exact(NR).take(height).enumerate() {
        out.row(row + i)[col..].copy_from_slice(&tile[..width]);
    }
}

#[cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "code for one kind of processor")
)]
#[inline]
fn whole_block<const COL: usize>(
    out: &mut MatMut<'_>,
    block: Block,
    lefts: &[Left<'_>],
    b: &[f32],
) {
    #[cfg(target_arch = "x86_64")]
    if avx512::supported() {
        let Block {
            row,
            height,
            col,
            first,
            add,
        } = block;
        let window = out.window(row..row + height, col..col + NR);
        // SAFETY: it is supported.
        return unsafe { avx512::block::<1, COL>([window], (first, height), add, lefts, [b]) };
    }
    #[cfg(target_arch = "x86_64")]
    if avx2::supported() {
        // SAFETY: it is supported.
        return unsafe { avx2::block::<COL>(out, block, lefts, b) };
    }
    vectors::block::<COL>(out, block, lefts, b);
}

/// Rows of left factors, their inner indices one after the other, 6 rows side by side: [rows / 6][inner][6]; rows past the last
/// are zero. A block of it is a [`Left`] with `COL` 6 and a row stride of `inner`.
pub(crate) fn pack_rows<'a>(
    to: &mut [f32],
    lefts: &(impl Iterator<Item = Mat<'a>> + Clone),
    inner: usize,
) {
    for (block, mut to) in to.chunks_exact_mut(MR * inner).enumerate() {
        for a in lefts.clone() {
            let (part, rest) = to.split_at_mut(MR * a.cols());
            to = rest;
            let height = MR.min(a.rows() - block * MR);
            let a = a.block(block * MR..block * MR + height, 0..a.cols());
            let (data, row_stride, col_stride) = (a.data(), a.row_stride(), a.col_stride());
            if row_stride == 1 && height == MR {
                for (p, to) in part.as_chunks_mut::<MR>().0.iter_mut().enumerate() {
                    to.copy_from_slice(&data[p * col_stride..][..MR]);
                }
                continue;
            }
            for (p, to) in part.chunks_exact_mut(MR).enumerate() {
                to[height..].fill(0.0);
                for (i, to) in to[..height].iter_mut().enumerate() {
                    *to = data[i * row_stride + p * col_stride];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (i * seed % 17) as f32 - 8.0).collect()
    }

    /// A block of any height, 6 rows at a time.
    fn any_vectors<const COL: usize>(
        out: &mut MatMut<'_>,
        block: Block,
        lefts: &[Left<'_>],
        b: &[f32],
    ) {
        for start in (0..block.height).step_by(MR) {
            let part = Block {
                row: block.row + start,
                height: MR.min(block.height - start),
                first: block.first + start,
                ..block
            };
            vectors::block::<COL>(out, part, lefts, b);
        }
    }

    /// The processor's own code sums in the order of the one for any vectors.
    #[test]
    fn a_block_is_the_same_on_any_processor() {
        let a = numbers(TALLEST * 40, 5);
        let b = numbers(40 * NR, 7);
        for height in 1..=block_rows() {
            let parts = |row_stride, split, col| {
                [
                    Left {
                        data: &a[..],
                        row_stride,
                        inner: split,
                    },
                    Left {
                        data: &a[split * col..],
                        row_stride,
                        inner: 9,
                    },
                ]
            };
            for add in [false, true] {
                let block = Block {
                    row: 0,
                    height,
                    col: 0,
                    first: 0,
                    add,
                };
                let size = TALLEST * NR;
                let (mut here, mut anywhere) = (numbers(size, 3), numbers(size, 3));
                let lefts = parts(20, 11, 1);
                add_block::<1>(&mut MatMut::new(&mut here, TALLEST, NR), block, &lefts, &b);
                let mut out = MatMut::new(&mut anywhere, TALLEST, NR);
                any_vectors::<1>(&mut out, block, &lefts, &b);
                assert_eq!(here, anywhere);
                let lefts = parts(20, 11, MR);
                add_block::<MR>(&mut MatMut::new(&mut here, TALLEST, NR), block, &lefts, &b);
                let mut out = MatMut::new(&mut anywhere, TALLEST, NR);
                any_vectors::<MR>(&mut out, block, &lefts, &b);
                assert_eq!(here, anywhere);
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "code for one kind of processor")]
    fn check_avx2<const COL: usize>(block: Block) {
        let (a, b) = (numbers(MR * 40, 5), numbers(40 * NR, 7));
        let left = |start, inner| Left {
            data: &a[start..],
            row_stride: 20,
            inner,
        };
        let lefts = [left(0, 11), left(11 * COL, 9)];
        let (mut here, mut anywhere) = (numbers(MR * NR, 3), numbers(MR * NR, 3));
        // SAFETY: whoever calls this has looked.
        unsafe {
            avx2::block::<COL>(&mut MatMut::new(&mut here, MR, NR), block, &lefts, &b);
        }
        any_vectors::<COL>(&mut MatMut::new(&mut anywhere, MR, NR), block, &lefts, &b);
        assert_eq!(here, anywhere);
    }

    /// A processor with AVX-512 does not come by the code for AVX2 otherwise.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_block_for_avx2_is_the_same_everywhere() {
        if !avx2::supported() {
            eprintln!("skipped: this processor has no AVX2 with FMA");
            return;
        }
        for height in 1..=MR {
            for add in [false, true] {
                let block = Block {
                    row: 0,
                    height,
                    col: 0,
                    first: 0,
                    add,
                };
                check_avx2::<1>(block);
                check_avx2::<MR>(block);
            }
        }
    }

    /// However panels are taken together, every element is the same sum.
    #[test]
    fn panels_together_are_panels_alone() {
        let (rows, inner) = (29, 21);
        let a = numbers(rows * 24, 5); // Rows of 24 numbers, of which 21 are meant.
        for cols in [16, 32, 40, 64, 83] {
            let panels = numbers(usize::div_ceil(cols, NR) * NR * inner, 7);
            let left = Left {
                data: &a,
                row_stride: 24,
                inner,
            };
            for add in [false, true] {
                let (mut all, mut each) = (numbers(rows * cols, 3), numbers(rows * cols, 3));
                let mut out = MatMut::new(&mut all, rows, cols);
                add_panels::<1>(&mut out, 0, rows, add, &[left], &panels);
                let mut out = MatMut::new(&mut each, rows, cols);
                for (panel, b) in panels.chunks_exact(NR * inner).enumerate() {
                    add_rows::<1>(&mut out, 0, rows, panel * NR, add, &[left], b);
                }
                assert_eq!(all, each);
                let mut side_by_side = vec![0.0; rows.next_multiple_of(MR) * inner];
                let mat = Mat::new(&a, rows, 24).block(0..rows, 0..inner);
                pack_rows(&mut side_by_side, &std::iter::once(mat), inner);
                let packed = Left {
                    data: &side_by_side,
                    row_stride: inner,
                    inner,
                };
                let mut again = numbers(rows * cols, 3);
                let mut out = MatMut::new(&mut again, rows, cols);
                add_panels::<MR>(&mut out, 0, rows, add, &[packed], &panels);
                assert_eq!(again, all);
                let before = numbers(rows * cols, 3);
                for (i, j) in [(0, 0), (28, cols - 1), (13, cols / 2)] {
                    let products = (0..inner)
                        .map(|p| a[i * 24 + p] * panels[j / NR * NR * inner + p * NR + j % NR]);
                    let start = if add { before[i * cols + j] } else { 0.0 };
                    assert_eq!(all[i * cols + j], start + products.sum::<f32>());
                }
            }
        }
    }
}
