//! Matrices as bitsandbytes stores them: numbers of four bits in one tensor, and what they are multiplied with in others.
//!
//! Numbers lie in row order, two a byte. A scale, bitsandbytes' `absmax`, belongs to `block` neighbouring numbers, whatever rows they are of.
//! With "double quantization" the scales are stored as bytes, themselves in blocks with scales ([`NestedScales`]).
//!
//! Here they become blocks of 64 numbers with a scale each, 4.5 bits a number: 0.37 more than bitsandbytes takes with double quantization,
//! none where it does without, and some where its blocks are larger. What a number is stays the same to the bit.

use rayon::prelude::*;

use super::NumberFormat;
use super::blocks::four_bit::{BYTES, FP4_VALUES, LEN, NF4_VALUES, put};
use crate::buffer::Buffer;
use crate::tensor::{Tensor, TensorError};

/// Blocks that a task puts together.
const TOGETHER: usize = 1024;

/// The tensors of a matrix that bitsandbytes quantized to NF4 or FP4.
#[derive(Clone, Copy, Debug)]
pub struct FourBit<'a> {
    /// [`NumberFormat::Nf4`] or [`NumberFormat::Fp4`].
    pub format: NumberFormat,
    /// Two numbers a byte, the first in the high half.
    pub packed: &'a [u8],
    /// `quant_map`: the 16 values, which are those of the format.
    pub map: &'a [f32],
    /// `absmax`, which stands for so many numbers each; from [`NestedScales::widened`] where it is quantized itself.
    pub scales: &'a [f32],
    /// `blocksize`: numbers that share a scale, 64 to 4096.
    pub block: usize,
}

impl FourBit<'_> {
    /// The matrix, whose numbers are map\[q\] · scale in f32, as bitsandbytes' `dequantize_4bit` makes them for f32. For bf16 and f16 it
    /// rounds these.
    ///
    /// # Errors
    /// If the format is neither NF4 nor FP4, the values are others, the block is no power of two from 64 to 4096, a row is not made of whole
    /// blocks of 64, or there are not the bytes and scales that the shape asks for.
    pub fn matrix(&self, rows: usize, cols: usize) -> Result<Tensor, TensorError> {
        let format = self.format;
        let values = match format {
            NumberFormat::Nf4 => NF4_VALUES,
            NumberFormat::Fp4 => FP4_VALUES,
            _ => return Err(TensorError::Values { format }),
        };
        if self.map != values {
            return Err(TensorError::Values { format });
        }
        if !cols.is_multiple_of(LEN) {
            let found = cols;
            return Err(TensorError::PartOfBlock { format, found });
        }
        if !self.block.is_power_of_two() || !(LEN..=4096).contains(&self.block) {
            let found = self.block;
            return Err(TensorError::BlockSize { format, found });
        }
        let too_large = TensorError::TooLarge { rows, cols, format };
        let numbers = rows.checked_mul(cols).ok_or(too_large)?;
        let (expected, found) = (numbers / 2, self.packed.len());
        if expected != found {
            return Err(TensorError::Length {
                rows,
                cols,
                format,
                expected,
                found,
            });
        }
        let (expected, found) = (numbers.div_ceil(self.block), self.scales.len());
        if expected != found {
            return Err(TensorError::Scales { expected, found });
        }
        let bytes = format.bytes_for(numbers);
        let mut buffer = Buffer::zeroed(bytes);
        let blocks = buffer.as_mut_slice::<u8>()[..bytes]
            .as_chunks_mut::<BYTES>()
            .0;
        let packed = self.packed.as_chunks::<{ LEN / 2 }>().0;
        let tasks = blocks
            .par_chunks_mut(TOGETHER)
            .zip(packed.par_chunks(TOGETHER))
            .enumerate();
        tasks.for_each(|(task, (blocks, packed))| {
            for (i, (to, from)) in blocks.iter_mut().zip(packed).enumerate() {
                let first = (task * TOGETHER + i) * LEN;
                put(to, self.scales[first / self.block], from);
            }
        });
        Ok(Tensor::owned(buffer, format, rows, cols))
    }
}

/// Scales that are quantized themselves.
#[derive(Clone, Copy, Debug)]
pub struct NestedScales<'a> {
    /// `absmax`: a byte for each scale.
    pub bytes: &'a [u8],
    /// `nested_quant_map`: the value of each byte.
    pub map: &'a [f32],
    /// `nested_absmax`: what so many values are multiplied with.
    pub scales: &'a [f32],
    /// `nested_blocksize`: values that share a scale, 256 as a rule.
    pub block: usize,
    /// `nested_offset`: what is added to each.
    pub offset: f32,
}

impl NestedScales<'_> {
    /// map\[q\] · scale + offset for each, product and sum rounded to f32.
    ///
    /// # Errors
    /// If the map has not 256 values, or there are not as many scales as the blocks of the bytes need.
    pub fn widened(&self) -> Result<Vec<f32>, TensorError> {
        let map: &[f32; 256] = self.map.try_into().map_err(|_| TensorError::Scales {
            expected: 256,
            found: self.map.len(),
        })?;
        let block = self.block.max(1);
        let (expected, found) = (self.bytes.len().div_ceil(block), self.scales.len());
        if expected != found {
            return Err(TensorError::Scales { expected, found });
        }
        let blocks = self.bytes.chunks(block).zip(self.scales);
        let numbers = blocks.flat_map(|(bytes, scale)| {
            let numbers = bytes.iter();
            numbers.map(move |q| map[usize::from(*q)] * scale + self.offset)
        });
        Ok(numbers.collect())
    }
}
