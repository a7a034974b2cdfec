//! Borrowed matrices: what operations read and write.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::cpu::product::mat::{Mat, Shared};
use crate::cpu::product::term::Left;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd;
use crate::storage::{DType, NumberFormat, Numbers, encoded};

/// A contiguous row-major matrix to read, in any number format.
#[derive(Clone, Copy)]
pub struct View<'a> {
    numbers: Numbers<'a>,
    rows: usize,
    cols: usize,
}

impl<'a> View<'a> {
    pub(crate) fn new(numbers: Numbers<'a>, rows: usize, cols: usize) -> Self {
        let len = numbers.len();
        assert_eq!(len, rows * cols, "{len} numbers are not {rows}x{cols}");
        Self {
            numbers,
            rows,
            cols,
        }
    }

    /// Numbers as one row.
    pub fn of_row(data: &'a [f32]) -> Self {
        Self::from_slice(data, 1, data.len())
    }

    /// A view of f32 numbers.
    pub(crate) fn from_slice(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(Numbers::of_f32s(data), rows, cols)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number format.
    pub fn format(&self) -> NumberFormat {
        self.numbers.format()
    }

    /// One element, widened; for the host's own small questions, not for loops over a matrix.
    ///
    /// # Panics
    /// If the element is outside of the matrix.
    pub fn get(self, row: usize, col: usize) -> f32 {
        assert!(
            row < self.rows && col < self.cols,
            "({row}, {col}) of {}x{}",
            self.rows,
            self.cols
        );
        let mut number = [0.0];
        self.numbers.widen(&mut number, row * self.cols + col);
        number[0]
    }

    /// The elements as little-endian numbers of `dtype`, rounded to nearest even where that narrows. Where they are stored so, nothing
    /// is copied.
    pub fn to_le_bytes(self, dtype: DType) -> Cow<'a, [u8]> {
        // So many elements are widened at a time.
        const PART: usize = 1 << 16;
        if self.format() == dtype.into() {
            return Cow::Borrowed(self.numbers.bytes());
        }
        let mut bytes = Vec::with_capacity(dtype.bytes_for(self.rows * self.cols));
        let step = (PART / self.cols.max(1)).max(1);
        for row in (0..self.rows).step_by(step) {
            let part = self.slice_rows(row..self.rows.min(row + step));
            bytes.extend(encoded(dtype, &part.to_vec()));
        }
        Cow::Owned(bytes)
    }

    /// The elements as they are stored.
    pub fn stored_bytes(self) -> &'a [u8] {
        self.numbers.bytes()
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If the range reaches past the last row.
    #[must_use]
    pub fn slice_rows(self, rows: Range<usize>) -> Self {
        let elements = rows.start * self.cols..rows.end * self.cols;
        Self::new(self.numbers.slice(elements), rows.len(), self.cols)
    }

    /// The same elements in row order under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    #[must_use]
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        Self::new(self.numbers, rows, cols)
    }

    /// The elements in row order, widened to f32.
    pub fn to_vec(&self) -> Vec<f32> {
        let mut numbers = vec![0.0; self.len()];
        self.numbers.widen(&mut numbers, 0);
        numbers
    }

    pub(crate) fn numbers(&self) -> Numbers<'a> {
        self.numbers
    }

    /// The elements of an f32 matrix.
    ///
    /// # Panics
    /// If the matrix is of another format: activations and trainable values are f32.
    pub(crate) fn f32s(&self) -> &'a [f32] {
        let numbers = self.numbers.f32s();
        numbers.unwrap_or_else(|| panic!("an activation must be f32, but this {self:?} is not"))
    }

    /// The elements of an f32 matrix, to multiply.
    pub(crate) fn as_mat(&self) -> Mat<'a> {
        Mat::new(self.f32s(), self.rows, self.cols)
    }

    /// The elements of an f32 or bf16 matrix as a left factor.
    ///
    /// # Panics
    /// If the matrix is of another format.
    pub(crate) fn as_left(&self) -> Left<'a> {
        match self.numbers.bf16s() {
            Some(numbers) => Left::Narrow(Mat::new(numbers, self.rows, self.cols)),
            None => Left::Wide(self.as_mat()),
        }
    }

    /// Calls `work` with the elements in f32, widened into scratch memory if they are not: for
    /// vectors.
    pub(crate) fn with_f32s<R>(&self, work: impl FnOnce(&[f32]) -> R) -> R {
        self.with_part(0..self.len(), work)
    }

    /// Calls `work` with some of the elements, in row order, widened into scratch memory if they are
    /// not f32.
    pub(crate) fn with_part<R>(&self, part: Range<usize>, work: impl FnOnce(&[f32]) -> R) -> R {
        self.numbers.with_f32s(part, work)
    }

    pub(crate) fn assert_shape(&self, name: &str, rows: usize, cols: usize) {
        assert_shape(name, (self.rows, self.cols), (rows, cols));
    }
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "View({}x{}, {})", self.rows, self.cols, self.format())
    }
}

impl<'a> From<&'a ViewMut<'_>> for View<'a> {
    fn from(view: &'a ViewMut<'_>) -> Self {
        view.as_view()
    }
}

/// A contiguous row-major f32 matrix to write.
pub struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
}

