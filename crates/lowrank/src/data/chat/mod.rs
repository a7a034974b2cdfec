//! Which tokens of a conversation the assistant says.
//!
//! The whole conversation is rendered once and encoded once, so its ids are those that `transformers` gives with
//! `apply_chat_template(messages, tokenize=True)`: encoding turns one by one would split tokens that a vocabulary
//! joins across a turn's edge. Each assistant turn is then found as a range of the text (see
//! [`turns`]). The bytes of the text that every token covers are known exactly, and a token is supervised if it covers
//! any byte of the range, up to and with the turn's end token.
//!
//! Some templates write a turn otherwise once others follow (they drop its reasoning, or end the last turn with one
//! more token). The whole conversation decides: such a turn is found in it from its beginning to its end token. What
//! cannot be found is an error, never a guess.

mod turns;
mod written;

use std::collections::BTreeSet;
use std::ops::Range;

use serde_json::Value;

use self::turns::{Turn, Turns};
use self::written::written;
pub(super) use self::written::written_with;
use super::message::Message;
use super::tokenizer::{Encoded, Tokenizer};

/// A conversation's ids, and for each whether it is the assistant's.
pub(super) struct Chat {
    pub(super) ids: Vec<u32>,
    pub(super) supervised: Vec<bool>,
    pub(super) notes: ChatNotes,
}

/// What a reader of a conversation should know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ChatNotes {
    /// Arguments of tool calls were given to the template in the other form, text or object.
    pub(super) arguments: bool,
    /// Contents in parts were given to it as texts.
    pub(super) parts: bool,
    /// Messages whose content is not in the text as it stands.
    pub(super) rewritten: usize,
    /// Learned messages that say nothing: only their end is learned.
    pub(super) empty: usize,
    /// Arguments of tool calls that are texts without JSON in them.
    pub(super) unreadable: usize,
    /// Whether tools or calls hold a number of more digits than are kept.
    pub(super) large_numbers: bool,
    /// Roles that are not the usual ones.
    pub(super) roles: BTreeSet<String>,
}

/// The roles that chat templates know.
const ROLES: [&str; 7] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
];

pub(super) fn encode_chat(
    tokenizer: &Tokenizer,
    messages: &[Message],
    tools: Option<&Value>,
) -> Result<Chat, String> {
    if !messages.iter().any(|message| message.role() == "assistant") {
        return Err(no_assistant(messages));
    }
    let written = written(tokenizer, messages, tools, false)?;
    let (messages, whole) = (&*written.messages, &*written.text);
    let encoded = tokenizer
        .encode_with_offsets(whole)
        .map_err(|error| error.to_string())?;
    let mut supervised = vec![false; encoded.ids.len()];
    let turns = Turns::new(tokenizer, messages, tools, whole);
    // Where the last turn was found.
    let mut from = 0;
    let answers = messages.iter().enumerate();
    for (at, message) in answers.filter(|(_, message)| message.role() == "assistant") {
        let found = turns.find(at, from);
        if !message.is_supervised() {
            from = found.map_or(from, |turn| turn.range.start);
            continue;
        }
        let Turn { range, exact } = found?;
        from = range.start;
        let tokens = tokens_in(&encoded, &range);
        let content = message.content().map_or("", str::trim);
        let said = whole[range.clone()]
            .find(content)
            .map_or(range.start, |found| range.start + found + content.len());
        let end = end_token(tokenizer, &encoded, tokens.clone(), said, exact).ok_or_else(|| {
            format!(
                "messages[{at}]: this chat template writes the turn otherwise once later ones follow, and without one of \
                 the model's end tokens, so its end cannot be found; end the row with this turn, or give it \"weight\": 0"
            )
        })?;
        supervised[tokens.start..end].fill(true);
    }
    Ok(Chat {
        notes: ChatNotes {
            arguments: written.arguments,
            parts: written.parts,
            large_numbers: tools.is_some_and(holds_large_number)
                || messages
                    .iter()
                    .flat_map(|message| message.fields().values())
                    .any(holds_large_number),
            ..notes(tokenizer, messages, whole)
        },
        ids: encoded.ids,
        supervised,
    })
}

