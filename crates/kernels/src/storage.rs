//! Memory that starts at a cache line.

use bytemuck::{Pod, Zeroable};

/// Sixty-four bytes that start at a multiple of sixty-four.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// An owned, zero-initialised run of bytes whose start is aligned to a cache line.
#[derive(Clone, Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// A buffer of at least `bytes` zeros.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        let lines = bytes.div_ceil(size_of::<Line>());
        Self {
            lines: vec![Line::zeroed(); lines],
        }
    }

    /// Bytes that the buffer holds.
    pub(crate) fn capacity(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// The whole buffer as numbers.
    pub(crate) fn as_slice<N: Pod>(&self) -> &[N] {
        bytemuck::cast_slice(&self.lines)
    }

    /// The whole buffer as numbers to write.
    pub(crate) fn as_mut_slice<N: Pod>(&mut self) -> &mut [N] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }
}
