//! Every setting of a run, resolved: what `config.yaml` in the run's folder holds.

mod choices;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use choices::{BaseDtype, Began, ClassWeights, ComputeFormat, SchedulerType};

use crate::Error;
use crate::data::{Boundary, OnBadRow, TaskType};
use crate::fields::{Fields, Keys, Names, fields};
#[cfg(feature = "clap")]
use crate::fields::{finite, finite_pattern, parse_bytes};
use crate::model::{Adapter, LoadIn, ModelConfig, Recompute};
use crate::tuning::lora::InitLoraWeights;
use crate::tuning::{self, Method, MethodOptions};

#[cfg(feature = "clap")]
const DATA: &str = "Data";
#[cfg(feature = "clap")]
const OPTIMIZATION: &str = "Optimization";
#[cfg(feature = "clap")]
const SAVING: &str = "Evaluation and checkpoints";
#[cfg(feature = "clap")]
const MACHINE: &str = "Machine";

/// Keys without a default: every run says them.
pub const REQUIRED: [&str; 3] = ["model", "data", "output"];

fields! {
    /// The settings of `lowrank train`, in the words of PEFT's configs and of transformers' `TrainingArguments`.
    pub struct TrainConfig {
        /// The base model: a folder in the Hugging Face layout, a GGUF file, an id of the Hub, or builtin:tiny (required)
        #[arg(value_name = "MODEL", default_value = "", hide_default_value = true)]
        pub model: String,

        /// The run's folder, which must not exist yet (required)
        #[arg(value_name = "DIR", default_value = ".", hide_default_value = true)]
        pub output: PathBuf,

        /// Start from this adapter of an earlier run; the method's options are then its own
        #[arg(value_name = "DIR")]
        pub init_adapter: Option<PathBuf>,

        /// Rows to train on: a folder with train.jsonl and maybe valid.jsonl, one file, or - for standard input (required)
        #[arg(value_name = "PATH", default_value = ".", hide_default_value = true, help_heading = DATA)]
        pub data: PathBuf,

        /// Held-out rows, where they are not valid.jsonl beside the others
        #[arg(value_name = "FILE", help_heading = DATA)]
        pub valid_data: Option<PathBuf>,

        /// What the model learns to do [default: what the rows are for]
        #[arg(value_name = "TASK", value_enum, help_heading = DATA)]
        pub task_type: Option<TaskType>,

        /// Begin a new classifier, where the model or the adapter to start from has one for other labels
        #[switch(help_heading = DATA)]
        #[absent(false)]
        pub new_classifier: bool = false,

        /// Names of the columns of CSV and TSV files without a header, such as text,label
        #[arg(value_name = "NAMES", help_heading = DATA)]
        pub columns: Option<String>,

        /// Cut longer rows to so many tokens, from the end
        #[arg(value_name = "TOKENS", help_heading = DATA)]
        #[range(COUNT)]
        pub max_seq_length: usize = 2048,

        /// Let the loss fall on prompts too, not on completions alone
        #[switch(help_heading = DATA)]
        pub train_on_prompt: bool = false,

        /// What to do with a row that cannot be used
        #[arg(value_name = "WHAT", value_enum, help_heading = DATA)]
        pub on_bad_row: OnBadRow = OnBadRow::Error,

        /// Encode prompt and completion as one text, as TRL does, or each by itself
        #[arg(value_name = "HOW", value_enum, help_heading = DATA)]
        #[absent(Boundary::Apart)]
        pub completion_boundary: Boundary = Boundary::Joint,

        /// Keep the rows in the order of the file (key: shuffle)
        #[switch(long = "no-shuffle", default_value = "false", value_parser = parse_negated, help_heading = DATA)]
        pub shuffle: bool = true,

        /// What is trained
        #[arg(value_name = "METHOD", value_enum)]
        pub method: Method = Method::Lora,

        /// What the methods are told
        #[command(flatten)]
        pub options: MethodOptions,

        /// The highest learning rate
        #[arg(
            value_parser = finite::<f64>, value_name = "X", help = learning_rate_help(), hide_default_value = true,
            help_heading = OPTIMIZATION
        )]
        #[range(POSITIVE)]
        pub learning_rate: f64 = Method::Lora.learning_rate(),

        /// How the learning rate falls
        #[arg(value_name = "TYPE", value_enum, help_heading = OPTIMIZATION)]
        pub lr_scheduler_type: SchedulerType = SchedulerType::Linear,

        /// Steps over which the learning rate rises from zero
        #[arg(value_name = "N", help_heading = OPTIMIZATION)]
        pub warmup_steps: u64 = 0,

        /// The same as a share of all steps, used where warmup_steps is 0
        #[arg(
            value_parser = finite::<f64>, value_name = "P", conflicts_with = "warmup_steps", help_heading = OPTIMIZATION
        )]
        #[range(SHARE)]
        pub warmup_ratio: f64 = 0.0,

        /// Decoupled weight decay on everything that is trained
        #[arg(value_parser = finite::<f64>, value_name = "X", help_heading = OPTIMIZATION)]
        #[range(NOT_NEGATIVE)]
        pub weight_decay: f64 = 0.0,

        /// Another learning rate for trained tensors that match a pattern, as a factor of learning_rate; may be repeated
        #[arg(value_name = "PATTERN=FACTOR", value_parser = finite_pattern, help_heading = OPTIMIZATION)]
        #[range(NOT_NEGATIVE)]
        #[written(AsMap)]
        pub lr_pattern: Vec<(String, f64)>,

        /// Another weight decay for trained tensors that match a pattern; may be repeated
        #[arg(value_name = "PATTERN=X", value_parser = finite_pattern, help_heading = OPTIMIZATION)]
        #[range(NOT_NEGATIVE)]
        #[written(AsMap)]
        pub weight_decay_pattern: Vec<(String, f64)>,

        /// AdamW's decay of the first moment
        #[arg(value_parser = finite::<f64>, value_name = "X", help_heading = OPTIMIZATION)]
        #[range(BELOW_ONE)]
        pub adam_beta1: f64 = 0.9,

        /// AdamW's decay of the second moment
        #[arg(value_parser = finite::<f64>, value_name = "X", help_heading = OPTIMIZATION)]
        #[range(BELOW_ONE)]
        pub adam_beta2: f64 = 0.999,

        /// AdamW's epsilon
        #[arg(value_parser = finite::<f64>, value_name = "X", default_value = "1e-8", help_heading = OPTIMIZATION)]
        #[range(POSITIVE)]
        pub adam_epsilon: f64 = 1e-8,

        /// Scale gradients down to this norm; 0 turns it off
        #[arg(value_parser = finite::<f64>, value_name = "X", help_heading = OPTIMIZATION)]
        #[range(NOT_NEGATIVE)]
        pub max_grad_norm: f64 = 1.0,

        /// Share of the target's probability that is spread over all tokens
        #[arg(value_parser = finite::<f64>, value_name = "P", help_heading = OPTIMIZATION)]
        #[range(BELOW_ONE)]
        pub label_smoothing_factor: f64 = 0.0,

        /// Weights of a classifier's labels in the loss
        #[arg(value_name = "HOW", value_enum, help_heading = OPTIMIZATION)]
        pub class_weights: Option<ClassWeights>,

        /// Rows computed at a time
        #[arg(value_name = "ROWS", help_heading = OPTIMIZATION)]
        #[range(COUNT)]
        pub batch_size: usize = 8,

        /// Batches of an optimizer step
        #[arg(value_name = "N", help_heading = OPTIMIZATION)]
        #[range(COUNT)]
        pub gradient_accumulation_steps: usize = 1,

        /// Compute a prompt once for all rows of a batch that have it, and put such rows side by side
        #[switch(help_heading = OPTIMIZATION)]
        #[absent(false)]
        pub share_prompts: bool = false,

        /// Passes over the rows
        #[arg(value_parser = finite::<f64>, value_name = "X", help_heading = OPTIMIZATION)]
        #[range(POSITIVE)]
        pub num_train_epochs: f64 = 3.0,

        /// Optimizer steps, instead of passes over the rows
        #[arg(value_name = "N", conflicts_with = "num_train_epochs", help_heading = OPTIMIZATION)]
        #[range(COUNT)]
        pub max_steps: Option<u64>,

        /// Decides the start, the order of the rows and dropout
        #[arg(value_name = "N", help_heading = OPTIMIZATION)]
        pub seed: u64 = 42,

        /// Evaluate the held-out rows every so many steps, not at the end alone
        #[arg(value_name = "N", help_heading = SAVING)]
        #[range(COUNT)]
        pub eval_steps: Option<u64>,

        /// Write a checkpoint every so many steps and at the end
        #[arg(value_name = "N", help_heading = SAVING)]
        #[range(COUNT)]
        pub save_steps: Option<u64>,

        /// Keep only so many checkpoints, the latest
        #[arg(value_name = "N", help_heading = SAVING)]
        #[range(COUNT)]
        pub save_total_limit: Option<usize>,

        /// Finish with the weights whose held-out loss was the lowest
        #[switch(help_heading = SAVING)]
        pub load_best_model_at_end: bool = false,

        /// Stop after so many evaluations without a new lowest loss
        #[arg(value_name = "N", help_heading = SAVING)]
        #[range(COUNT)]
        pub early_stopping_patience: Option<usize>,

        /// What a block computes again in the backward instead of keeping it [default: as little as the memory allows]
        #[arg(value_name = "WHAT", help_heading = MACHINE)]
        pub recompute: Option<Recompute>,

        /// Memory that the run may take, such as 2GiB [default: what the machine has free]
        #[arg(value_name = "SIZE", value_parser = parse_bytes, help_heading = MACHINE)]
        #[written(AsBytes)]
        pub memory_budget: Option<u64>,

        /// How the frozen weights are stored
        #[arg(value_name = "DTYPE", value_enum, help_heading = MACHINE)]
        pub base_dtype: BaseDtype = BaseDtype::Bf16,

        /// Quantize the matrices of the model's blocks while they are loaded, to NF4 or to int8
        #[arg(value_name = "BITS", value_enum, help_heading = MACHINE)]
        pub load_in: Option<LoadIn>,

        /// How the factors of training's products are read [default: bf16 beside a base in bf16, else f32]
        #[arg(value_name = "DTYPE", value_enum, help_heading = MACHINE)]
        #[absent(Some(ComputeFormat::Bf16x2))]
        pub compute_dtype: Option<ComputeFormat>,

        /// Threads to compute with [default: one a core]
        #[arg(value_name = "N", help_heading = MACHINE)]
        #[range(COUNT)]
        pub threads: Option<usize>,

        beside {
            /// When and where the run began: a fresh run writes it, and a resumed one reads it.
            pub began: Option<Began>,
            /// Run although the memory is expected not to suffice. It belongs to one invocation, so files do not hold it.
            pub force: bool,
        }
    }
}

