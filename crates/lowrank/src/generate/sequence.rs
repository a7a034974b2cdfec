//! One continuation, a token at a time.

use lowrank_kernels::View;

use super::layout::{Layout, Prompt, Sight};
use super::repeats::ban_repeats;
use super::session::Token;
use super::{Continuation, Finish, GenerateOptions};
use crate::model::CacheRows;

/// A sequence under way.
pub(super) struct Sequence {
    pub(super) prompt: Prompt,
    options: GenerateOptions,
    /// Whether the logarithm of each token's probability is wanted.
    log_probs: bool,
    /// Rows of the cache for the prompt and for the tokens that are made.
    pub(super) rows: CacheRows,
    made: Vec<u32>,
}

impl Sequence {
    /// A sequence that begins, with as many rows of the cache as [`rows_for`](Self::rows_for) asks.
    pub(super) fn new(
        prompt: Prompt,
        options: GenerateOptions,
        log_probs: bool,
        rows: CacheRows,
    ) -> Self {
        Self {
            prompt,
            options,
            log_probs,
            rows,
            made: Vec::new(),
        }
    }

    /// Rows of the cache that a sequence needs, `limit` being those that the context has for it.
    pub(super) fn rows_for(prompt: &Prompt, limit: usize, options: &GenerateOptions) -> usize {
        prompt
            .len()
            .saturating_add(options.max_new_tokens)
            .min(limit)
    }

    /// Adds the token that was made last.
    pub(super) fn read_token(&self, layout: &mut Layout, sight: &Sight<'_>) {
        if let Some(last) = self.made.last() {
            let own = self.filled();
            let rows = layout.push(sight, &self.rows, own - 1..own, &[*last]);
            layout.want(rows.start);
        }
    }

    /// Rows that are read once its last token is.
    fn filled(&self) -> usize {
        self.prompt.len() + self.made.len()
    }

    /// Whether the next token is simply the most likely one.
    pub(super) fn is_greedy(&self) -> bool {
        self.options.sampling.is_greedy() && self.options.no_repeat_ngram_size == 0
    }

    /// The next token after logits [1, V], of which the largest may be known, and why the sequence ends if it does.
    pub(super) fn advance(
        &mut self,
        logits: View<'_>,
        largest: Option<usize>,
    ) -> (Option<Token>, Option<Finish>) {
        let greedy = largest.filter(|_| self.is_greedy());
        let log_probs = self.log_probs;
        let values = (greedy.is_none() || log_probs).then(|| logits.to_vec());
        let log_prob = |id: u32| {
            let values = values.as_deref().filter(|_| log_probs)?;
            Some(log_softmax(values, id))
        };
        let id = match (greedy, &values) {
            (Some(id), _) => id as u32,
            (None, values) => {
                let mut values = values.clone().unwrap_or_default();
                let n = self.options.no_repeat_ngram_size;
                ban_repeats(&mut values, &self.prompt.ids, &self.made, n);
                let position = self.made.len() as u64;
                self.options.sampling.draw(&values, position)
            }
        };
        if self.options.stop_ids.contains(&id) {
            return (None, Some(Finish::Stop));
        }
        let log_prob = log_prob(id);
        self.made.push(id);
        let finish = if self.made.len() == self.options.max_new_tokens {
            Some(Finish::Length)
        } else if self.filled() > self.rows.len() {
            Some(Finish::ContextFull)
        } else {
            None
        };
        (Some(Token { id, log_prob }), finish)
    }

    /// What it came to.
    pub(super) fn end(&mut self, finish: Finish) -> Continuation {
        Continuation {
            ids: std::mem::take(&mut self.made),
            finish,
        }
    }
}

/// The logarithm of a token's probability.
pub(super) fn log_softmax(logits: &[f32], id: u32) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - top).exp()).sum();
    f64::from(logits[id as usize]) - top - sum.ln()
}
