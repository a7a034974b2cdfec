//! Where in a conversation's text the assistant's turns are.
//!
//! A turn begins where the conversation before it, rendered with the generation prompt, ends: exactly what the model
//! will have read when it has to answer. It ends where the conversation up to and with it ends. To render so much for
//! every turn would take time that grows with the square of their number. So in a long conversation only the messages around a
//! turn are rendered, and what comes out is looked for in the text of the whole, from the turn before on.
//!
//! Where a template makes both impossible (it writes a default system message only in front of a user's, or moves the
//! system message to the last question), the turn is the place where what the template puts before an answer is
//! followed by this answer.

use std::cell::OnceCell;
use std::ops::Range;

use serde_json::Value;

use crate::data::message::Message;
use crate::data::tokenizer::Tokenizer;

/// Messages from which on turns are found by what is around them.
const LONG: usize = 24;

/// A turn of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) range: Range<usize>,
    /// Whether the range ends with the turn; if not, its end token has to be found.
    pub(super) exact: bool,
}

pub(super) struct Turns<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) messages: &'a [Message],
    pub(super) tools: Option<&'a Value>,
    /// The text of all messages.
    pub(super) whole: &'a str,
    /// How many system messages come first.
    lead: usize,
    /// What the template writes for the assistant to go on from.
    header: OnceCell<String>,
}

impl<'a> Turns<'a> {
    pub(super) fn new(
        tokenizer: &'a Tokenizer,
        messages: &'a [Message],
        tools: Option<&'a Value>,
        whole: &'a str,
    ) -> Self {
        let is_lead = |message: &&Message| matches!(message.role(), "system" | "developer");
        Self {
            tokenizer,
            messages,
            tools,
            whole,
            lead: messages.iter().take_while(is_lead).count(),
            header: OnceCell::new(),
        }
    }

    /// The turn of the message `at`, which is the assistant's, behind the byte `from` of the text.
    pub(super) fn find(&self, at: usize, from: usize) -> Result<Turn, String> {
        if self.messages.len() >= LONG
            && let Some(turn) = self.around(at, from).or_else(|| self.by_header(at, from))
        {
            return Ok(turn);
        }
        self.by_prefix(at)
            .or_else(|error| self.by_header(at, from).ok_or(error))
    }

    fn render(&self, messages: &[Message], prompt: bool) -> Result<String, String> {
        self.tokenizer
            .render_chat(messages, self.tools, prompt)
            .map_err(|error| error.to_string())
    }

    fn is_last(&self, at: usize) -> bool {
        at + 1 == self.messages.len()
    }

    /// From everything before the turn.
    fn by_prefix(&self, at: usize) -> Result<Turn, String> {
        let before = self.render(&self.messages[..at], true).map_err(|error| {
            if at > self.lead {
                return error;
            }
            format!(
                "messages[{at}]: the assistant speaks first, and with this chat template what it says cannot be told from the \
                 prompt ({error}); give it \"weight\": 0, or put a user's message in front"
            )
        })?;
        let after = if self.is_last(at) {
            self.whole.to_owned()
        } else {
            self.render(&self.messages[..=at], false)?
        };
        if !after.starts_with(&before) {
            return Err(format!(
                "messages[{at}]: with this chat template, the text up to this turn is no beginning of the text that has \
                 it, so what the assistant says cannot be told from the prompt (they differ at character {}); give \
                 it \"weight\": 0, give prompt and completion rows, or another template (some templates move or leave out \
                 the system message: write it into the first user message instead)",
                common(&before, &after).chars().count()
            ));
        }
        let exact = self.whole.starts_with(&after);
        if !exact && !self.whole.starts_with(&before) {
            return Err(format!(
                "messages[{at}]: this chat template rewrites earlier turns once later ones follow; end the row with \
                 this turn, or give it \"weight\": 0"
            ));
        }
        let end = if exact { after.len() } else { self.whole.len() };
        Ok(Turn {
            range: before.len()..end,
            exact,
        })
    }

    /// From the messages around it, looked for behind `from`.
    fn around(&self, at: usize, from: usize) -> Option<Turn> {
        let role = |at: usize| self.messages[at].role();
        let last =
            |wanted: &str, before: usize| (self.lead..before).rfind(|at| role(*at) == wanted);
        // What stands between the turn before and this one; the turn before itself where that is nothing.
        let answer = last("assistant", at);
        let first = answer.map_or(self.lead, |answer| (answer + 1).min(at - 1));
        if first >= at {
            return None;
        }
        // Templates want a question before an answer, and the call before what a tool says.
        let mut window: Vec<Message> = self.messages[..self.lead].to_vec();
        if role(first) != "user" {
            let question = last("user", first)?;
            window.push(self.messages[question].clone());
            let call = last("assistant", first).filter(|call| *call > question);
            window.extend(call.map(|call| self.messages[call].clone()));
        }
        let ahead = window.len();
        window.extend_from_slice(&self.messages[first..at]);
        let before = self.render(&window, true).ok()?;
        // Two other contents show where the content of the first of them begins.
        let with = |content: &str| {
            let mut other = window.clone();
            other[ahead] = other[ahead].with("content", content.into());
            self.render(&other, true)
        };
        let content = common(&with("0").ok()?, &with("1").ok()?).len();
        let wanted = before.get(content..).filter(|text| !text.is_empty())?;
        let start = from + self.whole.get(from..)?.find(wanted)? + wanted.len();
        if self.is_last(at) {
            return Some(Turn {
                range: start..self.whole.len(),
                exact: true,
            });
        }
        window.push(self.messages[at].clone());
        let after = self.render(&window, false).ok()?;
        let turn = after.strip_prefix(&before)?;
        let exact = self.whole[start..].starts_with(turn);
        let end = if exact {
            start + turn.len()
        } else {
            self.whole.len()
        };
        Some(Turn {
            range: start..end,
            exact,
        })
    }

