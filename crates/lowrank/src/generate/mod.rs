//! Text from a model: sampling or beam search over a KV cache, one prompt or many together, each with its own adapter or
//! none.

mod beams;
mod prefixes;
mod repeats;
mod sampling;

use std::ops::Range;

use lowrank_kernels::{Segment, Workspace, all_finite, argmax_rows};

pub use beams::{BeamOptions, beam_search};
pub use sampling::Sampling;

use self::prefixes::{Prefixes, infix, read_infix};
use self::repeats::ban_repeats;
use crate::model::AdapterSet;
use crate::model::{Batch, Decoder, KvCache};

/// How a continuation is made.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// New tokens at most.
    pub max_new_tokens: usize,
    /// How a token is drawn.
    pub sampling: Sampling,
    /// No run of so many tokens comes twice, the prompt's included; 0: any may.
    pub no_repeat_ngram_size: usize,
    /// A sequence ends with any of these; the token itself is not returned.
    pub stop_ids: Vec<u32>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// A stop token came.
    Stop,
    /// `max_new_tokens` were made.
    Length,
    /// The model's context was full; nothing is made of a prompt that is longer than it.
    ContextFull,
    /// The caller asked to stop.
    Cancelled,
    /// The model's numbers are no longer finite, so that no token can be chosen.
    NotFinite,
}

/// One sequence under way: its rows of the cache and its adapter.
struct Sequence {
    rows: Range<usize>,
    /// Rows of the cache before its own: trained keys and values, or those of trained embeddings.
    before: Range<usize>,
    /// Trained embeddings behind the prompt.
    infix: usize,
    filled: usize,
    adapter: Option<usize>,
    next: Vec<u32>,
    made: Vec<u32>,
    finish: Option<Finish>,
}

/// A prompt and the adapter of the set that it uses.
#[derive(Clone, Debug)]
pub struct PromptIds {
    /// Token ids; nothing is made of none.
    pub ids: Vec<u32>,
    /// Index in the adapter set; `None`: the base alone.
    pub adapter: Option<usize>,
}

/// A continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Continuation {
    /// New tokens, the stop token left out.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continues every prompt, all together in one batch. `on_token(prompt, token)` sees each new token and stops that prompt
/// by returning false.
pub fn generate(
    model: &Decoder,
    adapters: AdapterSet,
    prompts: &[PromptIds],
    options: &GenerateOptions,
    ws: &Workspace,
    mut on_token: impl FnMut(usize, u32) -> bool,
) -> Vec<Continuation> {
    let context = model.config().max_position_embeddings;
    let mut sequences = Vec::with_capacity(prompts.len());
    let prefixes = Prefixes::new(adapters, prompts);
    let mut rows = prefixes.end();
    for prompt in prompts {
        let before = prefixes.before(prompt);
        let infix = infix(adapters, prompt);
        let limit = context.saturating_sub(before.len() + infix);
        let fits = (1..=limit).contains(&prompt.ids.len());
        let capacity = if fits {
            let new = prompt.ids.len().saturating_add(options.max_new_tokens);
            infix + new.min(limit)
        } else {
            0
        };
        let finish = if options.max_new_tokens == 0 || prompt.ids.is_empty() {
            Some(Finish::Length)
        } else {
            (!fits).then_some(Finish::ContextFull)
        };
        let next = prompt.ids.clone();
        sequences.push(Sequence {
            rows: rows..rows + capacity,
            before,
            infix,
            filled: 0,
            adapter: prompt.adapter,
            next,
            made: Vec::new(),
            finish,
        });
        rows += capacity;
    }
    let mut cache = KvCache::new(model.config(), rows);
    prefixes.write_keys(adapters, &mut cache);
    // The rows of trained embeddings go with the prompts of the first pass.
    let mut first = Some(prefixes);
    while sequences.iter().any(|s| s.finish.is_none()) {
        advance(
            model,
            adapters,
            prompts,
            &mut sequences,
            first.take(),
            &mut cache,
            options,
            ws,
            &mut on_token,
        );
    }
    sequences
        .into_iter()
        .map(|s| Continuation {
            ids: s.made,
            finish: s.finish.unwrap_or(Finish::Length),
        })
        .collect()
}

/// One pass over the new tokens of every sequence that goes on, and one drawn token each.
fn advance(
    model: &Decoder,
    adapters: AdapterSet,
    prompts: &[PromptIds],
    sequences: &mut [Sequence],
    first: Option<Prefixes>,
    cache: &mut KvCache,
    options: &GenerateOptions,
    ws: &Workspace,
    on_token: &mut impl FnMut(usize, u32) -> bool,
) {
    let mut batch = Batch::default();
    let mut last_rows = Vec::new();
    let mut active = Vec::new();
    if let Some(prefixes) = first {
        prefixes.read_embeddings(&mut batch);
    }
    for (index, sequence) in sequences
        .iter_mut()
        .enumerate()
        .filter(|(_, s)| s.finish.is_none())
    {
        let start = batch.tokens();
        batch.ids.append(&mut sequence.next);
        read_infix(&mut batch, std::mem::take(&mut sequence.infix));
        let rows = start..batch.tokens();
        let position = sequence.before.len() + sequence.filled;
        let positions = (position..position + rows.len()).map(|p| p as u32);
        batch.positions.extend(positions);
        batch
            .appends
            .push((rows.clone(), sequence.rows.start + sequence.filled));
        sequence.filled += rows.len();
        let keys = sequence.rows.start..sequence.rows.start + sequence.filled;
        let mut keys = vec![sequence.before.clone(), keys];
        keys.retain(|keys| !keys.is_empty());
        batch.segments.push(Segment {
            queries: rows.clone(),
            keys,
            causal: true,
        });
        last_rows.push((rows.end - 1) as u32);
        if let Some(adapter) = sequence.adapter {
            batch.adapters.push((rows, adapter));
        }
        active.push(index);
    }
    let logits = model.logits(&batch, adapters, &last_rows, Some(cache), ws);
    let finite = all_finite(logits.view());
    let n = options.no_repeat_ngram_size;
    let greedy = (options.sampling.is_greedy() && n == 0).then(|| argmax_rows(logits.view()));
    for (row, &index) in active.iter().enumerate() {
        let sequence = &mut sequences[index];
        // NaN and ∞ come of a calculation that overflowed.
        if !finite && !all_finite(logits.view().slice_rows(row..row + 1)) {
            sequence.finish = Some(Finish::NotFinite);
            continue;
        }
        let token = if let Some(best) = &greedy {
            best[row] as u32
        } else {
            let mut values = logits.view().slice_rows(row..row + 1).to_vec();
            ban_repeats(&mut values, &prompts[index].ids, &sequence.made, n);
            let position = sequence.made.len() as u64;
            options.sampling.draw(&mut values, index as u64, position)
        };
        if options.stop_ids.contains(&token) {
            sequence.finish = Some(Finish::Stop);
            continue;
        }
        sequence.made.push(token);
        sequence.next = vec![token];
        sequence.finish = if !on_token(index, token) {
            Some(Finish::Cancelled)
        } else if sequence.made.len() == options.max_new_tokens {
            Some(Finish::Length)
        } else if sequence.filled >= sequence.rows.len() {
            Some(Finish::ContextFull)
        } else {
            None
        };
    }
    ws.give(logits);
}
