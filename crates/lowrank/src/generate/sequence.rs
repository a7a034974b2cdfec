//! One continuation, a token at a time.

use lowrank_kernels::View;

use super::constraint::Constraint;
use super::layout::{Layout, Prompt, Sight};
use super::logprobs::{LogProbs, Scores, Token};
use super::penalties::add_bias;
use super::repeats::ban_repeats;
use super::shared::Shared;
use super::{Continuation, Finish, GenerateOptions};
use crate::model::CacheRows;

/// A sequence under way.
pub(super) struct Sequence {
    pub(super) prompt: Prompt,
    options: GenerateOptions,
    pub(super) log_probs: LogProbs,
    /// What the text must follow.
    pub(super) constraint: Option<Box<dyn Constraint>>,
    /// Rows of the cache for the prompt and for the tokens that are made.
    pub(super) rows: CacheRows,
    /// Those of them that others may use, too.
    pub(super) shared: Shared,
    /// Rows of the prompt that were there before it.
    pub(super) cached: usize,
    made: Vec<u32>,
}

/// What a sequence did behind its rows of logits.
#[derive(Default)]
pub(super) struct Advanced {
    /// Tokens of the prompt with their log-probabilities, where those are wanted.
    pub(super) read: Vec<Token>,
    pub(super) token: Option<Token>,
    pub(super) finish: Option<Finish>,
}

impl Sequence {
    /// A sequence that begins, with as many rows of the cache as [`rows_for`](Self::rows_for) asks.
    pub(super) fn new(
        prompt: Prompt,
        options: GenerateOptions,
        log_probs: LogProbs,
        rows: CacheRows,
        shared: Shared,
    ) -> Self {
        Self {
            prompt,
            options,
            log_probs,
            constraint: None,
            rows,
            cached: shared.rows(),
            shared,
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
        let GenerateOptions {
            sampling,
            no_repeat_ngram_size,
            penalties,
            logit_bias,
            ..
        } = &self.options;
        sampling.is_greedy()
            && *no_repeat_ngram_size == 0
            && penalties.is_none()
            && logit_bias.is_empty()
            && self.constraint.is_none()
    }

    /// Goes on behind logits [n, V]: those of the prompt's rows from `first` on, if it was read just now, or those behind the last token. Of the
    /// last row the largest may be known.
    pub(super) fn advance(
        &mut self,
        logits: View<'_>,
        first: Option<usize>,
        largest: Option<usize>,
    ) -> Advanced {
        let mut advanced = Advanced::default();
        if let Some(first) = first.filter(|_| self.log_probs.prompt) {
            advanced.read = self.read_log_probs(logits, first);
        }
        if self.prompt.is_unread() {
            return advanced;
        }
        let last = logits.slice_rows(logits.rows() - 1..logits.rows());
        (advanced.token, advanced.finish) = self.next(last, largest);
        advanced
    }

    /// The tokens of the prompt that its rows from `first` on predict.
    fn read_log_probs(&self, logits: View<'_>, first: usize) -> Vec<Token> {
        let predicted = self.prompt.ids.iter().skip(first + 1);
        let rows = (0..logits.rows()).map(|row| logits.slice_rows(row..row + 1).to_vec());
        predicted
            .zip(rows)
            .map(|(id, logits)| Scores::new(&logits).token(*id, self.log_probs.top))
            .collect()
    }

    /// The next token behind logits [1, V], and why the sequence ends if it does.
    fn next(
        &mut self,
        logits: View<'_>,
        largest: Option<usize>,
    ) -> (Option<Token>, Option<Finish>) {
        if self.options.max_new_tokens == 0 {
            return (None, Some(Finish::Length));
        }
        let greedy = largest.filter(|_| self.is_greedy());
        let log_probs = self.log_probs;
        let values = (greedy.is_none() || log_probs.made).then(|| logits.to_vec());
        let id = match greedy {
            Some(id) => Some(id as u32),
            None => self.choose(values.clone().unwrap_or_default()),
        };
        let Some(id) = id.filter(|id| !self.options.stop_ids.contains(id)) else {
            return (None, Some(Finish::Stop));
        };
        let token = match values.filter(|_| log_probs.made) {
            Some(values) => Scores::new(&values).token(id, log_probs.top),
            None => Token {
                id,
                log_prob: None,
                top: Vec::new(),
            },
        };
        self.made.push(id);
        let is_complete = self.constraint.as_mut().is_some_and(|constraint| {
            constraint.accept(id);
            constraint.is_complete()
        });
        let finish = if is_complete {
            Some(Finish::Stop)
        } else if self.made.len() == self.options.max_new_tokens {
            Some(Finish::Length)
        } else if self.filled() > self.rows.len() {
            Some(Finish::ContextFull)
        } else {
            None
        };
        (Some(token), finish)
    }

    /// The token that is drawn from logits; none where a grammar allows none.
    fn choose(&mut self, mut logits: Vec<f32>) -> Option<u32> {
        if let Some(constraint) = &mut self.constraint {
            constraint.restrict(&mut logits);
            if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
                return None;
            }
        }
        let (prompt, made) = (&self.prompt.ids, &self.made);
        add_bias(&mut logits, &self.options.logit_bias);
        self.options.penalties.apply(&mut logits, prompt, made);
        ban_repeats(&mut logits, prompt, made, self.options.no_repeat_ngram_size);
        Some(self.options.sampling.draw(&logits, made.len() as u64))
    }

    /// What it came to.
    pub(super) fn end(&mut self, finish: Finish) -> Continuation {
        Continuation {
            ids: std::mem::take(&mut self.made),
            finish,
        }
    }
}
