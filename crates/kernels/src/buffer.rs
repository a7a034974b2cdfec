//! Memory that starts at a cache line.

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

/// Buffers from this size on are pages of their own: zeros that cost nothing until they are touched, go back to the system when they
/// are dropped, where an allocator keeps what lies between others, and are huge pages where the system has them. A product
/// reads rows that lie kilobytes apart, and a processor remembers the places of few small pages.
const MAPPED_BYTES: usize = 128 * 1024;

/// Sixty-four bytes that start at a multiple of sixty-four.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// An owned, zero-initialised run of bytes whose start is aligned to a cache line.
pub(crate) struct Buffer {
    memory: Memory,
}

enum Memory {
    Lines(Vec<Line>),
    Pages(MmapMut),
}

impl Default for Buffer {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.capacity());
        copy.as_mut_slice::<u8>()
            .copy_from_slice(self.as_slice::<u8>());
        copy
    }
}

impl Buffer {
    /// A buffer of at least `bytes` zeros.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(size_of::<Line>());
        let pages = (bytes >= MAPPED_BYTES).then(|| pages(bytes)).flatten();
        let memory = pages.map_or_else(
            || Memory::Lines(vec![Line::zeroed(); bytes / size_of::<Line>()]),
            Memory::Pages,
        );
        Self { memory }
    }

    /// Bytes that the buffer holds.
    pub(crate) fn capacity(&self) -> usize {
        match &self.memory {
            Memory::Lines(lines) => size_of_val(&lines[..]),
            Memory::Pages(pages) => pages.len(),
        }
    }

    /// The whole buffer as numbers.
    pub(crate) fn as_slice<N: Pod>(&self) -> &[N] {
        match &self.memory {
            Memory::Lines(lines) => bytemuck::cast_slice(lines),
            Memory::Pages(pages) => bytemuck::cast_slice(pages),
        }
    }

    /// The whole buffer as numbers to write.
    pub(crate) fn as_mut_slice<N: Pod>(&mut self) -> &mut [N] {
        match &mut self.memory {
            Memory::Lines(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Pages(pages) => bytemuck::cast_slice_mut(pages),
        }
    }
}

/// Fresh pages; `None` where the system refuses, and the allocator then decides what that means.
fn pages(bytes: usize) -> Option<MmapMut> {
    let pages = MmapMut::map_anon(bytes).ok()?;
    #[cfg(target_os = "linux")]
    let _ = pages.advise(memmap2::Advice::HugePage); // a system without them answers with an error
    Some(pages)
}

/// Gives memory that was freed back to the system: what a dropped tokenizer leaves behind lies in
/// pieces between what is still in use, and an allocator keeps that.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "a call of the C library")]
pub fn release_freed_memory() {
    // SAFETY: the function takes no pointers, and changes nothing that is allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Gives memory that was freed back to the system, where there is a way to ask for it.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn release_freed_memory() {}
