//! Low-rank adaptation of pretrained transformers: training, using, comparing and exchanging adapters.

pub mod base;
pub mod bench;
pub mod classify;
pub mod compare;
pub mod data;
pub mod diff;
mod error;
pub mod fields;
pub mod generate;
pub mod hub;
pub mod import;
pub mod lock;
pub mod machine;
pub mod merge;
pub mod metrics;
pub mod model;
pub mod objective;
mod output;
pub mod plan;
mod random;
pub mod report;
pub mod settings;
pub mod train;
pub mod tuning;
pub mod units;

pub use error::Error;
pub use lowrank_kernels::{ActivationDType, DType, Workspace};
pub use output::{Unfinished, write_text};
