//! The settings of `lowrank train`.
//!
//! [`TrainSettings`] has a field for every key; a field that stays `None` is decided later, by the method, by the
//! model or by leaving something out. [`TrainSettings::resolve`] checks all of them and what they mean together.

mod checks;

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{ArgAction, Args, FromArgMatches};
use lowrank::data::{Boundary, OnBadRow};
use lowrank::model::Recompute;
use lowrank::train::{BaseDtype, SchedulerType};
use lowrank::tuning::lora::InitLoraWeights;
use lowrank::tuning::prefix;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::method::{LORA, MethodSettings, OTHERS};
use super::values::{ByteSize, finite, finite_pattern, pattern_map};
use super::{Layered, Settings, object};
use crate::failure::Misuse;

const DATA: &str = "Data";
const OPTIMIZATION: &str = "Optimization";
const SAVING: &str = "Evaluation and checkpoints";
const MACHINE: &str = "Machine";

/// Every setting of a training run. The flag of `learning_rate` is `--learning-rate`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of its own")]
pub struct TrainSettings {
    /// The base model: a folder in the Hugging Face layout, an id of the Hub, or builtin:tiny (required)
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// The run's folder, which must not exist yet (required)
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,

    /// Start from this adapter of an earlier run; the method's options are then its own
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,

    /// Rows to train on: a folder with train.jsonl and maybe valid.jsonl, one file, or - for standard input (required)
    #[arg(long, value_name = "PATH", help_heading = DATA)]
    pub data: Option<PathBuf>,

    /// Held-out rows, where they are not valid.jsonl beside the others
    #[arg(long, value_name = "FILE", help_heading = DATA)]
    pub valid_data: Option<PathBuf>,

