//! Training: settings, the loop, checkpoints and what a run's folder holds.
//!
//! A run is a function of its settings and its data: the order of the rows, the dropout masks and the learning rate
//! depend only on the seed and the step. That makes resuming exact.

mod batch;
pub mod checkpoint;
mod evaluate;
mod events;
mod exchange;
mod folder;
mod groups;
mod memory;
mod order;
mod outcome;
pub(crate) mod pieces;
mod pipeline;
mod prepare;
mod purpose;
mod resume;
mod run;
mod schedule;
mod step;
mod trainer;
mod values;

pub use batch::{Scoring, batch_for, batch_of, classified, shared_batch_of};
pub(crate) use evaluate::passes;
pub use evaluate::{evaluate, evaluate_on, evaluate_rows};
pub use events::{Event, Observer, Silent};
pub use groups::{Groups, Rate};
pub use memory::{peak_rss, saving_beside};
pub use outcome::Outcome;
pub use prepare::{Trained, prepare};
pub use purpose::{purpose_of, purpose_with};
pub use run::{Start, run, split_columns, train, train_on};
pub use schedule::Schedule;
pub use step::{OptimizerState, StepOptions, StepOutcome, accumulate, optimizer_step};
pub use trainer::{Rows, Trainer, check_task};
pub use values::Kind;

pub use crate::settings::{BaseDtype, Began, ComputeFormat, SchedulerType, TrainConfig};
