//! What a run tells whoever watches it.

use std::path::PathBuf;

use crate::report::{EvalMetrics, StepMetrics};

/// Something that happened in a run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// Everything is read and checked, and the run's folder is about to be written. Until then a run can be ended at any
    /// moment, and leaves nothing behind.
    Begin,
    /// Training begins.
    Start {
        /// Optimizer steps of the run.
        total_steps: u64,
        /// Steps already done, on resuming.
        done_steps: u64,
        /// Values trained.
        trainable_parameters: usize,
        /// Parameters of the base.
        base_parameters: usize,
    },
    /// An optimizer step was taken.
    Step(StepMetrics),
    /// The held-out rows were evaluated.
    Eval(EvalMetrics),
    /// A checkpoint was written.
    Checkpoint(PathBuf),
    /// Something worth a line.
    Note(String),
}

/// Watches a run.
pub trait Observer {
    /// Called in the training thread; must be quick.
    fn event(&mut self, event: &Event);
}

/// Watches nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _: &Event) {}
}
