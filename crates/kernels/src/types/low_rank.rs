//! Low-rank branches and their dropout.

use crate::random::drop_out;
use crate::view::View;

/// Dropout whose mask is a function of a key and a position, so that recomputing gives it again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element, in [0, 1).
    pub p: f32,
    /// Which mask.
    pub key: u64,
}

impl Dropout {
    /// What the element at a row and column is multiplied by: 0, or 1 / (1 - p).
    pub fn factor(&self, row: usize, col: usize) -> f32 {
        let mut factor = [0.0];
        drop_out(&mut factor, &[1.0], self.p, self.key, row, col);
        factor[0]
    }
}

/// The two factors of a low-rank branch.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// A [r, in], f32.
    pub a: View<'a>,
    /// B [n_out, r], f32.
    pub b: View<'a>,
    /// Factor of the branch: lora_alpha / r.
    pub scale: f32,
    /// Column of y where the branch's output begins.
    pub out_offset: usize,
    /// Dropout of the branch's input.
    pub dropout: Option<Dropout>,
}

impl LowRank<'_> {
    pub(crate) fn rank(&self) -> usize {
        self.a.rows()
    }

    /// Whether elements of the input are dropped.
    pub fn drops(&self) -> bool {
        self.active_dropout().is_some()
    }

    pub(crate) fn active_dropout(&self) -> Option<Dropout> {
        self.dropout.filter(|dropout| dropout.p > 0.0)
    }
}
