//! Small models, data and runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lowrank::DType;
use lowrank::base::Source;
use lowrank::data::Example;
use lowrank::merge::{MergeOptions, MergeReport, merge};
use lowrank::model::{Adapter, AdapterSet, Batch, Decoder, Weights};
use lowrank::train::{BaseDtype, Event, Observer, Outcome, Start, TrainConfig, train};
use lowrank::tuning::Method;
use lowrank::tuning::lora::{self, InitLoraWeights};
use lowrank::{Error, Workspace};
use lowrank_formats::checkpoint::Checkpoint;
use lowrank_formats::peft::{LoraConfig, TargetModules};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Every architecture's golden model.
pub(crate) const FAMILIES: [&str; 15] = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "smollm3",
    "granite",
    "olmo2",
    "olmo3",
    "phi3",
    "ministral3",
    "glm4",
    "gpt2",
];

/// Where a golden model lies; it has no tokenizer.
pub(crate) fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(family)
}

/// The network of a golden model, f32.
pub(crate) fn decoder(family: &str) -> Arc<Decoder> {
    open(&golden(family))
}

/// The network in a folder, f32.
pub(crate) fn open(folder: &Path) -> Arc<Decoder> {
    Decoder::new(Weights::load(folder, DType::F32).expect("the model loads"))
}

/// A folder to work in, with a model and its data.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    /// A copy of a golden model with a tokenizer of one token a character, and 11 training and 4 held-out rows.
    pub(crate) fn new(family: &str) -> Self {
        let place = Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
        };
        let model = place.path("model");
        fs::create_dir(&model).expect("a folder for the model");
        for name in ["config.json", "model.safetensors"] {
            fs::copy(golden(family).join(name), model.join(name)).expect("the golden model");
        }
        write_tokenizer(&model, 96);
        fs::create_dir(place.path("data")).expect("a folder for the data");
        place.write_rows("train.jsonl", 11, 0);
        place.write_rows("valid.jsonl", 4, 100);
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Rows of 13 to 25 tokens; another `first` gives other rows.
    pub(crate) fn write_rows(&self, name: &str, count: usize, first: usize) {
        let rows: Vec<String> = (first..first + count)
            .map(|n| {
                let prompt = format!("say {n} {}", "x".repeat(n % 5));
                let completion = format!("{n} and {}", "yes ".repeat(1 + n % 3));
                json!({"prompt": prompt, "completion": completion}).to_string()
            })
            .collect();
        fs::write(self.path("data").join(name), rows.join("\n")).expect("the rows are written");
    }

    /// Training rows of 15 to 23 tokens that take turns with `prompts` prompts.
    pub(crate) fn write_rows_with_prompts(&self, count: usize, prompts: usize) {
        let rows: Vec<String> = (0..count)
            .map(|n| {
                let prompt = format!("name a thing {}", n % prompts);
                let completion = format!("{n}{}", "!".repeat(n % 7));
                json!({"prompt": prompt, "completion": completion}).to_string()
            })
            .collect();
        fs::write(self.path("data").join("train.jsonl"), rows.join("\n")).expect("the rows");
    }

    /// Held-out rows of other letters than the training rows', so that training makes them worse from its first step.
    pub(crate) fn write_contrary_valid(&self) {
        let row = json!({"prompt": "say 1", "completion": "ZQXJ KVWY ZZQQ"});
        fs::write(self.path("data").join("valid.jsonl"), format!("{row}\n")).expect("the row");
    }

    /// A short run on everything that must be remembered: dropout, shuffling, epochs, accumulation, warm-up.
    /// 11 rows in steps of 4 are 3 steps an epoch, so 9 in all.
    pub(crate) fn config(&self, method: Method, run: &str) -> TrainConfig {
        let mut config = TrainConfig {
            learning_rate: 1e-2,
            batch_size: 2,
            gradient_accumulation_steps: 2,
            warmup_steps: 2,
            weight_decay: 0.01,
            label_smoothing_factor: 0.1,
            eval_steps: Some(2),
            base_dtype: BaseDtype::F32,
            ..TrainConfig::new(
                method,
                self.path("model").display().to_string(),
                self.path("data"),
                self.path(run),
            )
        };
        if method == Method::Lora {
            config.options.lora.lora_dropout = 0.2;
        }
        config.options.lora.r = 4;
        config.options.adapter.bottleneck = 4;
        config
    }

    /// The files of a folder, sorted.
    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.path(name))
            .expect("the folder is there")
            .map(|entry| {
                let name = entry.expect("an entry").file_name();
                name.into_string().expect("a readable name")
            })
            .collect();
        names.sort();
        names
    }
}

