//! Right factors that are read soon.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::ops::Range;

use super::Part;
use crate::storage::Window;

/// Bytes of a cache line.
const LINE: usize = 64;

/// What is asked for while something else is multiplied, a few cache lines at a time: more at once would wait for each other, and hold up
/// the multiplications behind them.
#[derive(Default)]
pub(super) struct Ahead {
    /// What is left, the next one last.
    rest: Vec<Rows>,
    /// Lines each time.
    lines: usize,
}

/// Rows that lie a number of bytes apart.
struct Rows {
    /// The next line, and the end of its row.
    at: *const u8,
    end: *const u8,
    /// Bytes of a row, and from a row to the next one.
    bytes: usize,
    stride: usize,
    /// Rows that are left, with the one that `at` is in.
    left: usize,
}

impl Ahead {
    /// Goes on with the right factors of a group in some columns, in place of what is left.
    pub(super) fn set(&mut self, group: &[Part<'_>], cols: &Range<usize>) {
        let rows = group.iter().rev().map(|part| {
            let b = part.term.b;
            let unit = b.view.format().unit();
            let Window {
                stride,
                rows,
                cols: within,
            } = b.window(part.inner.clone(), cols.clone());
            let bytes = |numbers: usize| numbers / unit.numbers * unit.bytes;
            let data = b.view.numbers().bytes();
            let first = &data[bytes(rows.start * stride + within.start)..];
            Rows::new(
                first.as_ptr(),
                bytes(within.len()),
                bytes(stride),
                rows.len(),
            )
        });
        self.rest.clear();
        self.rest.extend(rows);
    }

    /// Shares all lines out over so many calls of [`fetch`](Self::fetch).
    pub(super) fn share(&mut self, calls: usize) {
        let lines = self
            .rest
            .iter()
            .map(|rows| rows.left * (rows.bytes / LINE + 1));
        self.lines = lines.sum::<usize>().div_ceil(calls.max(1));
    }

    /// Asks for the next few lines.
    #[inline(always)]
    pub(super) fn fetch(&mut self) {
        for _ in 0..self.lines {
            let Some(rows) = self.rest.last_mut() else {
                return;
            };
            if !rows.fetch() {
                self.rest.pop();
            }
        }
    }
}

impl Rows {
    fn new(first: *const u8, bytes: usize, stride: usize, rows: usize) -> Self {
        Self {
            at: line_of(first),
            end: first.wrapping_add(bytes),
            bytes,
            stride,
            left: rows,
        }
    }

    /// Asks for the next line; whether there is another one.
    #[expect(unsafe_code, reason = "a hint to the processor")]
    #[inline(always)]
    fn fetch(&mut self) -> bool {
        // SAFETY: a prefetch reads nothing, and has no effect on memory.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at.cast()) };
        self.at = self.at.wrapping_add(LINE);
        if self.at >= self.end {
            self.left -= 1;
            self.end = self.end.wrapping_add(self.stride);
            self.at = line_of(self.end.wrapping_sub(self.bytes));
        }
        self.left > 0
    }
}

/// Where the cache line of an address begins.
#[inline(always)]
fn line_of(address: *const u8) -> *const u8 {
    address.map_addr(|address| address & !(LINE - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lines_are_asked_for() {
        let mut rows = Rows::new(std::ptr::without_provenance(1000), 130, 1024, 3);
        let mut lines = vec![rows.at.addr()];
        while rows.fetch() {
            lines.push(rows.at.addr());
        }
        let expected: Vec<usize> = (0..3)
            .flat_map(|row| [960, 1024, 1088].map(|line| 1024 * row + line))
            .collect();
        assert_eq!(lines, expected);
    }
}