    /// Cut longer rows to so many tokens, from the end
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, help_heading = DATA)]
    pub max_seq_length: usize,

    /// Let the loss fall on prompts too, not on completions alone
    #[arg(long, value_name = "BOOL", help_heading = DATA, action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value_t = false, hide_default_value = true,
        hide_possible_values = true)]
    pub train_on_prompt: bool,

    /// What to do with a row that cannot be used
    #[arg(long, value_name = "WHAT", default_value = "error", help_heading = DATA)]
    pub on_bad_row: OnBadRow,

    /// Encode prompt and completion as one text, as TRL does, or each by itself
    #[arg(long, value_name = "HOW", default_value = "joint", help_heading = DATA)]
    pub completion_boundary: Boundary,

    /// Keep the rows in the order of the file (key: shuffle)
    #[arg(long = "no-shuffle", value_name = "BOOL", help_heading = DATA, action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true,
        value_parser = parse_negated)]
    pub shuffle: bool,

    /// What is trained
    #[command(flatten)]
    #[serde(flatten)]
    pub trained: MethodSettings,

    /// The change of a weight is scaled by lora_alpha / r
    #[arg(long, value_parser = finite::<f64>, value_name = "X", default_value_t = 16.0, help_heading = LORA)]
    pub lora_alpha: f64,

    /// Dropout on what goes into A
    #[arg(long, value_parser = finite::<f64>, value_name = "P", default_value_t = 0.0, help_heading = LORA)]
    pub lora_dropout: f64,

    /// Another lora_alpha for modules that match a pattern; may be repeated
    #[arg(long, value_name = "PATTERN=X", value_parser = finite_pattern, help_heading = LORA)]
    #[serde(with = "pattern_map")]
    pub alpha_pattern: Vec<(String, f64)>,

    /// How A and B begin
    #[arg(long, value_name = "HOW", default_value = "gaussian", help_heading = LORA)]
    pub init_lora_weights: InitLoraWeights,

    /// Scale by lora_alpha / √r instead
    #[arg(long, value_name = "BOOL", help_heading = LORA, action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value_t = false, hide_default_value = true,
        hide_possible_values = true)]
    pub use_rslora: bool,

    /// What virtual tokens begin as
    #[arg(long, value_name = "INIT", default_value = "text", help_heading = OTHERS)]
    pub prefix_init: prefix::Init,

    /// The highest learning rate [default: 2e-4; full 2e-5, top 5e-5, bitfit and adapter 1e-3, prefix 1e-2]
    #[arg(long, value_parser = finite::<f64>, value_name = "X", help_heading = OPTIMIZATION)]
    pub learning_rate: Option<f64>,

    /// How the learning rate falls
    #[arg(long, value_name = "TYPE", default_value = "linear", help_heading = OPTIMIZATION)]
    pub lr_scheduler_type: SchedulerType,

    /// Steps over which the learning rate rises from zero
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = OPTIMIZATION)]
    pub warmup_steps: u64,

    /// The same as a share of all steps, used where warmup_steps is 0
    #[arg(long, value_parser = finite::<f64>, value_name = "P", default_value_t = 0.0, conflicts_with = "warmup_steps", help_heading = OPTIMIZATION)]
    pub warmup_ratio: f64,

    /// Decoupled weight decay on everything that is trained
    #[arg(long, value_parser = finite::<f64>, value_name = "X", default_value_t = 0.0, help_heading = OPTIMIZATION)]
    pub weight_decay: f64,

    /// AdamW's decay of the first moment
    #[arg(long, value_parser = finite::<f64>, value_name = "X", default_value_t = 0.9, help_heading = OPTIMIZATION)]
    pub adam_beta1: f64,

    /// AdamW's decay of the second moment
    #[arg(long, value_parser = finite::<f64>, value_name = "X", default_value_t = 0.999, help_heading = OPTIMIZATION)]
    pub adam_beta2: f64,

    /// AdamW's epsilon
    #[arg(long, value_parser = finite::<f64>, value_name = "X", default_value = "1e-8", help_heading = OPTIMIZATION)]
    pub adam_epsilon: f64,

    /// Scale gradients down to this norm; 0 turns it off
    #[arg(long, value_parser = finite::<f64>, value_name = "X", default_value_t = 1.0, help_heading = OPTIMIZATION)]
    pub max_grad_norm: f64,

    /// Share of the target's probability that is spread over all tokens
    #[arg(long, value_parser = finite::<f64>, value_name = "P", default_value_t = 0.0, help_heading = OPTIMIZATION)]
    pub label_smoothing_factor: f64,

    /// Rows computed at a time
    #[arg(long, value_name = "ROWS", default_value_t = 8, help_heading = OPTIMIZATION)]
    pub batch_size: usize,

    /// Batches of an optimizer step
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = OPTIMIZATION)]
    pub gradient_accumulation_steps: usize,

    /// Compute a prompt once for all rows of a batch that have it, and put such rows side by side
    #[arg(long, value_name = "BOOL", help_heading = OPTIMIZATION, action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value_t = false, hide_default_value = true,
        hide_possible_values = true)]
    pub share_prompts: bool,

    /// Passes over the rows
    #[arg(long, value_parser = finite::<f64>, value_name = "X", default_value_t = 3.0, help_heading = OPTIMIZATION)]
    pub num_train_epochs: f64,

    /// Optimizer steps, instead of passes over the rows
    #[arg(long, value_name = "N", conflicts_with = "num_train_epochs", help_heading = OPTIMIZATION)]
    pub max_steps: Option<u64>,

    /// Decides the start, the order of the rows and dropout
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = OPTIMIZATION)]
    pub seed: u64,

    /// Evaluate the held-out rows every so many steps, not at the end alone
    #[arg(long, value_name = "N", help_heading = SAVING)]
    pub eval_steps: Option<u64>,

    /// Write a checkpoint every so many steps and at the end
    #[arg(long, value_name = "N", help_heading = SAVING)]
    pub save_steps: Option<u64>,

    /// Keep only so many checkpoints, the latest
    #[arg(long, value_name = "N", help_heading = SAVING)]
    pub save_total_limit: Option<usize>,

    /// Finish with the weights whose held-out loss was the lowest
    #[arg(long, value_name = "BOOL", help_heading = SAVING, action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value_t = false, hide_default_value = true,
        hide_possible_values = true)]
    pub load_best_model_at_end: bool,

    /// Stop after so many evaluations without a new lowest loss
    #[arg(long, value_name = "N", help_heading = SAVING)]
    pub early_stopping_patience: Option<usize>,

    /// What a block computes again in the backward instead of keeping it [default: as little as the memory allows]
    #[arg(long, value_name = "WHAT", help_heading = MACHINE)]
    pub recompute: Option<Recompute>,

    /// Memory that the run may take, such as 2GiB [default: what the machine has free]
    #[arg(long, value_name = "SIZE", help_heading = MACHINE)]
    pub memory_budget: Option<ByteSize>,

    /// How the frozen weights are stored
    #[arg(long, value_name = "DTYPE", default_value = "bf16", help_heading = MACHINE)]
    pub base_dtype: BaseDtype,

    /// Threads to compute with [default: one a core]
    #[arg(long, value_name = "N", help_heading = MACHINE)]
    pub threads: Option<usize>,
}

