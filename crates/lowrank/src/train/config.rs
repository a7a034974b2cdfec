//! Every setting of a run, resolved: what `config.yaml` in the run's folder holds.

use std::path::PathBuf;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::schedule::SchedulerType;
use crate::data::{Boundary, OnBadRow};
use crate::model::Recompute;
use crate::tuning::lora::{InitLoraWeights, Targets};
use crate::tuning::{Method, adapter, prefix, top};

/// The settings of `lowrank train`, in the words of PEFT's `LoraConfig` and of transformers' `TrainingArguments`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of its own that a person sets by name"
)]
pub struct TrainConfig {
    /// What is trained.
    pub method: Method,
    /// The base: a folder or `builtin:tiny`.
    pub model: String,
    /// A folder with train.jsonl (and valid.jsonl), or one file.
    pub data: PathBuf,
    /// Held-out rows, where they are not `valid.jsonl` of `data`.
    pub valid_data: Option<PathBuf>,
    /// The run's folder.
    pub output: PathBuf,
    /// Rank of A and B.
    pub r: usize,
    /// The branch is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Dropout on the branch's input.
    pub lora_dropout: f64,
    /// Modules to adapt; `None`: the family's q and v.
    pub target_modules: Option<Targets>,
    /// Modules to leave out.
    pub exclude_modules: Option<Targets>,
    /// r of modules that match a pattern.
    pub rank_pattern: IndexMap<String, usize>,
    /// lora_alpha of modules that match a pattern.
    pub alpha_pattern: IndexMap<String, f64>,
    /// How A and B begin.
    pub init_lora_weights: InitLoraWeights,
    /// Scale by `lora_alpha / √r`.
    pub use_rslora: bool,
    /// How many of the last blocks are trained; `None`: [`top::DEFAULT_LAYERS`].
    #[serde(default)]
    pub top_layers: Option<usize>,
    /// Train the output projection alone.
    #[serde(default)]
    pub head_only: bool,
    /// Where adapter layers stand.
    #[serde(default)]
    pub adapter_kind: adapter::Kind,
    /// Width of adapter layers.
    #[serde(default = "default_bottleneck")]
    pub bottleneck: usize,
    /// What virtual tokens are: embeddings, or keys and values.
    #[serde(default)]
    pub prefix_kind: prefix::Kind,
    /// Virtual tokens before every sequence.
    #[serde(default = "default_virtual_tokens")]
    pub num_virtual_tokens: usize,
    /// Virtual tokens between prompt and completion.
    #[serde(default)]
    pub infix_tokens: usize,
    /// What virtual tokens begin as.
    #[serde(default)]
    pub prefix_init: prefix::Init,
    /// Start from this adapter; the method's options are its own.
    pub init_adapter: Option<PathBuf>,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How it falls.
    pub lr_scheduler_type: SchedulerType,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Warm-up as a share of all steps; used where `warmup_steps` is 0.
    pub warmup_ratio: f64,
    /// Decoupled weight decay, on everything trained.
    pub weight_decay: f64,
    /// AdamW's first moment decay.
    pub adam_beta1: f64,
    /// AdamW's second moment decay.
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm; 0: off.
    pub max_grad_norm: f64,
    /// Label smoothing, as transformers' `LabelSmoother`.
    pub label_smoothing_factor: f64,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Compute a prompt that rows of a micro-batch share once, and keep such rows together. Runs older than the setting
    /// did not.
    #[serde(default)]
    pub share_prompts: bool,
    /// What the blocks compute again in the backward; `None`: as little as the memory allows.
    #[serde(default)]
    pub recompute: Option<Recompute>,
    /// Bytes that the run may take; `None`: what the machine has free.
    #[serde(default)]
    pub memory_budget: Option<u64>,
    /// Passes over the data.
    pub num_train_epochs: f64,
    /// Optimizer steps; overrides `num_train_epochs`.
    pub max_steps: Option<u64>,
    /// Rows longer than this are cut from the end.
    pub max_seq_length: usize,
    /// Loss on the prompt's tokens too.
    pub train_on_prompt: bool,
    /// What to do with a row that can't be used.
    pub on_bad_row: OnBadRow,
    /// How a prompt and its completion become tokens. Runs older than the setting encoded them apart.
    #[serde(default = "apart")]
    pub completion_boundary: Boundary,
    /// Seed of initialisation, order and dropout.
    pub seed: u64,
    /// Draw a new order each epoch.
    pub shuffle: bool,
    /// Evaluate every so many steps (and at the end).
    pub eval_steps: Option<u64>,
    /// Write a checkpoint every so many steps.
    pub save_steps: Option<u64>,
    /// Checkpoints to keep; older ones are deleted.
    pub save_total_limit: Option<usize>,
    /// Finish with the weights of the lowest `eval_loss`.
    pub load_best_model_at_end: bool,
    /// Stop after so many evaluations without a new best.
    pub early_stopping_patience: Option<usize>,
    /// Storage of the frozen base.
    pub base_dtype: BaseDtype,
    /// Threads; `None`: all the machine has.
    pub threads: Option<usize>,
    /// When and where the run began. Not a setting: a fresh run writes it, and a resumed one reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<Began>,
    /// Run although the memory is expected not to suffice. It belongs to one invocation, so files do not hold it.
    #[serde(skip)]
    pub force: bool,
}

