//! How factors of bf16 numbers lie, for whatever multiplies them.
//!
//! A tile is 1 KiB. One of a left factor has 16 rows of 32 inner indices. One of a right factor has 16 rows, too, each of a pair of inner
//! indices: the two numbers of a column side by side, for 16 columns. So a row of it is a register of AVX-512, as `vdpbf16ps` reads
//! them, and the whole a tile register of AMX.

/// Rows and columns of a tile of sums.
pub(crate) const SIDE: usize = 16;
/// Inner indices of a step.
pub(crate) const STEP: usize = 32;
/// bf16 numbers of a tile.
pub(crate) const TILE: usize = SIDE * STEP;

/// Products to sum over: steps of both factors, which lie one after the other.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Run {
    /// [steps][parts of a] tiles.
    pub(crate) a: *const u16,
    /// [steps][columns][parts of b] tiles; with one part, a step's may lie further apart than it has columns.
    pub(crate) b: *const u16,
    /// At least one.
    pub(crate) steps: usize,
    pub(crate) parts: Parts,
    /// Pairs of inner indices that there are; what the last step has beyond them is zero.
    pub(crate) pairs: usize,
    /// Bytes from a step's tiles of b to the next one's.
    pub(crate) b_step: usize,
    /// Bytes from a row of a to the next, and from a step to the next: those of tiles, or, for dot products of rounded factors, of a matrix.
    pub(crate) a_row: usize,
    pub(crate) a_step: usize,
}

/// Bytes from a row of a tile of a left factor to the next one.
pub(crate) const TILE_ROW: usize = STEP * size_of::<u16>();

/// How many bf16 numbers a number of either factor is read as.
#[repr(usize)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parts {
    /// Three products: nothing is lost.
    ThreeByOne = 0,
    /// Six of the nine products; the others are less than a rounding to f32.
    ThreeByThree = 1,
    TwoByOne = 2,
    /// Three of the four products; the other is less than what two parts lose.
    TwoByTwo = 3,
    /// Both factors are rounded to bf16.
    OneByOne = 4,
}

impl Parts {
    /// Of a number of the left factor.
    pub(crate) fn left(self) -> usize {
        match self {
            Self::ThreeByOne | Self::ThreeByThree => 3,
            Self::TwoByOne | Self::TwoByTwo => 2,
            Self::OneByOne => 1,
        }
    }

    /// Of a number of the right one.
    pub(crate) fn right(self) -> usize {
        match self {
            Self::ThreeByOne | Self::TwoByOne | Self::OneByOne => 1,
            Self::TwoByTwo => 2,
            Self::ThreeByThree => 3,
        }
    }
}