/// A tokenizer of `size` tokens: three special ones, then a character each.
pub(crate) fn write_tokenizer(folder: &Path, size: u32) {
    let special = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].iter().enumerate() {
        vocab.insert((*token).to_owned(), id.into());
    }
    for id in 3..size {
        let token = char::from_u32(u32::from(b' ') + id - 3).expect("a character");
        vocab.insert(token.to_string(), id.into());
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    });
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"});
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("a tokenizer");
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).expect("its config");
    fs::write(
        folder.join("chat_template.jinja"),
        "{{ messages[0].content }}\n",
    )
    .expect("a template");
}

/// Keeps what a run says, and stops it after a step.
#[derive(Default)]
pub(crate) struct Watch {
    stop: AtomicBool,
    stop_after: Option<u64>,
    pub(crate) notes: Vec<String>,
    pub(crate) trainable_parameters: usize,
}

struct Watching<'a> {
    watch: &'a AtomicBool,
    stop_after: Option<u64>,
    notes: &'a mut Vec<String>,
    trainable_parameters: &'a mut usize,
}

impl Observer for Watching<'_> {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Step(step) if Some(step.step) == self.stop_after => {
                self.watch.store(true, Ordering::Relaxed);
            }
            Event::Note(text) => self.notes.push(text.clone()),
            Event::Start {
                trainable_parameters,
                ..
            } => *self.trainable_parameters = *trainable_parameters,
            _ => {}
        }
    }
}

impl Watch {
    pub(crate) fn stopping_after(step: u64) -> Self {
        Self {
            stop_after: Some(step),
            ..Self::default()
        }
    }

    /// Stops as soon as the run looks.
    pub(crate) fn stopped() -> Self {
        Self {
            stop: AtomicBool::new(true),
            ..Self::default()
        }
    }

    pub(crate) fn train(&mut self, config: &TrainConfig, start: Start) -> Result<Outcome, Error> {
        let mut observer = Watching {
            watch: &self.stop,
            stop_after: self.stop_after,
            notes: &mut self.notes,
            trainable_parameters: &mut self.trainable_parameters,
        };
        train(config, start, &mut observer, &self.stop)
    }
}

/// A fresh run from beginning to end.
pub(crate) fn run(config: &TrainConfig) -> Result<Outcome, Error> {
    Watch::default().train(config, Start::Fresh { overwrite: false })
}

/// What a run that has to fail says.
pub(crate) fn failure<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("this had to fail"),
        Err(error) => error.to_string(),
    }
}

/// Fails unless every word stands in the text.
pub(crate) fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}

/// The lines of a run's metrics.jsonl.
pub(crate) fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics.jsonl");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a line of JSON"))
        .collect()
}

/// The lines of metrics.jsonl without what depends on the clock and on the process.
pub(crate) fn timeless(run: &Path) -> Vec<Value> {
    let mut lines = metrics(run);
    for line in &mut lines {
        let line = line.as_object_mut().expect("an object");
        line.remove("tokens_per_second");
        line.remove("peak_rss");
    }
    lines
}

