//! The engine as a library user meets it: whole runs on models of two layers, their folders, and what must be refused.

mod adapters;
mod added_tokens;
mod bad_input;
mod beams;
mod combining;
mod common;
mod compute;
mod configs;
#[cfg(feature = "compare")]
mod diff;
mod dora;
mod exporting;
mod generation;
mod gguf;
mod gpt2;
mod gradients;
mod ia3;
mod importing;
mod initial;
mod merging;
mod methods;
mod objectives;
mod output;
mod pieces;
mod quantized;
mod ranks;
mod relative;
mod resume;
mod rounding;
mod scales;
mod sessions;
mod sharing;
mod token_rows;
mod trainer;
mod training;
mod virtual_tokens;