impl<'a> ViewMut<'a> {
    /// Numbers as one row.
    pub fn of_row(data: &'a mut [f32]) -> Self {
        let cols = data.len();
        Self::new(data, 1, cols)
    }

    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            data.len(),
            rows * cols,
            "{} numbers are not {rows}x{cols}",
            data.len()
        );
        Self { data, rows, cols }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The matrix to read.
    pub fn as_view(&self) -> View<'_> {
        View::from_slice(self.data, self.rows, self.cols)
    }

    /// The matrix to write, for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut::new(self.data, self.rows, self.cols)
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If the range reaches past the last row.
    #[must_use]
    pub fn slice_rows(self, rows: Range<usize>) -> Self {
        let data = &mut self.data[rows.start * self.cols..rows.end * self.cols];
        Self::new(data, rows.len(), self.cols)
    }

    /// The rows before `row` and the rows from it on.
    ///
    /// # Panics
    /// If `row` is past the last row.
    #[must_use]
    pub fn split_rows(self, row: usize) -> (Self, Self) {
        let (above, below) = self.data.split_at_mut(row * self.cols);
        (
            Self::new(above, row, self.cols),
            Self::new(below, self.rows - row, self.cols),
        )
    }

    /// The same elements in row order under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    #[must_use]
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        Self::new(self.data, rows, cols)
    }

    /// Sets every element.
    pub fn fill(&mut self, value: f32) {
        self.data.fill(value);
    }

    /// Copies a matrix of the same shape, widened to f32.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn copy_from(&mut self, from: View<'_>) {
        from.assert_shape("the matrix to copy", self.rows, self.cols);
        from.numbers.widen(self.data, 0);
    }

    /// Copies numbers in row order.
    ///
    /// # Panics
    /// If there are more or fewer numbers than elements.
    pub fn copy_from_f32(&mut self, from: &[f32]) {
        self.data.copy_from_slice(from);
    }

    /// The elements in row order.
    pub fn to_vec(&self) -> Vec<f32> {
        self.data.to_vec()
    }

    /// The elements to write, for as long as the matrix is borrowed.
    pub(crate) fn into_f32s(self) -> &'a mut [f32] {
        self.data
    }

    pub(crate) fn assert_shape(&self, name: &str, rows: usize, cols: usize) {
        assert_shape(name, (self.rows, self.cols), (rows, cols));
    }
}

impl fmt::Debug for ViewMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ViewMut({}x{}, f32)", self.rows, self.cols)
    }
}

impl<'a> From<ViewMut<'a>> for Shared<'a> {
    fn from(matrix: ViewMut<'a>) -> Self {
        Self::new(matrix.data, matrix.rows, matrix.cols)
    }
}

/// A contiguous row-major matrix to write, in f32 or in bf16: what products read next, which may read it rounded.
pub struct OutputMut<'a> {
    numbers: Written<'a>,
    rows: usize,
    cols: usize,
}

/// Numbers to write.
pub(crate) enum Written<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> OutputMut<'a> {
    pub(crate) fn rounded(data: &'a mut [bf16], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "numbers of {rows}x{cols}");
        Self {
            numbers: Written::Bf16(data),
            rows,
            cols,
        }
    }

    /// Pieces of so many numbers in row order, for threads. They are of one type, so that what writes them is compiled once.
    pub(crate) fn par_chunks_mut(self, size: usize) -> rayon::vec::IntoIter<Written<'a>> {
        let pieces: Vec<Written<'a>> = match self.numbers {
            Written::F32(data) => data.chunks_mut(size).map(Written::F32).collect(),
            Written::Bf16(data) => data.chunks_mut(size).map(Written::Bf16).collect(),
        };
        pieces.into_par_iter()
    }

    pub(crate) fn assert_shape(&self, name: &str, rows: usize, cols: usize) {
        assert_shape(name, (self.rows, self.cols), (rows, cols));
    }
}

impl Written<'_> {
    /// How many numbers there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }

    /// Lets `work` write all numbers in f32, which are then rounded where they are bf16. What it finds there is unspecified.
    pub(crate) fn write<R>(self, work: impl FnOnce(&mut [f32]) -> R) -> R {
        let len = match &self {
            Self::F32(_) => 0,
            Self::Bf16(data) => data.len(),
        };
        with_scratch(len, |scratch| {
            let (wide, rounded) = match self {
                Self::F32(data) => (data, None),
                Self::Bf16(data) => (scratch, Some(data)),
            };
            // In one place: what is compiled for vectors is large.
            let result = work(wide);
            if let Some(rounded) = rounded {
                simd::narrow(rounded, wide);
            }
            result
        })
    }
}

impl<'a> From<ViewMut<'a>> for OutputMut<'a> {
    fn from(ViewMut { data, rows, cols }: ViewMut<'a>) -> Self {
        Self {
            numbers: Written::F32(data),
            rows,
            cols,
        }
    }
}

/// Panics with both shapes if a matrix has not the shape that an operation needs.
fn assert_shape(name: &str, found: (usize, usize), expected: (usize, usize)) {
    assert!(
        found == expected,
        "{name} is {}x{}, but must be {}x{}",
        found.0,
        found.1,
        expected.0,
        expected.1
    );
}
