//! Number formats: how the numbers of a matrix lie in memory.
//!
//! A format is a type that implements [`Storage`], in a file of its own, and one line in [`DType::visit`], which is the one place where
//! the name of a format becomes its type. Everything that reads numbers goes through it.
//!
//! Formats are spoken of in runs of numbers, never in single ones that have an address: several numbers may share a scale. Where
//! the numbers do lie by themselves, engines read them in place ([`Number`]); of every other format they get runs that were widened to
//! f32, a strip at a time.

mod bf16;
mod f32;

use std::fmt;
use std::ops::Range;

use bytemuck::Pod;
use pulp::Simd;

use crate::cpu::scratch::with_scratch;

/// The number format of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// The upper half of an f32: 8 bits of exponent, 7 of mantissa.
    Bf16,
}

impl DType {
    /// Calls a visitor with the type of the format.
    #[inline]
    pub(crate) fn visit<V: Visitor>(self, visitor: V) -> V::Output {
        match self {
            Self::F32 => visitor.visit::<f32>(),
            Self::Bf16 => visitor.visit::<half::bf16>(),
        }
    }

    /// Bytes of so many numbers, whole rows of a matrix.
    pub fn bytes_for(self, numbers: usize) -> usize {
        let Unit {
            numbers: each,
            bytes,
            ..
        } = self.unit();
        numbers.div_ceil(each) * bytes
    }

    pub(crate) fn unit(self) -> Unit {
        struct Of;
        impl Visitor for Of {
            type Output = Unit;
            fn visit<S: Storage>(self) -> Unit {
                Unit {
                    name: S::NAME,
                    numbers: S::UNIT,
                    bytes: size_of::<S>(),
                    align: align_of::<S>(),
                    #[cfg(target_arch = "x86_64")]
                    is_bf16: S::as_bf16s(&[]).is_some(),
                    even_first: S::Read::EVEN_FIRST,
                }
            }
        }
        self.visit(Of)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.unit().name)
    }
}

/// The number format of an activation: one whose numbers can be written one by one, which those with a common scale cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActivationDType {
    /// [`DType::F32`], in which activations are computed with.
    F32,
    /// [`DType::Bf16`], in which some are kept.
    Bf16,
}

impl From<ActivationDType> for DType {
    fn from(dtype: ActivationDType) -> Self {
        match dtype {
            ActivationDType::F32 => Self::F32,
            ActivationDType::Bf16 => Self::Bf16,
        }
    }
}

impl fmt::Display for ActivationDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        DType::from(*self).fmt(f)
    }
}

/// What there is to know of a format's unit without its numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unit {
    /// As messages and files write it.
    pub(crate) name: &'static str,
    /// Numbers that a unit holds.
    pub(crate) numbers: usize,
    pub(crate) bytes: usize,
    pub(crate) align: usize,
    /// Whether the numbers are bf16 as they lie, which tiles multiply.
    #[cfg(target_arch = "x86_64")]
    pub(crate) is_bf16: bool,
    /// As [`Number::EVEN_FIRST`] of what engines read.
    pub(crate) even_first: bool,
}

/// Something to be done with the type of a format.
pub(crate) trait Visitor {
    /// What comes of it.
    type Output;

    /// Does it.
    fn visit<S: Storage>(self) -> Self::Output;
}

/// A unit of a number format: one number, or several that share a scale.
pub(crate) trait Storage: Pod + Send + Sync {
    /// As messages and files write it.
    const NAME: &'static str;
    /// Numbers that a unit holds. A row of a matrix is made of whole units.
    const UNIT: usize;
    /// What engines read: the units themselves if they are numbers, or else f32 numbers that [`widen`](Self::widen) made.
    type Read: Number;

    /// Widens numbers from number `first` on.
    fn widen(to: &mut [f32], from: &[Self], first: usize);

    /// Rounds numbers to the nearest that the format has; whole units.
    fn narrow(to: &mut [Self], from: &[f32]);

    /// The units as what engines read, unless they must be widened first.
    fn in_place(units: &[Self]) -> Option<&[Self::Read]>;

    /// The units as f32, if they are.
    fn as_f32s(_units: &[Self]) -> Option<&[f32]> {
        None
    }

    /// The units as bf16, if they are.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn as_bf16s(_units: &[Self]) -> Option<&[half::bf16]> {
        None
    }
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
    dtype: DType,
    bytes: &'a [u8],
}

impl<'a> Numbers<'a> {
    /// Numbers in the memory of their format: whole units, which start where such may.
    pub(crate) fn new(dtype: DType, bytes: &'a [u8]) -> Self {
        Self { dtype, bytes }
    }

    /// f32 numbers.
    pub(crate) fn of_f32s(numbers: &'a [f32]) -> Self {
        Self::new(DType::F32, bytemuck::cast_slice(numbers))
    }