impl Settings for TrainSettings {
    fn displaces(key: &str) -> &'static [&'static str] {
        match key {
            "num_train_epochs" => &["max_steps"],
            "warmup_ratio" => &["warmup_steps"],
            _ => &[],
        }
    }
}

/// Settings that have been checked; everything that can be decided without the model and the data is.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// Where the run is written.
    pub output: PathBuf,
    /// Every setting under its key, as `config.yaml` holds them.
    pub values: Map<String, Value>,
    /// Keys that the user gave, rather than left to their defaults.
    pub given: BTreeSet<String>,
}

impl TrainSettings {
    /// The defaults.
    pub fn defaults() -> Self {
        let matches =
            Self::augment_args(clap::Command::new("train")).try_get_matches_from(["train"]);
        matches
            .and_then(|matches| Self::from_arg_matches(&matches))
            .expect("the defaults are values of their settings")
    }

    /// Checks every setting and the combinations of them.
    ///
    /// # Errors
    /// With every problem that was found, those of the layers included.
    pub fn resolve(layered: Layered<Self>) -> Result<Resolved, Misuse> {
        let mut problems = layered.problems.clone();
        let mut layered = layered;
        layered.adopt_adapter(&mut problems);
        layered.check_ranges(&mut problems);
        layered.check_combinations(&mut problems);
        layered.check_paths(&mut problems);
        let mut settings = layered.settings;
        let method = settings.trained.method;
        settings.learning_rate.get_or_insert(method.learning_rate());
        let values = object(&settings).unwrap_or_else(|problem| {
            problems.push(problem);
            Map::new()
        });
        problems.or(Resolved {
            output: settings.output.unwrap_or_default(),
            values,
            given: layered.given,
        })
    }
}

/// `--no-shuffle` is the key `shuffle` turned round.
fn parse_negated(text: &str) -> Result<bool, String> {
    text.parse::<bool>()
        .map(|value| !value)
        .map_err(|_| "expected true or false".to_string())
}

#[cfg(test)]
mod tests {
    use super::super::{File, layer};
    use super::*;
    use lowrank::tuning::lora::Targets;

