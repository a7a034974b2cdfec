//! `cargo dev builtin-model`: the built-in model's weights, pretrained by lowrank itself from random values.
//!
//! Documents of the corpus are written one after another, each with its end token, and cut into rows of equal length;
//! every token but a row's first is a label. The run is an ordinary full training, so its folder has the usual files, and
//! an interrupted run goes on with `--resume`.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, Result};
use lowrank::base::{Network, Source};
use lowrank::data::Example;
use lowrank::model::{Decoder, families};
use lowrank::train::{
    BaseDtype, Event, Observer, Rows, SchedulerType, TrainConfig, Trained, Trainer,
};
use lowrank::tuning::{Method, full};

use crate::builtin::FOLDER;
use crate::corpus::{END_OF_TEXT, corpus};

/// Tokens of a row.
const ROW: usize = 256;
/// Rows of a step.
const BATCH: usize = 8;
/// Rows kept back to see how well unseen text is predicted.
const HELD_OUT: usize = 64;
const SEED: u64 = 42;

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
    let weights = full::random_weights(config, 0.02, SEED)?;
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
        learning_rate: 2e-3,
        lr_scheduler_type: SchedulerType::Cosine,
        warmup_steps: 40,
        weight_decay: 0.1,
        adam_beta2: 0.99,
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
