//! Text from a model: sampling or beam search over a KV cache, one prompt or many together, each with its own adapter or
//! none.
//!
//! [`Decoding`] is the session that everything goes through; [`generate`] and [`beam_search`] admit all their prompts to one and take steps until
//! it is empty.

mod beams;
mod constraint;
mod layout;
mod logprobs;
mod penalties;
mod prefixes;
mod repeats;
mod sampling;
mod sequence;
mod session;
mod shared;

pub use beams::BeamOptions;
pub use constraint::Constraint;
pub use logprobs::{LogProbs, Token};
pub use lowrank_kernels::Workspace;
pub use penalties::Penalties;
pub use sampling::Sampling;
pub use session::{Decoding, Made, NoRoom, Request, RequestId, Strategy};
pub use shared::CacheKey;

use crate::model::{Adapter, AdapterSet, Decoder};

/// How a continuation is made.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// New tokens at most.
    pub max_new_tokens: usize,
    /// How a token is drawn.
    pub sampling: Sampling,
    /// What tokens lose that were there before.
    pub penalties: Penalties,
    /// What is added to the logits of tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// No run of so many tokens comes twice, the prompt's included; 0: any may.
    pub no_repeat_ngram_size: usize,
    /// A sequence ends with any of these; the token itself is not returned.
    pub stop_ids: Vec<u32>,
}

impl GenerateOptions {
    /// The likeliest token each time, until one of `stop_ids` or so many tokens.
    pub fn greedy(max_new_tokens: usize, stop_ids: &[u32]) -> Self {
        Self {
            max_new_tokens,
            stop_ids: stop_ids.to_vec(),
            ..Self::default()
        }
    }
}

impl Default for GenerateOptions {
    /// The likeliest token each time, 256 of them at most. No token ends a text: give those of the tokenizer,
    /// [`Tokenizer::stop_ids`](crate::data::Tokenizer::stop_ids).
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            sampling: Sampling::default(),
            penalties: Penalties::default(),
            logit_bias: Vec::new(),
            no_repeat_ngram_size: 0,
            stop_ids: Vec::new(),
        }
    }
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

/// A prompt and the adapter of the set that it uses.
#[derive(Clone, Debug)]
pub struct PromptIds {
    /// Token ids; nothing is made of none.
    pub ids: Vec<u32>,
    /// Index in the adapter set; `None`: the base alone.
    pub adapter: Option<usize>,
}

impl PromptIds {
    /// Tokens, and the index of the adapter that they are continued with.
    pub fn new(ids: impl Into<Vec<u32>>, adapter: Option<usize>) -> Self {
        Self {
            ids: ids.into(),
            adapter,
        }
    }
}

/// A continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Continuation {
    /// New tokens, the stop token left out.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continues every prompt, all together in one batch. A prompt draws with a seed of its own ([`Sampling::for_prompt`]), so what it gets does not
/// depend on the others. `on_token(prompt, token)` sees each new token and stops that prompt by returning false.
pub fn generate(
    model: &Decoder,
    adapters: AdapterSet,
    prompts: &[PromptIds],
    options: &GenerateOptions,
    ws: &Workspace,
    on_token: impl FnMut(usize, u32) -> bool,
) -> Vec<Continuation> {
    let strategy = |index: usize| {
        Strategy::Sample(GenerateOptions {
            sampling: options.sampling.for_prompt(&prompts[index].ids),
            ..options.clone()
        })
    };
    continue_all(model, adapters, prompts, strategy, ws, on_token)
}

/// Continues every prompt with its best beam, all together in one batch.
pub fn beam_search(
    model: &Decoder,
    adapters: AdapterSet,
    prompts: &[PromptIds],
    options: &BeamOptions,
    ws: &Workspace,
) -> Vec<Continuation> {
    let strategy = |_| Strategy::Beams(options.clone());
    continue_all(model, adapters, prompts, strategy, ws, |_, _| true)
}

/// Admits every prompt to a session and takes its steps until all are over.
fn continue_all(
    model: &Decoder,
    adapters: AdapterSet,
    prompts: &[PromptIds],
    strategy: impl Fn(usize) -> Strategy,
    ws: &Workspace,
    mut on_token: impl FnMut(usize, u32) -> bool,
) -> Vec<Continuation> {
    let requests: Vec<Request<&Adapter>> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| Request {
            prompt: prompt.ids.clone(),
            adapter: prompt.adapter.map(|index| adapters.get(index)),
            search: strategy(index),
            log_probs: LogProbs::default(),
            cache_key: None,
        })
        .collect();
    let mut session = Decoding::with_room_for(model, &requests, ws);
    // The session was made with room for all of them.
    let ids: Vec<RequestId> = requests
        .into_iter()
        .filter_map(|request| session.admit(request).ok())
        .collect();
    let mut all: Vec<Option<Continuation>> = vec![None; prompts.len()];
    while !session.is_empty() {
        for made in session.step() {
            let Ok(prompt) = ids.binary_search(&made.id) else {
                continue;
            };
            let goes_on = made.token.is_none_or(|token| on_token(prompt, token.id));
            all[prompt] = made.finished;
            if !goes_on {
                let removed = session.remove(made.id).or(all[prompt].take());
                all[prompt] = removed.map(|made| Continuation {
                    finish: Finish::Cancelled,
                    ..made
                });
            }
        }
    }
    let nothing = || Continuation {
        ids: Vec::new(),
        finish: Finish::Length,
    };
    all.into_iter()
        .map(|made| made.unwrap_or_else(nothing))
        .collect()
}
