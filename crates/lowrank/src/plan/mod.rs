//! What a run needs, from shapes alone: floating-point operations and memory, before anything is loaded.

mod flops;

pub use flops::{StepFlops, Work, step_flops};
