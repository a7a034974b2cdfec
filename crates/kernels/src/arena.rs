//! One flat buffer cut into matrices: all parameters of a method, all gradients, or all of one
//! moment of the optimizer.
//!
//! Because it is flat, an optimizer step, a norm, a finite check or an all-reduce is one pass over
//! one vector.

use std::ops::Range;
use std::sync::OnceLock;

use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

#[derive(Clone, Copy, Debug)]
struct Slot {
    start: usize,
    rows: usize,
    cols: usize,
    /// Whether its values are held elsewhere: it has a shape and no elements.
    is_absent: bool,
}

impl Slot {
    fn range(self) -> Range<usize> {
        let len = if self.is_absent {
            0
        } else {
            self.rows * self.cols
        };
        self.start..self.start + len
    }
}

/// A flat f32 buffer, zero at first, whose slots are matrices that lie one after the other.
///
/// The buffer is allocated when an element is first asked for, so that what only reads shapes, as planning does, takes no
/// memory.
#[derive(Clone, Debug)]
pub struct Arena {
    values: OnceLock<Tensor>,
    len: usize,
    slots: Vec<Slot>,
}

impl Arena {
    /// An arena of zeros with a slot for each (rows, cols).
    pub fn new(shapes: &[(usize, usize)]) -> Self {
        Self::holding(shapes, |_| true)
    }

    /// The same where another process has some of the slots: these have a shape and no elements, and are neither read nor
    /// written.
    pub fn holding(shapes: &[(usize, usize)], is_held: impl Fn(usize) -> bool) -> Self {
        let mut start = 0;
        let slots = shapes
            .iter()
            .enumerate()
            .map(|(slot, &(rows, cols))| {
                let is_absent = !is_held(slot);
                let slot = Slot {
                    start,
                    rows,
                    cols,
                    is_absent,
                };
                start = slot.range().end;
                slot
            })
            .collect();
        Self {
            values: OnceLock::new(),
            len: start,
            slots,
        }
    }

    /// The same slots without those that are not held.
    #[must_use]
    pub fn cut(&self, is_held: impl Fn(usize) -> bool) -> Self {
        let shapes: Vec<_> = (0..self.slots()).map(|slot| self.shape(slot)).collect();
        let mut cut = Self::holding(&shapes, is_held);
        for slot in 0..self.slots() {
            if cut.is_held(slot) {
                cut.view_mut(slot).copy_from(self.view(slot));
            }
        }
        cut
    }

    /// Whether a slot's elements are here.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn is_held(&self, slot: usize) -> bool {
        !self.slots[slot].is_absent
    }

    /// Adds slots of zeros behind the others, whose values stay. Values that nobody asked for yet are still not there.
    pub fn extend(&mut self, shapes: &[(usize, usize)]) {
        let old = self.len;
        for &(rows, cols) in shapes {
            let start = self.len;
            self.slots.push(Slot {
                start,
                rows,
                cols,
                is_absent: false,
            });
            self.len += rows * cols;
        }
        if let Some(values) = self.values.take() {
            let mut longer = Tensor::zeros(1, self.len);
            longer.view_mut().into_f32s()[..old].copy_from_slice(values.view().f32s());
            self.values = OnceLock::from(longer);
        }
    }

    /// An arena of zeros with the same slots.
    #[must_use]
    pub fn zeros_like(&self) -> Self {
        Self {
            values: OnceLock::new(),
            len: self.len,
            slots: self.slots.clone(),
        }
    }

    fn values(&self) -> &Tensor {
        self.values.get_or_init(|| Tensor::zeros(1, self.len))
    }

    fn values_mut(&mut self) -> &mut Tensor {
        let len = self.len;
        let values = &mut self.values;
        values.get_or_init(|| Tensor::zeros(1, len));
        values
            .get_mut()
            .unwrap_or_else(|| unreachable!("the buffer was just made"))
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Number of elements of all slots that are held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Rows and columns of a slot.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn shape(&self, slot: usize) -> (usize, usize) {
        let slot = self.slots[slot];
        (slot.rows, slot.cols)
    }

    /// A slot to read.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn view(&self, slot: usize) -> View<'_> {
        let slot = self.slots[slot];
        let values = &self.values().view().f32s()[slot.range()];
        View::from_slice(values, slot.rows, slot.cols)
    }

    /// A slot to write.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn view_mut(&mut self, slot: usize) -> ViewMut<'_> {
        let slot = self.slots[slot];
        let values = &mut self.values_mut().view_mut().into_f32s()[slot.range()];
        ViewMut::new(values, slot.rows, slot.cols)
    }

    /// Two slots to write at once, in the order asked for.
    ///
    /// # Panics
    /// If there is no such slot, or if both are the same.
    pub fn pair_mut(&mut self, first: usize, second: usize) -> (ViewMut<'_>, ViewMut<'_>) {
        assert_ne!(first, second, "a slot cannot be borrowed twice");
        let lower = self.slots[first.min(second)];
        let upper = self.slots[first.max(second)];
        let (head, tail) = self
            .values_mut()
            .view_mut()
            .into_f32s()
            .split_at_mut(upper.start);
        let below = ViewMut::new(&mut head[lower.range()], lower.rows, lower.cols);
        let above = ViewMut::new(&mut tail[..upper.rows * upper.cols], upper.rows, upper.cols);
        if first < second {
            (below, above)
        } else {
            (above, below)
        }
    }

    /// Where a slot lies in the buffer.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn range(&self, slot: usize) -> Range<usize> {
        self.slots[slot].range()
    }

    /// All elements in their order, to hand them to another process or a file.
    pub fn as_slice(&self) -> &[f32] {
        self.values().view().f32s()
    }

    /// The same to write.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        self.values_mut().view_mut().into_f32s()
    }

    /// Some elements, counted over all slots, as one row.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn part(&self, range: Range<usize>) -> View<'_> {
        let cols = range.len();
        View::from_slice(&self.as_slice()[range], 1, cols)
    }

    /// The same to write.
    ///
    /// # Panics
    /// As [`part`](Self::part).
    pub fn part_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        let cols = range.len();
        ViewMut::new(&mut self.as_mut_slice()[range], 1, cols)
    }

    /// All elements as one row.
    pub fn flat(&self) -> View<'_> {
        self.values().view()
    }

    /// All elements as one row to write.
    pub fn flat_mut(&mut self) -> ViewMut<'_> {
        self.values_mut().view_mut()
    }

    /// Sets every element to zero.
    pub fn zero(&mut self) {
        self.values_mut().view_mut().fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_grows_and_keeps_its_values() {
        let mut arena = Arena::new(&[(1, 2)]);
        arena.extend(&[(2, 1)]);
        assert!(arena.values.get().is_none(), "nobody asked for a value");
        arena.view_mut(1).fill(3.0);
        arena.extend(&[(1, 3), (1, 1)]);
        assert_eq!((arena.slots(), arena.len()), (4, 8));
        assert_eq!(arena.view(1).to_vec(), [3.0, 3.0]);
        assert_eq!(arena.view(2).to_vec(), [0.0; 3]);
        assert_eq!(arena.range(1), 2..4);
        arena.part_mut(3..5).fill(7.0);
        assert_eq!(arena.part(2..5).to_vec(), [3.0, 7.0, 7.0]);
        assert_eq!(arena.as_slice(), [0.0, 0.0, 3.0, 7.0, 7.0, 0.0, 0.0, 0.0]);
    }
}
