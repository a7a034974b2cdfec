//! What a run needs, from shapes alone: values, floating-point operations and memory, before anything is loaded.

mod estimate;
mod flops;
mod machine;
mod memory;
pub mod paper;
pub mod presets;

pub use estimate::{Estimate, Plan, PlanOptions, PrefixCounts, plan};
pub use flops::{StepFlops, Work, step_flops};
pub use machine::{Bound, addresses_are_limited, available_memory, check_limits, memory_room};
pub use memory::{Memory, training_memory, weight_bytes};
