//! Buffers for temporaries, handed out and taken back.
//!
//! A training step takes and gives the same sizes in the same order, so after the first step every
//! request finds a buffer. Three rules keep the memory small when the sizes change from step to step:
//! a request never takes a buffer more than twice as large as it needs; an idle buffer that is a little too small, as those of a smaller
//! batch are, makes way for a new one; and idle buffers that have gone unused for longest are freed rather than held beside it.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::buffer::Buffer;
use crate::storage::{DType, NumberFormat};
use crate::tensor::Tensor;

/// A request this small may take any buffer up to this size.
const SMALL_BYTES: usize = 64 * 1024;

/// Hands buffers out and takes them back, from any thread.
#[derive(Default)]
pub struct Workspace {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Buffers that nobody holds, the longest unused first, with the number format they were used for.
    idle: Vec<(NumberFormat, Buffer)>,
    /// Bytes of idle buffers.
    idle_bytes: usize,
    /// Bytes of buffers that are handed out.
    held_bytes: usize,
    /// The most that was ever handed out at once.
    peak_bytes: usize,
}

impl Workspace {
    /// A workspace that holds nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// An f32 matrix with unspecified contents.
    ///
    /// It reuses the smallest idle buffer that fits, and allocates if there is none.
    pub fn take(&self, rows: usize, cols: usize) -> Tensor {
        self.take_as(rows, cols, DType::F32)
    }

    /// A matrix of `dtype` with unspecified contents; see [`convert`](crate::convert) for what writes a bf16 one.
    pub fn take_as(&self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let format = NumberFormat::from(dtype);
        let bytes = format.bytes_for(rows * cols);
        let (reused, outgrown) = {
            let mut state = self.lock();
            match state.reuse(format, bytes) {
                Some(buffer) => (Some(buffer), None),
                None => (None, state.outgrown(format, bytes)),
            }
        };
        drop(outgrown);
        // Allocating happens outside the lock: zeroing fresh memory takes a while.
        let buffer = reused.unwrap_or_else(|| {
            let buffer = Buffer::zeroed(bytes);
            self.lock().count_new(buffer.capacity());
            buffer
        });
        Tensor::owned(buffer, format, rows, cols)
    }

    /// Takes a matrix back. Any owned matrix will do; a shared one is dropped.
    pub fn give(&self, tensor: Tensor) {
        let format = tensor.format();
        if let Some(buffer) = tensor.into_buffer() {
            self.lock().give(format, buffer);
        }
    }

