//! Number formats: how the numbers of a matrix lie in memory.
//!
//! What is computed or written is f32 or bf16 ([`DType`]); a frozen weight may lie in any [`NumberFormat`]. Of f32 and bf16, engines read
//! the numbers where they lie ([`Number`]). Of every other format they get numbers that were widened to f32 into scratch memory, a strip of
//! a matrix at a time ([`Window`]), so that no engine knows how the numbers of a block share a scale.
//!
//! A format of single numbers has a file here, and one of blocks a type in [`blocks`].

mod bf16;
mod bitsandbytes;
mod blocks;
mod f16;
mod f32;
mod grouped;

use std::fmt;
use std::ops::Range;

use bytemuck::Pod;
use pulp::Simd;

pub use self::bitsandbytes::{
    EightBit, FourBit, FourBitParts, NESTED_BLOCK, NestedParts, NestedScales, eight_bits,
    nested_map,
};
use self::blocks::BlockFormat;
pub(crate) use self::blocks::apart::INT8_STEP;
pub(crate) use self::blocks::four_bit::{FP4_VALUES, NF4_VALUES};
pub(crate) use self::blocks::{GROUP, IntegerBlock, OneByOne};
pub use self::grouped::{FourBitOrder, Grouped};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd;
use crate::tensor::TensorError;

/// The format of numbers that are computed with or written one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// The upper half of an f32: 8 bits of exponent, 7 of mantissa.
    Bf16,
}

impl DType {
    /// Bytes of so many numbers.
    pub fn bytes_for(self, numbers: usize) -> usize {
        NumberFormat::from(self).bytes_for(numbers)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        NumberFormat::from(*self).fmt(f)
    }
}

/// How the numbers of a matrix are stored. The names of formats with blocks are ggml's, then bitsandbytes' NF4, FP4 and int8, and int4 for
/// what GPTQ and AWQ make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NumberFormat {
    /// [`DType::F32`].
    F32,
    /// [`DType::Bf16`].
    Bf16,
    /// IEEE half precision.
    F16,
    /// 32 numbers d·(q - 8), q of 4 bits.
    Q4_0,
    /// 32 numbers d·q + m, q of 4 bits.
    Q4_1,
    /// 32 numbers d·(q - 16), q of 5 bits.
    Q5_0,
    /// 32 numbers d·q + m, q of 5 bits.
    Q5_1,
    /// 32 numbers d·q, q of 8 bits.
    Q8_0,
    /// 256 numbers of 2 bits, in runs of 16 with a scale and a minimum of 4 bits.
    Q2K,
    /// 256 numbers of 3 bits, in runs of 16 with a scale of 6 bits.
    Q3K,
    /// 256 numbers of 4 bits, in runs of 32 with a scale and a minimum of 6 bits.
    Q4K,
    /// 256 numbers of 5 bits, in runs of 32 with a scale and a minimum of 6 bits.
    Q5K,
    /// 256 numbers of 6 bits, in runs of 16 with a scale of 8 bits.
    Q6K,
    /// 32 numbers d·v, v one of 16 values that lie closer near zero.
    Iq4Nl,
    /// 256 numbers of the same values, in runs of 32 with a scale of 6 bits.
    Iq4Xs,
    /// 64 numbers d·v, v one of 16 values that are quantiles of a normal distribution.
    Nf4,
    /// 64 numbers d·v, v one of 16 floats of four bits.
    Fp4,
    /// 64 numbers d·q / 127, q of 8 bits.
    Int8,
    /// 32 numbers d·(q - z), q of 4 bits, z from 0 to 16.
    Int4,
}

impl NumberFormat {
    /// Every format.
    pub const ALL: [Self; 19] = [
        Self::F32,
        Self::Bf16,
        Self::F16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Nf4,
        Self::Fp4,
        Self::Int8,
        Self::Int4,
    ];

    /// Bytes of so many numbers, whole rows of a matrix.
    pub fn bytes_for(self, numbers: usize) -> usize {
        let Unit {
            numbers: each,
            bytes,
            ..
        } = self.unit();
        numbers.div_ceil(each) * bytes
    }

    /// Numbers of a block, which share scales; one where each stands by itself. A row of a matrix is made of whole blocks.
    pub fn block_len(self) -> usize {
        self.unit().numbers
    }

