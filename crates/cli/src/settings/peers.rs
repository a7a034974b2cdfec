//! Names that people bring along from other programs, and what they are called here.
//!
//! The sources are mlx-lm's command line, axolotl's and LLaMA-Factory's files and transformers' `TrainingArguments`.

use lowrank::tuning::Method;

/// What to tell someone who typed another program's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// The setting is called something else here.
    Key(&'static str),
    /// It is called something else here, and the rest must be said too.
    KeyBut(&'static str, &'static str),
    /// There is no such setting; a sentence says what to do instead.
    Say(&'static str),
    /// The methods are to be listed.
    Methods,
}

use Advice::{Key, KeyBut, Methods, Say};

impl Advice {
    /// The advice for a key of a file.
    pub fn for_key(self) -> String {
        self.text(|key| format!("`{key}`"))
    }

    /// The advice for a flag.
    pub fn for_flag(self) -> String {
        self.text(super::flag)
    }

    fn text(self, write: impl Fn(&str) -> String) -> String {
        match self {
            Key(key) => format!("this setting is called {} here", write(key)),
            KeyBut(key, note) => format!("this setting is called {} here; {note}", write(key)),
            Say(text) => text.to_string(),
            Methods => format!(
                "method is {}; to start from an existing adapter give init_adapter",
                methods()
            ),
        }
    }
}

/// `lora`, `full` or `top`.
fn methods() -> String {
    let names = Method::ALL.map(|method| format!("`{}`", method.name()));
    let (last, most) = names.split_last().expect("there are methods");
    format!("{} or {last}", most.join(", "))
}

/// What is known about a name. A name may stand for several settings, of which the first that is `known` counts.
pub fn advice(name: &str, known: impl Fn(&str) -> bool) -> Option<Advice> {
    let normal = name
        .trim_start_matches('-')
        .to_lowercase()
        .replace('-', "_");
    PEERS
        .iter()
        .filter(|(peer, _)| *peer == normal)
        .map(|(_, advice)| *advice)
        .find(|advice| match advice {
            Key(key) | KeyBut(key, _) => known(key),
            Say(_) | Methods => true,
        })
}

const ITERATIONS: &str =
    "it counts optimizer steps, each over batch_size × gradient_accumulation_steps rows";
const MASKED: &str = "loss falls on completions alone unless this is set";
const DTYPE: &str = "the frozen base is stored as bf16 or f32, and what is trained is always f32";
const NO_GRADIENT_CHECKPOINTING: &str =
    "there is no such setting: backward keeps only what it needs";
const ADAMW: &str =
    "the optimizer is always AdamW; adam_beta1, adam_beta2, adam_epsilon and weight_decay set it";
const LOAD_IN: &str = "its value is 4bit or 8bit";
const PACKED: &str = "there is no such setting: examples are never padded and never see each other";
const TRACKER: &str =
    "metrics.jsonl and report.html in the output folder hold every figure; no service is contacted";
const INVOCATION: &str = "this is said on the command line and is not a setting of the file";
const CHAT_TEMPLATE: &str =
    "the model folder's own chat template is used; change chat_template.jinja there";

/// Sorted by name, so that a second entry is not overlooked; the order of equal names counts.
const PEERS: &[(&str, Advice)] = &[
    ("adam_eps", Key("adam_epsilon")),
    ("adapter", Methods),
    ("adapter_file", Key("init_adapter")),
    ("adapter_name_or_path", Key("init_adapter")),
    ("adapter_path", Key("output")),
    ("adapter_path", Key("adapter")),
    ("alpha", Key("lora_alpha")),
    ("base_model", Key("model")),
    ("bf16", KeyBut("base_dtype", DTYPE)),
    ("chat_template", Say(CHAT_TEMPLATE)),
    ("clip_grad_norm", Key("max_grad_norm")),
    ("config", Say(INVOCATION)),
    ("cutoff_len", Key("max_seq_length")),
    ("dataset", Key("data")),
    ("dataset_name", Key("data")),
    ("dataset_path", Key("data")),
    ("datasets", KeyBut("data", "it is one file or one folder")),
    ("dropout", Key("lora_dropout")),
    ("dtype", KeyBut("base_dtype", DTYPE)),
    ("epochs", Key("num_train_epochs")),
    ("eval_dataset", Key("valid_data")),
    (
        "evals_per_epoch",
        KeyBut("eval_steps", "it counts optimizer steps"),
    ),
    (
        "eval_strategy",
        KeyBut("eval_steps", "it counts optimizer steps"),
    ),
    (
        "evaluation_strategy",
        KeyBut("eval_steps", "it counts optimizer steps"),
    ),
    ("fine_tune_type", Key("method")),
    ("finetuning_type", Key("method")),
    ("fp16", KeyBut("base_dtype", DTYPE)),
    (
        "grad_accumulation_steps",
        Key("gradient_accumulation_steps"),
    ),
    ("grad_checkpoint", Say(NO_GRADIENT_CHECKPOINTING)),
    ("grad_clip", Key("max_grad_norm")),
    ("gradient_checkpointing", Say(NO_GRADIENT_CHECKPOINTING)),
    (
        "ignore_chat_template",
        Say("prompts are used as they are unless --chat-template is given"),
    ),
    ("init_lora", Key("init_lora_weights")),
    ("iters", KeyBut("max_steps", ITERATIONS)),
    ("json", Say(INVOCATION)),
    ("label_smoothing", Key("label_smoothing_factor")),
    ("load_in_4bit", KeyBut("load_in", LOAD_IN)),
    ("load_in_8bit", KeyBut("load_in", LOAD_IN)),
    (
        "logging_steps",
        Say("every step is logged to metrics.jsonl"),
    ),
    ("lora_modules_to_save", Key("modules_to_save")),
    ("lora_r", Key("r")),
    ("lora_rank", Key("r")),
    ("lora_target", Key("target_modules")),
    (
        "lora_target_linear",
        KeyBut("target_modules", "its value is then `all-linear`"),
    ),
    ("lora_target_modules", Key("target_modules")),
    (
        "loraplus_lr_embedding",
        KeyBut(
            "lr_pattern",
            "there are no A and B of embeddings; rows of tokens are matched by `token_adapter`",
        ),
    ),
    ("loraplus_ratio", Key("loraplus_lr_ratio")),
    ("lr", Key("learning_rate")),
    ("lr_schedule", Key("lr_scheduler_type")),
    ("lr_scheduler", Key("lr_scheduler_type")),
    ("mask_prompt", KeyBut("train_on_prompt", MASKED)),
    ("max_length", Key("max_seq_length")),
    ("max_length", Key("max_new_tokens")),
    ("max_new_token", Key("max_new_tokens")),
    ("max_seq_len", Key("max_seq_length")),
    ("max_tokens", Key("max_new_tokens")),
    ("micro_batch_size", Key("batch_size")),
    ("model_dir", Key("model")),
    ("model_name", Key("model")),
    ("model_name_or_path", Key("model")),
    ("model_path", Key("model")),
    ("network_timeout", Say(INVOCATION)),
    ("no_mask_prompt", Key("train_on_prompt")),
    ("num_epochs", Key("num_train_epochs")),
    ("num_iters", KeyBut("max_steps", ITERATIONS)),
    (
        "num_layers",
        Say("layers are chosen through target_modules, for example with a regular expression"),
    ),
    ("num_warmup_steps", Key("warmup_steps")),
    ("optim", Say(ADAMW)),
    ("optimizer", Say(ADAMW)),
    ("out_dir", Key("output")),
    ("output_dir", Key("output")),
    ("overwrite", Say(INVOCATION)),
    (
        "overwrite_output_dir",
        Say("give --overwrite on the command line"),
    ),
    ("packing", Say(PACKED)),
    ("pad_to_sequence_len", Say(PACKED)),
    ("patience", Key("early_stopping_patience")),
    ("peft_use_dora", Key("use_dora")),
    ("per_device_eval_batch_size", Key("batch_size")),
    ("per_device_train_batch_size", Key("batch_size")),
    ("pipeline_stages", Say(INVOCATION)),
    ("print_config", Say(INVOCATION)),
    ("quantization_bit", KeyBut("load_in", LOAD_IN)),
    ("rank", Key("r")),
    ("ranks_per_node", Say(INVOCATION)),
    ("report_to", Say(TRACKER)),
    ("resume", Say(INVOCATION)),
    (
        "resume_adapter_file",
        KeyBut(
            "init_adapter",
            "to go on with a run that stopped, give --resume",
        ),
    ),
    (
        "resume_from_checkpoint",
        Say("give --resume on the command line"),
    ),
    ("rslora", Key("use_rslora")),
    ("sample_packing", Say(PACKED)),
    ("save_every", Key("save_steps")),
    (
        "saves_per_epoch",
        KeyBut("save_steps", "it counts optimizer steps"),
    ),
    ("scheduler", Key("lr_scheduler_type")),
    ("sequence_len", Key("max_seq_length")),
    ("steps", Key("max_steps")),
    ("steps_per_eval", Key("eval_steps")),
    (
        "steps_per_report",
        Say("every step is logged to metrics.jsonl"),
    ),
    ("temp", Key("temperature")),
    ("test_data", Key("data")),
    (
        "train",
        Say("training is the command `lowrank train`; the rows are given with --data"),
    ),
    ("train_batch_size", Key("batch_size")),
    ("train_file", Key("data")),
    ("train_on_inputs", Key("train_on_prompt")),
    ("train_data", Key("data")),
    ("val_data", Key("valid_data")),
    ("val_file", Key("valid_data")),
    (
        "val_set_size",
        Say(
            "put the held-out rows into valid.jsonl beside train.jsonl, or name them with valid_data",
        ),
    ),
    ("validation_file", Key("valid_data")),
    ("wandb_project", Say(TRACKER)),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{object, train::defaults};

    #[test]
    fn every_key_that_is_named_exists() {
        let mut known: Vec<String> = object(&defaults())
            .unwrap()
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        known.extend(["adapter", "max_new_tokens", "temperature"].map(String::from));
        for (peer, advice) in PEERS {
            assert!(
                !known.iter().any(|ours| ours == peer) || *peer == "adapter",
                "{peer} is a key of ours"
            );
            if let Key(key) | KeyBut(key, _) = advice {
                assert!(
                    known.iter().any(|ours| ours == key),
                    "{peer}: {key} is no key"
                );
            }
        }
    }

    #[test]
    fn advice_is_written_as_key_or_flag() {
        let all = |_: &str| true;
        assert_eq!(
            advice("--lora-rank", all).unwrap().for_flag(),
            "this setting is called --r here"
        );
        assert_eq!(
            advice("lora_r", all).unwrap().for_key(),
            "this setting is called `r` here"
        );
        assert_eq!(
            advice("adapter_path", |key| key == "adapter"),
            Some(Key("adapter"))
        );
        assert_eq!(advice("no_such_thing", all), None);
    }
}