/// `--no-shuffle` is the key `shuffle` turned round.
#[cfg(feature = "clap")]
fn parse_negated(text: &str) -> Result<bool, String> {
    text.parse::<bool>()
        .map(|value| !value)
        .map_err(|_| "expected true or false".to_owned())
}

/// What the learning rate is by default, method by method, of which the first one is the default itself.
#[cfg(feature = "clap")]
fn learning_rate_help() -> String {
    let mut rates: Vec<(f64, Vec<&str>)> = Vec::new();
    for method in Method::ALL {
        let rate = method.learning_rate();
        match rates.iter_mut().find(|(other, _)| *other == rate) {
            Some((_, names)) => names.push(method.name()),
            None => rates.push((rate, vec![method.name()])),
        }
    }
    let default = Method::Lora.learning_rate();
    let others: Vec<String> = rates
        .into_iter()
        .filter(|(rate, _)| *rate != default)
        .map(|(rate, names)| format!("{} {rate:e}", listed(&names)))
        .collect();
    format!(
        "The highest learning rate [default: {default:e}; {}]",
        others.join(", ")
    )
}

/// `a`, `a and b`, or `a, b and c`.
#[cfg(feature = "clap")]
fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
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
            output: output.into(),
            learning_rate: method.learning_rate(),
            ..Self::default()
        }
    }

    /// Values of keys that a settings file lacks because it is older than they are.
    pub fn values_of_older_files() -> serde_json::Map<String, serde_json::Value> {
        let values = |config: &Self| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(map)) => map,
            _ => serde_json::Map::new(),
        };
        let mut older = Self::default();
        older.set_absent();
        let (now, mut older) = (values(&Self::default()), values(&older));
        older.retain(|key, value| now.get(key) != Some(value));
        older
    }

    /// How the factors of products may be read; [`ComputeFormat::here`] says how this processor reads them.
    pub fn compute_format(&self) -> ComputeFormat {
        self.compute_dtype
            .unwrap_or(ComputeFormat::beside(self.base_dtype))
    }

    /// The same with other options of its method: `config.with_options(|options| options.lora.r = 4)`.
    #[must_use]
    pub fn with_options(mut self, change: impl FnOnce(&mut MethodOptions)) -> Self {
        change(&mut self.options);
        self
    }

    /// Refuses settings that no run can have.
    ///
    /// # Errors
    /// With all [`problems`](Self::problems).
    pub fn check(&self) -> Result<(), Error> {
        let problems = self.problems();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Error::Settings(problems.join("\n")))
        }
    }

    /// Settings that no run can have, one line each.
    pub fn problems(&self) -> Vec<String> {
        self.problems_as(&Keys)
    }

    /// The same, with the settings called as `names` says.
    pub fn problems_as(&self, names: &dyn Names) -> Vec<String> {
        let mut problems = Vec::new();
        self.check_ranges(names, &mut problems);
        for (key, is_set) in [
            ("load_best_model_at_end", self.load_best_model_at_end),
            (
                "early_stopping_patience",
                self.early_stopping_patience.is_some(),
            ),
        ] {
            if is_set && self.eval_steps.is_none() {
                problems.push(format!(
                    "{} needs {}: without it the only evaluation is at the end",
                    names.given(key),
                    names.to_give("eval_steps")
                ));
            }
        }
        if self.share_prompts && self.batch_size == 1 {
            problems.push(format!(
                "{} needs a {} of 2 or more: a prompt is shared by rows of a batch",
                names.given("share_prompts"),
                names.to_give("batch_size")
            ));
        }
        let init = self.options.lora.init_lora_weights;
        if self.init_adapter.is_some() && self.method == Method::Lora && init.is_of_the_weights() {
            problems.push(format!(
                "{} gives A and B their values, so {} does nothing beside it; leave one of them out",
                names.given("init_adapter"),
                names.to_give_as("init_lora_weights", &init.to_string())
            ));
        }
        let plain = self.options.lora.loftq_weights.is_some() || self.load_in.is_some();
        if self.method == Method::Lora && init == InitLoraWeights::Loftq && !plain {
            problems.push(format!(
                "{} needs the model as it was before it was quantized; give its folder as {}, or let {} quantize a plain one",
                names.to_give_as("init_lora_weights", "loftq"),
                names.to_give("loftq_weights"),
                names.to_give("load_in")
            ));
        }
        self.options.check_together(names, &mut problems);
        problems
    }

    /// What a run with these settings trains, as shapes without values: nothing is loaded or allocated.
    ///
    /// # Errors
    /// Options that do not fit the model; an adapter to start from that cannot be used.
    pub fn lay_out(&self, model: &ModelConfig) -> Result<Adapter, Error> {
        match &self.init_adapter {
            Some(folder) => Ok(tuning::load(folder, model)?.adapter),
            None => self.method.lay_out(&self.options, model),
        }
    }

    /// The file of tokens that a run adds to its model's tokenizer.
    pub(crate) fn new_tokens(&self) -> Option<&Path> {
        let file = self.options.lora.add_tokens.as_deref();
        file.filter(|_| self.method == Method::Lora)
    }

    /// Tokens of a row at most. What an encoder has no positions for is cut, as transformers cuts it.
    pub fn row_length(&self, model: &ModelConfig) -> usize {
        if model.causal {
            return self.max_seq_length;
        }
        let taken = self.method.positions(&self.options);
        let left = model.longest_sequence().saturating_sub(taken);
        self.max_seq_length.min(left)
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
        let mut neutral = NEUTRAL.to_vec();
        if self.init_adapter.is_some() && earlier.init_adapter.is_some() {
            neutral.push("init_adapter");
        }
        let (old, new) = (earlier.as_map(), self.as_map());
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

    /// Each setting that decides about the result, with its value.
    pub(crate) fn marks(&self) -> Vec<(String, String)> {
        let map = self.as_map().into_iter();
        map.filter(|(key, _)| !NEUTRAL.contains(&key.as_str()) && key != "init_adapter")
            .map(|(key, value)| (key, value.to_string()))
            .collect()
    }

    fn as_map(&self) -> serde_json::Map<String, serde_json::Value> {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(map)) => map,
            _ => serde_json::Map::new(),
        }
    }
}

