//! The tokens of a tokenizer as llguidance reads them, and grammars over them.

use std::fmt;
use std::sync::Arc;
use std::thread;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, TokenParser, panic_utils};
use lowrank::data::Tokenizer;
use serde_json::Value;

use super::{Framed, Grammar, GrammarError, plain, schema};

/// The longest regular expression or grammar, in bytes.
const TEXT_LIMIT: usize = 64 << 10;

/// The most brackets that may be open at once in a regular expression or a grammar.
const NESTING_LIMIT: usize = 64;

/// The longest token that llguidance can take; longer ones are never allowed.
const TOKEN_LIMIT: usize = 1000;

/// How far behind the vocabulary an end token is looked for: models may have more rows than their tokenizers have tokens.
const PADDING_LIMIT: usize = 1 << 16;

/// The stack of the thread that builds a grammar. Schemas are compiled by recursion; `schema::check` bounds its depth.
const STACK: usize = 64 << 20;

/// The name by which a frame refers to its schema.
const FRAMED: &str = "framed";

/// All tokens of a tokenizer, ready for grammars. Built once; cheap to share by reference.
pub struct Vocabulary {
    factory: ParserFactory,
    ends: Arc<[u32]>,
    known: usize,
    /// The special tokens by their texts.
    special: Vec<(String, u32)>,
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary")
            .field("tokens", &self.known)
            .field("ends", &self.ends)
            .finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// The tokens of a tokenizer. Special tokens and those that end an answer never stand inside a text.
    ///
    /// # Errors
    /// If llguidance cannot take the tokens.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let mut special = Vec::new();
        let words = (0..tokenizer.vocab_size() as u32).map(|id| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            if tokenizer.is_special(id)
                && let Ok(text) = String::from_utf8(bytes.clone())
            {
                special.push((text, id));
            }
            (bytes, tokenizer.is_special(id))
        });
        let words = words.collect();
        Self::of(words, tokenizer.stop_ids(), special)
    }

    /// Tokens by their bytes, and whether each is special.
    pub(super) fn of(
        words: Vec<(Vec<u8>, bool)>,
        ends: &[u32],
        special: Vec<(String, u32)>,
    ) -> Result<Self, GrammarError> {
        let limit = words.len() + PADDING_LIMIT;
        let ends: Arc<[u32]> = ends
            .iter()
            .copied()
            .filter(|end| (*end as usize) < limit)
            .collect();
        let mut words: Vec<Vec<u8>> = words
            .into_iter()
            .map(|(bytes, is_special)| match bytes.len() {
                0 | TOKEN_LIMIT.. => Vec::new(),
                _ if is_special => marked(&bytes),
                _ => bytes,
            })
            .collect();
        let last = ends.iter().max().map_or(0, |end| *end as usize + 1);
        words.resize(words.len().max(last), Vec::new());
        for end in ends.iter() {
            let word = &mut words[*end as usize];
            if word.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) || word.len() == 1 {
                *word = marked(word);
            }
        }
        let Some(first) = ends.first().copied() else {
            return Err(GrammarError::Vocabulary(
                "it names no token that ends an answer".into(),
            ));
        };
        let info = TokRxInfo::new(words.len() as u32, first);
        let factory = panic_utils::catch_unwind(|| {
            let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
            // Which tokens write a forced text is left to the model: it knows its own ways best, and its mask allows them all.
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&environment)?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(factory)
        });
        Ok(Self {
            factory: factory
                .map_err(|error| GrammarError::Vocabulary(plain(&format!("{error:#}"))))?,
            ends,
            known: words.len(),
            special,
        })
    }

    /// Any JSON object.
    ///
    /// # Errors
    /// If llguidance cannot write one with these tokens.
    pub fn json_object(&self) -> Result<Grammar, GrammarError> {
        self.json_schema(&serde_json::json!({"type": "object"}))
    }

    /// JSON that follows a schema.
    ///
    /// # Errors
    /// If the schema is too large, or a part of it cannot be followed.
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar, GrammarError> {
        schema::check(schema)?;
        let grammar = TopLevelGrammar::from_json_schema(schema::prepared(schema));
        self.build(grammar)
            .map_err(|reason| self.misplaced(schema, reason))
    }

    /// JSON between fixed texts.
    ///
    /// # Errors
    /// As [`Self::json_schema`].
    pub fn framed(&self, framed: &Framed) -> Result<Grammar, GrammarError> {
        schema::check(&framed.schema)?;
        let one = format!(
            "{} @{FRAMED} {}",
            self.literal(&framed.before),
            self.literal(&framed.after)
        );
        let lark = match &framed.between {
            Some(between) => {
                let between = self.literal(between);
                format!("start: one ({between} one)*\none: {one}\n")
            }
            None => format!("start: {one}\n"),
        };
        let inner = GrammarWithLexer {
            name: Some(FRAMED.into()),
            json_schema: Some(schema::prepared(&framed.schema)),
            ..GrammarWithLexer::default()
        };
        let grammar = TopLevelGrammar {
            grammars: vec![GrammarWithLexer::from_lark(lark), inner],
            max_tokens: None,
        };
        self.build(grammar)
            .map_err(|reason| self.misplaced(&framed.schema, reason))
    }

    /// A text that a regular expression matches as a whole, in the syntax of Rust's `regex` without anchors and look-around.
    ///
    /// # Errors
    /// If the expression is too large or cannot be followed.
    pub fn regex(&self, expression: &str) -> Result<Grammar, GrammarError> {
        const WHAT: &str = "regular expression";
        check_text(WHAT, expression)?;
        self.build(TopLevelGrammar::from_regex(expression))
            .map_err(|reason| GrammarError::Text { what: WHAT, reason })
    }

    /// A text that follows a grammar in llguidance's variant of Lark's syntax.
    ///
    /// # Errors
    /// If the grammar is too large or cannot be followed.
    pub fn lark(&self, grammar: &str) -> Result<Grammar, GrammarError> {
        const WHAT: &str = "grammar";
        check_text(WHAT, grammar)?;
        self.build(TopLevelGrammar::from_lark(grammar.into()))
            .map_err(|reason| GrammarError::Text { what: WHAT, reason })
    }

    fn build(&self, grammar: TopLevelGrammar) -> Result<Grammar, String> {
        let parser = self.parser(grammar)?;
        let mut matcher = Matcher::new(Ok(parser));
        // What can only end at once is a grammar that no text follows.
        let begins = match matcher.compute_mask_or_eos() {
            _ if matcher.is_stopped() => false,
            Ok(mask) => (0..self.known as u32)
                .any(|token| mask.is_allowed(token) && !self.ends.contains(&token)),
            Err(error) => return Err(plain(&error.to_string())),
        };
        match matcher.get_error() {
            Some(error) => Err(plain(&error)),
            None if !begins => Err("no text follows it".into()),
            None => Ok(Grammar::new(matcher, Arc::clone(&self.ends), self.known)),
        }
    }

    /// Builds a parser on a thread with a large stack.
    fn parser(&self, grammar: TopLevelGrammar) -> Result<TokenParser, String> {
        let work = || {
            panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.factory.create_parser(grammar)
            }))
            .map_err(|error| plain(&format!("{error:#}")))
        };
        thread::scope(|scope| {
            let built = thread::Builder::new()
                .name("grammar".into())
                .stack_size(STACK)
                .spawn_scoped(scope, work)
                .map_err(|error| format!("no thread could be started: {error}"))?;
            built
                .join()
                .unwrap_or_else(|_| Err("llguidance failed".into()))
        })
    }

    /// The error for a schema that could not be compiled, with the smallest part that cannot.
    fn misplaced(&self, whole: &Value, reason: String) -> GrammarError {
        let (place, reason) = schema::locate(whole, reason, |part| {
            let part = TopLevelGrammar::from_json_schema(part);
            self.parser(part).map(|_| ())
        });
        GrammarError::Schema { place, reason }
    }

    /// A text in Lark's syntax, with its special tokens as such.
    fn literal(&self, text: &str) -> String {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let found = self
                .special
                .iter()
                .filter(|(special, _)| !special.is_empty())
                .filter_map(|(special, id)| Some((rest.find(special)?, special.len(), *id)))
                .min_by_key(|(at, length, _)| (*at, usize::MAX - *length));
            let (at, length) = found.map_or((rest.len(), 0), |(at, length, _)| (at, length));
            if at > 0 {
                parts.push(Value::from(&rest[..at]).to_string());
            }
            if let Some((_, _, id)) = found {
                parts.push(format!("<[{id}]>"));
            }
            rest = &rest[at + length..];
        }
        parts.join(" ")
    }
}

/// A token that no text can contain as text.
fn marked(bytes: &[u8]) -> Vec<u8> {
    [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
}

fn check_text(what: &'static str, text: &str) -> Result<(), GrammarError> {
    if text.len() > TEXT_LIMIT {
        return Err(GrammarError::TooLong {
            what,
            bytes: text.len(),
            limit: TEXT_LIMIT,
        });
    }
    let mut open = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > NESTING_LIMIT {
            return Err(GrammarError::TooDeep {
                what,
                place: format!("byte {at}"),
                limit: NESTING_LIMIT,
            });
        }
    }
    Ok(())
}
