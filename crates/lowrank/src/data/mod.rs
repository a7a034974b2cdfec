//! From files of rows to token ids with a mask: what a model is trained on.
//!
//! A [`Tokenizer`] is read from a model folder. [`Dataset::load`] reads a file of rows, detects their [`RowKind`],
//! and turns each into an [`Example`]: ids, and for each id whether the loss falls on it. Nothing is dropped silently:
//! rows that were cut or skipped, and fields that were not used, are in the [`DataReport`].
//!
//! What is supervised:
//!
//! | row | ids | supervised |
//! | --- | --- | --- |
//! | `{"prompt","completion"}` | prompt, completion, end | completion and end |
//! | `{"text"}` | text, end | all |
//! | `{"messages"}`, `{"conversations"}` | the chat template's text | what the assistant says and its end token |
//! | `{"instruction","input","output"}` | as a chat of two turns where there is a template, else the Alpaca prompt | the output and its end |
//! | `{"text","label"}`, or two texts and a label | as a classifier reads texts, with the tokenizer's own tokens around | the label |
//! | `{"tokens","tags"}`, `{"text","spans"}` | the same | the tag of each word, at its first token |
//!
//! Ids are those that `transformers` gives with the same files. A conversation is rendered as a whole and encoded once,
//! as `apply_chat_template(messages, tokenize=True)` does, since encoding it turn by turn would split tokens that the
//! vocabulary joins across a turn's edge; the turns are then found by the bytes of the text that each token covers.
//!
//! This module knows neither models nor kernels.

pub(crate) mod added_tokens;
pub mod batches;
mod chat;
mod dataset;
mod dates;
mod describe;
mod error;
mod example;
mod files;
#[cfg(test)]
pub(crate) mod fixture;
pub mod gguf_tokenizer;
mod jinja2;
mod labelled;
mod labels;
mod message;
mod preview;
mod prompts;
mod pyjson;
mod rows;
mod stream;
mod task;
mod template;
mod tokenizer;
mod unlabelled;

pub(crate) use dates::seconds_since_1970;

pub use dataset::{BadRow, DataOptions, DataReport, Dataset, OnBadRow, task_of};
pub use error::DataError;
pub use example::{Boundary, Example};
pub use files::{
    Split, count_rows, is_read_once, is_standard_input, looks_remote, split_file, why_missing,
};
pub use labels::LabelCounts;
pub use message::Message;
pub use preview::{preview_json, render_preview};
pub use prompts::{Prompt, load_prompts};
pub use rows::RowKind;
pub use stream::DecodeStream;
pub use task::{Label, Labels, ProblemType, TaskType};
pub use tokenizer::{Encoded, Tokenizer};
pub use unlabelled::{Unlabelled, UnlabelledOptions, UnlabelledRow, Word};