/// Keys that do not change what a run comes to.
const NEUTRAL: [&str; 11] = [
    "output",
    "model",
    "data",
    "valid_data",
    "loftq_weights",
    "began",
    "threads",
    "save_steps",
    "save_total_limit",
    "memory_budget",
    // Whoever names one knows that the last bits may change, and is told.
    "recompute",
];

impl Serialize for TrainConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        self.write(&mut map)?;
        if let Some(began) = &self.began {
            map.serialize_entry("began", began)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for TrainConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ReadConfig)
    }
}

/// Reads a map of settings key by key, so that an error is at its place in the file.
struct ReadConfig;

impl<'de> Visitor<'de> for ReadConfig {
    type Value = TrainConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("settings of a run")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut config = TrainConfig::default();
        config.set_absent();
        let mut found = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == "began" {
                config.began = map.next_value()?;
            } else if !config.read(&key, &mut map)? {
                return Err(A::Error::custom(format!(
                    "unknown field `{key}`: there is no such setting"
                )));
            }
            found.insert(key);
        }
        let is_missing = |key: &&str| !found.contains(*key);
        let needed = TrainConfig::fields()
            .into_iter()
            .filter(|field| !field.may_be_absent)
            .map(|field| field.key);
        match needed.chain(REQUIRED).find(is_missing) {
            Some(key) => Err(A::Error::missing_field(key)),
            None => Ok(config),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of a map.
    fn keys(value: &serde_json::Value) -> BTreeSet<&str> {
        value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect()
    }

    #[test]
    fn every_field_is_a_key_and_reads_back() {
        let mut config = TrainConfig::new(Method::Lora, "m", "d", "o");
        config.options.lora.rank_pattern = vec![("b".to_owned(), 2), ("a".to_owned(), 3)];
        config.memory_budget = Some(1 << 30);
        let value = serde_json::to_value(&config).unwrap();
        let described: BTreeSet<&str> = TrainConfig::fields().iter().map(|f| f.key).collect();
        assert_eq!(keys(&value), described);
        assert_eq!(
            TrainConfig::fields().len(),
            described.len(),
            "no key is declared twice"
        );
        let yaml = serde_saphyr::to_string(&config).unwrap();
        assert_eq!(
            serde_saphyr::from_str::<TrainConfig>(&yaml).unwrap(),
            config
        );
    }

    #[test]
    fn a_file_may_be_without_what_came_later_alone() {
        let whole = serde_json::to_value(TrainConfig::new(Method::Lora, "m", "d", "o")).unwrap();
        let without = |key: &str| {
            let mut map = whole.as_object().unwrap().clone();
            map.remove(key);
            serde_json::from_value::<TrainConfig>(map.into())
        };
        assert_eq!(
            without("completion_boundary").unwrap().completion_boundary,
            Boundary::Apart
        );
        let old = [
            "share_prompts",
            "recompute",
            "bottleneck",
            "num_virtual_tokens",
            "head_only",
        ];
        for key in old {
            assert!(without(key).is_ok(), "{key}");
        }
        for key in ["method", "model", "data", "r", "seed", "batch_size"] {
            let error = without(key).unwrap_err().to_string();
            assert!(
                error.contains("missing field") && error.contains(key),
                "{error}"
            );
        }
    }

    #[test]
    fn unknown_keys_and_wrong_values_are_errors_with_their_line() {
        let config = TrainConfig::new(Method::Lora, "m", "d", "o");
        let yaml = serde_saphyr::to_string(&config).unwrap();
        let error = |text: &str| {
            serde_saphyr::from_str::<TrainConfig>(text)
                .unwrap_err()
                .to_string()
        };
        let line = 1 + yaml.lines().position(|line| line == "r: 8").unwrap();
        let wrong = error(&yaml.replace("r: 8\n", "r: eight\n"));
        assert!(wrong.contains(&format!("line {line}")), "{wrong}");
        let unknown = error(&format!("{yaml}force: true\n"));
        assert!(unknown.contains("unknown field `force`"), "{unknown}");
    }

    #[test]
    fn problems_are_called_by_their_keys() {
        let mut config = TrainConfig::new(Method::Lora, "m", "d", "o");
        assert_eq!(config.problems(), [""; 0]);
        config.options.lora.r = 0;
        config.max_seq_length = 0;
        config.share_prompts = true;
        config.batch_size = 1;
        config.load_best_model_at_end = true;
        assert_eq!(
            config.problems(),
            [
                "max_seq_length must be 1 or greater, not 0",
                "r must be from 1 to 65536, not 0",
                "load_best_model_at_end needs eval_steps: without it the only evaluation is at the end",
                "share_prompts needs a batch_size of 2 or more: a prompt is shared by rows of a batch",
            ]
        );
    }

    #[cfg(feature = "clap")]
    #[test]
    fn the_flags_defaults_are_the_fields() {
        use clap::{Args, FromArgMatches};
        let command = TrainConfig::augment_args(clap::Command::new("train"));
        let matches = command.try_get_matches_from(["train"]).unwrap();
        let parsed = TrainConfig::from_arg_matches(&matches).unwrap();
        let fields = TrainConfig {
            output: ".".into(),
            data: ".".into(),
            ..TrainConfig::default()
        };
        assert_eq!(parsed, fields);
    }
}
