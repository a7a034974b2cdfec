//! A matrix in memory: owned, or borrowed from a mapped file.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::storage::{DType, NumberFormat, Numbers, encode};
use crate::view::{OutputMut, View, ViewMut};

/// Why bytes, or numbers, do not make a matrix.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TensorError {
    /// The number of bytes is not what the shape asks for.
    #[error("{rows}x{cols} in {format} needs {expected} bytes, but {found} were given")]
    Length {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Number format of the matrix.
        format: NumberFormat,
        /// Bytes that the shape asks for.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
    /// The shape is so large that its size in bytes does not fit in a `usize`.
    #[error("{rows}x{cols} in {format} is larger than the address space")]
    TooLarge {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Number format of the matrix.
        format: NumberFormat,
    },
    /// The range reaches past the end of the shared bytes.
    #[error("bytes {start}..{end} do not lie within {available} shared bytes")]
    Range {
        /// First byte of the range.
        start: usize,
        /// Byte after the last of the range.
        end: usize,
        /// Number of bytes there are.
        available: usize,
    },
    /// The numbers do not start at a multiple of their size; copy them instead of sharing.
    #[error("{format} numbers start at byte {offset}, which is not a multiple of their size")]
    Alignment {
        /// Number format of the matrix.
        format: NumberFormat,
        /// Position of the first byte within the shared bytes.
        offset: usize,
    },
    /// Numbers cannot be rounded to this format.
    #[error(
        "numbers cannot be quantized to {format}; they can be to {}",
        quantized_formats()
    )]
    NoQuantizer {
        /// The format that was asked for.
        format: NumberFormat,
    },
    /// A row is not made of whole blocks of the format.
    #[error(
        "a row of {found} numbers is not made of whole blocks of {format}, which have {} numbers each",
        format.block_len()
    )]
    PartOfBlock {
        /// The format.
        format: NumberFormat,
        /// Numbers of the row.
        found: usize,
    },
    /// Four-bit numbers of a file stand for other values than those of the format.
    #[error("the values of the numbers are not those of {format}")]
    Values {
        /// The format.
        format: NumberFormat,
    },
    /// So many numbers that share a scale are not read.
    #[error(
        "{found} numbers of {format} share a scale; it can be 64, 128, 256, 512, 1024, 2048 or 4096"
    )]
    BlockSize {
        /// The format.
        format: NumberFormat,
        /// Numbers that share a scale.
        found: usize,
    },
    /// There are more scales than blocks, or fewer; or more values than 256, or fewer.
    #[error("{expected} scales are needed, but {found} were given")]
    Scales {
        /// Scales that there should be.
        expected: usize,
        /// Scales that were given.
        found: usize,
    },
    /// A number is not finite, or its block's scale would not be.
    #[error("number {at} of the row is {value}, which cannot be stored as {format}")]
    Number {
        /// The format that was asked for.
        format: NumberFormat,
        /// Place of the number in the row, counted from 0.
        at: usize,
        /// The number.
        value: f32,
    },
}

fn quantized_formats() -> String {
    let formats = NumberFormat::ALL.into_iter();
    let names: Vec<String> = formats
        .filter(|format| format.has_quantizer())
        .map(|format| format.to_string())
        .collect();
    names.join(", ")
}

/// Bytes that several tensors share, such as a mapped file.
type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

#[derive(Clone)]
enum Storage {
    Owned(Buffer),
    Shared {
        bytes: SharedBytes,
        range: Range<usize>,
    },
}

/// A row-major matrix on the CPU, `rows` × `cols`, in any number format.
///
/// Owned memory starts at a cache line. Shared memory is read-only; cloning such a tensor does not
/// copy it.
#[derive(Clone)]
pub struct Tensor {
    storage: Storage,
    format: NumberFormat,
    rows: usize,
    cols: usize,
}