    /// The format as one of numbers that are computed with, if it is.
    pub fn as_dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::Bf16 => Some(DType::Bf16),
            _ => None,
        }
    }

    /// Whether a generated row may be rounded to integers beside a weight of this format ([`RowClasses::rounding`](crate::RowClasses::rounding)):
    /// whether its numbers are integers but for their scales.
    pub fn has_integers(self) -> bool {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 | Self::Nf4 | Self::Fp4 => false,
            Self::Q4_0
            | Self::Q4_1
            | Self::Q5_0
            | Self::Q5_1
            | Self::Q8_0
            | Self::Q2K
            | Self::Q3K
            | Self::Q4K
            | Self::Q5K
            | Self::Q6K
            | Self::Iq4Nl
            | Self::Iq4Xs
            | Self::Int8
            | Self::Int4 => true,
        }
    }

    /// The values that its four bits stand for, of NF4 and FP4.
    pub fn four_bit_values(self) -> Option<&'static [f32; 16]> {
        match self {
            Self::Nf4 => Some(&NF4_VALUES),
            Self::Fp4 => Some(&FP4_VALUES),
            _ => None,
        }
    }

    /// Whether [`quantize`](Self::quantize) makes numbers of this format.
    pub fn has_quantizer(self) -> bool {
        self.block_len() == 1 || blocks::quantizer(self).is_some()
    }

    /// Appends the bytes of a row of numbers in this format, each rounded to the nearest one, or its blocks.
    ///
    /// Blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are to the bit those of llama.cpp's quantizer without an importance matrix
    /// (`quantize_row_q4_K_ref` and its like) where its compiler does not fuse products and sums, which it does not on x86-64. The bits do
    /// not depend on the processor.
    /// Blocks of NF4 and FP4 are those that bitsandbytes makes on a CPU, with blocks of 64 and without double quantization.
    ///
    /// # Errors
    /// If the format has no quantizer, the row is not made of whole blocks, or a number is not finite or so large that it or its block's
    /// scale would be infinite. `to` is then as it was.
    pub fn quantize(self, row: &[f32], to: &mut Vec<u8>) -> Result<(), TensorError> {
        let format = self;
        let begin = to.len();
        if !row.len().is_multiple_of(self.block_len()) {
            let found = row.len();
            return Err(TensorError::PartOfBlock { format, found });
        }
        let number = |at: usize| TensorError::Number {
            format,
            at,
            value: row[at],
        };
        if let Some(at) = row.iter().position(|x| !x.is_finite()) {
            return Err(number(at));
        }
        to.reserve(self.bytes_for(row.len()));
        let singles = |to: &mut Vec<u8>, rounded: fn(f32) -> Option<[u8; 2]>| {
            for (at, x) in row.iter().enumerate() {
                to.extend(rounded(*x).ok_or(at)?);
            }
            Ok(())
        };
        let result = match self {
            Self::F32 => {
                to.extend_from_slice(bytemuck::cast_slice(row));
                Ok(())
            }
            Self::Bf16 => singles(to, |x| {
                let rounded = half::bf16::from_f32(x);
                rounded.is_finite().then(|| rounded.to_le_bytes())
            }),
            Self::F16 => singles(to, f16::rounded),
            blocks => {
                let quantizer = blocks::quantizer(blocks);
                let quantizer = quantizer.ok_or(TensorError::NoQuantizer { format })?;
                quantizer(row, to).map_err(|block| {
                    // The largest number of the block is what its scale follows.
                    let of_block = block * self.block_len()..(block + 1) * self.block_len();
                    let size = |at: &usize| row[*at].abs();
                    let largest = of_block.max_by(|a, b| size(a).total_cmp(&size(b)));
                    largest.unwrap_or_default()
                })
            }
        };
        result.map_err(|at| {
            to.truncate(begin);
            number(at)
        })
    }

    pub(crate) fn unit(self) -> Unit {
        let single = |name, bytes| Unit {
            name,
            numbers: 1,
            bytes,
            align: bytes,
        };
        match self {
            Self::F32 => single("f32", 4),
            Self::Bf16 => single("bf16", 2),
            Self::F16 => single("f16", 2),
            blocks => BlockFormat::of(blocks).unit(),
        }
    }

    /// Whether engines read the numbers with those at even places first; see [`Number::EVEN_FIRST`].
    pub(crate) fn even_first(self) -> bool {
        self == Self::Bf16
    }
}

impl From<DType> for NumberFormat {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
        }
    }
}

impl fmt::Display for NumberFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.unit().name)
    }
}

/// What there is to know of a format's unit, a number or a block, without its numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unit {
    /// As messages and files write it.
    pub(crate) name: &'static str,
    /// Numbers that a unit holds.
    pub(crate) numbers: usize,
    pub(crate) bytes: usize,
    pub(crate) align: usize,
}

/// Numbers that [`Number::widened`] takes at once: of bf16 a cache line, and for any processor at least two vectors.
pub(crate) const CHUNK: usize = 32;

