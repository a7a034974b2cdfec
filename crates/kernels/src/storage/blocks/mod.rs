//! Formats whose numbers share scales: blocks as llama.cpp lays them out, and four for what bitsandbytes, GPTQ and AWQ store.
//!
//! A block is read in groups of 32 numbers, as bytes that vectors take apart ([`Vectors`]). They become f32 numbers, or, of the formats whose
//! numbers are integers but for their scales ([`IntegerBlock`]), are multiplied as they are. What a number is follows the order of f32
//! operations of llama.cpp's own dequantization, or of bitsandbytes', so that it has its bits.

pub(super) mod apart;
pub(super) mod four_bit;
mod k_quants;
mod lanes;
mod plain;
mod quantize;
mod vectors;

use bytemuck::Pod;

use self::apart::{Int4, Int8};
use self::four_bit::{Fp4, Nf4};
use self::k_quants::{Iq4Xs, Q2K, Q3K, Q4K, Q5K, Q6K};
use self::plain::{Iq4Nl, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use self::quantize::Quantize;
use self::vectors::with_vectors;
pub(crate) use self::vectors::{OneByOne, Vectors};
use super::{NumberFormat, Unit, Window};

/// Numbers of a format's smallest part with a scale of its own.
pub(crate) const RUN: usize = 16;

/// Numbers that are widened or multiplied at once: a group.
pub(crate) const GROUP: usize = 2 * RUN;

/// A block of numbers.
pub(crate) trait Block: Pod + Sync {
    /// As messages and files write it.
    const NAME: &'static str;
    /// Numbers of a block, a multiple of [`GROUP`].
    const LEN: usize;
}

/// A block that can be widened.
pub(crate) trait Widen: Block {
    /// Writes the numbers of as many groups, from group `first` on.
    fn widen(&self, to: &mut [[f32; GROUP]], first: usize, vectors: impl Vectors);
}

/// A block whose numbers are integers but for their scales.
pub(crate) trait IntegerBlock: Block {
    /// Whether the integers are from -127 on. Otherwise they are below 128.
    const SIGNED: bool;
    /// Whether either half of a group has a scale of its own.
    const HALVES: bool = false;
    /// Whether a number is more than its integer times something.
    const HAS_OFFSET: bool;
    /// The scales of a block.
    type Scales: Copy;

    fn scales(&self, vectors: impl Vectors) -> Self::Scales;

    /// Of either half of a group.
    fn scale(scales: &Self::Scales, group: usize) -> [Scale; 2];

    /// The integers of a group.
    fn integers<V: Vectors>(&self, group: usize, vectors: V) -> V::Bytes;
}

/// What makes a number of an integer.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    /// The integer that stands for zero, but for the minimum.
    pub(crate) zero: f32,
    pub(crate) d: f32,
    /// Another factor, which is multiplied with after the first.
    pub(crate) step: f32,
    pub(crate) min: f32,
}

impl Scale {
    /// One that only multiplies.
    #[inline(always)]
    fn factor(d: f32) -> Self {
        Self {
            zero: 0.0,
            d,
            step: 1.0,
            min: 0.0,
        }
    }

    /// The number of an integer.
    #[inline(always)]
    fn of(self, q: f32) -> f32 {
        (q - self.zero) * self.d * self.step - self.min
    }

    /// The factor of the integer, and what is added to it then: the same number, rounded otherwise.
    #[inline(always)]
    pub(crate) fn linear(self) -> (f32, f32) {
        let factor = self.d * self.step;
        (factor, -(self.zero * factor) - self.min)
    }
}

impl<B: IntegerBlock> Widen for B {
    #[inline(always)]
    fn widen(&self, to: &mut [[f32; GROUP]], first: usize, vectors: impl Vectors) {
        let scales = self.scales(vectors);
        for (i, to) in to.iter_mut().enumerate() {
            let q = self.integers(first + i, vectors);
            let scales = B::scale(&scales, first + i);
            if B::SIGNED {
                vectors.widen::<true>(to, q, scales);
            } else {
                vectors.widen::<false>(to, q, scales);
            }
        }
    }
}

/// Something to be done with the type of a format's blocks.
pub(super) trait TypeVisitor {
    /// What comes of it.
    type Output;

    /// Does it.
    fn visit<B: Widen>(self) -> Self::Output;
}

/// The same for blocks of integers.
pub(super) trait IntegerVisitor {
    /// What comes of it.
    type Output;

    /// Does it.
    fn visit<B: IntegerBlock>(self) -> Self::Output;
}

/// Calls a visitor with the type of a format's blocks: this and [`visit_integers`] are where the name of a format becomes its type.
///
/// # Panics
/// If it is a format of single numbers.
#[inline]
pub(super) fn visit<V: TypeVisitor>(format: NumberFormat, visitor: V) -> V::Output {
    struct Any<V>(V);
    impl<V: TypeVisitor> IntegerVisitor for Any<V> {
        type Output = V::Output;
        fn visit<B: IntegerBlock>(self) -> V::Output {
            self.0.visit::<B>()
        }
    }
    match format {
        NumberFormat::Nf4 => visitor.visit::<Nf4>(),
        NumberFormat::Fp4 => visitor.visit::<Fp4>(),
        integers => visit_integers(integers, Any(visitor)),
    }
}

