//! ggml's storage types: how many values a block has, and how many bytes. What the values are, is not known here.

use std::fmt;

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

/// The types whose values the program reads.
pub const READABLE: [&str; 15] = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ4_NL", "IQ4_XS",
];

impl GgmlType {
    pub(super) fn from_id(id: u32) -> Option<GgmlType> {
        TYPES
            .iter()
            .find(|row| row.id == id)
            .map(|row| GgmlType { row })
    }

    /// The type that ggml calls so.
    pub fn named(name: &str) -> Option<GgmlType> {
        TYPES
            .iter()
            .find(|row| row.name == name)
            .map(|row| GgmlType { row })
    }

    /// Its number in a file.
    pub(super) fn id(self) -> u32 {
        self.row.id
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
        READABLE.contains(&self.row.name)
    }

    /// The types whose values can be read, for messages.
    pub fn readable() -> String {
        READABLE.join(", ")
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
