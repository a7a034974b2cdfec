//! Matrices as GPTQ and AWQ store them: numbers of four bits in one tensor, and in others what they are less and what they are multiplied with.
//!
//! A scale and a zero belong to one output and a group of inputs. Here they become blocks of 32 numbers with both, 4.75 bits a number.

use half::f16;
use rayon::prelude::*;

use super::NumberFormat;
use super::blocks::apart::{INT4_LEN, Int4};
use crate::buffer::Buffer;
use crate::tensor::{Tensor, TensorError, check_bytes};

/// Numbers of a word.
const OF_WORD: usize = 8;
/// Outputs whose blocks a task puts together: their words are neighbours.
const TOGETHER: usize = 16;
/// Where AWQ puts a word's outputs.
const AWQ_PLACES: [usize; OF_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

/// How numbers lie in words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitOrder {
    /// A word has eight inputs of an output: [in / 8, out] words. Of zeros it has those of eight outputs.
    Gptq,
    /// A word has eight outputs, those at even places first: [in, out / 8] words (AWQ's "gemm").
    Awq,
}

/// The tensors of a matrix that GPTQ or AWQ quantized to four bits. Number (o, i) is `scale · (q - zero)`, both of the input's group.
#[derive(Clone, Copy, Debug)]
pub struct Grouped<'a> {
    /// Of `qweight` and `qzeros`.
    pub order: FourBitOrder,
    /// `qweight`: words, low byte first.
    pub words: &'a [u8],
    /// `qzeros`: [groups, out / 8] words.
    pub zeros: &'a [u8],
    /// Whether zeros are stored less one, as GPTQ's first format has them.
    pub less_one: bool,
    /// `scales`: [groups, out].
    pub scales: &'a [f32],
    /// `g_idx`: the group of each input.
    pub groups: &'a [usize],
    /// Outputs, the rows of the matrix.
    pub outs: usize,
}

impl Grouped<'_> {
    /// Number (o, i) of the matrix [out, in], exact in f32.
    ///
    /// # Panics
    /// If [`check`](Self::check) refuses the tensors, or there is no such number.
    pub fn number(&self, out: usize, input: usize) -> f32 {
        let (scale, zero) = self.group(out, self.groups[input]);
        scale * (f32::from(self.q(out, input)) - f32::from(zero))
    }

    fn q(&self, out: usize, input: usize) -> u8 {
        let (word, place) = match self.order {
            FourBitOrder::Gptq => (input / OF_WORD * self.outs + out, input % OF_WORD),
            FourBitOrder::Awq => (
                input * (self.outs / OF_WORD) + out / OF_WORD,
                AWQ_PLACES[out % OF_WORD],
            ),
        };
        four_bits(word_of(self.words, word), place)
    }

    /// The scale and the zero of a group.
    fn group(&self, out: usize, group: usize) -> (f32, u8) {
        let word = word_of(
            self.zeros,
            group * self.outs.div_ceil(OF_WORD) + out / OF_WORD,
        );
        let place = match self.order {
            FourBitOrder::Gptq => out % OF_WORD,
            FourBitOrder::Awq => AWQ_PLACES[out % OF_WORD],
        };
        // A zero of 0 was written with a borrow from the next one.
        let word = word.wrapping_add(if self.less_one { 0x1111_1111 } else { 0 });
        (self.scales[group * self.outs + out], four_bits(word, place))
    }

    /// Whether there are as many words, zeros and scales as the shape asks for.
    ///
    /// # Errors
    /// What there should be, and what there is.
    pub fn check(&self) -> Result<(), TensorError> {
        let (rows, cols) = (self.outs, self.groups.len());
        let format = NumberFormat::Int4;
        let too_large = || TensorError::TooLarge { rows, cols, format };
        let (inputs, outs) = match self.order {
            FourBitOrder::Gptq => (cols.div_ceil(OF_WORD), rows),
            FourBitOrder::Awq => (cols, rows.div_ceil(OF_WORD)),
        };
        let words = inputs.checked_mul(outs).ok_or_else(too_large)?;
        let expected = words.checked_mul(4).ok_or_else(too_large)?;
        let found = self.words.len();
        check_bytes((rows, cols), format, expected, found)?;
        let groups = self.groups.iter().max().map_or(0, |last| last + 1);
        let expected = groups.checked_mul(rows).ok_or_else(too_large)?;
        if self.scales.len() < expected {
            let found = self.scales.len();
            return Err(TensorError::Scales { expected, found });
        }
        let zeros = groups.checked_mul(rows.div_ceil(OF_WORD));
        let expected = zeros.ok_or_else(too_large)?;
        let found = self.zeros.len() / 4;
        if found < expected {
            return Err(TensorError::Scales { expected, found });
        }
        Ok(())
    }

    /// Whether there are blocks with the same numbers for these groups of the inputs and these scales.
    pub fn has_blocks(groups: &[usize], scales: &[f32]) -> bool {
        let (runs, rest) = groups.as_chunks::<INT4_LEN>();
        let is_of_one = |run: &[usize; INT4_LEN]| run.iter().all(|group| *group == run[0]);
        let is_half = |scale: &f32| f16::from_f32(*scale).to_f32() == *scale;
        rest.is_empty() && runs.iter().all(is_of_one) && scales.iter().all(is_half)
    }

    /// The matrix [out, in] in blocks with the same numbers; `None` where there are no such blocks, because 32 neighbouring inputs are of
    /// several groups (GPTQ's `desc_act`), or a scale is not one in half precision.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn matrix(&self) -> Result<Option<Tensor>, TensorError> {
        self.check()?;
        if !Self::has_blocks(self.groups, self.scales) {
            return Ok(None);
        }
        let (rows, cols) = (self.outs, self.groups.len());
        let format = NumberFormat::Int4;
        let bytes = format.bytes_for(rows * cols);
        let mut buffer = Buffer::zeroed(bytes);
        let blocks: &mut [Int4] =
            bytemuck::cast_slice_mut(&mut buffer.as_mut_slice::<u8>()[..bytes]);
        let of_row = cols / INT4_LEN;
        if of_row > 0 {
            let tasks = blocks.par_chunks_mut(TOGETHER * of_row).enumerate();
            tasks.for_each(|(task, blocks)| {
                for at in 0..of_row {
                    for (row, blocks) in blocks.chunks_mut(of_row).enumerate() {
                        blocks[at] = self.block(task * TOGETHER + row, at * INT4_LEN);
                    }
                }
            });
        }
        Ok(Some(Tensor::owned(buffer, format, rows, cols)))
    }

    /// The block of an output that begins with an input.
    fn block(&self, out: usize, first: usize) -> Int4 {
        let (scale, z) = self.group(out, self.groups[first]);
        let half = INT4_LEN / 2;
        Int4 {
            d: f16::from_f32(scale).to_le_bytes(),
            z,
            qs: std::array::from_fn(|i| {
                self.q(out, first + i) | self.q(out, first + half + i) << 4
            }),
        }
    }
}

fn word_of(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes.as_chunks().0[at])
}

fn four_bits(word: u32, place: usize) -> u8 {
    (word >> (4 * place) & 15) as u8
}
