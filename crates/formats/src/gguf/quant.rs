//! ggml's storage types, and the way back from blocks to f32.
//!
//! A row is cut into blocks of 32 or 256 values that share one or more scales (f16). Every decoder follows the order of
//! f32 operations of llama.cpp's reference, so its values are bit for bit those of the `gguf` Python package.

use std::fmt;

use half::{bf16, f16};

/// How a tensor's values are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GgmlType {
    row: &'static Row,
}

#[derive(PartialEq, Eq, Hash)]
struct Row {
    id: u32,
    name: &'static str,
    /// Values a block.
    len: usize,
    /// Bytes a block.
    bytes: usize,
}

const fn row(id: u32, name: &'static str, len: usize, bytes: usize) -> Row {
    Row {
        id,
        name,
        len,
        bytes,
    }
}

static TYPES: [Row; 34] = [
    row(0, "F32", 1, 4),
    row(1, "F16", 1, 2),
    row(2, "Q4_0", 32, 18),
    row(3, "Q4_1", 32, 20),
    row(6, "Q5_0", 32, 22),
    row(7, "Q5_1", 32, 24),
    row(8, "Q8_0", 32, 34),
    row(9, "Q8_1", 32, 40),
    row(10, "Q2_K", 256, 84),
    row(11, "Q3_K", 256, 110),
    row(12, "Q4_K", 256, 144),
    row(13, "Q5_K", 256, 176),
    row(14, "Q6_K", 256, 210),
    row(15, "Q8_K", 256, 292),
    row(16, "IQ2_XXS", 256, 66),
    row(17, "IQ2_XS", 256, 74),
    row(18, "IQ3_XXS", 256, 98),
    row(19, "IQ1_S", 256, 50),
    row(20, "IQ4_NL", 32, 18),
    row(21, "IQ3_S", 256, 110),
    row(22, "IQ2_S", 256, 82),
    row(23, "IQ4_XS", 256, 136),
    row(24, "I8", 1, 1),
    row(25, "I16", 1, 2),
    row(26, "I32", 1, 4),
    row(27, "I64", 1, 8),
    row(28, "F64", 1, 8),
    row(29, "IQ1_M", 256, 56),
    row(30, "BF16", 1, 2),
    row(34, "TQ1_0", 256, 54),
    row(35, "TQ2_0", 256, 66),
    row(39, "MXFP4", 32, 17),
    row(40, "NVFP4", 64, 36),
    row(41, "Q1_0", 128, 18),
];

/// Blocks to values; both slices are whole blocks and of matching length.
pub(super) type Decoder = fn(&[u8], &mut [f32]);

impl GgmlType {
    pub(super) fn from_id(id: u32) -> Option<GgmlType> {
        TYPES
            .iter()
            .find(|row| row.id == id)
            .map(|row| GgmlType { row })
    }

    /// The name that ggml gives it: `F16`, `Q4_K`, …
    pub fn name(self) -> &'static str {
        self.row.name
    }

    /// Values a block.
    pub fn block_len(self) -> usize {
        self.row.len
    }

    /// Bytes a block.
    pub fn block_bytes(self) -> usize {
        self.row.bytes
    }

    /// Whether the values can be read.
    pub fn is_readable(self) -> bool {
        self.decoder().is_some()
    }

    /// The types whose values can be read, for messages.
    pub fn readable() -> String {
        let names: Vec<_> = TYPES
            .iter()
            .filter(|row| GgmlType { row }.is_readable())
            .map(|row| row.name)
            .collect();
        names.join(", ")
    }

    /// Bytes of a tensor; `None` where that overflows or the last dimension is not whole blocks.
    pub(super) fn byte_len(self, shape: &[usize]) -> Option<u64> {
        let columns = shape.last().copied().unwrap_or(1);
        if !columns.is_multiple_of(self.row.len) {
            return None;
        }
        // The number of values must fit too: a caller will ask for that many.
        let values = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        values.checked_mul(4)?;
        (values as u64 / self.row.len as u64).checked_mul(self.row.bytes as u64)
    }

    pub(super) fn decoder(self) -> Option<Decoder> {
        Some(match self.row.name {
            "F32" => |bytes, out| plain(bytes, out, f32::from_le_bytes),
            "F16" => |bytes, out| plain(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            "BF16" => |bytes, out| plain(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            "Q4_0" => |bytes, out| blocks::<18, 32>(bytes, out, q4_0),
            "Q4_1" => |bytes, out| blocks::<20, 32>(bytes, out, q4_1),
            "Q5_0" => |bytes, out| blocks::<22, 32>(bytes, out, q5_0),
            "Q5_1" => |bytes, out| blocks::<24, 32>(bytes, out, q5_1),
            "Q8_0" => |bytes, out| blocks::<34, 32>(bytes, out, q8_0),
            "Q4_K" => |bytes, out| blocks::<144, 256>(bytes, out, q4_k),
            "Q5_K" => |bytes, out| blocks::<176, 256>(bytes, out, q5_k),
            "Q6_K" => |bytes, out| blocks::<210, 256>(bytes, out, q6_k),
            _ => return None,
        })
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn plain<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = value(bytes);
    }
}

fn blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in bytes
        .as_chunks::<BYTES>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<LEN>().0)
    {
        decode(block, out);
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 4-bit value `i` of 32: the first sixteen are the low halves of sixteen bytes.
fn nibble(qs: &[u8], i: usize) -> u8 {
    if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 }
}