impl Tensor {
    /// An f32 matrix of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        let buffer = Buffer::zeroed(rows * cols * size_of::<f32>());
        Self::owned(buffer, NumberFormat::F32, rows, cols)
    }

    /// An f32 matrix with these numbers.
    ///
    /// # Panics
    /// If `values` does not hold `rows * cols` numbers.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        let tensor = Self::from_f32_as(rows, cols, &values, DType::F32);
        drop(values);
        tensor
    }

    /// A matrix with these numbers, each rounded to the nearest one of `dtype` (ties to even).
    ///
    /// # Panics
    /// If `values` does not hold `rows * cols` numbers.
    pub fn from_f32_as(rows: usize, cols: usize, values: &[f32], dtype: DType) -> Self {
        assert_eq!(
            values.len(),
            rows * cols,
            "{rows}x{cols} needs {} numbers",
            rows * cols
        );
        let bytes = dtype.bytes_for(values.len());
        let mut buffer = Buffer::zeroed(bytes);
        encode(dtype, &mut buffer.as_mut_slice()[..bytes], values);
        Self::owned(buffer, dtype.into(), rows, cols)
    }

    /// A matrix that lies in `bytes[range]`, without copying it.
    ///
    /// # Errors
    /// If the range does not lie within the bytes, has not the length that the shape asks for, or
    /// does not start at a multiple of the number's size; the caller then copies with
    /// [`Tensor::from_le_bytes`]. If a row is not made of whole blocks.
    pub fn from_shared(
        bytes: SharedBytes,
        range: Range<usize>,
        format: impl Into<NumberFormat>,
        rows: usize,
        cols: usize,
    ) -> Result<Self, TensorError> {
        let format = format.into();
        let available = (*bytes).as_ref().len();
        let Some(slice) = (*bytes).as_ref().get(range.clone()) else {
            return Err(TensorError::Range {
                start: range.start,
                end: range.end,
                available,
            });
        };
        check_length(slice.len(), format, rows, cols)?;
        if slice.as_ptr().align_offset(format.unit().align) != 0 {
            return Err(TensorError::Alignment {
                format,
                offset: range.start,
            });
        }
        Ok(Self {
            storage: Storage::Shared { bytes, range },
            format,
            rows,
            cols,
        })
    }

    /// An owned copy of a matrix stored as little-endian numbers.
    ///
    /// # Errors
    /// If `bytes` has not the length that the shape asks for, or a row is not made of whole blocks.
    pub fn from_le_bytes(
        bytes: &[u8],
        format: impl Into<NumberFormat>,
        rows: usize,
        cols: usize,
    ) -> Result<Self, TensorError> {
        let format = format.into();
        check_length(bytes.len(), format, rows, cols)?;
        let mut buffer = Buffer::zeroed(bytes.len());
        buffer.as_mut_slice::<u8>()[..bytes.len()].copy_from_slice(bytes);
        Ok(Self::owned(buffer, format, rows, cols))
    }

    /// The memory of an owned matrix, to write.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.nbytes();
        match &mut self.storage {
            Storage::Owned(buffer) => &mut buffer.as_mut_slice()[..bytes],
            Storage::Shared { .. } => panic!("shared memory is never written to"),
        }
    }

    /// A matrix in the first bytes of a buffer that may be larger.
    pub(crate) fn owned(buffer: Buffer, format: NumberFormat, rows: usize, cols: usize) -> Self {
        debug_assert!(buffer.capacity() >= format.bytes_for(rows * cols));
        Self {
            storage: Storage::Owned(buffer),
            format,
            rows,
            cols,
        }
    }

    /// The buffer under an owned matrix.
    pub(crate) fn into_buffer(self) -> Option<Buffer> {
        match self.storage {
            Storage::Owned(buffer) => Some(buffer),
            Storage::Shared { .. } => None,
        }
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
        self.format
    }

    /// The type in which numbers are written to the matrix.
    ///
    /// # Panics
    /// If it is of another format: such matrices are only read.
    pub(crate) fn written_dtype(&self) -> DType {
        let dtype = self.format.as_dtype();
        dtype.unwrap_or_else(|| panic!("a {self:?} is never written to"))
    }

    /// Bytes of the elements.
    pub fn nbytes(&self) -> usize {
        self.format.bytes_for(self.len())
    }

    /// Whether the memory is shared with other tensors, such as a mapped file.
    pub fn is_shared(&self) -> bool {
        matches!(self.storage, Storage::Shared { .. })
    }

    /// The matrix to read.
    pub fn view(&self) -> View<'_> {
        View::new(
            Numbers::new(self.format, self.bytes()),
            self.rows,
            self.cols,
        )
    }

    /// The matrix to write.
    ///
    /// # Panics
    /// If the matrix is bf16 or its memory is shared: only owned f32 matrices are written to.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        assert_eq!(
            self.format,
            NumberFormat::F32,
            "only f32 matrices are written to"
        );
        let len = self.len();
        match &mut self.storage {
            Storage::Owned(buffer) => {
                ViewMut::new(&mut buffer.as_mut_slice()[..len], self.rows, self.cols)
            }
            Storage::Shared { .. } => panic!("shared memory is never written to"),
        }
    }

    /// The elements in row order, widened to f32.
    pub fn to_vec(&self) -> Vec<f32> {
        self.view().to_vec()
    }

    /// The same elements in row order under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    #[must_use]
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        assert_eq!(
            self.len(),
            rows * cols,
            "{}x{} cannot become {rows}x{cols}",
            self.rows,
            self.cols
        );
        Self { rows, cols, ..self }
    }

    /// The elements as little-endian numbers of `dtype`, rounded to nearest where that narrows.
    pub fn to_le_bytes(&self, dtype: DType) -> Cow<'_, [u8]> {
        self.view().to_le_bytes(dtype)
    }

    fn bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Owned(buffer) => &buffer.as_slice()[..self.nbytes()],
            Storage::Shared { bytes, range } => &(**bytes).as_ref()[range.clone()],
        }
    }
}

