//! Generating, timed pass by pass.

use std::time::Instant;

use lowrank_kernels::{OpCost, Workspace, read_bandwidth, start_profile, stop_profile};

use crate::generate::{GenerateOptions, PromptIds, generate as continue_prompts};
use crate::model::{Adapter, AdapterSet, Decoder, WeightId};

/// What was measured.
#[derive(Clone, Debug)]
pub struct GenerateFigures {
    /// Prompts that were continued together.
    pub prompts: usize,
    /// Seconds of the pass over all prompts, the first new tokens included.
    pub prefill_seconds: f64,
    /// Seconds of each pass after it; a pass makes one token for each prompt.
    pub pass_seconds: Vec<f64>,
    /// Bytes that a pass in the middle of the run must read.
    pub pass_bytes: f64,
    /// Where the time of the passes went, if asked.
    pub profile: Vec<OpCost>,
}

impl GenerateFigures {
    /// Seconds of the pass in the middle, when they are sorted by time.
    pub fn median_pass(&self) -> f64 {
        let mut sorted = self.pass_seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// New tokens of all prompts a second.
    pub fn tokens_per_second(&self) -> f64 {
        self.prompts as f64 / self.median_pass()
    }

    /// Bytes a second that passes read.
    pub fn bytes_per_second(&self) -> f64 {
        self.pass_bytes / self.median_pass()
    }
}

/// Continues prompts of one length greedily by `new_tokens` each, at least two, whatever tokens come. The prompts take the adapters
/// in turn.
pub fn generate(
    model: &Decoder,
    adapters: &[&Adapter],
    prompts: &[Vec<u32>],
    new_tokens: usize,
    profile: bool,
) -> GenerateFigures {
    let set = if adapters.is_empty() {
        AdapterSet::none()
    } else {
        AdapterSet::new(adapters)
    };
    let inputs: Vec<PromptIds> = prompts
        .iter()
        .enumerate()
        .map(|(index, ids)| PromptIds {
            ids: ids.clone(),
            adapter: index.checked_rem(adapters.len()),
        })
        .collect();
    let mut options = GenerateOptions {
        max_new_tokens: 2,
        ..GenerateOptions::default()
    };
    let ws = Workspace::new();
    // Weights come from the disk and buffers from the system once.
    continue_prompts(model, set, &inputs, &options, &ws, |_, _| true);
    options.max_new_tokens = new_tokens;
    let mut seconds = Vec::with_capacity(new_tokens);
    let mut begun = Instant::now();
    continue_prompts(model, set, &inputs, &options, &ws, |prompt, _| {
        if prompt + 1 == inputs.len() {
            seconds.push(begun.elapsed().as_secs_f64());
            if profile && seconds.len() == 1 {
                start_profile();
            }
            begun = Instant::now();
        }
        true
    });
    let profile = if profile { stop_profile() } else { Vec::new() };
    let cached: usize = prompts.iter().map(|ids| ids.len() + new_tokens / 2).sum();
    GenerateFigures {
        prompts: prompts.len(),
        prefill_seconds: seconds.first().copied().unwrap_or(f64::NAN),
        pass_seconds: seconds.split_off(seconds.len().min(1)),
        pass_bytes: pass_bytes(
            model,
            &adapters[..adapters.len().min(prompts.len())],
            cached,
        ),
        profile,
    }
}

/// Bytes that any pass over new tokens must read: every weight once (of the embedding and the positions only rows),
/// the adapters' values, and the keys and values of the tokens before.
fn pass_bytes(model: &Decoder, adapters: &[&Adapter], cached: usize) -> f64 {
    let config = model.config();
    let has_head = |adapter: &&Adapter| adapter.replaced.contains_key(&WeightId::Head);
    let head = if config.tie_word_embeddings && !adapters.iter().any(has_head) {
        WeightId::Embedding
    } else {
        WeightId::Head
    };
    let whole = |id: &WeightId| match id {
        WeightId::Embedding | WeightId::Positions => *id == head,
        _ => true,
    };
    // Adapters that replace weights are read one after the other, each with the base's other weights: only one is counted right.
    let replaced = |id: &WeightId| adapters.iter().any(|a| a.replaced.contains_key(id));
    let weights: usize = config
        .weights()
        .iter()
        .filter(|(id, _)| whole(id) && !replaced(id))
        .map(|(id, (rows, cols))| model.weights().view(*id).format().bytes_for(rows * cols))
        .sum();
    let own: usize = adapters.iter().map(|adapter| adapter.params.len()).sum();
    let row = 2 * config.num_hidden_layers * config.kv_size() * size_of::<f32>();
    (weights + own * size_of::<f32>() + cached * row) as f64
}

/// Bytes a second that this machine reads from memory with all threads.
pub fn memory_bandwidth() -> f64 {
    /// Far more than any cache holds.
    const BYTES: usize = 256 << 20;
    read_bandwidth(BYTES, 10)
}
