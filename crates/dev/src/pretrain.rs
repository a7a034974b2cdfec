//! `cargo dev builtin-model`: the built-in model's weights, pretrained by lowrank itself from random values.
//!
//! Documents of the corpus are written one after another, each with its end token, and cut into rows of equal length;
//! every token but a row's first is a label. The run is an ordinary full training, so its folder has the usual files, and
//! an interrupted run goes on with `--resume`.
//!
//! The tasks need a model that copies words from its prompt. From plain random values the heads that copy take tens of
//! thousands of steps to form, so the attention begins where they are near: see `start_near_copying`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, Result};
use lowrank::base::{Network, Source};
use lowrank::data::Example;
use lowrank::model::{
    Decoder, LinearId, LinearKind, ModelConfig, Part, WeightId, Weights, families,
};
use lowrank::train::{
    BaseDtype, Event, Observer, Rows, SchedulerType, TrainConfig, Trained, Trainer,
};
use lowrank::tuning::{Method, full};
use lowrank::{DType, Tensor};

use crate::builtin::FOLDER;
use crate::corpus::{END_OF_TEXT, corpus};

/// Tokens of a row.
const ROW: usize = 256;
/// Rows of a step.
const BATCH: usize = 8;
/// Rows kept back to see how well unseen text is predicted.
const HELD_OUT: usize = 64;
const SEED: u64 = 42;
/// Standard deviation of the embedding's first values.
const EMBEDDING_SPREAD: f32 = 0.05;
/// How much of a value's own direction the output projection gives back at first.
const GIVEN_BACK: f32 = 0.7;

/// Pretrains for `steps` steps in `output` and puts the weights where the library takes them from.
///
/// # Errors
/// A file that can't be read or written, or a training that fails.
pub fn pretrain(root: &Path, output: &Path, steps: u64, resume: bool) -> Result<()> {
    let source = Source::Builtin;
    let config = families::read_config(&source.config()?)?;
    let tokenizer = source.tokenizer()?;
    let rows = rows(&tokenizer, steps as usize * BATCH + HELD_OUT)?;
    let (held_out, rows) = rows.split_at(HELD_OUT);
    let weights = start_near_copying(&full::random_weights(config, EMBEDDING_SPREAD, SEED)?)?;
    let adapter = full::inject(&weights);
    let network = Network {
        decoder: Decoder::new(weights),
        source,
        labels: None,
    };
    let settings = settings(output, steps);
    std::fs::create_dir_all(output).with_context(|| format!("cannot make {}", output.display()))?;
    let trained = Trained {
        adapter,
        config: None,
    };
    let rows = Rows {
        train: rows,
        valid: held_out,
    };
    let mut lines = Lines;
    let trainer = if resume {
        Trainer::resume(&settings, &network, trained, rows, &mut lines)
    } else {
        Trainer::new(&settings, &network, trained, rows, false, &mut lines)
    };
    let outcome = trainer?.run(&AtomicBool::new(false))?;
    let target = root.join(FOLDER).join("model.safetensors");
    std::fs::copy(output.join("model.safetensors"), &target)
        .with_context(|| format!("cannot write {}", target.display()))?;
    say(&format!(
        "wrote {} (held-out loss {:.4})",
        target.display(),
        outcome.eval_loss.unwrap_or(f64::NAN)
    ));
    Ok(())
}

fn settings(output: &Path, steps: u64) -> TrainConfig {
    TrainConfig {
        learning_rate: 3e-3,
        lr_scheduler_type: SchedulerType::Cosine,
        warmup_steps: 40,
        weight_decay: 0.1,
        adam_beta2: 0.95,
        batch_size: BATCH,
        max_steps: Some(steps),
        shuffle: false,
        eval_steps: Some(200),
        save_steps: Some(200),
        save_total_limit: Some(2),
        base_dtype: BaseDtype::Bf16,
        ..TrainConfig::new(Method::Full, "builtin:tiny", "corpus", output)
    }
}

/// The weights with an attention that is inclined to find a token's earlier occurrence and to copy what it finds.
///
/// Each key projection becomes the first query projection of its group, so that a head looks for what is like its own
/// token; each output projection becomes [`GIVEN_BACK`] times its value projection transposed, so that what a head
/// reads arrives in the direction it came from. After "Mimetic Initialization of Self-Attention Layers" (Trockman and
/// Kolter, 2023), which gives pretrained models' products of these matrices such diagonals from the start.
fn start_near_copying(random: &Weights) -> Result<Weights> {
    let config = random.config().clone();
    let mut tensors = HashMap::new();
    for (id, (rows, cols)) in config.weights() {
        let values = match id {
            WeightId::Linear(linear, Part::Weight) => mimetic(random, &config, linear),
            _ => None,
        };
        let values = values.unwrap_or_else(|| random.view(id).to_vec());
        tensors.insert(id, Tensor::from_f32(rows, cols, values));
    }
    Ok(Weights::from_tensors(config, tensors, DType::F32)?)
}

/// The first values of a key or an output projection, row by row; nothing for the other linears, which stay random.
fn mimetic(random: &Weights, config: &ModelConfig, linear: LinearId) -> Option<Vec<f32>> {
    let of = |kind| {
        let id = LinearId { kind, ..linear };
        random.view(WeightId::Linear(id, Part::Weight)).to_vec()
    };
    let (width, head) = (config.hidden_size, config.head_size);
    let group = config.num_attention_heads / config.num_key_value_heads;
    match linear.kind {
        LinearKind::K => {
            let queries = of(LinearKind::Q);
            let groups = queries.chunks_exact(group * head * width);
            Some(
                groups
                    .flat_map(|heads| heads[..head * width].to_vec())
                    .collect(),
            )
        }
        LinearKind::O => {
            let values = of(LinearKind::V);
            let columns = config.num_attention_heads * head;
            let value = |row: usize, column: usize| {
                let of_group = column / head / group * head + column % head;
                GIVEN_BACK * values[of_group * width + row]
            };
            Some(
                (0..width * columns)
                    .map(|at| value(at / columns, at % columns))
                    .collect(),
            )
        }
        _ => None,
    }
}

/// `count` rows of the corpus.
fn rows(tokenizer: &lowrank::data::Tokenizer, count: usize) -> Result<Vec<Example>> {
    let end = tokenizer
        .token_id(END_OF_TEXT)
        .context("the tokenizer has no end token")?;
    let mut ids = Vec::with_capacity(count * ROW);
    for document in corpus(SEED, u64::MAX) {
        if ids.len() >= count * ROW {
            break;
        }
        ids.extend(tokenizer.encode(&document, false)?);
        ids.push(end);
    }
    let row = |ids: &[u32]| Example {
        ids: ids.to_vec(),
        supervised: (0..ROW).map(|i| i > 0).collect(),
        line: 0,
        truncated: 0,
        prompt_len: 0,
        ..Example::default()
    };
    Ok(ids.chunks_exact(ROW).take(count).map(row).collect())
}

/// Prints what happens.
struct Lines;

impl Observer for Lines {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Step(step) if step.step % 20 == 0 => {
                say(&format!(
                    "step {} loss {:.4} {:.0} tokens/s",
                    step.step, step.loss, step.tokens_per_second
                ));
            }
            Event::Eval(eval) => say(&format!(
                "step {} held-out loss {:.4}",
                eval.step, eval.eval_loss
            )),
            Event::Note(text) => say(text),
            _ => {}
        }
    }
}

fn say(text: &str) {
    use std::io::Write as _;
    // A reader that has gone does not stop the training.
    let _ = writeln!(std::io::stderr(), "{text}");
}