impl<'a> From<&'a Tensor> for View<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        tensor.view()
    }
}

impl<'a> From<&'a mut Tensor> for OutputMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        let (rows, cols) = (tensor.rows, tensor.cols);
        match tensor.written_dtype() {
            DType::F32 => tensor.view_mut().into(),
            DType::Bf16 => Self::rounded(bytemuck::cast_slice_mut(tensor.bytes_mut()), rows, cols),
        }
    }
}

impl<'a> From<&'a mut Tensor> for ViewMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        tensor.view_mut()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = if self.is_shared() { ", shared" } else { "" };
        write!(
            f,
            "Tensor({}x{}, {}{shared})",
            self.rows, self.cols, self.format
        )
    }
}

fn check_length(
    found: usize,
    format: NumberFormat,
    rows: usize,
    cols: usize,
) -> Result<(), TensorError> {
    if !cols.is_multiple_of(format.block_len()) {
        let found = cols;
        return Err(TensorError::PartOfBlock { format, found });
    }
    let expected = rows
        .checked_mul(cols)
        .filter(|n| n.checked_mul(format.unit().bytes).is_some())
        .map(|n| format.bytes_for(n))
        .ok_or(TensorError::TooLarge { rows, cols, format })?;
    check_bytes((rows, cols), format, expected, found)
}