fn apart() -> Boundary {
    Boundary::Apart
}

/// When and where a run began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Began {
    /// Seconds since 1970. A chat template that writes today's date writes that of this time, also when the run is resumed.
    pub time: i64,
    /// The working folder, which relative paths of the settings start at; `None` where its name is not UTF-8.
    pub folder: Option<PathBuf>,
}

impl Began {
    /// Now and here.
    pub(super) fn now() -> Self {
        let folder = std::env::current_dir().ok();
        Self {
            time: crate::data::seconds_since_1970(),
            folder: folder.filter(|folder| folder.to_str().is_some()),
        }
    }
}

fn default_bottleneck() -> usize {
    adapter::DEFAULT_BOTTLENECK
}

fn default_virtual_tokens() -> usize {
    prefix::DEFAULT_VIRTUAL_TOKENS
}

/// Storage of the base's matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16, widened where it is used.
    #[default]
    Bf16,
}

impl From<BaseDtype> for lowrank_kernels::DType {
    fn from(dtype: BaseDtype) -> Self {
        match dtype {
            BaseDtype::F32 => Self::F32,
            BaseDtype::Bf16 => Self::Bf16,
        }
    }
}

/// What the blocks keep beside a base that is stored so.
impl From<BaseDtype> for lowrank_kernels::ActivationDType {
    fn from(dtype: BaseDtype) -> Self {
        match dtype {
            BaseDtype::F32 => Self::F32,
            BaseDtype::Bf16 => Self::Bf16,
        }
    }
}

impl TrainConfig {
    /// The defaults, for a method.
    pub fn new(
        method: Method,
        model: impl Into<String>,
        data: impl Into<PathBuf>,
        output: impl Into<PathBuf>,
    ) -> Self {
        Self {
            method,
            model: model.into(),
            data: data.into(),
            valid_data: None,
            output: output.into(),
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            init_lora_weights: InitLoraWeights::Gaussian,
            use_rslora: false,
            top_layers: None,
            head_only: false,
            adapter_kind: adapter::Kind::default(),
            bottleneck: default_bottleneck(),
            prefix_kind: prefix::Kind::default(),
            num_virtual_tokens: default_virtual_tokens(),
            infix_tokens: 0,
            prefix_init: prefix::Init::default(),
            init_adapter: None,
            learning_rate: method.learning_rate(),
            lr_scheduler_type: SchedulerType::Linear,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            label_smoothing_factor: 0.0,
            batch_size: 8,
            gradient_accumulation_steps: 1,
            share_prompts: false,
            recompute: None,
            memory_budget: None,
            num_train_epochs: 3.0,
            max_steps: None,
            max_seq_length: 2048,
            train_on_prompt: false,
            on_bad_row: OnBadRow::Error,
            completion_boundary: Boundary::Joint,
            seed: 42,
            shuffle: true,
            eval_steps: None,
            save_steps: None,
            save_total_limit: None,
            load_best_model_at_end: false,
            early_stopping_patience: None,
            base_dtype: BaseDtype::Bf16,
            threads: None,
            began: None,
            force: false,
        }
    }