/// The tensors of a safetensors file.
pub(crate) fn tensors(path: &Path) -> Vec<(String, Vec<f32>)> {
    let file = Checkpoint::open(path).expect("the file opens");
    let mut all: Vec<_> = file
        .names()
        .map(|name| {
            let entry = file.get(name).expect("a listed tensor");
            (name.to_owned(), entry.to_f32().expect("numbers"))
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// A LoRA config on some targets, alpha unlike r.
pub(crate) fn lora_config(targets: &[&str]) -> LoraConfig {
    LoraConfig {
        r: 4,
        lora_alpha: 6.0,
        target_modules: TargetModules::List(targets.iter().map(ToString::to_string).collect()),
        ..LoraConfig::default()
    }
}

/// An adapter whose A and B are both random.
pub(crate) fn adapter(model: &Decoder, config: &LoraConfig, seed: u64) -> Adapter {
    lora::inject(model.config(), config, InitLoraWeights::Random, seed)
        .expect("the targets are there")
        .0
}

/// Every linear of any family.
pub(crate) fn all_linear() -> LoraConfig {
    LoraConfig {
        target_modules: TargetModules::AllLinear,
        ..lora_config(&[])
    }
}

/// Token ids without a pattern.
pub(crate) fn ids(length: usize, seed: u32) -> Vec<u32> {
    (0..length as u32)
        .map(|i| 3 + (i * i * 7 + i * 13 + seed * 31) % 93)
        .collect()
}

/// Rows of different lengths, their prompts without loss.
pub(crate) fn examples() -> Vec<Example> {
    [17, 5, 30, 2, 11]
        .iter()
        .enumerate()
        .map(|(n, &length)| Example {
            ids: ids(length, n as u32),
            supervised: (0..length).map(|i| i > length / 3).collect(),
            line: n,
            truncated: 0,
            prompt_len: length / 3,
            ..Example::default()
        })
        .collect()
}

/// Logits of every token of a sequence, with an adapter or none.
pub(crate) fn logits(model: &Decoder, adapter: Option<&Adapter>, ids: &[u32]) -> Vec<f32> {
    let mut batch = Batch::default();
    batch.push(ids, &[]);
    let rows: Vec<u32> = (0..ids.len() as u32).collect();
    let ws = Workspace::new();
    match adapter {
        None => model.logits(&batch, AdapterSet::none(), &rows, None, &ws),
        Some(adapter) => {
            let set = [adapter];
            model.logits(
                &batch.with_adapter(0),
                AdapterSet::new(&set),
                &rows,
                None,
                &ws,
            )
        }
    }
    .to_vec()
}

/// Logits after a prompt and what was made of it, computed as one sequence without a cache.
pub(crate) fn logits_after(
    model: &Decoder,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    made: &[u32],
) -> Vec<f32> {
    let set: Vec<&Adapter> = adapter.into_iter().collect();
    let virtual_tokens = adapter.map(Adapter::virtual_tokens).unwrap_or_default();
    let mut batch = Batch::with_virtual(virtual_tokens);
    batch.push_with_prompt(prompt.len(), &[prompt, made].concat(), &[]);
    let last = [batch.tokens() as u32 - 1];
    let ws = Workspace::new();
    let logits = if set.is_empty() {
        model.logits(&batch, AdapterSet::none(), &last, None, &ws)
    } else {
        let batch = batch.with_adapter(0);
        model.logits(&batch, AdapterSet::new(&set), &last, None, &ws)
    };
    logits.to_vec()
}

/// max|a − b| as a part of max|b|; infinite where a value is not finite.
pub(crate) fn difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let size = b
        .iter()
        .fold(0.0, |size: f64, x| size.max(f64::from(x.abs())));
    let largest = a.iter().zip(b).fold(0.0, |largest: f64, (a, b)| {
        let difference = (f64::from(*a) - f64::from(*b)).abs();
        if difference.is_finite() {
            largest.max(difference)
        } else {
            f64::INFINITY
        }
    });
    if largest == 0.0 { 0.0 } else { largest / size }
}

/// Merges an adapter of a language model in f32.
pub(crate) fn merge_f32(
    source: &Source,
    adapter: &Adapter,
    passages: &[Vec<u32>],
    output: &Path,
) -> Result<MergeReport, Error> {
    merge(&MergeOptions::new(source, adapter, passages, output))
}