    /// The format.
    pub(crate) fn dtype(self) -> DType {
        self.dtype
    }

    /// The memory.
    pub(crate) fn bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// How many numbers there are.
    pub(crate) fn len(self) -> usize {
        let unit = self.dtype.unit();
        self.bytes.len() / unit.bytes * unit.numbers
    }

    /// Some of the numbers; whole units.
    pub(crate) fn slice(self, part: Range<usize>) -> Self {
        let unit = self.dtype.unit();
        debug_assert!(
            part.start.is_multiple_of(unit.numbers) && part.end.is_multiple_of(unit.numbers),
            "a part of a unit"
        );
        let bytes = part.start / unit.numbers * unit.bytes..part.end / unit.numbers * unit.bytes;
        Self::new(self.dtype, &self.bytes[bytes])
    }

    /// The numbers, if they are f32.
    pub(crate) fn f32s(self) -> Option<&'a [f32]> {
        (self.dtype == DType::F32).then(|| bytemuck::cast_slice(self.bytes))
    }

    /// The numbers, if they are bf16.
    pub(crate) fn bf16s(self) -> Option<&'a [half::bf16]> {
        (self.dtype == DType::Bf16).then(|| bytemuck::cast_slice(self.bytes))
    }

    /// Does something with the units.
    #[inline]
    pub(crate) fn visit<V: UnitVisitor>(self, visitor: V) -> V::Output {
        struct With<'a, V>(V, &'a [u8]);
        impl<V: UnitVisitor> Visitor for With<'_, V> {
            type Output = V::Output;
            #[inline]
            fn visit<S: Storage>(self) -> V::Output {
                self.0.visit::<S>(bytemuck::cast_slice(self.1))
            }
        }
        self.dtype.visit(With(visitor, self.bytes))
    }

    /// Widens numbers from number `first` on.
    pub(crate) fn widen(self, to: &mut [f32], first: usize) {
        struct Widen<'a>(&'a mut [f32], usize);
        impl UnitVisitor for Widen<'_> {
            type Output = ();
            fn visit<S: Storage>(self, units: &[S]) {
                S::widen(self.0, units, self.1);
            }
        }
        self.visit(Widen(to, first));
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

/// Something to be done with the units of a matrix.
pub(crate) trait UnitVisitor {
    /// What comes of it.
    type Output;

    /// Does it.
    fn visit<S: Storage>(self, units: &[S]) -> Self::Output;
}

/// Numbers as memory of a format, rounded to nearest; whole units.
///
/// # Panics
/// If `to` has not the bytes of so many numbers.
pub(crate) fn encode(dtype: DType, to: &mut [u8], from: &[f32]) {
    struct Encode<'a>(&'a mut [u8], &'a [f32]);
    impl Visitor for Encode<'_> {
        type Output = ();
        fn visit<S: Storage>(self) {
            let to: &mut [S] = bytemuck::cast_slice_mut(self.0);
            assert_eq!(to.len() * S::UNIT, self.1.len(), "numbers of whole units");
            S::narrow(to, self.1);
        }
    }
    dtype.visit(Encode(to, from));
}

/// [`encode`] into memory of its own.
pub(crate) fn encoded(dtype: DType, from: &[f32]) -> Vec<u8> {
    struct Encoded<'a>(&'a [f32]);
    impl Visitor for Encoded<'_> {
        type Output = Vec<u8>;
        fn visit<S: Storage>(self) -> Vec<u8> {
            let mut units = vec![S::zeroed(); self.0.len().div_ceil(S::UNIT)];
            S::narrow(&mut units, self.0);
            bytemuck::cast_slice(&units).to_vec()
        }
    }
    dtype.visit(Encoded(from))
}

/// A window of a matrix whose rows have `stride` numbers: some numbers of some rows.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    pub(crate) stride: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl Window {
    /// Calls `work` with the numbers of the window from its first on, in what engines read, and with how far its rows are apart: where
    /// they lie, or widened into scratch memory.
    pub(crate) fn read<S: Storage, R>(
        &self,
        units: &[S],
        work: impl FnOnce(&[S::Read], usize) -> R,
    ) -> R {
        if let Some(numbers) = S::in_place(units) {
            return work(&numbers[self.first()..], self.stride);
        }
        self.widen(units, |numbers| {
            work(bytemuck::cast_slice(numbers), self.cols.len())
        })
    }

    /// The same with the numbers in f32.
    pub(crate) fn read_f32s<S: Storage, R>(
        &self,
        units: &[S],
        work: impl FnOnce(&[f32], usize) -> R,
    ) -> R {
        if let Some(numbers) = S::as_f32s(units) {
            return work(&numbers[self.first()..], self.stride);
        }
        self.widen(units, |numbers| work(numbers, self.cols.len()))
    }

    /// The first number; zero if there is none.
    pub(crate) fn first(&self) -> usize {
        if self.rows.is_empty() || self.cols.is_empty() {
            return 0;
        }
        self.rows.start * self.stride + self.cols.start
    }

    fn widen<S: Storage, R>(&self, units: &[S], work: impl FnOnce(&[f32]) -> R) -> R {
        let width = self.cols.len();
        with_scratch(self.rows.len() * width, |scratch| {
            for (row, to) in self
                .rows
                .clone()
                .zip(scratch.chunks_exact_mut(width.max(1)))
            {
                S::widen(to, units, row * self.stride + self.cols.start);
            }
            work(scratch)
        })
    }
}

