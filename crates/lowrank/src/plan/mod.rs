//! What a run needs, from shapes alone: floating-point operations and memory, before anything is loaded.

mod flops;
mod memory;

pub use flops::{StepFlops, Work, step_flops};
pub use memory::{Memory, training_memory, weight_bytes};
