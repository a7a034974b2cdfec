//! Low-rank adaptation of pretrained transformers.

pub mod report;
