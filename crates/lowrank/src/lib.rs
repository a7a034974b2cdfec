//! Low-rank adaptation of pretrained transformers.

pub mod data;
