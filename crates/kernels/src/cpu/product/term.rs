//! What a product is made of: factors, terms of a sum, outputs.

use std::ops::Range;

use half::bf16;

use crate::cpu::product::mat::{Mat, MatMut};
use crate::storage::Window;
use crate::types::compute::ComputeDType;
use crate::view::{View, ViewMut};

/// The right factor of a product, [K, N]: a window of a weight, or of its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    pub(crate) view: View<'a>,
    /// Whether the factor is the transpose of the view.
    pub(crate) transposed: bool,
    /// Where the window begins.
    pub(crate) first_row: usize,
    pub(crate) first_col: usize,
    rows: usize,
    cols: usize,
}

impl<'a> Factor<'a> {
    /// The matrix as it is.
    pub(crate) fn straight(view: View<'a>) -> Self {
        Self {
            view,
            transposed: false,
            first_row: 0,
            first_col: 0,
            rows: view.rows(),
            cols: view.cols(),
        }
    }

    /// The transpose of a matrix.
    pub(crate) fn turned(view: View<'a>) -> Self {
        Self {
            transposed: true,
            rows: view.cols(),
            cols: view.rows(),
            ..Self::straight(view)
        }
    }

    /// K, the inner size.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// N, the columns of the output.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Where some of its rows and columns lie in the view.
    pub(crate) fn window(&self, rows: Range<usize>, cols: Range<usize>) -> Window {
        assert!(rows.end <= self.rows && cols.end <= self.cols);
        let down = self.first_row + rows.start..self.first_row + rows.end;
        let across = self.first_col + cols.start..self.first_col + cols.end;
        let (rows, cols) = if self.transposed {
            (across, down)
        } else {
            (down, across)
        };
        Window {
            stride: self.view.cols(),
            rows,
            cols,
        }
    }

    /// Some of the rows and columns.
    pub(crate) fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && cols.end <= self.cols);
        Self {
            first_row: self.first_row + rows.start,
            first_col: self.first_col + cols.start,
            rows: rows.len(),
            cols: cols.len(),
            ..self
        }
    }
}

/// The left factor of a product, [T, K].
#[derive(Clone, Copy)]
pub(crate) enum Left<'a> {
    Wide(Mat<'a>),
    /// Numbers that are rounded already; each row lies in one piece.
    Narrow(Mat<'a, bf16>),
}

impl<'a> Left<'a> {
    /// T.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Wide(mat) => mat.rows(),
            Self::Narrow(mat) => mat.rows(),
        }
    }

    /// K.
    pub(crate) fn cols(&self) -> usize {
        match self {
            Self::Wide(mat) => mat.cols(),
            Self::Narrow(mat) => mat.cols(),
        }
    }

    /// Some rows and columns.
    pub(crate) fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        match self {
            Self::Wide(mat) => Self::Wide(mat.block(rows, cols)),
            Self::Narrow(mat) => Self::Narrow(mat.block(rows, cols)),
        }
    }

    /// The matrix, if its numbers are rounded.
    pub(crate) fn narrow(&self) -> Option<Mat<'a, bf16>> {
        match self {
            Self::Wide(_) => None,
            Self::Narrow(mat) => Some(*mat),
        }
    }

    /// The matrix in f32.
    ///
    /// # Panics
    /// If it is not: whoever multiplies f32 numbers alone gets no others.
    pub(crate) fn wide(&self) -> Mat<'a> {
        match self {
            Self::Wide(mat) => *mat,
            Self::Narrow(_) => panic!("a left factor in bf16 was to be widened"),
        }
    }
}

impl<'a> From<Mat<'a>> for Left<'a> {
    fn from(mat: Mat<'a>) -> Self {
        Self::Wide(mat)
    }
}

/// A product of a sum: scale times a [T, K] times b [K, N], added to a window of the output.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) a: Left<'a>,
    pub(crate) b: Factor<'a>,
    pub(crate) scale: f32,
    #[cfg_attr(
        not(any(target_arch = "x86_64", target_arch = "aarch64")),
        expect(dead_code, reason = "only products of bf16 have a choice")
    )]
    pub(crate) compute: ComputeDType,
    /// Row and column of the output where the window begins.
    pub(crate) at: (usize, usize),
    /// Whether it is summed by itself and then added, even if it and its neighbours write the whole output. A row's bits must not
    /// depend on which other rows a term is for.
    pub(crate) apart: bool,
}

impl<'a> Term<'a> {
    /// The product itself, of the whole output.
    pub(crate) fn new(a: impl Into<Left<'a>>, b: Factor<'a>) -> Self {
        Self {
            a: a.into(),
            b,
            scale: 1.0,
            compute: ComputeDType::F32,
            at: (0, 0),
            apart: false,
        }
    }

    /// The same, with its factors read so exactly.
    pub(crate) fn with(self, compute: ComputeDType) -> Self {
        Self { compute, ..self }
    }
}

/// An output, what it begins with, and the products that it is the sum of.
pub(crate) struct Job<'a> {
    /// [T, N].
    pub(crate) y: ViewMut<'a>,
    pub(crate) start: Start<'a>,
    pub(crate) terms: &'a [Term<'a>],
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing: the output is overwritten.
    Zero,
    /// What the output holds.
    Sum,
    /// A bias, the same for each row.
    Row(&'a [f32]),
}

impl Start<'_> {
    /// Puts into a tile what the product is added to; whether there is anything.
    pub(crate) fn prepare(self, tile: &mut MatMut<'_>, columns: &Range<usize>) -> bool {
        match self {
            Self::Zero => false,
            Self::Sum => true,
            Self::Row(bias) => {
                for row in 0..tile.rows() {
                    tile.row(row).copy_from_slice(&bias[columns.clone()]);
                }
                true
            }
        }
    }
}
