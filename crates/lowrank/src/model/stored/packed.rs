//! Matrices of folders that bitsandbytes, GPTQ or AWQ quantized, as blocks that hold the same numbers.

use lowrank_formats::quantized::{
    FourBitKind, FourBitScales, PackedParts, PackedTensor, QuantMethod,
};
use lowrank_kernels::{
    DType, EightBit, FourBit, FourBitOrder, Grouped, NestedScales, NumberFormat, Tensor,
    TensorError, View,
};
use rayon::prelude::*;

use super::numbers;
use crate::Error;

/// The matrix as kernels know it.
enum Packed<'a> {
    FourBit(FourBit<'a>),
    EightBit(EightBit<'a>),
    Grouped(Grouped<'a>),
}

/// The format of a type of four bits.
pub(crate) fn four_bit_format(kind: FourBitKind) -> NumberFormat {
    match kind {
        FourBitKind::Nf4 => NumberFormat::Nf4,
        FourBitKind::Fp4 => NumberFormat::Fp4,
    }
}

/// Calls `work` with the matrix; `None` for one in half precision.
fn with_packed<R>(
    tensor: &PackedTensor,
    work: impl FnOnce(&Packed<'_>) -> Result<R, TensorError>,
) -> Result<Option<R>, Error> {
    let wide;
    let packed = match &tensor.parts {
        PackedParts::FourBit {
            kind,
            packed,
            map,
            scales,
            block,
        } => Packed::FourBit(FourBit {
            format: four_bit_format(*kind),
            packed: packed.bytes.as_ref(),
            map,
            scales: match scales {
                FourBitScales::Plain(scales) => scales,
                FourBitScales::Nested {
                    bytes,
                    map,
                    scales,
                    block,
                    offset,
                } => {
                    let nested = NestedScales {
                        bytes: bytes.bytes.as_ref(),
                        map,
                        scales,
                        block: *block,
                        offset: *offset,
                    };
                    wide = nested.widened().map_err(|e| tensor.error(e.to_string()))?;
                    &wide
                }
            },
            block: *block,
        }),
        PackedParts::EightBit { numbers, scales } => Packed::EightBit(EightBit {
            numbers: numbers.bytes.as_ref(),
            scales,
        }),
        PackedParts::Grouped {
            method,
            words,
            zeros,
            scales,
            groups,
        } => Packed::Grouped(Grouped {
            order: match method {
                QuantMethod::Awq => FourBitOrder::Awq,
                QuantMethod::Gptq { .. } | QuantMethod::Bitsandbytes => FourBitOrder::Gptq,
            },
            words: words.bytes.as_ref(),
            zeros: zeros.bytes.as_ref(),
            less_one: *method == QuantMethod::Gptq { less_one: true },
            scales,
            groups,
            outs: tensor.shape.first().copied().unwrap_or(1),
        }),
        PackedParts::Half(_) => return Ok(None),
    };
    let done = work(&packed).map_err(|e| tensor.error(e.to_string()))?;
    Ok(Some(done))
}

/// Rows and columns.
fn sizes(tensor: &PackedTensor) -> (usize, usize) {
    match tensor.shape.as_slice() {
        [rows, cols] => (*rows, *cols),
        other => (1, other.iter().product()),
    }
}

impl Packed<'_> {
    fn number(&self, (row, col): (usize, usize), cols: usize) -> f32 {
        match self {
            Self::FourBit(matrix) => matrix.number(row * cols + col),
            Self::EightBit(matrix) => matrix.number(row * cols + col),
            Self::Grouped(matrix) => matrix.number(row, col),
        }
    }

    /// Its blocks, where some have the same numbers.
    fn blocks(&self, (rows, cols): (usize, usize)) -> Result<Option<Tensor>, TensorError> {
        let blocks = match self {
            Self::FourBit(matrix) => matrix.matrix(rows, cols),
            Self::EightBit(matrix) => matrix.matrix(rows, cols),
            Self::Grouped(matrix) => return matrix.matrix(),
        };
        match blocks {
            Ok(blocks) => Ok(Some(blocks)),
            // Rows, or scales, that do not fall on blocks of 64 numbers.
            Err(TensorError::PartOfBlock { .. } | TensorError::BlockSize { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Its numbers, rounded where the type does not hold them.
    fn numbers(&self, (rows, cols): (usize, usize), dtype: DType) -> Result<Tensor, TensorError> {
        let mut bytes = vec![0; dtype.bytes_for(rows * cols)];
        let of_row = dtype.bytes_for(cols).max(1);
        bytes
            .par_chunks_exact_mut(of_row)
            .enumerate()
            .for_each(|(row, to)| {
                let wide: Vec<f32> = (0..cols).map(|col| self.number((row, col), cols)).collect();
                to.copy_from_slice(&View::of_row(&wide).to_le_bytes(dtype));
            });
        Tensor::from_le_bytes(&bytes, dtype, rows, cols)
    }

    /// Refuses tensors of other sizes than its numbers need.
    fn check(&self) -> Result<(), TensorError> {
        match self {
            // What files say of it was checked when they were read.
            Self::FourBit(_) | Self::EightBit(_) => Ok(()),
            Self::Grouped(matrix) => matrix.check(),
        }
    }
}

/// The format in which a matrix is held where its numbers are kept as they are; `None` where they are then bf16.
pub(super) fn format(tensor: &PackedTensor) -> Option<NumberFormat> {
    let (_, cols) = sizes(tensor);
    let (format, fits) = match &tensor.parts {
        PackedParts::FourBit { kind, block, .. } => {
            (four_bit_format(*kind), FourBit::has_block(*block))
        }
        PackedParts::EightBit { .. } => (NumberFormat::Int8, true),
        PackedParts::Grouped { scales, groups, .. } => {
            (NumberFormat::Int4, Grouped::has_blocks(groups, scales))
        }
        PackedParts::Half(_) => (NumberFormat::F16, true),
    };
    (fits && cols.is_multiple_of(format.block_len())).then_some(format)
}

/// One element, counted row after row; NaN where there is none.
pub(super) fn value(tensor: &PackedTensor, index: usize) -> f32 {
    let (rows, cols) = sizes(tensor);
    if let PackedParts::Half(entry) = &tensor.parts {
        return entry.value(index).unwrap_or(f32::NAN);
    }
    if index >= rows * cols {
        return f32::NAN;
    }
    let value = with_packed(tensor, |packed| {
        packed.check()?;
        Ok(packed.number((index / cols, index % cols), cols))
    });
    value.ok().flatten().unwrap_or(f32::NAN)
}

/// The matrix as the model holds it: with [`DType::F32`] all numbers are widened, with [`DType::Bf16`] they are kept as they are where a format
/// has them, and are rounded otherwise.
///
/// # Errors
/// Tensors of other sizes than its numbers need; in half precision, numbers that are not finite.
pub(super) fn to_tensor(
    tensor: &PackedTensor,
    shape: (usize, usize),
    dtype: DType,
) -> Result<Tensor, Error> {
    if let PackedParts::Half(entry) = &tensor.parts {
        let half = NumberFormat::F16;
        if dtype == DType::Bf16 {
            lowrank_formats::checkpoint::check_finite([entry])?;
            let bytes = &entry.bytes;
            let shared = Tensor::from_shared(bytes.owner(), bytes.range(), half, shape.0, shape.1);
            return Ok(match shared {
                Ok(shared) => shared,
                Err(_) => Tensor::from_le_bytes(bytes.as_ref(), half, shape.0, shape.1)?,
            });
        }
        return numbers(entry, shape, dtype);
    }
    let sizes = sizes(tensor);
    let found = with_packed(tensor, |packed| {
        packed.check()?;
        let kept = (dtype == DType::Bf16).then(|| packed.blocks(sizes));
        match kept.transpose()?.flatten() {
            Some(blocks) => Ok(blocks),
            None => packed.numbers(sizes, dtype),
        }
    })?;
    tensor.main().bytes.release();
    let found = found.ok_or_else(|| tensor.error("has no numbers"))?;
    Ok(found.reshape(shape.0, shape.1))
}
