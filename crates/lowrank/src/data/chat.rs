//! Which tokens of a conversation the assistant says.
//!
//! The whole conversation is rendered once and encoded once, so its ids are those that `transformers` gives with
//! `apply_chat_template(messages, tokenize=True)`: encoding turns one by one would split tokens that a vocabulary
//! joins across a turn's edge. Each assistant turn is then found as a range of the text. It begins where the same
//! conversation cut before it, rendered with the generation prompt, ends: exactly what the model will have read when it
//! has to answer. It ends with the turn's end token. The bytes of the text that every token covers are known
//! exactly, and a token is supervised if it covers any byte of the range.
//!
//! Some templates write a turn otherwise once others follow (they drop its reasoning, or end the last turn with one
//! more token). The whole conversation decides: such a turn is found in it from its beginning to its end token. What
//! cannot be found is an error, never a guess.

use std::ops::Range;

use serde_json::Value;

use super::rows::Message;
use super::tokenizer::{Encoded, Tokenizer};

/// A conversation's ids, and for each whether it is the assistant's.
pub(super) struct Chat {
    pub(super) ids: Vec<u32>,
    pub(super) supervised: Vec<bool>,
}

pub(super) fn encode_chat(
    tokenizer: &Tokenizer,
    messages: &[Message],
    tools: Option<&Value>,
) -> Result<Chat, String> {
    if !messages.iter().any(|message| message.role() == "assistant") {
        return Err("no message has the role \"assistant\", so there is nothing to learn".into());
    }
    let render = |upto: usize, prompt: bool| {
        tokenizer
            .render_chat(&messages[..upto], tools, prompt)
            .map_err(|error| error.to_string())
    };
    let whole = render(messages.len(), false)?;
    let encoded = tokenizer
        .encode_with_offsets(&whole)
        .map_err(|error| error.to_string())?;
    let mut supervised = vec![false; encoded.ids.len()];
    for (at, message) in messages
        .iter()
        .enumerate()
        .filter(|(_, message)| message.is_supervised())
    {
        let before = render(at, true)?;
        let after = if at + 1 == messages.len() {
            whole.clone()
        } else {
            render(at + 1, false)?
        };
        if !after.starts_with(&before) {
            return Err(format!(
                "messages[{at}]: with this chat template, the text up to this turn is no beginning of the text that has \
                 it, so what the assistant says cannot be told from the prompt (they differ at character {}); give \
                 prompt and completion rows, or another template (some templates move or leave out the system message: \
                 write it into the first user message instead)",
                common_characters(&before, &after)
            ));
        }
        let unchanged = whole.starts_with(&after);
        if !unchanged && !whole.starts_with(&before) {
            return Err(format!(
                "messages[{at}]: this chat template rewrites earlier turns once later ones follow; end the row with \
                 this turn, or give it \"weight\": 0"
            ));
        }
        let turn = before.len()..if unchanged { after.len() } else { whole.len() };
        let tokens = tokens_in(&encoded, &turn);
        let content = message.content().map_or("", str::trim);
        let said = whole[turn.clone()]
            .find(content)
            .map_or(turn.start, |found| turn.start + found + content.len());
        let end = end_token(tokenizer, &encoded, tokens.clone(), said, unchanged).ok_or_else(|| {
            format!(
                "messages[{at}]: this chat template writes the turn otherwise once later ones follow, and without one of \
                 the model's end tokens, so its end cannot be found; end the row with this turn, or give it \"weight\": 0"
            )
        })?;
        supervised[tokens.start..end].fill(true);
    }
    Ok(Chat {
        ids: encoded.ids,
        supervised,
    })
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

fn common_characters(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(x, y)| x == y).count()
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
        let error = learned(&tokenizer, json!([{"role": "user", "content": "q"}])).unwrap_err();
        assert!(
            error.contains("no message has the role \"assistant\""),
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
}