/// Calls a visitor with the type of a format's blocks.
///
/// # Panics
/// If its numbers are no integers.
#[inline]
pub(super) fn visit_integers<V: IntegerVisitor>(format: NumberFormat, visitor: V) -> V::Output {
    match format {
        NumberFormat::F32
        | NumberFormat::Bf16
        | NumberFormat::F16
        | NumberFormat::Nf4
        | NumberFormat::Fp4 => panic!("{format} has no blocks of integers"),
        NumberFormat::Q4_0 => visitor.visit::<Q4_0>(),
        NumberFormat::Q4_1 => visitor.visit::<Q4_1>(),
        NumberFormat::Q5_0 => visitor.visit::<Q5_0>(),
        NumberFormat::Q5_1 => visitor.visit::<Q5_1>(),
        NumberFormat::Q8_0 => visitor.visit::<Q8_0>(),
        NumberFormat::Q2K => visitor.visit::<Q2K>(),
        NumberFormat::Q3K => visitor.visit::<Q3K>(),
        NumberFormat::Q4K => visitor.visit::<Q4K>(),
        NumberFormat::Q5K => visitor.visit::<Q5K>(),
        NumberFormat::Q6K => visitor.visit::<Q6K>(),
        NumberFormat::Iq4Nl => visitor.visit::<Iq4Nl>(),
        NumberFormat::Iq4Xs => visitor.visit::<Iq4Xs>(),
        NumberFormat::Int8 => visitor.visit::<Int8>(),
        NumberFormat::Int4 => visitor.visit::<Int4>(),
    }
}

/// Appends blocks of a number format.
pub(super) type Quantizer = fn(&[f32], &mut Vec<u8>) -> Result<(), usize>;

/// What makes blocks of whole blocks of finite numbers, if there is such a thing for the format. It fails with the number of a block whose
/// scale would not be finite.
pub(super) fn quantizer(format: NumberFormat) -> Option<Quantizer> {
    match format {
        NumberFormat::Q4_0 => Some(quantize::<Q4_0>),
        NumberFormat::Q4_1 => Some(quantize::<Q4_1>),
        NumberFormat::Q5_0 => Some(quantize::<Q5_0>),
        NumberFormat::Q5_1 => Some(quantize::<Q5_1>),
        NumberFormat::Q8_0 => Some(quantize::<Q8_0>),
        NumberFormat::Q4K => Some(quantize::<Q4K>),
        NumberFormat::Q5K => Some(quantize::<Q5K>),
        NumberFormat::Q6K => Some(quantize::<Q6K>),
        NumberFormat::Nf4 => Some(quantize::<Nf4>),
        NumberFormat::Fp4 => Some(quantize::<Fp4>),
        _ => None,
    }
}

fn quantize<B: Quantize>(numbers: &[f32], to: &mut Vec<u8>) -> Result<(), usize> {
    for (i, numbers) in numbers.chunks_exact(B::LEN).enumerate() {
        let block = B::quantized(numbers).ok_or(i)?;
        to.extend_from_slice(bytemuck::bytes_of(&block));
    }
    Ok(())
}

/// What the rest of the program knows of a format.
#[derive(Clone, Copy)]
pub(super) struct BlockFormat {
    unit: Unit,
    widen: fn(&mut [f32], &[u8], &Window),
}

impl BlockFormat {
    /// Of a format.
    ///
    /// # Panics
    /// If it is one of single numbers.
    pub(super) fn of(format: NumberFormat) -> Self {
        struct Of;
        impl TypeVisitor for Of {
            type Output = BlockFormat;
            fn visit<B: Widen>(self) -> BlockFormat {
                BlockFormat::with::<B>()
            }
        }
        visit(format, Of)
    }

    fn with<B: Widen>() -> Self {
        const {
            assert!(align_of::<B>() == 1 && B::LEN.is_multiple_of(GROUP));
        }
        Self {
            unit: Unit {
                name: B::NAME,
                numbers: B::LEN,
                bytes: size_of::<B>(),
                align: 1,
            },
            widen: widen::<B>,
        }
    }

    pub(super) fn unit(self) -> Unit {
        self.unit
    }

    /// Widens the numbers of a window, whose rows come one behind the other then.
    pub(super) fn widen(self, to: &mut [f32], from: &[u8], window: &Window) {
        (self.widen)(to, from, window);
    }
}

fn widen<B: Widen>(to: &mut [f32], from: &[u8], window: &Window) {
    let blocks: &[B] = bytemuck::cast_slice(from);
    with_vectors(WidenWindow { to, blocks, window });
}

/// A window to be widened.
struct WidenWindow<'a, B> {
    to: &'a mut [f32],
    blocks: &'a [B],
    window: &'a Window,
}

