//! The operations of lowrank: each forward beside its backward, and the only code that touches
//! raw memory.
//!
//! A [`Tensor`] is a two-dimensional, row-major matrix in f32 or bf16; a vector is a matrix of one
//! row. Callers hold tensors, take [`View`]s and [`ViewMut`]s of them, and call operations. They
//! never see a slice of an activation or of a weight, so that a second device would be a second
//! implementation of this crate and not a change of the model.
//!
//! The letters used in shapes: T tokens (rows), C hidden size, H query heads, KV key/value heads,
//! D size of a head, V vocabulary, r rank of an adapter.
//!
//! Invariants that every operation keeps:
//!
//! - The result depends on the inputs and on the kind of processor, never on the number of threads:
//!   sums are taken in a fixed order. Where the pieces of a result decide that order, their size is
//!   fixed, too.
//! - A row of a forward has the bits that it has alone, whatever else is in the batch and however a prompt is cut into pieces: what
//!   computes it depends on its class ([`RowClasses`]) and on the weight.
//! - Operations compute in f32, or with numbers of bf16 that add up to the f32 ones. A frozen weight may be bf16; it is widened a
//!   strip at a time into scratch memory, or in registers, never as a whole. So may what an activation function read in
//!   the forward; [`convert`] makes it so.
//! - A shape that does not fit is a programming error of the caller and panics with both shapes.
//!   Data from users is checked before it gets here.
//! - Nothing allocates once it is warm: temporaries come from a [`Workspace`] or from scratch
//!   memory that each thread keeps.
//!
//! Each file says once whether its gradients accumulate or overwrite. The naive versions in
//! [`reference`](mod@reference) are what the tests and the benchmarks compare with.

#![expect(
    clippy::inline_always,
    reason = "loops must be inlined into code that is compiled for the processor's vectors"
)]

#[cfg(target_endian = "big")]
compile_error!(
    "weights are mapped as little-endian numbers; big-endian machines are not supported"
);

mod arena;
mod buffer;
mod classes;
mod compute;
mod cpu;
mod ops;
mod profile;
mod random;
pub mod reference;
mod storage;
mod tensor;
mod view;
mod workspace;

pub use arena::Arena;
pub use buffer::release_freed_memory;
pub use classes::RowClasses;
pub use compute::ComputeDType;
pub use cpu::attention::{AttentionShape, Segment, attention_backward, attention_forward};
#[doc(hidden)]
pub use cpu::engine::{Engine, engines, with_engine};
pub use cpu::parallel::in_pool;
pub use ops::activation::{
    Activation, activation_backward, activation_forward, gated_backward, gated_forward,
};
pub use ops::elementwise::{add_assign, add_cols, convert, copy_cols, scale};
pub use ops::embedding::{embedding_backward, embedding_forward};
pub use ops::head::{
    CrossEntropy, cross_entropy_forward_backward, head_backward, head_chunk_rows, head_log_probs,
    head_logits,
};
pub use ops::linear::{
    BranchGradient, BranchOutput, Layout, LinearGradient, LinearOutput, Weight, bias_backward,
    linear_backward_input, linear_backward_weight, linear_forward, linears_backward_input,
    linears_forward,
};
pub use ops::low_rank::{
    Dropout, LowRank, low_rank_backward_hidden, low_rank_backward_input, low_rank_backward_weights,
    low_rank_forward,
};
pub use ops::measure::{
    all_finite, argmax_rows, first_non_finite, frobenius_norm, max_abs_diff, read_bandwidth,
    sum_squares,
};
pub use ops::merge::low_rank_delta;
pub use ops::norm::{
    layer_norm_apply, layer_norm_backward, layer_norm_forward, rms_norm_apply, rms_norm_backward,
    rms_norm_forward,
};
pub use ops::optimizer::{AdamW, adamw_step};
pub use ops::rope::{RopeTable, rope_backward, rope_forward};
pub use profile::{OpCost, RegionCost, profiled_regions, start_profile, stop_profile};
pub use random::{CounterRng, fill_normal, fill_uniform};
pub use storage::DType;
pub use tensor::{Tensor, TensorError};
pub use view::{View, ViewMut};
pub use workspace::Workspace;