    /// Settings that no run can have, one line each.
    pub fn problems(&self) -> Vec<String> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        let share = |x: f64| (0.0..1.0).contains(&x);
        let rules = [
            ("r", self.r > 0, "at least 1"),
            ("lora_alpha", positive(self.lora_alpha), "greater than 0"),
            (
                "lora_dropout",
                share(self.lora_dropout),
                "at least 0 and less than 1",
            ),
            ("top_layers", self.top_layers != Some(0), "at least 1"),
            (
                "top_layers",
                !(self.head_only && self.top_layers.is_some()),
                "left out with head_only",
            ),
            ("bottleneck", self.bottleneck > 0, "at least 1"),
            (
                "num_virtual_tokens",
                self.num_virtual_tokens > 0 || self.infix_tokens > 0,
                "at least 1",
            ),
            (
                "infix_tokens",
                self.infix_tokens == 0 || self.prefix_kind == prefix::Kind::Embedding,
                "left out with prefix_kind layer",
            ),
            (
                "learning_rate",
                positive(self.learning_rate),
                "greater than 0",
            ),
            (
                "warmup_ratio",
                (0.0..=1.0).contains(&self.warmup_ratio),
                "from 0 to 1",
            ),
            (
                "weight_decay",
                not_negative(self.weight_decay),
                "0 or greater",
            ),
            (
                "adam_beta1",
                share(self.adam_beta1),
                "at least 0 and less than 1",
            ),
            (
                "adam_beta2",
                share(self.adam_beta2),
                "at least 0 and less than 1",
            ),
            (
                "adam_epsilon",
                positive(self.adam_epsilon),
                "greater than 0",
            ),
            (
                "max_grad_norm",
                not_negative(self.max_grad_norm),
                "0 (off) or greater",
            ),
            (
                "label_smoothing_factor",
                share(self.label_smoothing_factor),
                "at least 0 and less than 1",
            ),
            ("batch_size", self.batch_size > 0, "at least 1"),
            (
                "batch_size",
                !(self.share_prompts && self.batch_size == 1),
                "at least 2 with share_prompts, which acts within a batch",
            ),
            (
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps > 0,
                "at least 1",
            ),
            (
                "num_train_epochs",
                positive(self.num_train_epochs),
                "greater than 0",
            ),
        ];
        let counts = self.counts().map(|(key, none)| (key, !none, "at least 1"));
        rules
            .into_iter()
            .chain(counts)
            .filter(|(_, fine, _)| !fine)
            .map(|(key, _, range)| format!("{key} must be {range}"))
            .collect()
    }

    /// Keys that count something, if anything, and whether that is nothing.
    fn counts(&self) -> [(&'static str, bool); 5] {
        [
            ("max_steps", self.max_steps == Some(0)),
            ("eval_steps", self.eval_steps == Some(0)),
            ("save_steps", self.save_steps == Some(0)),
            ("save_total_limit", self.save_total_limit == Some(0)),
            (
                "early_stopping_patience",
                self.early_stopping_patience == Some(0),
            ),
        ]
    }

    /// What the method top trains.
    pub fn top_options(&self) -> top::Options {
        if self.head_only {
            top::Options::Head
        } else {
            top::Options::Layers(self.top_layers.unwrap_or(top::DEFAULT_LAYERS))
        }
    }

    /// Which layers the method adapter adds.
    pub fn adapter_options(&self) -> adapter::Options {
        adapter::Options {
            kind: self.adapter_kind,
            bottleneck: self.bottleneck,
        }
    }

    /// Which virtual tokens the method prefix trains.
    pub fn prefix_options(&self) -> prefix::Options {
        prefix::Options {
            kind: self.prefix_kind,
            prefix: self.num_virtual_tokens,
            infix: self.infix_tokens,
        }
    }

    /// Rows of an optimizer step.
    pub fn rows_per_step(&self) -> usize {
        self.batch_size
            .saturating_mul(self.gradient_accumulation_steps)
    }

    /// Optimizer steps of the run over `rows` rows. The last step of an epoch takes what is left.
    pub fn total_steps(&self, rows: usize) -> u64 {
        self.max_steps.unwrap_or_else(|| {
            let steps_per_epoch = rows.div_ceil(self.rows_per_step());
            (steps_per_epoch as f64 * self.num_train_epochs).ceil() as u64
        })
    }

    /// Keys whose value differs from `earlier` in a way that would change the result of going on. Where the model and the
    /// data lie is not among them: a checkpoint knows what was in them. The adapter that a run began with is in it, too.
    pub fn changes_since(&self, earlier: &Self) -> Vec<String> {
        let mut neutral = vec![
            "output",
            "model",
            "data",
            "valid_data",
            "began",
            "threads",
            "save_steps",
            "save_total_limit",
            "memory_budget",
            // Whoever names one knows that the last bits may change, and is told.
            "recompute",
        ];
        if self.init_adapter.is_some() && earlier.init_adapter.is_some() {
            neutral.push("init_adapter");
        }
        let as_map = |config: &Self| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(map)) => map,
            _ => serde_json::Map::new(),
        };
        let (old, new) = (as_map(earlier), as_map(self));
        new.iter()
            .filter(|(key, value)| {
                !neutral.contains(&key.as_str()) && old.get(*key) != Some(*value)
            })
            .map(|(key, value)| {
                format!(
                    "{key}: {} before, {value} now",
                    old.get(key).unwrap_or(&serde_json::Value::Null)
                )
            })
            .collect()
    }
}