/// A number that vector code reads where it lies.
pub(crate) trait Number: Pod + Send + Sync {
    /// Whether [`Self::widened`] gives the numbers at even places before those at odd ones.
    const EVEN_FIRST: bool;

    /// Two vectors of a chunk, widened: number `i` of its first half, and number `i` of its second half.
    fn widened<S: Simd>(simd: S, from: &[Self; CHUNK], i: usize) -> [S::f32s; 2];

    /// The number in f32.
    fn wide(self) -> f32;

    /// Eight numbers, widened.
    ///
    /// # Safety
    /// The processor has AVX2; eight numbers can be read.
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "vector loads take pointers")]
    unsafe fn load(from: *const Self) -> std::arch::x86_64::__m256;
}

/// The numbers of a matrix in row order, in any format.
#[derive(Clone, Copy)]
pub(crate) struct Numbers<'a> {
    format: NumberFormat,
    bytes: &'a [u8],
}

impl<'a> Numbers<'a> {
    /// Numbers in the memory of their format: whole units, which start where such may.
    pub(crate) fn new(format: NumberFormat, bytes: &'a [u8]) -> Self {
        Self { format, bytes }
    }

    /// f32 numbers.
    pub(crate) fn of_f32s(numbers: &'a [f32]) -> Self {
        Self::new(NumberFormat::F32, bytemuck::cast_slice(numbers))
    }

    /// The format.
    pub(crate) fn format(self) -> NumberFormat {
        self.format
    }

    /// The memory.
    pub(crate) fn bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// How many numbers there are.
    pub(crate) fn len(self) -> usize {
        let unit = self.format.unit();
        self.bytes.len() / unit.bytes * unit.numbers
    }

    /// Some of the numbers; whole units.
    pub(crate) fn slice(self, part: Range<usize>) -> Self {
        let unit = self.format.unit();
        debug_assert!(
            part.start.is_multiple_of(unit.numbers) && part.end.is_multiple_of(unit.numbers),
            "a part of a unit"
        );
        let bytes = part.start / unit.numbers * unit.bytes..part.end / unit.numbers * unit.bytes;
        Self::new(self.format, &self.bytes[bytes])
    }

    /// The numbers, if they are f32.
    pub(crate) fn f32s(self) -> Option<&'a [f32]> {
        (self.format == NumberFormat::F32).then(|| bytemuck::cast_slice(self.bytes))
    }

    /// The numbers, if they are bf16.
    pub(crate) fn bf16s(self) -> Option<&'a [half::bf16]> {
        (self.format == NumberFormat::Bf16).then(|| bytemuck::cast_slice(self.bytes))
    }

    /// Widens numbers from number `first` on.
    pub(crate) fn widen(self, to: &mut [f32], first: usize) {
        let window = Window {
            stride: 0,
            rows: 0..1,
            cols: first..first + to.len(),
        };
        self.widen_window(to, &window);
    }

    /// Widens the numbers of a window, whose rows come one behind the other then.
    fn widen_window(self, to: &mut [f32], window: &Window) {
        let Window { stride, rows, cols } = window;
        let lines = rows.clone().zip(to.chunks_exact_mut(cols.len().max(1)));
        let lines = lines.map(|(row, to)| {
            let first = row * stride + cols.start;
            (first..first + to.len(), to)
        });
        match self.format {
            NumberFormat::F32 => lines.for_each(|(part, to)| {
                to.copy_from_slice(&bytemuck::cast_slice::<_, f32>(self.bytes)[part]);
            }),
            NumberFormat::Bf16 => lines.for_each(|(part, to)| {
                simd::widen(to, &bytemuck::cast_slice(self.bytes)[part]);
            }),
            NumberFormat::F16 => lines.for_each(|(part, to)| {
                f16::widen(to, &bytemuck::cast_slice(self.bytes)[part]);
            }),
            blocks => BlockFormat::of(blocks).widen(to, self.bytes, window),
        }
    }

    /// Lets a visitor have the blocks.
    ///
    /// # Panics
    /// If the numbers of the format are no integers.
    pub(crate) fn visit_blocks(self, visitor: impl BlockVisitor) {
        struct With<'a, V>(V, &'a [u8]);
        impl<V: BlockVisitor> blocks::IntegerVisitor for With<'_, V> {
            type Output = ();
            fn visit<B: IntegerBlock>(self) {
                self.0.visit::<B>(bytemuck::cast_slice(self.1));
            }
        }
        blocks::visit_integers(self.format, With(visitor, self.bytes));
    }

    /// Calls `work` with some of the numbers in f32: in place if they are, else widened into scratch memory.
    pub(crate) fn with_f32s<R>(self, part: Range<usize>, work: impl FnOnce(&[f32]) -> R) -> R {
        let stored = self.f32s().map(|numbers| &numbers[part.clone()]);
        let len = stored.map_or(part.len(), |_| 0);
        with_scratch(len, |scratch| {
            // In one place: what is compiled for vectors is large.
            work(stored.unwrap_or_else(|| {
                self.widen(scratch, part.start);
                scratch
            }))
        })
    }
}

