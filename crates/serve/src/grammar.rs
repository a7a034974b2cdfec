//! Answers that follow a JSON schema, a regular expression or a grammar.
//!
//! A [`Vocabulary`] is built once per server. It turns what a request asks for into a [`Grammar`], which is one text's
//! [`Constraint`]: before each token it rules out those that the text cannot go on with. The work is llguidance's.
//!
//! # JSON
//!
//! Schemas are read as in OpenAI's strict mode, and more of JSON Schema is taken than there:
//!
//! - Properties come in the order of the schema.
//! - An object with `properties` and without `additionalProperties` has no other properties. OpenAI demands
//!   `additionalProperties: false`; JSON Schema would allow any others, with which small models go on for ever. This is not
//!   done in schemas that combine parts (`allOf`, or `$ref`, `anyOf` or `oneOf` beside `properties`), where each part
//!   may only know some of the properties.
//! - Properties that are not `required` may be left out. OpenAI demands that all are required.
//! - `oneOf` is read as `anyOf`, since a text cannot be held to "not also the other one" while it is written.
//! - A keyword that cannot be followed, such as `uniqueItems` or `not`, is an error that names the place.
//!
//! White space between the parts of the JSON is the model's choice, but bounded: nothing, one space, or a line break with up
//! to 32 spaces or eight tabs. OpenAI's strict answers are compact and its JSON mode leaves the choice to the model. Small models do
//! best in the style that they were trained on (compact, Python's `", "` and `": "`, or indented), so no style is forced;
//! without a bound they can repeat spaces or line breaks until the text is cut.
//!
//! # Cost
//!
//! With a vocabulary of 50,000 tokens, [`Constraint::restrict`] takes 15 to 120 µs on average, by the schema, and up to 4 ms for
//! the slowest token, as where the states of a string are met for the first time. Building the vocabulary takes 0.2 s.
//! Building a grammar takes 0.5 to 3 ms for schemas of a few properties and seconds for those of thousands, so it belongs on a thread
//! that may block. The test `the_cost_of_a_token` measures all three.

mod schema;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::fmt;
use std::sync::Arc;

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;
use lowrank::generate::Constraint;
use serde_json::Value;

pub(crate) use schema::move_references;
pub use vocabulary::Vocabulary;

/// Why there is no grammar.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// A part of a schema cannot be followed.
    #[error("the schema cannot be followed at {place}: {reason}")]
    Schema {
        /// A JSON pointer into the schema, as a URI fragment: `#/properties/name`, or `#` for the whole.
        place: String,
        /// What is wrong there.
        reason: String,
    },
    /// A schema, an expression or a grammar is longer than the server takes.
    #[error("the {what} has {bytes} bytes, and at most {limit} are taken")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The longest that is taken.
        limit: usize,
    },
    /// A schema, an expression or a grammar is nested more deeply than the server takes.
    #[error("the {what} is nested too deeply at {place}: at most {limit} levels are taken")]
    TooDeep {
        /// What is nested.
        what: &'static str,
        /// Where the first level is that is one too many.
        place: String,
        /// The most levels that are taken.
        limit: usize,
    },
    /// A regular expression or a grammar cannot be followed.
    #[error("the {what} cannot be followed: {reason}")]
    Text {
        /// What cannot be followed.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokens cannot be used for grammars.
    #[error("no grammar can be followed with this tokenizer: {0}")]
    Vocabulary(String),
}

/// JSON between fixed texts, once or several times, as a tool call is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Framed {
    /// What stands before the JSON. Texts of special tokens in it stand for these tokens.
    pub before: String,
    /// What the JSON must follow.
    pub schema: Value,
    /// What stands behind the JSON.
    pub after: String,
    /// What stands between one such text and the next; none where there is only one.
    pub between: Option<String>,
}

/// What one text may still become. A copy goes on by itself; both share what llguidance finds out about the grammar.
#[derive(Clone)]
pub struct Grammar {
    matcher: Matcher,
    ends: Arc<[u32]>,
    /// The tokens that llguidance knows of.
    known: usize,
    failure: Option<String>,
}

impl Grammar {
    fn new(matcher: Matcher, ends: Arc<[u32]>, known: usize) -> Self {
        Self {
            matcher,
            ends,
            known,
            failure: None,
        }
    }

    /// Why the text ended before it followed the grammar: a limit of llguidance was reached, or a token was accepted that was not
    /// allowed.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Whether the text follows the grammar as it is, so that it might end here.
    pub fn may_end(&mut self) -> bool {
        self.failure.is_none()
            && (self.matcher.is_stopped() || self.matcher.is_accepting().unwrap_or(false))
    }

    fn fail(&mut self, reason: &str) {
        if self.failure.is_none() {
            let reason = plain(reason);
            tracing::warn!("a text ends before it follows its grammar: {reason}");
            self.failure = Some(reason);
        }
    }

    /// Leaves the end tokens alone, if the model has them.
    fn only_ends(&self, logits: &mut [f32]) {
        let kept: Vec<(usize, f32)> = self
            .ends
            .iter()
            .filter_map(|end| Some((*end as usize, *logits.get(*end as usize)?)))
            .collect();
        if !kept.is_empty() {
            logits.fill(f32::NEG_INFINITY);
        }
        for (end, logit) in kept {
            logits[end] = logit;
        }
    }
}

impl Constraint for Grammar {
    fn restrict(&mut self, logits: &mut [f32]) {
        if self.is_complete() {
            return self.only_ends(logits);
        }
        match self.matcher.compute_mask_or_eos() {
            Ok(mask) if allows(&mask, self.known.min(logits.len())) => {
                apply(&mask, self.known, logits);
            }
            Ok(_) => {
                self.fail("the model has no token with which the text could go on");
                self.only_ends(logits);
            }
            Err(error) => {
                self.fail(&error.to_string());
                self.only_ends(logits);
            }
        }
    }

    fn accept(&mut self, token: u32) {
        if self.is_complete() {
            return;
        }
        if token as usize >= self.known {
            return self.fail(&format!("the tokenizer has no token {token}"));
        }
        if let Err(error) = self.matcher.consume_token(token) {
            return self.fail(&error.to_string());
        }
        let reason = self.matcher.stop_reason();
        if !reason.is_ok() {
            self.fail(&reason.to_string());
        }
    }

    fn is_complete(&self) -> bool {
        self.failure.is_some() || self.matcher.is_stopped()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar")
            .field("is_complete", &self.is_complete())
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

/// Whether a mask allows one of the first `tokens` tokens.
fn allows(mask: &SimpleVob, tokens: usize) -> bool {
    mask.first_bit_set().is_some_and(|first| first < tokens)
}

/// Sets the logits of all tokens to −∞ that are not among the first `known` or that the mask does not allow.
fn apply(mask: &SimpleVob, known: usize, logits: &mut [f32]) {
    let known = known.min(logits.len());
    let (tokens, padding) = logits.split_at_mut(known);
    padding.fill(f32::NEG_INFINITY);
    let words = mask.as_slice();
    for (at, chunk) in tokens.chunks_mut(32).enumerate() {
        match words.get(at).copied().unwrap_or(0) {
            0 => chunk.fill(f32::NEG_INFINITY),
            u32::MAX => {}
            word => {
                for (bit, logit) in chunk.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// An error of llguidance without what it adds for its own developers.
fn plain(error: &str) -> String {
    let cut = ["\n<backtrace>", "\n<state>", "<non-verbose/>"]
        .iter()
        .filter_map(|mark| error.find(mark))
        .min();
    error[..cut.unwrap_or(error.len())].trim().to_owned()
}
