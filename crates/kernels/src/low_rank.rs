//! The low-rank branch of an adapted linear layer: y += s·drop(x)·Aᵀ·Bᵀ (Hu et al., "LoRA", 2021).
//!
//! All results accumulate, except that the forward overwrites u. Only the given rows of T and the
//! columns from `out_offset` on of y are touched, so one batch may use many adapters, and one fused
//! matrix may carry several branches.

use std::ops::Range;

use crate::linear::{dots_of_rows, matrix};
use crate::matmul::{Mat, MatMut, Shared, product};
use crate::parallel::for_blocks;
use crate::random::drop_out;
use crate::scratch::with_scratch;
use crate::simd;
use crate::view::{View, ViewMut};
use crate::workspace::Workspace;

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
    fn rank(&self) -> usize {
        self.a.rows()
    }

    fn active_dropout(&self) -> Option<Dropout> {
        self.dropout.filter(|dropout| dropout.p > 0.0)
    }

    fn check(&self, y_cols: usize, x: View<'_>, u: (usize, usize), rows: &Range<usize>) {
        self.b.assert_shape("B", self.b.rows(), self.rank());
        self.a.assert_shape("A", self.rank(), x.cols());
        assert!(
            self.out_offset + self.b.rows() <= y_cols,
            "columns {}..{} of a branch do not lie within the {y_cols} of its output",
            self.out_offset,
            self.out_offset + self.b.rows()
        );
        assert_eq!(u, (rows.len(), self.rank()), "shape of x·Aᵀ");
        assert!(
            rows.start <= rows.end && rows.end <= x.rows(),
            "rows {rows:?} do not lie within the {} of the input",
            x.rows()
        );
    }
}

/// Tokens that a task takes.
const TOKENS: usize = 64;
/// Rank from which a general product is faster than products of rows.
const WIDE_RANK: usize = 16;
/// Columns that a task takes when a sum runs over the tokens.
const COLUMNS: usize = 64;

/// u = drop(x)·Aᵀ and y += s·u·Bᵀ for the given rows.
///
/// y [T, out] with n_out columns touched, u [rows, r] overwritten and saved for the backward,
/// x [T, in].
///
/// # Panics
/// If the shapes do not match.
pub fn low_rank_forward(
    y: ViewMut<'_>,
    u: ViewMut<'_>,
    x: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
    _ws: &Workspace,
) {
    lr.check(y.cols(), x, (u.rows(), u.cols()), &rows);
    assert_eq!(y.rows(), x.rows(), "tokens of a low-rank branch");
    let (rank, outs) = (lr.rank(), lr.b.rows());
    let (y_rows, y_cols) = (y.rows(), y.cols());
    let y = Shared::new(y.into_f32s(), y_rows, y_cols);
    let u = Shared::new(u.into_f32s(), rows.len(), rank);
    let b = matrix(lr.b);
    let columns = lr.out_offset..lr.out_offset + outs;
    for_blocks(rows.len(), TOKENS, |block| {
        let tokens = rows.start + block.start..rows.start + block.end;
        #[expect(unsafe_code, reason = "tasks write disjoint rows")]
        // SAFETY: the blocks of `for_blocks` do not overlap.
        let (mut u, y) = unsafe {
            (
                u.block(block.clone(), 0..rank),
                y.block(tokens.clone(), columns.clone()),
            )
        };
        down(&mut u, lr, x, tokens);
        product(y, true, lr.scale, u.as_mat(), b.t());
    });
}