#[cfg(test)]
pub(crate) mod blocks_for_tests {
    //! A format with blocks, as quantized ones have them.

    use super::Storage;

    /// Eight numbers that share a scale.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    pub(crate) struct Block {
        scale: f32,
        numbers: [i8; 8],
    }

    impl Block {
        /// So many numbers, and what they are in f32.
        pub(crate) fn numbers(count: usize) -> (Vec<Self>, Vec<f32>) {
            let numbers: Vec<f32> = (0..count).map(|i| ((i * 37) as f32).sin()).collect();
            let mut units = vec![bytemuck::Zeroable::zeroed(); count / Self::UNIT];
            Self::narrow(&mut units, &numbers);
            let mut wide = vec![0.0; count];
            Self::widen(&mut wide, &units, 0);
            for (wide, number) in wide.iter().zip(&numbers) {
                assert!(
                    (wide - number).abs() <= 1.0 / 127.0,
                    "{wide} is not {number}"
                );
            }
            (units, wide)
        }
    }

    impl Storage for Block {
        const NAME: &'static str = "blocks";
        const UNIT: usize = 8;
        type Read = f32;

        fn widen(to: &mut [f32], from: &[Self], first: usize) {
            for (i, to) in (first..).zip(to) {
                let unit = &from[i / Self::UNIT];
                *to = unit.scale * f32::from(unit.numbers[i % Self::UNIT]);
            }
        }

        fn narrow(to: &mut [Self], from: &[f32]) {
            for (to, from) in to.iter_mut().zip(from.chunks_exact(Self::UNIT)) {
                let largest = from.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
                to.scale = largest / 127.0;
                for (to_number, from) in to.numbers.iter_mut().zip(from) {
                    *to_number = (from / to.scale).round() as i8;
                }
            }
        }

        fn in_place(_: &[Self]) -> Option<&[f32]> {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::blocks_for_tests::Block;
    use super::*;

    #[test]
    fn formats_say_how_they_lie() {
        assert_eq!(DType::F32.bytes_for(6), 24);
        assert_eq!(DType::Bf16.bytes_for(6), 12);
        assert_eq!(DType::Bf16.to_string(), "bf16");
        assert_eq!(DType::F32.to_string(), "f32");
        assert_eq!(ActivationDType::Bf16.to_string(), "bf16");
        assert_eq!(DType::from(ActivationDType::F32), DType::F32);
    }

    #[test]
    fn parts_are_widened_from_anywhere() {
        let numbers = [1.0, -2.5, 3.0, 0.5, 8.0, -16.0];
        for dtype in [DType::F32, DType::Bf16] {
            let mut units = vec![0.0_f32; 6];
            let bytes = &mut bytemuck::cast_slice_mut(&mut units)[..dtype.bytes_for(6)];
            encode(dtype, bytes, &numbers);
            let stored = Numbers::new(dtype, bytes);
            assert_eq!(stored.len(), 6);
            stored.with_f32s(2..5, |part| assert_eq!(part, &numbers[2..5]));
            let mut to = [0.0; 2];
            stored.slice(3..6).widen(&mut to, 1);
            assert_eq!(to, numbers[4..6]);
        }
    }

    /// Of numbers that share a scale, too, a window can begin and end anywhere.
    #[test]
    fn windows_of_blocks_are_widened() {
        let (units, numbers) = Block::numbers(48);
        let window = Window {
            stride: 16,
            rows: 1..3,
            cols: 3..12,
        };
        let expected: Vec<f32> = [1, 2]
            .iter()
            .flat_map(|row| numbers[row * 16 + 3..row * 16 + 12].to_vec())
            .collect();
        window.read(&units, |found, stride| {
            assert_eq!((found, stride), (&expected[..], 9));
        });
        let window_of_f32s = window.read_f32s(&numbers, |found, stride| {
            assert_eq!(stride, 16);
            found[16]
        });
        assert_eq!(window_of_f32s, numbers[16 + 3 + 16]);
    }
}
