//! Borrowed matrices: what operations read and write.

use std::fmt;
use std::ops::Range;

use half::bf16;

use crate::cpu::product::mat::Mat;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd;
use crate::tensor::{DType, Tensor};

/// The elements of a matrix in one of its number formats.
#[derive(Clone, Copy)]
pub(crate) enum Data<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// A contiguous row-major matrix to read, in f32 or bf16.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: Data<'a>,
    rows: usize,
    cols: usize,
}

impl<'a> View<'a> {
    pub(crate) fn new(data: Data<'a>, rows: usize, cols: usize) -> Self {
        let len = match data {
            Data::F32(x) => x.len(),
            Data::Bf16(x) => x.len(),
        };
        assert_eq!(len, rows * cols, "{len} numbers are not {rows}x{cols}");
        Self { data, rows, cols }
    }

    /// A view of f32 numbers.
    pub(crate) fn from_slice(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(Data::F32(data), rows, cols)
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
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::Bf16(_) => DType::Bf16,
        }
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
        match self.data {
            Data::F32(x) => x[row * self.cols + col],
            Data::Bf16(x) => x[row * self.cols + col].to_f32(),
        }
    }

    /// The elements as little-endian numbers of `dtype`, rounded to nearest even where that narrows.
    pub fn to_le_bytes(self, dtype: DType) -> Vec<u8> {
        match (self.data, dtype) {
            (Data::F32(x), DType::F32) => bytemuck::cast_slice(x).to_vec(),
            (Data::Bf16(x), DType::Bf16) => bytemuck::cast_slice(x).to_vec(),
            (Data::F32(x), DType::Bf16) => x
                .iter()
                .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
                .collect(),
            (Data::Bf16(x), DType::F32) => {
                x.iter().flat_map(|x| x.to_f32().to_le_bytes()).collect()
            }
        }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If the range reaches past the last row.
    #[must_use]
    pub fn slice_rows(self, rows: Range<usize>) -> Self {
        let elements = rows.start * self.cols..rows.end * self.cols;
        let data = match self.data {
            Data::F32(x) => Data::F32(&x[elements]),
            Data::Bf16(x) => Data::Bf16(&x[elements]),
        };
        Self::new(data, rows.len(), self.cols)
    }

    /// The same elements in row order under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    #[must_use]
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        Self::new(self.data, rows, cols)
    }

    /// The elements in row order, widened to f32.
    pub fn to_vec(&self) -> Vec<f32> {
        match self.data {
            Data::F32(x) => x.to_vec(),
            Data::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }

    pub(crate) fn data(&self) -> Data<'a> {
        self.data
    }

    /// The elements of an f32 matrix.
    ///
    /// # Panics
    /// If the matrix is bf16: activations and trainable values are f32.
    pub(crate) fn f32s(&self) -> &'a [f32] {
        match self.data {
            Data::F32(x) => x,
            Data::Bf16(_) => panic!("an activation must be f32, but this {self:?} is not"),
        }
    }

    /// The elements of an f32 matrix, to multiply.
    pub(crate) fn as_mat(&self) -> Mat<'a> {
        Mat::new(self.f32s(), self.rows, self.cols)
    }

    /// Calls `work` with the elements in f32, widened into scratch memory if they are bf16: for
    /// vectors.
    pub(crate) fn with_f32s<R>(&self, work: impl FnOnce(&[f32]) -> R) -> R {
        match self.data {
            Data::F32(x) => work(x),
            Data::Bf16(x) => with_scratch(x.len(), |scratch| {
                simd::widen(scratch, x);
                work(scratch)
            }),
        }
    }

    /// Calls `work` with some of the elements, in row order, widened into scratch memory if they are
    /// bf16.
    pub(crate) fn with_part<R>(&self, part: Range<usize>, work: impl FnOnce(&[f32]) -> R) -> R {
        match self.data {
            Data::F32(x) => work(&x[part]),
            Data::Bf16(x) => with_scratch(part.len(), |scratch| {
                simd::widen(scratch, &x[part]);
                work(scratch)
            }),
        }
    }

    pub(crate) fn assert_shape(&self, name: &str, rows: usize, cols: usize) {
        assert_shape(name, (self.rows, self.cols), (rows, cols));
    }
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "View({}x{}, {})", self.rows, self.cols, self.dtype())
    }
}

impl<'a> From<&'a Tensor> for View<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        tensor.view()
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
        match from.data() {
            Data::F32(x) => self.data.copy_from_slice(x),
            Data::Bf16(x) => simd::widen(self.data, x),
        }
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

impl<'a> From<&'a mut Tensor> for ViewMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        tensor.view_mut()
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