/// The gradients of [`low_rank_forward`] for the given rows, each added to what is there.
///
/// dx [T, in], da [r, in], db [n_out, r], dy [T, out], x [T, in], u [rows, r] as the forward saved it.
///
/// # Panics
/// If the shapes do not match, or if one of `da` and `db` is given without the other.
pub fn low_rank_backward(
    dx: Option<ViewMut<'_>>,
    da: Option<ViewMut<'_>>,
    db: Option<ViewMut<'_>>,
    dy: View<'_>,
    x: View<'_>,
    u: View<'_>,
    rows: Range<usize>,
    lr: &LowRank<'_>,
    ws: &Workspace,
) {
    lr.check(dy.cols(), x, (u.rows(), u.cols()), &rows);
    assert_eq!(dy.rows(), x.rows(), "tokens of a low-rank branch");
    assert_eq!(da.is_some(), db.is_some(), "A and B are trained together");
    let (ins, rank, outs) = (x.cols(), lr.rank(), lr.b.rows());
    let columns = lr.out_offset..lr.out_offset + outs;
    let dy = matrix(dy).block(rows.clone(), columns);
    let (a, b) = (matrix(lr.a), matrix(lr.b));

    // y += s·u·Bᵀ, so du = s·dy·B
    let mut du = ws.take(rows.len(), rank);
    {
        let du = Shared::new(du.view_mut().into_f32s(), rows.len(), rank);
        for_blocks(rows.len(), TOKENS, |block| {
            #[expect(unsafe_code, reason = "tasks write disjoint rows")]
            // SAFETY: the blocks of `for_blocks` do not overlap.
            let du = unsafe { du.block(block.clone(), 0..rank) };
            product(du, false, lr.scale, dy.block(block, 0..outs), b);
        });
    }
    let du_mat = matrix(du.view());

    if let (Some(da), Some(db)) = (da, db) {
        da.assert_shape("the gradient of A", rank, ins);
        db.assert_shape("the gradient of B", outs, rank);
        // y += s·u·Bᵀ, so dB += s·dyᵀ·u
        let u = matrix(u);
        let db = Shared::new(db.into_f32s(), outs, rank);
        for_blocks(outs, COLUMNS, |block| {
            #[expect(unsafe_code, reason = "tasks write disjoint rows")]
            // SAFETY: the blocks of `for_blocks` do not overlap.
            let db = unsafe { db.block(block.clone(), 0..rank) };
            product(db, true, lr.scale, dy.block(0..rows.len(), block).t(), u);
        });
        // u = drop(x)·Aᵀ, so dA += duᵀ·drop(x)
        let da = Shared::new(da.into_f32s(), rank, ins);
        for_blocks(ins, COLUMNS, |block| {
            for start in (0..rows.len()).step_by(512) {
                let part = start..(start + 512).min(rows.len());
                #[expect(unsafe_code, reason = "tasks write disjoint columns")]
                // SAFETY: the blocks of `for_blocks` do not overlap, and the one of the previous
                // part is no longer in use.
                let da = unsafe { da.block(0..rank, block.clone()) };
                let du = du_mat.block(part.clone(), 0..rank).t();
                let tokens = rows.start + part.start..rows.start + part.end;
                with_dropped(lr, x, tokens, block.clone(), |x| {
                    product(da, true, 1.0, du, x);
                });
            }
        });
    }

    if let Some(dx) = dx {
        // u = drop(x)·Aᵀ, so dx += drop(du·A) with the same mask
        dx.assert_shape("the input gradient of a low-rank branch", x.rows(), ins);
        let dx_rows = dx.rows();
        let dx = Shared::new(dx.into_f32s(), dx_rows, ins);
        for_blocks(rows.len(), TOKENS, |block| {
            let tokens = rows.start + block.start..rows.start + block.end;
            #[expect(unsafe_code, reason = "tasks write disjoint rows")]
            // SAFETY: the blocks of `for_blocks` do not overlap.
            let mut dx = unsafe { dx.block(tokens.clone(), 0..ins) };
            let du = du_mat.block(block.clone(), 0..rank);
            match lr.active_dropout() {
                None => product(dx, true, 1.0, du, a),
                Some(dropout) => with_scratch((block.len() + 1) * ins, |scratch| {
                    let (dropped, row_out) = scratch.split_at_mut(block.len() * ins);
                    product(MatMut::new(dropped, block.len(), ins), false, 1.0, du, a);
                    for (i, token) in tokens.enumerate() {
                        let row = &dropped[i * ins..(i + 1) * ins];
                        drop_out(row_out, row, dropout.p, dropout.key, token, 0);
                        simd::add(dx.row(i), row_out);
                    }
                }),
            }
        });
    }
    ws.give(du);
}

/// u = drop(x)·Aᵀ for a block of tokens.
fn down(u: &mut MatMut<'_>, lr: &LowRank<'_>, x: View<'_>, tokens: Range<usize>) {
    let ins = x.cols();
    if lr.rank() >= WIDE_RANK {
        with_dropped(lr, x, tokens, 0..ins, |x| {
            product(u.reborrow(), false, 1.0, x, matrix(lr.a).t());
        });
        return;
    }
    let a = lr.a.f32s();
    if lr.active_dropout().is_none() {
        let x = &x.f32s()[tokens.start * ins..tokens.end * ins];
        dots_of_rows(u, x, a, ins, false);
    } else {
        with_dropped(lr, x, tokens, 0..ins, |x| {
            dots_of_rows(u, x.data(), a, ins, false);
        });
    }
}

/// Calls `work` with a block of the branch's input, after dropout.
fn with_dropped(
    lr: &LowRank<'_>,
    x: View<'_>,
    tokens: Range<usize>,
    cols: Range<usize>,
    work: impl FnOnce(Mat<'_>),
) {
    let Some(dropout) = lr.active_dropout() else {
        return work(matrix(x).block(tokens, cols));
    };
    let width = x.cols();
    let x = x.f32s();
    with_scratch(tokens.len() * cols.len(), |scratch| {
        for (token, to) in tokens.clone().zip(scratch.chunks_exact_mut(cols.len())) {
            let from = &x[token * width + cols.start..token * width + cols.end];
            drop_out(to, from, dropout.p, dropout.key, token, cols.start);
        }
        work(Mat::new(scratch, tokens.len(), cols.len()));
    });
}
