//! The numbers of blocks, one by one, from where each format puts the parts of a number.

use half::{bf16, f16};

use crate::storage::{FP4_VALUES, INT8_STEP, NF4_VALUES, NumberFormat};

/// The numbers of a matrix in any format, to the bit; of a last block that is not whole, none.
pub fn widened(format: NumberFormat, bytes: &[u8]) -> Vec<f32> {
    let block = format.bytes_for(1);
    bytes
        .chunks_exact(block)
        .flat_map(|block| (0..format.block_len()).map(|i| number(format, block, i)))
        .collect()
}

fn number(format: NumberFormat, b: &[u8], i: usize) -> f32 {
    match format {
        NumberFormat::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        NumberFormat::Bf16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        NumberFormat::F16 => half(b),
        NumberFormat::Q4_0 => half(b) * (bits(b[2 + i % 16], i / 16 * 4, 4) - 8.0),
        NumberFormat::Q4_1 => half(b) * bits(b[4 + i % 16], i / 16 * 4, 4) + half(&b[2..]),
        NumberFormat::Q5_0 => half(b) * (five(&b[2..], i) - 16.0),
        NumberFormat::Q5_1 => half(b) * five(&b[4..], i) + half(&b[2..]),
        NumberFormat::Q8_0 => f32::from(b[2 + i].cast_signed()) * half(b),
        NumberFormat::Q2K => {
            let scale = half(&b[80..]) * bits(b[i / 16], 0, 4);
            scale * two(&b[16..], i) - half(&b[82..]) * bits(b[i / 16], 4, 4)
        }
        NumberFormat::Q3K => {
            let (scales, run) = (&b[96..], i / 16);
            let low = bits(scales[run % 8], run / 8 * 4, 4);
            let high = bits(scales[8 + run % 4], run / 4 * 2, 2);
            let missing = 4.0 - 4.0 * bits(b[i % 32], i / 32, 1);
            half(&b[108..]) * (low + 16.0 * high - 32.0) * (two(&b[32..], i) - missing)
        }
        NumberFormat::Q4K => with_minimum(b, i, four(&b[16..], i)),
        NumberFormat::Q5K => {
            let fifth = bits(b[16 + i % 32], i / 32, 1);
            with_minimum(b, i, four(&b[48..], i) + 16.0 * fifth)
        }
        NumberFormat::Q6K => {
            let low = bits(b[i / 128 * 64 + i % 64], i % 128 / 64 * 4, 4);
            let scale = f32::from(b[192 + i / 16].cast_signed());
            half(&b[208..]) * scale * (low + 16.0 * two(&b[128..], i) - 32.0)
        }
        NumberFormat::Iq4Nl => half(b) * of_sixteen(b[2 + i % 16], i / 16),
        NumberFormat::Iq4Xs => {
            let part = i / 32;
            let low = bits(b[4 + part / 2], part % 2 * 4, 4);
            let high = bits(b[2 + part / 4], part % 4 * 2, 2);
            let scale = half(b) * (low + 16.0 * high - 32.0);
            scale * of_sixteen(b[8 + part * 16 + i % 16], i % 32 / 16)
        }
        NumberFormat::Nf4 => of_four_bit(&NF4_VALUES, b, i),
        NumberFormat::Fp4 => of_four_bit(&FP4_VALUES, b, i),
        NumberFormat::Int8 => {
            let largest = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            f32::from(b[4 + i].cast_signed()) * largest * INT8_STEP
        }
        NumberFormat::Int4 => half(b) * (bits(b[3 + i % 16], i / 16 * 4, 4) - f32::from(b[2])),
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Some bits of a byte, from its low end.
fn bits(byte: u8, from: usize, count: u32) -> f32 {
    f32::from(byte >> from & ((1 << count) - 1))
}

/// Number `i` of 256 with two bits each: of 128 numbers in 32 bytes, 32 take the same bits.
fn two(bytes: &[u8], i: usize) -> f32 {
    bits(bytes[i / 128 * 32 + i % 32], i % 128 / 32 * 2, 2)
}

/// Number `i` of 256 with four bits each: of 64 numbers in 32 bytes, 32 take the low bits.
fn four(bytes: &[u8], i: usize) -> f32 {
    bits(bytes[i / 64 * 32 + i % 32], i / 32 % 2 * 4, 4)
}

/// Number `i` of 32, whose fifth bits stand before all others.
fn five(bytes: &[u8], i: usize) -> f32 {
    bits(bytes[4 + i % 16], i / 16 * 4, 4) + 16.0 * bits(bytes[i / 8], i % 8, 1)
}

/// A number of Q4_K or Q5_K, with a scale and a minimum of six bits for each 32.
fn with_minimum(b: &[u8], i: usize, q: f32) -> f32 {
    let (packed, part) = (&b[4..16], i / 32);
    let [scale, min] = if part < 4 {
        [packed[part], packed[part + 4]].map(|byte| bits(byte, 0, 6))
    } else {
        [(0, part - 4), (4, part)]
            .map(|(shift, high)| bits(packed[part + 4], shift, 4) + 16.0 * bits(packed[high], 6, 2))
    };
    half(b) * scale * q - half(&b[2..]) * min
}

/// A value of IQ4_NL.
fn of_sixteen(byte: u8, part: usize) -> f32 {
    [
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0,
        69.0, 89.0, 113.0,
    ][usize::from(byte >> (4 * part) & 15)]
}

/// A number of NF4 or FP4: its block's scale stands before all places, of which 32 take 16 bytes.
fn of_four_bit(values: &[f32; 16], b: &[u8], i: usize) -> f32 {
    let place = b[4 + i / 32 * 16 + i % 16] >> (i / 16 % 2 * 4) & 15;
    values[usize::from(place)] * f32::from_le_bytes([b[0], b[1], b[2], b[3]])
}
