//! Matrices as bitsandbytes stores them: numbers of four or eight bits in one tensor, and what they are multiplied with in others.
//!
//! Numbers of four bits lie in row order, two a byte. A scale, bitsandbytes' `absmax`, belongs to `block` neighbouring numbers, whatever rows they are of.
//! With "double quantization" the scales are stored as bytes, themselves in blocks with scales ([`NestedScales`]).
//!
//! Here they become blocks of 64 numbers with a scale each, 4.5 bits a number: 0.37 more than bitsandbytes takes with double quantization,
//! none where it does without, and some where its blocks are larger. What a number is stays the same to the bit.

use half::f16;
use rayon::prelude::*;

use super::NumberFormat;
use super::blocks::apart::{INT8_LEN, INT8_STEP, Int8};
use super::blocks::four_bit::{BYTES, FP4_VALUES, LEN, NF4_VALUES, put, take};
use crate::buffer::Buffer;
use crate::tensor::{Tensor, TensorError, check_bytes};

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
    /// Whether so many numbers that share a scale can be in blocks of 64 numbers.
    pub fn has_block(numbers: usize) -> bool {
        numbers.is_power_of_two() && (LEN..=4096).contains(&numbers)
    }

    /// A number of the matrix, counted row after row.
    ///
    /// # Panics
    /// If there are not the bytes and scales for it, or the map has not 16 values.
    pub fn number(&self, at: usize) -> f32 {
        let q = self.packed[at / 2] >> (4 * (1 - at % 2)) & 15;
        self.map[usize::from(q)] * self.scales[at / self.block]
    }

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
        if !Self::has_block(self.block) {
            let found = self.block;
            return Err(TensorError::BlockSize { format, found });
        }
        let too_large = TensorError::TooLarge { rows, cols, format };
        let numbers = rows.checked_mul(cols).ok_or(too_large)?;
        let (expected, found) = (numbers / 2, self.packed.len());
        check_bytes((rows, cols), format, expected, found)?;
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

/// The tensors of a matrix that bitsandbytes quantized to int8: number (o, i) is q · scale / 127, the scale being the output's.
#[derive(Clone, Copy, Debug)]
pub struct EightBit<'a> {
    /// The numbers from -127 to 127, row by row.
    pub numbers: &'a [u8],
    /// `SCB`: the largest magnitude of each output.
    pub scales: &'a [f32],
}

impl EightBit<'_> {
    /// A number of the matrix, counted row after row, as bitsandbytes' `int8_vectorwise_dequant` makes it.
    ///
    /// # Panics
    /// If there is no such number.
    pub fn number(&self, at: usize) -> f32 {
        let cols = self.numbers.len() / self.scales.len();
        f32::from(self.numbers[at].cast_signed()) * self.scales[at / cols] * INT8_STEP
    }

    /// The matrix in blocks of 64 numbers, each with the scale of its row: 8.5 bits a number.
    ///
    /// # Errors
    /// If a row is not made of whole blocks of 64, or there are not the numbers and scales that the shape asks for.
    pub fn matrix(&self, rows: usize, cols: usize) -> Result<Tensor, TensorError> {
        let format = NumberFormat::Int8;
        if !cols.is_multiple_of(INT8_LEN) {
            let found = cols;
            return Err(TensorError::PartOfBlock { format, found });
        }
        let too_large = TensorError::TooLarge { rows, cols, format };
        let (expected, found) = (rows.checked_mul(cols).ok_or(too_large)?, self.numbers.len());
        check_bytes((rows, cols), format, expected, found)?;
        let (expected, found) = (rows, self.scales.len());
        if expected != found {
            return Err(TensorError::Scales { expected, found });
        }
        let mut bytes = Vec::with_capacity(format.bytes_for(rows * cols));
        for (row, scale) in self.numbers.chunks_exact(cols.max(1)).zip(self.scales) {
            for qs in row.as_chunks::<INT8_LEN>().0 {
                let d = scale.to_le_bytes();
                bytes.extend_from_slice(bytemuck::bytes_of(&Int8 { d, qs: *qs }));
            }
        }
        Tensor::from_le_bytes(&bytes, format, rows, cols)
    }
}

/// A matrix of whole blocks of 64 numbers as bitsandbytes stores it.
#[derive(Clone, Debug)]
pub struct FourBitParts {
    /// Two numbers a byte, the first in the high half.
    pub packed: Vec<u8>,
    /// `absmax`.
    pub scales: Vec<f32>,
}

