//! How factors lie that blocks of sums are made of.
//!
//! The right factor is a panel: for each inner index the 16 numbers of its columns, one after the other. The left one lies in
//! rows, or 6 of them side by side.

use crate::cpu::product::mat::Mat;

/// Rows of a block of sums.
pub(crate) const MR: usize = 6;
/// Columns of a panel: two vectors of AVX2, or four of NEON.
pub(crate) const NR: usize = 16;
/// Rows of the tallest block.
pub(crate) const TALLEST: usize = 2 * MR;

/// Rows of a left factor, or of a part of its inner index.
///
/// Element (i, p) is at i · `row_stride` + p where rows lie in one piece, which is called `COL` 1. Where `COL` is [`MR`],
/// 6 rows lie side by side, and it is at ⌊i / 6⌋ · 6 · `row_stride` + 6 · p + i mod 6.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row_stride: usize,
    pub(crate) inner: usize,
}

impl<'a> Left<'a> {
    /// A matrix whose rows lie in one piece each.
    pub(crate) fn in_place(a: Mat<'a>) -> Self {
        debug_assert_eq!(a.col_stride(), 1, "rows in one piece");
        Self {
            data: a.data(),
            row_stride: a.row_stride(),
            inner: a.cols(),
        }
    }

    /// Panics unless this many rows lie within the data.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn check<const COL: usize>(&self, rows: usize) {
        let reach = if COL == 1 {
            (rows.max(1) - 1) * self.row_stride + self.inner
        } else {
            (rows.div_ceil(MR).max(1) - 1) * MR * self.row_stride + MR * self.inner
        };
        assert!(reach <= self.data.len(), "rows reach past their data");
    }
}

/// Where a block of sums lies.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    /// The first row of the output, how many there are, at most what a block has, and the first column.
    pub(crate) row: usize,
    pub(crate) height: usize,
    pub(crate) col: usize,
    /// The first row of the left factors: a multiple of [`MR`].
    pub(crate) first: usize,
    /// Whether the products are added to what is there.
    pub(crate) add: bool,
}
