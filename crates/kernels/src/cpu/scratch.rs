//! Scratch memory that each thread keeps, for pieces that fit in its caches.

use std::cell::RefCell;

use crate::buffer::Buffer;

thread_local! {
    static IDLE: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with `len` numbers of unspecified contents.
///
/// Calls nest: each level has a buffer of its own, and finds the same one again next time.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = IDLE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.capacity() < len * size_of::<f32>() {
        buffer = Buffer::zeroed(len * size_of::<f32>());
    }
    let result = work(&mut buffer.as_mut_slice()[..len]);
    IDLE.with_borrow_mut(|idle| idle.push(buffer));
    result
}