    fn layered(flags: &[&str], yaml: &str) -> Layered<TrainSettings> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.yaml");
        std::fs::write(&path, yaml).unwrap();
        let command = TrainSettings::augment_args(clap::Command::new("train"));
        let matches = command.get_matches_from([&["train"], flags].concat());
        let parsed = TrainSettings::from_arg_matches(&matches).unwrap();
        layer(parsed, &matches, vec![File::read(&path).unwrap()])
    }

    fn problems(flags: &[&str], yaml: &str) -> String {
        TrainSettings::resolve(layered(flags, yaml))
            .unwrap_err()
            .to_string()
    }

    const WHOLE: [&str; 6] = [
        "--model",
        "builtin:tiny",
        "--data",
        ".",
        "--output",
        "runs/x",
    ];

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let yaml = "learning_rate: 1e-4\nr: 4\ntarget_modules: [q_proj]\nrank_pattern: {b: 2, a: 3}\nshuffle: false\n\
                    init_lora_weights: true\nmax_steps: 50\nwarmup_steps: 7\n";
        let s = layered(
            &["--r", "2", "--num-train-epochs", "1", "--warmup-ratio=0.1"],
            yaml,
        );
        assert_eq!(s.problems.problems(), [""; 0]);
        let s = s.settings;
        assert_eq!(
            (s.trained.r, s.learning_rate, s.batch_size),
            (2, Some(1e-4), 8)
        );
        assert_eq!(
            s.trained.target_modules,
            Some(Targets::Names(vec!["q_proj".to_string()]))
        );
        assert_eq!(
            s.trained.rank_pattern,
            [("b".to_string(), 2), ("a".to_string(), 3)]
        );
        assert_eq!(
            (s.shuffle, s.init_lora_weights),
            (false, InitLoraWeights::KaimingUniform)
        );
        assert_eq!((s.max_steps, s.num_train_epochs), (None, 1.0));
        assert_eq!((s.warmup_steps, s.warmup_ratio), (0, 0.1));
    }

    #[test]
    fn switches_can_be_turned_off_again() {
        let yaml = "use_rslora: true\nshuffle: false\ntrain_on_prompt: true";
        let s = layered(&["--use-rslora=false", "--no-shuffle=false"], yaml).settings;
        assert_eq!(
            (s.use_rslora, s.shuffle, s.train_on_prompt),
            (false, true, true)
        );
        let s = layered(&["--use-rslora", "--no-shuffle"], "").settings;
        assert_eq!((s.use_rslora, s.shuffle), (true, false));
    }

    #[test]
    fn what_was_resolved_reads_back_as_the_same() {
        let flags = [
            &WHOLE[..],
            &[
                "--rank-pattern",
                "a.*=2",
                "--max-steps=9",
                "--init-lora-weights=false",
            ],
        ]
        .concat();
        let resolved = TrainSettings::resolve(layered(&flags, "")).unwrap();
        let yaml = serde_saphyr::to_string(&resolved.values).unwrap();
        let again = TrainSettings::resolve(layered(&[], &yaml)).unwrap();
        assert_eq!(again.values, resolved.values);
        assert_eq!(resolved.given.len(), 6);
    }

    #[test]
    fn the_method_decides_the_learning_rate() {
        let rate = |flags: &[&str]| {
            let resolved = TrainSettings::resolve(layered(&[&WHOLE, flags].concat(), "")).unwrap();
            resolved.values["learning_rate"].as_f64().unwrap()
        };
        assert_eq!(rate(&[]), 2e-4);
        assert_eq!(rate(&["--method=full"]), 2e-5);
        assert_eq!(rate(&["--method=full", "--learning-rate=1"]), 1.0);
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        insta::assert_snapshot!(problems(
            &["--batch-size=0", "--data=nowhere"],
            "lora_dropout: 1\nlearning_rate: fast\nlearing_rate: 1\niters: 100\nseed: -1\nuse_rslora: 3\nwandb: x\n\
             early_stopping_patience: 2\ntarget_modules: []\n",
        ), @r#"
        13 problems with the settings:
          - learning_rate (in run.yaml): got string "fast", expected a number
          - learing_rate (in run.yaml) is not a setting; did you mean learning_rate?
          - iters (in run.yaml): this setting is called `max_steps` here; it counts optimizer steps, each over batch_size × gradient_accumulation_steps rows
          - seed (in run.yaml): got the number `-1`, expected a whole number
          - use_rslora (in run.yaml): got the number `3`, expected true or false
          - wandb (in run.yaml) is not a setting; `lowrank train --help` lists them
          - lora_dropout (in run.yaml) must be at least 0 and less than 1, not 1
          - --batch-size must be 1 or greater, not 0
          - early_stopping_patience (in run.yaml) needs --eval-steps: without it the only evaluation is at the end
          - target_modules (in run.yaml) names no module
          - --model is missing: give a model folder, an id of the Hugging Face Hub, or builtin:tiny
          - --output is missing: give the folder to write the adapter to
          - --data: nowhere does not exist
        "#);
    }

    #[test]
    fn settings_that_would_do_nothing_are_refused() {
        let text = problems(
            &[&WHOLE[..], &["--method=full", "--r=4"]].concat(),
            "lora_alpha: 3\nlora_dropout: 0\n",
        );
        insta::assert_snapshot!(text, @r#"
        2 problems with the settings:
          - --r does nothing with the method full; leave it out
          - lora_alpha (in run.yaml) does nothing with the method full; leave it out
        "#);
    }

    #[test]
    fn prompts_are_shared_within_a_batch() {
        let text = problems(
            &[&WHOLE[..], &["--share-prompts"]].concat(),
            "batch_size: 1\ngradient_accumulation_steps: 8\n",
        );
        insta::assert_snapshot!(
            text,
            @"--share-prompts needs a --batch-size of 2 or more: a prompt is shared by rows of a batch"
        );
        let flags = [&WHOLE[..], &["--share-prompts"]].concat();
        let resolved = TrainSettings::resolve(layered(&flags, "")).unwrap();
        assert_eq!(resolved.values["share_prompts"], true);
    }

    #[test]
    fn an_adapter_to_start_from_decides() {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"],
            "rank_pattern": {"k": 2}, "exclude_modules": null}"#;
        std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        let path = folder.path().display().to_string();
        let flags = |more: &[&str]| {
            [&WHOLE[..], &["--init-adapter", &path], more]
                .concat()
                .join("\n")
        };
        let resolve = |flags: String| {
            TrainSettings::resolve(layered(&flags.split('\n').collect::<Vec<_>>(), ""))
                .map_err(|error| error.to_string())
        };
        let values = resolve(flags(&["--target-modules", "q_proj,v_proj"]))
            .unwrap()
            .values;
        assert_eq!(
            (&values["r"], &values["lora_alpha"]),
            (&Value::from(4), &Value::from(32.0))
        );
        assert_eq!(
            values["target_modules"],
            serde_json::json!(["v_proj", "q_proj"])
        );
        assert_eq!(values["rank_pattern"], serde_json::json!({"k": 2}));
        let text = resolve(flags(&["--r=8", "--use-rslora"])).unwrap_err();
        insta::assert_snapshot!(text, @r#"
        2 problems with the settings:
          - --r is 8, and the adapter to start from has 4, which cannot be changed; leave it out
          - --use-rslora is true, and the adapter to start from has false, which cannot be changed; leave it out
        "#);
    }

    #[test]
    fn numbers_must_be_usable() {
        for value in [".nan", ".inf", "-.INF", "1e999"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("run.yaml");
            std::fs::write(&path, format!("r: 4\nlearning_rate: {value}\n")).unwrap();
            let text = File::read(&path).unwrap_err().to_string();
            let expected =
                format!("line 2 (`learning_rate: {value}`): {value} is not a finite number");
            assert!(text.ends_with(&expected), "{text}");
        }
        for value in ["nan", "\"inf\""] {
            let text = problems(&WHOLE, &format!("learning_rate: {value}"));
            assert!(text.starts_with("learning_rate (in run.yaml): got string"));
        }
        let flags = [
            "--adam-epsilon=1e-60",
            "--adam-beta2=0.9999999999",
            "--lora-alpha=1e300",
        ];
        insta::assert_snapshot!(problems(&[&WHOLE[..], &flags].concat(), ""), @r"
        3 problems with the settings:
          - --lora-alpha must be greater than 0, and no larger than 3.4e38, the largest 32-bit number; it is 1e300
          - --adam-beta2 must be at least 0 and less than 1, not 0.9999999999, which is 1 as a 32-bit number
          - --adam-epsilon must be greater than 0, not 1e-60, which is 0 as a 32-bit number
        ");
    }

    #[test]
    fn files_that_are_no_settings_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.yaml");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            File::read(&path)
                .map(|file| file.values.len())
                .map_err(|error| error.to_string())
        };
        assert_eq!(read(b""), Ok(0));
        assert_eq!(read(b"# nothing yet\n"), Ok(0));
        assert_eq!(read(b"{\"r\": 4}"), Ok(1));
        assert!(
            read(b"- r\n")
                .unwrap_err()
                .contains("must hold lines of the form `key: value`")
        );
        assert!(read(b"r: [1\n").unwrap_err().contains("is not valid YAML"));
        assert!(
            read(b"r: 1\nr: 2\n")
                .unwrap_err()
                .contains("is not valid YAML")
        );
        assert!(read(b"r: \xff\n").unwrap_err().contains("is not UTF-8"));
        assert!(
            File::read(&folder.path().join("none.yaml"))
                .unwrap_err()
                .to_string()
                .contains("cannot read")
        );
    }
}