/// Whether a value holds a number that no 64 bits hold exactly.
fn holds_large_number(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_f64().is_some_and(|number| {
            let is_whole = number.fract() == 0.0;
            is_whole && number.abs() >= 18_446_744_073_709_551_615.0
        }),
        Value::Array(items) => items.iter().any(holds_large_number),
        Value::Object(map) => map.values().any(holds_large_number),
        _ => false,
    }
}

/// That nobody answers, and who speaks instead.
fn no_assistant(messages: &[Message]) -> String {
    let mut roles: Vec<String> = Vec::new();
    for message in messages {
        let role = format!("{:?}", message.role());
        if !roles.contains(&role) {
            roles.push(role);
        }
    }
    let more = roles.len().saturating_sub(SHOWN_ROLES);
    roles.truncate(SHOWN_ROLES);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    format!(
        "no message has the role \"assistant\", so there is nothing to learn; the roles are {}{more}: name them system, user, \
         assistant and tool",
        roles.join(", ")
    )
}

const SHOWN_ROLES: usize = 6;

fn notes(tokenizer: &Tokenizer, messages: &[Message], whole: &str) -> ChatNotes {
    let mut notes = ChatNotes::default();
    let mut from = 0;
    for message in messages {
        let role = message.role();
        if !ROLES.contains(&role) {
            notes.roles.insert(role.to_owned());
        }
        let content = message.content().map_or("", str::trim);
        let calls = [
            "tool_calls",
            "function_call",
            "reasoning_content",
            "reasoning",
            "thinking",
        ];
        // What the template does not write is not said.
        let says_more = |name: &&str| {
            let is_empty = match message.fields().get(*name) {
                None | Some(Value::Null) => true,
                Some(Value::Array(items)) => items.is_empty(),
                Some(_) => false,
            };
            !is_empty && tokenizer.template_mentions(name)
        };
        let only_content = !calls.iter().any(says_more);
        notes.unreadable += written::unreadable_arguments(message);
        if content.is_empty() && message.is_supervised() && only_content {
            notes.empty += 1;
        }
        // Usually behind the message before; a template may put it elsewhere.
        match whole[from..].find(content) {
            Some(found) => from += found + content.len(),
            None if whole.contains(content) => {}
            None => notes.rewritten += 1,
        }
    }
    notes
}

/// One behind the last token to learn: the first end token behind what was said, else the last special token, else
/// all of the turn (which the template then ends with plain text).
fn end_token(
    tokenizer: &Tokenizer,
    encoded: &Encoded,
    tokens: Range<usize>,
    said: usize,
    exact: bool,
) -> Option<usize> {
    let behind = |at: &usize| encoded.offsets[*at].0 >= said;
    let stops = |at: &usize| tokenizer.stop_ids().contains(&encoded.ids[*at]);
    let special = |at: &usize| tokenizer.is_special(encoded.ids[*at]);
    let found = tokens.clone().filter(behind).find(stops);
    if !exact {
        return found.map(|at| at + 1);
    }
    Some(
        found
            .or_else(|| tokens.clone().rev().filter(behind).find(special))
            .map_or(tokens.end, |at| at + 1),
    )
}