/// Whether a matrix has as many bytes as it needs.
pub(crate) fn check_bytes(
    (rows, cols): (usize, usize),
    format: NumberFormat,
    expected: usize,
    found: usize,
) -> Result<(), TensorError> {
    if expected == found {
        return Ok(());
    }
    Err(TensorError::Length {
        rows,
        cols,
        format,
        expected,
        found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mapped file, except that where it starts is known: at a cache line.
    struct Lines(Tensor);

    impl AsRef<[u8]> for Lines {
        fn as_ref(&self) -> &[u8] {
            self.0.bytes()
        }
    }

    fn shared(bytes: Vec<u8>) -> SharedBytes {
        Arc::new(bytes)
    }

    #[test]
    fn owned_memory_starts_at_a_cache_line() {
        for len in [1, 3, 100] {
            let tensor = Tensor::zeros(1, len);
            assert_eq!(tensor.view().f32s().as_ptr().align_offset(64), 0);
        }
    }

    #[test]
    fn shared_bytes_are_used_in_place() {
        let buffer = Tensor::from_f32(1, 32, (0..32).map(|i| i as f32).collect());
        let bytes: SharedBytes = Arc::new(Lines(buffer));
        let tensor = Tensor::from_shared(Arc::clone(&bytes), 8..32, DType::F32, 2, 3).unwrap();
        assert_eq!(tensor.to_vec(), [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        assert!(tensor.is_shared());
        assert_eq!(
            tensor.view().f32s().as_ptr().cast(),
            (*bytes).as_ref()[8..].as_ptr()
        );
        let error = Tensor::from_shared(Arc::clone(&bytes), 2..6, DType::F32, 1, 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "f32 numbers start at byte 2, which is not a multiple of their size"
        );
        let error = Tensor::from_shared(bytes, 120..132, DType::F32, 1, 3).unwrap_err();
        assert_eq!(
            error.to_string(),
            "bytes 120..132 do not lie within 128 shared bytes"
        );
    }

    #[test]
    fn lengths_are_checked() {
        let error = Tensor::from_le_bytes(&[0; 7], DType::Bf16, 2, 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "2x2 in bf16 needs 8 bytes, but 7 were given"
        );
        let error = Tensor::from_le_bytes(&[], DType::F32, usize::MAX, 2).unwrap_err();
        assert!(matches!(error, TensorError::TooLarge { .. }));
        #[expect(clippy::reversed_empty_ranges, reason = "a range from a hostile file")]
        let backwards = Tensor::from_shared(shared(vec![0; 8]), 6..2, DType::F32, 1, 1);
        assert!(matches!(backwards, Err(TensorError::Range { .. })));
    }

    #[test]
    fn bytes_round_trip() {
        let numbers = [0.0, -1.5, 3.25, f32::INFINITY, 1e-30, 1.0 + 1.0 / 512.0];
        let tensor = Tensor::from_f32_as(2, 3, &numbers, DType::F32);
        for dtype in [DType::F32, DType::Bf16] {
            let bytes = tensor.to_le_bytes(dtype);
            assert_eq!(bytes.len(), dtype.bytes_for(6));
            let back = Tensor::from_le_bytes(&bytes, dtype, 2, 3).unwrap();
            assert_eq!(back.nbytes(), bytes.len());
            assert_eq!(back.to_le_bytes(dtype), bytes);
            let rounded = Tensor::from_f32_as(2, 3, &numbers, dtype);
            assert_eq!(back.to_vec(), rounded.to_vec());
            assert_eq!(
                back.to_le_bytes(DType::F32),
                rounded.to_le_bytes(DType::F32)
            );
        }
    }

    #[test]
    fn rounding_to_bf16_is_to_the_nearest_with_ties_to_even() {
        // A step above one is 1/128 for bf16.
        let numbers = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.1 / 256.0];
        let rounded = Tensor::from_f32_as(1, 3, &numbers, DType::Bf16).to_vec();
        assert_eq!(rounded, [1.0, 1.0 + 2.0 / 128.0, 1.0 + 1.0 / 128.0]);
    }

    #[test]
    #[should_panic(expected = "only f32 matrices are written to")]
    fn bf16_is_never_written_to() {
        Tensor::from_f32_as(1, 1, &[1.0], DType::Bf16).view_mut();
    }

    #[test]
    fn views_slice_split_and_reshape() {
        let mut tensor = Tensor::from_f32(3, 2, vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(
            tensor.view().slice_rows(1..3).to_vec(),
            [2.0, 3.0, 4.0, 5.0]
        );
        assert_eq!(
            tensor.view().reshape(2, 3).slice_rows(1..2).to_vec(),
            [3.0, 4.0, 5.0]
        );
        let (mut above, mut below) = tensor.view_mut().split_rows(1);
        assert_eq!((above.rows(), below.rows()), (1, 2));
        above.fill(7.0);
        let bf16 = Tensor::from_f32_as(2, 2, &[1.0, 2.0, 3.0, 4.0], DType::Bf16);
        below.copy_from(bf16.view());
        assert_eq!(tensor.to_vec(), [7.0, 7.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(tensor.reshape(1, 6).cols(), 6);
        assert_eq!(format!("{bf16:?}"), "Tensor(2x2, bf16)");
    }
}
