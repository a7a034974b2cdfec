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
//! # The operations
//!
//! They are what a second device would implement.
//!
//! - [`embedding_forward`] – rows of a table by their ids.
//! - [`embedding_backward`] – the table's gradient.
//! - [`linear_forward`] – y = x·Wᵀ + b.
//! - [`linears_forward`] – several linears of one input, with the low-rank branches beside them.
//! - [`linear_backward_input`] – dx = dy·W.
//! - [`linears_backward_input`] – the same for several linears and their branches.
//! - [`linear_backward_weight`] – dW += dyᵀ·x.
//! - [`bias_backward`] – db += Σ dy.
//! - [`low_rank_forward`] – y += s·drop(x)·Aᵀ·Bᵀ.
//! - [`low_rank_backward_hidden`] – the gradient of x·Aᵀ.
//! - [`low_rank_backward_input`] – the gradient of the input of a branch that drops numbers.
//! - [`low_rank_backward_weights`] – the gradients of A and B.
//! - [`low_rank_delta`] – a branch as a dense matrix, added to its weight.
//! - [`layer_norm_forward`] – layer norm of each row.
//! - [`layer_norm_apply`] – the same from saved statistics.
//! - [`layer_norm_backward`] – its gradients.
//! - [`rms_norm_forward`] – RMS norm of each row, or of each head of it.
//! - [`rms_norm_apply`] – the same from saved statistics.
//! - [`rms_norm_backward`] – its gradients.
//! - [`rope_forward`] – rotary positions of each head.
//! - [`rope_backward`] – and back.
//! - [`attention_forward`] – softmax(scale · q·kᵀ) · v over what the queries of each segment see.
//! - [`attention_backward`] – the gradients of q, k and v.
//! - [`relative_attention_forward`] – the same of whole segments, where scores have terms of relative positions.
//! - [`relative_attention_backward`] – the gradients of q, k, v and the positions.
//! - [`activation_forward`] – h = act(x).
//! - [`activation_backward`] – its gradient.
//! - [`gated_forward`] – h = act(gate) · up.
//! - [`gated_backward`] – its gradients.
//! - [`head_logits`] – h·Wᵀ.
//! - [`head_own_logits`] – the same for tokens whose rows of W are others for some of the hidden rows.
//! - [`head_log_probs`] – of each row the log-probability of its target, the log-sum-exp, the mean logit and whether it hits.
//! - [`head_backward`] – the gradients of a weighted sum of the rows' losses.
//! - [`cross_entropy_forward_backward`] – the sum of the rows' losses and its gradients in one pass.
//! - [`head_chunk_rows`] – rows whose logits exist at the same time.
//! - [`add_assign`] – y += x.
//! - [`scale`] – y *= factor.
//! - [`scale_columns`] – y = l ⊙ x, a factor a column.
//! - [`scale_columns_backward`] – the gradient of the factors.
//! - [`magnitude_forward`] – y = c ⊙ (y - b) + b, the factors that magnitudes and norms of outputs come to.
//! - [`magnitude_backward`] – its gradients.
//! - [`output_squares`] – ‖wᵢ‖² of each output of a weight.
//! - [`adapted_squares`] – what a low-rank branch makes of them.
//! - [`pool_forward`] – means of rows.
//! - [`pool_backward`] – the gradient of what was averaged.
//! - [`copy_cols`] – some columns copied over some others.
//! - [`add_cols`] – some columns added to some others.
//! - [`convert`] – numbers in another format.
//! - [`fill_normal`] – draws from a normal distribution.
//! - [`fill_uniform`] – draws from a uniform distribution.
//! - [`adamw_step`] – one step of AdamW.
//!
//! What the host reads of a matrix, apart from the sums that [`head_log_probs`] and [`cross_entropy_forward_backward`] give:
//!
//! - [`all_finite`] – whether no element is infinite or NaN.
//! - [`first_non_finite`] – where the first such element is.
//! - [`sum_squares`] – Σ x².
//! - [`frobenius_norm`] – √(Σ x²).
//! - [`max_abs_diff`] – the largest |a - b|.
//! - [`argmax_rows`] – the largest element of each row.
//! - [`read_bandwidth`] – how fast memory is read.
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
mod cpu;
mod ops;
mod profile;
mod random;
pub mod reference;
mod storage;
mod tensor;
mod types;
mod view;
mod workspace;

pub use arena::Arena;
pub use buffer::release_freed_memory;
#[doc(hidden)]
pub use cpu::engine::{Engine, engines, with_engine};
pub use cpu::engine::{engine_name, limit_engine};
pub use cpu::parallel::in_pool;
pub use cpu::teams::{Teams, team_count};
pub use ops::*;
pub use profile::{OpCost, RegionCost, profiled_regions, start_profile, stop_profile};
pub use random::CounterRng;
pub use storage::{
    DType, EightBit, FourBit, FourBitOrder, FourBitParts, Grouped, NESTED_BLOCK, NestedParts,
    NestedScales, NumberFormat, eight_bits, nested_map,
};
pub use tensor::{Tensor, TensorError};
pub use types::activation::Activation;
pub use types::attention::{AttentionShape, Segment};
pub use types::classes::RowClasses;
pub use types::compute::ComputeDType;
pub use types::head::{CrossEntropy, HeadWeight, LogitScaling, OwnRows};
pub use types::linear::{
    BranchGradient, BranchOutput, Layout, LinearGradient, LinearOutput, Weight,
};
pub use types::low_rank::{Dropout, LowRank};
pub use types::optimizer::AdamW;
pub use types::pauses::Pauses;
pub use types::relative::{RelativeGradients, RelativePositions, RelativeSegment, RelativeShape};
pub use types::rope::{RopeOrder, RopeTable};
pub use view::{OutputMut, View, ViewMut};
pub use workspace::Workspace;
