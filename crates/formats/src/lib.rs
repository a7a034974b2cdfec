//! Model and adapter files: untrusted bytes in, checked values out.
//!
//! | module | what it reads or writes |
//! | --- | --- |
//! | [`checkpoint`] | safetensors, one file or sharded, memory-mapped |
//! | [`safetensors_writer`] | safetensors, streamed tensor by tensor |
//! | [`peft`] | `adapter_config.json` and the tensor names of a LoRA adapter |
//! | [`quantized`] | matrices that bitsandbytes, GPTQ or AWQ keep in several tensors |
//! | [`hf_config`] | `config.json`, `generation_config.json` |
//! | [`gguf`] | llama.cpp's files: metadata and quantized tensors |
//! | [`gguf_model`] | from such a file to a Hugging Face folder |
//! | [`sentencepiece`] | the vocabulary of a SentencePiece model |
//! | [`snapshots`] | folders that are no model or adapter, and what they are instead |
//! | [`recognise`] | what a file is, by its first bytes, for messages |
//! | [`atomic`] | files and folders that appear whole or not at all |
//!
//! A file is never trusted: sizes are added and multiplied with checked arithmetic, every count has a cap, and nothing
//! is allocated because a header says so before the bytes are known to be there. Every error names the file and the
//! field or tensor.

#![deny(missing_docs)]

pub mod atomic;
pub mod checkpoint;
mod error;
mod exactly;
mod folders;
pub mod gguf;
pub mod gguf_model;
pub mod hf_config;
mod json;
mod mapped;
pub mod peft;
pub mod quantized;
pub mod recognise;
pub mod safetensors_writer;
pub mod sentencepiece;

pub use checkpoint::{Checkpoint, StoredDType, TensorEntry};
pub use error::FormatError;
pub use folders::snapshots;
pub use gguf::Gguf;
pub use hf_config::HfConfig;
pub use mapped::SharedBytes;
pub use recognise::Format;
pub use safetensors_writer::{TensorSpec, write_safetensors};
