//! Matrices with strides, as products read and write them. Each product runs on one thread; operations cut their output into pieces.

use std::marker::PhantomData;
use std::ops::Range;

use crate::cpu::parallel::for_each_task;

/// A matrix to read, with any strides.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, N = f32> {
    data: &'a [N],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, N: Copy> Mat<'a, N> {
    /// A row-major matrix without gaps.
    pub(crate) fn new(data: &'a [N], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` apart.
    pub(crate) fn strided(data: &'a [N], rows: usize, cols: usize, row_stride: usize) -> Self {
        let mat = Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        };
        assert!(mat.span() <= data.len(), "a matrix reaches past its data");
        mat
    }

    /// Numbers from the first element to the last.
    fn span(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// How far a row is from the next.
    pub(crate) fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// How far a column is from the next.
    pub(crate) fn col_stride(&self) -> usize {
        self.col_stride
    }

    /// Whether its rows or its columns lie in one piece each.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn lies_in_lines(&self) -> bool {
        self.row_stride == 1 || self.col_stride == 1
    }

    /// The numbers from the first element on.
    pub(crate) fn data(&self) -> &'a [N] {
        self.data
    }

    /// The transposed matrix.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Some rows and columns.
    pub(crate) fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && cols.end <= self.cols);
        let start = rows.start * self.row_stride + cols.start * self.col_stride;
        Self {
            data: self.data.get(start..).unwrap_or_default(),
            rows: rows.len(),
            cols: cols.len(),
            ..self
        }
    }
}

/// A row-major matrix to write, whose rows may have gaps between them.
pub(crate) struct MatMut<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

impl<'a> MatMut<'a> {
    /// A matrix without gaps.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A matrix whose rows start `row_stride` apart.
    pub(crate) fn strided(
        data: &'a mut [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        assert!(cols <= row_stride || rows <= 1);
        assert!(
            rows == 0 || (rows - 1) * row_stride + cols <= data.len(),
            "a matrix reaches past its data"
        );
        Self {
            start: data.as_mut_ptr(),
            rows,
            cols,
            row_stride,
            borrowed: PhantomData,
        }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, cols: Range<usize>) -> Self {
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        Self {
            // Stays within the matrix, or at its end if no columns are left.
            start: self.start.wrapping_add(cols.start),
            cols: cols.len(),
            ..self
        }
    }

    /// The columns before one, and those from it on.
    pub(crate) fn split_columns(self, col: usize) -> (Self, Self) {
        assert!(col <= self.cols);
        let right = Self {
            // Stays within the matrix, or at its end if no columns are left.
            start: self.start.wrapping_add(col),
            cols: self.cols - col,
            ..self
        };
        (Self { cols: col, ..self }, right)
    }

    /// The same matrix for a shorter time.
    pub(crate) fn reborrow(&mut self) -> MatMut<'_> {
        MatMut {
            borrowed: PhantomData,
            ..*self
        }
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// One row.
    #[expect(unsafe_code, reason = "rows of one matrix lie in one allocation")]
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the constructors checked that every row lies within the borrowed data, and the
        // result borrows `self` mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.row_stride), self.cols) }
    }
}

impl MatMut<'_> {
    /// Writes numbers into a column from a row on, or adds them.
    #[inline(always)]
    #[expect(unsafe_code, reason = "one check for all rows, in an inner loop")]
    pub(crate) fn put_column(&mut self, row: usize, col: usize, from: &[f32], add: bool) {
        assert!(row + from.len() <= self.rows && col < self.cols);
        for (i, &x) in from.iter().enumerate() {
            // SAFETY: the row and the column lie within the matrix by the assertion above, whose
            // elements the constructors have checked to lie within the borrowed data.
            let y = unsafe { &mut *self.start.add((row + i) * self.row_stride + col) };
            *y = if add { *y + x } else { x };
        }
    }

    /// Some rows and columns, for a shorter time.
    pub(crate) fn window(&mut self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        MatMut {
            // Stays within the matrix, or at its end if no elements are left.
            start: self
                .start
                .wrapping_add(rows.start * self.row_stride + cols.start),
            rows: rows.len(),
            cols: cols.len(),
            row_stride: self.row_stride,
            borrowed: PhantomData,
        }
    }

    /// Sets every element to zero.
    pub(crate) fn fill_zero(&mut self) {
        for row in 0..self.rows {
            self.row(row).fill(0.0);
        }
    }

    /// Number of columns.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Where an element lies, and how far its row is from the next.
    pub(crate) fn pointer(&mut self, row: usize, col: usize) -> (*mut f32, usize) {
        assert!(row < self.rows && col < self.cols);
        let at = self.start.wrapping_add(row * self.row_stride + col);
        (at, self.row_stride)
    }
}

/// A row-major matrix of which several threads write pieces that do not overlap.
pub(crate) struct Shared<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

#[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
// SAFETY: the pointer comes from a mutable borrow that lasts as long as the value; access goes
// through `block`, whose callers promise that blocks in use at the same time do not overlap.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// A matrix without gaps.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self {
            start: data.as_mut_ptr(),
            rows,
            cols,
            borrowed: PhantomData,
        }
    }
}

impl Shared<'_> {
    /// Some rows and columns to write.
    ///
    /// # Safety
    /// No other block that is in use at the same time may overlap this one.
    #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
    pub(crate) unsafe fn block(&self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        let offset = rows.start * self.cols + cols.start;
        MatMut {
            // SAFETY: the block lies within the matrix, so its first element does too (or, for an
            // empty block, is at most one past the end).
            start: unsafe { self.start.add(offset.min(self.rows * self.cols)) },
            rows: rows.len(),
            cols: cols.len(),
            row_stride: self.cols,
            borrowed: PhantomData,
        }
    }
}

/// Cuts a matrix into tiles and calls `work` for each with its rows and its columns, in parallel.
///
/// The boundaries depend on the sizes alone.
pub(crate) fn for_tiles<'a>(
    matrix: impl Into<Shared<'a>>,
    (row_block, col_block): (usize, usize),
    work: impl Fn(MatMut<'_>, Range<usize>, Range<usize>) + Sync,
) {
    let shared: Shared<'a> = matrix.into();
    let (rows, cols) = (shared.rows, shared.cols);
    let down = rows.div_ceil(row_block);
    let tiles = down * cols.div_ceil(col_block);
    let run = |i: usize| {
        // Tasks that follow each other share their columns, so that a thread that takes both finds
        // a strip of weights in its cache.
        let (row, col) = (i % down * row_block, i / down * col_block);
        let rows = row..(row + row_block).min(rows);
        let cols = col..(col + col_block).min(cols);
        #[expect(unsafe_code, reason = "threads write disjoint blocks of one matrix")]
        // SAFETY: no two tiles share an element.
        let tile = unsafe { shared.block(rows.clone(), cols.clone()) };
        work(tile, rows, cols);
    };
    for_each_task(tiles, run);
}

/// A block that is as large as a matrix can be.
pub(crate) const ALL: usize = usize::MAX / 2;
