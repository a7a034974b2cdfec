//! What a run needs, from shapes alone: values, floating-point operations and memory, before anything is loaded.

mod distributed;
mod estimate;
mod flops;
mod memory;
pub mod paper;
pub mod presets;

pub use distributed::{Network, RankEstimate, RankPlan, Ranks, StepSize, plan_ranks};
pub use estimate::{Estimate, Plan, PlanOptions, PrefixCounts, plan};
pub use flops::{StepFlops, Work, step_flops};
pub(crate) use memory::IN_EXCHANGE;
pub use memory::{Memory, RankPart, rank_memory, training_memory};