    /// Where what comes before an answer is followed by this one.
    fn by_header(&self, at: usize, from: usize) -> Option<Turn> {
        let header = self.header.get_or_init(|| {
            let prompted = self.render(self.messages, true).unwrap_or_default();
            let header = prompted.strip_prefix(self.whole);
            header.unwrap_or_default().to_owned()
        });
        let said = self.messages[at].content().map_or("", str::trim);
        if said.is_empty() {
            return None;
        }
        if header.is_empty() {
            // Nothing comes before an answer, as in Mistral's templates.
            let start = from + self.whole.get(from..)?.find(said)?;
            return Some(Turn {
                range: start..self.whole.len(),
                exact: self.is_last(at),
            });
        }
        let mut from = from;
        loop {
            let start = from + self.whole.get(from..)?.find(header.as_str())? + header.len();
            if self.whole[start..].trim_start().starts_with(said) {
                return Some(Turn {
                    range: start..self.whole.len(),
                    exact: self.is_last(at),
                });
            }
            from = start;
        }
    }
}

/// What both texts begin with.
fn common<'a>(a: &'a str, b: &str) -> &'a str {
    let same = a.char_indices().zip(b.chars());
    let differs = same
        .skip_while(|((_, x), y)| x == y)
        .map(|((at, _), _)| at)
        .next();
    &a[..differs.unwrap_or(a.len().min(b.len()))]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::fixture;

    /// Templates that differ in what a message's text depends on.
    const TEMPLATES: [&str; 5] = [
        fixture::CHATML,
        // As Llama 2: the beginning token and the end token around pairs.
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' <|im_end|>' }}{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}",
        // As Qwen 3: what follows the last question keeps its reasoning.
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        // As Phi 3: the whole ends with one more token.
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        // Roles have to alternate, tools aside.
        "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == ns.last and m.role == 'user' %}{{ raise_exception('alternate') }}{% endif %}{% set ns.last = m.role %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ];

    fn conversation(turns: usize, system: bool) -> Vec<Message> {
        let mut list = Vec::new();
        if system {
            list.push(json!({"role": "system", "content": "Be kind."}));
        }
        for n in 0..turns {
            // The same words come again and again, so that a turn could be mistaken for another.
            let word = ["yes", "no", " yes ", "say yes", "1"][n * 7 % 5];
            list.push(json!({"role": "user", "content": word}));
            if n % 4 == 3 {
                list.push(json!({"role": "assistant", "content": "call"}));
                list.push(json!({"role": "tool", "content": word}));
                list.push(json!({"role": "tool", "content": "no"}));
            }
            list.push(json!({"role": "assistant", "content": word}));
        }
        serde_json::from_value(list.into()).unwrap()
    }

    #[test]
    fn what_is_around_a_turn_finds_it_as_all_before_it_does() {
        for template in TEMPLATES {
            let tokenizer = fixture::with_template(Some(template));
            for messages in [conversation(9, false), conversation(8, true)] {
                let whole = tokenizer.render_chat(&messages, None, false).unwrap();
                let turns = Turns::new(&tokenizer, &messages, None, &whole);
                let mut from = 0;
                for (at, message) in messages.iter().enumerate() {
                    if message.role() == "assistant" {
                        let expected = turns.by_prefix(at).unwrap();
                        let found = turns.around(at, from);
                        assert_eq!(found, Some(expected.clone()), "{at} of {template}");
                        from = expected.range.start;
                    }
                }
            }
        }
    }

    #[test]
    fn a_header_finds_what_no_beginning_does() {
        let tokenizer = fixture::tokenizer();
        let messages: Vec<Message> = serde_json::from_value(json!([
            {"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
        ]))
        .unwrap();
        let whole = tokenizer.render_chat(&messages, None, false).unwrap();
        let turns = Turns::new(&tokenizer, &messages, None, &whole);
        assert!(turns.by_prefix(0).is_err());
        let turn = turns.find(0, 0).unwrap();
        assert!(whole[turn.range].starts_with("Welcome!<|im_end|>"));
    }
}
