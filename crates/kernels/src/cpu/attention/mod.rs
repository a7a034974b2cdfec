//! Attention in tiles.
//!
//! For a query head h and its key/value head, o = softmax(scale · q·kᵀ) · v over the keys that the
//! query sees. The work is cut into tiles of queries × keys, with the softmax taken as the tiles
//! come (Dao et al., "FlashAttention", 2022); only the log-sum-exp of each query and head is saved.
//!
//! All queries of the heads that share a key/value head are put side by side, as columns of panels
//! (see [`blocks`](crate::cpu::product::blocks)), and a panel goes through all it sees of a tile of keys at once:
//! its scores are [keys, 16], so the maximum and the sum over the keys are plain vector operations, and
//! products read them where they lie.
//!
//! Where factors may be rounded to bf16 and the processor multiplies these faster, [`rounded`] has both passes.
//!
//! Where scores have terms of relative positions, [`relative`] computes them, in rows.

mod backward;
mod columns;
mod forward;
mod relative;
#[cfg(target_arch = "x86_64")]
mod rounded;
mod sight;
mod single;

pub(crate) use backward::attention_backward;
pub(crate) use forward::attention_forward;
pub(crate) use relative::{relative_attention_backward, relative_attention_forward};
