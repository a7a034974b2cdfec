//! Low-rank adaptation of pretrained transformers: training, using, comparing and exchanging adapters, on the CPU alone.
//!
//! ```
//! use lowrank::base::{BUILTIN, Base, DType};
//! use lowrank::generate::{GenerateOptions, PromptIds, Workspace, generate};
//! use lowrank::model::AdapterSet;
//! use lowrank::train::{Start, TrainConfig, run};
//! use lowrank::tuning::{self, Method};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Rows to learn from: JSON Lines, a table, or a folder with train.jsonl and valid.jsonl.
//! let folder = std::env::temp_dir().join(format!("lowrank-{}", std::process::id()));
//! std::fs::create_dir_all(&folder)?;
//! let (rows, output) = (folder.join("rows.jsonl"), folder.join("adapter"));
//! std::fs::write(&rows, r#"{"prompt": "Is it late?", "completion": " It is."}"#)?;
//!
//! // A LoRA adapter of the built-in model. A folder in the Hugging Face layout or an id of the Hub does as well.
//! let config = TrainConfig {
//!     max_steps: Some(5),
//!     ..TrainConfig::new(Method::Lora, BUILTIN, &rows, &output)
//! }
//! .with_options(|options| options.lora.r = 4);
//! let outcome = run(&config, Start::Fresh { overwrite: false })?;
//! assert_eq!(outcome.steps, 5);
//!
//! // PEFT reads the folder, too. The base stays as it is; each prompt names an adapter of the set, or none.
//! let base = Base::load(BUILTIN, DType::F32)?;
//! let adapter = tuning::load(&output, base.decoder.config())?.adapter;
//! let ids = base.tokenizer.encode("Is it late?", false)?;
//! let prompts = [None, Some(0)].map(|adapter| PromptIds::new(ids.clone(), adapter));
//! let options = GenerateOptions::greedy(8, base.tokenizer.stop_ids());
//! let (set, ws) = ([&adapter], Workspace::new());
//! for made in generate(&base.decoder, AdapterSet::new(&set), &prompts, &options, &ws, |_, _| true) {
//!     println!("{:?}", base.tokenizer.decode(&made.ids, true)?);
//! }
//! # std::fs::remove_dir_all(&folder)?;
//! # Ok(())
//! # }
//! ```
//!
//! Where to look:
//!
//! - [`train`](mod@train): [`train::train`] turns a [`TrainConfig`](settings::TrainConfig) into a run's folder; [`train::Trainer`]
//!   takes its steps one by one. [`tuning`] has the methods, and reads and writes adapters.
//! - [`base`]: what a model's name means, and loading it. [`model`] is the network itself.
//! - [`data`]: rows, tokenizers, chat templates. [`metrics`] scores texts and classifiers.
//! - [`generate`], [`classify`]: using a model with adapters. [`merge`] folds one into its base's weights; [`lora_files`] combines
//!   and prunes adapters without their base.
//! - [`plan`]: what a run would need, from shapes alone. [`mod@bench`] measures it.
//!
//! The crate's `examples` folder has a short program for each of the common tasks.
//!
//! # Features
//!
//! All but `clap` are on by default.
//!
//! - `hub`: models are downloaded from the Hugging Face Hub, and found in its cache.
//! - `builtin-model`: a small model and two tasks are part of the library, [`base::BUILTIN`].
//! - `compare`: comparisons of methods and of adapters, `compare`, `diff` and `report::comparison`.
//! - `clap`: the settings are arguments of a command line.
//!
//! # What may change
//!
//! Structs of options have a constructor or a [`Default`], so that `TrainConfig { max_steps, ..TrainConfig::new(…) }` still compiles
//! when one more option is there. What the library hands out is `#[non_exhaustive]` where it may grow.
//!
//! What signatures mention of the crates below is re-exported: all of it in [`kernels`], [`formats`] and [`comm`], and what is
//! common beside the functions that take it.

pub use lowrank_comm as comm;
pub use lowrank_formats as formats;
pub use lowrank_kernels as kernels;

pub mod base;
pub mod bench;
pub mod classify;
#[cfg(feature = "compare")]
pub mod compare;
pub mod data;
#[cfg(feature = "compare")]
pub mod diff;
mod error;
pub mod export;
pub mod fields;
pub mod generate;
pub mod hub;
pub mod import;
pub mod lock;
pub mod lora_files;
pub mod machine;
pub mod merge;
pub mod metrics;
pub mod model;
pub mod modelfile;
pub mod names;
pub mod objective;
mod output;
pub mod plan;
mod random;
pub mod ranks;
pub mod report;
pub mod settings;
mod svd;
pub mod train;
pub mod tuning;
pub mod units;

pub use error::Error;
pub use formats::FormatError;
pub use kernels::{ComputeDType, DType, NumberFormat, Tensor, TensorError, Workspace};
pub use output::{Unfinished, discard_unfinished, write_text};

/// Compiles what README.md shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
