//! The block: every family is this one, with its choices read from [`ModelConfig`](super::ModelConfig).
//!
//! ```text
//! x_mid = x     + o(attention(rope(q), rope(k), v)),   q, k, v of norm(x)
//! x_out = x_mid + mlp(norm(x_mid))
//! ```
//! Where the config says so, a norm stands behind what a half adds as well.
//!
//! It has two halves. The first ([`attention`]) goes from the block's input to what attention gives, over all rows. The second
//! ([`mlp`]) has what acts on a row by itself: the output projection, the MLP, and the adapter layers where the residual stream is
//! added. In the last block only some rows are wanted, those that are scored, and the second half then computes these alone. So each
//! half has a pass of its own, over its own rows, and [`Block`] alone knows both.
//!
//! The forward saves what the backward needs and nothing that it can cheaply compute again ([`saved`]).

mod attention;
mod mlp;
mod saved;

use std::borrow::Cow;
use std::ops::Range;

use lowrank_kernels::{
    Arena, RowClasses, Tensor, Workspace, embedding_backward, embedding_forward,
};

use self::attention::{AttentionHalf, AttentionValues};
use self::mlp::{MlpHalf, MlpValues};
pub(crate) use self::saved::BlockSaved;
use super::adapter::Reach;
use super::batch::Batch;
use super::cache::KvCache;
use super::pass::Pass;
use super::relative::Relative;
use super::rope::RopeTables;
use super::saving::{Recompute, Saving};

/// Some rows of a batch, ascending, and which adapter a range of them uses.
pub(crate) struct SomeRows {
    pub(crate) rows: Vec<u32>,
    pub(crate) adapters: Vec<(Range<usize>, usize)>,
    pub(crate) classes: RowClasses,
}

/// How the attention of a block knows places.
#[derive(Clone, Copy)]
pub(crate) struct Places<'a> {
    pub(crate) rope: Option<&'a RopeTables>,
    pub(crate) relative: Option<&'a Relative>,
}

/// A block of a pass.
pub(crate) struct Block<'a> {
    attention: AttentionHalf<'a>,
    mlp: MlpHalf<'a>,
    between: Between<'a>,
}

impl<'a> Block<'a> {
    /// Block `layer` of a pass over all rows of `batch`. Of its output only the `wanted` rows are computed, if that says so.
    pub(crate) fn new(
        pass: &Pass<'a>,
        batch: &'a Batch,
        layer: usize,
        places: Places<'a>,
        wanted: Option<&'a SomeRows>,
    ) -> Self {
        Self {
            attention: AttentionHalf {
                pass: *pass,
                batch,
                layer,
                places,
            },
            mlp: MlpHalf {
                pass: match wanted {
                    None => *pass,
                    Some(some) => pass.over(&some.adapters, some.classes),
                },
                layer,
            },
            between: Between {
                wanted: wanted.map(|wanted| wanted.rows.as_slice()),
                tokens: batch.tokens(),
                ws: pass.ws,
            },
        }
    }

    /// The output [rows, C]; consumes x. With a cache, keys and values are appended to it and read there.
    pub(crate) fn forward(&self, x: Tensor, cache: Option<&mut KvCache>) -> Tensor {
        let (attention, mut mlp) = self.values(x, cache);
        let x_out = self.mlp.output(&mut mlp);
        attention.give(&self.attention.pass);
        mlp.give(&self.mlp.pass);
        x_out
    }

    /// The output [rows, C], and what a backward needs; consumes x.
    pub(crate) fn forward_keeping(&self, x: Tensor, saving: Saving) -> (Tensor, BlockSaved) {
        let (attention, mut mlp) = self.values(x, None);
        let x_out = self.mlp.output(&mut mlp);
        if saving.recompute == Recompute::Full {
            mlp.give(&self.mlp.pass);
            let x = attention.give_all_but_input(&self.attention.pass);
            return (x_out, BlockSaved::Input(x));
        }
        let attention = attention.keep(&self.attention.pass, saving.dtype);
        let mlp = mlp.keep(&self.mlp.pass, saving);
        (x_out, BlockSaved::Values(Box::new((attention, mlp))))
    }

    /// What both halves compute before the last linear.
    fn values(&self, x: Tensor, cache: Option<&mut KvCache>) -> (AttentionValues, MlpValues) {
        let pauses = self.attention.pass.pauses;
        pauses.pause();
        let (attention, o) = self.attention.forward(x, cache);
        pauses.pause();
        let stream = self.between.pick(&attention.x);
        let o = self.between.pick_owned(o);
        let mlp = self.mlp.forward(stream, o);
        (attention, mlp)
    }

    /// dx of the block's input from the gradient of its output; consumes what was saved. A `reach` short of the input says
    /// that the block is the lowest that trains anything, and how far back that is; the result is then not finished.
    pub(crate) fn backward(
        &self,
        mut dx: Tensor,
        saved: BlockSaved,
        reach: Reach,
        grads: &mut Arena,
    ) -> Tensor {
        let (attention, mlp) = match saved {
            BlockSaved::Values(values) => *values,
            BlockSaved::Input(x) => {
                let (attention, mut mlp) = self.values(x, None);
                if self.mlp.reads_output() {
                    let x_out = self.mlp.output(&mut mlp);
                    self.between.ws.give(x_out);
                }
                (attention, mlp)
            }
        };
        let pauses = self.attention.pass.pauses;
        pauses.pause();
        if let Some(d_o) = self.mlp.backward(&mut dx, mlp, reach, grads) {
            pauses.pause();
            let d_o = self.between.spread(d_o);
            dx = self.between.spread(dx);
            self.attention
                .backward(&mut dx, d_o, attention, reach, grads);
        } else {
            attention.give(&self.attention.pass);
        }
        dx
    }
}

/// The way from the rows of the first half to those of the second, and back.
struct Between<'a> {
    /// The rows that go on; `None`: all.
    wanted: Option<&'a [u32]>,
    tokens: usize,
    ws: &'a Workspace,
}

impl Between<'_> {
    /// The rows of x that go on.
    fn pick<'t>(&self, x: &'t Tensor) -> Cow<'t, Tensor> {
        let Some(rows) = self.wanted else {
            return Cow::Borrowed(x);
        };
        let mut picked = self.ws.take(rows.len(), x.cols());
        embedding_forward(picked.view_mut(), rows, x.view(), false);
        Cow::Owned(picked)
    }

    /// [`pick`](Self::pick) of a matrix that nobody else reads.
    fn pick_owned(&self, x: Tensor) -> Tensor {
        match self.pick(&x) {
            Cow::Borrowed(_) => x,
            Cow::Owned(picked) => {
                self.ws.give(x);
                picked
            }
        }
    }

    /// The gradient of all rows from that of the rows that went on.
    fn spread(&self, dx: Tensor) -> Tensor {
        let Some(rows) = self.wanted else {
            return dx;
        };
        let mut all = self.ws.take(self.tokens, dx.cols());
        all.view_mut().fill(0.0);
        embedding_backward(all.view_mut(), rows, dx.view());
        self.ws.give(dx);
        all
    }
}