impl<B: Widen> vectors::Work for WidenWindow<'_, B> {
    #[inline(always)]
    fn with(self, vectors: impl Vectors) {
        let Window { stride, rows, cols } = self.window;
        let lines = self.to.chunks_exact_mut(cols.len().max(1));
        for (row, mut to) in rows.clone().zip(lines) {
            let mut first = row * stride + cols.start;
            while !to.is_empty() {
                let (block, within) = (&self.blocks[first / B::LEN], first % B::LEN);
                let begun = within % GROUP;
                let left = to.len().min(B::LEN - within);
                // Whole groups go where they belong; of any other, a part comes from aside.
                let whole = if begun == 0 { left / GROUP } else { 0 };
                let mut aside = [[0.0; GROUP]];
                let groups = if whole > 0 {
                    &mut to.as_chunks_mut().0[..whole]
                } else {
                    &mut aside
                };
                block.widen(groups, within / GROUP, vectors);
                let count = if whole > 0 {
                    whole * GROUP
                } else {
                    let count = left.min(GROUP - begun);
                    to[..count].copy_from_slice(&aside[0][begun..begun + count]);
                    count
                };
                (to, first) = (&mut to[count..], first + count);
            }
        }
    }
}

/// 16 neighbouring bytes.
#[inline(always)]
fn sixteen(bytes: &[u8], index: usize) -> &[u8; RUN] {
    &bytes.as_chunks().0[index]
}

/// 32 neighbouring bytes.
#[inline(always)]
fn thirty_two(bytes: &[u8], index: usize) -> &[u8; GROUP] {
    &bytes.as_chunks().0[index]
}

#[cfg(test)]
pub(crate) mod for_tests {
    use crate::storage::NumberFormat;
    use crate::tensor::Tensor;

    /// A matrix of any format with numbers that look random, and the same matrix in f32.
    pub(crate) fn matrix_of(format: NumberFormat, rows: usize, cols: usize) -> [Tensor; 2] {
        let mut state = 12345_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let mut bytes: Vec<u8> = (0..format.bytes_for(rows * cols)).map(|_| next()).collect();
        // Where the exponents of floats lie in a number, or in a block.
        let high = match format {
            NumberFormat::F32 | NumberFormat::Nf4 | NumberFormat::Fp4 | NumberFormat::Int8 => {
                Some(3)
            }
            NumberFormat::Bf16 => Some(1),
            _ => None,
        };
        if let Some(high) = high {
            // Exponents of numbers that are neither tiny nor huge.
            bytes
                .chunks_exact_mut(format.bytes_for(1))
                .for_each(|unit| unit[high] = 0x3f | unit[high] & 0x80);
        }
        // Wherever a scale in half precision lies, it is not infinite.
        for byte in &mut bytes {
            if *byte & 0x7c == 0x7c {
                *byte &= 0xbf;
            }
        }
        let stored = Tensor::from_le_bytes(&bytes, format, rows, cols).unwrap();
        let wide = Tensor::from_f32(rows, cols, stored.to_vec());
        assert!(wide.to_vec().iter().all(|x| x.is_finite()), "{format}");
        [stored, wide]
    }
}

#[cfg(test)]
mod tests {
    use super::for_tests::matrix_of;
    use crate::cpu::engine::{Engine, engines, with_engine};
    use crate::storage::{NumberFormat, Window};

    #[test]
    fn every_engine_widens_to_the_same_bits() {
        for format in NumberFormat::ALL {
            let widened = |engine| {
                with_engine(engine, || {
                    let [_, wide] = matrix_of(format, 3, 512);
                    wide.to_vec()
                        .into_iter()
                        .map(f32::to_bits)
                        .collect::<Vec<_>>()
                })
            };
            let expected = widened(Engine::Portable);
            for engine in engines() {
                assert!(widened(engine) == expected, "{format}, {engine:?}");
            }
        }
    }

    #[test]
    fn parts_of_blocks_are_those_of_the_whole() {
        for format in NumberFormat::ALL {
            let [stored, wide] = matrix_of(format, 2, 512);
            let (numbers, all) = (stored.view().numbers(), wide.to_vec());
            for (first, count) in [
                (0, 1),
                (5, 7),
                (15, 2),
                (16, 16),
                (17, 40),
                (31, 993),
                (1023, 1),
            ] {
                let mut part = vec![0.0; count];
                numbers.widen(&mut part, first);
                assert_eq!(part, all[first..first + count], "{format} {first} {count}");
            }
        }
    }

    #[test]
    fn windows_are_widened() {
        for format in NumberFormat::ALL {
            let [stored, wide] = matrix_of(format, 4, 256);
            let window = Window {
                stride: 256,
                rows: 1..3,
                cols: 3..92,
            };
            let all = wide.to_vec();
            window.read_f32s(stored.view().numbers(), |found, stride| {
                for (i, row) in (1..3).enumerate() {
                    assert_eq!(
                        found[i * stride..][..89],
                        all[row * 256 + 3..][..89],
                        "{format}"
                    );
                }
            });
        }
    }
}
