//! How terms are cut into what is multiplied at once.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::ops::Range;

use half::bf16;

use super::layout::{Parts, STEP, TILE};
use super::limits::Limits;
use super::{Unit, dots, parts};
use crate::cpu::product::mat::Mat;
use crate::cpu::product::term::{Left, Term};

/// Some inner indices of a term.
#[derive(Clone)]
pub(super) struct Part<'a> {
    pub(super) term: Term<'a>,
    pub(super) inner: Range<usize>,
}

impl Part<'_> {
    pub(super) fn steps(&self) -> usize {
        self.inner.len().div_ceil(STEP)
    }

    pub(super) fn parts(&self) -> Parts {
        parts(&self.term)
    }

    /// Some rows of the left factor, up to 16, if they are multiplied where they lie.
    pub(super) fn rows_in_place(
        &self,
        unit: Unit<'_>,
        rows: &Range<usize>,
    ) -> Option<Mat<'_, bf16>> {
        match (unit, self.term.a) {
            (Unit::Dots, Left::Narrow(a))
                if rows.len().is_multiple_of(dots::ROWS) && self.inner.len().is_multiple_of(2) =>
            {
                Some(a.block(rows.clone(), self.inner.clone()))
            }
            _ => None,
        }
    }

    /// Numbers of the left factor in tiles, for 16 rows.
    pub(super) fn left_len(&self) -> usize {
        self.steps() * self.parts().left() * TILE
    }

    /// Numbers of the right factor in tiles, for 16 columns and a step.
    pub(super) fn right_step(&self) -> usize {
        self.parts().right() * TILE
    }
}

/// A group, of which some rows of the left factors are multiplied.
pub(super) struct Block<'a> {
    pub(super) rows: Range<usize>,
    pub(super) group: &'a [Part<'a>],
}

impl Block<'_> {
    /// Asks for a share of the left factors, which are read next: they come from memory while others are multiplied.
    pub(super) fn fetch(&self, (share, shares): (usize, usize)) {
        let bound = |share: usize| self.rows.start + self.rows.len() * share / shares;
        for part in self.group {
            let rows = bound(share)..bound(share + 1);
            match part.term.a {
                Left::Wide(a) => fetch_rows(a, rows, &part.inner),
                Left::Narrow(a) => fetch_rows(a, rows, &part.inner),
            }
        }
    }
}

/// Asks for some numbers of rows that lie in one piece each.
fn fetch_rows<N: Copy>(a: Mat<'_, N>, rows: Range<usize>, inner: &Range<usize>) {
    if a.col_stride() == 1 {
        for row in rows {
            fetch(&a.data()[row * a.row_stride()..][inner.clone()]);
        }
    }
}

/// Asks for numbers, which go to the L2 cache.
#[expect(unsafe_code, reason = "a hint to the processor")]
fn fetch<N>(numbers: &[N]) {
    for line in numbers.chunks(64 / size_of::<N>()) {
        // SAFETY: a prefetch reads nothing, and has no effect on memory.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
}

/// Cuts terms into groups that are multiplied at once.
pub(super) fn groups<'a>(terms: &[Term<'a>], limits: &Limits) -> Vec<Vec<Part<'a>>> {
    let (mut groups, mut room) = (Vec::<Vec<_>>::new(), 0);
    for &term in terms {
        let steps = term.a.cols().div_ceil(STEP);
        // Parts of about one size.
        let each = steps.div_ceil(steps.div_ceil(limits.depth).max(1)) * STEP;
        for start in (0..term.a.cols()).step_by(each.max(1)) {
            let inner = start..(start + each).min(term.a.cols());
            let part = Part { term, inner };
            if part.steps() > room {
                groups.push(Vec::new());
                room = limits.depth + limits.slack;
            }
            room -= part.steps();
            if let Some(group) = groups.last_mut() {
                group.push(part);
            }
        }
    }
    groups
}