/// The tokens that cover any byte of the range.
fn tokens_in(encoded: &Encoded, range: &Range<usize>) -> Range<usize> {
    let start = encoded
        .offsets
        .partition_point(|(_, end)| *end <= range.start);
    let end = encoded
        .offsets
        .partition_point(|(begin, _)| *begin < range.end);
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::fixture;

    fn messages(value: Value) -> Vec<Message> {
        serde_json::from_value(value).unwrap()
    }

    /// The ids as text, and the runs that are supervised.
    fn learned(
        tokenizer: &Tokenizer,
        conversation: Value,
    ) -> Result<(String, Vec<String>), String> {
        let chat = encode_chat(tokenizer, &messages(conversation), None)?;
        let mut runs = Vec::new();
        let mut run = Vec::new();
        for (id, label) in chat.ids.iter().zip(&chat.supervised) {
            if *label {
                run.push(*id);
            } else if !run.is_empty() {
                runs.push(tokenizer.decode(&std::mem::take(&mut run), false).unwrap());
            }
        }
        if !run.is_empty() {
            runs.push(tokenizer.decode(&run, false).unwrap());
        }
        Ok((tokenizer.decode(&chat.ids, false).unwrap(), runs))
    }

    fn two_turns() -> Value {
        json!([
            {"role": "user", "content": "one?"}, {"role": "assistant", "content": "hello 1"},
            {"role": "user", "content": "two?"}, {"role": "assistant", "content": "\nhello 2 "},
        ])
    }

    #[test]
    fn answers_and_their_end_tokens_are_learned() {
        let tokenizer = fixture::tokenizer();
        let (text, runs) = learned(&tokenizer, two_turns()).unwrap();
        let given = messages(two_turns());
        assert_eq!(text, tokenizer.render_chat(&given, None, false).unwrap());
        assert_eq!(runs, ["hello 1<|im_end|>", "\nhello 2 <|im_end|>"]);
        let chat = encode_chat(&tokenizer, &given, None).unwrap();
        assert_eq!(chat.ids, tokenizer.encode(&text, false).unwrap());
    }

    #[test]
    fn weight_zero_is_read_but_not_learned() {
        let mut conversation = two_turns();
        conversation[1]["weight"] = 0.into();
        conversation[3]["weight"] = 1.into();
        let (_, runs) = learned(&fixture::tokenizer(), conversation).unwrap();
        assert_eq!(runs, ["\nhello 2 <|im_end|>"]);
    }

    #[test]
    fn an_end_token_within_an_answer_does_not_end_it() {
        let conversation = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>b"}]);
        let (_, runs) = learned(&fixture::tokenizer(), conversation).unwrap();
        assert_eq!(runs, ["a<|im_end|>b<|im_end|>"]);
    }

    #[test]
    fn the_beginning_that_a_template_writes_is_not_doubled() {
        let template = "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let parts = super::super::gguf_tokenizer::GgufTokenizerParts {
            add_bos: Some(true),
            chat_template: Some(template.into()),
            ..fixture::parts()
        };
        let (text, _) = learned(&fixture::build(&parts), two_turns()).unwrap();
        assert!(
            text.starts_with("<s><|im_start|>") && !text.contains("<s><s>"),
            "{text}"
        );
    }

    #[test]
    fn a_turn_that_the_template_ends_with_text_is_learned_whole() {
        let template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
        let (_, runs) = learned(&fixture::with_template(Some(template)), two_turns()).unwrap();
        // The space before the answer belongs to the token " hello", which the answer begins in.
        assert_eq!(runs, [" hello 1\n", "\nhello 2 \n"]);
    }

    #[test]
    fn earlier_turns_that_lose_their_reasoning_are_found_by_their_end_token() {
        // As Qwen 3: only what follows the last question keeps its (here empty) reasoning.
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let (_, runs) = learned(&fixture::with_template(Some(template)), two_turns()).unwrap();
        assert_eq!(
            runs,
            ["hello 1<|im_end|>", "<think></think>\nhello 2 <|im_end|>"]
        );
    }

    #[test]
    fn a_text_end_behind_the_end_token_is_not_learned() {
        // As Phi 3: the conversation as a whole ends with one more token.
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}";
        let (_, runs) = learned(&fixture::with_template(Some(template)), two_turns()).unwrap();
        assert_eq!(runs, ["hello 1<|im_end|>", "\nhello 2 <|im_end|>"]);
    }

    #[test]
    fn what_cannot_be_found_is_an_error() {
        let tokenizer = fixture::tokenizer();
        let error = learned(
            &tokenizer,
            json!([{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]),
        )
        .unwrap_err();
        assert!(
            error.starts_with("no message has the role \"assistant\"")
                && error.contains("the roles are \"human\", \"bot\""),
            "{error}"
        );
        // The generation prompt begins an answer otherwise than the answer is written.
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}";
        let error = learned(&fixture::with_template(Some(template)), two_turns()).unwrap_err();
        assert!(
            error.starts_with(
                "messages[1]: with this chat template, the text up to this turn is no beginning"
            ),
            "{error}"
        );
        // Only the last turn is written at all.
        let template = "{{ messages[-1].content }}<|im_end|>{% if add_generation_prompt %}{{ 'A' }}{% endif %}";
        assert!(learned(&fixture::with_template(Some(template)), two_turns()).is_err());
        // Earlier turns are written otherwise, and have no end token.
        let template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if loop.last %}.{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
        let chat = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]);
        assert!(learned(&fixture::with_template(Some(template)), chat).is_err());
        let error = learned(
            &fixture::with_template(Some("{{ raise_exception('no') }}")),
            two_turns(),
        )
        .unwrap_err();
        assert!(error.contains("chat template: no"), "{error}");
    }

    #[test]
    fn tool_calls_are_learned_without_content() {
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let conversation = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]);
        let (_, runs) = learned(&fixture::with_template(Some(template)), conversation).unwrap();
        assert_eq!(runs, [r#"[{"name": "f"}]<|im_end|>"#]);
    }

    #[test]
    fn words_that_carry_their_space_are_the_assistants() {
        let tokenizer = fixture::sentence_piece();
        assert_eq!(tokenizer.bos_id(), Some(1));
        let ids = |text: &str| tokenizer.encode(text, false).unwrap();
        assert_eq!(ids("Hello you!"), [3, 4, 6]);
        let conversation = json!([
            {"role": "user", "content": "you"}, {"role": "assistant", "content": "Hello é"},
            {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "you"},
        ]);
        let chat = encode_chat(&tokenizer, &messages(conversation), None).unwrap();
        let learned: Vec<u32> = chat
            .ids
            .iter()
            .zip(&chat.supervised)
            .filter(|(_, label)| **label)
            .map(|(id, _)| *id)
            .collect();
        let byte = |byte: u32| 7 + byte;
        assert_eq!(learned, [3, 5, byte(0xc3), byte(0xa9), 5, 2, 4, 5, 2]);
    }

    #[test]
    fn the_assistant_may_begin() {
        let conversation = json!([
            {"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
        ]);
        let (_, runs) = learned(&fixture::tokenizer(), conversation).unwrap();
        assert_eq!(runs, ["Welcome!<|im_end|>", "hello<|im_end|>"]);
    }

    #[test]
    fn long_conversations_are_learned_as_short_ones() {
        let mut list = Vec::new();
        for n in 0..100 {
            list.push(json!({"role": "user", "content": format!("question {}", n % 7)}));
            list.push(json!({"role": "assistant", "content": format!("answer {}", n % 3), "weight": u8::from(n % 10 != 0)}));
        }
        let (_, runs) = learned(&fixture::tokenizer(), list.into()).unwrap();
        let expected: Vec<String> = (0..100)
            .filter(|n| n % 10 != 0)
            .map(|n| format!("answer {}<|im_end|>", n % 3))
            .collect();
        assert_eq!(runs, expected);
    }

    #[test]
    fn what_a_reader_should_know_is_noted() {
        let template = "{% for m in messages %}{% if m.role != 'note' %}{{ '<|im_start|>' + m.role + '\n' + m.content | upper + '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let tokenizer = fixture::with_template(Some(template));
        let conversation = messages(json!([
            {"role": "note", "content": "left out"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": ""},
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "A"},
        ]));
        let notes = encode_chat(&tokenizer, &conversation, None).unwrap().notes;
        assert_eq!((notes.rewritten, notes.empty), (2, 1));
        assert_eq!(notes.roles, BTreeSet::from(["note".to_owned()]));
        let plain = encode_chat(&fixture::tokenizer(), &messages(two_turns()), None).unwrap();
        assert_eq!(plain.notes, ChatNotes::default());
    }
}