impl FourBitParts {
    /// Takes the blocks of NF4 or FP4 apart.
    pub fn of(blocks: &[u8]) -> Self {
        let blocks = blocks.as_chunks::<BYTES>().0;
        let mut packed = Vec::with_capacity(blocks.len() * LEN / 2);
        let mut scales = Vec::with_capacity(blocks.len());
        for block in blocks {
            let (scale, bytes) = take(block);
            scales.push(scale);
            packed.extend(bytes);
        }
        Self { packed, scales }
    }
}

/// Numbers of a row, rounded to int8 as bitsandbytes does it: to half precision first, and then to 127ths of the largest magnitude, which
/// comes with them. A row of zeros has the magnitude 0.
///
/// # Errors
/// The place of a number that half precision does not hold.
pub fn eight_bits(row: &[f32]) -> Result<(Vec<u8>, f32), usize> {
    let halves: Vec<f32> = row.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
    if let Some(at) = halves.iter().position(|x| !x.is_finite()) {
        return Err(at);
    }
    let largest = halves.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    // PyTorch divides a number by a tensor so.
    let factor = if largest > 0.0 {
        largest.recip() * 127.0
    } else {
        0.0
    };
    let numbers = halves.iter();
    let numbers = numbers.map(|x| ((x * factor).round_ties_even() as i8).cast_unsigned());
    Ok((numbers.collect(), largest))
}

/// Values that share a nested scale.
pub const NESTED_BLOCK: usize = 256;

/// Scales after bitsandbytes' "double quantization": to bytes, less their mean, in blocks of [`NESTED_BLOCK`].
#[derive(Clone, Debug)]
pub struct NestedParts {
    /// `absmax`: a byte for each scale.
    pub bytes: Vec<u8>,
    /// `nested_absmax`.
    pub scales: Vec<f32>,
    /// `nested_offset`: the mean.
    pub offset: f32,
}

impl NestedParts {
    /// Quantizes scales as bitsandbytes does it on a CPU. The mean is that of the exact sum, where PyTorch's may be the number beside it.
    pub fn of(scales: &[f32]) -> Self {
        let map = nested_map();
        let bounds: Vec<f32> = map
            .windows(2)
            .map(|two| f32::midpoint(two[0], two[1]))
            .collect();
        let sum: f64 = scales.iter().map(|scale| f64::from(*scale)).sum();
        let offset = (sum / scales.len().max(1) as f64) as f32;
        let (mut bytes, mut nested) = (Vec::with_capacity(scales.len()), Vec::new());
        for block in scales.chunks(NESTED_BLOCK) {
            let less = |scale: &f32| scale - offset;
            let largest = block
                .iter()
                .fold(0.0_f32, |most, x| most.max(less(x).abs()));
            let factor = if largest > 0.0 { 1.0 / largest } else { 0.0 };
            bytes.extend(block.iter().map(|scale| {
                // bitsandbytes looks the value up in a table of 65,536 places.
                let at = (less(scale) * factor).clamp(-1.0, 1.0);
                let place = (((at + 1.0) * 0.5) * 65535.0 + 0.5).floor();
                let at = place / 65535.0 * 2.0 - 1.0;
                bounds.partition_point(|bound| *bound < at) as u8
            }));
            nested.push(largest);
        }
        Self {
            bytes,
            scales: nested,
            offset,
        }
    }

    /// What the bytes stand for.
    ///
    /// # Errors
    /// None, of what [`of`](Self::of) has made.
    pub fn widened(&self) -> Result<Vec<f32>, TensorError> {
        let nested = NestedScales {
            bytes: &self.bytes,
            map: &nested_map(),
            scales: &self.scales,
            block: NESTED_BLOCK,
            offset: self.offset,
        };
        nested.widened()
    }
}

/// The values of a byte, ascending: "dynamic" numbers with a sign, as many zeros as say the power of ten, and a fraction (Dettmers 2015,
/// <https://arxiv.org/abs/1511.04561>; bitsandbytes' `create_dynamic_map`).
pub fn nested_map() -> [f32; 256] {
    const POWERS: i32 = 7;
    let mut values = vec![0.0, 1.0];
    for power in 0..POWERS {
        let (count, scale) = (1_usize << power, 10_f64.powi(power + 1 - POWERS) as f32);
        let step = (1.0_f32 - 0.1) / count as f32;
        let bound = |i: usize| {
            if i < count.div_ceil(2) {
                // Products and sums are rounded once, as PyTorch's vectors do it.
                step.mul_add(i as f32, 0.1)
            } else {
                (-step).mul_add((count - i) as f32, 1.0)
            }
        };
        for i in 0..count {
            let value = scale * f32::midpoint(bound(i), bound(i + 1));
            values.extend([value, -value]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
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