/// Something to be done with the blocks of a matrix, whose numbers are integers.
pub(crate) trait BlockVisitor {
    /// Does it.
    fn visit<B: IntegerBlock>(self, blocks: &[B]);
}

/// Something to be done with numbers that engines read: those of a window from its first on, whose rows start `stride` apart.
pub(crate) trait NumberVisitor {
    /// What comes of it.
    type Output;

    /// Does it.
    fn visit<N: Number>(self, numbers: &[N], stride: usize) -> Self::Output;
}

/// Numbers as memory of a type, rounded to nearest.
///
/// # Panics
/// If `to` has not the bytes of so many numbers.
pub(crate) fn encode(dtype: DType, to: &mut [u8], from: &[f32]) {
    match dtype {
        DType::F32 => to.copy_from_slice(bytemuck::cast_slice(from)),
        DType::Bf16 => simd::narrow(bytemuck::cast_slice_mut(to), from),
    }
}

/// [`encode`] into memory of its own.
pub(crate) fn encoded(dtype: DType, from: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => bytemuck::cast_slice(from).to_vec(),
        DType::Bf16 => {
            let mut numbers = vec![half::bf16::ZERO; from.len()];
            simd::narrow(&mut numbers, from);
            bytemuck::cast_slice(&numbers).to_vec()
        }
    }
}

/// A window of a matrix whose rows have `stride` numbers: some numbers of some rows.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    pub(crate) stride: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl Window {
    /// Lets a visitor have the numbers of the window: where they lie, or widened into scratch memory.
    pub(crate) fn read<V: NumberVisitor>(&self, numbers: Numbers<'_>, visitor: V) -> V::Output {
        if let Some(numbers) = numbers.bf16s() {
            return visitor.visit(&numbers[self.first()..], self.stride);
        }
        self.read_f32s(numbers, |numbers, stride| visitor.visit(numbers, stride))
    }

    /// Calls `work` with the numbers of the window from its first on, in f32, and with how far its rows are apart: where they lie, or
    /// widened into scratch memory.
    pub(crate) fn read_f32s<R>(
        &self,
        numbers: Numbers<'_>,
        work: impl FnOnce(&[f32], usize) -> R,
    ) -> R {
        let width = self.cols.len();
        let stored = numbers.f32s().map(|numbers| &numbers[self.first()..]);
        let len = stored.map_or(self.rows.len() * width, |_| 0);
        with_scratch(len, |scratch| {
            if let Some(numbers) = stored {
                // In one place: what is compiled for vectors is large.
                return work(numbers, self.stride);
            }
            numbers.widen_window(scratch, self);
            work(scratch, width)
        })
    }

    /// The first number; zero if there is none.
    pub(crate) fn first(&self) -> usize {
        if self.rows.is_empty() || self.cols.is_empty() {
            return 0;
        }
        self.rows.start * self.stride + self.cols.start
    }
}

#[cfg(test)]
pub(crate) use self::blocks::for_tests::matrix_of;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_say_how_they_lie() {
        assert_eq!(DType::F32.bytes_for(6), 24);
        assert_eq!(DType::Bf16.bytes_for(6), 12);
        assert_eq!(DType::Bf16.to_string(), "bf16");
        assert_eq!(DType::F32.to_string(), "f32");
        assert_eq!(NumberFormat::Q4K.to_string(), "Q4_K");
        assert_eq!(NumberFormat::Q4K.bytes_for(512), 288);
        assert_eq!(NumberFormat::from(DType::Bf16), NumberFormat::Bf16);
        assert_eq!(NumberFormat::F16.as_dtype(), None);
    }

    #[test]
    fn parts_are_widened_from_anywhere() {
        let numbers = [1.0, -2.5, 3.0, 0.5, 8.0, -16.0];
        for dtype in [DType::F32, DType::Bf16] {
            let mut units = vec![0.0_f32; 6];
            let bytes = &mut bytemuck::cast_slice_mut(&mut units)[..dtype.bytes_for(6)];
            encode(dtype, bytes, &numbers);
            let stored = Numbers::new(dtype.into(), bytes);
            assert_eq!(stored.len(), 6);
            stored.with_f32s(2..5, |part| assert_eq!(part, &numbers[2..5]));
            let mut to = [0.0; 2];
            stored.slice(3..6).widen(&mut to, 1);
            assert_eq!(to, numbers[4..6]);
        }
    }
}