/// d (f16), qs (16 bytes): d·(q - 8).
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * (f32::from(nibble(&block[2..], i)) - 8.0);
    }
}

/// d, m (f16), qs (16 bytes): d·q + m.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * f32::from(nibble(&block[4..], i)) + m;
    }
}

/// 5-bit value `i` of 32: the fifth bits are a u32.
fn five_bits(qh: &[u8], qs: &[u8], i: usize) -> u8 {
    nibble(qs, i) | ((qh[i / 8] >> (i % 8)) & 1) << 4
}

/// d (f16), qh (4 bytes), qs (16 bytes): d·(q - 16).
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * (f32::from(five_bits(&block[2..6], &block[6..], i)) - 16.0);
    }
}

/// d, m (f16), qh (4 bytes), qs (16 bytes): d·q + m.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * f32::from(five_bits(&block[4..8], &block[8..], i)) + m;
    }
}

/// d (f16), 32 signed bytes: d·q.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q.cast_signed()) * d;
    }
}

/// Scale and minimum of sub-block `j` of eight, six bits each in twelve bytes: four low parts of scales, four of
/// minima, whose top two bits complete the last four pairs.
fn scale_min(scales: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let (low, high) = (j - 4, scales[j + 4]);
        (
            (high & 15) | (scales[low] >> 6) << 4,
            (high >> 4) | (scales[low + 4] >> 6) << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin (f16), scales (12 bytes), qs (128 bytes): eight sub-blocks of 32, d·scale·q - dmin·min.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let (scales, qs) = block[4..].split_at(12);
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (scale, min) = (d * scale, dmin * min);
        let qs = &qs[j / 2 * 32..];
        for (l, out) in out.iter_mut().enumerate() {
            *out = scale * f32::from((qs[l] >> (j % 2 * 4)) & 15) - min;
        }
    }
}

/// d, dmin (f16), scales (12 bytes), qh (32 bytes), qs (128 bytes): as Q4_K with a fifth bit.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let (scales, rest) = block[4..].split_at(12);
    let (qh, qs) = rest.split_at(32);
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (scale, min) = (d * scale, dmin * min);
        let qs = &qs[j / 2 * 32..];
        for (l, out) in out.iter_mut().enumerate() {
            let q = ((qs[l] >> (j % 2 * 4)) & 15) | ((qh[l] >> j) & 1) << 4;
            *out = scale * f32::from(q) - min;
        }
    }
}

/// ql (128 bytes), qh (64 bytes), scales (16 signed bytes), d (f16): sixteen sub-blocks of 16, d·scale·(q - 32).
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (ql, rest) = block.split_at(128);
    let (qh, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    let d = half(d, 0);
    for (i, out) in out.iter_mut().enumerate() {
        // Each half of 128 values takes 64 bytes of ql and 32 of qh; in it, runs of 32 take the four pairs of
        // (low or high nibble, first or second 32 bytes) and the four bit pairs of qh in turn.
        let (part, run, l) = (i / 128, i / 32 % 4, i % 32);
        let low = (ql[part * 64 + run % 2 * 32 + l] >> (run / 2 * 4)) & 15;
        let high = (qh[part * 32 + l] >> (run * 2)) & 3;
        let scale = d * f32::from(scales[i / 16].cast_signed());
        *out = scale * (f32::from(low | high << 4) - 32.0);
    }
}