    /// Bytes of all buffers, handed out or idle.
    pub fn allocated_bytes(&self) -> usize {
        let state = self.lock();
        state.idle_bytes + state.held_bytes
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic of another thread leaves the counts at worst out of date, never unsound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The smallest idle buffer that fits, of the same number format: a matrix that is kept as bf16 must not sit in the memory of one
    /// in f32.
    fn reuse(&mut self, format: NumberFormat, bytes: usize) -> Option<Buffer> {
        let limit = (2 * bytes).max(SMALL_BYTES);
        let (_, best) = self.sizes(format, bytes..limit + 1).min()?;
        let buffer = self.remove(best);
        self.hold(buffer.capacity());
        Some(buffer)
    }

    /// Gives up the largest idle buffer that is too small, but not by much: whatever it served can be served by the new one.
    fn outgrown(&mut self, format: NumberFormat, bytes: usize) -> Option<Buffer> {
        let (_, largest) = self.sizes(format, bytes * 2 / 3..bytes).max()?;
        Some(self.remove(largest))
    }

    /// Capacities within a range, and places, of idle buffers of a number format.
    fn sizes(
        &self,
        format: NumberFormat,
        range: Range<usize>,
    ) -> impl Iterator<Item = (usize, usize)> {
        (self.idle.iter().enumerate())
            .filter(move |(_, (idle, _))| *idle == format)
            .map(|(i, (_, buffer))| (buffer.capacity(), i))
            .filter(move |(capacity, _)| range.contains(capacity))
    }

    /// Takes an idle buffer out. The others keep the order in which they were given back.
    fn remove(&mut self, index: usize) -> Buffer {
        let (_, buffer) = self.idle.remove(index);
        self.idle_bytes -= buffer.capacity();
        buffer
    }

    fn count_new(&mut self, capacity: usize) {
        self.hold(capacity);
        // An eighth more than the peak leaves room for sizes that alternate within a step.
        let limit = self.peak_bytes + self.peak_bytes / 8;
        while self.held_bytes + self.idle_bytes > limit && !self.idle.is_empty() {
            self.remove(0);
        }
    }

    fn hold(&mut self, capacity: usize) {
        self.held_bytes += capacity;
        self.peak_bytes = self.peak_bytes.max(self.held_bytes);
    }

    fn give(&mut self, format: NumberFormat, buffer: Buffer) {
        // A tensor that was made elsewhere was never counted as held.
        self.held_bytes = self.held_bytes.saturating_sub(buffer.capacity());
        self.idle_bytes += buffer.capacity();
        self.idle.push((format, buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes and gives like a training step with this many tokens.
    fn step(ws: &Workspace, tokens: usize) {
        let mut saved = Vec::new();
        for _ in 0..4 {
            saved.push(ws.take(tokens, 8));
            saved.push(ws.take(tokens, 576));
            let wide = ws.take(tokens, 1536);
            ws.give(ws.take(tokens, 192));
            ws.give(wide);
        }
        while let Some(tensor) = saved.pop() {
            ws.give(ws.take(tokens, 1536));
            ws.give(tensor);
        }
    }

    #[test]
    fn a_second_step_allocates_nothing() {
        let ws = Workspace::new();
        step(&ws, 300);
        let warm = ws.allocated_bytes();
        for _ in 0..3 {
            step(&ws, 300);
            assert_eq!(ws.allocated_bytes(), warm);
        }
        assert_eq!(ws.lock().held_bytes, 0);
    }

    #[test]
    fn steps_of_other_sizes_do_not_pile_up() {
        let ws = Workspace::new();
        step(&ws, 2000);
        let largest = ws.allocated_bytes();
        for tokens in [100, 700, 1300, 300, 2000, 50, 900] {
            step(&ws, tokens);
        }
        assert!(ws.allocated_bytes() <= largest + largest / 8);
    }

    #[test]
    fn a_larger_step_takes_the_place_of_a_smaller_one() {
        let fresh = |tokens| {
            let ws = Workspace::new();
            step(&ws, tokens);
            ws.allocated_bytes()
        };
        let ws = Workspace::new();
        for tokens in [700, 650, 760, 820, 800, 950] {
            step(&ws, tokens);
        }
        assert!(ws.allocated_bytes() <= fresh(950) + fresh(950) / 20);
    }

    #[test]
    fn the_smallest_buffer_that_fits_is_reused() {
        let ws = Workspace::new();
        let (small, large) = (ws.take(100, 400), ws.take(150, 400));
        let start = |tensor: &mut Tensor| tensor.view_mut().into_f32s().as_ptr();
        let (mut small, mut large) = (small, large);
        let (small_start, large_start) = (start(&mut small), start(&mut large));
        ws.give(large);
        ws.give(small);
        assert_eq!(start(&mut ws.take(90, 400)), small_start);
        assert_eq!(start(&mut ws.take(120, 400)), large_start);
    }

    #[test]
    fn a_small_request_leaves_a_large_buffer_alone() {
        let ws = Workspace::new();
        ws.give(ws.take(1000, 1000));
        let _held = ws.take(100, 1000);
        assert!(ws.allocated_bytes() >= 100 * 1000 * 4);
        let before = ws.allocated_bytes();
        ws.give(ws.take(0, 5));
        assert!(ws.allocated_bytes() <= before);
    }
}
